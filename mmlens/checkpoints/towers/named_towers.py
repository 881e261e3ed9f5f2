"""Vision towers that a checkpoint only names: LLaVA's code writes the tower's name to config.json,
and takes its weights from the tower's own checkpoint where they are not in the model's.

A tower is a folder as transformers writes it (CLIP or SigLIP, whole or the image half alone),
inside of the model's folder or in the hub's cache; or one of open_clip's (see `open_clip.py`). A
folder anywhere else on this machine is only taken from the caller, not from a config.json. For the
towers in `KNOWN`, sizes and preprocessing are written down here, so that nothing is fetched where
the weights are in the checkpoint.

Sources: config.json and preprocessor_config.json of the towers in `KNOWN`, on the hub; LLaVA,
`model/multimodal_encoder/clip_encoder.py`, and `mm_utils.py` (padding to a square).
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    LlavaImageProcessorPil,
    LlavaNextImageProcessorPil,
    PreTrainedConfig,
)
from transformers.image_utils import (
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

from mmlens.checkpoints.errors import CheckpointError
from mmlens.checkpoints.hf_configs import TOWERS, vision_config
from mmlens.checkpoints.hub import download
from mmlens.checkpoints.json_files import check_folder, read_json
from mmlens.checkpoints.loader import Weights
from mmlens.checkpoints.names import TOWER, slots, under
from mmlens.checkpoints.paths import checkpoint_errors, is_inside, leaves_its_folder
from mmlens.checkpoints.towers import open_clip
from mmlens.checkpoints.weight_files import WeightFile, all_shapes, weight_files
from mmlens.config import VisionConfig

CLIP_LARGE = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "projection_dim": 768,
}
KNOWN: dict[str, dict[str, Any]] = {
    "openai/clip-vit-large-patch14-336": CLIP_LARGE | {"image_size": 336},
    "openai/clip-vit-large-patch14": CLIP_LARGE | {"image_size": 224},
    "google/siglip-so400m-patch14-384": {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
        "image_size": 384,
    },
}

OWN = "vision tower: "
"""Stands in front of the names of tensors that come from the tower's own checkpoint."""

# Blocks after the feature layer, the last norm and SigLIP's pooling: a language model gets none of
# their outputs. After whatever prefix a format has.
UNUSED = (
    r"encoder\.layers\.\d+\.(layer_norm\d|self_attn\.\w+_proj|mlp\.fc\d)\.(weight|bias)",
    r"post_layernorm\.(weight|bias)",
    r"head\..*",
    r"embeddings\.position_ids",
)
# The text half of a whole CLIP or SigLIP.
TEXT_HALF = (r"text_model\..*", r"(text|visual)_projection\.weight", r"logit_(scale|bias)")

PREPROCESSING = (
    "size crop_size do_resize do_center_crop do_rescale rescale_factor do_normalize image_mean "
    "image_std resample"
).split()


@dataclass(frozen=True)
class VisionTower:
    """A tower, with or without a checkpoint of its own."""

    name: str
    config: PreTrainedConfig
    preprocessing: dict[str, Any]
    """Arguments of transformers' `LlavaImageProcessorPil`; of `LlavaNextImageProcessorPil`, if
    there are `image_grid_pinpoints` among them."""
    folder: Path | None = None
    """Its own checkpoint, where it is not the hub's."""

    def padded(self, do_pad: bool) -> VisionTower:
        """The tower with or without padding images to a square in the mean colour."""
        return replace(self, preprocessing=self.preprocessing | {"do_pad": do_pad})

    def tiled(self, resolutions: Sequence[tuple[int, int]]) -> VisionTower:
        """The tower with images scaled into one of these sizes (height, width) and cut up."""
        tiles = {"image_grid_pinpoints": [list(pair) for pair in resolutions]}
        return replace(self, preprocessing=self.preprocessing | tiles)

    def vision_config(self, feature_layer: int, select: str) -> VisionConfig:
        """The part that is built; see `hf_configs.vision_config`."""
        return vision_config(self.config, feature_layer, select)

    def image_processor(self) -> LlavaImageProcessorPil | LlavaNextImageProcessorPil:
        """Resizes with Pillow as LLaVA's code does, and pads to a square or makes tiles."""
        if "image_grid_pinpoints" in self.preprocessing:
            return LlavaNextImageProcessorPil(**self.preprocessing)
        return LlavaImageProcessorPil(**self.preprocessing)

    def files(self) -> list[WeightFile]:
        """Return the weight files of its own checkpoint; names begin with `OWN`."""
        try:
            folder = self.folder or download(hub_name(self.name))
            return weight_files(folder, OWN)
        except CheckpointError as error:
            raise CheckpointError(
                f"the checkpoint holds no vision tower, and its config.json names "
                f"{self.name!r}: {error} Or say where it is: "
                "from_pretrained(..., vision_tower=...)."
            ) from error

    def own_weights(self, cfg: VisionConfig) -> Weights:
        """The weight files, and where their tensors go in a tower of this configuration."""
        prefix = re.escape(OWN)
        return Weights(
            self.files(),
            slots(cfg, under(OWN, TOWER)),
            [prefix + name for name in UNUSED + TEXT_HALF],
            # transformers has had this prefix, and has lost it again.
            rename=lambda name: re.sub(rf"^{OWN}vision_model\.", OWN, name),
        )


Tower = VisionTower | open_clip.OpenClipTower


def unused(prefix: str) -> tuple[str, ...]:
    """Patterns of the tensors of a tower, under `prefix` (a pattern), that nothing depends on."""
    return tuple(prefix + name for name in UNUSED)


