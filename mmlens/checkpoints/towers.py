"""Vision towers that a checkpoint only names: LLaVA's code writes the tower's name to config.json,
and takes its weights from the tower's own checkpoint where they are not in the model's.

A tower is a folder as transformers writes it (CLIP or SigLIP, whole or the image half alone), in
the model's folder, anywhere on this machine, or in the hub's cache; or one of open_clip's (see
`open_clip.py`). For the towers in `KNOWN`, sizes and preprocessing are written down here, so that
nothing is fetched where the weights are in the checkpoint.

Sources: config.json and preprocessor_config.json of the towers in `KNOWN`, on the hub; LLaVA,
`model/multimodal_encoder/clip_encoder.py`, and `mm_utils.py` (padding to a square).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import try_to_load_from_cache
from transformers import CONFIG_MAPPING, AutoConfig, LlavaImageProcessorPil, PreTrainedConfig
from transformers.image_utils import (
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

from mmlens.checkpoints import open_clip
from mmlens.checkpoints.errors import CheckpointError
from mmlens.checkpoints.hf_configs import TOWERS, vision_config
from mmlens.checkpoints.hub import find_folder
from mmlens.checkpoints.names import Table, tower_names
from mmlens.checkpoints.weight_files import WeightFile, weight_files
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

# Blocks behind the feature layer, the last norm and SigLIP's pooling: a language model gets none of
# their outputs. Behind whatever prefix a format has.
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
    """Arguments of transformers' `LlavaImageProcessorPil`."""
    folder: Path | None = None
    """Its own checkpoint, where it is not the hub's."""

    def padded(self, do_pad: bool) -> VisionTower:
        """The tower with or without padding pictures to a square in the mean colour."""
        return replace(self, preprocessing=self.preprocessing | {"do_pad": do_pad})

    def vision_config(self, feature_layer: int, select: str) -> VisionConfig:
        """The part that is built; see `hf_configs.vision_config`."""
        return vision_config(self.config, feature_layer, select)

    def image_processor(self) -> LlavaImageProcessorPil:
        """Resizes with Pillow as LLaVA's code does, and pads to a square if `do_pad`."""
        return LlavaImageProcessorPil(**self.preprocessing)

    def files(self) -> list[WeightFile]:
        """The weight files of its own checkpoint; names begin with `OWN`.

        Raises:
            CheckpointError: they are not on this machine, and cannot be fetched.
        """
        try:
            folder = self.folder or find_folder(hub_name(self.name), None)
            return weight_files(folder, OWN)
        except CheckpointError as error:
            raise CheckpointError(
                f"the checkpoint holds no vision tower, and its config.json names "
                f"{self.name!r}: {error} Or say where it is: "
                "from_pretrained(..., vision_tower=...)."
            ) from error

    def table(self, cfg: VisionConfig) -> Table:
        """The names in its own checkpoint, as `rename` gives them."""
        return tower_names(cfg, OWN)

    def rename(self, name: str) -> str:
        """A tensor's name without the prefix that transformers has had, and has lost again."""
        return re.sub(rf"^{OWN}vision_model\.", OWN, name)

    @property
    def ignored(self) -> tuple[str, ...]:
        """What its own checkpoint holds beside."""
        return unused(re.escape(OWN)) + tuple(rf"{re.escape(OWN)}{name}" for name in TEXT_HALF)


Tower = VisionTower | open_clip.OpenClipTower


def unused(prefix: str) -> tuple[str, ...]:
    """Patterns of the tensors of a tower, under `prefix` (a pattern), that nothing depends on."""
    return tuple(prefix + name for name in UNUSED)


class Weights(NamedTuple):
    """Weight files and where their tensors go: the arguments of `loader.build`."""

    files: Sequence[WeightFile]
    table: Table
    ignored: Sequence[str]
    rename: Callable[[str], str]


