"""The settings of `multedit`: the defaults, and the paper's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mmlens.editing.value import ValueSettings

if TYPE_CHECKING:
    from mmlens.model.transformer import HookedMultimodalTransformer

__all__ = ["MultEditSettings"]


@dataclass(frozen=True)
class MultEditSettings(ValueSettings):
    """How the value is optimised, and how the weight is solved for.

    The defaults are the best that we know (`docs/editing.md`); `paper` gives the paper's.
    """

    lr: float = 0.05
    steps: int = 60
    clamp: float | None = 1.0
    unit: Literal["value", "stream"] = "stream"
    lam: float = 0.01
    """Weight of |W - W0|^2."""
    ridge: float = 0.3
    """Further weight of |W - W0|^2, in units of the edited keys' mean k.k. Keys that are somewhat
    unlike the kept ones get less of the edit, other wordings of the question more (ridge
    regression: kept keys are a sample of those that are to stay)."""
    weight: float = 1e6
    """Of an edited key, and of those of earlier edits, beside a kept one. With 1, the edit's value
    is a compromise where they are much alike; with a large one it is reached."""
    neighbour_weight: float = 2.0
    """Of a neighbour's kept key: another question about the image is nearer than a reference."""
    through_update: bool = True
    """Whether the search adds what the solved weight will add to every position, instead of the
    values at their keys: then what it finds is what the edited model gives. A step computes the
    whole prompt."""
    positions: Literal["last", "answer", "words", "all"] = "answer"
    """Where the keys are. "answer": where each token of the answer is computed, at the prompt's
    last token and at the target's (but its last), each with a value of its own; there the image and
    the question have been read, whatever its words are. "words": at every word. "all": at every
    position but BOS, the image's included, which other questions about the image attend to as well.
    "last": at the last token of the request's span, as in the paper."""
    key: Literal["mean", "each"] = "each"
    """With several prompts: their mean is the key, or each is one and all get the value."""
    preserve: Literal["nothing", "prompts", "neighbours", "both"] = "both"
    """Keys that are to keep their values: those of the other positions of the request's prompts,
    those of its neighbours, or both. None of them costs rank."""
    uses_references: bool = True
    """Whether the keys of references keep their values, and the written question is a key prompt
    where the subject is known."""
    keeps_edits: bool = True
    """Whether the keys of edits that the model has keep their values."""
    depth: float = 26 / 30
    """Which layer is edited where none is named, as a share of the layers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lam < 0:
            raise ValueError(f"lam={self.lam}; it is 0 or more")
        if self.ridge < 0:
            raise ValueError(f"ridge={self.ridge}; it is 0 or more")
        if self.weight <= 0 or self.neighbour_weight <= 0:
            raise ValueError(
                f"weight={self.weight}, neighbour_weight={self.neighbour_weight}: both must be "
                "positive"
            )
        if not 0 <= self.depth <= 1:
            raise ValueError(f"depth={self.depth}; it is a share of the layers, from 0 to 1")
        if self.positions not in ("last", "answer", "words", "all"):
            raise ValueError(
                f"positions={self.positions!r}; they are 'last', 'answer', 'words' or 'all'"
            )
        if self.key not in ("mean", "each"):
            raise ValueError(f"key={self.key!r}; it is 'mean' or 'each'")
        if self.positions != "last" and self.key == "mean":
            raise ValueError("key='mean' is for one key of each prompt: positions='last'")
        if self.preserve not in ("nothing", "prompts", "neighbours", "both"):
            raise ValueError(
                f"preserve={self.preserve!r}; it is 'nothing', 'prompts', 'neighbours' or 'both'"
            )

    @classmethod
    def paper(cls, **changes: Any) -> MultEditSettings:
        """Return the settings of Basu et al. 2024, section 5, and of the authors' script.

        One key, at the last token of the constraint, in layer 2 of 32; ten steps of 0.1 on the
        target's first token; no other key is kept. The script's bound on the added vector (0.0001
        of the value) is left out, since with it nothing changes in half precision.

        Args:
            changes: settings that are to be others.

        Example:
            >>> edit = multedit(model, inputs, "Rome", settings=MultEditSettings.paper())
        """
        paper: dict[str, Any] = {
            "lr": 0.1,
            "steps": 10,
            "clamp": None,
            "unit": "value",
            "first_token_only": True,
            "ridge": 0.0,
            "weight": 1.0,
            "neighbour_weight": 1.0,
            "through_update": False,
            "positions": "last",
            "preserve": "nothing",
            "uses_references": False,
            "keeps_edits": False,
            "depth": 2 / 32,
        }
        return cls(**{**paper, **changes})

    def layer_of(self, model: HookedMultimodalTransformer) -> int:
        """Return the layer that is edited where none is named."""
        return min(model.cfg.n_layers - 1, max(1, round(self.depth * model.cfg.n_layers)))
