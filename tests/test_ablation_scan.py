"""Ablation scans against plain runs of every part, and against formulas."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from small_models import any_attention, picture, small_inputs, worded_model
from torch import Tensor

from mmlens import Scan, ablation_scan, attention_knockout, attention_sinks
from mmlens.analyses.image_regions import named_regions
from mmlens.interventions.functions import knockout
from mmlens.utils.statistics import bootstrap_mean


def case(seed: int, images: tuple[int, ...] = (1,), **choices: Any) -> tuple[Any, Any]:
    """A model in float64, and a prompt."""
    model = any_attention(seed, n_layers=3, **choices).double()
    inputs = small_inputs(model, seed, images=images)
    return model, model.inputs_from_tokens(inputs.tokens, inputs.pixel_values.double())


def probability(model: Any, inputs: Any, hooks: list[Any], token: int) -> float:
    """P of a token after a plain run with hooks."""
    logits = model.run_with_hooks(inputs, fwd_hooks=hooks)
    return float(logits[0, -1].softmax(-1)[token])


def ablated(name: str, positions: list[int], units: Any, value: Any = 0.0) -> tuple[str, Any]:
    """A plain hook that sets units at positions."""

    def hook(x: Tensor, hook: Any) -> Tensor:
        for at in positions:
            if units is None:
                x[:, at] = value
            else:
                x[:, at, units] = value
        return x

    return name, hook


def test_heads_and_neurons_and_layers(seed: int) -> None:
    model, inputs = case(seed)
    last, token = inputs.n_pos - 1, random.randrange(2, 50)
    at = [last, last - 1]
    heads = ablation_scan(model, inputs, positions=at, answer=token)
    assert (heads.axes, heads.values.shape) == (("layer", "head"), (3, model.cfg.n_heads))
    for layer in range(3):
        for head in range(model.cfg.n_heads):
            hook = ablated(f"blocks.{layer}.attn.hook_z", at, head)
            expected = probability(model, inputs, [hook], token)
            assert float(heads.values[layer, head]) == pytest.approx(expected, abs=1e-8)
    assert heads.plot().data[0].z.shape == heads.values.shape
    assert heads.baseline == pytest.approx(probability(model, inputs, [], token), abs=1e-8)

    layers = ablation_scan(model, inputs, "layers", positions="last", answer=token)
    assert (layers.axes, layers.site) == (("layer",), "attn_out, mlp_out")
    for layer in range(3):
        parts = [f"blocks.{layer}.hook_{site}" for site in ("attn_out", "mlp_out")]
        hooks = [ablated(name, [last], None) for name in parts]
        expected = probability(model, inputs, hooks, token)
        assert float(layers.values[layer]) == pytest.approx(expected, abs=1e-8)
    mlps = ablation_scan(model, inputs, "layers", site="mlp_out", layers=[2], answer=token)
    everywhere = list(range(inputs.n_pos))
    hook = ablated("blocks.2.hook_mlp_out", everywhere, None)
    expected = probability(model, inputs, [hook], token)
    assert float(mlps.values[0]) == pytest.approx(expected, abs=1e-8)

    neurons = ablation_scan(
        model, inputs, "neurons", layers=[1], positions="last", answer=token, size=7
    )
    n = model.cfg.d_mlp
    groups = [(begin, min(begin + 7, n)) for begin in range(0, n, 7)]
    assert neurons.coordinates == ((1,), tuple(f"{a}-{b - 1}" for a, b in groups))
    for (a, b), value in zip(groups, neurons.values[0].tolist(), strict=True):
        hook = ablated("blocks.1.mlp.hook_post", [last], slice(a, b))
        assert value == pytest.approx(probability(model, inputs, [hook], token), abs=1e-8)


def test_by_means_and_other_prompts(seed: int) -> None:
    model, inputs = case(seed)
    others = [case(seed)[1]]
    tokens = inputs.tokens.clone()
    tokens[0, -2:] = torch.tensor([17, 23])
    tokens = torch.where(inputs.is_image, inputs.tokens, tokens)
    others.append(model.inputs_from_tokens(tokens, inputs.pixel_values))
    token, last, name = 5, inputs.n_pos - 1, "blocks.1.attn.hook_z"
    found = ablation_scan(
        model, inputs, by="mean", layers=[1], positions="last", answer=token, references=others
    )
    kept = [model.run_with_cache(each, names_filter=name)[1][name] for each in others]
    mean = torch.cat(kept).mean(dim=(0, 1))
    for head in range(model.cfg.n_heads):
        hook = ablated(name, [last], head, mean[head])
        expected = probability(model, inputs, [hook], token)
        assert float(found.values[0, head]) == pytest.approx(expected, abs=1e-8)
    drawn = ablation_scan(
        model, inputs, by="resample", layers=[1], positions="last", answer=token,
        references=others, seed=seed % 7,
    )  # fmt: skip
    for head in range(model.cfg.n_heads):
        hooks = [ablated(name, [last], head, each[:, last, head]) for each in kept]
        expected = [probability(model, inputs, [hook], token) for hook in hooks]
        assert min(abs(float(drawn.values[0, head]) - each) for each in expected) < 1e-8
    with pytest.raises(ValueError, match="give references"):
        ablation_scan(model, inputs, by="mean")


def test_a_prompt_is_not_resampled_from_itself(seed: int) -> None:
    """Drawn from all, each of two prompts kept its own activation in half of the layers."""
    model, _ = case(seed)
    prompts = []
    for number in range(2):
        inputs = small_inputs(model, seed + number, words=(6,))
        prompts.append(model.inputs_from_tokens(inputs.tokens, inputs.pixel_values.double()))
    scan = ablation_scan(model, prompts, by="resample", positions="last", answer=5)
    last = prompts[0].n_pos - 1
    kept = [model.run_with_cache(each)[1] for each in prompts]
    for number, prompt in enumerate(prompts):
        baseline = probability(model, prompt, [], 5)
        for layer in range(3):
            name = f"blocks.{layer}.attn.hook_z"
            for head in range(model.cfg.n_heads):
                hook = ablated(name, [last], head, kept[1 - number][name][:, last, head])
                expected = probability(model, prompt, [hook], 5) - baseline
                found = float(scan.effects[number, layer, head])
                assert found == pytest.approx(expected, abs=1e-8)
    again = model.inputs_from_tokens(prompts[0].tokens, prompts[0].pixel_values)
    one = ablation_scan(
        model, prompts[0], by="resample", positions="last", answer=5, references=[again, *prompts]
    )
    assert torch.allclose(one.effect, scan.effects[0], atol=1e-9)
    with pytest.raises(ValueError, match="all references are the prompt itself"):
        ablation_scan(model, prompts[0], by="resample", references=[again, again], answer=5)


def test_regions_get_the_visual_tokens_of_other_prompts(seed: int) -> None:
    """Wherever these stand there: at the prompt's own positions they may be words."""
    model, _ = case(seed)
    prompts = []
    for tokens in ([1, 60, 8, 9, 11, 12], [1, 7, 8, 9, 60, 12]):  # the image early, and late
        n = model.cfg.vision.n_visual_tokens
        row = [each for token in tokens for each in [token] * (n if token == 60 else 1)]
        pixels = torch.randn(1, 3, *model.cfg.vision.image_size, dtype=torch.double)
        prompts.append(model.inputs_from_tokens(torch.tensor([row]), pixels))
    prompt, other = prompts
    at = random.choice(prompt.span("image").tolist())
    name, there = "hook_input_embed", other.span("image")
    tokens = model.run_with_cache(other, names_filter=name)[1][name][0, there]
    options = {"regions": {"one": [at]}, "references": [other], "answer": 5}
    scan = ablation_scan(model, prompt, "regions", "mean", **options)
    hook = ablated(name, [at], None, tokens.mean(dim=0))
    assert float(scan.values[0]) == pytest.approx(probability(model, prompt, [hook], 5), abs=1e-8)
    drawn = ablation_scan(model, prompt, "regions", "resample", seed=seed % 5, **options)
    possible = [probability(model, prompt, [ablated(name, [at], None, each)], 5) for each in tokens]
    assert min(abs(float(drawn.values[0]) - each) for each in possible) < 1e-8
    words = model.inputs_from_tokens(torch.tensor([[1, 7, 8]]))
    with pytest.raises(ValueError, match="none of the references has an image"):
        ablation_scan(
            model, prompt, "regions", "mean", regions=(1, 1), references=[words], answer=5
        )


