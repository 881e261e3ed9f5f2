"""Path patching: what of a component's effect reaches the answer through some others.

Wang et al. 2022 (arXiv 2211.00593, section 3.1 and appendix B), Goldowsky-Dill et al. 2023. Every
sender, one at a time:

1. The clean run, with the sender's activation of the corrupted run, and all that is `freeze` after
   it kept at the clean run: what reaches a receiver is what comes along the residual stream.
2. The clean run, with the receivers as they were in (1), and everything else free.

The metric of (2), minus that of the clean run, is the effect of the paths from the sender to the
receivers. Both are branches of the clean run, so that all senders share it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mmlens.analyses.metrics import Metric, followed
from mmlens.analyses.patch import Patched, evaluated
from mmlens.analyses.result import description
from mmlens.analyses.targets import with_answer
from mmlens.analyses.trace_grid import check_pair, first_difference
from mmlens.branching.recording import Recording
from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.interventions.functions import HookFunction, add, batched, restore
from mmlens.interventions.functions import freeze as keep_recorded
from mmlens.interventions.intervention import Intervention, as_positions, site_of
from mmlens.model.components import TransformerBlock
from mmlens.model.hook_points import HookPoint
from mmlens.model.sites import split_site
from mmlens.utils.grad_mode import without_gradients
from mmlens.utils.progress import Progress
from mmlens.utils.tensors import flat_positions
from mmlens.utils.threads import on_free_cores

if TYPE_CHECKING:
    from mmlens.model.transformer import HookedMultimodalTransformer

Place = tuple[str, int | None] | tuple[str, int | None, Any]
"""A site, its layer, and positions, where they are not all."""

STREAM = ("resid_pre", "resid_mid", "resid_post")
"""The residual stream, in the order of a block: what a receiver gets is one of several parts of it,
which reaches later places of the stream by itself."""
RECEIVERS = (
    "q k v q_input k_input v_input attn_in rot_q rot_k mlp_in pre pre_linear post resid_pre "
    "resid_mid resid_post"
).split()
"""What can receive: inputs of heads and MLPs, which freezing their outputs leaves free."""


@dataclass(frozen=True, eq=False)
class PathPatch(Patched):
    """A metric of the clean run with the paths from each sender to the receivers corrupted.

    Example:
        >>> paths.effect.argsort()[:5]             # the senders that the answer needs most
        >>> paths.by_head()                        # [layer, head], where senders are heads
    """

    receivers: tuple[str, ...] = ()
    corrupted: float | tuple[float, ...] = 0.0
    """The metric of the corrupted run."""

    def by_head(self) -> Float[Tensor, "layer head"]:
        """Return the effects of senders that are heads ("z[3]"), NaN where there is none.

        Raises:
            ValueError: senders that are something else, or one head at several positions.
        """
        found = {}
        for label, effect in zip(self.coordinates[0], self.effect, strict=True):
            site, layer = str(label).split()[:2]
            units = split_site(site)[1]
            if site_of(split_site(site)[0]).units != "heads" or units is None or len(units) > 1:
                raise ValueError(f"the sender {label!r} is not one head")
            head = int(layer), units[0]
            if head in found:
                raise ValueError(
                    f"head {head[1]} of layer {head[0]} is several senders, the last of them "
                    f"{label!r}: their effects are in `effect`, in the order of the senders"
                )
            found[head] = float(effect)
        shape = [1 + max(key[axis] for key in found) for axis in range(2)]
        grid = torch.full(shape, torch.nan)
        for key, value in found.items():
            grid[key] = value
        return grid


@without_gradients
@on_free_cores
def path_patch(
    model: HookedMultimodalTransformer,
    clean: MultimodalInputs,
    corrupted: MultimodalInputs,
    senders: Sequence[Place],
    receivers: Sequence[Place | str] | str = "logits",
    *,
    metric: Metric = "probability",
    freeze: Sequence[str] = ("attn_out", "mlp_out"),
    answer: str | int | None = None,
    contrast: str | int | None = None,
    batch_rows: int | None = None,
    progress: Progress | None = None,
) -> PathPatch:
    """Corrupt the paths from each sender to the receivers, and follow an answer.

    Args:
        clean: one prompt; the run that is patched.
        corrupted: the same positions with other words or another image (`swap_span`,
            `swap_image`); what the senders hold comes from it.
        senders: each `(site, layer)` or `(site, layer, positions)`: heads such as `("z[3]", 9)`,
            `("mlp_out", 5)`, `("resid_post", 0, positions)`, `("input_embed", None, positions)`.
            Without positions they are all from the first that differs.
        receivers: of the same form, all together: the queries, keys or values of heads
            (`("q[0-8]", 14)`), the input of an MLP (`("mlp_in", 20)`), the stream at some positions
            (`("resid_pre", 20, positions)`), and "logits", the end of the residual stream.
        metric: "probability", "logit_diff", "kl", "loss", or a function; see `patch`.
        freeze: what is kept at the clean run between a sender and the receivers. With ("attn_out",)
            paths may go through MLPs, with () through everything.
        answer: which answer the metric follows; by default the clean run's most probable one.
        contrast: the answer whose logit "logit_diff" subtracts.
        batch_rows: the most rows computed at once; None takes what fits into free memory.
        progress: called with (branches done, branches in all), two for each sender.

    Raises:
        ValueError: inputs that do not match or do not differ; senders or receivers that are not
            there, or cannot receive.

    Example:
        >>> corrupted = swap_span(model, clean, "constraint", "Paris")
        >>> heads = [(f"z[{head}]", layer) for layer in range(23) for head in range(9)]
        >>> paths = path_patch(model, clean, corrupted, heads, [("q[0-8]", 23, clean.span("last"))])
        >>> paths.by_head()
    """
    frozen = (freeze,) if isinstance(freeze, str) else tuple(freeze)
    clean, corrupted = model.to_inputs(clean), model.to_inputs(corrupted)
    check_pair(clean, corrupted)
    senders = list(senders)
    receivers = receivers if isinstance(receivers, str) else list(receivers)
    if not senders:
        raise ValueError("no senders: give (site, layer), such as ('z[3]', 9)")
    if corrupted.noise is not None and len(corrupted.noise) > 1:
        raise ValueError(
            f"the corrupted inputs have {len(corrupted.noise)} samples of noise; paths are patched "
            "from one run: samples=1"
        )
    plan = Paths.of(model, clean, corrupted, senders, receivers, frozen)
    run = model.record(clean, plan.kept)
    what = followed(run, metric, answer, contrast)
    other = corrupted if what.answer is None else with_answer(corrupted, what.answer)
    if what.recording is not run:  # with the tokens of a longer answer
        plan = Paths.of(model, what.recording.inputs, other, senders, receivers, frozen)
        run = run.record(what.recording.inputs, plan.kept)
    source = run.record(other, plan.kept)
    total = 2 * len(senders)

    def moved(done: int, before: int) -> None:
        if progress is not None:
            progress(before + done, total)

    options: dict[str, Any] = {"batch_rows": batch_rows}
    _, received = run.run(
        plan.first_branches(run, source),
        None,
        read=plan.reads,
        progress=lambda done, _: moved(done, 0),
        **options,
    )
    values = evaluated(
        what,
        plan.second_branches(run, received),
        progress=lambda done, _: moved(done, len(senders)),
        **options,
    )
    baseline = what.baseline().tolist()
    end = what.function(source.logits(what.positions)).mean(dim=0).tolist()
    return PathPatch(
        values=values,
        baseline=tuple(baseline) if isinstance(baseline, list) else baseline,
        axes=("sender",),
        coordinates=(tuple(label_of(each) for each in senders),),
        metric=what.name,
        answer="" if what.answer is None else what.answer.text,
        metadata=description(model, clean) | {"freeze": list(frozen)},
        receivers=tuple(label_of(each) for each in plan.given),
        corrupted=tuple(end) if isinstance(end, list) else end,
    )


@dataclass(frozen=True, eq=False)
class Paths:
    """Senders and receivers with their positions, and what is kept of runs for them."""

    senders: list[tuple[str, int | None, Tensor]]
    given: list[Place | str]
    """Receivers, as they were given."""
    receivers: list[tuple[str, int, Tensor]]
    """"logits" are the residual stream after the last layer."""
    frozen: tuple[str, ...]
    n_layers: int

    @classmethod
    def of(
        cls,
        model: HookedMultimodalTransformer,
        clean: MultimodalInputs,
        corrupted: MultimodalInputs,
        senders: Sequence[Place],
        receivers: Sequence[Place | str] | str,
        frozen: Sequence[str],
    ) -> Paths:
        """Check senders and receivers, and fill in their positions."""
        everywhere = range(first_difference(clean, corrupted), clean.n_pos)
        n_layers = model.cfg.n_layers
        given: list[Any] = [receivers] if isinstance(receivers, str) else list(receivers)
        end: Any = (STREAM[-1], n_layers - 1)
        found = [filled(each, everywhere, clean.n_pos) for each in senders]
        full = [
            filled(end if each == "logits" else each, everywhere, clean.n_pos) for each in given
        ]
        for site, layer, _ in full:
            if layer is None or split_site(site)[0] not in RECEIVERS:
                raise ValueError(
                    f"{site!r} cannot receive; receivers are 'logits' and {', '.join(RECEIVERS)}, "
                    "each with its layer"
                )
        for name in frozen:
            if not site_of(name).is_layered or site_of(name).stack != "decoder":
                raise ValueError(f"freeze={name!r}; it is a site of the decoder's layers")
        if not full:
            raise ValueError("no receivers: give (site, layer), such as ('q[3]', 14), or 'logits'")
        return cls(found, given, full, tuple(frozen), n_layers)

    @property
    def kept(self) -> list[tuple[str, int] | str | tuple[str, range]]:
        """Return the sites that runs keep."""
        sites: list[Any] = [
            split_site(site)[0] if layer is None else (split_site(site)[0], layer)
            for site, layer, _ in self.senders
        ]
        sites += [(site, range(self.n_layers)) for site in self.frozen]
        sites += [(site, layer) for site, layer, _ in self.reads if site in STREAM]
        return sites

    @property
    def reads(self) -> list[tuple[str, int, Tensor]]:
        """Return what is read of the first branches: each site once, without units."""
        found: dict[tuple[str, int], list[Tensor]] = defaultdict(list)
        for site, layer, positions in self.receivers:
            found[split_site(site)[0], layer].append(positions)
        return [(*place, torch.cat(each).unique()) for place, each in found.items()]

    def first_branches(self, run: Recording, source: Recording) -> list[list[Intervention]]:
        """Return, for each sender, the clean run with its activation of the corrupted one."""
        put, kept = restore(source.cache), keep_recorded(run)
        last = max(layer for _, layer, _ in self.receivers)
        received = {(site, layer) for site, layer, _ in self.reads}
        branches = []
        for site, layer, positions in self.senders:
            first = run.first_affected(int(positions.min()))
            branch = [Intervention(site, layer, positions, put)]
            for name in self.frozen:
                own = layer is not None and part_of(name) == part_of(split_site(site)[0])
                begin = 0 if layer is None else layer + own
                layers = [at for at in range(begin, last + 1) if (name, at) not in received]
                if layers:
                    later = range(first, run.inputs.n_pos)
                    branch.append(Intervention(name, layers, later, kept))
            branches.append(branch)
        return branches

    def second_branches(
        self, run: Recording, received: dict[tuple[str, int | None], Tensor]
    ) -> list[list[Intervention]]:
        """Return, for each sender, the clean run with what the receivers received."""
        read = {(site, layer): positions for site, layer, positions in self.reads}
        branch = self.additions(run, received)
        for site, layer, positions in self.receivers:
            place = split_site(site)[0], layer
            if place[0] in STREAM:
                continue
            index = torch.searchsorted(read[place], positions)
            values = received[place][:, :, index.to(received[place].device)]
            branch.append(Intervention(site, layer, positions, of_branch(values, 0.0)))
        return [branch] * len(self.senders)

    def additions(
        self, run: Recording, received: dict[tuple[str, int | None], Tensor]
    ) -> list[Intervention]:
        """Return what receivers on the residual stream add, beside what comes through others.

        The stream carries on what an earlier one of them got, so a later one adds the rest alone.
        """
        places = [each for each in self.reads if each[0] in STREAM]
        places.sort(key=lambda each: (each[1], STREAM.index(each[0])))
        found = []
        carried: dict[int, Tensor] = {}  # by position: [branch, row, d_model]
        for site, layer, positions in places:
            values = received[site, layer]
            more = values - run[site, layer][:, positions.to(values.device)]
            for index, at in enumerate(positions.tolist()):
                if at in carried:
                    more[:, :, index] -= carried[at].to(more)
            more *= self.asked(site, layer, positions, more)
            if len(places) > 1:
                for index, at in enumerate(positions.tolist()):
                    carried[at] = more[:, :, index] + carried.get(at, torch.zeros(())).to(more)
            found.append(Intervention(site, layer, positions, of_branch(more, 1.0)))
        return found

    def asked(
        self, site: str, layer: int, positions: Tensor, change: Tensor
    ) -> Bool[Tensor, "pos d_model"]:
        """Return at which positions, and in which dimensions, receivers get a place's stream."""
        found = torch.zeros(change.shape[2:], dtype=torch.bool)
        for each, own_layer, own in self.receivers:
            name, units = split_site(each)
            if (name, own_layer) == (site, layer):
                rows = torch.searchsorted(positions, own)[:, None]
                found[rows, slice(None) if units is None else torch.tensor(units)] = True
        return found.to(change.device)


