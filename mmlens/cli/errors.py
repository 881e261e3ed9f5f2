"""Which errors are one clear line on stderr, and with which exit code; others are ours."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

AGAIN = {
    getattr(errno, name)
    for name in "ENOSPC EDQUOT EFBIG ENOMEM EMFILE ENFILE EAGAIN EINTR EBUSY EIO ESTALE "
    "ETIMEDOUT ECONNREFUSED ECONNRESET EHOSTUNREACH ENETUNREACH EPIPE".split()
    if hasattr(errno, name)  # Windows has not all of them
}
"""Errors of the system after which the same command may work, once there is room, say."""

NO_MEMORY = re.compile("DefaultCPUAllocator|not enough memory|Cannot allocate memory")
"""What torch and safetensors say, whose errors are RuntimeErrors like any other."""


class UserError(Exception):
    """What the user gave, or the machine, cannot work; the message is one line that says why.

    Args:
        code: exit code: 2, or 1 for what may be tried again.
    """

    def __init__(self, message: object, code: int = 2) -> None:
        super().__init__(" ".join(str(message).split()))
        self.code = code


def as_user_error(error: Exception) -> UserError | None:
    """Return what a person is told of an error, wherever it was raised.

    None for what is a mistake of ours: its traceback is wanted.
    """
    from mmlens.demo.language_model import LanguageModelUnavailable
    from mmlens.inputs.image_files import one_line

    if isinstance(error, UserError):
        return error
    if isinstance(error, LanguageModelUnavailable):
        return UserError(error, 1)
    if isinstance(error, OSError) and error.errno is not None:
        where = " to ".join(str(x) for x in (error.filename, error.filename2) if x is not None)
        return UserError(
            f"{where or 'cannot write'}: {error.strerror}", 1 if error.errno in AGAIN else 2
        )
    if (
        isinstance(error, MemoryError)
        # torch's error for a GPU, whose class cannot be named before torch is imported
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and NO_MEMORY.search(str(error)))
    ):
        return UserError(f"not enough memory: {one_line(error)}", 1)
    return None


@contextmanager
def explained(prefix: str = "") -> Iterator[None]:
    """Errors about what the user gave, raised inside the library, become a `UserError`.

    To be used around calls whose arguments are the user's own, and only there: a ValueError from
    elsewhere is a mistake of ours, and its traceback is wanted.
    """
    try:
        yield
    except (ValueError, LookupError, OSError) as error:
        if told := as_user_error(error):
            raise UserError(f"{prefix}{told}", told.code) from error
        # str() of a KeyError is the repr of its message.
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        raise UserError(f"{prefix}{message}") from error
