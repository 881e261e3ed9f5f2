"""Sweeps that are killed, find the disk full or their files cut off; and then go on.

The statement is the same in all tests: the table in the end is that of an undisturbed sweep. What
is to be killed runs in a forked process, which does not have to import torch again.
"""

from __future__ import annotations

import errno
import os
import random
import resource
import secrets
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from interruptions import every_line, interrupted_at_random
from sweep_cases import assert_same, die, in_child, made_model, made_questions, swept
from test_edit import random_edit

from mmlens.sweeps import Sweep, folder, worker
from mmlens.utils import files, resumable, temporary

sweep_run = sys.modules["mmlens.sweeps.run"]

KILLED = -9
DISK, PAGE = 2**18, 2**12
WRITES = 5
"""Files of the sweep: manifest, failures, three shards."""
POINTS = ("token_hex", "fsync", "replace", "after replace")


@pytest.fixture
def model(seed):
    return made_model(seed)


@pytest.fixture
def questions(tmp_path):
    return made_questions(tmp_path)


@pytest.fixture
def expected(model, questions, tmp_path):
    return swept(model, questions, tmp_path / "undisturbed")


def killed_until_complete(run: Callable[[], object], out: Path, seconds: float) -> None:
    """Kill it at random moments, and then let it finish."""
    for _ in range(4):
        exit_code = in_child(run, kill_after=random.uniform(0, seconds))
        assert exit_code in (0, KILLED)
        check_readable(out)
    assert in_child(run) == 0


def check_readable(out: Path) -> None:
    """Whatever has its final name is complete."""
    if (out / "manifest.json").exists() and list((out / "results").iterdir()):
        found = Sweep(out)
        assert found.table().num_rows > 0
        assert found.n_failed == 0


@pytest.mark.parametrize("sweeps", [1, pytest.param(12, marks=pytest.mark.slow)])
def test_killed_at_random_moments(model, questions, expected, tmp_path, sweeps):
    out = tmp_path / "out"
    began = time.monotonic()
    assert in_child(lambda: swept(model, questions, tmp_path / "timed")) == 0
    seconds = time.monotonic() - began
    for repeat in range(sweeps):
        again = out / str(repeat)
        killed_until_complete(lambda to=again: swept(model, questions, to), again, seconds)
        assert_same(Sweep(again), expected)


@pytest.mark.parametrize("times", [4, pytest.param(60, marks=pytest.mark.slow)])
def test_ctrl_c_at_random_moments(model, questions, expected, tmp_path, times):
    """In a notebook, say, where the same process goes on."""
    out = tmp_path / "out"
    for _ in range(times):
        interrupted_at_random(lambda: swept(model, questions, out), seconds=0.3)
        check_readable(out)
    assert_same(swept(model, questions, out), expected)
    assert free(model)


def free(model) -> bool:
    """Whether no hook is on the model, and no thread has it."""
    return not model.list_hooks() and not model.run_lock._inside


def test_a_sweep_in_a_block_that_has_the_model(model, questions, expected, tmp_path):
    """The thread that reads ahead has no need of the model, for which it would wait for ever."""
    with model.exclusive(), random_edit(model).applied(model):
        edited = swept(model, questions, tmp_path / "edited")
    assert edited.n_failed == 0 and edited.n_done == expected.n_done
    assert edited.manifest["model"]["hash"] != expected.manifest["model"]["hash"]
    assert_same(swept(model, questions, tmp_path / "out"), expected)


@pytest.mark.parametrize("most", [3, pytest.param(80, marks=pytest.mark.slow)])
def test_interrupted_at_every_line(model, questions, expected, tmp_path, most):
    numbers = iter(range(10**6))
    out = tmp_path

    def run() -> None:
        nonlocal out
        out = tmp_path / str(next(numbers))
        swept(model, questions, out)

    modules = (folder, files, resumable, worker, sweep_run, temporary)
    for stop in every_line(run, *modules, most=most):
        # Somebody still holds the traceback, and yet the folder is not locked any more.
        check_readable(out)
        assert_same(swept(model, questions, out), expected)
        assert free(model), stop.line


@pytest.mark.parametrize("point", POINTS)
def test_killed_while_a_file_is_written(model, questions, expected, tmp_path, monkeypatch, point):
    out = tmp_path / "out"
    victim = random.randrange(WRITES)
    child = disturbed(monkeypatch, point, victim, die)
    assert in_child(lambda: child(lambda: swept(model, questions, out))) == KILLED
    check_readable(out)
    assert_same(swept(model, questions, out), expected)


def disturbed(
    monkeypatch: pytest.MonkeyPatch, point: str, victim: int, trouble: Callable[[], None]
) -> Callable[[Callable[[], object]], object]:
    """Make trouble at a point of one of the writes, while something runs."""
    name = point.rpartition(" ")[2]
    module = secrets if name == "token_hex" else os
    original, count = getattr(module, name), [0]

    def wrapped(*arguments, **options):
        # A write syncs twice: the file, and then its folder.
        count[0] += 1
        now = count[0] == (2 * victim + 1 if name == "fsync" else victim + 1)
        if now and not point.startswith("after"):
            trouble()
        result = original(*arguments, **options)
        if now:
            trouble()
        return result

    def run(body: Callable[[], object]) -> object:
        with monkeypatch.context() as patch:
            patch.setattr(module, name, wrapped)
            return body()

    return run


