"""Files of a checkpoint's folder, whose names somebody else has chosen.

Whatever a checkpoint names (shards in an index, a vision tower in config.json) and whatever lies in
its folder is read only if it is a regular file inside of that folder. Pipes and devices would hang
a reader; a link or a name such as `../../.ssh/id_rsa` would read what the user never gave.

The Hugging Face cache is the one exception that is needed: the files of its snapshot folders are
links to `../../blobs`.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath

import torch

from mmlens.checkpoints.errors import CheckpointError

KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
SHOWN = 300
"""Characters of another library's message that are passed on."""


def regular_file(path: Path, folder: Path | None = None) -> Path:
    """Return the path, if it is a regular file, inside of `folder` where one is given.

    Raises:
        CheckpointError: it is missing, cannot be looked up, is of another kind (a pipe would hang
            whoever reads it), or is a link that leaves the folder.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        link = f" is a link to {path.readlink()}, which" if path.is_symlink() else ""
        raise CheckpointError(f"{path}{link} is not there") from error
    except (OSError, ValueError) as error:  # a loop of links, a name that is too long, a null byte
        raise CheckpointError(f"{path} cannot be opened: {reason(error)}") from error
    if not stat.S_ISREG(mode):
        kind = next((name for is_kind, name in KINDS if is_kind(mode)), "something else")
        raise CheckpointError(f"{path} is {kind}, not a regular file")
    if folder is not None and not is_inside(path, folder):
        raise CheckpointError(
            f"{path} is a link to {path.resolve()}, outside of its checkpoint's folder: put the "
            "file itself there"
        )
    return path


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a path, with its links followed, stays inside of a folder.

    Files of the Hugging Face cache may lie in the `blobs` of the repository that their snapshot
    belongs to.
    """
    roots = [folder.resolve()]
    for part in roots[0].parents:
        if part.name == "snapshots":
            roots.append(part.parent / "blobs")
    try:
        real = path.resolve()
    except (OSError, RuntimeError):  # a loop of links
        return False
    return any(real.is_relative_to(root) for root in roots)


def leaves_its_folder(name: str) -> bool:
    """Whether a name that a checkpoint gives, of a file or a folder, leads out of its own folder.

    Both systems' rules hold everywhere: a checkpoint that is read on one may be saved on the other.
    """
    return (
        not name
        or "\0" in name
        or name.startswith("~")
        or PurePosixPath(name).is_absolute()
        or bool(PureWindowsPath(name).anchor)
        or ".." in PureWindowsPath(name).parts
    )


@contextmanager
def checkpoint_errors(path: object, what: str = "") -> Iterator[None]:
    """Turn whatever is raised about a damaged file into a CheckpointError that names its path.

    For calls of other libraries on files that somebody else has written: these raise KeyErrors,
    TypeErrors, and errors of their own, which become one line. A CheckpointError that does not
    name the path gets it. Out of memory stays what it is.

    Args:
        path: of the file, or of the folder where several files make up what is read.
        what: stands between the path and what a library has said.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except CheckpointError as error:
        if str(path) in str(error):
            raise
        raise CheckpointError(f"{path}: {error}") from error
    except BaseException as error:
        # A panic of a library in Rust derives from BaseException alone.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(f"{path}: {what}{reason(error)}") from error


def reason(error: BaseException) -> str:
    """Return what an error says, on one line of at most `SHOWN` characters."""
    said = " ".join(str(error).split())
    if isinstance(error, KeyError):
        said = f"there is no {said}"
    elif isinstance(error, RecursionError):
        said = "it is nested too deeply"
    elif not said or isinstance(error, (AttributeError, TypeError, IndexError)):
        said = f"{type(error).__name__}{said and ': ' + said}"
    return said if len(said) <= SHOWN else f"{said[:SHOWN]} ..."
