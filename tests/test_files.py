"""Files and folders are there whole or not at all, with usual modes; what is left is removed."""

from __future__ import annotations

import os
import random
import shutil
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from interruptions import every_line, interrupted_at_random
from random_models import hooked, random_llava
from sweep_cases import die, in_child

from mmlens.checkpoints import saving
from mmlens.demo import language_model
from mmlens.utils import files, temporary
from mmlens.utils.files import (
    new_folder,
    remove_unfinished,
    unfinished_file,
    write_atomically,
)

KILLED = -9


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fill(folder: Path) -> None:
    """Files as some libraries and copies leave them."""
    (folder / "private").write_bytes(b"x" * 1000)
    (folder / "private").chmod(0o600)
    (folder / "inner").mkdir(mode=0o700)
    (folder / "inner" / "tool").write_text("text")
    (folder / "inner" / "tool").chmod(0o755)


def make_folder(path: Path) -> None:
    with new_folder(path) as folder:
        fill(folder)


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_modes_are_those_of_any_new_file(tmp_path, umask, seed):
    file = write_atomically(tmp_path / "file", "text")
    make_folder(tmp_path / "folder")
    model = hooked(random_llava(), tmp_path / "source")
    saved = model.save_pretrained(tmp_path / "saved")
    made = [file, *(tmp_path / "folder").rglob("*"), *saved.rglob("*"), tmp_path / "folder", saved]
    assert len(made) > 8 and any(path.suffix == ".safetensors" for path in made)
    for path in made:
        assert mode(path) == (0o777 if path.is_dir() else 0o666) & ~umask, path


def test_a_copy_has_not_the_mode_of_its_source(tmp_path, umask):
    (tmp_path / "source").mkdir(mode=0o755)
    (tmp_path / "source" / "it").write_text("1")
    (tmp_path / "source").chmod(0o705)
    with new_folder(tmp_path / "copy") as scratch:
        shutil.copytree(tmp_path / "source", scratch, dirs_exist_ok=True)
    assert mode(tmp_path / "copy") == 0o777 & ~umask
    assert mode(tmp_path / "copy" / "it") == 0o666 & ~umask


