"""For stage 2, whose tower is frozen: what the shipped tower gives for augmented pictures.

`features.safetensors` holds `train` and `validation`, [country, picture, 64, 192] in float16:
trained renderings only, a quarter of them plain, the rest augmented as in stage A's last run.

    python training/demo/features.py --folder WORK_FOLDER
"""

import argparse
from pathlib import Path

import torch
from augment import Augmentation
from safetensors.torch import save_file
from student import Pictures, Student
from torch import Tensor


@torch.no_grad()
def features(student: Student, pictures: Pictures, count: int, seed: int) -> Tensor:
    """[country, count, 64, 192]: `count` pictures of every country."""
    rng = torch.Generator().manual_seed(seed)
    countries, settings = torch.arange(len(pictures.codes)), Augmentation(tint=0.14, shades=0.06)
    found = []
    for _ in range(count):
        pixels = pictures.training_batch(countries, settings, rng)
        found.append(student.features(pixels).half())
    return torch.stack(found, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--count", type=int, default=40, help="pictures of a country")
    arguments = parser.parse_args()
    student, pictures = Student.shipped(), Pictures.load(arguments.folder)
    found = {
        "train": features(student, pictures, arguments.count, seed=0),
        "validation": features(student, pictures, 2, seed=1),
    }
    save_file(found, arguments.folder / "features.safetensors")


if __name__ == "__main__":
    main()
