"""Every code block of the README and of docs/, and every notebook, runs on the demo model.

Python blocks of a page share one namespace; of the other blocks, commands that begin with `mmlens`
are run. A block after `<!-- tested with: this -> that; ... -->` is run with words replaced: with
fewer questions, say. One after `<!-- not run: reason -->` is only parsed. Pages are run in a
folder with `flag.png` (Italy's) and the files that `PREPARED` writes for them.
"""

import ast
import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import plotly.graph_objects as go
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from mmlens import HookedMultimodalTransformer, demo_questions
from mmlens.cli.app import app
from mmlens.cli.sweep import with_ray_address

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.py"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(
    r"(?:<!-- not run: (?P<reason>[^>]+?) -->\n)?(?:<!-- tested with: (?P<words>.+?) -->\n)?"
    r"^```(?P<language>\w*)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    language: str
    code: str
    reason: str | None
    line: int


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for found in BLOCK.finditer(text):
        line = text[: found.start("code")].count("\n")
        code = found["code"]
        for pair in found["words"].split("; ") if found["words"] else []:
            old, new = pair.split(" -> ")
            assert old in code, f"{page.name}, line {line}: there is no {old!r} to replace"
            code = code.replace(old, new)
        yield Block(found["language"], code, found["reason"], line)


def commands(code: str) -> list[list[str]]:
    """The calls of mmlens in a block for a terminal."""
    lines = code.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("mmlens ")]


def okvqa_files(folder: Path) -> None:
    """One question of OK-VQA, its annotation and its image."""
    (folder / "coco" / "val2014").mkdir(parents=True)
    picture = "COCO_val2014_000000000042.jpg"
    Image.new("RGB", (8, 8)).save(folder / "coco" / "val2014" / picture)
    asked = {"question_id": 425, "image_id": 42, "question": "What is this?"}
    answers = [{"answer": "pony tail", "raw_answer": "pony tail", "answer_confidence": "yes"}] * 10
    subtype = {"data_subtype": "val2014"}
    names = ("OpenEnded_mscoco_val2014_questions.json", "mscoco_val2014_annotations.json")
    (folder / names[0]).write_text(json.dumps({"questions": [asked], **subtype}))
    annotation = {"question_id": 425, "image_id": 42, "answers": answers}
    (folder / names[1]).write_text(json.dumps({"annotations": [annotation], **subtype}))
    row = f"0,What is this?,this,./val2014/{picture}"
    (folder / "okvqa.csv").write_text(f",question,main_entity,image_url\n{row}\n")


def answered(folder: Path) -> dict[str, torch.Tensor]:
    """What `predict_correctness` is given."""
    okvqa_files(folder)
    right = torch.arange(60) % 3 > 0
    return {
        "right": right,
        "confidence": torch.rand(60) + right,
        "contributions": torch.rand(60, 30) + right[:, None],
    }


def mmedit_file(folder: Path) -> None:
    """A record of MMEdit and its image."""
    (folder / "editing-data" / "vqa").mkdir(parents=True)
    shutil.copy(folder / "flag.png", folder / "editing-data" / "flag.png")
    record = {"src": "What is this country?", "alt": "Oslo", "image": "flag.png"}
    (folder / "editing-data" / "vqa" / "vqa_eval.json").write_text(json.dumps([record]))


