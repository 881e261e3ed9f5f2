"""Qwen-VL: prompts from text and images, bounds, refusals; and what is done with them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from checkpoint_folders import load
from half_precision import check_half_precision, error_ratios
from qwen_models import (
    CHAT_TEMPLATE,
    FAMILIES,
    IMAGE,
    SIZES,
    random_batch,
    random_qwen,
    write,
)
from random_models import in_dtype
from sweep_cases import SETTINGS, in_order
from tiled_models import random_image

from mmlens import (
    Intervention,
    attention_contribution,
    attention_knockout,
    attribution_patching,
    blur_image,
    causal_trace,
    direct_logit_attribution,
    logit_lens,
    mean_image,
    multedit,
    swap_image,
    swap_span,
    sweep,
)
from mmlens.checkpoints.errors import CheckpointError
from mmlens.data import VisualQuestion
from mmlens.editing import fine_tune, lora
from mmlens.inputs.processor import Processor
from mmlens.interventions.functions import knockout
from mmlens.model.transformer import HookedMultimodalTransformer
from mmlens.plots import overlay
from mmlens.reproduce import FIGURES, Settings, Study

EVERY = pytest.mark.parametrize("family", FAMILIES)
QUESTION, CONSTRAINT = "What is the capital of this country?", "this country"


def same_batch(inputs: Any, batch: Any) -> None:
    assert torch.equal(inputs.tokens, batch["input_ids"])
    assert torch.equal(inputs.attention_mask, batch["attention_mask"].bool())
    for name in ("pixel_values", "image_grid_thw"):
        assert (inputs.visual is None) == (name not in batch)
        if name in batch:
            assert torch.equal(inputs.visual[name], batch[name])


# Prompts


@EVERY
def test_prompts_of_every_size_equal_transformers(family: str, seed: int, tmp_path: Path) -> None:
    """22 sizes, alone; and what is made of transformers' own batch is the same."""
    chance = random.Random(seed)
    theirs = write(family, tmp_path, random_qwen(family, chance))
    ours = Processor.from_pretrained(tmp_path)
    for size in SIZES:
        image = random_image(size, chance.randrange(2**31))
        text = chance.choice(["{}Which country?", "The flag {}", "In\n{}\n red "])
        batch = theirs(text=[text.format(IMAGE)], images=[image], return_tensors="pt")
        placeholder = IMAGE.replace("<|image_pad|>", "<image>")
        inputs = ours(text.format(placeholder), image, template=None)
        same_batch(inputs, batch)
        again = ours.from_tokens(batch.pop("input_ids"), **batch)
        for one, other in zip(inputs.images, again.images, strict=True):
            assert (one.row, one.start, one.grids) == (other.row, other.start, other.grids)
        assert torch.equal(inputs.rope_positions, again.rope_positions)


@EVERY
def test_batches_of_several_images_equal_transformers(
    family: str, seed: int, tmp_path: Path
) -> None:
    chance = random.Random(seed)
    theirs = write(family, tmp_path, random_qwen(family, chance))
    ours = Processor.from_pretrained(tmp_path)
    for counts in ([2], [1, 3, 2], [1, 0, 2], [0, 1], [0, 0]):
        texts, images = [], []
        for n in counts:
            pieces = [*[IMAGE] * n, "What is", " the capital?"]
            chance.shuffle(pieces)
            texts.append("".join(pieces))
            sizes = [chance.choice(SIZES) for _ in range(n)]
            images.append([random_image(size, chance.randrange(2**31)) for size in sizes])
        flat = [image for row in images for image in row]
        seen = {"images": flat} if flat else {}
        batch = theirs(text=texts, **seen, padding=True, return_tensors="pt")
        plain = [text.replace("<|image_pad|>", "<image>") for text in texts]
        inputs = ours(plain, images, template=None)
        same_batch(inputs, batch)
        assert inputs.n_images == tuple(counts)


