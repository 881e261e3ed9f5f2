"""Causal tracing: which layers and positions carry the answer.

MultiModalCausalTrace (Basu et al. 2024), after ROME's causal tracing (Meng et al. 2022): a clean
run, a corrupted run, and for every cell (site, group of positions, layer) a corrupted run in which
the clean activations of that cell are put back. A cell matters as far as that brings the clean
answer's probability back.

This is written with what a user can call: `run_with_cache`, `Intervention`, `window`, `record`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmlens.hook_points import ActivationCache
from mmlens.hooks import restore
from mmlens.inputs import MultimodalInputs
from mmlens.interventions import Intervention, hook_name, n_layers_of, window
from mmlens.spans import encode, tokens_of_replacement
from mmlens.trace_result import CausalTrace

if TYPE_CHECKING:
    from mmlens.model import HookedMultimodalTransformer

__all__ = ["CausalTrace", "causal_trace"]

SITES = ("resid_post", "attn_out", "mlp_out")
Progress = Callable[[int, int], None]
Group = int | Sequence[int] | Int[Tensor, " _"]
Method = Callable[..., tuple[Float[Tensor, " row"], Float[Tensor, " cell"]]]


@dataclass(frozen=True)
class Answer:
    """The tokens whose probability is followed, and where they are predicted."""

    tokens: Int[Tensor, " _"]
    text: str
    positions: Int[Tensor, " _"]

    def probability(self, logits: Float[Tensor, "row n d_vocab"]) -> Float[Tensor, " row"]:
        """The joint probability of the answer's tokens."""
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        log_probs = wide.log_softmax(dim=-1)
        index = self.tokens[None, :, None].expand(len(logits), -1, 1)
        return log_probs.gather(-1, index).sum(dim=(1, 2)).exp()


@torch.no_grad()
def causal_trace(
    model: HookedMultimodalTransformer,
    clean: MultimodalInputs,
    corrupted: MultimodalInputs,
    *,
    sites: Sequence[str] = SITES,
    layers: Iterable[int] | None = None,
    window: int = 1,
    positions: Sequence[Group] | None = None,
    answer: str | int | None = None,
    method: Literal["branch", "naive"] = "branch",
    batch_rows: int = 64,
    progress: Progress | None = None,
) -> CausalTrace:
    """Restore clean activations in a corrupted run, cell by cell.

    Args:
        clean: one prompt.
        corrupted: the same positions with other words (`swap_span`), noise (`noise_span`), another
            picture.
        sites: short names of activations, see `mmlens.interventions.hook_name`; all of the decoder
            or all of the vision tower.
        layers: centres of the windows; all layers by default.
        window: layers restored together around each centre, see `mmlens.window`.
        positions: groups of positions, each restored together; None takes every position from the
            first that differs, one at a time. The tower's sites have positions of their own: 0 is
            the class token, then come the patches, row by row.
        answer: a text, a token id, or None for the clean run's most probable next token. A text of
            several tokens is scored by its joint probability.
        method: "branch" shares what the runs have in common; "naive" does one full hooked run per
            cell, and is the reference for the other.
        batch_rows: the most rows that "branch" computes at once.
        progress: called with (cells done, cells in all).

    Raises:
        ValueError: inputs that do not match or do not differ, positions or layers that are not
            there, unknown sites, an answer that the model has no tokens for.

    Example:
        >>> clean = model.prepare(question, picture, spans={"constraint": "this country"})
        >>> corrupted = swap_span(model, clean, "constraint", "Paris")
        >>> trace = causal_trace(model, clean, corrupted,
        ...                      positions=[clean.span("constraint"), clean.span("last")])
        >>> trace.indirect_effect     # [site, group, layer]
    """
    began = time.perf_counter()
    if method not in METHODS:
        raise ValueError(f"method {method!r}; there are {', '.join(METHODS)}")
    check_pair(clean, corrupted)
    centres = layer_centres(model, sites, layers)
    groups, labels = position_groups(model, clean, corrupted, sites, positions)
    windows = {
        site: [window_layers(model, site, centre, window) for centre in centres] for site in sites
    }
    wanted = {
        hook_name(site, layer) for site in sites for layers in windows[site] for layer in layers
    }
    clean_probability, cache, target = run_clean(model, clean, answer, sorted(wanted))
    cells = [
        [Intervention(site, layers, group, restore(cache))]
        for site in sites
        for group in groups
        for layers in windows[site]
    ]
    run = METHODS[method]
    corrupted_probability, restored = run(
        model, with_answer(corrupted, target), cells, target, batch_rows, progress
    )
    return CausalTrace(
        restored=restored.unflatten(0, (len(sites), len(groups), len(centres))).cpu(),
        clean=clean_probability.mean().item(),
        corrupted=corrupted_probability.mean().item(),
        sites=tuple(sites),
        layers=tuple(centres),
        window=window,
        groups=tuple(tuple(group.tolist()) for group in groups),
        group_labels=tuple(labels),
        answer=target.text,
        answer_tokens=tuple(target.tokens.tolist()),
        method=method,
        metadata={
            "model": model.cfg.model_name,
            "str_tokens": clean.labels(),
            "prompt": clean.texts[0] if clean.texts else "",
            "samples": 1 if corrupted.noise is None else len(corrupted.noise),
            "seconds": round(time.perf_counter() - began, 3),
        },
    )


