"""Does a checkpoint's processor give the ids and pixels that transformers' own one gives?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoProcessor, PaliGemmaProcessor

from mmlens.checkpoints.json_files import check_folder
from mmlens.checkpoints.parity import Check
from mmlens.inputs.image_files import one_line
from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.inputs.processor import Processor
from mmlens.inputs.spans import PLACEHOLDER
from mmlens.inputs.templates import ChatTemplate, fill_template

NAME = "processor"
QUESTION = "What is in this image?"
SIZES = ((201, 130), (97, 240))
"""Width and height in pixels: families that cut images into tiles do so in several ways here."""


def compare_processors(processor: Processor, folder: Path, seed: int) -> Check:
    """Compare ids and pixels of one question about random images, one image at a time.

    Nothing is judged where transformers has no processor of the folder, or where a package is
    missing that transformers' processor needs (SmolVLM's needs num2words).
    """
    check_folder(folder)
    if processor.tokenizer is None or processor.image_processor is None:
        return Check(NAME, None, "the folder has no tokenizer, or no image processor")
    try:
        theirs = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    except ImportError as error:
        if "num2words" not in str(error):
            return Check(NAME, None, f"not compared: {one_line(error)}")
        why = "transformers' processor of SmolVLM needs num2words: pip install 'mmlens[smolvlm]'"
        return Check(NAME, None, f"not compared: {why} (mmlens itself works without it)")
    except Exception as error:  # whatever files that are no processor's lead transformers to
        return Check(NAME, None, f"not compared: transformers made none: {one_line(error)}")
    if not hasattr(theirs, "image_processor"):
        return Check(NAME, None, "not compared: transformers has none for this folder")
    generator = torch.Generator().manual_seed(seed)
    for width, height in SIZES:
        pixels = torch.randint(256, (height, width, 3), generator=generator, dtype=torch.uint8)
        image = Image.fromarray(pixels.numpy())
        try:
            batch = theirs_of(theirs, processor, image)
        except Exception as error:  # as above
            return Check(NAME, None, f"not compared: transformers' failed: {one_line(error)}")
        size = f"for an image of {width} x {height} pixels"
        try:
            difference = first_difference(processor, processor(QUESTION, image), batch)
        except ValueError as error:
            return Check(NAME, False, f"mmlens refuses it {size}: {one_line(error)}")
        if difference:
            return Check(NAME, False, f"{difference}, {size}")
    sizes = " and ".join(f"{width} x {height}" for width, height in SIZES)
    return Check(NAME, True, f"ids and pixels equal, for images of {sizes} pixels")


def theirs_of(theirs: Any, processor: Processor, image: Image.Image) -> dict[str, Any]:
    """Return what transformers' processor makes of the question in the checkpoint's template."""
    if isinstance(theirs, PaliGemmaProcessor):  # it writes the whole prompt itself
        return dict(theirs(text=[PLACEHOLDER + QUESTION], images=[image], return_tensors="pt"))
    template, bos = processor.cfg.default_template, processor.tokenizer.bos_token
    prompt, _ = fill_template(template, QUESTION, 1)
    # As `apply_chat_template(tokenize=True)` of transformers' processors does it.
    complete = isinstance(template, ChatTemplate) and bool(bos) and prompt.startswith(bos)
    text = prompt.replace(PLACEHOLDER, processor.cfg.image_placeholder)
    options = {"add_special_tokens": not complete, "return_tensors": "pt"}
    return dict(theirs(text=[text], images=[image], **options))


def first_difference(processor: Processor, ours: MultimodalInputs, batch: dict[str, Any]) -> str:
    """Return in words what differs first from transformers' batch; "" if nothing does."""
    rest = {name: tensor for name, tensor in batch.items() if name != "input_ids"}
    ids = batch["input_ids"]
    if not torch.equal(ours.tokens, ids):
        if ours.n_pos != ids.shape[1]:
            return f"{ours.n_pos} tokens instead of {ids.shape[1]}"
        at = int((ours.tokens != ids)[0].nonzero()[0])
        return f"token {int(ours.tokens[0, at])} instead of {int(ids[0, at])} at position {at}"
    others = processor.from_tokens(ids, **rest)
    assert ours.visual is not None and others.visual is not None  # both have an image
    for name, tensor in ours.visual.items():
        if not torch.equal(tensor, others.visual[name]):
            return f"{name} differs"
    return ""
