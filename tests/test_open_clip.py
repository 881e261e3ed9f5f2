"""open_clip towers: every activation, the preprocessing and the names are open_clip's own."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.pretrained import _PRETRAINED
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer as TimmViT
from torch import Tensor, nn
from transformers import CLIPVisionConfig, SiglipVisionConfig

from mmlens.checkpoints import CheckpointError, hf_configs, open_clip_config
from mmlens.checkpoints.loader import check
from mmlens.checkpoints.open_clip import find_tower
from mmlens.components import HookedVisionTransformer

DEMO = Path(open_clip_config.__file__).parents[1] / "demo"
SAFE, PICKLE = "open_clip_model.safetensors", "open_clip_pytorch_model.bin"
TEXT = {"context_length": 5, "vocab_size": 9, "width": 8, "heads": 2, "layers": 1}
PLAIN = {
    "image_size": 15,
    "patch_size": 5,
    "width": 21,
    "layers": 3,
    "head_width": 7,
    "mlp_ratio": 1.3,
}

# Fields of open_clip's `vision_cfg`, beside `PLAIN`.
OWN: dict[str, dict[str, Any]] = {
    "plain": {},
    "one head": {"head_width": 21},
    "not square": {"image_size": [20, 15]},
    "a strip left over": {"image_size": 18},
    "as in CLIPA": {
        "no_ln_pre": True,
        "pool_type": "avg",
        "final_ln_after_pool": True,
        "norm_kwargs": {"eps": 1e-3},
        "act_kwargs": {"approximate": "tanh"},
    },
    "as in CoCa": {"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 4},
    "fixed positions": {"pos_embed_type": "sin_cos_2d", "width": 24, "head_width": 6},
    "patches dropped in training": {"patch_dropout": 0.5},
}

# Arguments of timm's `VisionTransformer`, as models that timm knows by name.
SMALL = {
    "img_size": 15,
    "patch_size": 5,
    "embed_dim": 20,
    "depth": 3,
    "num_heads": 4,
    "mlp_ratio": 1.7,
}
TIMM: dict[str, dict[str, Any]] = {
    "class token": {},
    "as in SigLIP": {"class_token": False, "global_pool": "map", "img_size": 18},
    "tanh": {"act_layer": "gelu_tanh", "class_token": False, "global_pool": "avg"},
    "as in CLIP": {"pre_norm": True, "act_layer": "quick_gelu", "norm_layer": "layernorm"},
    "no biases": {"qkv_bias": False, "proj_bias": False},
    "not square": {"img_size": (20, 15)},
    "any size": {"dynamic_img_size": True},
}
# What is refused: positions or parameters that a plain ViT does not have.
ODD_TIMM: dict[str, dict[str, Any]] = {
    "reg_token": {"reg_tokens": 2},
    "pos_embed is [1, 9": {"no_embed_class": True},
    "missing tensor visual.trunk.pos_embed": {"pos_embed": "none"},
    "q_norm": {"qk_norm": True},
    "attn.norm": {"scale_attn_norm": True},
    "mlp.norm": {"scale_mlp_norm": True},
    "ls1.gamma": {"init_values": 0.1},
    "ResPostBlock": {"block_fn": timm.models.vision_transformer.ResPostBlock, "init_values": 0.1},
    "norms of type": {"norm_layer": "rmsnorm"},
    "an activation": {"act_layer": "hard_swish"},
    "padded": {"dynamic_img_size": True, "dynamic_img_pad": True},
    "5 x 3": {"patch_size": (5, 3)},
}
NAMES = [*OWN, *(f"timm: {name}" for name in TIMM)]


def register_with_timm(name: str, choices: dict[str, Any]) -> str:
    """Make a ViT known to timm."""

    def build(num_classes: int = 10, global_pool: str = "token", **unused: Any) -> TimmViT:
        given = {"num_classes": num_classes, "global_pool": global_pool}
        model = TimmViT(**(SMALL | given | choices))
        model.pretrained_cfg = model.default_cfg = {}
        return model

    build.__name__ = f"vit_for_mmlens_{abs(hash(name))}"
    timm.models.register_model(build)
    return build.__name__


TIMM_NAMES = {name: register_with_timm(name, more) for name, more in (TIMM | ODD_TIMM).items()}


def model_cfg(name: str, **more: Any) -> dict[str, Any]:
    """open_clip's configuration of one of the models above."""
    kind = name.removeprefix("timm: ")
    if kind == name:
        return {"embed_dim": 14, "vision_cfg": PLAIN | OWN[name], "text_cfg": TEXT} | more
    choices = SMALL | (TIMM | ODD_TIMM)[kind]
    vision = {
        "timm_model_name": TIMM_NAMES[kind],
        "timm_pool": choices.get("global_pool", "token"),
        "timm_proj": "none" if "global_pool" in choices else "linear",
        "image_size": choices["img_size"],
    }
    return {
        "embed_dim": 20,
        "vision_cfg": vision,
        "text_cfg": TEXT,
        "custom_text": True,
        "init_logit_bias": -10,
        **more,
    }


