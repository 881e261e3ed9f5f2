"""From a phrase to characters, and from characters to tokens.

    find_span("What is the capital of this country?", "This  country")   # (23, 35)

A phrase is found in the text first, and then the tokenizer's character offsets say which tokens
hold it. Nothing is searched in token strings, so it works for any tokenizer with offsets.

Public names: `find_span`, `SpanNotFoundError`, `EncodedText`, `encode`, `token_strings`,
`tokens_of_replacement`, `whole_words`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = [
    "PLACEHOLDER",
    "EncodedText",
    "SpanNotFoundError",
    "encode",
    "find_span",
    "token_strings",
    "tokens_of_replacement",
    "whole_words",
]

PLACEHOLDER = "<image>"
SPACE_MARKS = "▁Ġ"
"""How SentencePiece and byte-level tokenizers write a space."""
SCRIPTS_WITHOUT_SPACES = frozenset(
    "CJK IDEOGRAPHIC HIRAGANA KATAKANA HALFWIDTH BOPOMOFO YI THAI LAO KHMER MYANMAR TIBETAN".split()
)
"""As `unicodedata.name` begins; these write words one after the other."""


class SpanNotFoundError(ValueError):
    """A phrase that is not in the text; the message shows the text."""


def find_span(text: str, phrase: str, within: tuple[int, int] | None = None) -> tuple[int, int]:
    """Return where a phrase stands in a text: start and end in characters, half open.

    The best kind of match counts, and of several of that kind the first: the phrase as whole words;
    whole words but for case, spacing and punctuation; the phrase inside of words; the beginning of
    words, tolerantly. So "country" is not found in "countryside" if it is a word further on. In
    scripts without spaces (Chinese, Japanese, Thai, ...) every character may begin or end a word,
    and a Korean word may go on with a particle. Nothing is found inside an `<image>` placeholder.
    For another occurrence than the first, name its characters (`prepare(spans={"constraint": (23,
    35)})`).

    Args:
        text: what to search.
        phrase: what to find.
        within: search only these characters.

    Raises:
        SpanNotFoundError: the phrase is not there (or is empty); the message shows the text.

    Example:
        >>> find_span("The bus of the U.S. is here", "US")
        (15, 18)
    """
    low, high = (0, len(text)) if within is None else within
    part = text[low:high]
    wanted = phrase.strip()
    if not wanted:
        raise SpanNotFoundError(f"the phrase {phrase!r} is empty, so no span in {text!r}")
    if PLACEHOLDER not in wanted:
        part = part.replace(PLACEHOLDER, "\0" * len(PLACEHOLDER))
    finders: list[Callable[[], tuple[int, int] | None]] = [
        lambda: _find_words(part, wanted),
        lambda: _find_folded(part, wanted, whole_last_word=True),
        lambda: _find_characters(part, wanted),
        lambda: _find_folded(part, wanted, whole_last_word=False),
    ]
    for find in finders:
        found = find()
        if found is not None:
            return found[0] + low, found[1] + low
    where = "" if within is None else f" between characters {low} and {high}"
    raise SpanNotFoundError(f"the phrase {phrase!r} does not occur{where} in the text {text!r}")


def _find_words(text: str, phrase: str) -> tuple[int, int] | None:
    for match in re.finditer(f"(?={re.escape(phrase)})", text):
        if whole_words(text, match.start(), match.start() + len(phrase)):
            return match.start(), match.start() + len(phrase)
    return None


def _find_characters(text: str, phrase: str) -> tuple[int, int] | None:
    start = text.find(phrase)
    return None if start < 0 else (start, start + len(phrase))


def _find_folded(text: str, phrase: str, whole_last_word: bool) -> tuple[int, int] | None:
    """Compare letters and digits only, without case; spaces and punctuation are skipped."""
    letters, places = _folded(text)
    wanted, _ = _folded(phrase)
    if not wanted:
        return None
    for match in re.finditer(f"(?={re.escape(wanted)})", letters):
        last = match.start() + len(wanted) - 1
        start, end = places[match.start()], places[last] + 1
        # One character can fold to several (ß to ss, é to e and its accent): none is cut in two.
        cut = (match.start() > 0 and places[match.start() - 1] == start) or (
            last + 1 < len(places) and places[last + 1] == end - 1
        )
        if not cut and whole_words(text, start, end if whole_last_word else len(text)):
            return start, end
    return None


def _folded(text: str) -> tuple[str, list[int]]:
    """Return letters, digits and accents in one form and case, and each one's character."""
    letters: list[str] = []
    places: list[int] = []
    for place, character in enumerate(text):
        for letter in unicodedata.normalize("NFKD", character).casefold():
            if letter.isalnum() or unicodedata.category(letter).startswith("M"):
                letters.append(letter)
                places.append(place)
    return "".join(letters), places


