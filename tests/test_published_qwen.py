"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL at their published sizes, without the weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from published_names import expand
from published_qwen import PUBLISHED
from test_published_names import Listed
from transformers import AutoConfig, AutoModelForImageTextToText

from mmlens.checkpoints.load import format_of
from mmlens.checkpoints.loader import Weights, check
from mmlens.checkpoints.weight_files import all_shapes
from mmlens.model.transformer import HookedMultimodalTransformer


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_name_has_its_place(name: str, tmp_path: Path) -> None:
    case = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(case.config()))
    form = format_of(tmp_path)
    cfg = form.config(tmp_path, None)
    weights = Weights([Listed(case.names())], form.table(cfg), form.ignored, form.rename)
    with torch.device("meta"):
        model = HookedMultimodalTransformer(cfg)
    shapes = dict(all_shapes(weights.files))
    check(model, shapes, weights, name)  # nothing unknown, nothing missing, every shape
    assert {weights.rename(key) for key in shapes} == set(weights.table)
    assert float(f"{sum(p.numel() for p in model.parameters()) / 1e9:.3g}") == case.billions
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(tmp_path)
        hf = AutoModelForImageTextToText.from_config(config)
    theirs = {form.rename(key): tuple(t.shape) for key, t in hf.state_dict().items()}
    if case.tied:
        theirs.pop("lm_head.weight")
    assert theirs == {form.rename(key): shape for key, shape in shapes.items()}
    assert expand(case.names()) == shapes
    d_head = cfg.d_head
    assert sum(cfg.rope_parameters["mrope_section"]) == d_head // 2 == 64
