"""`save_pretrained`: other programs open what we saved, and find the edited weights in it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llava_code_checkpoints as published
import pytest
import torch
from checkpoint_folders import LAYOUTS, edit_weights, first_layout, load, same, stored, to_pickles
from random_models import (
    DECODERS,
    SHAPES,
    hooked,
    random_language_model,
    random_llama,
    random_llava,
    random_prompts,
)
from rounding import TOLERANCE, assert_same, rounded_otherwise
from small_models import small_model
from tiny_checkpoint import write_tiny_llava
from transformers import AutoModelForCausalLM, GenerationConfig, LlavaForConditionalGeneration

from mmlens.checkpoints import saving
from mmlens.checkpoints.errors import CheckpointError
from mmlens.model.transformer import HookedMultimodalTransformer


@torch.no_grad()
def edit(model: HookedMultimodalTransformer) -> None:
    """Through views in TransformerLens's shapes: rows, heads and vocabulary entries."""
    block: Any = model.blocks[1]
    block.attn.W_Q[-1].add_(0.3 * torch.randn_like(block.attn.W_Q[-1]))  # its own size
    block.attn.b_O.add_(1.0) if model.cfg.o_bias else None
    block.mlp.W_out[2:5].mul_(-2.0)
    model.W_E[5:30].add_(torch.randn_like(model.W_E[5:30]))
    if model.vision is not None:
        tower: Any = model.vision.blocks[0]
        tower.attn.W_V[0].mul_(3.0)


def check_edited(reference: Any, model: HookedMultimodalTransformer, folder: Path) -> None:
    """transformers opens the edited model, and finds it different from what it was."""
    prompts = random_prompts(reference.config, images=[1, 2] if model.vision else [0, 0])
    before = reference(**prompts.for_hf()).logits
    edit(model)
    model.save_pretrained(folder)
    reread = type(reference).from_pretrained(folder)
    theirs = reread(**prompts.for_hf()).logits
    ours = model(prompts.for_mmlens(model))
    assert_same(
        ours[prompts.real],
        theirs[prompts.real],
        lambda: rounded_otherwise(reread)(**prompts.for_hf()).logits[prompts.real],
    )
    assert float((before - theirs)[prompts.real].abs().max()) > 100 * TOLERANCE


LLAVAS = ["grouped queries", "tied", "mistral", "qwen2, some windows", "phi on siglip"]


@pytest.mark.parametrize("name", LLAVAS)
@torch.no_grad()
def test_transformers_opens_an_edited_llava(name: str, seed: int, tmp_path: Path) -> None:
    hf = random_llava(SHAPES[name])
    model = hooked(hf, tmp_path / "source")
    check_edited(hf, model, tmp_path / "edited")


@pytest.mark.parametrize("name", ["tied", *DECODERS])
@torch.no_grad()
def test_transformers_opens_an_edited_language_model(name: str, seed: int, tmp_path: Path) -> None:
    hf = random_language_model(SHAPES[name])
    model = hooked(hf, tmp_path / "source")
    check_edited(hf, model, tmp_path / "edited")


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_every_layout_keeps_its_names(
    layout: Callable[[str], str], seed: int, tmp_path: Path
) -> None:
    hf = random_llava()
    hf.save_pretrained(tmp_path / "source")
    edit_weights(tmp_path / "source", lambda tensors: {layout(n): t for n, t in tensors.items()})
    check_edited(hf, load(tmp_path / "source"), tmp_path / "edited")
    assert stored(tmp_path / "source").keys() == stored(tmp_path / "edited").keys()


@pytest.mark.parametrize("kind", ["safetensors", "pickles"])
@pytest.mark.parametrize("name", ["grouped queries", "tied"])
@torch.no_grad()
def test_shards(name: str, kind: str, seed: int, tmp_path: Path) -> None:
    hf = random_llava(SHAPES[name])
    hf.save_pretrained(tmp_path / "source", max_shard_size="30KB")
    shards = sorted(file.name for file in (tmp_path / "source").glob("*.safetensors"))
    index = (tmp_path / "source" / "model.safetensors.index.json").read_text()
    if kind == "pickles":
        to_pickles(tmp_path / "source")
    check_edited(hf, load(tmp_path / "source"), tmp_path / "edited")
    assert len(shards) > 1
    assert sorted(file.name for file in (tmp_path / "edited").glob("*.safetensors")) == shards
    assert not list((tmp_path / "edited").glob("*.bin*"))
    again = json.loads((tmp_path / "edited" / "model.safetensors.index.json").read_text())
    assert again["weight_map"] == json.loads(index)["weight_map"]
    assert again["metadata"]["total_size"] == json.loads(index)["metadata"]["total_size"]


