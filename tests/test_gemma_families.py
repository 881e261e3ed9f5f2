"""Gemma 3 with images and PaliGemma: prompts, pixels, logits, hooks and branches."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_checks import (
    check_branches,
    check_greedy_generation,
    check_logits_and_hooks,
    check_saved,
    check_shared_images,
    inputs_of,
)
from checkpoint_folders import load, merge_config, refused
from gemma_models import (
    FAMILIES,
    Family,
    gemma_activations,
    positions_of,
    random_batch,
    random_gemma,
    write,
)
from half_precision import check_half_precision, error_ratios
from random_models import in_dtype
from slow_cases import some_fast
from tiled_models import random_image
from transformers import AutoProcessor

from mmlens import Intervention
from mmlens.checkpoints.parity import compare, find_reference, run_reference
from mmlens.inputs.processor import Processor
from mmlens.interventions.functions import scale

EVERY = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def same_batch(inputs: Any, batch: Any) -> None:
    assert torch.equal(inputs.tokens, batch["input_ids"])
    assert torch.equal(inputs.attention_mask, batch["attention_mask"].bool())
    assert torch.equal(inputs.visual["pixel_values"], batch["pixel_values"])


@EVERY
def test_prompts_equal_transformers(family: Family, seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    theirs, ours = write(family, tmp_path), Processor.from_pretrained(tmp_path)
    image, other = random_image((30, 20), seed), random_image((7, 60), seed + 1)
    template = None if family.kind == "gemma3" else "<image><bos>{question}\n"
    for text, images in (
        ("<image>Which country?", [image]),
        ("<image> and \n<image>\n what", [image, other]),
    ):
        if family.kind != "gemma3":  # the processor puts BOS after the last image
            text = "<image>" * len(images) + "Which country? "
        batch = theirs(
            text=text.replace("<image>", family.word), images=[images], return_tensors="pt"
        )
        asked = text if template is None else text.replace("<image>", "")
        inputs = ours(asked, images, template=template)
        same_batch(inputs, batch)
        again = ours.from_tokens(batch.pop("input_ids"), **batch)
        assert torch.equal(again.blocks, inputs.blocks)
        for one, same in zip(again.images, inputs.images, strict=True):
            assert (one.start, one.grids) == (same.start, same.grids)
        phrase = chance.choice(["country", "Which"]) if "Which" in text else "what"
        spanned = ours(asked, images, template=template, spans={"it": phrase})
        words = "".join(spanned.str_tokens[0][at] for at in spanned.span("it").tolist())
        assert phrase in words
    automatic = ours("Which?", image)
    if family.kind == "gemma3":
        parts = [{"type": "image"}, {"type": "text", "text": "Which?"}]
        turn = [{"role": "user", "content": parts}]
        text = theirs.apply_chat_template(turn, add_generation_prompt=True)
        batch = theirs(text=text, images=image, add_special_tokens=False, return_tensors="pt")
    else:
        batch = theirs(text="<image>Which?", images=image, return_tensors="pt")
    same_batch(automatic, batch)
    assert torch.equal(automatic.span("bos"), (batch["input_ids"][0] == bos(theirs)).nonzero()[0])


def bos(processor: Any) -> int:
    return processor.tokenizer.bos_token_id


@EVERY
@pytest.mark.parametrize("images", [[1], [1, 2]], ids=str)
def test_logits_and_every_hook_equal_hugging_face(
    family: Family, images: list[int], seed: int, tmp_path: Path
) -> None:
    hf = random_gemma(family)
    chance = random.Random(seed)
    batch = random_batch(family, write(family, tmp_path, hf), images, chance)
    model = load(tmp_path)
    places = model.record(inputs_of(model, batch)).places

    def visible(name: str) -> torch.Tensor:
        """What the rule of that layer lets queries attend to."""
        return model.rules[model.cfg.kind(int(name.split(".")[1]))].mask(places, places)

    check_logits_and_hooks(
        model, hf, batch, lambda hf: gemma_activations(family, hf, batch), visible=visible
    )


@EVERY
@torch.no_grad()
def test_text_is_generated_as_by_transformers(family: Family, seed: int, tmp_path: Path) -> None:
    """Token for token, in float64, with the cache and without it."""
    family = replace(family, tied=False)  # else each token would be followed by itself
    hf = random_gemma(family)
    batch = random_batch(family, write(family, tmp_path, hf), [1, 2], random.Random(seed))
    hf, model = in_dtype(hf, torch.float64), load(tmp_path).double()
    # In float64 eager attention of padding is NaN here, but Gemma 2 has no other.
    hf.set_attn_implementation("eager" if family.kind == "paligemma2" else "sdpa")
    batch["pixel_values"] = batch["pixel_values"].double()
    check_greedy_generation(model, hf, batch, 8, cached=[True, False])


@some_fast("family", FAMILIES, ["gemma3", "paligemma"])
def test_every_hook_is_alive(family: Family, seed: int, tmp_path: Path) -> None:
    write(family, tmp_path)
    model = load(tmp_path)
    assert model.verify_hooks(model.prepare("Which?", random_image((9, 20), seed))) == []


@EVERY
def test_branches_equal_plain_runs(family: Family, seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    batch = random_batch(family, write(family, tmp_path), [1, 2], chance)
    model = load(tmp_path)
    inputs = inputs_of(model, batch)
    visual = inputs.images[1].positions.tolist()
    layer = chance.randrange(4)
    site = "attn.out" if layer % 2 and model.cfg.post_norms else "v"
    own = [
        Intervention("mlp_out", layer, visual[:1], scale(1.7)),
        Intervention("resid_post", layer, [visual[len(visual) // 2]], scale(1.3)),
        Intervention(site, 0, visual[-1:], scale(1.3)),
        Intervention("resid_pre", layer, [min(visual[-1] + 1, inputs.n_pos - 1)], scale(1.3)),
        Intervention("vision.ln_final.scale", None, [2], scale(1.4)),
    ]
    check_branches(model, inputs, own, chance, n_random=4)


@EVERY
def test_prompts_on_one_image_share_it(family: Family, seed: int, tmp_path: Path) -> None:
    write(family, tmp_path)
    images = [random_image((30, 50), seed + number) for number in range(2)]
    check_shared_images(load(tmp_path), images)


@EVERY
@torch.no_grad()
def test_a_saved_model_opens_in_transformers(family: Family, seed: int, tmp_path: Path) -> None:
    hf = random_gemma(family)
    batch = random_batch(family, write(family, tmp_path / "a", hf), [2, 1], random.Random(seed))
    model = load(tmp_path / "a")
    model.save_pretrained(tmp_path / "same")
    same = type(hf).from_pretrained(tmp_path / "same").state_dict()
    assert all(torch.equal(tensor, same[name]) for name, tensor in hf.state_dict().items())
    model.blocks[2].ln1.w_less_offset.add_(0.5)
    model.projector.linear_1.weight.add_(torch.randn_like(model.projector.linear_1.weight) / 9)
    given = {**batch, "position_ids": positions_of(family, batch)}
    check_saved(model, hf, batch, given, tmp_path / "b")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.slow
def test_half_precision_is_as_exact_as_hugging_face(
    dtype: torch.dtype, seed: int, tmp_path: Path
) -> None:
    ratios = []
    families = list(FAMILIES.values())
    for index in range(32):
        family, folder = families[index % len(families)], tmp_path / str(index)
        hf = in_dtype(random_gemma(family), dtype)
        batch = random_batch(family, write(family, folder, hf), [1, 2], random.Random(seed + index))
        given = {**batch, "position_ids": positions_of(family, batch)}
        # Eager attention of padding may be NaN, but Gemma 2 has no other.
        eager = family.kind == "paligemma2"
        found = error_ratios(load(folder), hf, batch, given, listening=False, eager=eager)
        ratios.append(found["logits"])
    check_half_precision(ratios)


@EVERY
def test_verify_compares_it_with_transformers(family: Family, seed: int, tmp_path: Path) -> None:
    """On an image and words, under the attention that the model was trained with."""
    write(family, tmp_path)
    reference = find_reference(tmp_path)
    assert reference is not None
    run = run_reference(reference, torch.device("cpu"), None, seed % 1000)
    for check in compare(load(tmp_path), run):
        assert check.passed, (check.name, check.detail)


def test_pan_and_scan_is_refused(seed: int, tmp_path: Path) -> None:
    write(FAMILIES["gemma3"], tmp_path)
    model = load(tmp_path)
    model.image_processor.do_pan_and_scan = True
    model.image_processor.pan_and_scan_min_crop_size = 2
    model.image_processor.pan_and_scan_max_num_crops = 4
    model.image_processor.pan_and_scan_min_ratio_to_activate = 1.2
    with pytest.raises(ValueError, match="do_pan_and_scan = False"):
        model.prepare("Which?", random_image((40, 9), seed))


@pytest.mark.parametrize("crops", [{}, {"min_crop_size": 2, "min_ratio_to_activate": 1.2}], ids=str)
def test_files_that_ask_for_pan_and_scan(crops: dict[str, Any], seed: int, tmp_path: Path) -> None:
    """transformers' processor makes crops only where its call asks for them."""
    settings = {f"pan_and_scan_{name}": value for name, value in crops.items()}
    write(FAMILIES["gemma3"], tmp_path)
    file = tmp_path / "processor_config.json"
    written = json.loads(file.read_text())
    written["image_processor"] |= settings | {"do_pan_and_scan": True}
    file.write_text(json.dumps(written))
    theirs = AutoProcessor.from_pretrained(tmp_path)
    assert theirs.image_processor.do_pan_and_scan
    image = random_image((40, 9), seed)
    turn = [{"type": "image", "image": image}, {"type": "text", "text": "Which?"}]
    batch = theirs.apply_chat_template(
        [{"role": "user", "content": turn}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    inputs = load(tmp_path).prepare("Which?", image)
    assert torch.equal(inputs.tokens, batch["input_ids"])
    assert inputs.visual is not None
    assert torch.equal(inputs.visual["pixel_values"], batch["pixel_values"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mm_tokens_per_image": 8}, "mm_tokens_per_image is 8"),
        ({"text_config": {"use_bidirectional_attention": True}}, "use_bidirectional_attention"),
        ({"text_config": {"final_logit_softcapping": 9.0}}, "final_logit_softcapping is 9.0"),
        ({"text_config": {"attn_logit_softcapping": 9.0}}, "attn_logit_softcapping=9.0"),
    ],
)
def test_other_configurations_are_refused(
    change: dict[str, Any], said: str, seed: int, tmp_path: Path
) -> None:
    write(FAMILIES["gemma3"], tmp_path)
    merge_config(tmp_path, change)
    refused(tmp_path, said)
