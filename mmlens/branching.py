"""Branching: runs that differ from a finished one start where they differ.

    recording = model.record(inputs)
    recording.run([[Intervention("mlp_out", layer, 40, zero())] for layer in range(30)],
                  readout=lambda logits: logits[:, -1].softmax(-1)[:, answer])

A `Recording` keeps a run's residual stream at every layer and its keys and values. A branch is a
list of interventions. It cannot change what lies below its first layer, nor (attention is causal)
what lies before its first position; so it starts at that layer from the recorded residual stream,
over the remaining positions only, and attends to the recorded keys and values of the others.

`recording.run(branches)` evaluates many branches in one pass up the layers, with a batch that
grows: branches join it at the layer where they first differ. Branches with different first
positions go in different passes.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmlens.components import KeyValueCache
from mmlens.components.key_value_cache import for_rows
from mmlens.hook_points import HookPoint
from mmlens.hooks import HookFunction
from mmlens.inputs import MultimodalInputs
from mmlens.interventions import Intervention

if TYPE_CHECKING:
    from mmlens.model import HookedMultimodalTransformer

Branch = Sequence[Intervention | tuple[str, HookFunction]]
"""What a branch changes. A bare `(hook name, function)` may do anything, so a branch with one of
them is run from the beginning."""
Readout = Callable[[Float[Tensor, "row read d_vocab"]], Tensor]


@dataclass(frozen=True)
class Pass:
    """Branches that are computed together."""

    first: int
    """The first position that is computed."""
    indices: tuple[int, ...]
    """Which branches, in the order in which they join."""
    layers: tuple[int, ...] | None
    """The layer at which each joins; None where they are run from the beginning instead."""


@dataclass(frozen=True, eq=False)
class Recording:
    """A finished forward pass that later runs branch from; made by `model.record(inputs)`.

    It is a constant: gradients flow through a branch to what its hook functions hold, not further.
    """

    model: HookedMultimodalTransformer
    inputs: MultimodalInputs
    resid: tuple[Float[Tensor, "batch pos d_model"], ...]
    """The residual stream that enters each layer, and the one behind the last."""
    past: KeyValueCache
    """Keys and values of all positions, frozen."""

    @classmethod
    @torch.no_grad()
    def of(cls, model: HookedMultimodalTransformer, inputs: MultimodalInputs) -> Recording:
        """Run the model once, and keep."""
        past = KeyValueCache(model.cfg.n_layers)
        stream: list[Tensor] = []

        def keep(activation: Tensor, hook: HookPoint) -> None:
            stream.append(activation)

        entering = [(f"blocks.{layer}.hook_resid_pre", keep) for layer in range(model.cfg.n_layers)]
        with model.hooks(fwd_hooks=entering):
            final = model(inputs, past_kv_cache=past, stop_at_layer=model.cfg.n_layers)
        past.frozen = True
        return cls(model, inputs, (*stream, final), past)

    def logits(
        self, positions: Int[Tensor, " read"] | Sequence[int] | None = None
    ) -> Float[Tensor, "batch read d_vocab"]:
        """The recorded run's logits at `positions` (the last one by default)."""
        return self._logits(self.resid[-1], self._read(positions))

    def run(
        self,
        branches: Sequence[Branch],
        readout: Readout,
        *,
        positions: Int[Tensor, " read"] | Sequence[int] | None = None,
        batch_rows: int = 64,
        progress: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Evaluate every branch, and stack what `readout` makes of it.

        Equal to a plain hooked run of each branch, to rounding. While other hooks are on the
        model, every branch is a plain run, since there is no saying what they touch.

        Args:
            branches: what each branch changes.
            readout: called with the logits [row, read, d_vocab] of some branches, one row per
                branch and row of the recording; what it returns keeps the first axis.
            positions: where logits are read; the last position by default.
            batch_rows: the most rows computed at once (but at least one branch).
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
        results: dict[int, Tensor] = {}
        for each in self._passes(branches, read, max(1, batch_rows // self.n_rows)):
            chosen = [branches[index] for index in each.indices]
            if each.layers is None:
                logits = torch.cat([self._run_plainly(branch, read) for branch in chosen])
            else:
                logits = self._run_joined(chosen, each.layers, each.first, read)
            rows = readout(logits).unflatten(0, (len(chosen), self.n_rows))
            results.update(zip(each.indices, rows, strict=True))
            if progress is not None:
                progress(len(chosen))
        return torch.stack([results[index] for index in range(len(branches))])

    @property
    def n_rows(self) -> int:
        """Rows of the recorded batch (samples of noise count as rows)."""
        return self.resid[0].shape[0]

    def _read(self, positions: Tensor | Sequence[int] | None) -> Tensor:
        n_pos = self.inputs.n_pos
        read = torch.as_tensor([n_pos - 1] if positions is None else positions)
        if not len(read) or not 0 <= int(read.min()) <= int(read.max()) < n_pos:
            raise ValueError(f"cannot read at {read.tolist()}; positions are 0 ... {n_pos - 1}")
        return read.to(self.resid[0].device)

    def _passes(self, branches: Sequence[Branch], read: Tensor, size: int) -> Iterator[Pass]:
        """Which branches go together: those with the same first position, up to `size`."""
        last = int(read.min())
        plain = listens(self.model)
        groups: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for index, branch in enumerate(branches):
            start = self._start(branch)
            layer, first = (-1, 0) if plain or start is None else start
            groups[min(first, last)].append((layer, index))
        for first, members in sorted(groups.items()):
            below = [index for layer, index in members if layer < 0]
            for index in below:
                yield Pass(0, (index,), None)
            joining = sorted(member for member in members if member[0] >= 0)
            for begin in range(0, len(joining), size):
                layers, indices = zip(*joining[begin : begin + size], strict=True)
                yield Pass(first, indices, layers)

    def _start(self, branch: Branch) -> tuple[int, int] | None:
        """First layer (`n_layers` is the final norm) and position that a branch can change.

        None where that is something below the blocks, or unknown.
        """
        layers, firsts = [self.model.cfg.n_layers], [self.inputs.n_pos - 1]
        declared = True
        for part in branch:
            for name in part.hook_names() if isinstance(part, Intervention) else [part[0]]:
                self.model.check_hook_name(name)
                if name.startswith("blocks."):
                    layers.append(int(name.split(".")[1]))
                elif not name.startswith("ln_final."):
                    declared = False
            if not isinstance(part, Intervention):
                declared = False
            elif part.first_position is not None:
                firsts.append(part.first_position)
        return (min(layers), min(firsts)) if declared else None

    def _run_plainly(self, branch: Branch, read: Tensor) -> Tensor:
        hooks: list[tuple[str, HookFunction]] = []
        for part in branch:
            hooks += part.fwd_hooks() if isinstance(part, Intervention) else [part]
        with self.model.hooks(fwd_hooks=hooks):
            resid = self.model(self.inputs, stop_at_layer=self.model.cfg.n_layers)
            return self._logits(resid, read)

    def _run_joined(
        self, branches: Sequence[Branch], layers: Sequence[int], first: int, read: Tensor
    ) -> Tensor:
        """Logits of branches that join at `layers` (ascending), over positions from `first` on."""
        n_layers = self.model.cfg.n_layers
        past = self.past.prefix(first)
        suffix = self.resid[0][:, first:]
        mask, cos_sin = self.model.attention_context(
            suffix, self.inputs.attention_mask[:, first:], None, past
        )
        joining = Counter(layers)
        resid = suffix[:0]
        with self.model.hooks(fwd_hooks=dispatch(branches, first, self.n_rows)):
            for layer in range(layers[0], n_layers + 1):
                if joining[layer]:
                    new = self.resid[layer][:, first:]
                    resid = torch.cat([resid, for_rows(new, joining[layer] * self.n_rows)])
                if layer < n_layers:
                    resid = self.model.blocks[layer](
                        resid,
                        cos_sin=tuple(for_rows(part, len(resid)) for part in cos_sin),
                        mask=None if mask is None else for_rows(mask, len(resid)),
                        cache=past,
                        layer=layer,
                    )
            return self._logits(resid, read - first)

    def _logits(self, resid: Tensor, read: Tensor) -> Tensor:
        # The final norm sees all positions: interventions on it count them.
        return self.model.unembed(self.model.ln_final(resid)[:, read])


def listens(model: HookedMultimodalTransformer) -> bool:
    """Whether any hook is on the model, of ours or of torch."""
    return any(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        for module in model.modules()
    )


def dispatch(branches: Sequence[Branch], first: int, n_rows: int) -> list[tuple[str, HookFunction]]:
    """One hook function per hook point, which gives each branch's rows to its interventions.

    Branches join in order, so the rows of each are known before it does.

    Args:
        branches: in that order.
        first: the position that the activations begin with.
        n_rows: rows of one branch.
    """
    edits: dict[str, list[tuple[int, Intervention]]] = defaultdict(list)
    for index, branch in enumerate(branches):
        for intervention in branch:
            assert isinstance(intervention, Intervention)  # others are run plainly
            for name in intervention.hook_names():
                edits[name].append((index * n_rows, intervention))

    def edit_rows(
        activation: Tensor, hook: HookPoint, edits: list[tuple[int, Intervention]]
    ) -> Tensor:
        changed: dict[int, Tensor] = {}
        for row, intervention in edits:
            before = changed[row] if row in changed else activation[row : row + n_rows]
            changed[row] = intervention.edit(before, hook, first=first)
        edited = activation.clone()
        for row, after in changed.items():
            edited[row : row + n_rows] = after
        return edited

    return [(name, partial(edit_rows, edits=each)) for name, each in edits.items()]
