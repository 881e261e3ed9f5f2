"""MultEdit: the closed form, the value's objective, and what an edit does to a model."""

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import DECODERS, SHAPES, hooked, random_llava, random_prompts
from small_models import (
    BOS,
    IMAGE,
    any_attention,
    any_family,
    small_inputs,
    small_model,
    worded_model,
)
from torch import Tensor

from mmlens import EditRequest, Intervention, multedit, multedit_many
from mmlens.editing import MultEditSettings, SequentialEditor, augmented
from mmlens.editing.multedit import down_weight, keyed, keys_of, value_of
from mmlens.editing.solve import LeastSquares, unlike
from mmlens.editing.value import (
    ValueSettings,
    find_value,
    record_prompts,
    value_objective,
    value_site,
)
from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.interventions.functions import add
from mmlens.interventions.intervention import hook_name

ONE_KEY = MultEditSettings(
    positions="last",
    through_update=False,
    uses_references=False,
    lr=0.5,
    clamp=8.0,
    unit="value",
    ridge=0.0,
    weight=1.0,
    neighbour_weight=1.0,
)
"""One key of each prompt, and nothing else: what is tested here piece by piece."""
SEEDS = st.integers(0, 2**31 - 1)
LAMBDAS = st.sampled_from([1e-3, 0.01, 0.5, 4.0, 300.0])


def matrix(*sizes: int, generator: torch.Generator) -> Tensor:
    return torch.randn(*sizes, generator=generator, dtype=torch.float64)


# The closed form


@settings(max_examples=40)
@given(SEEDS, st.integers(1, 9), st.integers(1, 12), st.integers(1, 15), LAMBDAS)
def test_closed_form_solves_the_normal_equations(seed, d_model, d_mlp, n, lam):
    """W (lam I + K K^T) = lam W0 + Z K^T, to rounding in float64; more keys than d_mlp as well."""
    chance = torch.Generator().manual_seed(seed)
    weight = matrix(d_model, d_mlp, generator=chance)
    keys, values = matrix(d_mlp, n, generator=chance), matrix(d_model, n, generator=chance)
    residuals = values - weight @ keys
    delta = LeastSquares(list(keys.split(1, dim=1)), lam).update(residuals)
    assert delta.left.shape == (d_model, n) and delta.right.shape == (n, d_mlp)
    edited = weight + delta.dense()
    gram = lam * torch.eye(d_mlp, dtype=torch.float64) + keys @ keys.T
    wanted = lam * weight + values @ keys.T
    # Backward stable: an error of eps x the condition number of K^T K + lam I.
    condition = (lam + keys.square().sum()) / lam
    size = float((gram.norm() * edited.norm() + wanted.norm()) * condition)
    assert float((edited @ gram - wanted).norm()) <= 100 * torch.finfo(torch.float64).eps * size
    if n == 1:  # rank one, as the paper has it
        [k], [r] = keys.T, residuals.T
        torch.testing.assert_close(delta.dense(), torch.outer(r, k) / (lam + k @ k))


@settings(max_examples=20)
@given(SEEDS, st.integers(1, 9), st.integers(1, 12), st.integers(1, 4), LAMBDAS)
def test_an_edit_may_weigh_more_than_what_is_kept(seed, d_model, d_mlp, n, lam):
    """W (lam I + w K K^T + K' K'^T) = w R K^T for the change W; share rises with the weight."""
    chance = torch.Generator().manual_seed(seed)
    keys, kept = (matrix(d_mlp, count, generator=chance) for count in (n, 5))
    residuals = matrix(d_model, n, generator=chance)
    shares = []
    for weight in (0.25, 1.0, 50.0):
        gram = lam * torch.eye(d_mlp, dtype=torch.float64) + weight * keys @ keys.T + kept @ kept.T
        expected = torch.linalg.solve(gram, (weight * residuals @ keys.T).T).T
        found = LeastSquares(list(keys.split(1, dim=1)), lam, kept, weight).update(residuals)
        torch.testing.assert_close(found.dense(), expected, rtol=1e-6, atol=1e-8)
        shares.append(float(LeastSquares([keys[:, :1]], lam, kept, weight).rows[0] @ keys[:, 0]))
    assert shares == sorted(shares) and shares[-1] <= 1 + 1e-9
    assert shares[0] < shares[-1]