def run_clean(
    model: HookedMultimodalTransformer,
    clean: MultimodalInputs,
    answer: str | int | None,
    names: list[str],
) -> tuple[Float[Tensor, " row"], ActivationCache, Answer]:
    """P(answer) of the clean run, its activations, and the answer if it was left to the run."""
    last = clean.n_pos - 1
    given = None if answer is None else given_answer(model, clean, answer)
    resid, cache = model.run_with_cache(
        clean if given is None else with_answer(clean, given),
        names_filter=names,
        stop_at_layer=model.cfg.n_layers,
    )
    logits = model.unembed(model.ln_final(resid)[:, last:])
    if given is None:
        given = make_answer(model, [int(logits[0, 0].argmax())], last)
    return given.probability(logits), cache, given


def run_branching(
    model: HookedMultimodalTransformer,
    corrupted: MultimodalInputs,
    cells: list[list[Intervention]],
    target: Answer,
    batch_rows: int,
    progress: Progress | None,
) -> tuple[Tensor, Tensor]:
    """P(answer) of the corrupted run [row] and of every cell [cell], by branching."""
    recording = model.record(corrupted)
    done = 0

    def advance(n: int) -> None:
        nonlocal done
        done += n
        if progress is not None:
            progress(done, len(cells))

    restored = recording.run(
        cells,
        target.probability,
        positions=target.positions,
        batch_rows=batch_rows,
        progress=advance,
    )
    return target.probability(recording.logits(target.positions)), restored.mean(dim=1)


def run_naively(
    model: HookedMultimodalTransformer,
    corrupted: MultimodalInputs,
    cells: list[list[Intervention]],
    target: Answer,
    batch_rows: int,
    progress: Progress | None,
) -> tuple[Tensor, Tensor]:
    """The same by one full hooked forward pass per cell."""
    stop = {"stop_at_layer": model.cfg.n_layers}
    base = read(model, model(corrupted, **stop), target)
    restored = []
    for done, cell in enumerate(cells, start=1):
        hooks = [pair for intervention in cell for pair in intervention.fwd_hooks()]
        with model.hooks(fwd_hooks=hooks):  # the hooks also see the final norm
            restored.append(read(model, model(corrupted, **stop), target).mean())
        if progress is not None:
            progress(done, len(cells))
    return base, torch.stack(restored)


def read(model: HookedMultimodalTransformer, resid: Tensor, target: Answer) -> Tensor:
    """P(answer) of every row, from the residual stream behind the last layer."""
    return target.probability(model.unembed(model.ln_final(resid)[:, target.positions]))


METHODS: dict[str, Method] = {"branch": run_branching, "naive": run_naively}


def check_pair(clean: MultimodalInputs, corrupted: MultimodalInputs) -> None:
    """Raise a ValueError unless both are one prompt with the same positions."""
    if len(clean) != 1 or len(corrupted) != 1:
        raise ValueError(
            f"causal_trace takes one prompt; clean has {len(clean)} rows, corrupted has "
            f"{len(corrupted)}"
        )
    if clean.noise is not None:
        raise ValueError("the clean inputs have noise; only the corrupted may have some")
    if (
        clean.n_pos != corrupted.n_pos
        or not torch.equal(clean.is_image, corrupted.is_image)
        or not torch.equal(clean.attention_mask, corrupted.attention_mask)
    ):
        raise ValueError(
            f"clean ({clean.n_pos} positions) and corrupted ({corrupted.n_pos}) must have the same "
            "positions, visual tokens and padding; swap_span keeps them"
        )


def first_difference(clean: MultimodalInputs, corrupted: MultimodalInputs) -> int:
    """The first position at which the two runs can differ.

    Raises:
        ValueError: they are the same.
    """
    differs = clean.tokens[0] != corrupted.tokens[0]
    if corrupted.noise is not None:
        differs |= (corrupted.noise != 0).any(dim=-1).any(dim=0)
    if clean.pixel_values is not None and corrupted.pixel_values is not None:
        pairs = zip(clean.pixel_values, corrupted.pixel_values, strict=True)
        for start, (picture, other) in zip(clean.image_starts[0], pairs, strict=True):
            differs[start] |= not torch.equal(picture, other)
    if not bool(differs.any()):
        raise ValueError("clean and corrupted inputs are the same: there is nothing to trace")
    return int(differs.nonzero()[0])