def pairs_and_regions(folder: Path) -> None:
    """A pair of images, and a question of GQA with its scene graph."""
    (folder / "images").mkdir()
    shutil.copy(folder / "flag.png", folder / "images" / "red.png")
    Image.new("RGB", (50, 70), "blue").save(folder / "images" / "blue.png")
    Image.open(folder / "flag.png").convert("RGB").save(folder / "images" / "7.jpg")
    row = {"question": "The capital of this country is", "image": "red.png",
           "counterfactual_image": "blue.png", "answers": ["Rome"],
           "counterfactual_answers": ["Paris"]}  # fmt: skip
    (folder / "pairs.jsonl").write_text(json.dumps(row))
    asked = {"question": "What is on the wall?", "imageId": "7", "answer": "flag",
             "annotations": {"question": {"4": "1"}, "answer": {"0": "2"}}}  # fmt: skip
    width, height = Image.open(folder / "flag.png").size
    boxes = {"1": ("wall", width, height), "2": ("flag", width // 2, height // 2)}
    objects = {
        key: {"name": name, "x": 0, "y": 0, "w": wide, "h": high}
        for key, (name, wide, high) in boxes.items()
    }
    (folder / "val_balanced_questions.json").write_text(json.dumps({"1": asked}))
    (folder / "val_sceneGraphs.json").write_text(json.dumps({"7": {"objects": objects}}))


PREPARED: dict[str, Callable[[Path], dict[str, torch.Tensor] | None]] = {
    "attention": answered,
    "editing": mmedit_file,
    "sweeps": pairs_and_regions,
    "tracing": pairs_and_regions,
}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty folder with a flag; figures are not shown; the demo model is loaded once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(go.Figure, "show", lambda self, *args, **kwargs: None)
    monkeypatch.setattr(HookedMultimodalTransformer, "from_pretrained", demo_model)
    italy = next(q for q in demo_questions(relation="capital") if q.subject == "Italy")
    italy.open_images()[0].save(tmp_path / "flag.png")
    return tmp_path


load = HookedMultimodalTransformer.from_pretrained


@lru_cache(maxsize=2)
def embedded_model(name: str, **options: object) -> HookedMultimodalTransformer:
    assert name.startswith("demo"), f"{name} cannot be loaded in a test"
    return load(name, **options)


def demo_model(name: str, **options: object) -> HookedMultimodalTransformer:
    """The embedded models, each loaded once, and folders that a page has written itself."""
    return load(name, **options) if Path(name).is_dir() else embedded_model(name, **options)


LONG_PAGES = {
    "attention",
    "editing",
    "experiments",
    "findings",
    "getting-started",
    "steering",
    "sweeps",
    "tracing",
}
"""Pages whose blocks take from half a minute to one and a half."""


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(each, id=each.stem, marks=[pytest.mark.slow] * (each.stem in LONG_PAGES))
        for each in PAGES
    ],
)
def test_every_block_runs(page: Path, folder: Path, monkeypatch) -> None:
    # References of an edit: whether a page runs does not depend on how many there are.
    monkeypatch.setattr("mmlens.editing.references.MOST_IMAGES", 9)
    namespace: dict[str, object] = {"__name__": "__page__"}
    namespace.update(PREPARED.get(page.stem, lambda folder: None)(folder) or {})
    for block in blocks(page):
        where = f"{page.name}, line {block.line}"
        if block.language == "python":
            tree = compile(block.code, where, "exec", flags=ast.PyCF_ONLY_AST)
            if block.reason is None:
                exec(compile(tree, where, "exec"), namespace)
        elif not block.language and block.reason is None:
            for command in commands(block.code):
                result = CliRunner().invoke(app, with_ray_address(command))
                assert result.exit_code == 0, f"{where}: mmlens {command}\n{result.output}"


LONG = {
    "ablate_an_object",
    "edit_a_fact",
    "path_patching",
    "patchscopes_on_visual_tokens",
    "reproduce_the_paper",
    "steer_against_a_hallucination",
    "your_own_intervention",
}
"""Notebooks that take from a quarter of a minute to most of one."""


@pytest.mark.parametrize(
    "notebook",
    [
        pytest.param(each, id=each.stem, marks=[pytest.mark.slow] * (each.stem in LONG))
        for each in NOTEBOOKS
    ],
)
def test_every_notebook_runs(notebook: Path, folder: Path, monkeypatch) -> None:
    monkeypatch.setenv("MMLENS_CHECK", "1")  # where a larger model is meant
    with torch.enable_grad():  # and after it as it was, whatever the notebook sets
        exec(compile(notebook.read_text(encoding="utf-8"), str(notebook), "exec"), {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_targets_of_make_that_pages_name() -> None:
    known = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        for block in blocks(page):
            named = re.findall(r"^make ([\w-]+)", block.code, re.MULTILINE)
            assert set(named) <= known, page.name
