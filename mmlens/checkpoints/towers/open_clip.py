"""open_clip towers: the image half of an open_clip CLIP, alone or as the tower of another format.

A tower is named as open_clip names it, and found by open_clip itself:
- a model and the tag of its weights ("ViT-L-14-336" and "openai", or "ViT-L-14-336:openai"), from
  open_clip's own list;
- a model and a local file of weights (.safetensors, .pt, .bin; pickles of tensors only);
- a folder as open_clip writes it for the hub: open_clip_config.json and the weights beside it;
- "hf-hub:organisation/name", such a folder on the hub.

Images: open_clip's own transform for inference.

Source: open_clip, `factory.py` (`create_model`), `pretrained.py` and `transform.py`
(`PreprocessCfg`, `image_transform_v2`).
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import nn

from mmlens.checkpoints.errors import CheckpointError
from mmlens.checkpoints.json_files import check_counts, read_json
from mmlens.checkpoints.loader import Weights, load_weights
from mmlens.checkpoints.paths import checkpoint_errors, regular_file
from mmlens.checkpoints.towers import open_clip_config
from mmlens.checkpoints.weight_files import WeightFile, weight_files
from mmlens.config import VisionConfig
from mmlens.inputs.image_files import one_line
from mmlens.inputs.images import check_scaled
from mmlens.model.vision_tower import HookedVisionTransformer

CONFIG = "open_clip_config.json"
# In the order in which open_clip looks for them.
WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
)
HUB = "hf-hub:"

# What is not the image tower.
TEXT_HALF = (
    r"(text|text_decoder|transformer|token_embedding|ln_final)\..*",
    r"text_projection(\.(weight|bias))?",
    r"positional_embedding",
    r"cls_emb",
    r"attn_mask",
    r"logit_(scale|bias)",
)


@dataclass(frozen=True)
class OpenClipTower:
    """A tower that has been found; its weights are fetched when `files` asks for them."""

    name: str
    model_cfg: dict[str, Any]
    """open_clip's own."""
    preprocess_cfg: dict[str, Any]
    weights: Path | str
    """A folder, a file, or the tag of weights that open_clip fetches."""
    prefix: str = ""
    """Stands in front of the names of its tensors."""
    do_pad: bool = False
    """Whether images are first padded to a square in the mean colour, as LLaVA's code does."""

    def padded(self, do_pad: bool) -> OpenClipTower:
        """The tower with or without that padding."""
        return replace(self, do_pad=do_pad)

    def tiled(self, resolutions: Sequence[tuple[int, int]]) -> OpenClipTower:
        """Raise a CheckpointError: LLaVA's code cuts images into tiles for CLIP's own towers."""
        raise CheckpointError(
            f"the tower {self.name!r} is one of open_clip's, whose preprocessing makes no tiles"
        )

    @property
    def described_in(self) -> Path | str:
        """The file of its configuration, or open_clip's name of it."""
        is_folder = isinstance(self.weights, Path) and self.weights.is_dir()
        return Path(self.weights) / CONFIG if is_folder else self.name

    def vision_config(self, feature_layer: int | Sequence[int], select: Any) -> VisionConfig:
        """The part that is built; see `open_clip_config.vision_config`."""
        with checkpoint_errors(self.described_in):
            return open_clip_config.vision_config(self.model_cfg, feature_layer, select)

    def image_processor(self) -> Any:
        """open_clip's own transform: PIL image to [channel, height, width]."""
        with checkpoint_errors(self.described_in, "preprocess_cfg: "):
            return image_transform(self.model_cfg, self.preprocess_cfg, self.do_pad)

    def files(self) -> list[WeightFile]:
        """Return the weight files, fetched by open_clip where they are not here."""
        path = self.weights
        if isinstance(path, str):
            path = fetched(self.name, path)
        if path.is_file():
            return [WeightFile(path, self.prefix)]
        for name in WEIGHTS:
            if os.path.lexists(path / name):
                return [WeightFile(regular_file(path / name, path), self.prefix)]
        return weight_files(path, self.prefix)

    def own_weights(self, cfg: VisionConfig) -> Weights:
        """The weight files, and where their tensors go in a tower of this configuration."""
        prefix = re.escape(self.prefix)
        ignored = open_clip_config.ignored(self.model_cfg) + TEXT_HALF
        return Weights(
            self.files(),
            open_clip_config.table(self.model_cfg, cfg, f"{self.prefix}visual."),
            [prefix + pattern for pattern in ignored],
            # Distributed training puts "module." in front.
            rename=lambda name: re.sub(rf"^{prefix}module\.", self.prefix, name),
        )


