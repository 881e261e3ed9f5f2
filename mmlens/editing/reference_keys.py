"""Keys of references, computed once for a model and kept on disk.

The keys of a prompt are the down projection's inputs at its words, and at some of its visual
tokens. They depend on the weights below and on the prompt, and on nothing else; so the file of an
image's prompts is named by a hash of these, and whoever edits the same model finds it.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmlens.analyses.result import SavedResult
from mmlens.branching.recording import Recording
from mmlens.data.edits import SAME_IMAGE, SAME_QUESTION
from mmlens.demo.language_model import cache_folder
from mmlens.editing.fingerprints import fingerprint
from mmlens.editing.references import TEXT, UNRELATED, Reference, References
from mmlens.editing.request import EditRequest
from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.interventions.intervention import hook_name
from mmlens.utils.grad_mode import without_gradients

if TYPE_CHECKING:
    from mmlens.model.transformer import HookedMultimodalTransformer

__all__ = ["ReferenceKeys", "all_reference_keys", "reference_keys"]

VISUAL = 64
"""The most visual tokens of an image whose keys are kept."""
SAMPLED = 512
"""Values of each weight that go into its hash."""
MOST_BYTES = 4 * 10**9
"""On disk; then the files that were used longest ago make room."""
BLOCK = re.compile(r"blocks\.(\d+)\.(.*)")


@dataclass(frozen=True, eq=False)
class ReferenceKeys(SavedResult):
    """The keys of some prompts at one layer."""

    keys: Float[Tensor, "d_mlp _"]
    digest: str
    """A hash of the keys, by which a file that was changed since is known."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Number of `prompts`; `seconds`, 0 where all of them were on disk; and `bytes` there."""

    @property
    def is_whole(self) -> bool:
        """Whether the keys are finite, and those that the hash is of."""
        return bool(self.keys.isfinite().all()) and fingerprint(self.keys) == self.digest


def reference_keys(
    model: HookedMultimodalTransformer,
    request: EditRequest,
    kept: References,
    layer: int,
    *,
    at_end: bool = False,
) -> ReferenceKeys:
    """Return the keys of references but for those about the request's own image.

    For each image two files hold them: one for the request's question, and one for all else, which
    is the same for every request of the same form.

    Args:
        model: whose keys.
        request: what is edited.
        kept: references that the edit may be told of.
        layer: whose MLP.
        at_end: whether the keys at their last tokens are wanted, and no others.

    Raises:
        OSError: the cache folder cannot be written.
        ValueError: as `References.around`.
    """
    parts = [
        keys_once(model, kept.around(model, request, kinds), layer, at_end=at_end)
        for kinds in ((UNRELATED, TEXT), (SAME_QUESTION,))
    ]
    keys = torch.cat([part.keys.to(model.device) for part in parts], dim=1)
    return ReferenceKeys(
        keys,
        "",
        {
            name: sum(part.metadata[name] for part in parts)
            for name in ("prompts", "seconds", "bytes")
        },
    )


def all_reference_keys(
    model: HookedMultimodalTransformer,
    requests: Sequence[EditRequest],
    references: References,
    layer: int,
) -> Float[Tensor, "d_mlp _"]:
    """Return the keys of all references that edits may be told of, for methods other than MultEdit.

    Args:
        model: whose keys.
        requests: what is edited.
        references: of which two thirds are kept.
        layer: whose MLP.

    Raises:
        ValueError: there are none; or as `reference_keys`.
    """
    found = []
    for request in requests:
        about = references.kept.around(model, request, (SAME_IMAGE,))
        keys = keys_at(model, [each.inputs for each in about], layer)
        found += [reference_keys(model, request, references.kept, layer).keys, keys]
    together = torch.cat([each.to(model.device) for each in found], dim=1)
    if not together.shape[1]:
        raise ValueError("there are no references around these requests")
    return together