@settings(max_examples=20)
@given(SEEDS, st.integers(1, 9), st.integers(2, 20))
def test_without_lambda_keys_get_their_values(seed, d_model, d_mlp):
    """And the limit lam -> 0 is continuous. Keys are orthogonal up to a factor of two."""
    chance = torch.Generator().manual_seed(seed)
    n = random.Random(seed).randint(1, d_mlp)
    keys = torch.linalg.qr(matrix(d_mlp, n, generator=chance)).Q
    keys = keys @ (torch.eye(n, dtype=torch.float64) + torch.ones(n, n, dtype=torch.float64) / n)
    weight, values = (matrix(d_model, width, generator=chance) for width in (d_mlp, n))
    columns = list(keys.split(1, dim=1))
    for lam, tolerance in ((0.0, 1e-12), (1e-9, 1e-7)):
        delta = LeastSquares(columns, lam).update(values - weight @ keys)
        off = (weight + delta.dense()) @ keys - values
        assert float(off.norm()) <= tolerance * float((values - weight @ keys).norm() + 1)


@settings(max_examples=20)
@given(SEEDS, LAMBDAS)
def test_kept_keys_are_keys_with_a_residual_of_zero(seed, lam):
    chance = torch.Generator().manual_seed(seed)
    keys, kept = matrix(13, 3, generator=chance), matrix(13, 6, generator=chance)
    residuals = matrix(5, 3, generator=chance)
    columns = [*keys.split(1, dim=1), *kept.split(1, dim=1)]
    all_of_them = torch.cat([residuals, torch.zeros(5, 6, dtype=torch.float64)], dim=1)
    expected = LeastSquares(columns, lam).update(all_of_them).dense()
    found = LeastSquares(columns[:3], lam, kept).update(residuals)
    assert found.left.shape[1] == 3
    torch.testing.assert_close(found.dense(), expected)
    # Several keys of one edit get one residual, for the price of one rank.
    together = LeastSquares([keys[:, :2], keys[:, 2:]], lam, kept).update(residuals[:, :2])
    repeated = LeastSquares(columns[:3], lam, kept).update(residuals[:, [0, 0, 1]])
    assert together.left.shape[1] == 2
    torch.testing.assert_close(together.dense(), repeated.dense())


def test_keys_that_depend_on_each_other_need_lambda(seed: int) -> None:
    key = torch.randn(7, 1)
    with pytest.raises(ValueError, match=r"lam=0.*depend on each other"):
        _ = LeastSquares([key, torch.zeros(7, 1)], 0.0).rows
    with pytest.raises(ValueError, match="lam=-1"):
        LeastSquares([key], -1.0)
    rows = LeastSquares([key, key], 1e-6).rows
    torch.testing.assert_close(rows.sum(dim=0) @ key, torch.ones(1))


def test_keys_that_are_edited_are_not_kept(seed: int) -> None:
    others = torch.randn(7, 3)
    keys = torch.cat([others[:, 1:2] * 1.0001, torch.randn(7, 2) + 10, others[:, :1]], dim=1)
    assert torch.equal(unlike(keys, others), keys[:, 1:3])
    assert unlike(keys[:, :0], others).shape == (7, 0)


# The value


def request_for(
    model, seed: int, n_prompts: int = 1, n_neighbours: int = 0, target: int = 5
) -> EditRequest:
    """Random prompts with a span somewhere in the text."""
    chance = random.Random(seed)

    def prompt(index: int) -> MultimodalInputs:
        inputs = small_inputs(model, seed + index)
        text = inputs.span("text").tolist()
        at = chance.randrange(len(text) - 1)
        return small_inputs(model, seed + index, spans={"constraint": text[: at + 1]})

    prompts = [prompt(index) for index in range(n_prompts + n_neighbours)]
    return EditRequest(
        prompts[0], target, key_prompts=prompts[1:n_prompts], neighbours=prompts[n_prompts:]
    )


def different_requests(model, seed: int, n: int) -> list[EditRequest]:
    """With targets 5, 6 ... and other keys: no two prompts are the same as far as the key."""
    found: dict[tuple[int, ...], EditRequest] = {}
    while len(found) < n:
        request = request_for(model, random.Random(seed).randrange(2**31), target=5 + len(found))
        seed += 1
        key = request.position(request.inputs)
        found.setdefault(tuple(request.inputs.tokens[0, : key + 1].tolist()), request)
    return list(found.values())