def whole_words(text: str, start: int, end: int) -> bool:
    """Return whether no word is cut at either end of `text[start:end]`."""
    has_particle = _inside_word(text, end) and _script(text[end]) == "HANGUL"
    return not _inside_word(text, start) and (has_particle or not _inside_word(text, end))


def _inside_word(text: str, place: int) -> bool:
    """Return whether a word goes on from the character before `place` to the one at it."""
    if not 0 < place < len(text) or not (_in_word(text[place - 1]) and _in_word(text[place])):
        return False
    if unicodedata.category(text[place])[0] == "M":  # a mark belongs to the letter before it
        return True
    return not {_script(text[place - 1]), _script(text[place])} & SCRIPTS_WITHOUT_SPACES


def _in_word(character: str) -> bool:
    return character.isalnum() or character == "_" or unicodedata.category(character)[0] == "M"


def _script(character: str) -> str:
    """Return the first word of a character's name in Unicode, which for a letter is its script."""
    return re.split("[ -]", unicodedata.name(character, ""))[0]


@dataclass(frozen=True)
class EncodedText:
    """A text as tokens, each with the characters it stands for. `<image>` is one token."""

    text: str
    ids: list[int]
    offsets: list[tuple[int, int]]
    tokens: list[str]
    """The tokenizer's own names of the tokens, such as "Ġcountry"."""

    def tokens_in(self, start: int, end: int) -> list[int]:
        """Return indices of the tokens that hold a character of `text[start:end]`.

        White space at both ends of the range does not count: a token may begin with the space in
        front of the phrase, but one that is nothing but that space is not part of it. White space
        between words belongs to the span: its tokens have no gap.
        """
        inside = self.text[start:end]
        if inside.strip():
            start += len(inside) - len(inside.lstrip())
            end -= len(inside) - len(inside.rstrip())
        held = [
            index
            for index, (first, last) in enumerate(self.offsets)
            if max(first, start) < min(last, end) and not self._is_prefix_mark(index)
        ]
        # A space between two words can be a token whose offsets the tokenizer has trimmed to none.
        return list(range(held[0], held[-1] + 1)) if held else []

    def _is_prefix_mark(self, index: int) -> bool:
        """Return whether the token is a space that the tokenizer itself put before a word.

        Its offsets are then those of a character that it does not stand for.
        """
        if self.tokens[index].strip(SPACE_MARKS):
            return False
        covered = self.text[slice(*self.offsets[index])]
        return bool(covered.strip()) and bool(covered.strip(SPACE_MARKS))


def encode(tokenizer: Any, text: str) -> EncodedText:
    """Tokenise without BOS or other additions, with character offsets.

    Raises:
        ValueError: the tokenizer has no offsets.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} gives no character offsets, which named spans need: use "
            f"a fast tokenizer (AutoTokenizer from a folder with tokenizer.json), or give ready "
            f"token ids to inputs_from_tokens"
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = list(encoded["input_ids"])
    offsets = [(int(start), int(end)) for start, end in encoded["offset_mapping"]]
    return EncodedText(text, ids, offsets, tokenizer.convert_ids_to_tokens(ids))


def token_strings(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Return each token as text, with the space that it begins with."""
    texts: dict[int, str] = {}
    distinct = list(dict.fromkeys(ids))  # a visual token's id stands there hundreds of times
    for name, token in zip(tokenizer.convert_ids_to_tokens(distinct), distinct, strict=True):
        if name is None:
            texts[token] = f"[{token}]"
            continue
        text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
        # SentencePiece decoders drop the space at the beginning of a text.
        missing = name.startswith("▁") and not text.startswith(" ")
        texts[token] = " " + text if missing else text
    return [texts[token] for token in ids]


def tokens_of_replacement(
    tokenizer: Any, text: str, char_span: tuple[int, int], replacement: str
) -> list[int]:
    """Return the token ids of a replacement in its context, the first token first.

    The text is tokenised again with the replacement in place, and the tokens that hold its
    characters are returned: right for any tokenizer, whatever it does with spaces.

    Args:
        tokenizer: a fast tokenizer.
        text: the whole prompt, with one `<image>` per image.
        char_span: the phrase that is replaced: start, end (half open).
        replacement: what stands there instead.

    Raises:
        ValueError: the span is not in the text, or the replacement has no characters.
    """
    start, end = char_span
    if not 0 <= start <= end <= len(text):
        raise ValueError(f"characters {char_span} are not in a text of {len(text)}: {text!r}")
    new = replacement.strip()
    if not new:
        raise ValueError(f"the replacement {replacement!r} is empty; give a word to put in")
    encoded = encode(tokenizer, text[:start] + new + text[end:])
    return [encoded.ids[index] for index in encoded.tokens_in(start, start + len(new))]
