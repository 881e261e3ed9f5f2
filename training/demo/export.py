"""Step 3: write the averaged weights and the pictures into the package, as float16 safetensors.

python training/demo/export.py --checkpoint WORK_FOLDER/final.pt
python training/demo/export.py --pictures NPM_FOLDER
python training/demo/export.py --tuned WORK_FOLDER/stage_2.pt
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from countries import read_countries
from PIL import Image
from prepare import PREPROCESS
from renderings import UNSEEN, Renderings, on_grey
from safetensors.torch import save_file
from student import EMBED_DIM, PACKAGE, VISION_CONFIG

from mmlens.demo.language_model import FOLDER_NAME

PICTURE_SIDE = 160

OPEN_CLIP_CONFIG: dict[str, Any] = {
    "model_cfg": {
        "embed_dim": EMBED_DIM,
        "vision_cfg": VISION_CONFIG,
        # there is no text tower: open_clip asks for a description of one
        "text_cfg": {
            "context_length": 77,
            "vocab_size": 49408,
            "width": 64,
            "heads": 1,
            "layers": 1,
        },
    },
    "preprocess_cfg": PREPROCESS,
}


def export_weights(checkpoint: Path, version: str) -> None:
    """The tower, the projector and the class vectors, each in its file, and their settings."""
    state = torch.load(checkpoint)
    halves = {name: tensor.half().contiguous() for name, tensor in state["average"].items()}
    files: dict[str, dict[str, torch.Tensor]] = {"vision": {}, "projector": {}}
    for name, tensor in halves.items():
        if name.startswith("visual."):
            files["vision"][name] = tensor
        elif name.startswith("projector."):
            files["projector"][name.removeprefix("projector.")] = tensor
    files["country_embeddings"] = {"country_embeddings": halves["country_embeddings"]}
    for name, tensors in files.items():
        file = PACKAGE / f"{name}.safetensors"
        save_file(tensors, file, metadata={"format": "pt"})
        file.chmod(0o644)
    settings = {
        "version": version,
        "language_model": FOLDER_NAME,
        "template": None,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "n_visual_tokens": 64,
        "trained_steps": int(state["step"]),
        "country_codes": [country.code for country in read_countries()],
    }
    for name, content in (("config", settings), ("open_clip_config", OPEN_CLIP_CONFIG)):
        (PACKAGE / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def export_tuned(checkpoint: Path) -> None:
    """Stage 2's projector and low-rank factors, named after the language model's own tensors."""
    state = torch.load(checkpoint)
    halves = {
        name.removeprefix("language_model."): tensor.half().contiguous()
        for name, tensor in state["average"].items()
    }
    metadata = {"format": "pt", "base": FOLDER_NAME, "rank": state["rank"], "alpha": state["alpha"]}
    metadata |= {"steps": state["step"]}
    file = PACKAGE / "tuned.safetensors"
    save_file(halves, file, metadata={name: str(value) for name, value in metadata.items()})
    file.chmod(0o644)


def export_pictures(packages: Path) -> None:
    """The rendering that was never trained on, small, as the demo questions' pictures."""
    renderings, folder = Renderings(packages), PACKAGE / "flags"
    folder.mkdir(exist_ok=True)
    for country in read_countries():
        flag = renderings.open(UNSEEN, country.code)
        assert flag is not None, country
        picture = on_grey(flag)
        scale = PICTURE_SIDE / max(picture.size)
        size = (round(picture.width * scale), round(picture.height * scale))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
        picture.save(folder / f"{country.code.lower()}.png", optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("--tuned", type=Path, help="a checkpoint of stage 2")
    parser.add_argument("--version", default="1")
    arguments = parser.parse_args()
    if arguments.checkpoint:
        export_weights(arguments.checkpoint, arguments.version)
    if arguments.tuned:
        export_tuned(arguments.tuned)
    if arguments.pictures:
        export_pictures(arguments.pictures)


if __name__ == "__main__":
    main()