def test_the_chat_template_and_the_bounds(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    family = chance.choice(FAMILIES)
    hf = random_qwen(family, chance)
    theirs = write(family, tmp_path, hf, most=40)
    ours = Processor.from_pretrained(tmp_path)
    images = [random_image((130, 90), seed), random_image((40, 160), seed + 1)]
    parts = [*[{"type": "image"}] * 2, {"type": "text", "text": QUESTION}]
    text = theirs.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=1)
    batch = theirs(text=[text], images=images, return_tensors="pt")
    inputs = ours(QUESTION, images, spans={"constraint": CONSTRAINT})
    same_batch(inputs, batch)
    at = inputs.span("constraint").tolist()
    assert "".join(inputs.str_tokens[0][i] for i in at).strip() == CONSTRAINT
    visual = (batch["input_ids"][0] == hf.config.image_token_id).nonzero()[:, 0]
    assert torch.equal(inputs.span("image"), visual)
    assert inputs.texts[0].count("<image>") == 2 and CHAT_TEMPLATE.count("image_pad") == 1
    side = hf.config.vision_config.patch_size * hf.config.vision_config.spatial_merge_size
    least, most = 6 * side**2, 9 * side**2
    size = {"shortest_edge": least, "longest_edge": most}
    batch = theirs(text=[text], images=images, size=size, return_tensors="pt")
    for bounded in (
        ours(QUESTION, images, min_pixels=least, max_pixels=most),
        ours.bounded(least, most)(QUESTION, images),
        Processor.from_pretrained(tmp_path, min_pixels=least, max_pixels=most)(QUESTION, images),
        load(tmp_path, min_pixels=least, max_pixels=most).prepare(QUESTION, images),
    ):
        same_batch(bounded, batch)
    assert len(inputs.span("image")) > len(bounded.span("image"))
    with pytest.raises(ValueError, match="min_pixels=9 and max_pixels=4"):
        ours.bounded(9, 4)
    with pytest.raises(ValueError, match="whole numbers above 0"):
        ours.bounded(max_pixels=0)
    # Another image in its place has the same bounds.
    model = load(tmp_path)
    inputs = model.prepare(QUESTION, images[0], min_pixels=least, max_pixels=most)
    other = swap_image(model, inputs, images[1], fit=True)
    fitted = ours.bounded(least, most)(QUESTION, images[1].resize(images[0].size, 3))
    assert torch.equal(other.visual["pixel_values"], fitted.visual["pixel_values"])


