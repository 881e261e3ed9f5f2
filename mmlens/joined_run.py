"""Many branches in one pass up the layers, which they join where they first differ.

The branches are packed one after the other along the position axis (see
`mmlens.components.shared_past`): row r of the batch is row r of the recording, with all branches.
So nothing is computed that belongs to no branch, and what a branch's hook functions get is a slice.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from mmlens.components import Packing
from mmlens.hook_points import HookPoint, has_listeners
from mmlens.hooks import HookFunction, position_axis
from mmlens.interventions import Intervention
from mmlens.transfer import to_device

if TYPE_CHECKING:
    from mmlens.branching import Recording

Branch = Sequence[Intervention | tuple[str, HookFunction]]
"""What a branch changes. A bare `(hook name, function)` may do anything, so a branch with one of
them is run from the beginning."""

Declared = Sequence[Intervention]

# What the last layer computes at every position, for others to attend to.
KEY_SIDE = tuple(
    "hook_resid_pre ln1.hook_scale ln1.hook_normalized hook_k hook_rot_k hook_v".split()
)


@dataclass(frozen=True)
class Start:
    """Where a branch begins to differ."""

    layer: int
    """The layer at which it joins: `n_layers` for the final norm, -1 where it changes what enters
    the first layer."""
    first: int
    """The first position that can differ."""
    tail: int
    """The first position that is needed behind the last layer's keys and values."""


def start_of(recording: Recording, branch: Branch, read: Sequence[int]) -> Start | None:
    """Where a branch begins; None where that is unknown, since it holds a bare function.

    Raises:
        KeyError: the model has no such hook point.
    """
    n_layers, n_pos = recording.model.cfg.n_layers, recording.inputs.n_pos
    layers, firsts, tails = [n_layers], [n_pos - 1, min(read)], [n_pos - 1, min(read)]
    for part in branch:
        for name in part.hook_names() if isinstance(part, Intervention) else [part[0]]:
            recording.model.check_hook_name(name)
            if isinstance(part, Intervention):
                layers.append(entry_layer(name, n_layers))
                if part.first_position is None:
                    continue
                first = first_changed(recording, part)
                firsts.append(first)
                if is_behind_keys(name, n_layers):
                    tails.append(first)
    if not all(isinstance(part, Intervention) for part in branch):
        return None
    return Start(min(layers), min(firsts), min(tails))


def entry_layer(name: str, n_layers: int) -> int:
    """The first layer whose input a hook point changes; what it does within one counts as that."""
    if name.startswith("ln_final."):
        return n_layers
    if not name.startswith("blocks."):
        return -1
    layer = int(name.split(".")[1])
    return layer + name.endswith("hook_resid_post")


def first_changed(recording: Recording, part: Intervention) -> int:
    """The first position of the language model that an intervention can change."""
    if sees(part):
        starts = [start for row in recording.inputs.image_starts for start in row]
        return min(starts, default=recording.inputs.n_pos - 1)
    return part.first_position or 0


def sees(part: Intervention) -> bool:
    """Whether an intervention acts on the vision tower or the projector."""
    return part.site.startswith(("vision.", "projector."))


def is_behind_keys(name: str, n_layers: int) -> bool:
    """Whether a hook point sees only what is needed behind the last layer's keys and values."""
    last = name.startswith(f"blocks.{n_layers - 1}.") and not name.endswith(KEY_SIDE)
    return last or name.startswith("ln_final.")


def run_joined(
    recording: Recording,
    branches: Sequence[Declared],
    starts: Sequence[Start],
    read: Sequence[int],
) -> Float[Tensor, "row read d_model"]:
    """What the unembedding gets at the positions that are read: one row per branch and row.

    Args:
        branches: in the order in which they join.
    """
    model, n_layers, n_pos = recording.model, recording.model.cfg.n_layers, recording.inputs.n_pos
    packed = Packing([start.first for start in starts], n_pos)
    tails = Packing([start.tail for start in starts], n_pos)
    past = recording.past_before(packed.first)
    rotary = model.rotary.cos_sin(recording.inputs.position_ids, recording.own.resid[0].dtype)
    below = streams_from_below(recording, branches, starts)
    resid: Tensor | None = None
    n_joined = 0
    with model.hooks(fwd_hooks=dispatch(branches, starts, packed, tails, n_layers)):
        for layer in range(max(starts[0].layer, 0), n_layers + 1):
            new = [
                below[i] if i in below else entering(recording, branches[i], starts[i])
                for i in range(n_joined, len(starts))
                if starts[i].layer <= layer
            ]
            if new:
                resid = torch.cat(new if resid is None else [resid.to(new[0]), *new], dim=1)
                n_joined += len(new)
            if layer == n_layers or resid is None:
                break
            if new:
                past.keys = past.queries = Packing(packed.starts[:n_joined], n_pos)
                at = past.keys.positions(resid.device)
                cos_sin = tuple(part.to(at.device)[:, at] for part in rotary)
            keep = None
            if layer == n_layers - 1:
                past.queries = Packing(tails.starts[:n_joined], n_pos)
                keep = past.keys.entries_of(past.queries, resid.device)
            resid = model.blocks[layer](resid, keep=keep, cos_sin=cos_sin, cache=past, layer=layer)
        assert resid is not None
        ends = [offset - n_pos for offset in tails.offsets[1:]]
        at = torch.tensor([end + position for end in ends for position in read])
        at = to_device(at, resid.device)
        norm = model.ln_final
        if has_listeners(norm.hook_scale, norm.hook_normalized):
            final = norm(resid)[:, at]  # interventions on it count positions
        else:
            final = norm(resid[:, at])
    return final.unflatten(1, (len(starts), len(read))).transpose(0, 1).flatten(0, 1)