def names(layer: int) -> list[str]:
    return [hook_name("post", layer), hook_name("mlp_out", layer)]


@settings(max_examples=10)
@given(SEEDS, st.sampled_from(["mlp_out", "resid_post"]), st.sampled_from([False, True]))
def test_the_gradient_is_that_of_full_passes(seed, site, first_token_only):
    """In float64, to 1e-9: of the joint likelihood, over several prompts, with KL and decay."""
    model = any_family(seed).double()
    layer = random.Random(seed).randrange(model.cfg.n_layers)
    request = request_for(model, seed, n_prompts=2, n_neighbours=1)
    chosen = ValueSettings(weight_decay=0.3, kl_weight=0.7)
    answers = [5, 7, 6][: 1 if first_token_only else 3]
    prompts = with_tokens(model, request, [*names(layer), hook_name(site, layer)], answers)
    neighbour = recorded_neighbour(model, request, seed)
    size = torch.tensor(1.7, dtype=torch.float64)
    objective = value_objective(prompts, site, layer, chosen, [neighbour], size)
    start = torch.randn(1, model.cfg.d_model, dtype=torch.float64)
    delta = start.clone().requires_grad_()
    loss, probability = objective(delta)
    [gradient] = torch.autograd.grad(loss, delta)

    full = start.clone().requires_grad_()
    found = []
    for prompt in prompts:
        where = Intervention(site, layer, prompt.positions, add(full))
        logits = model.run_with_hooks(prompt.recording.inputs, fwd_hooks=where.fwd_hooks())
        told = logits[0, prompt.answer.positions].log_softmax(-1)
        found.append(sum(told[i, token] for i, token in enumerate(answers)))
    expected = -torch.stack(found).mean() + 0.3 * full.norm() / 1.7**2
    inputs = neighbour.recording.inputs
    moved = Intervention(site, layer, None, add(neighbour.shares @ full))
    after = model.run_with_hooks(inputs, fwd_hooks=moved.fwd_hooks())[0, -1].log_softmax(-1)
    before = model(inputs)[0, -1].log_softmax(-1)
    expected = expected + 0.7 * (before.exp() * (before - after)).sum()
    [wanted] = torch.autograd.grad(expected, full)
    assert abs(float((loss - expected).detach())) <= 1e-9 * max(1.0, abs(float(expected.detach())))
    assert float((gradient - wanted).norm()) <= 1e-9 * max(1.0, float(wanted.norm()))
    assert probability == pytest.approx(float(torch.stack(found).detach().exp().mean()))


def with_tokens(model, request: EditRequest, names: list[str], tokens: list[int]):
    """Recorded prompts, as if the target were these tokens (these models have no tokenizer)."""
    prompts = record_prompts(model, request, names)
    told = torch.tensor(tokens)
    found = []
    for prompt, inputs in zip(prompts, request.prompts, strict=True):
        positions = torch.arange(inputs.n_pos - 1, inputs.n_pos - 1 + len(told))
        answer = replace(prompt.answer, tokens=told, positions=positions)
        recording = prompt.recording.record(inputs.append(told[:-1]), names)
        found.append(replace(prompt, recording=recording, answer=answer))
    return found


def recorded_neighbour(model, request: EditRequest, seed: int):
    from mmlens.editing.value import Neighbour

    recording = model.record(request.neighbours[0])
    shares = torch.randn(recording.inputs.n_pos, 1, generator=torch.Generator().manual_seed(seed))
    return Neighbour(recording, shares.double())


