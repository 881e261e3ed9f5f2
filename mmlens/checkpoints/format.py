"""What a published checkpoint format is, and a decoder; and the register of the formats."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from mmlens.checkpoints.names import Names, Table, slots
from mmlens.checkpoints.towers.named_towers import Tower
from mmlens.config import MultimodalConfig


@dataclass(frozen=True)
class Decoder:
    """A family of language models, as transformers writes it; `checkpoints.decoders` has them."""

    names: Names
    """The name table of the base model (transformers' `AutoModel`); see `checkpoints.names`."""
    choices: Callable[[PreTrainedConfig], dict[str, Any]]
    """Fields of `MultimodalConfig` beside those of `decoder_fields`, from transformers'
    configuration. Raises a CheckpointError for what is not built here."""
    prefix: str = "model."
    """Stands before `names` in a checkpoint of the language model."""
    head: str = "lm_head"
    """The output layer."""
    activation: str = "hidden_act"
    """Where the configuration says which activation function the MLPs have."""
    partial_rotary: bool = False
    """Whether `partial_rotary_factor` counts; transformers rotates whole heads of the others."""


@dataclass(frozen=True)
class Format:
    r"""How the files of one family map to a model.

    Example:
        >>> from mmlens.checkpoints.formats import Format, register
        >>> register(Format("my LLaVA", recognises, config, names, ignored=(r".*\.inv_freq",)))
    """

    name: str
    """What messages and `mmlens verify` call it."""
    recognises: Callable[[Mapping[str, Any]], bool]
    """Whether a config.json is of this format; it is asked no other question."""
    config: Callable[[Path, Tower | None], MultimodalConfig]
    """The configuration of a folder's model with this tower; None where `tower` is None. Raises a
    CheckpointError for what is not supported."""
    names: Callable[[MultimodalConfig], Names]
    """The name table, after `rename`; see `checkpoints.names`."""
    ignored: tuple[str, ...] = ()
    """Regular expressions of tensors that are left out on purpose."""
    rename: Callable[[str], str] = str
    """Brings a name of an older layout to the one that `names` has."""
    tower: Callable[[Path, str | Path | None], Tower] | None = None
    """Returns the vision tower that a folder names, or the given one, for formats that only name
    theirs. Raises a CheckpointError where it is not to be had."""

    def table(self, cfg: MultimodalConfig) -> Table:
        """Return every tensor that is used, and where it goes."""
        return slots(cfg, self.names(cfg))


FORMATS: dict[str, Format] = {}


def register(format: Format) -> Format:
    """Let `from_pretrained` know a format, and return it; the last one is asked first.

    Raises:
        ValueError: there is one of that name.
    """
    if format.name in FORMATS:
        raise ValueError(f"there is a format {format.name!r} already; choose another name")
    FORMATS[format.name] = format
    return format


def written_by(architecture: str, model_type: str) -> Callable[[Mapping[str, Any]], bool]:
    """Return a test for a config.json of this class of model."""
    return lambda config: (
        architecture in (config.get("architectures") or ())
        or config.get("model_type") == model_type
    )
