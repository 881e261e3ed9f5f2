"""open_clip towers: every activation, the preprocessing and the names are open_clip's own."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoint_folders
import llava_code_checkpoints as published
import numpy as np
import open_clip
import pytest
import torch
from half_precision import check_half_precision, rms_error
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.pretrained import _PRETRAINED
from open_clip_models import (
    NAMES,
    WEIGHTS,
    enliven,
    load,
    make_known,
    model_cfg,
    random_clip,
    random_pixels,
    reference,
    tensors_of,
    write,
)
from PIL import Image
from rounding import assert_same, rounded_otherwise
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPVisionConfig, SiglipVisionConfig

from mmlens.checkpoints import hf_configs
from mmlens.checkpoints.errors import CheckpointError
from mmlens.checkpoints.loader import check
from mmlens.checkpoints.towers import open_clip_config
from mmlens.checkpoints.towers.open_clip import OpenClipTower, find_open_clip_tower
from mmlens.inputs.visual import Visual
from mmlens.model.vision_tower import HookedVisionTransformer

HALF = ["plain", "as in CLIPA", "timm: as in SigLIP", "timm: as in CLIP"]
DEMO = Path(open_clip_config.__file__).parents[2] / "demo"


def random_image() -> Image.Image:
    sides = (random.randint(9, 60), random.randint(9, 60), 3)
    return Image.fromarray(np.random.randint(0, 256, sides, dtype=np.uint8))


# Numbers


def numbered(streams: list[Tensor]) -> dict[str, Tensor]:
    """By the number of blocks below."""
    return {str(number): stream for number, stream in enumerate(streams)}


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_every_block_is_open_clips(name: str, seed: int, tmp_path: Path) -> None:
    quick = random.random() < 0.5 and name != "as in CLIPA"  # whose activation is said otherwise
    clip = random_clip(name, quick_gelu=quick)
    folder = write(tmp_path / "clip", clip, model_cfg(name, quick_gelu=quick))
    visual: Any = clip.visual
    pixels = random_pixels(visual)
    expected = reference(visual, pixels)
    tower = load(folder)
    out, cache = tower.run_with_cache(pixels)
    n_layers = tower.cfg.n_layers
    assert n_layers == len(expected) - 1
    resid = [cache[f"blocks.{layer}.hook_resid_pre"] for layer in range(n_layers)]
    for streams in ([*resid, out], [*resid, tower(pixels)]):  # all hooks listening, and fused
        assert_same(
            numbered(streams),
            numbered(expected),
            lambda: numbered(reference(rounded_otherwise(visual), pixels)),
        )
    for layer in range(n_layers):
        above = out if layer == n_layers - 1 else resid[layer + 1]
        assert torch.equal(cache[f"blocks.{layer}.hook_resid_post"], above)
    # Several layers, without the class token.
    if tower.cfg.class_token:
        some = load(folder, feature_layer=[0, -2], select="default")
        assert some.cfg.n_layers == len(expected) - 2

        def joined(streams: list[Tensor]) -> Tensor:
            return torch.cat([streams[0], streams[-2]], dim=-1)[:, 1:]

        assert_same(
            some(pixels),
            joined(expected),
            lambda: joined(reference(rounded_otherwise(visual), pixels)),
        )


@torch.no_grad()
def test_open_clips_own_way_in(seed: int, tmp_path: Path) -> None:
    """The same folder, opened by open_clip itself; and what it says of an image."""
    clip = random_clip("not square")
    folder = write(tmp_path / "clip", clip, model_cfg("not square"), interpolation="bilinear")
    theirs, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    tower = load(folder)
    picture = random_image()
    pixels = preprocess(picture)[None]
    assert torch.equal(tower.image_processor(picture)[None], pixels)

    def said(visual: Any) -> Tensor:
        given = visual.forward_intermediates(
            pixels, indices=[-1], output_fmt="NLC", output_extra_tokens=True
        )
        return torch.cat(
            [given["image_intermediates_prefix"][0], given["image_intermediates"][0]], 1
        )

    assert_same(tower(pixels), said(theirs.visual), lambda: said(rounded_otherwise(theirs.visual)))


@torch.no_grad()
def test_a_model_of_timms_own(seed: int, tmp_path: Path) -> None:
    config = model_cfg("plain") | {"custom_text": True}
    config["vision_cfg"] = {"timm_model_name": "test_vit", "timm_pool": "token", "image_size": 160}
    clip = enliven(CustomTextCLIP(**{k: v for k, v in config.items() if k != "custom_text"}))
    visual: Any = clip.visual
    pixels = random_pixels(visual)
    tower = load(write(tmp_path / "clip", clip, config))
    assert_same(
        tower(pixels),
        reference(visual, pixels)[-1],
        lambda: reference(rounded_otherwise(visual), pixels)[-1],
    )


@torch.no_grad()
def test_the_demo_tower(seed: int, tmp_path: Path) -> None:
    shutil.copy(DEMO / "open_clip_config.json", tmp_path)
    shutil.copy(DEMO / "vision.safetensors", tmp_path / WEIGHTS)
    config = json.loads((DEMO / "open_clip_config.json").read_text())["model_cfg"]
    visual: Any = CLIP(**config).eval().visual
    weights = load_file(DEMO / "vision.safetensors")
    visual.load_state_dict({n.removeprefix("visual."): t.float() for n, t in weights.items()})
    pixels = random_pixels(visual)
    torch.testing.assert_close(
        load(tmp_path)(pixels), reference(visual, pixels)[-1], atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@torch.no_grad()
def test_half_precision_is_as_exact_as_open_clip(
    dtype: torch.dtype, seed: int, tmp_path: Path
) -> None:
    """The error against float64 is at most 1.1 x theirs, in the geometric mean over 16 towers.

    Single towers scatter by a few per cent to both sides; see `half_precision.py`.
    """
    ratios = []
    for index, name in enumerate(HALF * 4):
        clip = random_clip(name).to(dtype)
        visual: Any = clip.visual
        folder = write(tmp_path / str(index), clip, model_cfg(name))
        pixels = random_pixels(visual).to(dtype)
        ours, theirs = load(folder, dtype=dtype)(pixels), reference(visual, pixels)[-1]
        assert ours.dtype == dtype
        exact = reference(visual.double(), pixels.double())[-1]
        ratios.append(rms_error(ours, exact) / rms_error(theirs, exact))
    check_half_precision(ratios)


@torch.no_grad()
def test_as_the_tower_of_another_format(seed: int, tmp_path: Path) -> None:
    """A Bunny without a tower, which names a folder of open_clip's; or gets it from the caller."""
    these = published.parts("phi", "siglip")
    config, tensors = published.bunny(these)
    kept = {name: tensor for name, tensor in tensors.items() if "vision_tower" not in name}
    clip = random_clip("timm: as in SigLIP")
    named = published.write(tmp_path / "bunny", (config | {"mm_vision_tower": "siglip"}, kept))
    siglip = write(named / "siglip", clip, model_cfg("timm: as in SigLIP"))
    visual: Any = clip.visual
    pixels = random_pixels(visual)

    def said(visual: Any) -> Tensor:
        # Bunny leaves the last block out.
        return these.projector(reference(visual, pixels)[-2]).flatten(0, 1)[None]

    for given in (None, siglip):
        model: Any = checkpoint_folders.load(named, vision_tower=given)
        images = Visual({"pixel_values": pixels}, {"pixel_values": (1,) * len(pixels)})
        found = model.projector(model.vision.of_images(images), images)
        assert_same(found, said(visual), lambda: said(rounded_otherwise(visual)))


