"""Many branches in one pass up the layers, which they join where they first differ.

The branches are packed one after the other along the position axis (`mmlens.branching.packing`):
row r of the batch is row r of the recording, with all branches. So nothing is computed that belongs
to no branch, and what a branch's hook functions get is a slice.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmlens.branching.packing import Packing
from mmlens.branching.reads import Read
from mmlens.branching.schedule import Schedule, Start
from mmlens.branching.shared_past import SharedPast
from mmlens.branching.state import RecordedRun
from mmlens.interventions.cut import edit_together
from mmlens.interventions.functions import HookFunction
from mmlens.interventions.intervention import Intervention, hook_name
from mmlens.model.hook_points import HookPoint, has_listeners, reading
from mmlens.model.sites import Site
from mmlens.utils.tensors import to_device

Branch = Sequence[Intervention | tuple[str, HookFunction]]
"""What a branch changes. A bare `(hook name, function)` may do anything, so a branch with one of
them is run from the beginning."""

Declared = Sequence[Intervention]


def as_branches(branches: Iterable[Any]) -> list[Branch]:
    """Return branches as lists, which can be read more than once.

    Raises:
        TypeError: something else than lists of interventions, or of pairs.
    """
    found: list[Branch] = []
    for each in branches:
        parts = list(each) if isinstance(each, Iterable) and not isinstance(each, str) else [each]
        wrong = [part for part in parts if not isinstance(part, Intervention | tuple)]
        if wrong or not isinstance(each, Iterable):
            raise TypeError(
                "a branch is a list of mmlens.Intervention (or of pairs of a hook name and a "
                f"function), not {type(wrong[0] if wrong else each).__name__}"
            )
        found.append(parts)
    return found


def start_of(
    recording: RecordedRun, branch: Branch, read: Sequence[int], reads: Sequence[Read] = ()
) -> Start | None:
    """Where a branch begins; None where that is unknown, since it holds a bare function.

    What is read of it is computed, also where the recorded run has the same.
    """
    n_layers, n_pos = recording.model.cfg.n_layers, recording.inputs.n_pos
    layers, firsts, tails = [n_layers], [n_pos - 1, min(read)], [n_pos - 1, min(read)]
    for part in branch:
        if not isinstance(part, Intervention):
            recording.model.check_hook_name(part[0])
            continue
        for name, layer in part.places():
            recording.model.check_hook_name(name)
            layers.append(entry_layer(part.where, layer, n_layers))
            if part.first_position is None:
                continue
            first = first_changed(recording, part)
            firsts.append(recording.first_affected(first))
            if is_after_keys(part.where, layer, n_layers):
                tails.append(first)
    for each in reads:
        layers.append(each.last_layer(n_layers))
        firsts.append(each.first)
        if is_after_keys(each.where, each.layer, n_layers):
            tails.append(each.first)
    if not all(isinstance(part, Intervention) for part in branch):
        return None
    return Start(min(layers), min(firsts), min(tails))


def entry_layer(site: Site, layer: int | None, n_layers: int) -> int:
    """The first layer whose input a site changes; what it does within one counts as that."""
    if site.stack != "decoder":
        return -1
    if layer is None:
        return n_layers if site.after else -1
    return layer + site.after


def first_changed(recording: RecordedRun, part: Intervention) -> int:
    """The first position of the language model that an intervention can change."""
    if sees(part):
        starts = [int(image.positions[0]) for image in recording.inputs.images]
        return min(starts, default=recording.inputs.n_pos - 1)
    return part.first_position or 0


def sees(part: Intervention) -> bool:
    """Whether an intervention acts on the vision tower or the projector."""
    return part.where.stack != "decoder"


def edits_output(part: Intervention, layer: int | None) -> bool:
    """Whether an intervention acts on what a layer of the decoder hands on to the next."""
    return part.where.after and not sees(part) and layer in (part.layers or ())


def is_after_keys(site: Site, layer: int | None, n_layers: int) -> bool:
    """Whether a site sees only what is needed after the last layer's keys and values."""
    if site.stack != "decoder":
        return False
    return site.after if layer is None else layer == n_layers - 1 and not site.key_side


