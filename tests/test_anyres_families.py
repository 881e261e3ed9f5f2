"""LLaVA-NeXT and LLaVA-OneVision: inputs and numbers equal those of transformers.

Ids, pixels and masks are compared with transformers' own processors, bit for bit; logits and hooks
with its models, as in `test_model_parity.py`.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from anyres_checkpoints import (
    SHAPES,
    as_prompts,
    odd_sizes,
    packed,
    random_image,
    written,
)
from checkpoint_folders import edit_config
from half_precision import check_half_precision, error_ratios
from PIL import Image
from random_models import in_dtype
from test_branching import assert_equal_to_plain_runs
from test_branching_families import any_edit
from test_model_parity import compare_everything

from mmlens import Intervention
from mmlens.checkpoints.errors import CheckpointError
from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.inputs.processor import Processor
from mmlens.interventions.functions import noise
from mmlens.model.transformer import HookedMultimodalTransformer

Rows = list[list[Image.Image]]
ONE_OF_EACH = ["NeXT", "OneVision"]


def images_of(sizes: list[list[tuple[int, int]]]) -> Rows:
    return [[random_image(*size) for size in row] for row in sizes]


def texts_of(images: Rows) -> list[str]:
    """A prompt for each row, with its images somewhere in it."""
    texts = []
    for row in images:
        words = random.choices(
            "what is the capital of this country ?".split(), k=random.randint(2, 9)
        )
        for _ in row:
            words.insert(random.randint(0, len(words) - 1), "<image>")
        texts.append(" ".join(words))
    return texts


def some_rows() -> Rows:
    """One, two and no images, small enough for a run."""
    sizes = [(31, 52), (19, 40), (77, 20), (8, 8), (40, 40), (111, 25)]
    return images_of([[random.choice(sizes)], random.sample(sizes, 2), []])


def prepared(made: Any, texts: list[str], images: Rows) -> MultimodalInputs:
    processor = made if isinstance(made, Processor) else made.processor
    return processor(texts, images, template=None)


def assert_same_inputs(ours: MultimodalInputs, others: MultimodalInputs) -> None:
    assert torch.equal(ours.tokens, others.tokens)
    assert torch.equal(ours.attention_mask, others.attention_mask)
    if ours.visual is None or others.visual is None:
        assert ours.visual is others.visual
        return
    assert ours.visual.counts == others.visual.counts
    assert all(torch.equal(ours.visual[name], others.visual[name]) for name in ours.visual)
    for mine, theirs in zip(ours.images, others.images, strict=True):
        assert torch.equal(mine.cells, theirs.cells)
        assert (mine.start, mine.row, mine.grids) == (theirs.start, theirs.row, theirs.grids)
        assert mine.marks == theirs.marks
    assert all(
        torch.equal(mine[name], theirs[name])
        for mine, theirs in zip(ours.spans, others.spans, strict=True)
        for name in ("image", "last")
        if name in theirs
    )


@pytest.mark.parametrize("name", SHAPES)
def test_ids_pixels_and_masks_equal_transformers(name: str, seed: int, tmp_path: Path) -> None:
    made = written(name, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    reader = Processor.from_pretrained(tmp_path)  # needs no weights
    sizes = odd_sizes(24)
    rows = [[[size]] for size in sizes]
    rows += [[random.sample(sizes, n)] for n in (2, 3)]
    rows += [[random.sample(sizes, n) for n in random.sample([0, 1, 1, 2, 3], 3)] for _ in range(3)]
    for row_sizes in rows:
        images = images_of(row_sizes)
        texts = texts_of(images)
        batch = made.batch(texts, images)
        ours = prepared(made.model, texts, images)
        assert torch.equal(ours.tokens, batch["input_ids"]), row_sizes
        assert torch.equal(ours.attention_mask.long(), batch["attention_mask"])
        assert_same_inputs(ours, prepared(reader, texts, images))
        given = dict(batch)
        assert_same_inputs(ours, made.model.inputs_from_tokens(given.pop("input_ids"), **given))
        if ours.visual is not None:
            counts = made.n_tiles(images)
            assert list(ours.visual.counts["pixel_values"]) == counts
            assert torch.equal(ours.visual["pixel_values"], packed(batch, counts))
            assert torch.equal(ours.visual["image_sizes"], batch["image_sizes"])


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_the_checkpoints_own_chat_template(name: str, seed: int, tmp_path: Path) -> None:
    made = written(name, tmp_path)
    for n_images in (0, 1, 2):
        images = images_of([random.sample(odd_sizes(30), n_images)])
        question = "What is the capital of this country?"
        parts = [*[{"type": "image"}] * n_images, {"type": "text", "text": question}]
        prompt = made.processor.apply_chat_template(
            [{"role": "user", "content": parts}], add_generation_prompt=True
        )
        theirs = made.batch([prompt], images)
        ours = made.model.prepare(question, images[0])
        assert torch.equal(ours.tokens, theirs["input_ids"])


@pytest.mark.parametrize("name", SHAPES)
def test_logits_and_every_hook_equal_transformers(name: str, seed: int, tmp_path: Path) -> None:
    made = written(name, tmp_path)
    images = some_rows()
    batch = made.batch(texts_of(images), images)
    compare_everything(made.hf, made.model, as_prompts(batch))
    with torch.no_grad():
        called = made.model(**batch)
    given = dict(batch)
    inputs = made.model.inputs_from_tokens(given.pop("input_ids"), **given)
    assert torch.equal(called, made.model(inputs))


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_greedy_generation_equals_transformers(name: str, seed: int, tmp_path: Path) -> None:
    made = written(name, tmp_path)
    images = some_rows()[:2]
    texts = texts_of(images)
    batch = made.batch(texts, images)
    n_new = 9
    options = {"do_sample": False, "min_new_tokens": n_new, "max_new_tokens": n_new}
    suppressed = [made.model.cfg.image_token_id]
    theirs = made.hf.generate(**batch, **options, suppress_tokens=suppressed)
    ours = made.model.generate(
        prepared(made.model, texts, images),
        n_new,
        return_type="tokens",
        min_new_tokens=n_new,
        suppress_tokens=suppressed,
        do_sample=False,
    )
    assert torch.equal(ours[:, -n_new:], theirs[:, -n_new:])
    del options["do_sample"]  # greedy by default, as there
    of_batch = made.model.generate(**batch, **options, suppress_tokens=suppressed)
    assert torch.equal(of_batch, theirs)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_every_hook_is_alive(name: str, seed: int, tmp_path: Path) -> None:
    made = written(name, tmp_path)
    images = images_of([[(50, 23)]])
    assert made.model.verify_hooks(prepared(made.model, texts_of(images), images)) == []


@pytest.mark.parametrize("name", ONE_OF_EACH)
@torch.no_grad()
def test_branches_equal_plain_runs(name: str, seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    made = written(name, tmp_path)
    images = chance.choice([some_rows(), some_rows()[:1], some_rows()[1:2]])
    inputs = prepared(made.model, texts_of(images), images)
    visual = inputs.images[0].positions
    last = [inputs.n_pos - 1]
    branches = [
        [Intervention("mlp_out", 1, last, noise(0.7))],
        [Intervention("resid_post", 0, visual[[0, -1]].tolist(), noise(0.7))],
        [Intervention("vision.mlp_out", 0, [1], noise(0.7))],
        [
            Intervention("vision.resid_post", 1, None, noise(0.7)),
            Intervention("z", 2, last, noise(1)),
        ],
        [Intervention("projector.pre", None, [0, 3], noise(0.7))],
        [Intervention("projector.out", None, [int(visual[-1] - visual[0])], noise(0.7))],
        *([any_edit(made.model, inputs, chance)] for _ in range(6)),
    ]
    rows = chance.choice([None, 1, 5])
    assert_equal_to_plain_runs(made.model, inputs, branches, chance, batch_rows=rows)


@pytest.mark.parametrize("name", ONE_OF_EACH)
@torch.no_grad()
def test_saved_and_opened_again(name: str, seed: int, tmp_path: Path) -> None:
    made = written(name, tmp_path / "source")
    images = some_rows()
    batch = made.batch(texts_of(images), images)
    before = made.model(**batch)
    line_ends: Any = made.model.projector.line_ends
    line_ends.newline.add_(torch.randn_like(line_ends.newline))
    made.model.blocks[1].mlp.W_out.mul_(-1.5)
    made.model.save_pretrained(tmp_path / "edited")
    hf = type(made.hf).from_pretrained(tmp_path / "edited")
    again = HookedMultimodalTransformer.from_pretrained(tmp_path / "edited", device="cpu")
    real = batch["attention_mask"].bool()
    theirs = hf(**batch).logits
    assert torch.equal(again(**batch), made.model(**batch))
    assert float((again(**batch) - theirs)[real].abs().max()) < 1e-4
    assert float((before - theirs)[real].abs().max()) > 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@torch.no_grad()
def test_half_precision_is_as_exact_as_transformers(
    dtype: torch.dtype, seed: int, tmp_path: Path
) -> None:
    ratios = []
    for index in range(12):
        made = written(ONE_OF_EACH[index % 2], tmp_path / str(index), dtype=dtype)
        hf = in_dtype(made.hf, dtype)
        images = some_rows()[:2]
        batch = made.batch(texts_of(images), images)
        ratios.append(error_ratios(made.model, hf, batch, batch, listening=False)["logits"])
    check_half_precision(ratios)


def test_videos_are_refused_by_name(seed: int, tmp_path: Path) -> None:
    made = written("OneVision", tmp_path)
    frames = [[random_image(30, 20) for _ in range(3)]]
    batch = made.processor(text=["<video> what is this?"], videos=frames, return_tensors="pt")
    with pytest.raises(ValueError, match="does not take pixel_values_videos.*takes no videos"):
        made.model(**batch)


def test_a_processor_that_makes_other_tiles_is_refused(seed: int, tmp_path: Path) -> None:
    made = written("NeXT", tmp_path)
    made.model.image_processor.image_grid_pinpoints = [[40, 40]]
    with pytest.raises(ValueError, match=r"80 x 20 pixels into \(40, 40\).*image_grid_pinpoints"):
        made.model.prepare("<image> what?", random_image(80, 20), template=None)


def test_an_image_that_padded_would_be_too_large_is_refused(seed: int, tmp_path: Path) -> None:
    made = written("OneVision", tmp_path)
    with pytest.raises(ValueError, match="20,000 x 2 pixels, padded to a square"):
        made.model.prepare("what?", [random_image(20000, 2), random_image(8, 8)])
    assert made.model.prepare("what?", random_image(20000, 2)).n_images == (1,)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"image_grid_pinpoints": [[92, 10**9 * 23]]}, "tiles; an image may have 256"),
        ({"image_grid_pinpoints": [[24, 23]]}, "whole tiles of 23 pixels"),
        ({"image_grid_pinpoints": [["a", 23]]}, "pairs of whole numbers"),
        ({"image_grid_pinpoints": [23, 46]}, "pairs of whole numbers"),
        ({"vision_aspect_ratio": "anyres"}, "vision_aspect_ratio is 'anyres'"),
        ({"vision_feature_select_strategy": "default"}, "a tile of 25 patches has 24 features"),
    ],
    ids=str,
)
def test_configurations_that_make_no_tiles_are_refused(
    fields: dict[str, Any], said: str, seed: int, tmp_path: Path
) -> None:
    written("OneVision", tmp_path)
    edit_config(tmp_path, **fields)
    with pytest.raises(CheckpointError, match=said) as error:
        Processor.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value)
