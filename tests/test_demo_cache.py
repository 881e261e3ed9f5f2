"""The demo's language model in the cache: whatever has happened to its files, it is whole, or made
anew with a word. The model itself is too large for this: a small folder stands in for it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mmlens.demo import integrity, language_model
from mmlens.demo.integrity import HASHES, damage, write_hashes
from mmlens.demo.language_model import LanguageModelUnavailable, language_model_folder

WEIGHTS = "model.safetensors"


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that were built, in a cache of their own; building takes no time."""
    monkeypatch.setenv("MMLENS_CACHE", str(tmp_path))
    monkeypatch.setattr(integrity, "CHUNK", 1000)
    monkeypatch.setattr(language_model, "_obtain_gguf", lambda scratch: scratch)
    built: list[Path] = []

    def convert(_: Path, folder: Path) -> None:
        generator = torch.Generator().manual_seed(3)
        save_file({"w": torch.randn(37, 41, generator=generator)}, folder / WEIGHTS)
        (folder / "tokenizer.json").write_text('{"a": 1}')
        (folder / "config.json").write_text("{}")
        write_hashes(folder)
        built.append(folder)

    monkeypatch.setattr(language_model, "_convert", convert)
    return built


def flip(file: Path, seed: int) -> None:
    content = bytearray(file.read_bytes())
    content[seed % len(content)] ^= 1 << seed % 8
    file.write_bytes(content)


def test_what_is_whole_is_taken_as_it_is(
    made: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = language_model_folder()
    assert folder.parent == tmp_path and damage(folder) is None
    before = load_file(folder / WEIGHTS)["w"]
    assert language_model_folder() == folder and len(made) == 1
    assert torch.equal(load_file(folder / WEIGHTS)["w"], before)
    assert "damaged" not in capsys.readouterr().err
    assert [each.name for each in tmp_path.iterdir()] == [folder.name]


@pytest.mark.parametrize("name", [WEIGHTS, "tokenizer.json", "config.json", HASHES])
@pytest.mark.parametrize("change", ["one bit", "missing", "cut off", "empty", "longer"])
def test_what_has_changed_is_made_anew(
    change: str,
    name: str,
    made: list[Path],
    seed: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = language_model_folder()
    expected = {each.name: each.read_bytes() for each in folder.iterdir()}
    file = folder / name
    if change == "one bit":
        flip(file, seed)
    elif change == "missing":
        file.unlink()
    else:
        content = file.read_bytes()
        cut = {"cut off": content[:-1], "empty": b"", "longer": content + b"1"}
        file.write_bytes(cut[change])
    capsys.readouterr()
    language_model_folder()
    said = capsys.readouterr().err
    assert len(made) == 2 and "is damaged" in said and "making it anew" in said
    assert name in said or name == HASHES
    assert {each.name: each.read_bytes() for each in folder.iterdir()} == expected
    assert [each.name for each in tmp_path.iterdir()] == [folder.name]


def test_what_was_added_or_made_by_an_earlier_version(made: list[Path]) -> None:
    folder = language_model_folder()
    (folder / "added_tokens.json").write_text("{}")  # which transformers would read
    language_model_folder()
    assert len(made) == 2 and not (folder / "added_tokens.json").exists()
    (folder / HASHES).unlink()
    language_model_folder()
    assert len(made) == 3 and damage(folder) is None


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left")],
    ids=lambda error: type(error).__name__,
)
def test_a_full_disk(
    error: Exception, made: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One error, for which the command line says one line and exits with 1; nothing is left."""

    def fail(_: Path, folder: Path) -> None:
        (folder / WEIGHTS).write_bytes(b"half of it")
        raise error

    monkeypatch.setattr(language_model, "_convert", fail)
    with pytest.raises(LanguageModelUnavailable, match="No space left"):
        language_model_folder()
    assert not list(tmp_path.iterdir())


def test_a_damaged_folder_stays_where_it_cannot_be_made_anew(
    made: list[Path], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = language_model_folder()
    flip(folder / WEIGHTS, seed)

    def fail(_: Path) -> Path:
        raise LanguageModelUnavailable("no network")

    monkeypatch.setattr(language_model, "_obtain_gguf", fail)
    for _ in range(2):  # never taken
        with pytest.raises(LanguageModelUnavailable, match="no network"):
            language_model_folder()
    assert (folder / WEIGHTS).exists()


def test_hashes_are_of_every_byte(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a file has more chunks than one, or none."""
    monkeypatch.setattr(integrity, "CHUNK", 64)
    for size in (0, 1, 63, 64, 65, 64 * 5, 1000):
        file = tmp_path / "file"
        file.write_bytes(os.urandom(size))
        first = integrity.digest(file)
        assert integrity.digest(file) == first
        if size:
            flip(file, seed)
            assert integrity.digest(file) != first
            file.write_bytes(file.read_bytes()[:-1])
            assert integrity.digest(file) != first
