"""GGUF files: what we make of one equals what transformers makes of it."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_folders import load, refused
from gguf import GGUFWriter, RopeScalingType
from gguf_writing import finished, write_gguf
from limits import time_limit
from random_models import LINEAR, YARN, Shape, random_llama
from rounding import assert_same, rounded_otherwise
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from mmlens.checkpoints.errors import CheckpointError
from mmlens.checkpoints.formats import gguf as gguf_files
from mmlens.checkpoints.parity import compare, find_reference, run_reference


def interleaved(weight: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Rows of queries and keys in llama.cpp's order: rotated pairs side by side."""
    halves = weight.view(n_heads, 2, -1, weight.shape[-1])
    return halves.transpose(1, 2).reshape(weight.shape)


def write_llama(
    hf: LlamaForCausalLM,
    path: Path,
    half: bool = False,
    chat_template: str = "",
    more: Callable[[GGUFWriter], None] = lambda writer: None,
) -> Path:
    """The model in 16 bits (all but norms) or 32; `more` adds what it has besides."""
    config = hf.config

    def stored(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if "q_proj" in name:
            tensor = interleaved(tensor, config.num_attention_heads)
        if "k_proj" in name:
            tensor = interleaved(tensor, config.num_key_value_heads)
        return tensor.half() if half and tensor.ndim > 1 else tensor

    def fields(writer: GGUFWriter) -> None:
        writer.add_rope_dimension_count(config.head_dim)
        more(writer)
        if chat_template:
            writer.add_chat_template(chat_template)

    return write_gguf(path, "llama", hf, stored, fields=fields)


@pytest.mark.parametrize("half", [False, True], ids=["F32", "F16"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@torch.no_grad()
def test_it_equals_transformers_own_reading(
    tied: bool, half: bool, seed: int, tmp_path: Path
) -> None:
    hf = random_llama(Shape(d_head=8, d_model=48, tied=tied))
    path = write_llama(hf, tmp_path / "tiny.gguf", half)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32
    )
    model = load(path)
    assert model.vision is None and model.cfg.tie_word_embeddings == tied
    assert model.cfg.model_name == str(path)
    # No special ones: an end token in front counts as padding where there is no other.
    tokens = torch.randint(3, hf.config.vocab_size, (2, 11))
    logits = model(tokens)
    # Not half, also what was written: the file is a real one.
    for reference in (theirs,) if half else (theirs, hf):
        assert_same(
            logits,
            reference(tokens).logits,
            lambda: rounded_otherwise(reference)(tokens).logits,  # noqa: B023
        )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    text = "the capital of the country"
    assert model.to_tokens(text)[0].tolist()[-5:] == tokenizer(text)["input_ids"][-5:]
    with pytest.raises(CheckpointError, match="no checkpoint folder"):
        model.save_pretrained(tmp_path / "saved")


LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}


def linear(writer: GGUFWriter) -> None:
    writer.add_rope_scaling_type(RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(LINEAR["factor"])


def yarn(writer: GGUFWriter) -> None:
    writer.add_rope_scaling_type(RopeScalingType.YARN)
    writer.add_rope_scaling_factor(YARN["factor"])
    writer.add_rope_scaling_orig_ctx_len(YARN["original_max_position_embeddings"])


def factors_of_llama_3(writer: GGUFWriter, n: int = 4, longest: int = 8192) -> None:
    """What frequencies are divided by, as llama.cpp's `convert_hf_to_gguf.py` writes it."""
    factors = []
    for pair in range(n):
        wave_length = 2 * math.pi * LLAMA_3["rope_theta"] ** (pair / n)
        if wave_length < longest / 4:
            factors.append(1.0)
        elif wave_length > longest:
            factors.append(8.0)
        else:
            smooth = (longest / wave_length - 1) / 3
            factors.append(1 / ((1 - smooth) / 8 + smooth))
    writer.add_tensor("rope_freqs.weight", np.array(factors, dtype=np.float32))


@pytest.mark.parametrize(
    ("rope", "more"), [(LINEAR, linear), (YARN, yarn), (LLAMA_3, factors_of_llama_3)]
)
@torch.no_grad()
def test_rotary_angles_of_longer_contexts(
    rope: dict[str, Any], more: Any, seed: int, tmp_path: Path
) -> None:
    """transformers' own reading leaves them out."""
    hf = random_llama(Shape(d_head=8, d_model=48, rope=rope))
    model = load(path := write_llama(hf, tmp_path / "tiny.gguf", more=more))
    tokens = torch.randint(3, hf.config.vocab_size, (2, 60))
    logits = model(tokens)
    assert_same(logits, hf(tokens).logits, lambda: rounded_otherwise(hf)(tokens).logits)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name)
    assert (theirs(tokens).logits - logits).abs().max() > 1e-2
    reference = find_reference(path)
    assert reference is not None
    run = run_reference(reference, torch.device("cpu"), None, seed % 1000)
    assert all(check.passed for check in compare(model, run))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (lambda writer: factors_of_llama_3(writer, longest=4096), "not those of a Llama 3.1"),
        (lambda writer: factors_of_llama_3(writer, 5), "not those of a Llama 3.1"),
        (lambda writer: writer.add_rope_scaling_type(RopeScalingType.LONGROPE), "longrope"),
        (lambda writer: (yarn(writer), writer.add_rope_scaling_attn_factors(0.5)), "attn_factor"),
        (lambda writer: (yarn(writer), factors_of_llama_3(writer)), "one of the two"),
    ],
)
def test_other_rotary_angles_are_refused(more: Any, said: str, seed: int, tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": LLAMA_3["rope_theta"]}
    hf = random_llama(Shape(d_head=8, d_model=48, rope=rope))
    refused(write_llama(hf, tmp_path / "tiny.gguf", more=more), said)


def test_tensors_that_transformers_leaves_out(seed: int, tmp_path: Path) -> None:
    """Its Llama out of a GGUF file has no biases, whatever the file holds."""

    def bias(writer: GGUFWriter) -> None:
        writer.add_tensor("blk.1.attn_q.bias", np.ones(48, dtype=np.float32))

    hf = random_llama(Shape(d_head=8, d_model=48))
    path = write_llama(hf, tmp_path / "tiny.gguf", more=bias)
    refused(path, "transformers takes 30", "blk.1.attn_q.bias")


def test_a_damaged_file(seed: int, tmp_path: Path) -> None:
    path = write_llama(random_llama(Shape(d_head=8, d_model=48)), tmp_path / "tiny.gguf")
    content = path.read_bytes()
    for share in (0.0, 0.001, 0.5, 0.9):
        path.write_bytes(content[: int(share * len(content))])
        refused(path, "transformers cannot read", str(path))
    path.write_bytes(b"GGUF" + bytes(100))
    refused(path, "transformers cannot read", str(path))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    refused(tmp_path / "no.gguf", "no.gguf", "not a folder")


CHAT = (
    "{% for message in messages %}[{{ message.role }}] {{ message.content }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def test_the_chat_template_in_the_file_is_the_models(seed: int, tmp_path: Path) -> None:
    hf = random_llama(Shape(d_head=8, d_model=48))
    path = write_llama(hf, tmp_path / "tiny.gguf", chat_template=CHAT)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    turn = [{"role": "user", "content": "the capital of the country"}]
    ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)
    inputs = load(path).prepare("the capital of the country")
    assert inputs.tokens[0].tolist() == ids["input_ids"]
    assert len(ids["input_ids"]) > len(tokenizer("the capital of the country")["input_ids"])


def test_tensors_that_are_missing_are_not_made_up(seed: int, tmp_path: Path) -> None:
    path = write_llama(random_llama(Shape(d_head=8, d_model=48)), tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes().replace(b"blk.1.attn_q", b"blk.1.attn_x"))
    refused(path, str(path), "lacks", "model.layers.1.self_attn.q_proj.weight")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"block_count": 10**9}, "block_count is 1,000,000,000"),
        ({"architecture": "qwen2", "block_count": 10**9}, "block_count is 1,000,000,000"),
        ({"embedding_length": 2**19}, "describes a model of"),
        ({"list": 2**60}, "ends before"),
        ({"tensors": 2**62}, "ends before"),
        ({"fields": 2**62}, "cannot read it"),
        ({"entries": 100}, "its lists have more than 100 entries"),
        ({"place": 0}, "its tensors have"),
    ],
    ids=str,
)
def test_counts_are_compared_with_the_file_first(
    fields: dict[str, Any], said: str, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tiny.gguf"
    if "entries" in fields:
        monkeypatch.setattr(gguf_files, "MOST_ENTRIES", fields["entries"])
    writer = GGUFWriter(str(path), fields.get("architecture", "llama"))
    writer.add_block_count(fields.get("block_count", 1))
    writer.add_embedding_length(fields.get("embedding_length", 8))
    for add in (writer.add_feed_forward_length, writer.add_head_count, writer.add_context_length):
        add(8)
    writer.add_array("general.list", [7] * 99)
    for name in ("token_embd.weight", "output.weight", "more.weight"):
        writer.add_tensor(name, np.full((99, 8), 0.5, dtype=np.float32))
    finished(writer, path)
    content = bytearray(path.read_bytes())
    if "list" in fields:
        at = content.index(np.full(99, 7, np.int32).tobytes()) - 8
        content[at - 4 : at + 8] = struct.pack("<IQ", 0, fields["list"])  # of bytes
    if "tensors" in fields:
        content[8:16] = struct.pack("<Q", fields["tensors"])
    if "fields" in fields:
        content[16:24] = struct.pack("<Q", fields["fields"])
    if "place" in fields:
        for index, name in enumerate((b"token_embd.weight", b"output.weight", b"more.weight")):
            at = content.index(name) + len(name) + 4 + 2 * 8 + 4
            assert struct.unpack("<Q", content[at : at + 8]) == (index * 99 * 8 * 4,)
            content[at : at + 8] = bytes(8)
        del content[-2 * 99 * 8 * 4 :]
    path.write_bytes(content)
    with time_limit():
        refused(path, str(path), said)


def test_a_text_and_a_folder_of_one_file(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_text("not of this kind at all, " * 100)
    refused(path, f"{path}: transformers cannot read it", "magic")
    refused(tmp_path, f"{tmp_path} has no config.json", f"{path} is a checkpoint by itself")
