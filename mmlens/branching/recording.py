"""Branching: runs that differ from a finished one start where they differ.

    recording = model.record(inputs)
    recording.run([[Intervention("mlp_out", layer, 40, zero())] for layer in range(30)],
                  readout=lambda logits: logits[:, -1].softmax(-1)[:, answer])

A `Recording` keeps a run's residual stream at every layer and its keys and values. A branch is a
list of interventions. It cannot change what lies below its first layer, nor what lies before the
first position that its own can affect: itself where attention is causal, the first of its image
where images attend to themselves in both directions (`AttentionRule.first_affected`). So it starts
at that layer from the recorded residual stream, over the remaining positions only, and attends to
the recorded keys and values of the others.

`recording.run(branches)` evaluates many branches in one pass up the layers
(`mmlens.branching.joined`). `recording.record(other_inputs)` is the recording of a prompt that
begins in the same way: only what follows is computed, and kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmlens.branching.encoded_images import EncodedImages
from mmlens.branching.joined import Branch, as_branches, run_joined, start_of
from mmlens.branching.packing import Packing
from mmlens.branching.passes import Pass, passes
from mmlens.branching.reads import Read, of_units
from mmlens.branching.schedule import Start
from mmlens.branching.shared_past import SharedPast
from mmlens.branching.state import RecordedRun, keep_run, with_before
from mmlens.inputs.checks import check_one_prompt
from mmlens.inputs.collation import collate
from mmlens.inputs.common_prefix import common_prefix
from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.inputs.special_tokens import filler
from mmlens.interventions.functions import HookFunction
from mmlens.interventions.intervention import Intervention, SiteLayers, hook_name, names_of
from mmlens.model.hook_points import listens, reading
from mmlens.model.hooked_root_module import exclusively
from mmlens.model.sites import split_site
from mmlens.utils.grad_mode import without_gradients
from mmlens.utils.memory import is_out_of_memory
from mmlens.utils.progress import Progress
from mmlens.utils.tensors import flat_positions
from mmlens.utils.threads import on_free_cores

if TYPE_CHECKING:
    from mmlens.model.transformer import HookedMultimodalTransformer

Readout = Callable[[Float[Tensor, "row read n_tokens"]], Tensor]
SiteToRead = tuple[str, int | None, Any] | tuple[str, int | None]
"""A site, its layer, and positions, where they are not all."""


@dataclass(frozen=True, eq=False)
class Asked:
    """What is asked of every branch."""

    readout: Readout | None
    read: list[int]
    """The positions whose logits it gets."""
    tokens: Tensor | Sequence[int] | None
    reads: list[Read]


@dataclass(frozen=True, eq=False)
class Recording(RecordedRun):
    """A finished forward pass that later runs branch from; made by `model.record(inputs)`.

    It is a constant: gradients flow through a branch to what its hook functions hold, not further.
    """

    @classmethod
    @without_gradients
    @on_free_cores
    def of(
        cls,
        model: HookedMultimodalTransformer,
        inputs: MultimodalInputs,
        sites: Sequence[SiteLayers] = (),
        known: EncodedImages | None = None,
    ) -> Recording:
        """Run the model once, and keep; images among the `known` ones are not encoded."""
        inputs, names = model.to_inputs(inputs), names_of(sites)
        cache, caching, _ = model.get_caching_hooks(names)
        with model.hooks(fwd_hooks=caching):
            encoded_images = EncodedImages.encoded(model, inputs, known)
            visual = None if encoded_images is None else encoded_images.visual
            resid = model.input_embeddings(inputs, visual)
            deepstack = model.deepstack(inputs, visual)
            past, angles = model.attention_context(
                resid, inputs.attention_mask, inputs.rope_positions, None, inputs.blocks
            )
            own = keep_run(model, resid, 0, past, angles, deepstack)
        return cls(model, inputs, own, None, encoded_images, cache)

    @classmethod
    def of_each(
        cls,
        model: HookedMultimodalTransformer,
        inputs: Sequence[MultimodalInputs],
        known: EncodedImages | None = None,
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
        batch = cls.of(model, collate(inputs, filler(model.tokenizer, model.cfg)), known=known)
        found, image = [], 0
        for row, each in enumerate(inputs):
            n_images = sum(each.n_images)
            encoded_images = batch.encoded_images and batch.encoded_images.part(
                image, image + n_images
            )
            own = batch.own.of_row(row, batch.inputs.n_pos - each.n_pos)
            found.append(cls(model, each, own, None, encoded_images if n_images else None))
            image += n_images
        return found

    @classmethod
    def of_all(
        cls,
        model: HookedMultimodalTransformer,
        inputs: Iterable[MultimodalInputs],
        sites: Sequence[SiteLayers] = (),
        earlier: Sequence[Recording] = (),
    ) -> list[Recording]:
        """Record prompts one after the other, each from where it differs from an earlier one.

        Several questions on one image encode and read it once. A prompt is recorded on its own
        unless most of it is the same as the beginning of an earlier one, or of one in `earlier`.
        """
        found: list[Recording] = []
        for each in map(model.to_inputs, inputs):
            before = (*earlier, *found)
            shared = [common_prefix(one.inputs, each) for one in before]
            most = max(shared, default=0)
            if 2 * most >= each.n_pos:
                found.append(before[shared.index(most)].record(each, sites))
            else:
                seen = (one.encoded_images for one in reversed(before))
                known = next((images for images in seen if images is not None), None)
                found.append(cls.of(model, each, sites, known))
        return found

    def __getitem__(
        self, where: str | tuple[str, int | None]
    ) -> Float[Tensor, "*batch_pos_and_more"]:
        """Return an activation that was asked for: [batch, pos, ...], as a cache holds it.

        Args:
            where: a site and its layer, or a site without layers. With units ("z[3]") only these.

        Raises:
            KeyError: the recording does not hold it.
            ValueError: no such site.

        Example:
            >>> recording = model.record(inputs, sites=[("resid_post", 12), ("z", range(4))])
            >>> recording["resid_post", 12], recording["z[3]", 0]
        """
        site, layer = (where, None) if isinstance(where, str) else where
        short, units = split_site(site)
        name = hook_name(short, layer)
        if name not in self.cache:
            held = ", ".join(self.cache) or "nothing besides"
            raise KeyError(
                f"this recording does not hold {name}; ask for it with record(inputs, "
                f"sites=[({short!r}, {layer})]). It holds {held}"
            )
        found = self.cache[name]
        return found if units is None else of_units(found, units, self.model.hook_dict[name])

    @exclusively
    @without_gradients
    @on_free_cores
    def record(self, inputs: MultimodalInputs, sites: Sequence[SiteLayers] = ()) -> Recording:
        """The recording of inputs that begin like these: only the rest is computed and kept.

        Images that are the same are not encoded again. A prompt that has nothing in common with
        this one, as no other has in a model whose prompts attend to themselves in both directions,
        is recorded from the beginning.

        Args:
            sites: activations that are kept besides, as in `model.record`.

        Example:
            >>> clean = model.record(inputs)
            >>> corrupted = clean.record(swap_span(model, inputs, "constraint", "Paris"))
        """
        inputs, names = self.model.to_inputs(inputs), names_of(sites)
        first = min(common_prefix(self.inputs, inputs), inputs.n_pos - 1)
        rows_fit, cached = self.n_rows in (1, inputs.n_rows), self._joinable(names)
        if not (first and rows_fit and cached) or listens(self.model):
            return Recording.of(self.model, inputs, sites, self.encoded_images)
        self.model.cfg.check_length(inputs.n_pos, inputs.attention_mask)
        encoded_images = EncodedImages.encoded(self.model, inputs, known=self.encoded_images)
        visual = None if encoded_images is None else encoded_images.visual
        resid = self.model.input_embeddings(inputs, visual)[:, first:]
        deepstack = [part[:, first:] for part in self.model.deepstack(inputs, visual)]
        packing = Packing((first,), inputs.n_pos)
        past = SharedPast(self.past_before(first, inputs), packing, packing)
        angles = self.model.rotary_angles(inputs.rope_positions[..., first:], resid.dtype)
        kept, caching, _ = self.model.get_caching_hooks(names)
        with self.model.hooks(fwd_hooks=caching):
            own = keep_run(self.model, resid, first, past, angles, deepstack)
        cache = {name: with_before(self.cache[name][:, :first], new) for name, new in kept.items()}
        shared = self.own if self.shared is None else self.shared
        if self.shared is not None and first > self.own.begin:
            own = own.after(self.own)
        return Recording(self.model, inputs, own, shared, encoded_images, cache)

    @exclusively
    @on_free_cores
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

    @exclusively
    @on_free_cores
    def run(
        self,
        branches: Sequence[Branch],
        readout: Readout | None,
        *,
        read: Sequence[SiteToRead] | None = None,
        positions: Int[Tensor, " read"] | Sequence[int] | None = None,
        tokens: Int[Tensor, " n_tokens"] | Sequence[int] | None = None,
        batch_rows: int | None = None,
        progress: Progress | None = None,
        plain: bool = False,
    ) -> Any:
        """Evaluate every branch, and stack what `readout` makes of it.

        Equal to a plain hooked run of each branch, to rounding. While other hooks are on the
        model, every branch is a plain run, since there is no saying what they touch.

        A branch costs the positions from the first one that any of its interventions touches, in
        the layers from the lowest one on. `positions=None` touches position 0, so one such
        intervention makes the branch compute the whole prompt, visual tokens included, even where
        it changes nothing (as when a component is frozen at its recorded values). Where only what
        comes after a position can differ, say so: `range(first, inputs.n_pos)` gives the same
        numbers, and costs a branch from `first` on.

        Args:
            branches: what each branch changes.
            readout: called with the logits [row, read, n_tokens] of some branches, one row per
                branch and row of the recording; what it returns keeps the first axis. None where
                activations alone are read: branches then end after the last layer that is read.
            read: activations to return of every branch, after its edits: a site of the decoder, its
                layer (None for one without layers) and positions (by default all), such as
                `("q[0-8]", 14, inputs.span("last"))`. A branch is computed wherever it is read.
            positions: where logits are read; the last position by default.
            tokens: whose logits are computed; the whole vocabulary by default, which
                probabilities need.
            batch_rows: the most rows computed at once (but at least one branch); None takes what
                fits into free memory and is fast. Either way it is halved when memory runs out.
            progress: called with (branches done, branches in all).
            plain: make every branch a full hooked run, the reference for the others.

        Returns:
            [branch, batch, ...], in the order of `branches`. With `read`, that (None without
            `readout`), and the activations [branch, batch, pos, ...] by site and layer.

        Raises:
            ValueError: no branches, or `positions` that are not there; nothing to read.
            IndexError: an intervention's positions are not there.
            KeyError: the model has no such hook point.

        Example:
            >>> cut = [[Intervention("z[3]", layer, None, zero())] for layer in range(9)]
            >>> _, found = recording.run(cut, None, read=[("q", 14, inputs.span("last"))])
            >>> found["q", 14]     # [branch, batch, pos, head, d_head]
        """
        if not (branches := as_branches(branches)):
            raise ValueError("no branches to run")
        what = Asked(
            readout,
            self._read(positions),
            tokens,
            self._reads(() if read is None else read),
        )
        if readout is None and not what.reads:
            raise ValueError("nothing to read of the branches: give readout, or read=[...]")
        plain = plain or listens(self.model)
        starts = [
            None if plain else start_of(self, branch, what.read, what.reads) for branch in branches
        ]
        pending = passes(starts, self.inputs.n_pos, self.n_rows, self.model, batch_rows)
        results: dict[int, list[Tensor]] = {}
        while pending:
            each = pending.pop(0)
            found = self._evaluated(each, branches, starts, what)
            if found is None:
                pending = [part for old in (each, *pending) for part in old.within(each.size // 2)]
                continue
            results.update(zip(each.indices, map(list, zip(*found, strict=True)), strict=True))
            if progress is not None:
                progress(len(results), len(branches))
        in_order = zip(*(results[index] for index in range(len(branches))), strict=True)
        stacked = [torch.stack(each) for each in in_order]
        readouts = None if readout is None else stacked.pop(0)
        if read is None:
            return readouts
        keys = [(each.site, each.layer) for each in what.reads]
        return readouts, dict(zip(keys, stacked, strict=True))

    def _evaluated(
        self,
        each: Pass,
        branches: Sequence[Branch],
        starts: Sequence[Start | None],
        what: Asked,
    ) -> list[Tensor] | None:
        """What is asked of a pass, [branch, row, ...] each; None where memory ran out."""
        chosen = [branches[index] for index in each.indices]
        try:
            if each.is_plain:
                runs = [self._run_plainly(branches[i], i, what) for i in each.indices]
                resid: Any = torch.cat([resid for resid, _ in runs])
                found = [torch.stack(one) for one in zip(*(one for _, one in runs), strict=True)]
            else:
                declared: Any = chosen
                joining: Any = [starts[index] for index in each.indices]
                resid, found = run_joined(
                    self,
                    declared,
                    joining,
                    what.read,
                    what.reads,
                    numbers=each.indices,
                    logits=what.readout is not None,
                )
            if what.readout is not None:
                tokens = None if what.tokens is None else torch.as_tensor(what.tokens)
                rows = what.readout(self.model.unembed(resid, tokens))
                found = [rows.unflatten(0, (len(chosen), self.n_rows)), *found]
            return found
        except (RuntimeError, MemoryError) as error:
            if len(chosen) == 1 or not is_out_of_memory(error):
                raise
            return None

    def _run_plainly(self, branch: Branch, index: int, what: Asked) -> tuple[Tensor, list[Tensor]]:
        """What the unembedding gets of a plain run, and what else is asked of it."""
        hooks: list[tuple[str, HookFunction]] = []
        for part in branch:
            hooks += part.fwd_hooks(index) if isinstance(part, Intervention) else [part]
        kept: dict[Read, Tensor] = {}
        hooks += [(each.name, reading(partial(each.keep_run, kept=kept))) for each in what.reads]
        with self.model.hooks(fwd_hooks=hooks):  # they may count positions of the final norm
            resid = self.model(self.inputs, stop_at_layer=self.model.cfg.n_layers)
            resid = self.model.ln_final(resid)[:, what.read]
        return resid, [kept[each] for each in what.reads]

    def _reads(self, given: Sequence[SiteToRead]) -> list[Read]:
        n_pos = self.inputs.n_pos
        reads = [Read.of(self.model, at[0], at[1], (*at, None)[2], n_pos) for at in given]
        keys = [(each.site, each.layer) for each in reads]
        if len(set(keys)) < len(keys):
            raise ValueError(f"read={keys} has one twice; give all of its positions together")
        return reads

    def _read(self, positions: Tensor | Sequence[int] | None) -> list[int]:
        n_pos = self.inputs.n_pos
        given = [n_pos - 1] if positions is None else flat_positions(positions).tolist()
        if not given or not 0 <= min(given) <= max(given) < n_pos:
            raise ValueError(f"cannot read at {given}; positions are 0 ... {n_pos - 1}")
        return given

    def _joinable(self, names: Sequence[str]) -> bool:
        """Whether activations of a suffix can be put after those kept: position by position."""
        found = [self.model.SITES.of(name) for name in names]
        return all(name in self.cache for name in names) and all(
            site.stack == "decoder" and site.is_layered and site.position_axis == 1
            for site, _ in found
        )