def test_the_target_is_the_whole_text(seed: int) -> None:
    """Joint likelihood of all its tokens, or of the first alone."""
    model = worded_model(seed)
    inputs = model.prepare(
        "<image>what is this?", None or picture(seed), spans={"constraint": "this"}
    )
    request = EditRequest(inputs, "an answer")
    [whole] = record_prompts(model, request, names(0))
    [first] = record_prompts(model, request, names(0), first_token_only=True)
    assert len(whole.answer.tokens) > 1 and len(first.answer.tokens) == 1
    assert whole.recording.inputs.n_pos == inputs.n_pos + len(whole.answer.tokens) - 1
    assert first.recording.inputs.n_pos == inputs.n_pos
    log_probs = model(inputs.append(whole.answer.tokens))[0].log_softmax(-1)
    expected = sum(
        float(log_probs[inputs.n_pos - 1 + i, token])
        for i, token in enumerate(whole.answer.tokens.tolist())
    )
    found = whole.answer.log_probability(whole.recording.logits(whole.answer.positions))
    assert float(found) == pytest.approx(expected, rel=1e-4)


def picture(seed: int):
    import small_models

    return small_models.picture(seed)


def test_delta_stays_within_the_clamp_and_ends_early(seed: int) -> None:
    model = any_family(seed)
    request = request_for(model, seed)
    prompts = record_prompts(model, request, names(0))
    z0 = prompts[0].at_positions("mlp_out", 0).norm()
    for clamp in (1e-3, 0.3):
        chosen = ValueSettings(lr=5.0, steps=3, stop_at=2.0, clamp=clamp)
        value = find_value(model, prompts, "mlp_out", 0, chosen)
        assert value.steps == 3
        assert float(value.delta.norm()) <= clamp * float(z0) * (1 + 1e-5)
    value = find_value(model, prompts, "mlp_out", 0, ValueSettings(stop_at=0.0))
    assert value.steps == 0 and not value.delta.any()


@settings(max_examples=5)
@given(SEEDS)
def test_every_position_may_get_a_value_of_its_own(seed):
    """The gradient of all values at once is a full pass's; the update is the least squares' one."""
    model = any_family(seed).double()
    request = request_for(model, seed)
    layer = random.Random(seed).randrange(model.cfg.n_layers)
    begin = len(request.inputs.spans[0].get("bos", ()))
    [prompt] = record_prompts(model, request, names(layer), everywhere="all")
    assert prompt.positions == list(range(begin, request.inputs.n_pos))
    start = torch.randn(len(prompt.positions), model.cfg.d_model, dtype=torch.float64)
    chosen = ValueSettings(weight_decay=0.3)
    size = torch.tensor(1.3, dtype=torch.float64)
    delta, full = start.clone().requires_grad_(), start.clone().requires_grad_()
    loss, _ = value_objective([prompt], "mlp_out", layer, chosen, [], size)(delta)
    where = Intervention("mlp_out", layer, prompt.positions, add(full))
    logits = model.run_with_hooks(prompt.recording.inputs, fwd_hooks=where.fwd_hooks())
    told = logits[0, prompt.answer.positions].log_softmax(-1)
    expected = -told[0, request.target] + 0.3 * full.norm(dim=1).sum() / 1.3**2
    [gradient], [wanted] = (
        torch.autograd.grad(*each) for each in ((loss, delta), (expected, full))
    )
    assert float((gradient - wanted).norm()) <= 1e-9 * max(1.0, float(wanted.norm()))

    part = keyed(model, request, layer, replace(ONE_KEY, positions="all"))
    assert [keys.shape[1] for keys in part.of_values] == [1] * len(prompt.positions)
    steps, lam = 2, 0.01
    edit = multedit(
        model, request, layer=layer, positions="all", steps=steps, lam=lam, settings=ONE_KEY
    )
    update = edit.deltas[down_weight(layer)]
    assert update.left.shape[1] == len(prompt.positions)
    system = LeastSquares(part.of_values, lam, part.kept)
    value = value_of(model, part, system, layer, replace(ONE_KEY, positions="all", steps=steps))
    # |K W - Z|^2 + lam |W|^2, where a kept key's value is zero, as one system of equations.
    keys = torch.cat([part.keys, part.kept], dim=1).T
    values = torch.nn.functional.pad(value.delta, (0, 0, 0, part.kept.shape[1]))
    equations = torch.cat([keys, lam**0.5 * torch.eye(keys.shape[1], dtype=torch.float64)])
    goal = torch.nn.functional.pad(values, (0, 0, 0, keys.shape[1]))
    wanted = torch.linalg.lstsq(equations, goal).solution
    # An error of eps x the condition number of K^T K + lam I.
    condition = float(lam + keys.square().sum()) / lam
    bound = 100 * torch.finfo(torch.float64).eps * condition * float(goal.norm()) / lam**0.5
    assert float((update.dense().T - wanted).norm()) <= bound