# Hooks


@pytest.mark.parametrize("name", ["plain", "as in CLIPA", "timm: as in SigLIP", "timm: no biases"])
def test_every_hook_is_alive(name: str, seed: int, tmp_path: Path) -> None:
    clip = random_clip(name)
    tower = load(write(tmp_path / "clip", clip, model_cfg(name)))
    pixels = random_pixels(clip.visual)
    assert tower.verify_hooks(pixels) == []
    assert not any(hook.has_hooks() for hook in tower.hook_dict.values())


@torch.no_grad()
def test_a_hook_that_nothing_depends_on_is_told(seed: int, tmp_path: Path) -> None:
    clip = random_clip("plain")
    tower: Any = load(write(tmp_path / "clip", clip, model_cfg("plain")))
    tower.blocks[2].mlp.down.weight.zero_()
    above = (
        "hook_mlp_in",
        "ln2.hook_scale",
        "ln2.hook_normalized",
        "mlp.hook_pre",
        "mlp.hook_post",
    )
    dead = tower.verify_hooks(random_pixels(clip.visual))
    assert set(dead) == {f"blocks.2.{name}" for name in above}


@torch.no_grad()
def test_hooks_edit_the_tower(seed: int, tmp_path: Path) -> None:
    """Without attention and MLP, a block hands on what it gets."""
    clip = random_clip("plain")
    tower = load(write(tmp_path / "clip", clip, model_cfg("plain")))
    pixels = random_pixels(clip.visual)
    sites = ("hook_attn_out", "hook_mlp_out")
    hooks = [(f"blocks.{i}.{site}", lambda x, hook: x * 0) for i in range(3) for site in sites]
    out = tower.run_with_hooks(pixels, fwd_hooks=hooks)
    torch.testing.assert_close(out, reference(clip.visual, pixels)[0], atol=1e-4, rtol=0)
    with pytest.raises(KeyError, match=r"hook_mlp_ou.*nearest are.*hook_mlp_out"):
        tower.run_with_hooks(pixels, fwd_hooks=[("blocks.0.hook_mlp_ou", hooks[0][1])])


