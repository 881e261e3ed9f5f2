"""The embedded demo model: SmolLM2 from the cache, tower and projector from the package.

Not a published format, but put together from two: a Llama folder and an open_clip tower. The
tokenizer gets an `<image>` token behind its vocabulary; nothing is ever embedded for it.
"""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from mmlens.checkpoints import language_model, open_clip, open_clip_config
from mmlens.checkpoints.loader import build
from mmlens.checkpoints.names import (
    Table,
    decoder_names,
    open_clip_tower_names,
    projector_names,
)
from mmlens.checkpoints.processors import IMAGE_PLACEHOLDER, load_tokenizer
from mmlens.checkpoints.weight_files import WeightFile, weight_files
from mmlens.config import MultimodalConfig, ProjectorConfig
from mmlens.demo.language_model import language_model_folder
from mmlens.model import HookedMultimodalTransformer

IGNORED = tuple(rf"vision_tower\.{pattern}" for pattern in open_clip_config.IGNORED)


def load(device: torch.device, dtype: torch.dtype) -> HookedMultimodalTransformer:
    """The demo model; the language model is fetched and converted on the first call.

    Raises:
        LanguageModelUnavailable: it is not in the cache and cannot be fetched.
    """
    here = Path(str(files("mmlens.demo")))
    settings = json.loads((here / "config.json").read_text())
    tower = json.loads((here / "open_clip_config.json").read_text())
    folder = language_model_folder()
    tokenizer = load_tokenizer(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_PLACEHOLDER]})
    cfg = config(folder, settings, tower)
    cfg.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER)
    weights = [
        *weight_files(folder, "language_model."),
        WeightFile(here / "vision.safetensors", "vision_tower."),
        WeightFile(here / "projector.safetensors", "multi_modal_projector."),
    ]
    model = build(
        cfg,
        weights,
        table(cfg),
        ignored=IGNORED,
        dtype=dtype,
        device=device,
        where="the demo model",
    )
    model.tokenizer = tokenizer
    model.image_processor = open_clip.image_transform(tower["model_cfg"], tower["preprocess_cfg"])
    return model


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
        model_name="demo",
        original_architecture="mmlens demo",
        default_template=settings["template"],
    )


def table(cfg: MultimodalConfig) -> Table:
    """Every tensor that is used, and where it goes."""
    assert cfg.vision is not None and cfg.projector is not None
    return (
        decoder_names(cfg, "language_model.model.", "language_model.lm_head")
        | open_clip_tower_names(cfg.vision, "vision_tower.visual.")
        | projector_names(cfg.projector, prefix="multi_modal_projector.")
    )