def reading_hooks(
    reads: Sequence[Read], schedule: Schedule, n_layers: int, kept: dict[Read, Tensor]
) -> list[tuple[str, HookFunction]]:
    """Hook functions that keep what is read of every branch, after its edits."""
    hooks: list[tuple[str, HookFunction]] = []
    for each in reads:
        after_keys = is_after_keys(each.where, each.layer, n_layers)
        packing = schedule.tails if after_keys else schedule.firsts
        hooks.append((each.name, reading(partial(each.keep, packing=packing, kept=kept))))
    return hooks


def run_joined(
    recording: RecordedRun,
    branches: Sequence[Declared],
    starts: Sequence[Start],
    read: Sequence[int],
    reads: Sequence[Read] = (),
    *,
    numbers: Sequence[int],
    logits: bool = True,
) -> tuple[Float[Tensor, "row read d_model"] | None, list[Tensor]]:
    """Run branches, in the order in which they join.

    Args:
        read: the positions whose logits are needed.
        reads: the activations that are needed.
        numbers: what `batched` functions are told that the branches are called.
        logits: False ends the run after the last layer of the `reads`.

    Returns:
        What the unembedding gets where it is read, one row per branch and row, and what was read
        [branch, row, read, ...].
    """
    model, n_layers = recording.model, recording.model.cfg.n_layers
    schedule = Schedule.of(starts, read, n_layers, recording.inputs.n_pos)
    run = recording.past_before(schedule.firsts.first)
    resid = recording.own.resid[0][:, :0]
    rotary = model.rotary_angles(recording.inputs.rope_positions, resid.dtype)
    visual = edited_images(recording, branches, starts, numbers)
    below = streams_from_below(recording, branches, starts, visual, numbers)
    deepstack = [
        model.deepstack(recording.inputs, visual[i]) if i in visual else recording.deepstack
        for i in range(len(branches))
    ]
    last = n_layers if logits else max(each.last_layer(n_layers) for each in reads)
    kept: dict[Read, Tensor] = {}
    hooks = branch_hooks(branches, starts, schedule, n_layers, numbers)
    with model.hooks(fwd_hooks=[*hooks, *reading_hooks(reads, schedule, n_layers, kept)]):
        for step in schedule.steps:
            if step.layers and step.layers[0] > last:
                break
            entered = entering(recording, branches, starts, step.joining, numbers)
            streams = below | entered
            new = [streams[index] for index in step.joining]
            resid = torch.cat([resid.to(new[0]), *new], dim=1) if new else resid
            past = SharedPast(run, step.keys, step.queries)
            at = step.keys.positions[resid.device]
            angles = {
                kind: (cos.to(at.device)[:, at], sin.to(at.device)[:, at])
                for kind, (cos, sin) in rotary.items()
            }
            added = packed_deepstack(recording, deepstack, step.keys)
            layers = range(step.layers.start, min(step.layers.stop, last + 1))
            resid = model.run_blocks(resid, layers, past, angles, added)
        if last < n_layers:
            return None, [kept[each] for each in reads]
        at = to_device(torch.tensor(schedule.read), resid.device)
        norm: Any = model.ln_final
        if has_listeners(norm.hook_scale, norm.hook_normalized):
            final = norm(resid)[:, at]  # interventions on it count positions
        else:
            final = norm(resid[:, at])
    rows = final.unflatten(1, (len(starts), len(read))).transpose(0, 1).flatten(0, 1)
    return rows, [kept[each] for each in reads]


def entering(
    recording: RecordedRun,
    branches: Sequence[Declared],
    starts: Sequence[Start],
    joining: Sequence[int],
    numbers: Sequence[int],
) -> dict[int, Float[Tensor, "row suffix d_model"]]:
    """The residual streams with which branches join that change nothing below.

    What they change after the layer before is changed here, and that layer left out.
    """
    n_layers, hook_dict = recording.model.cfg.n_layers, recording.model.hook_dict
    firsts = [each.tail if each.layer == n_layers else each.first for each in starts]
    streams: dict[int, Tensor] = {}
    edits: dict[str, list[tuple[int, Intervention]]] = defaultdict(list)
    for index in joining:
        layer = starts[index].layer
        if layer < 0:
            continue
        streams[index] = recording.resid_from(layer, firsts[index])
        for part in branches[index]:
            if edits_output(part, layer - 1):
                streams[index] = streams[index].clone()
                edits[hook_name(part.site, layer - 1)].append((index, part))
    for name, each in edits.items():
        streams = edit_together(each, streams, hook_dict[name], firsts, numbers)
    return streams