@pytest.mark.parametrize(
    ("n_prompts", "options"),
    [
        (1, {"positions": "all", "preserve": "prompts"}),
        (2, {"key": "mean", "preserve": "both"}),
        (2, {"key": "each", "preserve": "nothing"}),
    ],
    ids=["all positions", "mean key", "each key"],
)
def test_a_search_through_the_update_finds_what_the_edited_model_gives(
    seed: int, n_prompts: int, options: dict
) -> None:
    """Its probability is that of a plain run of the edited model, and so is its gradient."""
    model = any_family(seed, n_layers=3).double()
    layer = random.randrange(2)  # a key's value in the last one would reach no other position
    request = request_for(model, seed, n_prompts=n_prompts, n_neighbours=1)
    kept = keys_of(model, [small_inputs(model, seed + 50)], layer, span=None)
    options = {**options, "steps": 4, "lam": 0.3, "weight": 2.0}
    edit = multedit(
        model, request, layer=layer, kept=kept, through_update=True, **options, settings=ONE_KEY
    )

    def probability() -> float:
        found = [model(each)[0, -1].softmax(-1)[request.target] for each in request.prompts]
        return float(torch.stack(found).mean())

    with torch.no_grad(), edit.applied(model):
        assert edit.metadata["probability"] == [pytest.approx(probability(), rel=1e-6)]
    plain = multedit(model, request, layer=layer, kept=kept, **options, settings=ONE_KEY)
    # The values at their keys alone give something else (where they reach the answer at all).
    with torch.no_grad(), plain.applied(model):
        assert not plain.deltas[down_weight(layer)].left.any() or plain.metadata["probability"] != [
            pytest.approx(probability(), rel=1e-6)
        ]

    chosen = replace(ONE_KEY, **options)
    part = keyed(model, request, layer, chosen)
    rows = LeastSquares(part.of_values, chosen.lam, kept, chosen.weight).rows
    shares = [prompt.keys(layer).T @ rows.T for prompt in part.prompts]
    size = torch.tensor(1.0, dtype=torch.float64)
    start = torch.randn(len(rows), model.cfg.d_model, dtype=torch.float64)
    branched, full = (start.clone().requires_grad_() for _ in range(2))
    objective = value_objective(
        part.prompts, "mlp_out", layer, ValueSettings(weight_decay=0.0), [], size, shares
    )
    [gradient] = torch.autograd.grad(objective(branched)[0], [branched])
    losses = []
    for prompt, share in zip(part.prompts, shares, strict=True):
        everywhere = Intervention("mlp_out", layer, None, add(share @ full))
        logits = model.run_with_hooks(prompt.recording.inputs, fwd_hooks=everywhere.fwd_hooks())
        losses.append(-logits[0, prompt.answer.positions].log_softmax(-1)[0, request.target])
    [wanted] = torch.autograd.grad(torch.stack(losses).mean(), [full])
    assert float((gradient - wanted).norm()) <= 1e-9 * max(1.0, float(wanted.norm()))


def test_values_everywhere_are_of_each_prompt(seed: int) -> None:
    """Both prompts get values of their own, and the edited model gives what the search found."""
    model = any_family(seed, n_layers=3).double()
    request = request_for(model, seed, n_prompts=2)
    begins = [len(each.spans[0].get("bos", ())) for each in request.prompts]
    n_keys = sum(each.n_pos - n for each, n in zip(request.prompts, begins, strict=True))
    for through_update in (False, True):
        edit = multedit(
            model,
            request,
            layer=0,
            settings=ONE_KEY,
            positions="all",
            through_update=through_update,
            steps=2,
            lam=1e-9,
        )
        assert edit.deltas[down_weight(0)].left.shape[1] == n_keys
        assert edit.keys[down_weight(0)].shape == (model.cfg.d_mlp, n_keys)
    with torch.no_grad(), edit.applied(model):
        found = [model(each)[0, -1].softmax(-1)[request.target] for each in request.prompts]
    mean = float(torch.stack(found).mean())
    assert edit.metadata["probability"] == [pytest.approx(mean, rel=1e-6)]


