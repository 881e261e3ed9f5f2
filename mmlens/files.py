"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
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
        # mkstemp's file is private; a result is as readable as any other new file.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(scratch, 0o666 & ~umask)
        os.replace(scratch, path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise
    return path
