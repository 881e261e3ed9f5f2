"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_atomically(path: str | Path, content: bytes | str) -> Path:
    """Write `content` under another name in the same folder, then rename it to `path`.

    A reader, or a run that was stopped, never meets half a file. Text is written as UTF-8.

    Raises:
        OSError: the folder does not exist or cannot be written.
    """
    path = Path(path)
    if isinstance(content, str):
        content = content.encode()
    descriptor, scratch = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
        make_readable(scratch, 0o666)
        os.replace(scratch, path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise
    return path


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
