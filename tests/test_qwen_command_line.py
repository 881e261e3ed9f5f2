"""Bounds on the pixels of an image, given on the command line and to settings."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_folders import load
from cli_cases import right_answers
from qwen_models import FAMILIES, random_qwen, write
from sweep_cases import SETTINGS
from tiled_models import random_image

from mmlens import SteeringVector, sweep
from mmlens.cli import main
from mmlens.data import VisualQuestion
from mmlens.edit_bench.bench import EditBench
from mmlens.edit_bench.settings import BenchSettings
from mmlens.inputs.processor import Processor
from mmlens.reproduce import Settings, Study
from mmlens.sweeps import OtherSettings

QUESTION, CONSTRAINT = "What is the capital of this country?", "this country"


@dataclass
class Place:
    """A checkpoint, an image of 4 x 6 squares of its patches, and bounds that allow fewer."""

    folder: Path
    image: Path
    most: int
    """Pixels of 12 squares."""

    @property
    def options(self) -> list[str]:
        return ["--model", str(self.folder), "--max-pixels", str(self.most), "--device", "cpu"]

    def questions(self) -> Path:
        """A file of questions about the image."""
        row = {"question": QUESTION, "image": str(self.image), "visual_constraint": CONSTRAINT}
        rows = [row | {"answers": ["Paris"], "subject": f"subject {n}"} for n in range(2)]
        file = self.image.with_suffix(".jsonl")
        file.write_text("\n".join(map(json.dumps, rows)))
        return file


@pytest.fixture
def place(seed: int, tmp_path: Path) -> Place:
    chance = random.Random(seed)
    family = chance.choice(FAMILIES)
    hf = random_qwen(family, chance)
    write(family, tmp_path / "model", hf, least=4, most=40)
    side = hf.config.vision_config.patch_size * hf.config.vision_config.spatial_merge_size
    image = tmp_path / "image.png"
    random_image((6 * side, 4 * side), seed).save(image)
    return Place(tmp_path / "model", image, 12 * side**2)


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """How many visual tokens the images of all prompts have that are made in the meantime."""
    found: set[int] = set()
    made = Processor.__call__

    def noted(self: Processor, *arguments: Any, **options: Any) -> Any:
        inputs = made(self, *arguments, **options)
        found.update(image.length for image in inputs.images)
        return inputs

    monkeypatch.setattr(Processor, "__call__", noted)
    return found


def run(*arguments: object) -> None:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    assert end.value.code in (0, None)


def vector_of(cfg: Any, file: Path) -> Path:
    """A steering vector for the model."""
    return SteeringVector(
        vectors=torch.ones(1, cfg.d_model),
        activation_norms=torch.ones(1),
        margins=torch.ones(1, 2),
        layers=(1,),
        site="resid_post",
        method="mean",
    ).save(file)


@pytest.mark.parametrize(
    "name",
    [
        *("contributions", "knockout", "trace", "steer", "edit"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("edit-bench", "reproduce")),
    ],
)
def test_commands_that_ask_about_images_take_them(
    name: str, place: Place, sizes: set[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And every image has as few visual tokens as they allow."""
    monkeypatch.setenv("COLUMNS", "200")
    model = load(place.folder)
    expected = model.prepare(QUESTION, place.image, max_pixels=place.most).images[0].length
    assert 0 < expected <= 12
    asked, constraint = (place.image, QUESTION), ("--constraint", CONSTRAINT)
    data, one_step = ("--data", place.questions()), ("--set", "fine_tune.steps=1")
    nothing_kept = ("--references", "none", "--check", "none", "--method", "fine_tune")
    vector = vector_of(model.cfg, tmp_path / "vector.safetensors")
    options: dict[str, tuple[object, ...]] = {
        "contributions": (*asked, "--to", "last"),
        "knockout": (*asked, "--layers", "1"),
        "trace": (*asked, *constraint, "--sites", "mlp_out"),
        "steer": (*asked, "--vector", vector, "--max-new-tokens", "1"),
        "edit": (*asked, *constraint, "--target", "red", *nothing_kept, *one_step),
        "edit-bench": (*data, "--methods", "fine_tune", *one_step, "--limit", "1"),
        "reproduce": ("layers", *data, "--limit", "2", "--minimum-gap", "-1"),
    }
    out = ("--out", tmp_path / name) if name in ("edit", "edit-bench", "reproduce") else ()
    sizes.clear()
    with right_answers():
        run(name, *options[name], *place.options, *out)
    assert sizes == {expected}


def test_settings_of_studies_and_benchmarks_have_them(place: Place, seed: int) -> None:
    """The model that they name is opened with them; one that is told the name in words is not."""
    chosen: dict[str, Any] = {"model": str(place.folder), "max_pixels": place.most}
    settings = Settings(**chosen, language_model=str(place.folder), data=str(place.questions()))
    study = Study.open(settings, device="cpu")
    cases = BenchSettings(**chosen, data=str(place.questions()), limit=1)
    bench = EditBench.open(cases, device="cpu")
    for model in (study.model, bench.model):
        assert model.prepare(QUESTION, place.image).images[0].length <= 12
    assert study.models["named"].prepare(QUESTION, place.image).images[0].length == 24


def test_a_sweeps_folder_is_of_one_pair_of_them(place: Place, tmp_path: Path) -> None:
    question = VisualQuestion(QUESTION, place.image, visual_constraint=CONSTRAINT)
    given: dict[str, Any] = {**SETTINGS, "device": "cpu", "max_pixels": place.most}
    found = sweep("trace", str(place.folder), [question], tmp_path / "sweep", **given)
    assert found.n_done == 1
    with pytest.raises(OtherSettings):
        other = given | {"max_pixels": 99}
        sweep("trace", str(place.folder), [question], tmp_path / "sweep", **other)
    with pytest.raises(ValueError, match="set them where yours is loaded"):
        sweep("trace", load(place.folder), [question], tmp_path / "other", **given)