def test_a_prompt_that_breaks_is_no_prompt_without_the_cell(seed: int) -> None:
    """Its NaN was left out of the mean without a word."""
    model, _ = case(seed)
    prompts = []
    for number in range(3):
        inputs = small_inputs(model, seed + number)
        prompts.append(model.inputs_from_tokens(inputs.tokens, inputs.pixel_values.double()))
    at, broken = random.randrange(3), random.randrange(2)
    name = f"blocks.{broken}.hook_mlp_out"
    _, kept = model.run_with_cache(prompts[at], names_filter=name)

    def breaking(x: Tensor, hook: Any) -> Tensor:
        breaks = hook.name == name and torch.allclose(x, kept[name][:, -1:])
        return x * (torch.nan if breaks else 0.0)

    with pytest.warns(RuntimeWarning, match="'loss' is NaN in 1 of 2 runs"):
        scan = ablation_scan(
            model, prompts, "layers", breaking, site="mlp_out", layers=[0, 1], positions="last",
            metric="loss", answer=5,
        )  # fmt: skip
    assert scan.values.isnan().tolist() == [i == broken for i in (0, 1)]
    assert bool(scan.low.isnan()[broken]) and bool(scan.effects[at, broken].isnan())
    rest = scan.effects[:, 1 - broken].mean() + scan.baseline
    assert float(scan.values[1 - broken]) == pytest.approx(float(rest), abs=1e-9)


