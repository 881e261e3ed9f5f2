"""What can be stopped and resumed: which items are done, what is made again, and whose folder."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from jaxtyping import Float
from sweep_cases import die, in_child
from torch import Tensor

from mmlens.analyses.result import SavedResult
from mmlens.utils.resumable import FolderInUse, ResultFile, Resumable, locked


@dataclass(frozen=True, eq=False)
class Squares(SavedResult):
    values: Float[Tensor, " n"]
    metadata: dict[str, Any] = field(default_factory=dict)


def squares(n: int) -> Squares:
    return Squares(torch.arange(float(n)) ** 2, {"failed": "odd" if n % 2 else ""})


def files(folder, items, **stamp):
    return {n: ResultFile(Squares, folder / "new" / f"{n}.safetensors", stamp) for n in items}


def test_what_is_missing_is_made_in_the_order_of_the_items(tmp_path, seed):
    items = random.sample(range(1, 90), 7)
    made, moves = [], []

    def stopped(n):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(n)
        return squares(n)

    with pytest.raises(KeyboardInterrupt):
        Resumable(files(tmp_path, items, step=1)).each(stopped)
    assert made == items[:3] and len(list((tmp_path / "new").iterdir())) == 3
    order = random.sample(items, 7)
    run = Resumable(files(tmp_path, order, step=1), lambda *counts: moves.append(counts))
    assert set(run.found) == set(made) and run.missing == [n for n in order if n not in made]
    found = run.each(squares)
    assert list(found) == order and run.missing == []
    assert moves == [(done, 7) for done in range(3, 8)]
    for n, each in found.items():
        assert torch.equal(each.values, torch.arange(float(n)) ** 2)
        assert each.metadata == {"failed": "odd" if n % 2 else "", "step": 1}
    again = Resumable(files(tmp_path, items, step=1)).each(pytest.fail)
    assert [each.metadata for each in again.values()] == [found[n].metadata for n in items]


def test_files_of_other_settings_and_damaged_ones_are_not_taken(tmp_path):
    items = range(2, 7)
    Resumable(files(tmp_path, items, step=1, more=[1])).each(squares)
    assert Resumable(files(tmp_path, items, step=1)).missing == []  # it names less
    assert Resumable(files(tmp_path, items, step=2)).missing == list(items)
    victim = random.choice(items)
    path = files(tmp_path, items)[victim].path
    path.write_bytes(path.read_bytes()[: random.randrange(path.stat().st_size)])
    assert Resumable(files(tmp_path, items, step=1)).missing == [victim]


def test_nothing_is_kept_without_a_file(tmp_path):
    run = Resumable(dict.fromkeys([3, 5]))
    assert run.missing == [3, 5]
    assert run.each(squares)[5].metadata == {"failed": "odd"}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("file", [None, ".lock"])
def test_a_folder_is_one_runs_at_a_time(tmp_path, file):
    """Of another process, and of this one; the system lets go of a process that is killed."""
    folder = tmp_path / "a" / "folder"

    def refused():
        with pytest.raises(FolderInUse, match=f"another test is writing to {folder}"):  # noqa: SIM117
            with locked(folder, "test", file):
                pass

    def killed():
        with locked(folder, "test", file):
            die()

    with locked(folder, "test", file) as made:
        assert made == folder and folder.is_dir()
        refused()
        assert in_child(refused) == 0
    assert in_child(killed) == -9
    with locked(folder, "test", file):
        pass
