"""How a model comes from a checkpoint's files, and is written to files of the same format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mmlens.utils.transformer_lens_names import refuse_arguments

if TYPE_CHECKING:
    from mmlens.model.transformer import HookedMultimodalTransformer


class CheckpointMethods:
    """Loading and saving; what files hold is known to `mmlens.checkpoints`."""

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        device_map: str | Mapping[str, Any] | None = None,
        vision_tower: str | Path | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        **others: Any,
    ) -> HookedMultimodalTransformer:
        """Load a published checkpoint, a local folder, or an embedded model ("demo").

        Args:
            name_or_path: "demo" or "demo-tuned" (`docs/demo-model.md`), a folder, a GGUF file, or a
                name on the Hugging Face hub.
            device: where to put it; by default the GPU if there is one.
            dtype: by default the checkpoint's own.
            revision: branch, tag or commit on the hub.
            device_map: "auto" spreads the model over all GPUs (through accelerate); or module
                names with their devices. Instead of `device`.
            vision_tower: a folder or hub name to take the tower from, for the formats of LLaVA's
                code (original LLaVA, Bunny, TinyLLaVA, LLaVA-Phi); by default the checkpoint's own,
                or else the one that its config.json names.
            min_pixels: what an image has at least, scaled; see `Processor.bounded`.
            max_pixels: the most.
            others: TransformerLens's, such as `fold_ln`, where they ask for nothing.

        Raises:
            CheckpointError: not found, no format knows it, quantised, or names and shapes do not
                fit.
            NotImplementedError: one of TransformerLens's arguments that is refused, and why.

        Example:
            >>> HookedMultimodalTransformer.from_pretrained(
            ...     "llava-hf/llava-1.5-7b-hf", dtype=torch.bfloat16, device_map="auto")
        """
        from mmlens.checkpoints.load import load_model

        refuse_arguments("from_pretrained", cls.from_pretrained, others)
        model = load_model(
            name_or_path,
            device=device,
            dtype=dtype,
            revision=revision,
            device_map=device_map,
            vision_tower=vision_tower,
        )
        model.image_processor = model.processor.bounded(min_pixels, max_pixels).image_processor
        return model

    @classmethod
    def from_pretrained_no_processing(
        cls, name_or_path: str | Path, **options: Any
    ) -> HookedMultimodalTransformer:
        """The same as `from_pretrained`, which never changes a checkpoint's weights."""
        return cls.from_pretrained(name_or_path, **options)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the model, edits included, in the format, names and shards that it came from.

        Raises:
            CheckpointError: it came from no checkpoint folder, or that folder has changed.
            FileExistsError: `folder` has something in it.
        """
        from mmlens.checkpoints.saving import save_model

        model: Any = self
        return save_model(model, Path(folder).expanduser())