def random_clip(name: str, **more: Any) -> nn.Module:
    """open_clip's whole model with lively weights, drawn from torch's generator."""
    config = model_cfg(name, **more)
    kind = CustomTextCLIP if config.pop("custom_text", False) else CLIP
    return enliven(kind(**config))


@torch.no_grad()
def enliven(model: nn.Module) -> nn.Module:
    """Redraw every weight, so that activations stay of order 1 and attention picks its keys."""
    norms = {id(p) for m in model.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()}
    for name, weight in model.named_parameters():
        if id(weight) in norms:
            weight.normal_(mean=0.0 if name.endswith("bias") else 1.0, std=0.3)
        elif "embed" in name.rpartition(".")[2] or "token" in name:
            weight.normal_(std=0.5)
        elif weight.ndim < 2:
            weight.normal_(std=0.3)
        else:
            weight.normal_(std=1 / weight[0].numel() ** 0.5)
            if "in_proj" in name or "qkv" in name:  # larger queries and keys
                weight[: 2 * len(weight) // 3] *= 1.5
    return model.eval()


def tensors_of(clip: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in clip.state_dict().items()}


def write(folder: Path, clip: nn.Module, config: dict[str, Any], **preprocess: Any) -> Path:
    """The folder that open_clip writes for the hub."""
    folder.mkdir(exist_ok=True)
    save_file(tensors_of(clip), folder / SAFE, metadata={"format": "pt"})
    described = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    return folder


def load(name: str | Path, *args: Any, **options: Any) -> HookedVisionTransformer:
    return HookedVisionTransformer.from_open_clip(name, *args, **{"device": "cpu", **options})


@torch.no_grad()
def reference(visual: Any, pixels: Tensor) -> list[Tensor]:
    """The stream that enters open_clip's first block, and what leaves each block."""
    blocks = visual.trunk.blocks if hasattr(visual, "trunk") else visual.transformer.resblocks
    streams: list[Tensor] = []
    handles = [blocks[0].register_forward_pre_hook(lambda _, given: streams.append(given[0]))]
    for block in blocks:
        handles.append(block.register_forward_hook(lambda _, given, out: streams.append(out)))
    visual(pixels)
    for handle in handles:
        handle.remove()
    return streams


def random_pixels(visual: Any) -> Tensor:
    size = visual.image_size
    return torch.randn(3, 3, *((size, size) if isinstance(size, int) else size))


def random_picture() -> Image.Image:
    sides = (random.randint(9, 60), random.randint(9, 60), 3)
    return Image.fromarray(np.random.randint(0, 256, sides, dtype=np.uint8))


# Numbers


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
    assert tower.cfg.n_layers == len(expected) - 1
    for layer in range(tower.cfg.n_layers):
        for at, resid in ((layer, "pre"), (layer + 1, "post")):
            found = cache[f"blocks.{layer}.hook_resid_{resid}"]
            torch.testing.assert_close(found, expected[at], atol=1e-4, rtol=0)
    torch.testing.assert_close(out, expected[-1], atol=1e-4, rtol=0)  # all hooks listening
    torch.testing.assert_close(tower(pixels), expected[-1], atol=1e-4, rtol=0)  # fused
    # Several layers, without the class token.
    if tower.cfg.class_token:
        some = load(folder, feature_layer=[0, -2], select="default")
        assert some.cfg.n_layers == len(expected) - 2
        joined = torch.cat([expected[0], expected[-2]], dim=-1)[:, 1:]
        torch.testing.assert_close(some(pixels), joined, atol=1e-4, rtol=0)


@torch.no_grad()
def test_open_clips_own_way_in(seed: int, tmp_path: Path) -> None:
    """The same folder, opened by open_clip itself; and what it says of a picture."""
    clip = random_clip("not square")
    folder = write(tmp_path / "clip", clip, model_cfg("not square"), interpolation="bilinear")
    theirs, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    tower = load(folder)
    picture = random_picture()
    pixels = preprocess(picture)[None]
    assert torch.equal(tower.image_processor(picture)[None], pixels)
    given = theirs.visual.forward_intermediates(
        pixels, indices=[-1], output_fmt="NLC", output_extra_tokens=True
    )
    expected = torch.cat(
        [given["image_intermediates_prefix"][0], given["image_intermediates"][0]], 1
    )
    torch.testing.assert_close(tower(pixels), expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_model_of_timms_own(seed: int, tmp_path: Path) -> None:
    config = model_cfg("plain") | {"custom_text": True}
    config["vision_cfg"] = {"timm_model_name": "test_vit", "timm_pool": "token", "image_size": 160}
    clip = enliven(CustomTextCLIP(**{k: v for k, v in config.items() if k != "custom_text"}))
    visual: Any = clip.visual
    pixels = random_pixels(visual)
    tower = load(write(tmp_path / "clip", clip, config))
    torch.testing.assert_close(tower(pixels), reference(visual, pixels)[-1], atol=1e-4, rtol=0)


@torch.no_grad()
def test_the_demo_tower(seed: int, tmp_path: Path) -> None:
    shutil.copy(DEMO / "open_clip_config.json", tmp_path)
    shutil.copy(DEMO / "vision.safetensors", tmp_path / SAFE)
    config = json.loads((DEMO / "open_clip_config.json").read_text())["model_cfg"]
    visual: Any = CLIP(**config).eval().visual
    weights = load_file(DEMO / "vision.safetensors")
    visual.load_state_dict({n.removeprefix("visual."): t.float() for n, t in weights.items()})
    pixels = random_pixels(visual)
    torch.testing.assert_close(
        load(tmp_path)(pixels), reference(visual, pixels)[-1], atol=1e-4, rtol=0
    )


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
    above = ("ln2.hook_scale", "ln2.hook_normalized", "mlp.hook_pre", "mlp.hook_post")
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


# Pictures


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
        picture = random_picture().convert(mode)
        assert torch.equal(ours(picture), theirs(picture))


# Where weights come from


@pytest.fixture
def known(seed: int, tmp_path: Path) -> tuple[str, nn.Module]:
    """A model that open_clip knows by name, and its weights in `tmp_path`."""
    clip = random_clip("plain")
    (tmp_path / "ViT-mmlens-odd.json").write_text(json.dumps(model_cfg("plain")))
    open_clip.add_model_config(tmp_path / "ViT-mmlens-odd.json")
    return "ViT-mmlens-odd", clip


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
    save: Callable[[dict[str, Tensor], Path], Path], known: tuple[str, Any], tmp_path: Path
) -> None:
    name, clip = known
    file = save(tensors_of(clip), tmp_path)
    pixels = random_pixels(clip.visual)
    for tower in (load(name, file), load(name, pretrained=str(file)), load(f"{name}:{file}")):
        assert same(tower, clip, pixels)
    half = load(name, file, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16} and not half.training


@torch.no_grad()
def test_a_tag_of_open_clips(
    known: tuple[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its entry says where the weights are, what they were trained with and on what pictures."""
    name, _ = known
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
    (folder / SAFE).unlink()
    torch.save(tensors_of(clip), folder / PICKLE)
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
def test_published_towers_fit_name_by_name(name: str) -> None:
    kind, hf, differs = PUBLISHED[name]
    tower = find_tower(name)
    cfg = tower.vision_config(-2, "full")
    assert cfg == replace(hf_configs.vision_config(hf, -2, "full"), **differs)
    config = {k: v for k, v in tower.model_cfg.items() if k != "custom_text"}
    with torch.device("meta"):
        theirs = getattr(open_clip.model, kind)(**config).state_dict()
        ours = nn.ModuleDict({"vision": HookedVisionTransformer(cfg)})
    shapes = {name: tensor.shape for name, tensor in theirs.items()}
    assert len(shapes) > 400
    check(ours, shapes, tower.table(cfg), ignored=tower.ignored)  # both ways
    parameters = dict(ours.named_parameters())
    for there, slot in tower.table(cfg).items():
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
    assert {name for name in refused if not name.startswith(kinds)} == {"ViT-M-16-alt"}


# What goes wrong


@pytest.mark.parametrize("said", ODD_TIMM)
def test_a_timm_model_that_is_no_plain_vit(said: str) -> None:
    with pytest.raises(CheckpointError) as error:
        open_clip_config.vision_config(model_cfg(f"timm: {said}"), -1, "full")
    assert said in str(error.value) and "supported are plain vision" in str(error.value)


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({"layers": [1, 1, 1, 1]}, "ModifiedResNet"),
        ({"ls_init_value": 0.1}, "ls_1.gamma"),
        ({"qk_norm": True}, "CustomResidualAttentionBlock"),
        ({"timm_model_name": "convnext_atto"}, "ConvNeXt"),
        ({"timm_model_name": "no_such_model"}, "no_such_model"),
        ({"input_patchnorm": True}, "input_patchnorm"),
        ({"patch_size": [5, 3]}, "5 x 3"),
        ({"head_width": 8}, "cannot build"),  # 21 / 8 heads
    ],
)
def test_another_tower(choices: dict[str, Any], said: str) -> None:
    config = model_cfg("plain")
    config["vision_cfg"] = config["vision_cfg"] | choices
    with pytest.raises(CheckpointError) as error:
        open_clip_config.vision_config(config, -1, "full")
    assert said in str(error.value)


def test_layers_and_selections_that_are_not_there() -> None:
    for layer in (4, -5, [], [1, 7]):
        with pytest.raises(CheckpointError, match=r"features 0 \.\.\. 3"):
            open_clip_config.vision_config(model_cfg("plain"), layer, "full")
    with pytest.raises(CheckpointError, match="'patch'.*'full', or 'default'"):
        open_clip_config.vision_config(model_cfg("plain"), -1, "patch")


def test_names_that_lead_nowhere(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no model 'ViT-L-14-33'.*ViT-L-14-336"):
        load("ViT-L-14-33", "openai")
    for nothing in ({}, {"pretrained": "laion9b"}, {"pretrained": tmp_path / "nowhere.pt"}):
        with pytest.raises(CheckpointError, match=r"a file of weights.*\(openai\)"):
            load("ViT-L/14-336", **nothing)
    for name in ("ViT-L-14-336:openai", "hf-hub:nobody/has-this-model"):  # HF_HUB_OFFLINE is set
        with pytest.raises(CheckpointError, match=f"could not fetch {name}.*Without network"):
            load(name)
    with pytest.raises(CheckpointError, match=r"no open_clip_config\.json"):
        load(tmp_path)


def test_folders_that_do_not_fit(seed: int, tmp_path: Path) -> None:
    clip = random_clip("plain")
    folder = write(tmp_path / "clip", clip, model_cfg("plain"))
    with pytest.raises(CheckpointError, match="weights of its own.*pretrained='openai'"):
        load(folder, "openai")
    tensors = tensors_of(clip)
    bent = "visual.transformer.resblocks.1.mlp.c_fc.weight"
    lost = tensors.pop("visual.class_embedding")
    more = {bent: tensors[bent][1:].clone(), "visual.transformer.resblocks.2.ls_1.gamma": lost}
    save_file(tensors | more, folder / SAFE)
    with pytest.raises(CheckpointError) as error:
        load(folder)
    for said in ("missing tensor visual.class_embedding", f"{bent} is", "unknown tensor", "ls_1"):
        assert said in str(error.value)
    (folder / SAFE).write_bytes((folder / SAFE).read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        load(folder)
    (folder / SAFE).unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        load(folder)
    for text in ("{", "[]", '{"model": 1}'):
        (folder / "open_clip_config.json").write_text(text)
        with pytest.raises(CheckpointError, match="no model_cfg"):
            load(folder)


@pytest.mark.filterwarnings("ignore:.*(deprecated|TorchScript)")
def test_a_pickle_that_holds_code(known: tuple[str, Any], tmp_path: Path) -> None:
    """OpenAI's own files are TorchScript archives: programs."""
    name, clip = known
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "ViT-L-14-336px.pt"))
    torch.save(clip, tmp_path / "model.pt")
    for file in ("ViT-L-14-336px.pt", "model.pt"):
        with pytest.raises(CheckpointError, match="more than tensors"):
            load(name, tmp_path / file)
