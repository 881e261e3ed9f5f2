"""Branching: runs that differ from a finished one start where they differ.

    recording = model.record(inputs)
    recording.run([[Intervention("mlp_out", layer, 40, zero())] for layer in range(30)],
                  readout=lambda logits: logits[:, -1].softmax(-1)[:, answer])

A `Recording` keeps a run's residual stream at every layer and its keys and values. A branch is a
list of interventions. It cannot change what lies below its first layer, nor (attention is causal)
what lies before its first position; so it starts at that layer from the recorded residual stream,
over the remaining positions only, and attends to the recorded keys and values of the others.

`recording.run(branches)` evaluates many branches in one pass up the layers (`mmlens.joined_run`).
`recording.record(other_inputs)` is the recording of a prompt that begins in the same way: only what
follows is computed, and kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmlens.beginnings import common_prefix
from mmlens.components import KeyValueCache, Packing, SharedPast
from mmlens.hook_points import HookPoint, listens
from mmlens.hooks import HookFunction, position_axis
from mmlens.inputs import MultimodalInputs, collate
from mmlens.interventions import Intervention
from mmlens.joined_run import Branch, Start, run_joined, start_of
from mmlens.layout import check_one_prompt
from mmlens.passes import Pass, is_out_of_memory, passes
from mmlens.pictures import Pictures

if TYPE_CHECKING:
    from mmlens.model import HookedMultimodalTransformer

Readout = Callable[[Float[Tensor, "row read n_tokens"]], Tensor]


@dataclass(frozen=True, eq=False)
class Stretch:
    """What a recording holds of the positions from `begin` on."""

    begin: int
    resid: tuple[Float[Tensor, "row own d_model"], ...]
    """The residual stream that enters each layer, and the one behind the last."""
    keys_values: tuple[tuple[Tensor, Tensor], ...]
    """Per layer: [row, own, kv_head, d_head]."""

    def of_row(self, row: int, padding: int) -> Stretch:
        """One row of a batch without its padding, as if it had been run by itself."""

        def part(tensor: Tensor) -> Tensor:
            return tensor[row : row + 1, padding:]

        keys_values = tuple((part(keys), part(values)) for keys, values in self.keys_values)
        return Stretch(self.begin, tuple(map(part, self.resid)), keys_values)

    def behind(self, before: Stretch) -> Stretch:
        """With the positions of another that lie before it."""
        n = self.begin - before.begin
        return Stretch(
            before.begin,
            tuple(map(lambda old, new: joined(old[:, :n], new), before.resid, self.resid)),
            tuple(
                (joined(old[0][:, :n], new[0]), joined(old[1][:, :n], new[1]))
                for old, new in zip(before.keys_values, self.keys_values, strict=True)
            ),
        )


def joined(before: Tensor, after: Tensor) -> Tensor:
    """Along the positions; a single row of `before` serves all."""
    return torch.cat([before.expand(len(after), *before.shape[1:]), after], dim=1)


@dataclass(frozen=True, eq=False)
class Recording:
    """A finished forward pass that later runs branch from; made by `model.record(inputs)`.

    It is a constant: gradients flow through a branch to what its hook functions hold, not further.
    """

    model: HookedMultimodalTransformer
    inputs: MultimodalInputs
    own: Stretch
    shared: Stretch | None
    """Of the recording that this one began like, which holds the positions before `own`."""
    pictures: Pictures | None
    cache: Mapping[str, Tensor] = field(default_factory=dict)
    """The activations that were asked for, at all positions."""

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        model: HookedMultimodalTransformer,
        inputs: MultimodalInputs,
        names: Sequence[str] = (),
        known: Pictures | None = None,
    ) -> Recording:
        """Run the model once, and keep; pictures among the `known` ones are not encoded."""
        inputs = model.to_inputs(inputs)
        cache, caching, _ = model.get_caching_hooks(names)
        with model.hooks(fwd_hooks=caching):
            pictures = Pictures.encoded(model, inputs, known)
            resid = model.input_embeddings(inputs, None if pictures is None else pictures.visual)
            mask, cos_sin = model.attention_context(resid, inputs.attention_mask, None, None)
            own = keep_run(model, resid, 0, cos_sin=cos_sin, mask=mask)
        return cls(model, inputs, own, None, pictures, cache)

    @classmethod
    def of_each(
        cls,
        model: HookedMultimodalTransformer,
        inputs: Sequence[MultimodalInputs],
        known: Pictures | None = None,
    ) -> list[Recording]:
        """The recordings of several prompts, run as one batch: for those that share nothing.

        Raises:
            ValueError: inputs that are no single prompts without noise, or as `collate`.
        """
        inputs = [model.to_inputs(each) for each in inputs]
        for each in inputs:
            check_one_prompt(len(each), "Recording.of_each")
            if each.noise is not None:
                raise ValueError("Recording.of_each takes prompts without noise")
        if len(inputs) == 1:
            return [cls.of(model, inputs[0], known=known)]
        batch = cls.of(model, collate(inputs, model.cfg.pad_token_id or 0), known=known)
        found, image = [], 0
        for row, each in enumerate(inputs):
            n_images = sum(each.n_images)
            pictures = batch.pictures and batch.pictures.part(image, image + n_images)
            own = batch.own.of_row(row, batch.inputs.n_pos - each.n_pos)
            found.append(cls(model, each, own, None, pictures if n_images else None))
            image += n_images
        return found

    @torch.no_grad()
    def record(self, inputs: MultimodalInputs, names: Sequence[str] = ()) -> Recording:
        """The recording of inputs that begin like these: only the rest is computed and kept.

        Pictures that are the same are not encoded again. A prompt that has nothing in common with
        this one is recorded from the beginning.

        Args:
            names: hook points whose activations are kept besides, in `cache`.

        Example:
            >>> clean = model.record(inputs)
            >>> corrupted = clean.record(swap_span(model, inputs, "constraint", "Paris"))
        """
        inputs = self.model.to_inputs(inputs)
        first = min(common_prefix(self.inputs, inputs), inputs.n_pos - 1)
        rows_fit, cached = self.n_rows in (1, inputs.n_rows), joinable(names, self.cache)
        if not (first and rows_fit and cached) or listens(self.model):
            return Recording.of(self.model, inputs, names)
        pictures = Pictures.encoded(self.model, inputs, known=self.pictures)
        visual = None if pictures is None else pictures.visual
        resid = self.model.input_embeddings(inputs, visual)[:, first:]
        past = self.past_before(first, inputs)
        past.keys = past.queries = Packing([first], inputs.n_pos)
        cos_sin = self.model.rotary.cos_sin(inputs.position_ids[:, first:], resid.dtype)
        kept, caching, _ = self.model.get_caching_hooks(names)
        with self.model.hooks(fwd_hooks=caching):
            own = keep_run(self.model, resid, first, cos_sin=cos_sin, cache=past)
        cache = {name: joined(self.cache[name][:, :first], new) for name, new in kept.items()}
        shared = self.own if self.shared is None else self.shared
        if self.shared is not None and first > self.own.begin:
            own = own.behind(self.own)
        return Recording(self.model, inputs, own, shared, pictures, cache)

    @property
    def n_rows(self) -> int:
        """Rows of the recorded batch (samples of noise count as rows)."""
        return self.own.resid[0].shape[0]

    @cached_property
    def _whole(self) -> Stretch:
        return self.own if self.shared is None else self.own.behind(self.shared)

    @property
    def resid(self) -> tuple[Float[Tensor, "batch pos d_model"], ...]:
        """The residual stream that enters each layer, and the one behind the last."""
        return self._whole.resid

    @property
    def past(self) -> KeyValueCache:
        """Keys and values of all positions, frozen."""
        return KeyValueCache.holding(self._whole.keys_values, self.inputs.attention_mask)

    def resid_from(self, layer: int, first: int) -> Float[Tensor, "batch suffix d_model"]:
        """What enters a layer (`n_layers`: the final norm), from a position on."""
        own = self.own.resid[layer]
        if self.shared is None or first >= self.own.begin:
            return own[:, first - self.own.begin :]
        return joined(self.shared.resid[layer][:, first : self.own.begin], own)

    def past_before(self, first: int, inputs: MultimodalInputs | None = None) -> SharedPast:
        """What continuations from `first` on look at: of `inputs`, or of the recorded ones."""
        inputs = self.inputs if inputs is None else inputs
        if self.shared is None:
            origin, before, after = first, self.own, self.own
        else:
            origin, before, after = min(first, self.own.begin), self.shared, self.own
            if origin < self.own.begin:
                after = self._whole
        at = origin - after.begin
        return SharedPast(
            origin=origin,
            n_pos=inputs.n_pos,
            prefix=[(k[:, :origin], v[:, :origin]) for k, v in before.keys_values],
            base=[(k[:, at:], v[:, at:]) for k, v in after.keys_values],
            key_mask=None if bool(inputs.attention_mask.all()) else inputs.attention_mask,
        )

    def logits(
        self, positions: Int[Tensor, " read"] | Sequence[int] | None = None
    ) -> Float[Tensor, "batch read d_vocab"]:
        """The recorded run's logits at `positions` (the last one by default)."""
        read = self._read(positions)
        first = min(read)
        resid = self.resid_from(self.model.cfg.n_layers, first)
        at = torch.tensor(read, device=resid.device) - first
        if listens(self.model):  # a hook on the final norm counts positions
            return self.model.unembed(self.model.ln_final(self.resid[-1])[:, at + first])
        return self.model.unembed(self.model.ln_final(resid[:, at]))

    def run(
        self,
        branches: Sequence[Branch],
        readout: Readout,
        *,
        positions: Int[Tensor, " read"] | Sequence[int] | None = None,
        tokens: Int[Tensor, " n_tokens"] | Sequence[int] | None = None,
        batch_rows: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Evaluate every branch, and stack what `readout` makes of it.

        Equal to a plain hooked run of each branch, to rounding. While other hooks are on the
        model, every branch is a plain run, since there is no saying what they touch.

        Args:
            branches: what each branch changes.
            readout: called with the logits [row, read, n_tokens] of some branches, one row per
                branch and row of the recording; what it returns keeps the first axis.
            positions: where logits are read; the last position by default.
            tokens: whose logits are computed; the whole vocabulary by default, which
                probabilities need.
            batch_rows: the most rows computed at once (but at least one branch); None takes what
                fits into free memory and is fast. Either way it is halved when memory runs out.
            progress: called with the number of branches done since the last call.

        Returns:
            [branch, batch, ...], in the order of `branches`.

        Raises:
            ValueError: no branches, or `positions` that are not there.
            IndexError: an intervention's positions are not there.
            KeyError: the model has no such hook point.
        """
        if not branches:
            raise ValueError("no branches to run")
        read = self._read(positions)
        plain = listens(self.model)
        starts = [None if plain else start_of(self, branch, read) for branch in branches]
        pending = passes(starts, self.inputs.n_pos, self.n_rows, self.model, batch_rows)
        results: dict[int, Tensor] = {}
        while pending:
            each = pending.pop(0)
            rows = self._evaluated(each, branches, starts, read, tokens, readout)
            if rows is None:
                pending = [part for old in (each, *pending) for part in old.within(each.size // 2)]
                continue
            results.update(zip(each.indices, rows, strict=True))
            if progress is not None:
                progress(len(each.indices))
        return torch.stack([results[index] for index in range(len(branches))])

    def _evaluated(
        self,
        each: Pass,
        branches: Sequence[Branch],
        starts: Sequence[Start | None],
        read: list[int],
        tokens: Tensor | Sequence[int] | None,
        readout: Readout,
    ) -> Tensor | None:
        """What `readout` makes of a pass [branch, row, ...]; None where memory ran out."""
        chosen = [branches[index] for index in each.indices]
        try:
            if each.is_plain:
                resid = torch.cat([self._run_plainly(branch, read) for branch in chosen])
            else:
                declared: Any = chosen
                joining: Any = [starts[index] for index in each.indices]
                resid = run_joined(self, declared, joining, read)
            logits = self.model.unembed(resid, None if tokens is None else torch.as_tensor(tokens))
            return readout(logits).unflatten(0, (len(chosen), self.n_rows))
        except (RuntimeError, MemoryError) as error:
            if len(chosen) == 1 or not is_out_of_memory(error):
                raise
            return None

    def _run_plainly(self, branch: Branch, read: list[int]) -> Tensor:
        hooks: list[tuple[str, HookFunction]] = []
        for part in branch:
            hooks += part.fwd_hooks() if isinstance(part, Intervention) else [part]
        with self.model.hooks(fwd_hooks=hooks):  # they may count positions of the final norm
            resid = self.model(self.inputs, stop_at_layer=self.model.cfg.n_layers)
            return self.model.ln_final(resid)[:, read]

    def _read(self, positions: Tensor | Sequence[int] | None) -> list[int]:
        n_pos = self.inputs.n_pos
        given = [n_pos - 1] if positions is None else torch.as_tensor(positions).tolist()
        if not given or not 0 <= min(given) <= max(given) < n_pos:
            raise ValueError(f"cannot read at {given}; positions are 0 ... {n_pos - 1}")
        return given


def joinable(names: Sequence[str], cache: Mapping[str, Tensor]) -> bool:
    """Whether activations of a suffix can be put behind those of a cache: position by position."""
    return all(
        name in cache and name.startswith("blocks.") and position_axis(name) == 1 for name in names
    )


def keep_run(
    model: HookedMultimodalTransformer, resid: Tensor, begin: int, **attention: Any
) -> Stretch:
    """Run all blocks from their input, and keep what branches need."""
    kept: dict[str, Tensor] = {}

    def keep(activation: Tensor, hook: HookPoint) -> None:
        kept[str(hook.name)] = activation

    layers = range(model.cfg.n_layers)
    names = [
        [f"blocks.{layer}.{site}" for layer in layers]
        for site in ("hook_resid_pre", "attn.hook_rot_k", "attn.hook_v")
    ]
    with model.hooks(fwd_hooks=[(name, keep) for site in names for name in site]):
        for layer in layers:
            resid = model.blocks[layer](resid, layer=layer, **attention)
    entering, keys, values = ([kept[name] for name in site] for site in names)
    return Stretch(begin, (*entering, resid), tuple(zip(keys, values, strict=True)))