def position_groups(
    model: HookedMultimodalTransformer,
    clean: MultimodalInputs,
    corrupted: MultimodalInputs,
    sites: Sequence[str],
    positions: Sequence[Group] | None,
) -> tuple[list[Int[Tensor, " _"]], list[str]]:
    """The groups of positions as LongTensors, and a label for each."""
    first = first_difference(clean, corrupted)
    labels = clean.labels()
    if sites[0].startswith("vision.") and model.cfg.vision is not None:
        columns = model.cfg.vision.grid[1]
        patches = range(model.cfg.vision.n_patches)
        labels = ["<cls>"] * model.cfg.vision.class_token
        labels += [f"<patch {i // columns},{i % columns}>" for i in patches]
        if positions is None:
            raise ValueError("sites of the vision tower have positions of their own: give them")
    if positions is None:
        positions = list(range(first, clean.n_pos))
    groups = [torch.as_tensor(group, dtype=torch.long).flatten().cpu() for group in positions]
    if not groups:
        raise ValueError("no positions to trace; positions=None takes all that can matter")
    for group in groups:
        if not len(group) or int(group.min()) < 0 or int(group.max()) >= len(labels):
            raise ValueError(
                f"positions {group.tolist()} are not among 0 ... {len(labels) - 1}; each group "
                "needs at least one"
            )
    return groups, [group_label(group.tolist(), labels) for group in groups]


def group_label(group: list[int], labels: list[str]) -> str:
    """The tokens of a group, shortened where there are many."""
    if len(group) > 6:
        return f"{labels[group[0]]} ... {labels[group[-1]]} ({len(group)})"
    return "".join(labels[position] for position in group)


def layer_centres(
    model: HookedMultimodalTransformer, sites: Sequence[str], layers: Iterable[int] | None
) -> list[int]:
    """The centres of the windows.

    Raises:
        ValueError: no sites, sites of both stacks, layers outside of the model.
    """
    if isinstance(sites, str) or not sites:
        raise ValueError(f"sites must be several names, e.g. ('mlp_out',), not {sites!r}")
    for site in sites:
        hook_name(site, 0)
    if len({site.startswith("vision.") for site in sites}) > 1:
        raise ValueError(f"trace the decoder and the vision tower one at a time, not {sites}")
    n_layers = n_layers_of(sites[0], model)
    centres = list(range(n_layers) if layers is None else layers)
    outside = [layer for layer in centres if not 0 <= layer < n_layers]
    if outside or not centres:
        raise ValueError(f"layers {outside or centres} are not among 0 ... {n_layers - 1}")
    return centres


def window_layers(model: HookedMultimodalTransformer, site: str, centre: int, width: int) -> range:
    """`mmlens.window`, under a name that the argument `window` does not hide."""
    return window(site, centre, width, model)


def given_answer(
    model: HookedMultimodalTransformer, clean: MultimodalInputs, answer: str | int
) -> Answer:
    """The tokens of an answer; a text as it would follow the prompt, after a space.

    Raises:
        ValueError: no such token id, no text, or text for a model without a tokenizer.
    """
    last = clean.n_pos - 1
    if not isinstance(answer, str):
        if not 0 <= answer < model.cfg.d_vocab:
            raise ValueError(f"answer={answer}; token ids are 0 ... {model.cfg.d_vocab - 1}")
        return make_answer(model, [int(answer)], last)
    if model.tokenizer is None:
        raise ValueError(f"answer={answer!r}, but the model has no tokenizer: give a token id")
    ids = tokens_behind(model.tokenizer, clean.texts[0] if clean.texts else "", answer)
    return replace(make_answer(model, ids, last), text=answer)


def tokens_behind(tokenizer: Any, prompt: str, answer: str) -> list[int]:
    """The tokens that a prompt goes on with if it goes on with `answer`.

    A space between them belongs to the answer, also where the tokenizer makes it a token of its
    own: the model has to say that one too.
    """
    text = prompt if prompt[-1:].isspace() else prompt + " "
    ids = tokens_of_replacement(tokenizer, text, (len(text), len(text)), answer)
    before = encode(tokenizer, prompt).ids
    whole = encode(tokenizer, text + answer.strip()).ids
    # Where the end of the prompt and the answer melt into one token, only the word itself is left.
    return whole[len(before) :] if before and whole[: len(before)] == before else ids


def make_answer(model: HookedMultimodalTransformer, ids: list[int], last: int) -> Answer:
    """Tokens that follow a prompt whose last position is `last`."""
    return Answer(
        tokens=torch.tensor(ids, device=model.device),
        text=str(ids[0]) if model.tokenizer is None else model.to_string(ids),
        positions=torch.arange(last, last + len(ids), device=model.device),
    )


def with_answer(inputs: MultimodalInputs, target: Answer) -> MultimodalInputs:
    """The inputs with all tokens of the answer but the last, which nothing follows."""
    return inputs.append(target.tokens[:-1]) if len(target.tokens) > 1 else inputs
