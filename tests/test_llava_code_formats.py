"""The formats that transformers does not know equal what transformers' parts compute together.

Tolerances are in `rounding.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import llava_code_checkpoints as published
import open_clip
import pytest
import torch
from checkpoint_folders import load, refused, same
from llava_code_checkpoints import Checkpoint, Parts, parts, some_images, write, write_tower
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from rounding import assert_same
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, PhiConfig

from mmlens.checkpoints.decoders import decoder_fields
from mmlens.checkpoints.errors import CheckpointError
from mmlens.checkpoints.formats.llava_phi_msft import phi_config
from mmlens.checkpoints.load import format_of
from mmlens.inputs.images import as_image_processor

Writer = Callable[[Parts], Checkpoint]
CASES: dict[str, tuple[Writer, str, dict]] = {
    "LLaVA": (published.llava, "original LLaVA", {"decoder": "llama", "tower": "clip"}),
    "LLaVA, linear": (
        published.llava, "original LLaVA", {"decoder": "llama", "tower": "clip", "depth": 1},
    ),
    "LLaVA, three layers, class token": (
        published.llava,
        "original LLaVA",
        {"decoder": "llama", "tower": "clip", "depth": 3, "layer": -3, "drops_first": False},
    ),
    "LLaVA on SigLIP": (
        published.llava, "original LLaVA", {"decoder": "llama", "tower": "siglip"},
    ),
    "Bunny": (published.bunny, "Bunny", {"decoder": "phi", "tower": "siglip"}),
    "TinyLLaVA": (
        published.tinyllava,
        "TinyLLaVA",
        {"decoder": "phi", "tower": "siglip", "drops_first": True},
    ),
    "TinyLLaVA, every patch": (
        published.tinyllava, "TinyLLaVA", {"decoder": "phi", "tower": "siglip", "depth": 1},
    ),
    "TinyLLaVA, Llama on CLIP": (
        published.tinyllava, "TinyLLaVA", {"decoder": "llama", "tower": "clip"},
    ),
    "LLaVA-Phi": (published.llava_phi, "LLaVA-Phi", {"decoder": "phi", "tower": "clip"}),
    "LLaVA-Phi, LLaVA's fields": (
        published.llava_phi_flat, "LLaVA-Phi", {"decoder": "phi", "tower": "clip"},
    ),
    "LLaVA-Phi, first layout": (
        published.llava_phi_msft, "LLaVA-Phi, first layout", {"decoder": "phi", "tower": "clip"},
    ),
}  # fmt: skip


def made(case: str) -> tuple[Parts, Checkpoint]:
    writer, _, choices = CASES[case]
    these = parts(**choices)
    return these, writer(these)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, seed: int) -> str:
    return request.param


# What they compute


@torch.no_grad()
def test_logits_and_every_block_equal_the_parts(case: str, tmp_path: Path) -> None:
    these, checkpoint = made(case)
    model = load(write(tmp_path, checkpoint))
    prompts = these.prompts(some_images())
    logits, cache = model.run_with_cache(published.inputs(model, prompts))
    real = prompts.real

    def reference(these: Parts) -> dict[str, Tensor]:
        out = these.decoder(
            **these.embeddings(prompts),
            position_ids=prompts.position_ids,
            output_hidden_states=True,
        )
        streams = {f"resid_{i}": resid[real] for i, resid in enumerate(out.hidden_states)}
        visual = these.visual_tokens(prompts.pixel_values)
        return {"logits": out.logits[real], "visual": visual.flatten(0, 1)[None], **streams}

    n_layers = model.cfg.n_layers
    ours = {"logits": logits[real], "visual": cache["projector.hook_out"]}
    ours |= {f"resid_{i}": cache["resid_pre", i][real] for i in range(n_layers)}
    # Transformers' last hidden state is after the last norm.
    ours[f"resid_{n_layers}"] = model.ln_final(cache["resid_post", n_layers - 1])[real]
    assert_same(ours, reference(these), lambda: reference(these.rounded_otherwise()))


def test_every_hook_is_alive(case: str, tmp_path: Path) -> None:
    these, checkpoint = made(case)
    model = load(write(tmp_path, checkpoint))
    inputs = published.inputs(model, these.prompts([1, 1], text_last=True))
    assert model.verify_hooks(inputs) == []


@torch.no_grad()
@pytest.mark.parametrize("name", ["LLaVA", "Bunny", "TinyLLaVA", "LLaVA-Phi, first layout"])
def test_greedy_generation_equals_the_decoders(name: str, seed: int, tmp_path: Path) -> None:
    """In float64, where rounding decides no tie."""
    these, checkpoint = made(name)
    model = load(write(tmp_path, checkpoint), dtype=torch.float64)
    prompts = these.double().prompts([2, 1])
    expected = these.decoder.generate(
        **these.embeddings(prompts), max_new_tokens=32, do_sample=False, eos_token_id=-1
    )
    inputs = published.inputs(model, prompts)
    for cached in (True, False):
        tokens = model.generate(
            inputs, 32, return_type="tokens", stop_at_eos=False, use_past_kv_cache=cached
        )
        assert torch.equal(tokens[:, inputs.n_pos :], expected)


def test_each_format_recognises_its_own(tmp_path: Path) -> None:
    for name in CASES:
        write(tmp_path / name, made(name)[1])
        assert format_of(tmp_path / name).name == CASES[name][1]


def test_any_number_of_rotated_dimensions(tmp_path: Path) -> None:
    config, _ = made("LLaVA-Phi, first layout")[1]
    for d_head, rotary_dim in [(80, 32), (44, 30), (47, 6), (10, 10)]:
        sizes = {"n_head": 2, "n_embd": 2 * d_head, "n_head_kv": 1, "rotary_dim": rotary_dim}
        phi = PhiConfig(**phi_config(config | sizes))
        assert decoder_fields(phi)["d_head"] == d_head
        assert int(d_head * phi.rope_parameters["partial_rotary_factor"]) == rotary_dim


# Files


@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", ["LLaVA", "Bunny", "TinyLLaVA"])
def test_every_kind_of_file(
    name: str, shards: int, pickled: bool, seed: int, tmp_path: Path
) -> None:
    _, checkpoint = made(name)
    expected = load(write(tmp_path / "one", checkpoint))
    folder = write(tmp_path / "other", checkpoint, shards=shards, pickled=pickled)
    assert same(load(folder), expected)
    if shards > 1:
        file = sorted(folder.glob("*-00002-of-*"))[0]
        file.unlink()
        with pytest.raises(CheckpointError, match=f"1 of 3 shards.*{file.name}"):
            load(folder)


def test_written_in_its_own_format_again(case: str, tmp_path: Path) -> None:
    _, (config, tensors) = made(case)
    model = load(write(tmp_path / "one", (config, tensors)))
    model.save_pretrained(tmp_path / "two")
    again = load_file(tmp_path / "two" / "model.safetensors")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)
    assert same(load(tmp_path / "two"), model)


# Towers that lie elsewhere


def without_tower(checkpoint: Checkpoint, **fields: object) -> Checkpoint:
    config, tensors = checkpoint
    kept = {name: tensor for name, tensor in tensors.items() if "vision_tower" not in name}
    return config | fields, kept


def whole_clip(these: Parts) -> CLIPModel:
    """A CLIP with both halves, whose image half is the tower."""
    text = {"hidden_size": 12, "intermediate_size": 14, "num_hidden_layers": 1,
            "num_attention_heads": 2, "vocab_size": 20, "projection_dim": 13}  # fmt: skip
    vision = these.tower.config.to_dict() | {"projection_dim": 13}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=13))
    theirs = {name.removeprefix("vision_model."): t for name, t in these.tower.state_dict().items()}
    own = clip.vision_model.state_dict()
    clip.vision_model.load_state_dict(
        {name: theirs[name.removeprefix("vision_model.")] for name in own}
    )
    return clip


@pytest.mark.parametrize("name", ["LLaVA", "Bunny", "LLaVA-Phi, LLaVA's fields",
                                  "LLaVA-Phi, first layout"])  # fmt: skip
def test_the_towers_own_checkpoint(name: str, seed: int, tmp_path: Path) -> None:
    these, checkpoint = made(name)
    expected = load(write(tmp_path / "whole", checkpoint))
    tower = write_tower(tmp_path / "models" / "tower", these)
    write_tower(tmp_path / "bare" / "models" / "tower", these)
    bare = write(tmp_path / "bare", without_tower(checkpoint, mm_vision_tower="models/tower"))
    assert same(load(bare), expected)
    lost = write(tmp_path / "lost", without_tower(checkpoint, mm_vision_tower="/nowhere/tower"))
    assert same(load(lost, vision_tower=tower), expected)


def test_a_tower_out_of_the_checkpoints_folder(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever wrote config.json cannot know what lies there; the caller can."""
    these, checkpoint = made("LLaVA")
    expected = load(write(tmp_path / "whole", checkpoint))
    tower = write_tower(tmp_path / "models" / "tower", these)
    monkeypatch.setenv("HOME", str(tmp_path / "models"))
    for index, name in enumerate(
        ["../models/tower", str(tower), "~/tower", "a/../../models/tower"]
    ):
        bare = write(tmp_path / str(index), without_tower(checkpoint, mm_vision_tower=name))
        refused(bare, f"vision_tower={name!r}", "out of its folder")
        assert same(load(bare, vision_tower=tower), expected)
    linked = write(tmp_path / "linked", without_tower(checkpoint, mm_vision_tower="link"))
    (linked / "link").symlink_to(tower)
    refused(linked, "link out of the checkpoint's folder", f"vision_tower={str(tower)!r}")
    monkeypatch.chdir(tmp_path)  # where "models/tower" is a folder
    here = write(tmp_path / "here", without_tower(checkpoint, mm_vision_tower="models/tower"))
    refused(here, "models/tower", "vision_tower=...")


