"""A checkpoint's folder: on this machine, or from the Hugging Face hub."""

from __future__ import annotations

import os
from pathlib import Path

from mmlens.checkpoints.errors import CheckpointError
from mmlens.demo import VARIANTS
from mmlens.inputs.image_files import one_line

HUB_FILES = ["*.json", "*.model", "*.jinja", "*.txt"]
SAFETENSORS, PICKLES = ["*.safetensors"], ["pytorch_model*.bin"]


def find_folder(name_or_path: str | Path, revision: str | None) -> Path:
    """Return a local folder, or the hub's, downloaded."""
    path = Path(os.path.expanduser(name_or_path))
    return path if path.is_dir() else download(str(name_or_path), revision)


def download(name: str, revision: str | None = None) -> Path:
    """Return the folder of a name on the hub, downloaded unless it is in the cache."""
    if os.path.isabs(os.path.expanduser(name)) or name.count("/") != 1:
        embedded = " or ".join(map(repr, VARIANTS))
        raise CheckpointError(
            f"unknown model {name!r}: not a folder, not {embedded}, and not a hub name like "
            "'llava-hf/llava-1.5-7b-hf'"
        )
    from huggingface_hub import snapshot_download

    try:
        # Pickles only where there are no safetensors: the same weights are often there twice.
        found = Path(snapshot_download(name, revision=revision, allow_patterns=HUB_FILES))
        for patterns in (SAFETENSORS, PICKLES):
            snapshot_download(name, revision=revision, allow_patterns=patterns)
            if any(found.glob(patterns[0])):
                break
        return found
    except Exception as error:  # the hub client raises errors of several libraries
        raise CheckpointError(
            f"unknown model {name!r}: no such folder, and the hub did not give it "
            f"({one_line(error)}). Without network, download it elsewhere and pass the folder."
        ) from error
