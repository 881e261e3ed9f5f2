"""A language model in one GGUF file (llama.cpp's format), read by transformers.

Weights are dequantised, so the model is as large as any other of its dtype. Source: transformers,
`modeling_gguf_pytorch_utils.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from mmlens.checkpoints.errors import CheckpointError
from mmlens.checkpoints.hf_configs import decoder_fields
from mmlens.checkpoints.loader import check, fill
from mmlens.checkpoints.names import decoder_names
from mmlens.config import MultimodalConfig
from mmlens.model import HookedMultimodalTransformer


def load(file: Path, device: torch.device, dtype: torch.dtype) -> HookedMultimodalTransformer:
    """The model of a GGUF file, with its tokenizer.

    Raises:
        CheckpointError: transformers cannot read it, or it is no supported decoder.
    """
    try:
        hf = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=dtype, trust_remote_code=False
        )
    except Exception as error:  # gguf's reader raises whatever a damaged file leads it to
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"transformers cannot read {file}: {reason}") from error
    cfg = MultimodalConfig(
        **decoder_fields(hf.config), original_architecture=type(hf).__name__, model_name=str(file)
    )
    # GGUF says nothing of tying: the output layer is there, or it is not.
    cfg = replace(cfg, tie_word_embeddings=hf.lm_head.weight is hf.get_input_embeddings().weight)
    with torch.device("meta"):
        model = HookedMultimodalTransformer(cfg).to(dtype)
    weights = hf.state_dict()
    del hf  # so that each tensor can go once it has been copied
    shapes = {name: tensor.shape for name, tensor in weights.items()}
    check(model, shapes, decoder_names(cfg), ignored=(r"lm_head\.weight",), where=str(file))
    model.to_empty(device=device)
    if cfg.tie_word_embeddings:
        model.unembed.weight = model.embed.W_E
    fill(model, taken(weights), decoder_names(cfg))
    model.tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    return model


def taken(weights: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor, which is dropped once the next one is asked for."""
    for name in list(weights):
        yield name, weights.pop(name)