def entering(
    recording: Recording, branch: Declared, start: Start
) -> Float[Tensor, "row suffix d_model"]:
    """The residual stream with which a branch joins.

    What it changes behind the layer before is changed here, and that layer left out.
    """
    n_layers = recording.model.cfg.n_layers
    first = start.tail if start.layer == n_layers else start.first
    stream = recording.resid_from(start.layer, first)
    for part in branch:
        if part.site == "resid_post" and start.layer - 1 in (part.layers or ()):
            hook = recording.model.blocks[start.layer - 1].hook_resid_post
            stream = part.edit(stream.clone(), hook, first=first)
    return stream


def streams_from_below(
    recording: Recording, branches: Sequence[Declared], starts: Sequence[Start]
) -> dict[int, Float[Tensor, "row suffix d_model"]]:
    """What enters the first layer, for the branches that change it: pictures or embeddings."""
    model, pictures = recording.model, recording.pictures
    below = [index for index, start in enumerate(starts) if start.layer < 0]
    if not below:
        return {}
    edits = {index: [part for part in branches[index] if sees(part)] for index in below}
    seeing = {index: parts for index, parts in edits.items() if parts}
    visual = dict.fromkeys(below, None if pictures is None else pictures.visual)
    if seeing and pictures is not None:
        visual |= dict(zip(seeing, pictures.edited(model, list(seeing.values())), strict=True))
    streams = {}
    for index in below:
        parts = [part for part in branches[index] if part.site in ("embed", "input_embed")]
        hooks = [pair for part in parts for pair in part.fwd_hooks()]
        with model.hooks(fwd_hooks=hooks):
            stream = model.input_embeddings(recording.inputs, visual[index])
        streams[index] = stream[:, starts[index].first :]
    return streams


def dispatch(
    branches: Sequence[Declared],
    starts: Sequence[Start],
    packed: Packing,
    tails: Packing,
    n_layers: int,
) -> list[tuple[str, HookFunction]]:
    """One hook function per hook point, which gives each branch's slice to its interventions.

    Branches join in order, so the slice of each is known before it does.
    """
    edits: dict[str, list[tuple[int, Intervention]]] = defaultdict(list)
    for index, branch in enumerate(branches):
        for part in branch:
            for name in part.hook_names():
                if not name.startswith(("blocks.", "ln_final.")):
                    continue  # what enters the first layer holds it already
                joins = starts[index].layer == entry_layer(name, n_layers)
                if not (joins and name.endswith("hook_resid_post")):
                    edits[name].append((index, part))

    def edit(
        activation: Tensor,
        hook: HookPoint,
        edits: list[tuple[int, Intervention]],
        packing: Packing,
    ) -> Tensor:
        axis = position_axis(str(hook.name))
        changed: dict[int, Tensor] = {}
        for index, part in edits:
            begin, end = packing.offsets[index : index + 2]
            before = changed.get(index, activation.narrow(axis, begin, end - begin))
            changed[index] = part.edit(before, hook, first=packing.starts[index])
        # The activations of a joined run are its own, so a copy is needed for gradients alone.
        edited = activation.clone() if torch.is_grad_enabled() else activation
        for index, after in changed.items():
            begin, end = packing.offsets[index : index + 2]
            edited.narrow(axis, begin, end - begin).copy_(after)
        return edited

    return [
        (
            name,
            partial(edit, edits=each, packing=tails if is_behind_keys(name, n_layers) else packed),
        )
        for name, each in edits.items()
    ]
