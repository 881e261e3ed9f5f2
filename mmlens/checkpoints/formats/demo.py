"""The embedded demo models: SmolLM2 from the cache, tower and projector from the package.

Not a published format, but put together from two: a Llama folder and an open_clip tower. The
tokenizer gets an `<image>` token after its vocabulary; nothing is ever embedded for it.

"demo" has the language model as it is. "demo-tuned" has the same tower, and what was trained as in
LLaVA's second stage: a projector of its own and a low-rank update of the language model.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mmlens.checkpoints import low_rank
from mmlens.checkpoints.decoders import decoder_names
from mmlens.checkpoints.errors import CheckpointError
from mmlens.checkpoints.formats import language_model
from mmlens.checkpoints.loader import Weights, build
from mmlens.checkpoints.low_rank import with_update
from mmlens.checkpoints.names import HF_PROJECTOR, slots, under
from mmlens.checkpoints.processors import IMAGE_PLACEHOLDER, load_tokenizer
from mmlens.checkpoints.towers import open_clip, open_clip_config
from mmlens.checkpoints.weight_files import WeightFile, weight_files
from mmlens.config import MultimodalConfig, ProjectorConfig
from mmlens.demo import FOLDER
from mmlens.demo.language_model import language_model_folder
from mmlens.inputs.processor import Processor
from mmlens.model.transformer import HookedMultimodalTransformer

TUNED = "tuned.safetensors"
IGNORED = (*(rf"vision_tower\.{pattern}" for pattern in open_clip_config.IGNORED), low_rank.FACTORS)


def load(variant: str, device: torch.device, dtype: torch.dtype) -> HookedMultimodalTransformer:
    """A demo model; the language model is fetched and converted on the first call.

    Args:
        variant: "demo" or "demo-tuned".

    Raises:
        CheckpointError: this copy of mmlens lacks the variant's weights.
        LanguageModelUnavailable: it is not in the cache and cannot be fetched.
    """
    processor = load_processor(variant)
    cfg, tuned = processor.cfg, FOLDER / TUNED if variant == "demo-tuned" else None
    folder = language_model_folder()
    names = (
        decoder_names(cfg, "language_model.")
        | under("vision_tower.visual.", open_clip_config.NAMES)
        | HF_PROJECTOR
    )
    weights = Weights(weight_files_of(folder, tuned), slots(cfg, names), IGNORED)
    model = build(cfg, weights, dtype=dtype, device=device, where=f"the {variant} model")
    model.tokenizer, model.image_processor = processor.tokenizer, processor.image_processor
    return model


def load_processor(variant: str) -> Processor:
    """A demo model's processor; the language model is fetched on the first call, as in `load`."""
    tuned = FOLDER / TUNED if variant == "demo-tuned" else None
    if tuned is not None and not tuned.is_file():
        raise CheckpointError(
            f"{variant!r} is not in this copy of mmlens: {tuned} is missing. 'demo' is there; "
            "training/demo/README.md says how the file is made"
        )
    settings = json.loads((FOLDER / "config.json").read_text())
    tower = json.loads((FOLDER / "open_clip_config.json").read_text())
    folder = language_model_folder()
    tokenizer = load_tokenizer(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_PLACEHOLDER]})
    cfg = replace(config(folder, settings, tower), model_name=variant)
    cfg.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER)
    transform = open_clip.image_transform(tower["model_cfg"], tower["preprocess_cfg"])
    return Processor(cfg, tokenizer, transform)


def weight_files_of(folder: Path, tuned: Path | None) -> list[WeightFile]:
    """The language model's files, the tower's and the projector's."""
    language_model_files = weight_files(folder, "language_model.")
    if tuned is None:
        projector = WeightFile(FOLDER / "projector.safetensors", "multi_modal_projector.")
    else:
        projector = WeightFile(tuned)  # its factors are `IGNORED` here
        language_model_files = with_update(language_model_files, tuned)
    tower = WeightFile(FOLDER / "vision.safetensors", "vision_tower.")
    return [*language_model_files, tower, projector]


def config(folder: Path, settings: dict[str, Any], tower: dict[str, Any]) -> MultimodalConfig:
    """The language model's configuration with a tower and a projector added."""
    cfg = language_model.config(folder)
    vision = open_clip_config.vision_config(
        tower["model_cfg"],
        settings["vision_feature_layer"],
        settings["vision_feature_select_strategy"],
    )
    return replace(
        cfg,
        vision=vision,
        projector=ProjectorConfig(d_in=vision.d_model, d_hidden=cfg.d_model, d_out=cfg.d_model),
        original_architecture="mmlens demo",
        default_template=settings["template"],
        default_prepend_bos=True,  # trained so, though SmolLM2's tokenizer adds none
    )
