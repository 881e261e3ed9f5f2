"""Rotary angles that a GGUF file says for longer contexts, which transformers leaves out.

A file names linear scaling or YaRN in its fields (`rope.scaling`). What Llama 3.1 divides each
frequency by is a tensor, `rope_freqs.weight`, without the parameters that it was made of. Source:
llama.cpp, `convert_hf_to_gguf.py` (`generate_extra_tensors`) and `llama-model.cpp`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader

from mmlens.config import MultimodalConfig
from mmlens.model.components.rotary import frequencies

ROPE_FACTORS = "rope_freqs.weight"
LLAMA_3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""Of every Llama from 3.1 to 3.3, but for the factor itself."""
ROUNDING = 1e-5
"""Of the ratio of two frequencies in float32, many times over."""


def with_rotary(cfg: MultimodalConfig, reader: GGUFReader) -> MultimodalConfig:
    """Return a decoder's configuration with the angles that its file says.

    Raises:
        ValueError: angles of another kind than linear, YaRN or Llama 3's.
    """
    said: dict[str, Any] = {}
    for name, entry in reader.fields.items():
        if ".rope.scal" in name:  # `rope.scale_linear` in files of 2023
            said[name.partition(".rope.")[2].replace("scale_linear", "scaling.factor")] = (
                entry.contents()
            )
    theta = cfg.rope_parameters["rope_theta"]
    factors = [tensor.data for tensor in reader.tensors if tensor.name == ROPE_FACTORS]
    found = scaling(said)
    if factors and found:
        raise ValueError(f"it says {said} and has {ROPE_FACTORS}: one of the two is known to occur")
    if factors:
        found = of_llama_3(cfg, np.asarray(factors[0], dtype=np.float32).flatten())
    return replace(cfg, rope_parameters={"rope_theta": theta, **found}) if found else cfg


def scaling(said: dict[str, Any]) -> dict[str, Any]:
    """Return transformers' parameters for a file's fields; {} where nothing is scaled."""
    left = {name.removeprefix("scaling."): value for name, value in said.items()}
    kind, factor = left.pop("type", "linear"), float(left.pop("factor", 1.0))
    left.pop("finetuned", None)  # whether weights were trained with it
    original = left.pop("original_context_length", None)
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return {}
    if kind == "linear" and not left:
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn" and original and not left:
        longest = {"original_max_position_embeddings": int(original)}
        return {"rope_type": "yarn", "factor": factor} | longest
    raise ValueError(
        f"it says {said} of its rotary angles; known are linear and yarn, with a factor and "
        "original_context_length: take the checkpoint in safetensors"
    )


def of_llama_3(cfg: MultimodalConfig, factors: np.ndarray) -> dict[str, Any]:
    """Return the parameters that frequencies divided by these factors were made with."""
    theta = {"rope_theta": cfg.rope_parameters["rope_theta"]}
    found = LLAMA_3 | {"factor": float(factors.max())}
    plain, scaled = (frequencies(cfg, rope | theta)[0] for rope in ({}, found))
    theirs = torch.from_numpy(factors)
    same = theirs.shape == plain.shape
    if not same or not torch.allclose(plain / scaled, theirs, rtol=ROUNDING, atol=0):
        raise ValueError(
            f"it divides frequencies by {ROPE_FACTORS}, which are not those of a Llama 3.1 (from "
            f"{factors.min():g} to {factors.max():g}): take the checkpoint in safetensors"
        )
    return found
