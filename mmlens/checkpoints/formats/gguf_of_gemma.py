"""What transformers does not know of Gemma's GGUF files.

It reads Gemma 2 and 3, leaves out some of what their files say, and has no entry for Gemma 1, whose
files differ from Gemma 2's by having no windows. Source: llama.cpp, `convert_hf_to_gguf.py`;
transformers, `modeling_gguf_pytorch_utils.py` and `integrations/ggml.py`.
"""

from __future__ import annotations

from typing import Any

from gguf import GGUFReader
from transformers import modeling_gguf_pytorch_utils
from transformers.integrations import ggml

GEMMA_27B = {"gemma2": 46, "gemma3_text": 62}
"""Layers of the models whose scale of scores no file says, and transformers gets wrong."""


def add_gemma() -> None:
    """Add Gemma 1 to transformers' tables of GGUF files, where it is not there.

    transformers has no function that registers a family. Entries that it has are left as they are.
    """
    fields = modeling_gguf_pytorch_utils.GGUF_TO_TRANSFORMERS_MAPPING["config"]
    fields.setdefault(
        "gemma", {k: v for k, v in fields["gemma2"].items() if k != "attention.sliding_window"}
    )
    if "gemma" not in modeling_gguf_pytorch_utils.GGUF_SUPPORTED_ARCHITECTURES:
        modeling_gguf_pytorch_utils.GGUF_SUPPORTED_ARCHITECTURES.append("gemma")
    tables = [modeling_gguf_pytorch_utils.TENSOR_PROCESSORS]
    # transformers up to 5.17 has the tokenizers' table there; later ones know Gemma 1's.
    tables += [getattr(ggml, "GGUF_TO_FAST_CONVERTERS", {"gemma2": None})]
    for table in tables:
        table.setdefault("gemma", table["gemma2"])


def check_gemma(reader: GGUFReader, hf: Any) -> None:
    """Raise a ValueError for a Gemma that transformers would read as another model.

    It leaves out what a file says of caps and of longer contexts, and takes what the smaller models
    have.
    """
    if hf.model_type not in ("gemma", *GEMMA_27B):
        return
    said = {name.partition(".")[2]: entry.contents() for name, entry in reader.fields.items()}
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        taken = getattr(hf, name, None)
        if name in said and said[name] != taken:
            raise ValueError(f"it says {name} = {said[name]}, and transformers takes {taken}")
    if said.get("rope.scaling.factor", 1.0) != 1.0:
        raise ValueError("it says rope.scaling, which transformers leaves out of a Gemma")
    if hf.num_hidden_layers == GEMMA_27B.get(hf.model_type):
        raise ValueError(
            f"a Gemma of {hf.num_hidden_layers} layers (27B), for which transformers takes another "
            "query_pre_attn_scalar than its own: take the checkpoint in safetensors"
        )