@pytest.mark.parametrize("name", ["file", "link", "folder's file"])
def test_weights_of_open_clip_out_of_the_checkpoints_folder(
    name: str, seed: int, tmp_path: Path
) -> None:
    """What the caller says as `model:file` names published weights where a checkpoint says it."""
    _, checkpoint = made("LLaVA")
    (tmp_path / "weights.pt").write_bytes(b"somebody's")
    paths = {"file": tmp_path / "weights.pt", "link": "weights.pt", "folder's file": "./weights.pt"}
    tower = f"ViT-B-32:{paths[name]}"
    folder = write(tmp_path / "model", without_tower(checkpoint, mm_vision_tower=tower))
    (folder / "weights.pt").symlink_to(tmp_path / "weights.pt")
    refused(folder, "one of open_clip's tags")


def test_a_tower_in_the_hubs_cache(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    these, checkpoint = made("LLaVA")
    expected = load(write(tmp_path / "whole", checkpoint))
    place = tmp_path / "hub" / "models--nobody--tower"
    write_tower(place / "snapshots" / "0123abc", these)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0123abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    named = {"mm_vision_tower": "nobody/tower"}
    assert same(load(write(tmp_path / "bare", without_tower(checkpoint, **named))), expected)
    config, tensors = checkpoint
    weights = place / "snapshots" / "0123abc" / "model.safetensors"
    weights.unlink()  # a config alone is enough where the weights are in the checkpoint
    assert same(load(write(tmp_path / "held", (config | named, tensors))), expected)
    refused(tmp_path / "bare", "nobody/tower", "vision_tower=")


@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "bin"])
def test_a_whole_clip_as_tower(pickled: bool, seed: int, tmp_path: Path) -> None:
    these, checkpoint = made("LLaVA")
    expected = load(write(tmp_path / "whole", checkpoint))
    clip = whole_clip(these)
    clip.save_pretrained(tmp_path / "clip")
    if pickled:
        (tmp_path / "clip" / "model.safetensors").unlink()
        torch.save(dict(clip.state_dict()), tmp_path / "clip" / "pytorch_model.bin")
    bare = write(tmp_path / "bare", without_tower(checkpoint))
    assert same(load(bare, vision_tower=tmp_path / "clip"), expected)


