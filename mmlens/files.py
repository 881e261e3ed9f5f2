"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_atomically(path: str | Path, content: bytes | str, scratch: Path | None = None) -> Path:
    """Write `content` under another name, have it on the disk (fsync), then rename it to `path`.

    A reader, a run that was stopped or a machine that lost its power never meets half a file. Text
    is written as UTF-8.

    Args:
        scratch: the folder for the other name, on the same disk; by default that of `path`.

    Raises:
        OSError: the folder does not exist or cannot be written, or the disk is full.
    """
    path = Path(path)
    if isinstance(content, str):
        content = content.encode()
    descriptor, unfinished = tempfile.mkstemp(prefix=f".{path.name}-", dir=scratch or path.parent)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        make_readable(unfinished, 0o666)
        os.replace(unfinished, path)
    except BaseException:
        Path(unfinished).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
    return path


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk, where the system can do that (not on Windows)."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A folder beside `path` to write to, which becomes `path` at the end of the block.

    After an exception nothing is left of it.

    Raises:
        FileExistsError: there is a file or a folder with something in it at `path`.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} is there already, and not empty: choose another folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        make_readable(scratch, 0o777)
        yield scratch
        if path.exists():
            path.rmdir()  # refuses, should it have been filled in the meantime
        os.replace(scratch, path)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def make_readable(scratch: str | Path, mode: int) -> None:
    """Give a temporary file or folder, which is private, the mode of any other new one."""
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(scratch, mode & ~umask)