@pytest.mark.parametrize("by", ["mean", "resample"])
def test_references_of_a_padded_batch(by: Any, seed: int) -> None:
    """Each row has its visual tokens elsewhere; and padding takes nothing's place."""
    model, prompt = case(seed)
    batch = small_inputs(model, seed, images=(1, 1), words=(4, 7))
    batch = model.inputs_from_tokens(
        batch.tokens, batch.pixel_values.double(), attention_mask=batch.attention_mask
    )
    rows = [batch.rows([row]) for row in range(2)]
    options = {"regions": [[prompt.span("image").tolist()[0]]], "answer": 5, "seed": seed % 9}
    together, apart = (
        ablation_scan(model, prompt, "regions", by, references=each, **options)
        for each in ([batch], rows)
    )
    assert together.values.tolist() == pytest.approx(apart.values.tolist(), abs=1e-9)
    at = [int((~batch.attention_mask[0]).sum()) - 1]
    if by == "resample":
        with pytest.raises(ValueError, match="are padding in one of the references"):
            ablation_scan(model, prompt, by=by, references=[prompt, batch], positions=at, answer=5)
    unpadded = ablation_scan(model, prompt, by=by, references=[batch, rows[1]], positions=[3])
    assert bool(unpadded.values.isfinite().all())


def test_a_metric_of_several_numbers(seed: int, tmp_path: Any) -> None:
    model, _ = case(seed)
    prompts = []
    for number in range(2):
        inputs = small_inputs(model, seed + number)
        prompts.append(model.inputs_from_tokens(inputs.tokens, inputs.pixel_values.double()))

    def pair(logits: Tensor) -> Tensor:
        return logits[:, -1, [5, 9]]

    for given, over, options in (
        (prompts[0], "heads", {"positions": "last"}),
        (prompts, "heads", {"positions": "last"}),
        (prompts[0], "regions", {"regions": [prompts[0].span("image")[:1]], "control": 2}),
    ):
        both = ablation_scan(model, given, over, metric=pair, **options)
        for index, token in enumerate((5, 9)):
            one = ablation_scan(
                model, given, over, metric=lambda x, t=token: x[:, -1, t], **options
            )
            assert torch.allclose(both.values[..., index], one.values, atol=1e-9)
            assert both.baseline[index] == pytest.approx(one.baseline)
            for name in ("low", "high", "effects", "control"):
                found, expected = (getattr(each, name) for each in (both, one))
                assert (found is None) == (expected is None)
                if found is not None:
                    assert torch.allclose(found[..., index], expected, atol=1e-9, equal_nan=True)
        assert len(both.to_dataframe()) == both.values.numel()
        saved = Scan.load(both.save(tmp_path / "scan.safetensors"))
        assert torch.equal(saved.values, both.values)
        assert saved.baseline == both.baseline
    with pytest.raises(ValueError, match="has 2 numbers; a map is of one"):
        both.by_token(prompts[0])
    with pytest.raises(ValueError, match="one number for each row"):
        attention_sinks(model, prompts[0], metric=pair)