def of_branch(values: Float[Tensor, "branch row pos ..."], keep: float) -> HookFunction:
    """Return the function that puts each branch's own values in; `keep` x what is there stays."""

    @batched
    def put(slices: Tensor, hook: HookPoint, branches: Tensor) -> Tensor:
        return slices * keep + values[branches.to(values.device)].to(slices)

    return put


def part_of(site: str) -> str | None:
    """Return the output of the part of a block that a site belongs to: attention or the MLP."""
    names = [each.name for each in TransformerBlock.SITES]
    if site not in names:
        return None
    at = names.index(site)
    for begin, end in (("resid_pre", "attn_out"), ("resid_mid", "mlp_out")):
        if names.index(begin) < at <= names.index(end):
            return end
    return None


def filled(place: Any, everywhere: range, n_pos: int) -> tuple[str, Any, Tensor]:
    """Return a place with its positions as a LongTensor."""
    if not isinstance(place, tuple | list) or len(place) not in (2, 3):
        raise ValueError(f"{place!r} is no place: (site, layer) or (site, layer, positions)")
    site, layer, *rest = place
    if not isinstance(layer, int | None):
        raise ValueError(f"{site!r} with layers {layer!r}: each place has one layer, or None")
    positions = as_positions(rest[0] if rest and rest[0] is not None else list(everywhere))
    if not isinstance(positions, Tensor) or not len(positions) or int(positions.max()) >= n_pos:
        raise ValueError(f"{site!r}: positions {positions} are not among 0 ... {n_pos - 1}")
    Intervention(site, layer, positions, add(0.0))  # an error for a wrong site or layer
    if site_of(site).stack != "decoder":
        raise ValueError(f"{site!r} is not of the decoder, whose paths are patched")
    return site, layer, positions.sort().values


def label_of(place: Any) -> str:
    """Return a place in words: "z[3] 9", "q 14 at 20-25"."""
    if isinstance(place, str):
        return place
    site, layer, *rest = place
    label = site if layer is None else f"{site} {layer}"
    if rest and rest[0] is not None:
        at = flat_positions(rest[0]).tolist()
        label += f" at {at[0]}" if len(at) == 1 else f" at {min(at)}-{max(at)}"
    return label
