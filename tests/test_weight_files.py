"""Weight files: pickles of every age, what is refused, and what loading costs."""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_folders import WEIGHTS, edit_config, load, refused, same, to_pickles
from random_models import Shape, hooked, random_llama, random_llava, text_config
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from mmlens.checkpoints import loader

OLD = {"_use_new_zipfile_serialization": False}
"""torch.save before torch 1.6: a plain pickle, which cannot be mapped from disk."""


# Pickles


@pytest.mark.parametrize("options", [{}, OLD], ids=["zip", "old"])
@pytest.mark.parametrize("shard", ["1GB", "30KB"])
def test_pickles_hold_the_same(shard: str, options: Any, seed: int, tmp_path: Path) -> None:
    hf = random_llava()
    expected = hooked(hf, tmp_path / "whole")
    hf.save_pretrained(tmp_path / "pickles", max_shard_size=shard)
    to_pickles(tmp_path / "pickles", **options)
    files = sorted((tmp_path / "pickles").glob("*.bin"))
    assert (len(files) > 1) == (shard == "30KB")
    assert not list((tmp_path / "pickles").glob("*.safetensors"))
    assert same(load(tmp_path / "pickles"), expected)
    if len(files) > 1:
        files[0].unlink()
        refused(tmp_path / "pickles", f"1 of {len(files)} shards", files[0].name)


def test_a_state_dict_inside_a_pickle(seed: int, tmp_path: Path) -> None:
    """As some trainers write it."""
    expected = hooked(random_llama(), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    torch.save({"state_dict": tensors}, tmp_path / "pytorch_model.bin")
    (tmp_path / WEIGHTS).unlink()
    assert same(load(tmp_path), expected)


def test_safetensors_are_taken_where_there_are_both(seed: int, tmp_path: Path) -> None:
    expected = hooked(random_llama(), tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"not looked at")
    assert same(load(tmp_path), expected)


class Malicious:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (Path.write_text, (self.target, "executed"))


@pytest.mark.parametrize("form", ["zip", "old", "plain pickle"])
def test_a_malicious_pickle_is_not_executed(form: str, seed: int, tmp_path: Path) -> None:
    folder, mark = tmp_path / "folder", tmp_path / "mark"
    random_llama().save_pretrained(folder)
    content = {**load_file(folder / WEIGHTS), "model.norm.weight": Malicious(mark)}
    (folder / WEIGHTS).unlink()
    stream = io.BytesIO()
    if form == "plain pickle":
        pickle.dump(Malicious(mark), stream)
    else:
        torch.save(content, stream, **(OLD if form == "old" else {}))
    path = folder / "pytorch_model.bin"
    path.write_bytes(stream.getvalue())
    refused(folder, str(path), "safetensors")
    assert not mark.exists()
    pickle.loads(pickle.dumps(Malicious(mark)))  # it would have worked
    assert mark.exists()


@pytest.mark.parametrize("options", [{}, OLD], ids=["zip", "old"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_pickle(share: float, options: Any, seed: int, tmp_path: Path) -> None:
    random_llama().save_pretrained(tmp_path)
    to_pickles(tmp_path, **options)
    path = tmp_path / "pytorch_model.bin"
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    refused(tmp_path, str(path), "truncated")


@pytest.mark.parametrize("content", [[torch.ones(2)], {}, {"epoch": 3}, torch.ones(3)], ids=repr)
def test_a_pickle_of_something_else(content: Any, seed: int, tmp_path: Path) -> None:
    random_llama().save_pretrained(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    torch.save(content, tmp_path / "pytorch_model.bin")
    refused(tmp_path, "pytorch_model.bin", "no dictionary of tensors")


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', "{}"])
def test_a_broken_index(text: str, seed: int, tmp_path: Path) -> None:
    random_llama().save_pretrained(tmp_path, max_shard_size="30KB")
    (tmp_path / f"{WEIGHTS}.index.json").write_text(text)
    said = {"{": "is not JSON", "[]": "is not a JSON object"}
    refused(tmp_path, f"{WEIGHTS}.index.json", said.get(text, "no index of shards"))


# Configurations


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", None])
def test_quantised_weights(method: str | None, seed: int, tmp_path: Path) -> None:
    random_llama().save_pretrained(tmp_path)
    named = {"quant_method": method} if method else {}
    edit_config(tmp_path, quantization_config={"load_in_4bit": True} | named)
    refused(tmp_path, "quantised", method or "unknown", "the checkpoint that it was made from")


def test_a_wrong_config_is_refused_before_anything_is_allocated(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It asks for a model of terabytes; the weights of a small one lie there."""
    random_llama().save_pretrained(tmp_path)
    huge = {"hidden_size": 60_000, "intermediate_size": 500_000, "vocab_size": 1_000_000}
    edit_config(tmp_path, **huge)

    def fail(*_: Any) -> None:
        raise AssertionError("parameters were allocated")

    monkeypatch.setattr(loader, "allocate", fail)
    refused(tmp_path, "the config makes it [1000000, 60000]", "model.embed_tokens.weight is [67, ")


def test_an_adapter_beside_the_weights(seed: int, tmp_path: Path) -> None:
    """transformers would add it, to the weights that it names."""
    random_llama().save_pretrained(tmp_path)
    settings = {"peft_type": "LORA", "base_model_name_or_path": "someone/another"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    refused(tmp_path, "adapter_config.json", "'someone/another'", "merge_and_unload")


# What it costs

PEAK = """
import json, sys
from pathlib import Path
from mmlens import HookedMultimodalTransformer

def bytes_of(field):
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if field in x)
    return 1024 * int(line.split()[1])

HookedMultimodalTransformer.from_pretrained(sys.argv[1], device="cpu")  # what is loaded lazily
Path("/proc/self/clear_refs").write_text("5")  # the peak is what is there now
before = bytes_of("VmRSS")
model = HookedMultimodalTransformer.from_pretrained(sys.argv[2], device="cpu")
print(json.dumps([before, bytes_of("VmHWM"), sum(p.nbytes for p in model.parameters())]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_holds_the_model_once(seed: int, tmp_path: Path) -> None:
    """Never two copies, and of the (mapped) files no more than one shard at a time."""
    random_llama().save_pretrained(tmp_path / "small")
    shape = Shape(n_layers=6, n_heads=8, n_kv_heads=8, d_head=128, d_model=1024, d_mlp=3072)
    big = LlamaForCausalLM(text_config(shape))
    big.save_pretrained(tmp_path / "big", max_shard_size="60MB")
    del big
    shards = [file.stat().st_size for file in (tmp_path / "big").glob("*.safetensors")]
    arguments = [str(tmp_path / "small"), str(tmp_path / "big")]
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *arguments], capture_output=True, text=True, check=True
    )
    before, peak, size = json.loads(done.stdout.splitlines()[-1])
    assert size > 300e6 and max(shards) < 0.2 * size
    assert peak - before < 1.3 * size


class Terminal(io.StringIO):
    """Where a person looks."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_the_progress_bar_is_for_terminals(
    stream: type[io.StringIO], seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_llama().save_pretrained(tmp_path)
    bar = loader.tqdm
    written = stream()
    monkeypatch.setattr(
        loader, "tqdm", lambda *a, **k: bar(*a, **{**k, "delay": 0.0, "file": written})
    )
    load(tmp_path)
    assert (f"loading {tmp_path}" in written.getvalue()) == (stream is Terminal)