def test_by_a_function_is_knockout_of_one_head(seed: int) -> None:
    # A window that ends before the image would leave nothing to cut.
    model, inputs = case(seed, attn_types=("global",) * 3)
    image = inputs.span("image")
    scan = ablation_scan(
        model, inputs, "heads", knockout(image), site="attn_scores", positions="last", answer=7
    )
    assert scan.by == "knocked_out"
    layer, head = random.randrange(3), random.randrange(model.cfg.n_heads)
    one = attention_knockout(model, inputs, "image", "last", layers=[layer], heads=[head], answer=7)
    assert float(scan.values[layer, head]) == pytest.approx(float(one.probability[0]), abs=1e-9)
    both = attention_knockout(
        model, inputs, "image", "last", layers=[1], window=3, heads={0: [head], 2: [0]}, answer=7
    )

    def cut(scores: Tensor, hook: Any) -> Tensor:
        chosen = head if hook.name.startswith("blocks.0") else 0
        for key in image.tolist():
            scores[:, chosen, -1, key] = -torch.inf
        return scores

    hooks = [(f"blocks.{i}.attn.hook_attn_scores", cut) for i in (0, 2)]
    expected = probability(model, inputs, hooks, 7)
    assert float(both.probability[0]) == pytest.approx(expected, abs=1e-8)
    assert both.metadata["heads"] == {"0": [head], "2": [0]}