def test_what_is_not_taken_is_refused_by_name(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    processor = write("qwen2.5", tmp_path, random_qwen("qwen2.5", chance))
    model = load(tmp_path)
    batch = random_batch(processor, [1], chance)
    ids, grids = batch["input_ids"], batch["image_grid_thw"]
    pixels = batch["pixel_values"]
    for given, says in (
        ({"pixel_values_videos": pixels, "video_grid_thw": grids}, "takes no videos"),
        ({"pixel_values": pixels}, "without image_grid_thw"),
        ({"pixel_values": pixels[:-1], "image_grid_thw": grids}, "it must be"),
        ({"pixel_values": pixels, "image_grid_thw": grids * 2}, "time 1"),
        ({"pixel_values": pixels, "image_grid_thw": grids[:, [0, 1]]}, "rows and columns"),
        ({"pixel_values": pixels.long(), "image_grid_thw": grids}, "must be floats"),
    ):
        with pytest.raises(ValueError, match=says):
            model(ids, **given)
    words = ids[:, ids[0] != model.cfg.image_token_id]
    with pytest.raises(ValueError, match="hold .* image tokens"):
        model(words, pixel_values=pixels, image_grid_thw=grids)
    llava = Processor(model.cfg, model.tokenizer)
    with pytest.raises(ValueError, match="any grid"):
        llava.bounded(max_pixels=99)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    for changed, says in (
        ({"model_type": "qwen3_vl_moe"}, "qwen3_vl_moe.*mixtures of experts"),
        ({"model_type": "qwen2_5_omni"}, "qwen2_5_omni"),
    ):
        file.write_text(json.dumps(config | changed))
        with pytest.raises(CheckpointError, match=says):
            load(tmp_path)
    text = config["text_config"]
    rope = text["rope_parameters"] | {"mrope_section": [1, 2]}
    file.write_text(json.dumps(config | {"text_config": text | {"rope_parameters": rope}}))
    with pytest.raises(CheckpointError, match=r"mrope_section is \[1, 2\]"):
        load(tmp_path)


# Everything that is done with a model


@pytest.fixture
def case(seed: int, tmp_path: Path) -> tuple[HookedMultimodalTransformer, Any, Path]:
    """A model in float64, a prompt whose image has 4 x 6 squares and is not scaled, its folder."""
    chance = random.Random(seed)
    hf = random_qwen("qwen2.5", chance)
    write("qwen2.5", tmp_path, hf, least=4, most=40)
    model = load(tmp_path).double()
    side = hf.config.vision_config.patch_size * hf.config.vision_config.spatial_merge_size
    image = random_image((6 * side, 4 * side), seed)
    inputs = model.prepare(QUESTION, image, spans={"constraint": CONSTRAINT})
    assert inputs.images[0].grids == ((4, 6),)
    return model, inputs, tmp_path


def changed_image(image: Any, box: tuple[int, int, int, int]) -> Any:
    """Black in a box."""
    other = image.copy()
    other.paste((0, 0, 0), box)
    return other


@torch.no_grad()
def test_patches_and_boxes_are_the_tokens_that_depend_on_them(case: Any, seed: int) -> None:
    """Without attention in the tower, a token sees the pixels of its own square and no other."""
    model, inputs, _ = case
    for block in model.vision.blocks:
        block.attn.W_O.zero_()
        block.attn.o.bias.zero_()
    chance, image = random.Random(seed), inputs.images[0].image
    side = image.width // 6
    row, col = chance.randrange(4), chance.randrange(6)
    down, right = chance.randint(row + 1, 4), chance.randint(col + 1, 6)
    box = (side * col, side * row, side * right, side * down)
    other = model.prepare(QUESTION, changed_image(image, box))
    before, after = (model.visual_tokens(each)[0] for each in (inputs, other))
    moved = ((before - after).abs().amax(dim=-1) > 1e-9).nonzero()[:, 0]
    expected = inputs.span("image")[moved]
    assert torch.equal(inputs.patches(box), expected)
    assert torch.equal(inputs.block((row, col, down, right)), expected)
    assert inputs.patch(row, col) == int(expected[0])
    assert inputs.grid[0, expected[0]].tolist() == [0, 0, row, col]
    # An overlay has each token's value at its square.
    drawn = overlay(torch.arange(24.0), inputs)
    assert drawn is not None and inputs.labels()[int(expected[0])] == f"<img {row},{col}>"


@torch.no_grad()
def test_analyses_equal_their_formulas(case: Any, seed: int) -> None:
    model, inputs, _ = case
    chance, n_layers, last = random.Random(seed), model.cfg.n_layers, inputs.n_pos - 1
    logits, cache = model.run_with_cache(inputs)
    answer = int(logits[0, -1].argmax())
    probability = float(logits[0, -1].softmax(-1)[answer])
    # Contributions over the grid.
    found = attention_contribution(model, inputs, "image", [last])
    layer = chance.randrange(n_layers)
    attention: Any = model.blocks[layer].attn
    values = cache["v", layer][0].repeat_interleave(
        model.cfg.n_heads // model.cfg.n_kv_heads, dim=1
    )
    pattern = cache["pattern", layer][0, :, -1]
    moved = torch.einsum("hk, khd, hdm -> km", pattern, values, attention.W_O).norm(dim=-1)
    grid = moved[inputs.span("image")].view(4, 6)
    torch.testing.assert_close(found.image_grid(0)[layer, 0].double(), grid, rtol=0, atol=1e-6)
    assert overlay(found, inputs) is not None
    # Knockout.
    cut = attention_knockout(model, inputs, "image", "last", layers=[layer], answer=answer)
    image = inputs.span("image").tolist()
    branch = Intervention("attn_scores", layer, [last], knockout(image))
    plain = model.run_with_hooks(inputs, interventions=[branch])[0, -1].softmax(-1)[answer]
    assert float(cut.probability[0]) == pytest.approx(float(plain), abs=1e-9)
    assert cut.clean == pytest.approx(probability, abs=1e-9)
    # The lens, and what is added to the logit.
    lens = logit_lens(model, inputs, tokens=[answer])
    resid = cache["resid_post", layer][0, last]
    read = model.unembed(model.ln_final(resid[None, None])).log_softmax(-1)[0, 0, answer]
    assert float(lens.log_probs[layer, -1, 0]) == pytest.approx(float(read), abs=1e-5)
    added = direct_logit_attribution(model, inputs, answer, positions=[last])
    assert float(added.values.sum()) == pytest.approx(float(logits[0, -1, answer]), abs=1e-4)
    # A trace, by branches and by whole passes; and its gradient, by a small step.
    corrupted = swap_span(model, inputs, "constraint", "Paris")
    options: dict[str, Any] = {"answer": answer, "window": 1}
    groups = [inputs.span("constraint"), inputs.patches((0, 0, 9, 9)), [last]]
    of_image = swap_image(model, inputs, random_image(inputs.images[0].image.size, seed + 5))
    for other in (corrupted, of_image, blur_image(model, inputs, 3), mean_image(model, inputs)):
        traces = [
            causal_trace(model, inputs, other, positions=groups, method=method, **options)
            for method in ("branch", "naive")
        ]
        torch.testing.assert_close(traces[0].restored, traces[1].restored, rtol=0, atol=1e-5)
    site, at = chance.choice(["attn_out", "mlp_out", "resid_post"]), inputs.span("constraint")
    with torch.enable_grad():
        estimate = attribution_patching(
            model, inputs, corrupted, sites=(site,), layers=[layer], positions=[at], answer=answer
        )
    name = model.SITES.hook_name(site, layer)
    goal = model.run_with_cache(inputs, names_filter=name)[1][name][:, at]
    start = model.run_with_cache(corrupted, names_filter=name)[1][name][:, at]

    def stepped(step: float) -> float:
        there = start + step * (goal - start)
        where = Intervention(site, layer, at.tolist(), lambda activation, hook: there)
        return float(
            model.run_with_hooks(corrupted, interventions=[where])[0, -1].softmax(-1)[answer]
        )

    slope = (stepped(1e-4) - stepped(-1e-4)) / 2e-4
    size = max(abs(slope), 1e-3)
    assert float(estimate.indirect_effect[0, 0, 0]) == pytest.approx(slope, abs=1e-3 * size)


@torch.no_grad()
def test_edits_change_the_answer_and_are_undone(case: Any, seed: int) -> None:
    """The saved edited model answers as the edited one; baselines start in the middle."""
    model, inputs, folder = case
    layer = random.Random(seed).randrange(model.cfg.n_layers)
    before = model(inputs)[0, -1].softmax(-1)
    target = int(before.argsort()[len(before) // 2])
    for method in (multedit, fine_tune, lora):
        edit = method(model, inputs, target, layer=layer, steps=6)
        with edit.applied(model):
            after = model(inputs)[0, -1].softmax(-1)
            if method is multedit:
                model.float().save_pretrained(folder / "edited")
                model.double()
        assert float(after[target]) > float(before[target]), method.__name__
        if method is multedit:
            again = load(folder / "edited").double()(inputs)[0, -1].softmax(-1)
            assert float((again - after).abs().max()) < 1e-4
            model = load(folder).double()  # rounded while it was saved
        torch.testing.assert_close(model(inputs)[0, -1].softmax(-1), before, rtol=0, atol=1e-9)


@pytest.mark.parametrize("task", ["trace", "contributions"])
def test_sweeps_over_images_of_other_sizes(task: str, case: Any, tmp_path: Path) -> None:
    """Together, in shards and batches, as one question after the other."""
    model, _, _ = case
    questions = []
    for row, size in enumerate([(40, 60), (80, 30), (25, 25), (40, 60), (80, 30)]):
        path = tmp_path / f"{row % 3}.png"
        random_image(size, row % 3).save(path)
        questions.append(
            VisualQuestion(
                question="What is the capital of this country?",
                image=path,
                visual_constraint="this country",
                subject=f"subject {row % 3}",
                source=f"made/{row}",
            )
        )
    settings = SETTINGS if task == "trace" else {"progress": False, "shard_size": 3}
    together = sweep(task, model, questions, tmp_path / "together", **settings)
    apart = sweep(task, model, questions, tmp_path / "apart", **{**settings, "shard_size": 1})
    assert together.n_done == apart.n_done == len(questions)
    assert together.failures().empty and apart.failures().empty
    pd.testing.assert_frame_equal(in_order(together), in_order(apart), rtol=1e-5, atol=1e-5)


def test_the_papers_figures_are_traces(case: Any, seed: int, tmp_path: Path) -> None:
    """`reproduce`: the profile over layers is the mean of traces by hand."""
    model, _, _ = case
    questions = []
    for row in range(3):
        path = tmp_path / f"{row}.png"
        random_image((40 + 30 * row, 60), row).save(path)
        questions.append(
            VisualQuestion(QUESTION, path, visual_constraint=CONSTRAINT, subject="Italy")
        )
    settings = Settings(limit=3, minimum_gap=-1.0, asked=3, windows=(1,), samples=5, seed=0)
    study = Study(settings, model, questions)
    table = FIGURES["layers"](study).tables["table"]
    chosen, _ = study.choose(("seen", "named"))
    asked = [each["seen"].inputs for each in chosen]
    effects = []
    for inputs in asked:
        corrupted = swap_span(model, inputs, "constraint", settings.replacement)
        last = [inputs.span("last")]
        trace = causal_trace(
            model, inputs, corrupted, sites=("mlp_out",), positions=last, window=1, method="naive"
        )
        effects.append(trace.indirect_effect[0, 0].double().numpy())
    seen = table["model"] == table["model"].iloc[0]
    rows = table[seen & (table["role"] == "last token") & (table["site"] == "mlp_out")]
    np.testing.assert_allclose(rows["mean"], np.mean(effects, axis=0), atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("listening", [False, True], ids=["fused", "all hooks listen"])
@pytest.mark.slow
def test_half_precision_is_as_exact_as_hugging_face(
    dtype: torch.dtype, listening: bool, seed: int, tmp_path: Path
) -> None:
    ratios = []
    for index in range(36):
        family, chance = FAMILIES[index % 3], random.Random(seed + index)
        folder = tmp_path / str(index)
        hf = in_dtype(random_qwen(family, chance), dtype)
        batch = random_batch(write(family, folder, hf), [1, 2], chance)
        found = error_ratios(load(folder), hf, batch, batch, listening=listening)
        ratios.append(found["logits"])
    check_half_precision(ratios)
