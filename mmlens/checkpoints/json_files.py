"""JSON files of a checkpoint's folder, and what is checked before transformers reads them.

transformers opens a dozen files of a folder by itself, and some of what these say makes it do more
than read: a class's name is looked up among all of its classes (`AutoModelForCausalLM` as
`tokenizer_class` would ask whether to run the folder's Python files), and a number of layers is
believed, though it be 10 ** 9. `check_folder` looks first.

No code of a checkpoint is ever run. A published `auto_map` (the class in a Python file that would
be run) is left aside wherever transformers has a class of its own.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from transformers import (
    BaseImageProcessor,
    BaseVideoProcessor,
    FeatureExtractionMixin,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from mmlens.checkpoints.errors import CheckpointError
from mmlens.checkpoints.paths import reason, regular_file

LARGEST = 256 * 2**20
"""Bytes of a JSON file. The largest tokenizer.json that is published has 35 million."""
READ = "*.json *.jinja *.model merges.txt vocab.txt additional_chat_templates/*.jinja".split()
"""What transformers may open of a folder by itself."""

CLASSES: dict[str, type | tuple[type, ...]] = {
    "tokenizer_class": PreTrainedTokenizerBase,
    "processor_class": ProcessorMixin,
    "image_processor_type": BaseImageProcessor,
    "feature_extractor_type": (FeatureExtractionMixin, BaseImageProcessor),
    "video_processor_type": BaseVideoProcessor,
}
"""Fields that name one of transformers' classes, and what it must be one of."""

HEADS, WIDTH, PIXELS = 2**14, 2**20, 2**16
COUNTS = {
    "num_hidden_layers": 1000,
    "n_layer": 1000,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "n_head": HEADS,
    "n_head_kv": HEADS,
    "head_dim": PIXELS,
    "rotary_dim": PIXELS,
    "hidden_size": WIDTH,
    "n_embd": WIDTH,
    "intermediate_size": WIDTH,
    "n_inner": WIDTH,
    "vocab_size": 2**26,
    "max_position_embeddings": 2**31,
    "n_positions": 2**31,
    "image_size": PIXELS,
    "patch_size": PIXELS,
    "num_channels": 2**10,
    "layers": 1000,  # open_clip's from here on
    "width": WIDTH,
    "head_width": PIXELS,
}
"""The most that a size may be: far above every published model, and small enough that a
configuration of that size costs no memory before it is compared with the weights."""

LONGER = 2**12
"""How many times as long a tokenizer may make a text. Published ones replace a space by one sign;
ten rules that double it are a thousand."""

logger = logging.getLogger(__name__)


def read_json(path: Path, folder: Path | None = None) -> dict[str, Any]:
    """Return the object of a JSON file, a regular file of at most `LARGEST` bytes.

    Args:
        folder: where it must lie; see `paths.regular_file`.
    """
    size = regular_file(path, folder).stat().st_size
    if size > LARGEST:
        raise CheckpointError(f"{path} has {size:,} bytes; a JSON file may have {LARGEST:,}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, nested too deeply
        raise CheckpointError(f"{path} is not JSON: {reason(error)}") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {reason(error)}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is not a JSON object, but a {type(found).__name__}")
    return found


def check_folder(folder: Path) -> None:
    """Look at everything that transformers may open of a folder, before it does.

    Raises:
        CheckpointError: what is no regular file, or a link out of the folder; what is no JSON; a
            class that is no tokenizer, processor or the like; sizes that no model has.
    """
    for pattern in READ:
        for path in sorted(folder.glob(pattern)):
            regular_file(path, folder)
    for path in sorted(folder.glob("*config.json")):
        config = read_json(path, folder)
        check_classes(config, path)
        if path.name == "config.json":
            check_counts(config, path)


def objects(value: Any) -> Iterator[dict[str, Any]]:
    """Yield a JSON value's objects, the value itself among them."""
    if isinstance(value, dict):
        yield value
        for part in value.values():
            yield from objects(part)
    elif isinstance(value, list):
        for part in value:
            yield from objects(part)


def check_classes(config: dict[str, Any], path: Path) -> None:
    """Raise a CheckpointError where a configuration names a class that is not of the field's kind.

    A name that transformers does not have is left to it: it takes the class of the model's family.
    """
    for part in objects(config):
        # A model of its own, which transformers would load from wherever that says.
        if part.get("audio_tokenizer") or part.get("audio_tokenizer_class"):
            raise CheckpointError(f"{path} names an audio tokenizer, which mmlens does not load")
        for field, kind in CLASSES.items():
            name = part.get(field)
            if name is not None and not is_class(name, kind):
                what = field.rpartition("_")[0].replace("_", " ")
                raise CheckpointError(
                    f"{path}: {field} is {name!r}, which is no {what} of transformers; "
                    "mmlens runs no other code of a checkpoint"
                )
        if part.get("auto_map"):
            logger.info("%s: auto_map is left aside; no code of a checkpoint is run", path)


def is_class(name: object, kind: type | tuple[type, ...]) -> bool:
    """Whether transformers has no class of that name, or has one of that kind."""
    if not isinstance(name, str):
        return False
    names = set(transformers.__all__)
    for spelling in {name, f"{name}Fast", name.removesuffix("Fast")} - {""}:
        # Another name for the class without "Fast", which transformers would warn of.
        if spelling not in names and spelling.removesuffix("Fast") in names:
            continue
        try:
            found = getattr(transformers, spelling, None)
        except Exception:  # what a class needs may not be installed, which is no tokenizer's case
            return False
        is_kind = isinstance(found, type) and issubclass(found, kind)
        # A stand-in for a class whose package is not installed: it says so when it is used.
        is_stand_in = str(getattr(found, "__module__", "")).startswith("transformers.utils.dummy")
        if not (found is None or is_kind or is_stand_in):
            return False
    return True


def check_counts(config: dict[str, Any], path: Path) -> None:
    """Raise a CheckpointError where a configuration, or a part of it, has an impossible size."""
    for part in objects(config):
        for field, most in COUNTS.items():
            value = part.get(field)
            for number in value if isinstance(value, list) else [value]:
                if number is None or isinstance(number, dict):  # height and width, say
                    continue
                if type(number) is not int or not 1 <= number <= most:
                    raise CheckpointError(
                        f"{path}: {field} is {value!r}; it must be a whole number from 1 to "
                        f"{most:,}"
                    )


def check_growth(path: Path, folder: Path) -> None:
    """Raise a CheckpointError where a tokenizer.json can make a short text fill any memory.

    Each rule that replaces what it finds works on what the one before has written.
    """
    tokenizer = read_json(path, folder)
    for part in ("normalizer", "decoder"):
        longer = 1
        for rule in objects(tokenizer.get(part)):
            if rule.get("type") == "Replace":
                longer *= growth(rule.get("pattern"), rule.get("content"))
        if longer > LONGER:
            raise CheckpointError(
                f"{path}: its {part} replaces, rule after rule, one character by up to "
                f"{longer:.2g}; the most is {LONGER:,}"
            )


def growth(pattern: Any, content: Any) -> int:
    """Return how many times as long a text may become where a pattern is replaced in it."""
    new, old = len(str(content)), pattern.get("String") if isinstance(pattern, dict) else None
    if isinstance(old, str) and old:
        return max(1, -(-new // len(old)))
    return new + 1  # a regular expression may find nothing, between any two characters