def test_a_data_set_by_role(seed: int) -> None:
    """Means over prompts, with the bootstrap's intervals; what a prompt lacks does not count."""
    model, _ = case(seed)
    prompts = []
    for number, n_words in enumerate((4, 6, 5)):
        inputs = small_inputs(model, seed + number, words=(n_words,))
        prompts.append(model.inputs_from_tokens(inputs.tokens, inputs.pixel_values.double()))

    def roles(inputs: Any) -> dict[str, Any]:
        found = {"image": inputs.span("image"), "last": [inputs.n_pos - 1]}
        return found if inputs is not prompts[1] else {"last": found["last"]}

    answers, labels = [5, 9, 11], ["a", "b", "a"]
    scan = ablation_scan(
        model, prompts, "heads", positions=roles, answer=answers, clusters=labels, layers=[2]
    )
    each = [
        ablation_scan(model, prompt, "heads", positions=roles, answer=answer, layers=[2])
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    assert scan.axes == ("role", "layer", "head")
    assert scan.coordinates[0] == ("image", "last")
    effects = torch.full((3, 2, 1, model.cfg.n_heads), torch.nan, dtype=torch.double)
    effects[:, 1] = torch.stack([one.effect[-1] for one in each])
    effects[[0, 2], 0] = torch.stack([each[i].effect[0] for i in (0, 2)])
    mean, low, high = bootstrap_mean(effects, labels)
    assert torch.allclose(scan.effect, mean, atol=1e-9)
    assert torch.allclose(scan.low, low, atol=1e-9, equal_nan=True)
    assert torch.allclose(scan.high, high, atol=1e-9, equal_nan=True)
    assert scan.baseline == pytest.approx(sum(one.baseline for one in each) / 3)
    assert list(scan.to_dataframe().columns) == [
        "role", "layer", "head", "value", "effect", "low", "high",
    ]  # fmt: skip


def test_regions(seed: int, tmp_path: Any) -> None:
    model, inputs = case(seed)
    rows, columns = inputs.images[0].grids[0]
    token, image = 5, inputs.span("image").tolist()
    scan = ablation_scan(
        model, inputs, "regions", regions=(rows, columns), answer=token, control=2, seed=3
    )
    assert (scan.axes, scan.values.shape) == (("row", "column"), (rows, columns))
    cells = [[int(inputs.patch(i, j))] for i in range(rows) for j in range(columns)]
    assert [list(region) for region in scan.regions] == cells
    for cell, value in zip(cells, scan.values.flatten().tolist(), strict=True):
        hook = ablated("hook_input_embed", cell, None)
        assert value == pytest.approx(probability(model, inputs, [hook], token), abs=1e-8)
    # A random control of one patch is one of the other patches.
    effects = scan.effect.flatten()
    assert scan.control is not None and scan.control.shape == (len(cells), 2)
    if len(cells) == len(image):  # without a class token every visual token is a patch
        for number, drawn in enumerate(scan.control):
            others = torch.cat([effects[:number], effects[number + 1 :]])
            assert all(float((others - each).abs().min()) < 1e-8 for each in drawn)
    by_token = scan.by_token(inputs)
    assert float(by_token[inputs.images[0].positions.tolist().index(cells[0][0])]) == pytest.approx(
        float(effects[0]), abs=1e-6
    )
    means = ablation_scan(model, inputs, "regions", "mean", regions={"all": image}, answer=token)
    _, cache = model.run_with_cache(inputs, names_filter="hook_input_embed")
    mean = cache["hook_input_embed"][0, image].mean(dim=0)
    hook = ablated("hook_input_embed", image, None, mean)
    expected = probability(model, inputs, [hook], token)
    assert float(means.values[0]) == pytest.approx(expected, abs=1e-8)
    assert means.coordinates == (("all",),)
    saved = Scan.load(scan.save(tmp_path / "scan.safetensors"))
    assert torch.equal(saved.values, scan.values)
    assert saved.regions == scan.regions
    assert torch.equal(saved.control, scan.control)


def test_boxes_and_masks_are_the_same_regions(seed: int) -> None:
    model = worded_model(seed)
    inputs = model.prepare("<image> a word", picture(seed))
    image = inputs.images[0]
    width, height = image.image.size
    for _ in range(20):
        left, top = random.randrange(width - 1), random.randrange(height - 1)
        box = (left, top, random.randint(left + 1, width), random.randint(top + 1, height))
        mask = np.zeros((height, width), dtype=bool)
        mask[box[1] : box[3], box[0] : box[2]] = True
        _, [by_box, by_mask] = named_regions(inputs, [box, mask])
        share = {}  # of each cell, in exact pixels
        for offset, (view, row, column) in enumerate(image.cells.tolist()):
            if view >= 0:
                share[image.start + offset] = image.views[view].cell_box(row, column)
        assert set(by_mask.tolist()) <= set(inputs.span("image").tolist())
        # Cells have whole pixels here only by chance, so a cell may be rounded in or out of a mask.
        if all(each == round(each) for cell in share.values() for each in cell):
            assert by_box.tolist() == by_mask.tolist()
        assert len(by_mask)


def test_what_cannot_be_scanned(seed: int) -> None:
    model, inputs = case(seed)
    image = inputs.span("image")
    for arguments, options, says in [
        (([],), {}, "no prompts"),
        ((inputs, "regions"), {"regions": []}, "no regions"),
        ((inputs, "regions"), {"regions": [[0]]}, "a region is a box"),
        ((inputs, "regions"), {"regions": [np.ones((2, 2), dtype=bool)]}, r"a mask of \(2, 2\)"),
        ((inputs, "regions"), {"regions": [image], "control": 1}, "no random control"),
        ((inputs,), {"layers": [7]}, "among 0"),
        ((inputs,), {"answer": [1, 2]}, "2 answers for 1 prompts"),
        (([inputs, inputs], "regions"), {}, "one"),
        ((inputs, "regions"), {"layers": [1]}, "layers are not for over='regions'"),
        ((inputs, "regions"), {"positions": "last"}, "positions are for other scans"),
        ((inputs,), {"control": 5}, "control=5 is for over='regions'"),
        (
            (inputs,),
            {"regions": (4, 4)},
            r"regions=\(4, 4\) is for over='regions', not for 'heads'",
        ),
        ((inputs, "layers"), {"size": 128}, "size=128 is for over='neurons', not for 'layers'"),
        ((inputs,), {"clusters": [1, 2, 3]}, "3 clusters for 1 prompts"),
        ((inputs,), {"references": [inputs]}, "references are for 'mean' and 'resample'"),
        ((inputs, "neurons"), {"site": "projector.pre"}, "is of no layer of the decoder"),
    ]:
        with pytest.raises(ValueError, match=says):
            ablation_scan(model, *arguments, **options)
    scan = ablation_scan(model, inputs, "layers", positions="last", answer=3)
    with pytest.raises(ValueError, match="a scan over layers has no visual tokens"):
        scan.by_token(inputs)