def load_tower(
    name_or_path: str | Path,
    pretrained: str | Path | None = None,
    *,
    feature_layer: int | Sequence[int] = -1,
    select: Literal["default", "full"] = "full",
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> HookedVisionTransformer:
    """Return the image tower of an open_clip CLIP or SigLIP, with `image_processor`, its transform.

    Args:
        name_or_path: open_clip's name of the model; or a folder with open_clip_config.json, or
            "hf-hub:" and the name of one on the hub.
        pretrained: which weights of a named model: one of open_clip's tags, or a file. As in
            open_clip, a file says nothing of its activation: for OpenAI's weights take the
            model whose name ends in "-quickgelu".
        feature_layer: whose output is returned: 0 is the input of the first block, -1 the
            output of the last. A list is concatenated. What lies after is not built.
        select: "full" returns every position, "default" leaves out the first (the class token).
        device: where to put it; by default the GPU if there is one.
        dtype: by default float32, as in open_clip.

    Raises:
        CheckpointError: not found, no plain vision transformer, or names and shapes do not fit.

    Example:
        >>> load_tower("ViT-SO400M-14-SigLIP-384", "webli")
    """
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    tower = find_open_clip_tower(name_or_path, pretrained)
    cfg = tower.vision_config(feature_layer, select)
    with torch.device("meta"):
        # The tables are those of a whole model, where the tower has its place.
        model = nn.ModuleDict({"vision": HookedVisionTransformer(cfg)}).to(dtype or torch.float32)
    load_weights(model, tower.own_weights(cfg), device=where, where=tower.name)
    vision = model["vision"]
    assert isinstance(vision, HookedVisionTransformer)
    vision.image_processor = tower.image_processor()
    return vision.eval()


def find_open_clip_tower(
    name_or_path: str | Path, pretrained: str | Path | None = None, *, local: bool = True
) -> OpenClipTower:
    """Return the tower of that name; nothing but its configuration is read.

    Args:
        name_or_path: a folder, "hf-hub:...", or open_clip's name of a model, to which ":" and the
            weights may be added instead of `pretrained`.
        pretrained: the tag of the weights, or a file; a folder has its own.
        local: whether a folder or a file of this machine is taken; not where a checkpoint names it.

    Raises:
        CheckpointError: it cannot be found.
    """
    name = str(name_or_path)
    folder = Path(os.path.expanduser(name))
    if name.startswith(HUB) or (local and folder.is_dir()):
        if pretrained is not None:
            raise CheckpointError(
                f"{name} has weights of its own: leave pretrained={str(pretrained)!r} out"
            )
        return tower_of_folder(name, from_hub(name) if name.startswith(HUB) else folder)
    if pretrained is None and ":" in name:
        name, _, pretrained = name.partition(":")
    return known_tower(name, pretrained, local)


def tower_of_folder(name: str, folder: Path) -> OpenClipTower:
    """Return the tower that a folder's open_clip_config.json describes."""
    path = folder / CONFIG
    if not os.path.lexists(path):
        raise CheckpointError(f"{folder} has no {CONFIG}: no folder of open_clip's")
    config = read_json(path, folder)
    model_cfg, preprocess_cfg = config.get("model_cfg"), config.get("preprocess_cfg") or {}
    if not isinstance(model_cfg, dict) or not isinstance(model_cfg.get("vision_cfg"), dict):
        raise CheckpointError(f"{path} is not open_clip's: it has no model_cfg with a vision_cfg")
    if not isinstance(preprocess_cfg, dict):
        raise CheckpointError(f"{path}: preprocess_cfg is {preprocess_cfg!r}, not an object")
    check_counts(model_cfg["vision_cfg"], path)
    if ":" in str(model_cfg["vision_cfg"].get("timm_model_name")):  # a folder, or the hub
        raise CheckpointError(f"{path}: timm_model_name must be the name of one of timm's models")
    return OpenClipTower(name, model_cfg, preprocess_cfg, folder)


def known_tower(name: str, pretrained: str | Path | None, local: bool) -> OpenClipTower:
    """Return a tower of open_clip's own list."""
    import open_clip  # imports torchvision and timm: slow

    name = name.replace("/", "-")  # as open_clip does: OpenAI's "ViT-L/14"
    model_cfg = open_clip.get_model_config(name)
    if model_cfg is None:
        near = difflib.get_close_matches(name, open_clip.list_models(), n=4, cutoff=0.5)
        hint = f"; the nearest are {', '.join(near)}" if near else ""
        raise CheckpointError(
            f"open_clip knows no model {name!r}{hint} (open_clip.list_models() lists all), and "
            "there is no such folder"
        )
    tag = "" if pretrained is None else str(pretrained)
    file = Path(os.path.expanduser(tag))
    if local and tag and file.exists() and not file.is_dir():
        return OpenClipTower(name, model_cfg, {}, regular_file(file))
    settings = open_clip.get_pretrained_cfg(name, tag)
    if not settings:
        tags = open_clip.list_pretrained_tags_by_model(name)
        raise CheckpointError(
            f"{name} with pretrained={tag!r}: it must be a file of weights, or one of open_clip's "
            f"tags for this model ({', '.join(tags) or 'there are none'})"
        )
    # open_clip only warns where weights were trained with another activation than the config's.
    model_cfg["quick_gelu"] = bool(model_cfg.get("quick_gelu") or settings.get("quick_gelu"))
    return OpenClipTower(name, model_cfg, settings, tag)


def from_hub(name: str) -> Path:
    """The folder of a tower on the hub, with what open_clip downloads of it."""
    from open_clip import pretrained

    identifier = name.removeprefix(HUB)
    try:
        config = pretrained.download_pretrained_from_hf(identifier, CONFIG)
        pretrained.download_pretrained_from_hf(identifier)
    except Exception as error:  # of several libraries
        raise not_fetched(name, error, "the folder") from error
    return Path(config).parent


def fetched(name: str, tag: str) -> Path:
    """Return the file of a model's weights, downloaded by open_clip unless it has been before."""
    from open_clip import pretrained

    try:
        return Path(pretrained.download_pretrained(pretrained.get_pretrained_cfg(name, tag)))
    except Exception as error:  # of several libraries
        raise not_fetched(f"{name}:{tag}", error, "pretrained='/path/of/the/file'") from error


def not_fetched(name: str, error: Exception, instead: str) -> CheckpointError:
    """The error for weights that cannot be had."""
    return CheckpointError(
        f"open_clip could not fetch {name} ({one_line(error)}). Without network, download it "
        f"elsewhere and pass {instead}."
    )


def image_transform(
    model_cfg: dict[str, Any], preprocess_cfg: dict[str, Any], do_pad: bool = False
) -> Any:
    """Return open_clip's own transform for inference, after padding to a square if `do_pad`."""
    from open_clip import transform  # imports torchvision: slow

    size = model_cfg["vision_cfg"].get("image_size", 224)
    fields = transform.merge_preprocess_dict(transform.PreprocessCfg(), preprocess_cfg)
    settings = transform.PreprocessCfg(**fields | {"size": size})
    own = transform.image_transform_v2(settings, is_train=False)
    if not do_pad:
        return own
    red, green, blue = (int(255 * mean) for mean in settings.mean)
    return transform.Compose([partial(pad_to_square, colour=(red, green, blue)), own])


def pad_to_square(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """The image in the middle of a square (`expand2square` of LLaVA's `mm_utils.py`)."""
    check_scaled([image], edge=0, padded=True)
    side = max(image.size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
