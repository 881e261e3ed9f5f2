"""Step 1: draw every flag in every rendering into two arrays of pixels.

`flat`  [country, rendering, 192, 192, 4]: the flag's long side fills the square; alpha 0 beside it.
        Augmentation samples from it.
`plain` [country, rendering, 128, 128, 3]: what open_clip's own preprocessing gives for the picture,
        before normalisation: exactly what the shipped model sees of a clean picture.

    python training/demo/prepare.py --packages NPM_FOLDER --out WORK_FOLDER
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from countries import read_countries
from PIL import Image
from renderings import TRAINED, UNSEEN, Renderings, on_grey

IMAGE_SIZE = 128
FLAT_SIZE = 192
GREY = 127
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
PREPROCESS = {
    "size": IMAGE_SIZE,
    "mode": "RGB",
    "mean": MEAN,
    "std": STD,
    "interpolation": "bicubic",
    "resize_mode": "longest",
    "fill_color": GREY,
}


def open_clip_preprocess() -> Any:
    """open_clip's inference transform for the demo tower."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    return image_transform_v2(PreprocessCfg(**PREPROCESS), is_train=False)


def flat_pixels(flag: Image.Image) -> np.ndarray:
    """The flag centred in a transparent square, its long side filling it."""
    scale = FLAT_SIZE / max(flag.size)
    size = (round(flag.width * scale), round(flag.height * scale))
    square = Image.new("RGBA", (FLAT_SIZE, FLAT_SIZE), (GREY, GREY, GREY, 0))
    place = ((FLAT_SIZE - size[0]) // 2, (FLAT_SIZE - size[1]) // 2)
    square.paste(flag.resize(size, Image.Resampling.LANCZOS), place)
    return np.asarray(square)


def plain_pixels(flag: Image.Image, preprocess: Any) -> np.ndarray:
    """open_clip's preprocessing of the flag, with its normalisation undone (exact: 8 bits)."""
    tensor = preprocess(on_grey(flag))
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    pixels = ((tensor * std + mean) * 255).round().byte()
    # what training makes of these bytes is what the shipped model sees
    assert torch.allclose((pixels / 255 - mean) / std, tensor, atol=1e-5)
    return pixels.permute(1, 2, 0).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--packages", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    renderings, preprocess = Renderings(arguments.packages), open_clip_preprocess()
    names = (*TRAINED, UNSEEN)
    codes = [country.code for country in read_countries()]
    flat = np.zeros((len(codes), len(names), FLAT_SIZE, FLAT_SIZE, 4), np.uint8)
    plain = np.zeros((len(codes), len(names), IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    present = np.zeros((len(codes), len(names)), bool)
    for i, code in enumerate(codes):
        for j, name in enumerate(names):
            flag = renderings.open(name, code)
            if flag is None:
                print(f"{name} has no flag of {code}")
                continue
            flat[i, j], plain[i, j] = flat_pixels(flag), plain_pixels(flag, preprocess)
            present[i, j] = True
    arguments.out.mkdir(parents=True, exist_ok=True)
    np.savez(
        arguments.out / "pictures.npz",
        codes=np.array(codes),
        renderings=np.array(names),
        flat=flat,
        plain=plain,
        present=present,
    )


if __name__ == "__main__":
    main()