def with_tower(
    weights: Weights, tower: Tower, cfg: VisionConfig, *, always: bool = False
) -> Weights:
    """A checkpoint's weights, with those of the tower's own checkpoint where it has none.

    Args:
        always: take the tower's own even where the checkpoint has some.

    Raises:
        CheckpointError: they are needed, and not to be had.
    """
    here = {name for name, slot in weights.table.items() if slot.parameter.startswith("vision.")}
    held = any(weights.rename(name) in here for file in weights.files for name in file.shapes())
    if held and not always:
        return weights
    return Weights(
        files=[*weights.files, *tower.files()],
        table={name: slot for name, slot in weights.table.items() if name not in here}
        | tower.table(cfg),
        ignored=[*weights.ignored, *tower.ignored, *map(re.escape, here)],
        rename=lambda name: tower.rename(name) if name.startswith(OWN) else weights.rename(name),
    )


def find_tower(name: str | Path, near: Path) -> Tower:
    """The tower of that name.

    Args:
        name: a folder (absolute, or relative to `near` or the working directory), a hub name, or
            open_clip's name of a model and its weights ("ViT-L-14-336:openai").
        near: the model's folder.

    Raises:
        CheckpointError: it is nowhere to be had, or neither CLIP nor SigLIP.
    """
    name = str(name)
    folder = local_folder(name, near)
    if folder is not None and (folder / open_clip.CONFIG).exists():
        return replace(open_clip.find_tower(folder), prefix=OWN)
    if folder is None and ":" in name:
        return replace(open_clip.find_tower(name), prefix=OWN)
    described = folder or cached_folder(name)
    if described is None and (known := KNOWN.get(hub_name(name))):
        return described_tower(name, known)
    if described is None:
        try:
            described = find_folder(name, None)
        except CheckpointError as error:
            raise CheckpointError(
                f"the vision tower {name!r} is not a folder (nor one in {near}), not in the hub's "
                f"cache, and not among those whose sizes are known ({', '.join(KNOWN)}); say where "
                "it is: from_pretrained(..., vision_tower=...)"
            ) from error
    if not (described / "config.json").exists():
        raise CheckpointError(f"{described} has no config.json: not the folder of a vision tower")
    config = AutoConfig.from_pretrained(described, trust_remote_code=False)
    config = getattr(config, "vision_config", config)
    return VisionTower(name, config, preprocessing_of(config, described), folder)


def described_tower(
    name: str, description: dict[str, Any], folder: Path | None = None
) -> VisionTower:
    """A tower whose sizes a config.json (or `KNOWN`) spells out.

    Args:
        folder: where a preprocessor_config.json may be.

    Raises:
        CheckpointError: it is neither CLIP nor SigLIP.
    """
    kind = description.get("model_type")
    if kind not in TOWERS:
        raise CheckpointError(
            f"the vision tower {name!r} is a {kind!r}; supported are {', '.join(TOWERS)}"
        )
    config = CONFIG_MAPPING[kind].from_dict(description)
    return VisionTower(name, config, preprocessing_of(config, folder))


def hub_name(name: str) -> str:
    """The hub's name of a known tower that is named by the path it once had somewhere else."""
    return next((hub for hub in KNOWN if Path(hub).name == Path(name).name), name)


def local_folder(name: str, near: Path) -> Path | None:
    """The folder of that name, if there is one."""
    folders = (near / name, Path(name).expanduser()) if name else ()
    return next((folder for folder in folders if folder.is_dir()), None)


def cached_folder(name: str) -> Path | None:
    """What the hub's cache holds under that name; it may be less than everything."""
    hub = hub_name(name)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", hub):
        return None
    config = try_to_load_from_cache(hub, "config.json")
    return Path(config).parent if isinstance(config, str) else None


def preprocessing_of(config: PreTrainedConfig, folder: Path | None) -> dict[str, Any]:
    """What is done with pictures: the folder's preprocessor_config.json, else the published way.

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
    given: dict[str, Any] = json.loads(path.read_text())
    return settings | {key: given[key] for key in PREPROCESSING if key in given}