def keys_once(
    model: HookedMultimodalTransformer,
    references: Sequence[Reference],
    layer: int,
    *,
    at_end: bool = False,
) -> ReferenceKeys:
    """Return the keys of prompts, from the cache where they are there; else write them to it.

    There is one file for all that is asked about an image in a row.
    """
    folder = cache_folder() / "reference-keys"
    folder.mkdir(parents=True, exist_ok=True)
    weights = digest_of(model, layer)
    keys = [torch.zeros(model.cfg.d_mlp, 0)]
    seconds, size = 0.0, 0
    for pixels, group in groupby(references, key=lambda reference: pixels_of(reference.inputs)):
        prompts = [reference.inputs for reference in group]
        asked = str([inputs.tokens.tolist() for inputs in prompts]) + " at the end" * at_end
        name = hashlib.sha256(f"{weights} {pixels} {asked}".encode()).hexdigest()
        file = folder / f"{name}.safetensors"
        known = whole(file, model.cfg.d_mlp)
        if known is None:
            began = time.perf_counter()
            new = keys_at(model, prompts, layer, at_end=at_end)
            seconds += time.perf_counter() - began
            known = ReferenceKeys(new, fingerprint(new), {"layer": layer})
            known.save(file)
        keys.append(known.keys)
        size += file.stat().st_size
    if seconds:
        make_room(folder)
    together = torch.cat([each.to(keys[-1]) for each in keys], dim=1)
    used = {"prompts": len(references), "seconds": seconds, "bytes": size}
    return ReferenceKeys(together, "", used)


def whole(file: Path, d_mlp: int) -> ReferenceKeys | None:
    """Return what a file holds, or None where that is not what was written to it."""
    try:
        found = ReferenceKeys.load(file)
    except (OSError, ValueError):
        return None
    if len(found.keys) != d_mlp or not found.is_whole:
        return None
    with suppress(OSError):
        os.utime(file)  # it was used now: `make_room`
    return found


def make_room(folder: Path) -> None:
    """Remove the files that were used longest ago, until the others are not too many bytes."""
    with suppress(OSError):
        files = sorted(folder.glob("*.safetensors"), key=lambda file: file.stat().st_mtime)
        size = sum(file.stat().st_size for file in files)
        for file in files[:-1]:
            if size <= MOST_BYTES:
                break
            size -= file.stat().st_size
            file.unlink(missing_ok=True)


@without_gradients
def keys_at(
    model: HookedMultimodalTransformer,
    prompts: Sequence[MultimodalInputs],
    layer: int,
    *,
    at_end: bool = False,
) -> Float[Tensor, "d_mlp _"]:
    """Return the keys of prompts: at every word but BOS, and at some visual tokens of each image.

    Those `at_end` are the ones at the last tokens.

    Prompts about one image that come one after the other compute its visual tokens once.
    """
    name = hook_name("post", layer)
    found: list[Tensor] = []
    for _, group in groupby(prompts, key=pixels_of):
        recorded: list[Recording] = []
        for inputs in group:
            [recording] = Recording.of_all(model, [inputs], [name], recorded[:1])
            places = [-1] if at_end else wanted(recording.inputs, not recorded)
            found.append(recording.cache[name][0, places])
            recorded.append(recording)
    if not found:
        return torch.zeros(model.cfg.d_mlp, 0)
    return torch.cat(found).T.cpu().contiguous()


def wanted(inputs: MultimodalInputs, with_image: bool) -> list[int]:
    """Return the positions whose keys are kept."""
    visual = inputs.is_image[0]
    words = inputs.attention_mask[0] & ~visual
    words[inputs.spans[0].get("bos", [])] = False
    chosen = words.nonzero()[:, 0].tolist()
    if with_image:
        tokens = visual.nonzero()[:, 0].tolist()
        chosen += tokens[:: max(1, -(-len(tokens) // VISUAL))]
    return sorted(chosen)


def pixels_of(inputs: MultimodalInputs) -> str:
    """Return a hash of a prompt's images."""
    return "" if inputs.pixel_values is None else fingerprint(inputs.pixel_values)


def digest_of(model: HookedMultimodalTransformer, layer: int) -> str:
    """Return a hash of the weights on which the keys of a layer depend, and of the layer.

    Some values of each weight go into it: whatever changes a matrix (another checkpoint, an edit)
    changes all or many of them.
    """
    digest = hashlib.sha256(f"{layer} {model.cfg.dtype}".encode())
    for name, weight in weights_below(model, layer):
        values = weight.detach().flatten()
        few = values[:: max(1, len(values) // SAMPLED)].cpu().float()
        digest.update(f"{name} {tuple(weight.shape)}".encode() + few.contiguous().numpy().data)
    return digest.hexdigest()


def weights_below(
    model: HookedMultimodalTransformer, layer: int
) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield the weights on which the keys of a layer depend, with their names."""
    for name, weight in model.named_parameters():
        block = BLOCK.fullmatch(name)
        above = block and (int(block[1]), block[2].startswith("mlp.down")) >= (layer, True)
        if not above and not name.startswith(("ln_final", "unembed")):
            yield name, weight
