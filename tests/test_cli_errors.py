"""Every command: no control character reaches the terminal, and what fails is one line.

The commands run in this process, on a checkpoint, images and questions whose names, words and
tokens hold escape sequences.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from cli_cases import WRITING, command, folder, made_place, one_line, run
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_results import optional
from test_terminal import MARK, OWN, evil_in

from mmlens import CausalTrace, HookedMultimodalTransformer
from mmlens.analyses.attention_contribution import AttentionContribution
from mmlens.checkpoints import parity
from mmlens.editing import Edit
from mmlens.plots import save
from mmlens.plots.figure_folder import stamp
from mmlens.plots.report import ReportedPrompt
from mmlens.reproduce import Settings, is_complete
from mmlens.sweeps import Sweep
from mmlens.utils import files


@pytest.fixture(autouse=True)
def no_browser(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> bytes:
        raise save.FigureNotSaved(f"no browser here {MARK}")

    monkeypatch.setattr(save, "render", fail)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def done(place: Path) -> Callable[[str], tuple[int, str, str]]:
    """What a command prints on a terminal, undisturbed; it is run once, into the place."""

    @functools.cache
    def done(name: str) -> tuple[int, str, str]:
        for before, after in (("trace", "report"), ("sweep", "summarize")):
            if name == after:
                done(before)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FORCE_COLOR", "1")
            patch.setenv("COLUMNS", "200")
            return run(*command(place, name, folder(place, name)))

    return done


# Control characters


@pytest.mark.parametrize("name", WRITING)
def test_what_commands_print(done, name):
    code, out, err = done(name)
    assert code == (3 if name == "sweep" else 0), err  # an image of the sweep is missing
    assert "EVIL" in out + err
    assert not evil_in(out) and not evil_in(err)


def test_verify_prints_no_control_characters(place, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(parity, "find_reference", lambda _: None)
    monkeypatch.setattr(parity, "hooks_alive", lambda *_: parity.Check("hooks", True, MARK))
    code, out, err = run("verify", place / f"model {MARK}")
    assert code == 0, out
    assert "EVIL" in out and not evil_in(out + err)


def test_what_is_written_stays_as_it_is(done, place):
    done("trace")
    prompt = ReportedPrompt.load(folder(place, "trace") / "prompt.safetensors")
    assert MARK in prompt.text and any(MARK in text for text, *_ in prompt.answers)


@pytest.mark.parametrize(
    "arguments",
    [
        (MARK,),
        ("trace", MARK, "q", "--constraint", "q"),
        ("trace", "x.png", "q", "--constraint", "q", f"--{MARK}"),
        ("demo", "--country", MARK),
        ("report", MARK),
        ("verify", f"/{MARK}"),
        ("reproduce", MARK),
        ("sweep", MARK, "--out", "/dev/null/x"),
        ("summarize", MARK),
        ("edit-bench", "--methods", MARK, "--layers", MARK),
    ],
)
def test_errors_that_quote_the_user(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = one_line(2, *arguments)
    assert "EVIL" in said or "/dev/null" in said


def test_help_and_mistakes_of_ours(place, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    code, out, err = run("trace", "--help")
    assert code == 0 and "--constraint" in OWN.sub("", out) and not evil_in(out + err)

    def broken(*_: Any, **__: Any) -> None:
        raise TypeError(f"a mistake {MARK}")

    monkeypatch.setattr(HookedMultimodalTransformer, "from_pretrained", broken)
    code, out, err = run(*command(place, "trace", place / "mistake"))
    assert code == 1 and "Traceback" in err and "in broken" in err and "a mistake" in err
    assert not evil_in(out + err)


# A full disk and the like


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Let the kernel refuse a write in the middle of a file, as on a full disk."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def check_complete(folder: Path) -> None:
    """Whatever has its final name is whole, and nothing else is left."""
    for path in folder.rglob("*"):
        assert not files.UNFINISHED.fullmatch(path.name)
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                assert file.metadata()
        elif path.suffix == ".parquet":
            pq.read_table(path)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".html":
            assert path.read_text().rstrip().endswith("</html>")


@pytest.mark.parametrize("name", WRITING)
def test_files_may_not_be_as_large_as_they_are(done, place, tmp_path, seed, name):
    done(name)
    sizes = [
        path.stat().st_size
        for path in folder(place, name).rglob("*")
        if path.is_file() and path.suffix != ".txt"
    ]
    with files_of_at_most(random.randrange(max(sizes))):
        said = one_line(1, *command(place, name, tmp_path / "out"))
    assert os.strerror(errno.EFBIG) in said and str(tmp_path).rsplit("/", 1)[1] in said
    check_complete(tmp_path)


def of_system(name: str) -> OSError:
    code = getattr(errno, name)
    return OSError(code, os.strerror(code))


@pytest.mark.parametrize(
    ("error", "code"),
    [
        *((of_system(name), 1) for name in ("ENOSPC", "EDQUOT", "EFBIG", "EIO", "ENOMEM")),
        *((of_system(name), 2) for name in ("EACCES", "EPERM", "EROFS", "ENAMETOOLONG")),
        (MemoryError(), 1),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried"), 1),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 1),
    ],
    ids=repr,
)
def test_whatever_the_system_refuses(done, place, tmp_path, monkeypatch, error, code):
    done("trace")

    def refused(*_: Any) -> None:
        raise error

    monkeypatch.setattr(files.os, random.choice(["replace", "fsync"]), refused)
    said = one_line(code, *command(place, "report", tmp_path))
    if isinstance(error, OSError):
        assert str(error.strerror) in said and "page.html" in said
    else:
        assert "memory" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", WRITING)
def test_names_that_are_too_long(place, tmp_path, name):
    words = command(place, name, tmp_path / ("x" * 300))
    assert os.strerror(errno.ENAMETOOLONG) in one_line(2, *words)
    assert not list(tmp_path.iterdir())


def test_stdout_on_a_full_disk():
    program = "from mmlens.cli import main; main(['--help'])"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", program], stdout=full, stderr=subprocess.PIPE, text=True,
            check=False,
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == "mmlens: cannot write: No space left on device\n"


def test_errors_in_python_have_the_path(place, tmp_path, seed):
    model = HookedMultimodalTransformer.from_pretrained(place / f"model {MARK}")
    source = Path(model.checkpoint or "")
    sizes = [path.stat().st_size for path in source.iterdir()]
    for limit in (0, random.randrange(max(sizes)), max(sizes) // 2):
        with files_of_at_most(limit), pytest.raises(OSError) as caught:
            model.save_pretrained(tmp_path / "saved")
        assert (caught.value.errno, caught.value.filename) == (
            errno.EFBIG, str(tmp_path / "saved"),
        )  # fmt: skip
        assert not list(tmp_path.iterdir())
    edit = Edit({"a weight": torch.ones(9)}, {"a weight": {}})
    with files_of_at_most(10), pytest.raises(OSError) as caught:
        edit.save(tmp_path / "edit.safetensors")
    assert caught.value.filename == str(tmp_path / "edit.safetensors")
    assert not list(tmp_path.iterdir())


# Files that hold something else


def changed_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def text_as(*names: str) -> Callable[[Path], None]:
    """Text in a file, and for an index one that names it."""

    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        for name in names:
            text = json.dumps({"weight_map": {"x": "notes.txt"}}) if "index" in name else "hello"
            (folder / name).write_text(text)

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "config.json").write_text("[]"),
        lambda folder: (folder / "config.json").write_text("{"),
        changed_config(dtype="nonsense"),
        changed_config(text_config="llama"),
        changed_config(vision_feature_layer="last"),
        changed_config(image_token_index=[1]),
        text_as("model.safetensors"),
        text_as("pytorch_model.bin"),
        text_as("model.safetensors.index.json", "notes.txt"),
        text_as("pytorch_model.bin.index.json", "notes.txt"),
    ],
)
def test_checkpoints_that_are_something_else(place, tmp_path, change):
    words = command(place, "trace", tmp_path / "out")
    model = tmp_path / "changed"
    shutil.copytree(place / f"model {MARK}", model)
    change(model)
    said = one_line(2, *words, "--model", model)
    assert "changed" in said


@pytest.mark.parametrize("name", ["prompt", "trace", "contributions"])
def test_reports_of_results_with_other_fields(done, place, tmp_path, seed, name):
    done("trace")
    shutil.copytree(folder(place, "trace"), tmp_path / "results")
    path = tmp_path / "results" / f"{name}.safetensors"
    with safe_open(path, framework="pt") as file:
        ((kind, text),) = file.metadata().items()
    rest, tensors = json.loads(text), load_file(path)
    classes = {each.__name__: each for each in (ReportedPrompt, CausalTrace, AttentionContribution)}
    victim = random.choice(sorted(rest.keys() - optional(classes[kind])))
    for fields in ({**rest, "more": 1}, {k: v for k, v in rest.items() if k != victim}, []):
        save_file(tensors, path, {kind: json.dumps(fields)})
        said = one_line(2, "report", tmp_path / "results")
        assert f"{path.name} holds no {kind}" in said
    assert not (tmp_path / "results" / "report.html").exists()


def without(table: pa.Table, name: str) -> pa.Table:
    return table.drop_columns([name])


@pytest.mark.parametrize(
    "change",
    [
        without,
        lambda table, name: table.append_column("more", [[1] * len(table)]),
        lambda table, name: table.replace_schema_metadata(None),
        lambda table, name: table.replace_schema_metadata({"mmlens": "[]"}),
        lambda table, name: table.replace_schema_metadata({"mmlens": '{"failures": []}'}),
    ],
)
def test_summaries_of_shards_with_other_fields(done, place, tmp_path, seed, change):
    done("sweep")
    shutil.copytree(folder(place, "sweep"), tmp_path / "sweep")
    path = random.choice(sorted((tmp_path / "sweep" / "results").iterdir()))
    table = pq.read_table(path)
    pq.write_table(change(table, random.choice(table.column_names)), path)
    assert path.name in one_line(2, "summarize", tmp_path / "sweep")
    with pytest.raises(ValueError, match=path.name):
        Sweep(tmp_path / "sweep").summarize()


def test_sweeps_with_other_manifests(done, place, tmp_path, seed):
    done("sweep")
    shutil.copytree(folder(place, "sweep"), tmp_path / "sweep")
    path = tmp_path / "sweep" / "manifest.json"
    good = json.loads(path.read_text())
    victim = random.choice(sorted(good.keys() - {"begun"}))
    wrong = {**good, victim: random.choice([None, 1.5, [1]])}
    less = {name: value for name, value in good.items() if name != victim}
    for bad in ([], None, "text", wrong, less, {**good, "keys": ["nothing"]}):
        path.write_text(json.dumps(bad))
        assert "manifest.json" in one_line(2, "summarize", tmp_path / "sweep")
        with pytest.raises(ValueError, match=r"manifest\.json"):
            Sweep(tmp_path / "sweep")


def test_records_of_figures_that_are_something_else(tmp_path):
    """The figure is made again."""
    settings = Settings()
    path = tmp_path / "layers" / "settings.json"
    path.parent.mkdir()
    good = {**stamp("layers", settings), "files": ["settings.json"]}
    path.write_text(json.dumps(good))
    assert is_complete("layers", settings, tmp_path)
    for bad in ([], None, {}, {**good, "files": 3}, {**good, "files": [3]}):
        path.write_text(json.dumps(bad))
        assert not is_complete("layers", settings, tmp_path)
