"""Checkpoint folders with something changed: in a JSON, in a header, or in any byte.

A folder is a dictionary of names to bytes while it is changed. `check` says whether mmlens did what
is right with it: the numbers that transformers gives, or one CheckpointError.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from limits import time_limit
from transformers import AutoModelForCausalLM, AutoTokenizer, LlavaForConditionalGeneration

from mmlens.checkpoints.errors import CheckpointError
from mmlens.model.transformer import HookedMultimodalTransformer

Files = dict[str, bytes]
Draw = Callable[[st.SearchStrategy[Any]], Any]

VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 10**9, 2**31, 2**63, 10**30, 0.0, 0.5, -1.5, 1e9,
    math.inf, math.nan, "", "a", "float16", "nonsense", "gelu", "relu", "llama", "mistral",
    "linear", "yarn", "dynamic", "sliding_attention", "../../a", "/etc/passwd",
    "model.safetensors", [], [0],
    [None], [[]], ["a", 1], {}, {"a": 1}, {"rope_type": "linear", "factor": 2.0}, "x" * 1000,
]  # fmt: skip
DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL", "F8_E4M3", "C64"]


def read(folder: Path) -> Files:
    """A folder's files."""
    return {each.name: each.read_bytes() for each in folder.iterdir() if each.is_file()}


def write(files: Files, folder: Path) -> Path:
    """The files in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where the parts of a JSON value are, as keys and indices."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    for key, part in list(inner)[:400]:
        yield (*at, key)
        if isinstance(part, dict | list):
            yield from places(part, (*at, key))


def changed_json(draw: Draw, content: bytes) -> bytes:
    """A JSON file with one part replaced, removed, renamed, or taken from elsewhere in it."""
    value = json.loads(content)
    found = list(places(value))
    *way, last = found[draw(st.integers(0, len(found) - 1))]
    inner = value
    for key in way:
        inner = inner[key]
    kind = draw(st.sampled_from(["value", "value", "remove", "other", "rename"]))
    if kind == "remove":
        del inner[last]
    elif kind == "rename" and isinstance(inner, dict):
        inner[f"{last}_"] = inner.pop(last)
    elif kind == "other":
        *there, end = found[draw(st.integers(0, len(found) - 1))]
        other = value
        for key in there:
            other = other[key]
        inner[last] = json.loads(json.dumps(other[end]))
    else:
        inner[last] = draw(st.sampled_from(VALUES))
    return json.dumps(value).encode()


def changed_bytes(draw: Draw, content: bytes) -> bytes:
    """A file with bytes changed near its beginning or anywhere, or cut off."""
    if not content:
        return b"{}"
    most = draw(st.sampled_from([8, 200, len(content)]))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, min(most, len(content)) - 1))
        content = content[:at] + bytes([draw(st.integers(0, 255))]) + content[at + 1 :]
    return content[: draw(st.integers(0, len(content)))] if draw(st.booleans()) else content


def changed_header(draw: Draw, content: bytes) -> bytes:
    """A safetensors file whose header says another name, shape, dtype or place of a tensor."""
    size = int.from_bytes(content[:8], "little")
    header, tensors = json.loads(content[8 : 8 + size]), content[8 + size :]
    name = draw(st.sampled_from(sorted(set(header) - {"__metadata__"})))
    kind = draw(st.sampled_from(["name", "shape", "dtype", "data_offsets", "swap", "any"]))
    entry = header[name]
    if kind == "name":
        header[f"{name}{draw(st.sampled_from(['_', '.weight', '1']))}"] = header.pop(name)
    elif kind == "dtype":
        entry["dtype"] = draw(st.sampled_from(DTYPES))
    elif kind == "swap":
        other = draw(st.sampled_from(sorted(set(header) - {"__metadata__"})))
        header[name], header[other] = header[other], header[name]
    elif kind == "any":
        entry[draw(st.sampled_from(sorted(entry)))] = draw(st.sampled_from(VALUES))
    else:
        at = draw(st.integers(0, len(entry[kind]) - 1))
        entry[kind][at] += draw(st.sampled_from([-1, 1, 4, -4, 10**9, 2**62]))
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + tensors


def changed(draw: Draw, files: Files) -> Files:
    """A folder with one to three changes."""
    files = dict(files)
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        name = draw(st.sampled_from(sorted(files)))
        change = changed_bytes
        if draw(st.sampled_from([True, True, True, False])):
            change = changed_header if name.endswith(".safetensors") else changed_json
        try:
            files[name] = change(draw, files[name])
        except (ValueError, KeyError, IndexError, TypeError):  # changed before: no JSON any more
            files[name] = changed_bytes(draw, files[name])
    return files


def logits(model: Any, tokens: torch.Tensor, pixels: torch.Tensor | None, ours: bool) -> Any:
    """Of a prompt, by either program."""
    with torch.no_grad():
        if ours:
            model.cfg.n_ctx = max(model.cfg.n_ctx, tokens.shape[1])  # longer runs are refused
            return model(model.inputs_from_tokens(tokens, pixels))
        given = {} if pixels is None else {"pixel_values": pixels}
        return model(input_ids=tokens, **given).logits


def theirs(folder: Path, tokens: torch.Tensor, pixels: torch.Tensor | None) -> Any:
    """transformers' logits; None where it refuses the folder, whatever it raises."""
    kind = AutoModelForCausalLM if pixels is None else LlavaForConditionalGeneration
    try:
        model, info = kind.from_pretrained(
            folder, output_loading_info=True, trust_remote_code=False, dtype=torch.float32
        )
        if info["missing_keys"] or info["mismatched_keys"]:
            return None
        return logits(model.float().eval(), tokens, pixels, ours=False)
    except Exception:
        return None


def check(folder: Path, tokens: torch.Tensor, pixels: torch.Tensor | None, before: Any) -> str:
    """What became of a folder.

    Args:
        tokens: a prompt, and `pixels` its image.
        before: the logits of the unchanged folder.
    """
    with time_limit(120):
        try:
            model = HookedMultimodalTransformer.from_pretrained(
                folder, device="cpu", dtype=torch.float32
            )
        except CheckpointError as error:
            assert str(folder) in str(error), f"no path: {error}"
            first = str(error).splitlines()[0]
            assert str(error) == first or "does not fit its configuration" in first, str(error)
            return "refused"
        expected = theirs(folder, tokens, pixels)
        try:
            ours = logits(model, tokens, pixels, ours=True)
        except ValueError as error:  # the prompt's image tokens are none of this model's, say
            assert expected is None, error
            return "the prompt is refused"
        if expected is None:  # it wants more of what neither program needs
            expected = before
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4, equal_nan=True)
        if model.tokenizer is not None:
            text = "the capital of this country is Paris"
            same = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            assert model.tokenizer(text)["input_ids"] == same(text)["input_ids"]
    return "equal"