def no_space() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("point", POINTS)
def test_the_disk_is_full(model, questions, expected, tmp_path, monkeypatch, point):
    out = tmp_path / "out"
    run = disturbed(monkeypatch, point, random.randrange(WRITES), no_space)
    with pytest.raises(OSError, match="No space left"):
        run(lambda: swept(model, questions, out))
    check_readable(out)
    assert not list((out / ".unfinished").iterdir())
    assert "No space left" in (out / "log.txt").read_text()
    assert_same(swept(model, questions, out), expected)


def test_files_may_not_be_as_large_as_they_are(model, questions, expected, tmp_path):
    """The kernel refuses a write in the middle of a file."""
    out = tmp_path / "out"
    size = min(path.stat().st_size for path in expected.folder.results.iterdir())

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))
        swept(model, questions, out)

    assert in_child(limited) == 1
    assert not list((out / "results").iterdir())
    assert_same(swept(model, questions, out), expected)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB, where we may mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount here")
    if done.returncode:
        pytest.skip(f"may not mount a small disk: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_small_disk_fills_up(model, questions, expected, small_disk):
    out, ballast = small_disk / "out", small_disk / "ballast"
    files = [path for path in expected.folder.path.rglob("*") if path.is_file()]
    needed = sum(-(-path.stat().st_size // PAGE) for path in files)
    room = random.randint(2, needed - 2)
    ballast.write_bytes(bytes(DISK - room * PAGE))
    with pytest.raises(OSError, match="No space left"):
        swept(model, questions, out)
    check_readable(out)
    ballast.unlink()
    assert_same(swept(model, questions, out), expected)


@pytest.mark.parametrize("damage", ["cut off", "empty", "from another sweep", "no parquet"])
def test_damaged_files_are_done_again(model, questions, expected, tmp_path, damage):
    out = tmp_path / "out"
    found = swept(model, questions, out)
    victim = random.choice(list(found.folder.results.iterdir()))
    content = victim.read_bytes()
    if damage == "cut off":
        victim.write_bytes(content[: random.randrange(1, len(content))])
    elif damage == "empty":
        victim.write_bytes(b"")
    elif damage == "no parquet":
        victim.write_bytes(b"PAR1" + os.urandom(500))
    else:
        other = swept(model, questions, tmp_path / "other", windows=(2,))
        victim.write_bytes((other.folder.results / victim.name).read_bytes())
    assert_same(swept(model, questions, out), expected)
    assert f"{victim.name} is thrown away" in (out / "log.txt").read_text()


def test_flipped_bits_are_noticed_when_they_are_read(model, questions, tmp_path):
    found = swept(model, questions, tmp_path / "out")
    victim = random.choice(list(found.folder.results.iterdir()))
    content = bytearray(victim.read_bytes())
    columns = pq.ParquetFile(victim).metadata.row_group(0)
    names = [columns.column(index).path_in_schema for index in range(columns.num_columns)]
    column = columns.column(names.index("restored"))
    end = (column.dictionary_page_offset or column.data_page_offset) + column.total_compressed_size
    content[end - random.randint(1, 8)] ^= 0xFF  # at the end of its last page
    victim.write_bytes(bytes(content))
    with pytest.raises((OSError, ValueError)):
        Sweep(tmp_path / "out").table()


def test_a_failure_and_a_kill(model, questions, tmp_path):
    """Failures are in their shard's file: they are neither lost nor doubled."""
    questions[0].image.write_bytes(b"no image")
    expected = swept(model, questions, tmp_path / "undisturbed")
    assert expected.n_failed > 0
    out = tmp_path / "out"

    def dies() -> None:
        original = os.replace

        def replace(source, target):
            original(source, target)
            if "shard-000000" in str(target):
                die()

        os.replace = replace
        swept(model, questions, out)

    assert in_child(dies) == KILLED
    assert_same(swept(model, questions, out), expected)


@pytest.mark.slow
def test_the_command_is_killed_and_started_again(tmp_path):
    """As a user would: another interpreter, SIGKILL, the same command."""
    command = [sys.executable, "-m", "mmlens", "sweep", "contributions", "--data", "demo"]
    command += ["--limit", "12", "--shard-size", "2", "--model", str(tiny_folder(tmp_path))]
    subprocess.run([*command, "--out", str(tmp_path / "undisturbed")], check=True)
    out = tmp_path / "out"
    killed = subprocess.Popen([*command, "--out", str(out)])
    while not list(out.glob("results/*.parquet")) and killed.poll() is None:
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    subprocess.run([*command, "--out", str(out)], check=True)
    assert_same(Sweep(out), Sweep(tmp_path / "undisturbed"))


def tiny_folder(tmp_path: Path) -> Path:
    from tiny_checkpoint import write_tiny_llava

    return write_tiny_llava(tmp_path / "model")