@pytest.mark.parametrize("case", ["padded", "image before BOS"])
@pytest.mark.parametrize("kind", ["words", "all"])
def test_bos_and_padding_are_no_keys_wherever_they_are(seed: int, kind: str, case: str) -> None:
    """The keys are those of a plain run of the prompt without padding."""
    model = any_attention(seed, n_layers=3).double()
    if case == "padded":
        inputs = small_inputs(model, seed, images=(1, 0), words=(4, 25)).rows([0])
        assert not inputs.attention_mask[0, 0]
    else:  # as PaliGemma
        image, words = [IMAGE] * model.cfg.vision.n_visual_tokens, random.choices(range(2, 60), k=5)
        inputs = small_inputs(model, seed, words=(4,))
        tokens = torch.tensor([[*image, BOS, *words]])
        inputs = model.inputs_from_tokens(tokens, inputs.pixel_values)
    inputs = inputs.with_pixels(inputs.pixel_values.double())
    real = inputs.attention_mask[0]
    alone = model.inputs_from_tokens(inputs.tokens[:, real], inputs.pixel_values)
    edit = multedit(
        model, inputs, 5, layer=1, settings=ONE_KEY, positions=kind, steps=1, preserve="nothing"
    )
    with torch.no_grad():
        _, cache = model.run_with_cache(alone)
    unwanted = {BOS} if kind == "all" else {BOS, IMAGE}
    places = [at for at, token in enumerate(alone.tokens[0].tolist()) if token not in unwanted]
    expected = cache[hook_name("post", 1)][0, places].T
    found = edit.keys[down_weight(1)]
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) < 1e-9 * max(1.0, float(expected.abs().max()))


def test_gradients_of_the_model_are_as_before(seed: int) -> None:
    model = any_family(seed)
    model.blocks[0].mlp.up.weight.requires_grad_(True)
    multedit(model, request_for(model, seed), layer=0, steps=2, settings=ONE_KEY)
    wanted = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert wanted == ["blocks.0.mlp.up.weight"]
    assert all(weight.grad is None for weight in model.parameters())


# The edit


@settings(max_examples=3)
@given(SEEDS)
def test_every_position_gets_its_share_of_delta(seed):
    """The edited model is the model with delta added, everywhere by what its key has of the key.

    In float64, where the update is rounded to float32: 1e-4 of the logits.
    """
    model = any_family(seed).double()
    layer = random.Random(seed).randrange(model.cfg.n_layers)
    request = request_for(model, seed, n_prompts=2, n_neighbours=1)
    options = {"steps": 3, "key": "each", "preserve": "both", "kl_weight": 0.2, "lam": 0.3}
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    edit = multedit(model, request, layer=layer, **options, settings=ONE_KEY)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name])
    chosen = replace(ONE_KEY, **options)
    part = keyed(model, request, layer, chosen)
    system = LeastSquares([part.keys], chosen.lam, torch.cat([part.kept, part.near], dim=1))
    value = value_of(model, part, system, layer, chosen)
    [row] = system.rows
    for inputs in (*request.prompts, *request.neighbours):
        _, cache = model.run_with_cache(inputs, names_filter=names(layer)[:1])
        shares = cache[names(layer)[0]][0] @ row
        hooks = Intervention(
            value_site(model), layer, None, add(shares[:, None] * value.delta)
        ).fwd_hooks()
        expected = model.run_with_hooks(inputs, fwd_hooks=hooks)
        with edit.applied(model):
            found = model(inputs)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["grouped queries", "biases", "tied", *DECODERS])
