"""A checkpoint's folder: on this machine, or from the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from mmlens.checkpoints.errors import CheckpointError

HUB_FILES = ["*.json", "*.model", "*.jinja", "*.txt"]
SAFETENSORS, PICKLES = ["*.safetensors"], ["pytorch_model*.bin"]


def find_folder(name_or_path: str | Path, revision: str | None) -> Path:
    """A local folder, or the hub's, downloaded.

    Raises:
        CheckpointError: neither a folder nor to be had from the hub.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or str(name_or_path).count("/") != 1:
        raise CheckpointError(
            f"unknown model {str(name_or_path)!r}: not a folder, not 'demo' or 'demo-tuned', and "
            "not a hub name like 'llava-hf/llava-1.5-7b-hf'"
        )
    from huggingface_hub import snapshot_download

    name = str(name_or_path)
    try:
        # Pickles only where there are no safetensors: the same weights are often there twice.
        found = Path(snapshot_download(name, revision=revision, allow_patterns=HUB_FILES))
        for patterns in (SAFETENSORS, PICKLES):
            snapshot_download(name, revision=revision, allow_patterns=patterns)
            if any(found.glob(patterns[0])):
                break
        return found
    except Exception as error:  # the hub client raises errors of several libraries
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"unknown model {name!r}: no such folder, and the hub did not give it "
            f"({reason}). Without network, download it elsewhere and pass the folder."
        ) from error