# Images


@pytest.mark.parametrize(
    "preprocess",
    [
        {},
        {"resize_mode": "longest", "fill_color": 127},
        {"resize_mode": "squash", "interpolation": "bilinear", "mean": [0.5] * 3, "std": [0.5] * 3},
        {"size": 99, "resize_mode": "shortest"},  # the model's own size counts
    ],
)
@pytest.mark.parametrize("name", ["plain", "not square", "timm: as in SigLIP"])
def test_preprocessing_is_open_clips(
    preprocess: dict[str, Any], name: str, seed: int, tmp_path: Path
) -> None:
    folder = write(tmp_path / "clip", random_clip(name), model_cfg(name), **preprocess)
    _, theirs = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    ours = load(folder).image_processor
    for mode in ("RGB", "L", "RGBA"):
        picture = random_image().convert(mode)
        assert torch.equal(ours(picture), theirs(picture))


# Where weights come from


@pytest.fixture
def known_model(seed: int, tmp_path: Path) -> tuple[str, nn.Module]:
    return make_known(tmp_path)


def same(tower: HookedVisionTransformer, clip: Any, pixels: Tensor) -> bool:
    return torch.allclose(tower(pixels), reference(clip.visual, pixels)[-1], atol=1e-4, rtol=0)


def as_safetensors(tensors: dict[str, Tensor], folder: Path) -> Path:
    save_file(tensors, folder / "weights.safetensors")
    return folder / "weights.safetensors"


def as_pickle(tensors: dict[str, Tensor], folder: Path) -> Path:
    torch.save(tensors, folder / "weights.bin")
    return folder / "weights.bin"


def as_training_left_it(tensors: dict[str, Tensor], folder: Path) -> Path:
    state = {f"module.{name}": tensor for name, tensor in tensors.items()}
    torch.save({"epoch": 3, "name": "run", "state_dict": state}, folder / "epoch_3.pt")
    return folder / "epoch_3.pt"


@pytest.mark.parametrize("save", [as_safetensors, as_pickle, as_training_left_it])
@torch.no_grad()
def test_a_file_of_weights(
    save: Callable[[dict[str, Tensor], Path], Path], known_model: tuple[str, Any], tmp_path: Path
) -> None:
    name, clip = known_model
    file = save(tensors_of(clip), tmp_path)
    pixels = random_pixels(clip.visual)
    for tower in (load(name, file), load(name, pretrained=str(file)), load(f"{name}:{file}")):
        assert same(tower, clip, pixels)
    half = load(name, file, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16} and not half.training


