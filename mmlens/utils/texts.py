"""What takes several texts refuses a single one, which Python would read letter by letter."""

from __future__ import annotations


def check_several(**given: object) -> None:
    """Raise a TypeError for a text in the place of a list, by the name of the argument.

    Example:
        >>> check_several(positive=["I love you"], negative=["I hate you"])
    """
    for name, texts in given.items():
        if isinstance(texts, str):
            raise TypeError(
                f"{name}={texts!r} is one text, and would be read letter by letter: give a list, "
                f"{name}=[{texts!r}]"
            )
