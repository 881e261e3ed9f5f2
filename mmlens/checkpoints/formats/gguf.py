"""A language model in one GGUF file (llama.cpp's format), read by transformers.

Weights are dequantised, so the model is as large as any other of its dtype. Source: transformers,
`modeling_gguf_pytorch_utils.py`.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from mmlens.checkpoints.decoders import decoder_fields
from mmlens.checkpoints.errors import CheckpointError
from mmlens.checkpoints.formats.gguf_of_gemma import add_gemma, check_gemma
from mmlens.checkpoints.formats.gguf_rotary import ROPE_FACTORS, with_rotary
from mmlens.checkpoints.formats.language_model import FORMAT
from mmlens.checkpoints.json_files import check_counts
from mmlens.checkpoints.loader import Weights, build
from mmlens.checkpoints.paths import checkpoint_errors
from mmlens.checkpoints.processors import default_template, pads_left, written_out
from mmlens.checkpoints.weight_files import WeightFile
from mmlens.config import MultimodalConfig
from mmlens.inputs.processor import Processor
from mmlens.model.transformer import HookedMultimodalTransformer

UNREADABLE = "transformers cannot read it: "
MOST_ENTRIES = 2**21
"""Twice those of Llama 3's vocabulary and merges."""


@dataclass(frozen=True)
class Dequantised(WeightFile):
    """A GGUF file's tensors as transformers has read them; each is dropped once it is taken."""

    tensors_by_name: dict[str, Tensor] = field(default_factory=dict)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return names and shapes."""
        return {name: tuple(tensor.shape) for name, tensor in self.tensors_by_name.items()}

    def tensors(
        self, device: torch.device | str = "cpu", only: Callable[[str], bool] | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor with its name, once."""
        for name in list(self.tensors_by_name):
            yield name, self.tensors_by_name.pop(name)


def load(file: Path, device: torch.device, dtype: torch.dtype) -> HookedMultimodalTransformer:
    """Return the model of a GGUF file, with its tokenizer."""
    described, held = description(file)
    with checkpoint_errors(file, UNREADABLE), alone(file) as where:
        hf, info = AutoModelForCausalLM.from_pretrained(
            **where, dtype=dtype, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(**where)
    # transformers makes up what is missing.
    if lost := sorted(info["missing_keys"]) + sorted(map(str, info["mismatched_keys"])):
        raise CheckpointError(
            f"{file} lacks {len(lost)} tensors, or has them in another shape: {', '.join(lost[:5])}"
        )
    check_all_taken(held, hf, file)
    cfg = MultimodalConfig(
        **decoder_fields(hf.config) | {"rope_parameters": described.rope_parameters},
        original_architecture=type(hf).__name__,
        model_name=str(file),
    )
    # GGUF says nothing of tying: the output layer is there, or it is not.
    cfg = replace(cfg, tie_word_embeddings=hf.lm_head.weight is hf.get_input_embeddings().weight)
    files = [Dequantised(file, tensors_by_name=hf.state_dict())]
    del hf  # so that each tensor can go once it has been copied
    weights = Weights(files, FORMAT.table(cfg), FORMAT.ignored)
    model = build(cfg, weights, dtype=dtype, device=device, where=str(file))
    model.tokenizer = processor_of(cfg, tokenizer, file).tokenizer
    return model


def load_processor(file: Path) -> Processor:
    """Return the tokenizer and template of a GGUF file.

    Raises:
        CheckpointError: transformers cannot read it, or it is no supported decoder.
    """
    cfg = described_config(file)
    with checkpoint_errors(file, UNREADABLE), alone(file) as where:
        return processor_of(cfg, AutoTokenizer.from_pretrained(**where), file)


def processor_of(cfg: MultimodalConfig, tokenizer: Any, file: Path) -> Processor:
    """Return the processor with this tokenizer; `cfg` learns the template."""
    source = default_template(tokenizer.chat_template)
    cfg.default_template = written_out(source, tokenizer, with_images=False, where=file)
    return Processor(cfg, pads_left(tokenizer))


@contextmanager
def alone(file: Path) -> Iterator[dict[str, Any]]:
    """Give arguments of transformers' `from_pretrained` for a GGUF file in a folder of its own.

    Whatever else lies beside it (an adapter_config.json, a tokenizer_config.json) is another
    checkpoint's, and transformers would follow it.
    """
    add_gemma()
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder, file.name)
        try:
            link.symlink_to(file.resolve())
        except OSError:  # Windows, for most users
            shutil.copyfile(file, link)
        yield {
            "pretrained_model_name_or_path": folder,
            "gguf_file": link.name,
            "trust_remote_code": False,
        }