def edited_images(
    recording: RecordedRun,
    branches: Sequence[Declared],
    starts: Sequence[Start],
    numbers: Sequence[int],
) -> dict[int, Float[Tensor, "1 visual_token d_visual"]]:
    """The visual tokens of the branches that edit the tower or the connector."""
    edits = {
        index: parts
        for index, start in enumerate(starts)
        if start.layer < 0 and (parts := [part for part in branches[index] if sees(part)])
    }
    if recording.encoded_images is None or not edits:
        return {}
    called = [numbers[index] for index in edits]
    found = recording.encoded_images.edited(recording.model, list(edits.values()), called)
    return dict(zip(edits, found, strict=True))


def streams_from_below(
    recording: RecordedRun,
    branches: Sequence[Declared],
    starts: Sequence[Start],
    visual: Mapping[int, Float[Tensor, "1 visual_token d_visual"]],
    numbers: Sequence[int],
) -> dict[int, Float[Tensor, "row suffix d_model"]]:
    """What enters the first layer, for the branches that change it: images or embeddings."""
    model, encoded_images = recording.model, recording.encoded_images
    recorded = None if encoded_images is None else encoded_images.visual
    streams = {}
    for index, start in enumerate(starts):
        if start.layer >= 0:
            continue
        flat = (part for part in branches[index] if part.layers is None)
        parts = [part for part in flat if not (sees(part) or part.where.after)]
        hooks = [pair for part in parts for pair in part.fwd_hooks(numbers[index])]
        with model.hooks(fwd_hooks=hooks):
            stream = model.input_embeddings(recording.inputs, visual.get(index, recorded))
        streams[index] = stream[:, start.first :]
    return streams


def packed_deepstack(
    recording: RecordedRun,
    deepstack: Sequence[Sequence[Float[Tensor, "batch pos d_model"]]],
    keys: Packing,
) -> list[Float[Tensor, "_batch packed d_model"]]:
    """What the images add in layer 0, 1, ..., branch after branch; [] where all begin after them.

    Args:
        deepstack: of each branch, per layer.
    """
    last = max((int(image.positions[-1]) for image in recording.inputs.images), default=-1)
    if keys.first > last:
        return []
    starts = list(enumerate(keys.starts))
    return [
        torch.cat([deepstack[i][layer][:, start:] for i, start in starts], dim=1)
        for layer in range(len(recording.deepstack))
    ]


def branch_hooks(
    branches: Sequence[Declared],
    starts: Sequence[Start],
    schedule: Schedule,
    n_layers: int,
    numbers: Sequence[int],
) -> list[tuple[str, HookFunction]]:
    """One hook function per hook point, which gives each branch's slice to its interventions."""
    edits: dict[tuple[str, bool], list[tuple[int, Intervention]]] = defaultdict(list)
    for index, branch in enumerate(branches):
        for part in branch:
            for name, layer in part.places():
                entry = entry_layer(part.where, layer, n_layers)
                joins = entry == starts[index].layer and edits_output(part, layer)
                if entry >= 0 and not joins:  # else what enters holds it already
                    after_keys = is_after_keys(part.where, layer, n_layers)
                    edits[name, after_keys].append((index, part))

    def edit(
        activation: Tensor,
        hook: HookPoint,
        edits: list[tuple[int, Intervention]],
        packing: Packing,
    ) -> Tensor:
        axis, before = hook.site.position_axis, {}
        for index, _ in edits:
            begin, end = packing.offsets[index : index + 2]
            before[index] = activation.narrow(axis, begin, end - begin)
        changed = edit_together(edits, before, hook, packing.starts, numbers)
        # The activations of a joined run are its own, so a copy is needed for gradients alone.
        edited = activation.clone() if torch.is_grad_enabled() else activation
        for index, after in changed.items():
            begin, end = packing.offsets[index : index + 2]
            edited.narrow(axis, begin, end - begin).copy_(after)
        return edited

    return [
        (name, partial(edit, edits=each, packing=schedule.tails if after_keys else schedule.firsts))
        for (name, after_keys), each in edits.items()
    ]
