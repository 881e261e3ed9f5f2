"""Bad input is one clear line on stderr, and exit code 2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """What the user gave cannot work; the message is one line that says why."""

    def __init__(self, message: object) -> None:
        super().__init__(" ".join(str(message).split()))


@contextmanager
def explained(prefix: str = "") -> Iterator[None]:
    """Errors about what the user gave, raised inside the library, become a `UserError`.

    To be used around calls whose arguments are the user's own, and only there: a ValueError from
    elsewhere is a mistake of ours, and its traceback is wanted.
    """
    try:
        yield
    except (ValueError, LookupError, OSError) as error:
        # str() of a KeyError is the repr of its message.
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        raise UserError(f"{prefix}{message}") from error