def with_tower(
    weights: Weights, tower: Tower, cfg: VisionConfig, *, always: bool = False
) -> Weights:
    """Return a checkpoint's weights, with those of the tower's own checkpoint where it has none.

    Args:
        always: take the tower's own even where the checkpoint has some.
    """
    rename = weights.rename
    here = {name for name, slot in weights.table.items() if slot.parameter.startswith("vision.")}
    held = any(rename(name) in here for name, _ in all_shapes(weights.files))
    if held and not always:
        return weights
    own = tower.own_weights(cfg)
    rest = {name: slot for name, slot in weights.table.items() if name not in here}
    return Weights(
        [*weights.files, *own.files],
        rest | own.table,
        [*weights.ignored, *own.ignored, *map(re.escape, here)],
        rename=lambda name: own.rename(name) if name.startswith(OWN) else rename(name),
    )


def find_tower(name: str | Path, near: Path | None = None) -> Tower:
    """Return the tower of that name.

    Args:
        name: a folder, a hub name, or open_clip's name of a model and its weights
            ("ViT-L-14-336:openai").
        near: the folder of the checkpoint that gives the name: then only a folder inside of it is
            taken. None where the caller gives it.

    Raises:
        CheckpointError: it is nowhere to be had, is neither CLIP nor SigLIP, or is a path out of
            the checkpoint's folder.
    """
    name = str(name)
    folder = local_folder(name, near)
    if folder is not None and (folder / open_clip.CONFIG).exists():
        return replace(open_clip.tower_of_folder(str(folder), folder), prefix=OWN)
    if near is not None and leaves_its_folder(name) and hub_name(name) == name:
        raise CheckpointError(
            f"{near / 'config.json'} names the vision tower {name!r}, a path out of its folder. "
            f"If you know what lies there, say so: from_pretrained(..., vision_tower={name!r})"
        )
    if folder is None and ":" in name:
        return replace(open_clip.find_open_clip_tower(name, local=near is None), prefix=OWN)
    described = folder or cached_folder(name)
    if described is None and (known := KNOWN.get(hub_name(name))):
        return described_tower(name, known)
    if described is None:
        try:
            described = download(name)
        except CheckpointError as error:
            inside = "" if near is None else f" in {near}"
            raise CheckpointError(
                f"the vision tower {name!r} is not a folder{inside}, not in the hub's "
                f"cache, and not among those whose sizes are known ({', '.join(KNOWN)}); say where "
                "it is: from_pretrained(..., vision_tower=...)"
            ) from error
    return tower_in(described, name, folder)


def tower_in(described: Path, name: str, folder: Path | None) -> VisionTower:
    """Return the tower whose config.json lies in `described`, with its weights in `folder`."""
    if not (described / "config.json").exists():
        raise CheckpointError(f"{described} has no config.json: not the folder of a vision tower")
    check_folder(described)
    with checkpoint_errors(described / "config.json"):
        config = AutoConfig.from_pretrained(described, trust_remote_code=False)
        config = getattr(config, "vision_config", config)
        return VisionTower(name, config, preprocessing_of(config, described), folder)


def described_tower(
    name: str, description: dict[str, Any], folder: Path | None = None
) -> VisionTower:
    """Return a tower whose sizes a config.json (or `KNOWN`) spells out.

    Args:
        folder: where a preprocessor_config.json may be.
    """
    kind = description.get("model_type")
    if kind not in TOWERS:
        raise CheckpointError(
            f"the vision tower {name!r} is a {kind!r}; supported are {', '.join(TOWERS)}"
        )
    with checkpoint_errors(f"the vision tower {name!r}"):
        config = CONFIG_MAPPING[kind].from_dict(description)
    return VisionTower(name, config, preprocessing_of(config, folder))


def hub_name(name: str) -> str:
    """The hub's name of a known tower that is named by the path it once had somewhere else."""
    return next((hub for hub in KNOWN if Path(hub).name == Path(name).name), name)


def local_folder(name: str, near: Path | None) -> Path | None:
    """Return the folder of that name, if there is one; `near` is as in `find_tower`."""
    if near is None:
        folder = Path(os.path.expanduser(name))
        return folder if name and folder.is_dir() else None
    if leaves_its_folder(name) or not (near / name).is_dir():
        return None
    if not is_inside(near / name, near):
        raise CheckpointError(
            f"{near / name} is a link out of the checkpoint's folder: if you know what lies there, "
            f"say so: from_pretrained(..., vision_tower={str((near / name).resolve())!r})"
        )
    return near / name


def cached_folder(name: str) -> Path | None:
    """What the hub's cache holds under that name; it may be less than everything."""
    hub = hub_name(name)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", hub):
        return None
    config = try_to_load_from_cache(hub, "config.json")
    return Path(config).parent if isinstance(config, str) else None


def preprocessing_of(config: PreTrainedConfig, folder: Path | None) -> dict[str, Any]:
    """What is done with images: the folder's preprocessor_config.json, else the published way.

    OpenAI's CLIP resizes the shorter side and cuts out the centre; SigLIP resizes both sides.
    """
    side = {"height": config.image_size, "width": config.image_size}
    if config.model_type == "siglip_vision_model":
        settings = {
            "size": side,
            "do_center_crop": False,
            "image_mean": IMAGENET_STANDARD_MEAN,
            "image_std": IMAGENET_STANDARD_STD,
        }
    else:
        settings = {
            "size": {"shortest_edge": config.image_size},
            "crop_size": side,
            "image_mean": OPENAI_CLIP_MEAN,
            "image_std": OPENAI_CLIP_STD,
        }
    path = None if folder is None else folder / "preprocessor_config.json"
    if path is None or not path.exists():
        return settings
    given = read_json(path, folder)
    return settings | {key: given[key] for key in PREPROCESSING if key in given}