def test_nobody_changes_the_umask(tmp_path, monkeypatch):
    """It is the whole process's: another thread would make files with it in the meantime."""
    monkeypatch.setattr(os, "umask", lambda _: pytest.fail("the umask was changed"))
    write_atomically(tmp_path / "file", b"x")
    make_folder(tmp_path / "folder")


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_a_file_interrupted_at_every_line(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")
    for stop in every_line(lambda: write_atomically(path, "new"), files, temporary, error=error):
        assert names(tmp_path) == ["file"], stop.line
        assert path.read_text() in ("old", "new")
        path.write_text("old")


def test_a_folder_interrupted_at_every_line(tmp_path):
    numbers = iter(range(10**6))
    path = tmp_path / "0"

    def make() -> None:
        nonlocal path
        path = tmp_path / str(next(numbers))
        make_folder(path)

    for stop in every_line(make, files, temporary):
        assert {each for each in names(tmp_path) if each.startswith(".")} == set(), stop.line
        if path.exists():
            assert len(list(path.rglob("*"))) == 3, stop.line


@pytest.mark.parametrize("most", [15, pytest.param(300, marks=pytest.mark.slow)])
def test_saving_a_model_interrupted_at_every_line(tmp_path, seed, most):
    model = hooked(random_llava(), tmp_path / "source")
    whole = names(model.save_pretrained(tmp_path / "whole"))
    numbers = iter(range(10**6))
    target = tmp_path / "0"

    def save() -> None:
        nonlocal target
        target = tmp_path / str(next(numbers))
        model.save_pretrained(target)

    for stop in every_line(save, saving, files, temporary, most=most):
        assert not [each for each in names(tmp_path) if each.startswith(".")], stop.line
        assert not target.exists() or names(target) == whole, stop.line


@pytest.mark.parametrize("times", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_signals_while_files_are_written(tmp_path, times):
    content = os.urandom(3_000_000)
    path = tmp_path / "file"
    interrupted = 0
    for _ in range(times):
        path.unlink(missing_ok=True)
        interrupted += interrupted_at_random(lambda: write_atomically(path, content))
        assert not path.exists() or path.read_bytes() == content
        assert names(tmp_path) in ([], ["file"])
    assert interrupted


def killed_inside(block: Callable[[], Any]) -> Callable[[], None]:
    def run() -> None:
        with block() as inside:
            if isinstance(inside, Path):
                fill(inside)
            else:
                inside.write(b"half")
                inside.flush()
            die()

    return run


@pytest.mark.parametrize("what", ["file", "folder"])
def test_what_a_killed_process_leaves_is_removed_by_the_next_writer(tmp_path, what):
    blocks = {
        "file": lambda: unfinished_file(tmp_path, "results.parquet"),
        "folder": lambda: new_folder(tmp_path / "out"),
    }
    assert in_child(killed_inside(blocks[what])) == KILLED
    [left] = names(tmp_path)
    assert left.startswith(".") and left.endswith(".unfinished")
    if random.random() < 0.5:
        make_folder(tmp_path / "next")
    else:
        write_atomically(tmp_path / "next", b"x")
    assert names(tmp_path) == ["next"]


def test_a_model_whose_saving_was_killed_can_be_saved_again(tmp_path, seed, monkeypatch):
    model = hooked(random_llava(), tmp_path / "source")

    def killed() -> None:
        monkeypatch.setattr(saving, "save_file", lambda *_, **__: die())
        model.save_pretrained(tmp_path / "out")

    assert in_child(killed) == KILLED
    assert len(names(tmp_path)) == 2 and not (tmp_path / "out").exists()
    model.save_pretrained(tmp_path / "out")
    assert names(tmp_path) == ["out", "source"]


def test_what_others_are_writing_stays(tmp_path):
    """In this process or another; and what only looks alike."""
    (tmp_path / ".out-old").mkdir()
    (tmp_path / ".env").write_text("mine")
    (tmp_path / "report-0123456789abcdef.unfinished").write_text("mine")
    (tmp_path / ".link-0123456789abcdef.unfinished").symlink_to(tmp_path / ".out-old")
    mine = names(tmp_path)
    with unfinished_file(tmp_path, "a") as stream, new_folder(tmp_path / "b") as folder:
        fill(folder)
        stream.write(b"half")
        theirs = {Path(stream.name).name, folder.name}
        assert in_child(lambda: write_atomically(tmp_path / "c", "x")) == 0
        write_atomically(tmp_path / "d", "x")
        assert set(names(tmp_path)) == {*mine, *theirs, "c", "d"}
    assert set(names(tmp_path)) == {*mine, "b", "c", "d"}
    assert len(list((tmp_path / "b").rglob("*"))) == 3


def test_many_writers_at_once(tmp_path):
    """Each removes what is left; none what another is writing."""
    errors: list[BaseException] = []

    def write(index: int) -> None:
        try:
            for turn in range(15):
                write_atomically(tmp_path / f"{index}", f"{turn}" * 1000)
                make_folder(tmp_path / f"folder {index} {turn}")
                remove_unfinished(tmp_path)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(names(tmp_path)) == 6 + 6 * 15
    assert all(each.read_text() == "14" * 1000 for each in tmp_path.iterdir() if each.is_file())


def test_where_there_are_no_locks_nothing_is_removed(tmp_path, monkeypatch):
    def no_locks(*_: Any) -> None:
        raise OSError(files.NO_LOCKS[0], "no locks here")

    assert in_child(killed_inside(lambda: unfinished_file(tmp_path, "a"))) == KILLED
    left = names(tmp_path)
    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    write_atomically(tmp_path / "b", "x")
    make_folder(tmp_path / "c")
    assert names(tmp_path) == [*left, "b", "c"]


def test_a_long_name(tmp_path):
    name = "\N{GREEK SMALL LETTER ALPHA}" * 127  # 254 bytes; a file system takes 255
    assert write_atomically(tmp_path / name, "x").read_text() == "x"


def test_the_first_conversion_is_killed(tmp_path, monkeypatch):
    """By the next run its scratch folder is gone, whether that converts again or need not."""
    monkeypatch.setenv("MMLENS_CACHE", str(tmp_path))
    monkeypatch.setattr(language_model, "_obtain_gguf", lambda scratch: scratch / "x.gguf")

    def convert(_: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(bytes(1000))
        (folder / "model.safetensors").chmod(0o600)

    def killed_while_it_converts() -> None:
        def die_converting(gguf: Path, folder: Path) -> None:
            convert(gguf, folder)
            die()

        monkeypatch.setattr(language_model, "_convert", die_converting)
        language_model.language_model_folder()

    assert in_child(killed_while_it_converts) == KILLED
    assert names(tmp_path)
    monkeypatch.setattr(language_model, "_convert", convert)
    folder = language_model.language_model_folder()
    assert names(tmp_path) == [folder.name] and names(folder) == ["model.safetensors"]
    assert mode(folder / "model.safetensors") == mode(folder) & 0o666
    with unfinished_file(tmp_path, "a") as stream:
        left = Path(stream.name).with_name(".a-0123456789abcdef.unfinished")
        left.mkdir()
        assert language_model.language_model_folder() == folder
        assert set(names(tmp_path)) == {folder.name, Path(stream.name).name}
