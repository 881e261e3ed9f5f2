"""What a recording holds of a finished run: residual stream, keys and values, images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmlens.branching.encoded_images import EncodedImages
from mmlens.branching.shared_past import FinishedRun
from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.model.components import KeyValueCache
from mmlens.model.components.attention_rule import Places
from mmlens.model.components.past import Past
from mmlens.model.components.rotary import Angles
from mmlens.model.hook_points import HookPoint, is_hook_point, reading

if TYPE_CHECKING:
    from mmlens.model.transformer import HookedMultimodalTransformer


@dataclass(frozen=True, eq=False)
class Stretch:
    """What a recording holds of the positions from `begin` on."""

    begin: int
    resid: tuple[Float[Tensor, "row own d_model"], ...]
    """The residual stream that enters each layer, and the one after the last."""
    keys_values: tuple[tuple[Tensor, Tensor], ...]
    """Per layer: [row, own, kv_head, d_head]."""

    def of_row(self, row: int, padding: int) -> Stretch:
        """One row of a batch without its padding, as if it had been run by itself."""

        def part(tensor: Tensor) -> Tensor:
            return tensor[row : row + 1, padding:]

        keys_values = tuple((part(keys), part(values)) for keys, values in self.keys_values)
        return Stretch(self.begin, tuple(map(part, self.resid)), keys_values)

    def after(self, before: Stretch) -> Stretch:
        """With the positions of another that lie before it."""
        n = self.begin - before.begin
        return Stretch(
            before.begin,
            tuple(map(lambda old, new: with_before(old[:, :n], new), before.resid, self.resid)),
            tuple(
                (with_before(old[0][:, :n], new[0]), with_before(old[1][:, :n], new[1]))
                for old, new in zip(before.keys_values, self.keys_values, strict=True)
            ),
        )


def with_before(before: Tensor, after: Tensor) -> Tensor:
    """Return both, one after the other in position; a single row of `before` serves all."""
    return torch.cat([before.expand(len(after), *before.shape[1:]), after], dim=1)


@dataclass(frozen=True, eq=False)
class RecordedRun:
    """A finished forward pass, as branches and recordings of similar prompts need it."""

    model: HookedMultimodalTransformer
    inputs: MultimodalInputs
    own: Stretch
    shared: Stretch | None
    """Of the recording that this one began like, which holds the positions before `own`."""
    encoded_images: EncodedImages | None
    cache: Mapping[str, Tensor] = field(default_factory=dict)
    """The activations that were asked for, at all positions."""

    @property
    def n_rows(self) -> int:
        """Rows of the recorded batch (samples of noise count as rows)."""
        return self.own.resid[0].shape[0]

    @cached_property
    def _whole(self) -> Stretch:
        return self.own if self.shared is None else self.own.after(self.shared)

    @property
    def resid(self) -> tuple[Float[Tensor, "batch pos d_model"], ...]:
        """The residual stream that enters each layer, and the one after the last."""
        return self._whole.resid

    @cached_property
    def places(self) -> Places:
        """The recorded positions, as the rules of attention ask about them."""
        return Places.of(self.inputs.attention_mask, self.inputs.blocks)

    def first_affected(self, position: int) -> int:
        """Return the first position that what changes at a position can change in later layers."""
        rules = self.model.rules.values()
        return min(rule.first_affected(position, self.places) for rule in rules)

    @cached_property
    def deepstack(self) -> tuple[Float[Tensor, "batch pos d_model"], ...]:
        """What the images add in the first blocks; () where they add nothing."""
        visual = None if self.encoded_images is None else self.encoded_images.visual
        return self.model.deepstack(self.inputs, visual)

    @property
    def past(self) -> KeyValueCache:
        """Keys and values of all positions, frozen."""
        return KeyValueCache.holding(
            self._whole.keys_values, self.inputs.attention_mask, self.inputs.rope_positions
        )

    def resid_from(self, layer: int, first: int) -> Float[Tensor, "batch suffix d_model"]:
        """What enters a layer (`n_layers`: the final norm), from a position on."""
        own = self.own.resid[layer]
        if self.shared is None or first >= self.own.begin:
            return own[:, first - self.own.begin :]
        return with_before(self.shared.resid[layer][:, first : self.own.begin], own)

    def past_before(self, first: int, inputs: MultimodalInputs | None = None) -> FinishedRun:
        """Return what continuations from `first` on attend to, of `inputs` or the recorded ones."""
        places = self.places
        if inputs is not None:
            places = Places.of(inputs.attention_mask, inputs.blocks)
        if self.shared is None:
            origin, before, after = first, self.own, self.own
        else:
            origin, before, after = min(first, self.own.begin), self.shared, self.own
            if origin < self.own.begin:
                after = self._whole
        at = origin - after.begin
        return FinishedRun(
            origin=origin,
            places=places,
            prefix=[(k[:, :origin], v[:, :origin]) for k, v in before.keys_values],
            base=[(k[:, at:], v[:, at:]) for k, v in after.keys_values],
        )


def keep_run(
    model: HookedMultimodalTransformer,
    resid: Tensor,
    begin: int,
    past: Past,
    angles: Angles,
    deepstack: Sequence[Tensor],
) -> Stretch:
    """Run all blocks from their input, and keep what branches need."""
    layers = range(model.cfg.n_layers)
    names = [
        [model.SITES.hook_name(site, layer) for layer in layers]
        for site in ("resid_pre", "rot_k", "v")
    ]
    with outputs_kept(model, [name for site in names for name in site]) as kept:
        resid = model.run_blocks(resid, layers, past, angles, deepstack)
    entering, keys, values = ([kept[name] for name in site] for site in names)
    return Stretch(begin, (*entering, resid), tuple(zip(keys, values, strict=True)))


@contextmanager
def outputs_kept(
    model: HookedMultimodalTransformer, names: Sequence[str]
) -> Iterator[dict[str, Tensor]]:
    """Keep what hook points give, or what stands in their place does (a sparse autoencoder)."""
    kept: dict[str, Tensor] = {}
    replaced = [name for name in names if not is_hook_point(model.get_submodule(name))]

    def keep(activation: Tensor, hook: HookPoint) -> None:
        kept[str(hook.name)] = by_itself(activation)

    def keep_as(name: str, module: nn.Module, given: Any, output: Tensor) -> None:
        kept[name] = by_itself(output)

    hooks = [(name, reading(keep)) for name in names if name not in replaced]
    with ExitStack() as stack, model.hooks(fwd_hooks=hooks):
        for name in replaced:
            module = model.get_submodule(name)
            stack.enter_context(module.register_forward_hook(partial(keep_as, name)))
        yield kept


def by_itself(activation: Tensor) -> Tensor:
    """Return a copy of what is a small part of a larger tensor: values share that of the queries.

    Who keeps a view keeps all of the memory that it is a view of.
    """
    held = activation.untyped_storage().nbytes()
    return activation.clone() if held > 2 * activation.nbytes else activation