@torch.no_grad()
def test_one_pickle(seed: int, tmp_path: Path) -> None:
    hf = random_llava()
    hf.save_pretrained(tmp_path / "source")
    to_pickles(tmp_path / "source")
    check_edited(hf, load(tmp_path / "source"), tmp_path / "edited")
    assert {file.name for file in (tmp_path / "edited").iterdir()} >= {"model.safetensors"}
    assert not (tmp_path / "edited" / "model.safetensors.index.json").exists()


def test_without_an_edit_nothing_changes(seed: int, tmp_path: Path) -> None:
    """Tensors that the model leaves out, and files that it never looks at, included."""
    source = write_tiny_llava(tmp_path / "source", seed)
    (source / "README.md").write_text("# tiny")
    (source / ".cache").mkdir()
    (source / "training_args.bin").write_bytes(b"something else")
    old = {"language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(5)}
    edit_weights(source, lambda tensors: {first_layout(n): t for n, t in tensors.items()} | old)
    model = load(source)
    copy = model.save_pretrained(str(tmp_path / "copies" / "first"))
    assert copy == tmp_path / "copies" / "first"
    left_out = {".cache", "training_args.bin"}
    names = {file.name for file in source.iterdir()} - left_out
    assert {file.name for file in copy.iterdir()} == names
    assert list((tmp_path / "copies").iterdir()) == [copy]  # nothing temporary is left
    for name in names - {"model.safetensors", "config.json"}:
        assert (copy / name).read_bytes() == (source / name).read_bytes(), name
    there, here = stored(source), stored(copy)
    assert there.keys() == here.keys()
    assert all(torch.equal(there[name], here[name]) for name in there)
    configs = (json.loads((folder / "config.json").read_text()) for folder in (source, copy))
    assert next(configs) == next(configs)
    again = load(copy).state_dict()
    assert all(torch.equal(t, again[name]) for name, t in model.state_dict().items())


@torch.no_grad()
def test_a_copy_of_tied_embeddings_is_edited_with_them(seed: int, tmp_path: Path) -> None:
    hf = random_llama(tied=True)
    hf.save_pretrained(tmp_path / "source")
    copy = {"lm_head.weight": hf.lm_head.weight.detach().clone()}
    edit_weights(tmp_path / "source", lambda tensors: tensors | copy)
    check_edited(hf, load(tmp_path / "source"), tmp_path / "edited")
    saved = stored(tmp_path / "edited")
    assert torch.equal(saved["lm_head.weight"], saved["model.embed_tokens.weight"])


@pytest.mark.parametrize("name", ["grouped queries", "siglip"])
def test_another_dtype(name: str, seed: int, tmp_path: Path) -> None:
    hooked(random_llava(SHAPES[name]), tmp_path / "source")
    model = load(tmp_path / "source", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    reread = LlavaForConditionalGeneration.from_pretrained(tmp_path / "half")
    assert reread.dtype == torch.bfloat16
    again = load(tmp_path / "half")
    assert again.cfg.dtype == torch.bfloat16
    mine = model.state_dict()
    assert all(torch.equal(tensor, mine[name]) for name, tensor in again.state_dict().items())


def test_an_edited_model_can_be_saved_again(seed: int, tmp_path: Path) -> None:
    hf = random_llama()
    model = hooked(hf, tmp_path / "source")
    edit(model)
    second = load(model.save_pretrained(tmp_path / "first")).save_pretrained(tmp_path / "second")
    first = AutoModelForCausalLM.from_pretrained(tmp_path / "first").state_dict()
    again = AutoModelForCausalLM.from_pretrained(second).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)


# Formats of LLaVA's code: transformers does not open them, so what we read again is compared

CODE = {
    "LLaVA": (published.llava, {"decoder": "llama", "tower": "clip"}),
    "Bunny": (published.bunny, {"decoder": "phi", "tower": "siglip"}),
    "TinyLLaVA": (published.tinyllava, {"decoder": "phi", "tower": "siglip"}),
    "LLaVA-Phi": (published.llava_phi, {"decoder": "phi", "tower": "clip"}),
    "LLaVA-Phi, first layout": (published.llava_phi_msft, {"decoder": "phi", "tower": "clip"}),
}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", CODE)
def test_formats_of_llavas_code(name: str, shards: int, seed: int, tmp_path: Path) -> None:
    writer, choices = CODE[name]
    source = published.write(tmp_path / "source", writer(published.parts(**choices)), shards=shards)
    model = load(source)
    before, there = load(source), stored(source)
    unedited = stored(model.save_pretrained(tmp_path / "unedited"))
    assert unedited.keys() == there.keys()
    assert all(torch.equal(unedited[name], there[name]) for name in there)
    edit(model)
    again = load(model.save_pretrained(tmp_path / "edited"))
    assert same(again, model) and not same(again, before)
    files = (sorted(f.name for f in folder.iterdir()) for folder in (source, tmp_path / "edited"))
    assert next(files) == next(files)


def test_a_tower_from_elsewhere_comes_along(seed: int, tmp_path: Path) -> None:
    made = published.parts(decoder="llama", tower="clip")
    published.write_tower(tmp_path / "source" / "clip", made)
    config, tensors = published.llava(made)
    bare = {name: tensor for name, tensor in tensors.items() if "vision_tower" not in name}
    config["mm_vision_tower"] = "clip"
    source = published.write(tmp_path / "source", (config, bare))
    model = load(source)
    edit(model)
    target = model.save_pretrained(tmp_path / "edited")
    assert same(load(target), model)  # though the tower's own folder is as it was
    added = stored(target).keys() - stored(source).keys()
    prefix = "model.vision_tower.vision_tower.vision_model."
    assert added and all(name.startswith(prefix) for name in added)


# What goes wrong


def test_an_exception_leaves_nothing(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf = random_llama()
    hf.save_pretrained(tmp_path / "source", max_shard_size="20KB")
    model = load(tmp_path / "source")
    written: list[Path] = []
    save_file = saving.save_file

    def fail_at_the_second(tensors: Any, path: Path, **options: Any) -> None:
        if written:
            raise OSError("No space left on device")
        save_file(tensors, path, **options)
        written.append(path)

    monkeypatch.setattr(saving, "save_file", fail_at_the_second)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(tmp_path / "edited")
    assert written and not written[0].exists()
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


def test_nothing_is_written_over(seed: int, tmp_path: Path) -> None:
    model = hooked(random_llama(), tmp_path / "source")
    before = {file.name: file.read_bytes() for file in (tmp_path / "source").iterdir()}
    (tmp_path / "file").write_text("mine")
    for target in ("source", "file"):
        with pytest.raises(FileExistsError, match=f"{target} is there already.*another folder"):
            model.save_pretrained(tmp_path / target)
    assert {file.name: file.read_bytes() for file in (tmp_path / "source").iterdir()} == before
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert (model.save_pretrained(tmp_path / "empty") / "config.json").exists()


def test_a_model_that_came_from_no_folder(seed: int, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"built from a config.*save_model\(model, path\)"):
        small_model(seed).save_pretrained(tmp_path / "edited")
    assert not list(tmp_path.iterdir())


def test_a_source_that_is_gone_or_another_one(seed: int, tmp_path: Path) -> None:
    source = tmp_path / "source"
    model = hooked(random_llama(), source)
    shutil.rmtree(source)
    with pytest.raises(CheckpointError, match=r"source.* is gone"):
        model.save_pretrained(tmp_path / "edited")
    random_llama(d_model=36).save_pretrained(source)
    with pytest.raises(CheckpointError, match="no longer the checkpoint"):
        model.save_pretrained(tmp_path / "edited")
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("there", [True, False], ids=["its file", "none"])
def test_changed_settings_of_generation_are_written(there: bool, seed: int, tmp_path: Path) -> None:
    source = write_tiny_llava(tmp_path / "source", seed)
    file = source / "generation_config.json"
    file.unlink(missing_ok=True)
    if there:
        file.write_text(json.dumps({"do_sample": True, "top_k": 7, "eos_token_id": [2, 3]}))
    model = load(source)
    model.generation_config.temperature = 0.25
    model.generation_config.top_k = None
    model.generation_config.bad_words_ids = [[5, 6]]
    copy = model.save_pretrained(tmp_path / "copy")
    again = load(copy)
    assert again.generation_config == model.generation_config
    assert again.cfg.eos_token_ids == model.cfg.eos_token_ids
    theirs = GenerationConfig.from_pretrained(copy)
    assert theirs.eos_token_id == list(model.cfg.eos_token_ids)
    assert (theirs.temperature, theirs.top_k, theirs.bad_words_ids) == (0.25, None, [[5, 6]])
    assert theirs.do_sample == (True if there else None)
    again.generation_config.eos_token_id = 4
    once_more = load(again.save_pretrained(tmp_path / "third"))
    assert once_more.cfg.eos_token_ids == (4,)