def open_clip_tensors(these: Parts) -> dict[str, Tensor]:
    """The tower's weights under open_clip's names, in its shapes."""
    theirs = {name.removeprefix("vision_model."): t for name, t in these.tower.state_dict().items()}
    tensors = {
        "class_embedding": theirs["embeddings.class_embedding"],
        "conv1.weight": theirs["embeddings.patch_embedding.weight"],
        "positional_embedding": theirs["embeddings.position_embedding.weight"],
    }
    renamed = {"self_attn.out_proj": "attn.out_proj", "layer_norm1": "ln_1", "layer_norm2": "ln_2",
               "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}  # fmt: skip
    for kind in ("weight", "bias"):
        tensors[f"ln_pre.{kind}"] = theirs[f"pre_layrnorm.{kind}"]
        tensors[f"ln_post.{kind}"] = theirs[f"post_layernorm.{kind}"]
        for layer in range(these.tower.config.num_hidden_layers):
            old, new = f"encoder.layers.{layer}", f"transformer.resblocks.{layer}"
            qkv = [theirs[f"{old}.self_attn.{x}_proj.{kind}"] for x in "qkv"]
            tensors[f"{new}.attn.in_proj_{kind}"] = torch.cat(qkv)
            for there, here in renamed.items():
                tensors[f"{new}.{here}.{kind}"] = theirs[f"{old}.{there}.{kind}"]
    return tensors


@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "bin"])
def test_an_open_clip_folder_as_tower(pickled: bool, seed: int, tmp_path: Path) -> None:
    these, checkpoint = made("LLaVA")
    expected = load(write(tmp_path / "whole", checkpoint))
    vision, text = these.tower.config, {"context_length": 5, "vocab_size": 11, "width": 8,
                                        "heads": 2, "layers": 1}  # fmt: skip
    model_cfg = {
        "embed_dim": 13,
        "quick_gelu": True,
        "vision_cfg": {
            "image_size": vision.image_size,
            "layers": vision.num_hidden_layers,
            "width": vision.hidden_size,
            "head_width": vision.hidden_size // vision.num_attention_heads,
            "mlp_ratio": vision.intermediate_size / vision.hidden_size,
            "patch_size": vision.patch_size,
        },
        "text_cfg": text,
    }
    clip = open_clip.CLIP(**model_cfg)
    clip.visual.load_state_dict(open_clip_tensors(these) | {"proj": clip.visual.proj})
    folder = tmp_path / "bare" / "open_clip"
    folder.mkdir(parents=True)
    preprocess = {"mean": [0.2, 0.3, 0.4], "std": [0.5, 0.6, 0.7], "interpolation": "bilinear"}
    config = {"model_cfg": model_cfg, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    if pickled:
        torch.save(clip.state_dict(), folder / "open_clip_pytorch_model.bin")
    else:
        tensors = {name: tensor.clone() for name, tensor in clip.state_dict().items()}
        save_file(tensors, folder / "open_clip_model.safetensors")
    bare = write(tmp_path / "bare", without_tower(checkpoint, mm_vision_tower="open_clip"))
    for model in (load(bare), load(tmp_path / "whole", vision_tower=folder)):
        assert same(model, expected)
        # open_clip's own transform, of the image in the middle of a square in the mean colour.
        picture = Image.effect_noise((29, 18), 60).convert("RGB")
        square = Image.new("RGB", (29, 29), (51, 76, 102))
        square.paste(picture, (0, 5))
        settings = PreprocessCfg(size=vision.image_size, **preprocess)
        pixels = image_transform_v2(settings, is_train=False)(square)
        assert torch.equal(as_image_processor(model.image_processor)([picture])[0], pixels)


@pytest.mark.parametrize("name", ["LLaVA", "TinyLLaVA", "LLaVA-Phi"])
def test_a_given_tower_replaces_the_checkpoints_own(name: str, seed: int, tmp_path: Path) -> None:
    these, checkpoint = made(name)
    other, _ = made(name)
    folder = write(tmp_path / "model", checkpoint)
    write_tower(tmp_path / "tower", these)
    write_tower(tmp_path / "other", other)
    own = load(folder)
    assert same(load(folder, vision_tower=tmp_path / "tower"), own)
    replaced = load(folder, vision_tower=tmp_path / "other")
    assert torch.equal(replaced.blocks[0].attn.W_Q, own.blocks[0].attn.W_Q)
    weight = other.tower.get_submodule("embeddings").patch_embedding.weight
    assert torch.equal(replaced.vision.patch_embed.weight, weight)


# What goes wrong


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"mm_vision_tower": "nobody/has-this-tower"}, ["nobody/has-this-tower", "vision_tower="]),
        ({"mm_vision_tower": None}, ["names no vision tower"]),
        ({"mm_projector_type": "identity"}, ["identity", "mlp2x_gelu"]),
        ({"mm_projector_type": "mlp3x_gelu"}, ["missing tensor model.mm_projector.4.weight"]),
        ({"mm_projector_type": "linear"}, ["missing tensor model.mm_projector.weight"]),
        ({"mm_vision_select_layer": -9}, ["-9", "4 layers"]),
        ({"mm_vision_select_layer": None}, ["mm_vision_select_layer is None"]),
        ({"mm_vision_select_feature": "cls"}, ["'cls'", "cls_patch"]),
        ({"image_aspect_ratio": "anyres"}, ["anyres", "'pad'"]),
        ({"mm_patch_merge_type": "spatial_unpad"}, ["spatial_unpad", "'flat'"]),
        ({"s2": True}, ["s2 is True"]),
    ],
    ids=str,
)
def test_what_is_not_supported(
    fields: dict[str, object], said: list[str], seed: int, tmp_path: Path
) -> None:
    these, (config, tensors) = made("LLaVA")
    write_tower(tmp_path / "tower", these)
    refused(write(tmp_path, (config | fields, tensors)), *said)


