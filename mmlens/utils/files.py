"""Files and folders that appear whole or not at all, and the removal of unfinished ones.

What is being written is called `.report.html-4f9a1c0d27be5836.unfinished`, say, and is locked
(flock) by the process that writes it. The system lets go of a lock when a process ends, however
that happens; so what is called like that and is not locked belongs to nobody, and the next one who
writes to the folder removes it.

Files and folders have the mode that the umask gives to any new one.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO

from mmlens.utils.temporary import Changes, temporary

try:
    import fcntl
except ImportError:  # Windows: nothing is locked, and nobody knows what may be removed
    fcntl = None  # type: ignore[assignment]

UNFINISHED = re.compile(r"\..+-[0-9a-f]{16}\.unfinished")
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EBADF, errno.EINVAL)
"""How file systems without locks answer, and those (NFS) that have none for folders."""
SYSTEM_ERROR = re.compile(r"(?:os error|Errno) (\d+)(?:[^:]*:(.*))?")
"""An error of the system in the words of Python, shutil, safetensors or tokenizers, each of which
has a class of its own for it: the number, and the file that it names."""


def write_atomically(path: str | Path, content: bytes | str, scratch: Path | None = None) -> Path:
    """Write `content` under another name, flush it to the disk (fsync), then rename it to `path`.

    A reader, a run that was stopped or a machine that lost its power never meets half a file. Text
    is written as UTF-8. `scratch` is the other name's folder, on the same disk.
    """
    path = Path(path)
    if isinstance(content, str):
        content = content.encode()
    with named(path), unfinished_file(scratch or path.parent, path.name) as stream:
        left = memoryview(content)
        while left:
            left = left[stream.write(left) :]
        os.fsync(stream.fileno())
        if fcntl is None:
            stream.close()  # Windows renames no file that is open
        os.replace(stream.name, path)
    sync(path.parent)
    return path


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Make a folder beside `path` to write to, which becomes `path` at the end of the block.

    After an exception nothing is left of it.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} is there already, and not empty: choose another folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    with named(path), unfinished_folder(path.parent, path.name) as scratch:
        mode = stat.S_IMODE(scratch.stat().st_mode)  # before a copy gives it its source's
        yield scratch
        put_in_place(scratch, path, mode)


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Let errors of the system, while `path` is written under another name, name `path`.

    A write to a full disk names nothing. What names another file, and what mmlens has said, stays.
    """
    try:
        yield
    except (ValueError, RuntimeError):
        raise
    except Exception as error:
        found = SYSTEM_ERROR.search(str(error))
        if found is None or (found[2] and ".unfinished" not in found[2]):
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error


def check_writable(folder: str | Path) -> None:
    """Make a folder, unless it exists, and check that files can be written to it."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with unfinished_file(Path(folder), "test"):
        pass


def put_in_place(scratch: Path, path: Path, mode: int | None = None) -> None:
    """Rename a complete folder to `path`, when it is on the disk, with the modes of a new one."""
    mode = stat.S_IMODE(scratch.stat().st_mode) if mode is None else mode
    for each in (scratch, *scratch.rglob("*")):
        if not each.is_symlink():
            # Some libraries make files that only their owner can read; a copy keeps its mode.
            each.chmod(mode if each.is_dir() else mode & 0o666)
            sync(each)
    if path.exists():
        path.rmdir()  # refuses, should it have been filled in the meantime
    os.replace(scratch, path)
    sync(path.parent)


@temporary
def unfinished_file(folder: Path, name: str) -> Changes[BinaryIO]:
    """Make a file to write to in the block, at the end of which it is removed unless renamed."""
    remove_unfinished(folder)
    while True:
        path = unfinished(folder, name)
        yield partial(path.unlink, missing_ok=True)
        stream = path.open("xb", buffering=0)  # closing it does not write, and so cannot fail
        yield stream.close
        with suppress(FileNotFoundError):  # somebody has taken it for left
            if is_ours(stream.fileno(), path):
                return stream


@temporary
def unfinished_folder(folder: Path, name: str) -> Changes[Path]:
    """Make a folder to write to in the block, at the end of which it is removed unless renamed."""
    remove_unfinished(folder)
    while True:
        path = unfinished(folder, name)
        yield partial(shutil.rmtree, path, ignore_errors=True)
        path.mkdir()
        if fcntl is None:
            return path
        descriptors: list[int] = []
        yield partial(close, descriptors)
        with suppress(FileNotFoundError):  # somebody has taken it for left
            if is_ours(open_into(descriptors, path), path):
                return path


@temporary
def opened(path: Path) -> Changes[int]:
    """Open a file's or folder's descriptor; no link is followed, and no pipe waited for."""
    descriptors: list[int] = []
    yield partial(close, descriptors)
    return open_into(descriptors, path)


def open_into(descriptors: list[int], path: Path) -> int:
    """Open a file or folder, and note its descriptor, which is returned."""
    descriptors.append(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK))
    return descriptors[-1]


def close(descriptors: list[int]) -> None:
    """Close them, each once: closed again, the number might be that of another file."""
    while descriptors:
        os.close(descriptors.pop())


def unfinished(folder: Path, name: str) -> Path:
    """Return a name that nobody has taken, and that is not too long."""
    begin = name.encode()[:100].decode(errors="ignore")
    return Path(folder) / f".{begin}-{secrets.token_hex(8)}.unfinished"


def is_ours(descriptor: int, path: Path) -> bool:
    """Lock a file that we have just made; return False where somebody else removes it."""
    return lock(descriptor) and os.path.samestat(os.fstat(descriptor), os.stat(path))


def lock(descriptor: int, unknown: bool = True) -> bool:
    """Return whether nobody else has it locked; `unknown` where there are no locks."""
    if fcntl is None:
        return unknown
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NO_LOCKS:
            return unknown
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def remove_unfinished(folder: str | Path) -> None:
    """Remove files and folders that were being written by processes that have ended.

    What cannot be removed, or might still be written, stays.
    """
    if fcntl is None:
        return
    with suppress(OSError):
        for name in os.listdir(folder):
            if UNFINISHED.fullmatch(name):
                remove_if_left(Path(folder) / name)


def remove_if_left(path: Path) -> None:
    """Remove a file or folder, unless it is locked."""
    with suppress(OSError), opened(path) as descriptor:
        if lock(descriptor, unknown=False):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk; where the system can (not Windows)."""
    if os.name != "posix":
        return
    with opened(path) as descriptor:
        os.fsync(descriptor)
