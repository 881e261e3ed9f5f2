"""The task `steer`: every question answered while the model is steered, by layer and scale."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa

from mmlens.analyses.steering_scores import COUNTS, scored
from mmlens.analyses.steering_vector import SteeringVector
from mmlens.model.transformer import HookedMultimodalTransformer
from mmlens.sweeps.task import Asked, Carried, Columns, Task


@dataclass(frozen=True, kw_only=True)
class SteerTask(Task):
    """Answers under a steering vector, in each of its layers by itself and at each scale.

    How an answer is scored follows from the question (see `mmlens.analyses.steering_scores`): yes
    or no as POPE does, captions by CHAIR, OK-VQA by its annotators, options by their letter.
    """

    name: ClassVar[str] = "steer"
    columns: ClassVar[Columns] = {
        "scale": pa.float32(),
        "kind": pa.string(),
        "said": pa.string(),
        "score": pa.float32(),
        "says_yes": pa.bool_(),
        "is_yes": pa.bool_(),
        **dict.fromkeys(COUNTS, pa.int32()),
    }
    measures: ClassVar[tuple[str, ...]] = ("score",)
    keys: ClassVar[tuple[str, ...]] = ("scale", "site", "role", "layer", "window")

    vector: str = ""
    """The file of a steering vector (SteeringVector.save)."""
    scales: tuple[float, ...] = (-4.0, 0.0, 4.0)
    """How much of the vector is added, like -4,0,4; 0 is the model as it is."""
    layers: tuple[int, ...] | None = None
    """Which of the vector's layers, each by itself; by default all."""
    positions: str = "answer"
    """Where: answer (where its tokens are chosen), generated, all, or a span of the prompt."""
    keep_norm: bool = False
    """Keep the norm of what is steered."""
    max_new_tokens: int = 64
    """The most tokens of an answer."""

    def __post_init__(self) -> None:
        if not self.vector:
            raise ValueError("steer needs a vector: the file of a SteeringVector")
        if not self.scales or len(set(self.scales)) < len(self.scales):
            raise ValueError(f"scales {self.scales}: at least one, and each once")
        has = self.loaded().layers
        if outside := sorted(set(self.layers or has) - set(has)):
            raise ValueError(f"layers {outside}: the vector of {self.vector} has {list(has)}")

    def loaded(self) -> SteeringVector:
        """The vector from its file."""
        return SteeringVector.load(Path(self.vector).expanduser())

    def settings(self) -> dict[str, Any]:
        """What rows depend on: of the vector its content, wherever its file is."""
        content = Path(self.vector).expanduser().read_bytes()
        return super().settings() | {"vector": f"sha256 {sha256(content).hexdigest()}"}

    def check(self, model: HookedMultimodalTransformer) -> None:
        """Raise a ValueError where the model lacks the vector's layers, or has other sizes."""
        self.loaded().check(model)

    def rows(
        self, model: HookedMultimodalTransformer, asked: Asked, carried: Carried
    ) -> list[dict[str, Any]]:
        """One row per layer and scale; what is said at scale 0 is the same in each layer."""
        vector = self.loaded()
        carried.earlier.clear()
        layers = vector.layers if self.layers is None else self.layers
        said: dict[tuple[int | None, float], str] = {}
        for layer in layers:
            for scale in self.scales:
                key = (layer if scale else None, scale)
                if key not in said:
                    said[key] = self.answer(model, asked, vector, layer, scale)
        found = {key: scored(asked.question, answer) for key, answer in said.items()}
        unsteered = found.get((None, 0.0))
        common = {
            "site": vector.site,
            "role": self.positions,
            "window": 1,
            "is_right": None if unsteered is None else unsteered["score"] == 1,
        }
        return [
            common | {"layer": layer, "scale": scale, "said": said[key]} | found[key]
            for layer in layers
            for scale in self.scales
            for key in [(layer if scale else None, scale)]
        ]

    def answer(
        self,
        model: HookedMultimodalTransformer,
        asked: Asked,
        vector: SteeringVector,
        layer: int,
        scale: float,
    ) -> str:
        """What the model says, steered in one layer."""
        steered = vector.of_answers(
            asked.inputs, scale, self.positions, layers=[layer], keep_norm=self.keep_norm
        )
        return str(
            model.generate(
                asked.inputs,
                self.max_new_tokens,
                do_sample=False,
                num_beams=1,
                interventions=steered,
            )
        )