def test_a_tower_without_its_weights(seed: int, tmp_path: Path) -> None:
    """A known tower whose sizes are written down, and whose weights would have to be fetched."""
    name = "openai/clip-vit-large-patch14-336"
    _, checkpoint = made("LLaVA")
    folder = write(tmp_path, without_tower(checkpoint, mm_vision_tower=name, mm_hidden_size=1024))
    refused(folder, name, "vision_tower=", "hub")


def test_a_tower_for_a_model_that_has_its_own(tmp_path: Path) -> None:
    from random_models import random_llava

    random_llava().save_pretrained(tmp_path)
    refused(tmp_path, "vision_tower='x'", "holds its own", vision_tower="x")


@pytest.mark.parametrize("name", ["LLaVA", "Bunny", "TinyLLaVA", "LLaVA-Phi, first layout"])
def test_missing_and_unknown_tensors_are_told(name: str, seed: int, tmp_path: Path) -> None:
    _, (config, tensors) = made(name)
    lost = sorted(t for t in tensors if "layers.0" in t and "vision" in t)[0]
    kept = {key: tensor for key, tensor in tensors.items() if key != lost}
    refused(
        write(tmp_path, (config, kept | {"adapter.lora_A": torch.zeros(2, 3)})),
        f"missing tensor {lost}",
        "unknown tensor adapter.lora_A [2, 3]",
    )


def test_nothing_unknown_hides_behind_the_ignored(seed: int, tmp_path: Path) -> None:
    extra: dict[str, Tensor] = {
        "model.vision_tower.vision_tower.vision_model.encoder.layers.0.self_attn.q_norm.weight":
            torch.ones(7),
        "model.image_newline": torch.ones(30),
    }  # fmt: skip
    _, (config, tensors) = made("LLaVA")
    refused(write(tmp_path, (config, tensors | extra)), *(f"unknown tensor {n}" for n in extra))