def check_all_taken(held: list[str], hf: Any, file: Path) -> None:
    """Raise a CheckpointError where transformers has left tensors of the file out.

    It does so with what the family does not have, such as biases of a Llama.
    """
    taken = sum(1 for _ in hf.parameters())
    if taken < len(held):
        biases = ", ".join([name for name in held if name.endswith(".bias")][:3])
        raise CheckpointError(
            f"{file} holds {len(held)} tensors, of which transformers takes {taken}"
            f"{f' (it has biases: {biases}, ...)' if biases else ''}: take the checkpoint in "
            "safetensors"
        )


def described_config(file: Path) -> MultimodalConfig:
    """Return what a GGUF file says that its decoder is; see `description`."""
    return description(file)[0]


def description(file: Path) -> tuple[MultimodalConfig, list[str]]:
    """Return what a GGUF file says that its decoder is, and the names of its weights.

    One that describes more than the file holds is refused; transformers would make up the rest.
    """
    with checkpoint_errors(file, UNREADABLE):
        reader = Reader(file)
        held = n_parameters(reader, file)
        with alone(file) as where:
            hf = AutoConfig.from_pretrained(**where)
        check_counts(hf.to_dict(), file)
        check_gemma(reader, hf)
        cfg = MultimodalConfig(**decoder_fields(hf) | {"tie_word_embeddings": True})
        cfg = with_rotary(cfg, reader)
        with torch.device("meta"):
            described = sum(x.numel() for x in HookedMultimodalTransformer(cfg).parameters())
    if described > held:
        raise CheckpointError(
            f"{file} describes a model of {described:,} parameters or more, but holds {held:,}"
        )
    return cfg, [tensor.name for tensor in reader.tensors if tensor.name != ROPE_FACTORS]


class Reader(GGUFReader):
    """gguf's reader, which refuses counts that the file does not hold; its own counts to the end.

    Every entry of a list is an object of numpy's, hence `MOST_ENTRIES`.
    """

    data: Any
    n_read = 0

    def _get(self, offset: int, dtype: Any, count: Any = 1, *order: Any, **options: Any) -> Any:
        self.data = np.asarray(self.data)  # slices of a memory map are slow, and large
        self.n_read += 1
        if self.n_read > MOST_ENTRIES:
            raise ValueError(f"its lists have more than {MOST_ENTRIES:,} entries")
        found = super()._get(offset, dtype, count, *order, **options)
        if len(found) < count:
            raise ValueError(f"it ends before what it announces at byte {offset:,}")
        return found


def n_parameters(reader: Reader, file: Path) -> int:
    """Return how many numbers a GGUF file holds in its tensors, if it holds what it announces."""
    for name, entry in reader.fields.items():
        if name.endswith(".block_count") and entry.contents() > len(reader.tensors):
            raise ValueError(
                f"{name} is {entry.contents():,}, but it holds {len(reader.tensors):,} tensors"
            )
    n_bytes, size = sum(tensor.n_bytes for tensor in reader.tensors), os.path.getsize(file)
    if n_bytes > size:  # several tensors in one place
        raise ValueError(f"its tensors have {n_bytes:,} bytes, the file {size:,}")
    return sum(int(tensor.n_elements) for tensor in reader.tensors)