def test_every_family_edits(seed: int, tmp_path, name: str) -> None:
    """At the key the MLP then gives the optimised value; with lam = 0 all of it."""
    reference = random_llava(SHAPES[name])
    model = hooked(reference, tmp_path)
    prompts = random_prompts(reference.config, [1], text_last=True)
    layer = random.randrange(model.cfg.n_layers)
    inputs = prompts.for_mmlens(model)
    last = inputs.span("last").tolist()
    inputs = model.inputs_from_tokens(
        prompts.tokens, prompts.pixel_values, spans={"constraint": last}
    )
    options = {"lam": 0.0, "steps": 4, "stop_at": 2.0, "preserve": "nothing"}
    edit = multedit(model, inputs, 9, layer=layer, **options, settings=ONE_KEY)
    site = hook_name(value_site(model), layer)
    _, before = model.run_with_cache(inputs, names_filter=site)
    with edit.applied(model):
        logits, after = model.run_with_cache(inputs, names_filter=site)
    delta = edit.deltas[down_weight(layer)].left[:, 0]
    assert float(delta.norm()) > 0
    moved = after[site][0, last[0]] - before[site][0, last[0]]
    torch.testing.assert_close(moved, delta, rtol=1e-3, atol=1e-3 * float(delta.norm()))
    where = Intervention(value_site(model), layer, last, add(delta)).fwd_hooks()
    probability = model.run_with_hooks(inputs, fwd_hooks=where)[0, -1].softmax(-1)[9]
    assert edit.metadata["probability"] == pytest.approx([probability.item()], rel=1e-3, abs=1e-6)
    assert logits.isfinite().all()


def test_many_edits_are_solved_together(seed: int) -> None:
    """Each key gets its own value: lam is small, and the keys are different ones."""
    model = small_model(seed, d_mlp=29, n_layers=3).double()
    requests = different_requests(model, seed, 3)
    options = {"layer": 1, "lam": 1e-12, "steps": 2, "stop_at": 2.0, "preserve": "nothing"}
    edit = multedit_many(model, requests, **options, settings=ONE_KEY)
    delta = edit.deltas["blocks.1.mlp.down.weight"]
    assert delta.left.shape[1] == 3
    assert edit.metadata["target"] == [5, 6, 7] and len(edit.metadata["requests"]) == 3
    for index, request in enumerate(requests):
        alone = multedit(model, request, **options, settings=ONE_KEY)
        torch.testing.assert_close(
            alone.deltas["blocks.1.mlp.down.weight"].left[:, 0], delta.left[:, index]
        )
    keys = torch.cat([keyed(model, r, 1, ONE_KEY).keys for r in requests], dim=1)
    # The error of a solve with lam = 1e-12 is relative to the smallest eigenvalue of K^T K.
    weakest = float(torch.linalg.eigvalsh(keys.T @ keys).min())
    off = float((delta.dense() @ keys - delta.left).norm())
    assert off <= 1e-9 / weakest * float(delta.left.norm() * (1 + keys.norm() ** 2))


def test_sequential_edits_keep_what_the_earlier_keys_give(seed: int) -> None:
    model = small_model(seed, d_mlp=29, n_layers=3).double()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    requests = different_requests(model, seed, 3)
    options = {"layer": 1, "lam": 1e-12, "steps": 2, "stop_at": 2.0, "preserve": "nothing"}
    weight = model.blocks[1].mlp.down.weight
    with SequentialEditor(model, **options, settings=ONE_KEY) as editor:
        told = []
        for request in requests:
            edit = editor.add(request)
            key = keyed(model, request, 1, ONE_KEY).keys
            told.append((key, weight @ key))
            assert editor.edits[-1] is edit and editor.edit.is_applied(model)
            keys = torch.cat([k for k, _ in told], dim=1)
            weakest = float(torch.linalg.eigvalsh(keys.T @ keys).min())
            for k, value in told:
                slack = 1e-9 / weakest * (1 + float(keys.norm() ** 2)) * float(weight.norm())
                assert float((weight @ k - value).norm()) <= slack * float(k.norm() + 1)
        assert len(editor.edit.parts) == 3
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
    assert editor.edit is None and editor.edits == []


def test_a_fact_that_is_edited_again_gets_the_new_answer(seed: int) -> None:
    """Its key is not kept; so the second edit is what it would be without a history."""
    model = small_model(seed, n_layers=3)
    request = request_for(model, seed, target=5)
    options = {"layer": 1, "steps": 2, "stop_at": 2.0}
    with SequentialEditor(model, **options, settings=ONE_KEY) as editor:
        editor.add(request)
        second = editor.add(replace(request, target=6))
    with SequentialEditor(model, history=False, **options, settings=ONE_KEY) as editor:
        editor.add(request)
        alone = editor.add(replace(request, target=6))
    name = "blocks.1.mlp.down.weight"
    torch.testing.assert_close(second.deltas[name].dense(), alone.deltas[name].dense())
    with pytest.raises(ValueError, match="only multedit"):
        SequentialEditor(model, multedit_many, history=True, layer=1, settings=ONE_KEY)