@torch.no_grad()
def test_a_tag_of_open_clips(
    known_model: tuple[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its entry says where the weights are, what they were trained with and on what images."""
    name, _ = known_model
    clip = random_clip("plain", quick_gelu=True)
    file = as_safetensors(tensors_of(clip), tmp_path)
    entry = {"file": str(file), "quick_gelu": True, "mean": (0.1, 0.2, 0.3), "std": (1.0, 2.0, 3.0)}
    monkeypatch.setitem(_PRETRAINED, name, {"tag": entry})
    pixels = random_pixels(clip.visual)
    for tower in (load(name, "tag"), load(f"{name}:tag")):
        assert same(tower, clip, pixels)
        grey = Image.new("RGB", (15, 15), (51, 102, 153))
        values = torch.tensor([0.1, 0.2 / 2, 0.3 / 3])[:, None, None].expand(3, 15, 15)
        torch.testing.assert_close(tower.image_processor(grey), values)
    with pytest.raises(CheckpointError, match=r"pretrained='other'.*\(tag\)"):
        load(name, "other")


def test_pickles_in_a_folder(seed: int, tmp_path: Path) -> None:
    clip = random_clip("plain")
    folder = write(tmp_path / "clip", clip, model_cfg("plain"))
    (folder / WEIGHTS).unlink()
    torch.save(tensors_of(clip), folder / "open_clip_pytorch_model.bin")
    assert same(load(folder), clip, random_pixels(clip.visual))


# The published sizes

PUBLISHED: dict[str, tuple[str, Any, dict[str, Any]]] = {
    # transformers' configuration of the same tower
    "ViT-L-14-336:openai": (
        "CLIP",
        CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
        ),
        {},
    ),
    "ViT-SO400M-14-SigLIP-384:webli": (
        "CustomTextCLIP",
        SiglipVisionConfig(
            hidden_size=1152,
            intermediate_size=4304,
            num_hidden_layers=27,
            num_attention_heads=16,
            image_size=384,
            patch_size=14,
        ),
        {"act_fn": "gelu"},  # transformers takes the approximation by tanh
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_towers_fit_name_by_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, hf, differs = PUBLISHED[name]
    tower = find_open_clip_tower(name)
    cfg = tower.vision_config(-2, "full")
    assert cfg == replace(hf_configs.vision_config(hf, -2, "full"), **differs)
    config = {k: v for k, v in tower.model_cfg.items() if k != "custom_text"}
    with torch.device("meta"):
        theirs = getattr(open_clip.model, kind)(**config).state_dict()
        ours = nn.ModuleDict({"vision": HookedVisionTransformer(cfg)})
    shapes = {name: tensor.shape for name, tensor in theirs.items()}
    assert len(shapes) > 400
    monkeypatch.setattr(OpenClipTower, "files", lambda self: [])
    weights = tower.own_weights(cfg)
    check(ours, shapes, weights)  # both ways
    parameters = dict(ours.named_parameters())
    for there, slot in weights.table.items():
        assert slot.of(parameters).shape == shapes[there]


PLAIN_TIMM = ("SigLIP", "siglip", "MobileCLIP2-L-14")


@pytest.mark.slow
def test_every_tower_that_open_clip_lists_is_known_or_refused() -> None:
    refused = set()
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        try:
            cfg = open_clip_config.vision_config(config, -1, "full")
        except CheckpointError as error:
            assert "supported are plain vision transformers" in str(error)
            refused.add(name)
        else:
            timm_name = config["vision_cfg"].get("timm_model_name")
            assert timm_name is None or any(part in name for part in PLAIN_TIMM)
            assert cfg.class_token == ("siglip" not in name.lower())
    kinds = ("RN", "convnext", "EVA", "PE-", "MobileCLIP", "ViTamin", "swin", "vit_")
    assert all(name.startswith(kinds) for name in refused)