def test_reference_keys_keep_their_values(seed: int) -> None:
    """Keys of other prompts, from `keys_of`: with lam = 0 the edited layer gives what it gave."""
    model = small_model(seed, d_mlp=29, n_layers=3).double()
    request, *rest = different_requests(model, seed, 4)
    others = [each.inputs for each in rest]
    kept = keys_of(model, others, 1)
    assert kept.shape == (29, 3)
    edit = multedit(
        model, request, layer=1, kept=kept, lam=1e-9, steps=2, preserve="nothing", settings=ONE_KEY
    )
    delta = next(iter(edit.deltas.values()))
    key = keyed(model, request, 1, replace(ONE_KEY, preserve="nothing")).keys
    both = torch.cat([key, kept], dim=1)
    weakest = float(torch.linalg.eigvalsh(both.T @ both).min())
    slack = 1e-6 / weakest * (1 + float(both.norm() ** 2))
    assert float((delta.right @ kept).abs().max()) <= slack
    assert float((delta.right @ key - 1).abs().max()) <= slack
    everywhere = keys_of(model, others[:2], 1, span=None)
    assert everywhere.shape == (29, sum(inputs.n_pos for inputs in others[:2]))
    assert torch.equal(everywhere[:, max(others[0].span("constraint").tolist())], kept[:, 0])
    with pytest.raises(ValueError, match="no prompts"):
        keys_of(model, [], 1)


# Requests


def test_augmented_images_are_a_little_different(seed: int) -> None:
    model = small_model(seed)
    inputs = small_inputs(model, seed, images=(2,), spans={"constraint": [0]})
    changed = augmented(inputs, 3, seed=seed)
    assert len(changed) == 3
    for each in changed:
        assert each.pixel_values.shape == inputs.pixel_values.shape
        assert each.span("constraint").tolist() == [0]
        assert not torch.equal(each.pixel_values, inputs.pixel_values)
    same = augmented(inputs, 3, seed=seed)[1]
    assert torch.equal(same.pixel_values, changed[1].pixel_values)
    assert not torch.equal(changed[0].pixel_values, changed[1].pixel_values)
    [kept] = augmented(inputs, 1, crop=0.0, light=0.0)
    torch.testing.assert_close(kept.pixel_values, inputs.pixel_values)
    with pytest.raises(ValueError, match="no image"):
        augmented(small_inputs(model, seed, images=(0,)), 1)
    with pytest.raises(ValueError, match="crop=1"):
        augmented(inputs, 1, crop=1.0)


def test_what_cannot_be_edited_is_said(seed: int) -> None:
    model = small_model(seed, n_layers=3)
    inputs = small_inputs(model, seed, spans={"constraint": [1]})
    request = EditRequest(inputs, 5)
    with pytest.raises(ValueError, match="give the target"):
        multedit(model, inputs, layer=0, settings=ONE_KEY)
    with pytest.raises(ValueError, match="hold their own targets"):
        multedit(model, request, 4, layer=0, settings=ONE_KEY)
    with pytest.raises(ValueError, match="nothing to edit"):
        multedit_many(model, [], layer=0, settings=ONE_KEY)
    with pytest.raises(ValueError, match=r"layers \[3\]: they must be among 0 ... 2"):
        multedit(model, request, layer=3, settings=ONE_KEY)
    with pytest.raises(TypeError, match="momentum"):
        multedit(model, request, layer=0, momentum=0.9, settings=ONE_KEY)
    for wrong in ({"lam": -1.0}, {"steps": 0}, {"lr": 0.0}, {"clamp": 0.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            multedit(model, request, layer=0, **wrong, settings=ONE_KEY)
    with pytest.raises(KeyError, match="no span is called 'subject'"):
        EditRequest(inputs, 5, span="subject")
    with pytest.raises(ValueError, match="one prompt at a time"):
        EditRequest(small_inputs(model, seed, images=(1, 1)), 5)
    with pytest.raises(ValueError, match="target is empty"):
        EditRequest(inputs, "")
    with pytest.raises(ValueError, match="no tokenizer"):
        multedit(model, EditRequest(inputs, "Rome"), layer=0, settings=ONE_KEY)
