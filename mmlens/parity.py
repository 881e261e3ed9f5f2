"""Does a checkpoint give the numbers that transformers gives? Both run one random prompt.

The two models are never in memory together: transformers goes first, and leaves a `ReferenceRun`.

How far apart they may be, relative to the norm of what is compared, at every position:

- in float32, 1e-4;
- in half precision, 16 eps (bfloat16 0.125, float16 0.016). A block is about 16 operations in a
  row, each rounded to eps / 2; two programs that round at different places are twice as far apart.
  So that nothing adds up over layers, each block gets transformers' own residual stream. Tower and
  projector run in float32 on both sides.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from mmlens.checkpoints import checkpoint_dtype, format_of
from mmlens.checkpoints.hf_configs import decoder_fields
from mmlens.checkpoints.hub import find_folder
from mmlens.config import MultimodalConfig
from mmlens.inputs import MultimodalInputs
from mmlens.model import HookedMultimodalTransformer

N_NEW = 12
"""Tokens that are generated."""
SMALL = (2, 2)
"""Rows and columns of a picture where its size does not matter; towers interpolate positions."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    passed: bool | None
    """None where it was only measured."""
    detail: str


@dataclass(frozen=True)
class Prompt:
    """A picture, if the model sees, between words."""

    tokens: Int[Tensor, "1 pos"]
    pixel_values: Float[Tensor, "1 channel height width"] | None

    def inputs(self, model: HookedMultimodalTransformer) -> MultimodalInputs:
        """As the model takes it."""
        return model.inputs_from_tokens(self.tokens, self.pixel_values)


@dataclass(frozen=True)
class ReferenceRun:
    """What transformers computed."""

    prompt: Prompt
    streams: tuple[Float[Tensor, "1 pos d_model"], ...]
    """What enters each block; last, what the final norm gives."""
    logits: Float[Tensor, "1 pos d_vocab"]
    generated: Int[Tensor, " new_pos"]


@dataclass(frozen=True)
class Reference:
    """A checkpoint that transformers knows, not opened yet."""

    kind: Any  # one of transformers' classes
    path: Path
    cfg: MultimodalConfig
    dtype: torch.dtype


def random_prompt(
    cfg: MultimodalConfig, seed: int, picture: tuple[int, int] | None = None
) -> Prompt:
    """Random words, and random pixels between them if the model sees.

    Args:
        picture: rows and columns of patches; by default as many as the tower is made for.
    """
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(cfg.d_vocab - 1, (14,), generator=generator)
    if cfg.image_token_id is not None:
        words += words >= cfg.image_token_id  # none of them is the placeholder
    vision = cfg.vision
    if vision is None:
        return Prompt(words[None], None)
    if picture is not None:
        rows, columns = picture
        vision = replace(vision, image_size=(rows * vision.patch_size, columns * vision.patch_size))
    pixels = torch.randn(1, vision.n_channels, *vision.image_size, generator=generator)
    visual = torch.full((vision.n_visual_tokens,), cfg.image_token_id or 0)
    return Prompt(torch.cat([words[:5], visual, words[5:]])[None], pixels)


def find_reference(name: str | Path) -> Reference | None:
    """Transformers' own model of a checkpoint; None where it has none.

    Raises:
        CheckpointError: there is no such checkpoint.
    """
    path = Path(name).expanduser()
    if str(name) == "demo":
        return None
    if path.suffix == ".gguf" and path.is_file():
        hf = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        cfg = MultimodalConfig(**decoder_fields(hf))
        return Reference(AutoModelForCausalLM, path, cfg, torch.float32)
    folder = find_folder(name, None)
    format = format_of(folder)
    for architecture in json.loads((folder / "config.json").read_text()).get("architectures") or ():
        if kind := getattr(transformers, architecture, None):
            return Reference(kind, folder, format.config(folder), checkpoint_dtype(folder))
    return None


@torch.inference_mode()
def run_reference(
    reference: Reference, device: torch.device, dtype: torch.dtype | None, seed: int
) -> ReferenceRun:
    """Open it, run it on a random prompt, and let it go."""
    folder, file = reference.path, {}
    if reference.path.is_file():
        folder, file = reference.path.parent, {"gguf_file": reference.path.name}
    hf: Any = reference.kind.from_pretrained(
        folder, dtype=dtype or reference.dtype, device_map=device, trust_remote_code=False, **file
    )
    hf.eval().generation_config = GenerationConfig()  # nothing of the checkpoint's own taste
    prompt = random_prompt(reference.cfg, seed)
    tokens = prompt.tokens.to(device)
    given: dict[str, Any] = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    suppressed = None
    if prompt.pixel_values is not None:
        hf.model.vision_tower.float()
        hf.model.multi_modal_projector.float()
        given["pixel_values"] = prompt.pixel_values.to(device)
        suppressed = [reference.cfg.image_token_id]
    out = hf(**given, output_hidden_states=True, use_cache=False)
    generated = hf.generate(
        **given,
        max_new_tokens=N_NEW,
        do_sample=False,
        suppress_tokens=suppressed,
        min_new_tokens=N_NEW,
        pad_token_id=0,
    )[0, tokens.shape[1] :]
    streams = tuple(stream.cpu() for stream in out.hidden_states)
    run = ReferenceRun(prompt, streams, out.logits.cpu(), generated.cpu())
    del hf, out
    forget()
    return run


def forget() -> None:
    """Give the memory of what has been deleted back to the machine and the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def distance(ours: Tensor, theirs: Tensor) -> tuple[float, float]:
    """The largest difference of an entry, and of a position relative to its norm."""
    ours, theirs = ours.cpu().double(), theirs.cpu().double()
    difference = ours - theirs
    relative = difference.norm(dim=-1) / theirs.norm(dim=-1).clamp(min=1e-30)
    return float(difference.abs().max()), float(relative.max())


def allowed(dtype: torch.dtype) -> float:
    """How far two programs may be apart after one block, relative to the norm."""
    eps = torch.finfo(dtype).eps
    return 16 * eps if eps > 1e-6 else 1e-4


def differs(name: str, pairs: Iterator[tuple[str, Tensor, Tensor]], bound: float | None) -> Check:
    """The pair (its name, ours, transformers') that is furthest apart, against the bound.

    Args:
        bound: relative to the norm; None only measures.
    """
    found = [(where, *distance(ours, theirs)) for where, ours, theirs in pairs]
    # A NaN is further apart than anything.
    where, _, relative = max(found, key=lambda each: (each[2] != each[2], each[2]))
    absolute = max(each[1] for each in found)
    detail = f"max |difference| {absolute:.1e}, relative {relative:.1e}"
    detail += f" (at {where})" if where else ""
    if bound is None:
        return Check(name, None, f"{detail}; rounding adds up: judged in float32 only")
    return Check(name, relative <= bound, f"{detail}, allowed {bound:.1e}")


@torch.inference_mode()
def compare(model: HookedMultimodalTransformer, reference: ReferenceRun) -> list[Check]:
    """The model against what transformers computed from the same prompt."""
    dtype = model.cfg.dtype
    bound, half = allowed(dtype), torch.finfo(dtype).bits < 32
    return [
        differs("embeddings", embeddings(model, reference), torch.finfo(dtype).eps + 1e-4),
        differs("each block alone", blocks_alone(model, reference), bound),
        differs("unembedding alone", unembedding_alone(model, reference), bound),
        differs("every block's residual", whole_run(model, reference), None if half else bound),
        differs("logits", logits(model, reference), None if half else bound),
        generation(model, reference),
    ]


Pairs = Iterator[tuple[str, Tensor, Tensor]]


def embeddings(model: HookedMultimodalTransformer, reference: ReferenceRun) -> Pairs:
    """What enters the first block: words, and visual tokens from tower and projector."""
    parts = [part for part in (model.vision, model.projector) if part is not None]
    for part in parts:
        part.float()
    try:
        ours = model(reference.prompt.inputs(model), stop_at_layer=0)
    finally:
        for part in parts:
            part.to(model.cfg.dtype)
    yield "", ours, reference.streams[0]


def blocks_alone(model: HookedMultimodalTransformer, reference: ReferenceRun) -> Pairs:
    """Each block on the residual stream that transformers' has got."""
    for layer, (entering, leaving) in enumerate(
        zip(reference.streams[:-1], reference.streams[1:], strict=True)
    ):
        options = {"start_at_layer": layer, "stop_at_layer": layer + 1}
        ours = model(entering.to(model.device), **options)
        last = layer == model.cfg.n_layers - 1
        yield f"block {layer}", model.ln_final(ours) if last else ours, leaving


def unembedding_alone(model: HookedMultimodalTransformer, reference: ReferenceRun) -> Pairs:
    """The output layer on what transformers' has got."""
    device = model.unembed.weight.device
    yield "", model.unembed(reference.streams[-1].to(device)), reference.logits


def whole_run(model: HookedMultimodalTransformer, reference: ReferenceRun) -> Pairs:
    """The residual streams of one forward pass."""
    names = [f"blocks.{layer}.hook_resid_pre" for layer in range(1, model.cfg.n_layers)]
    names += [f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"]
    _, cache = model.run_with_cache(reference.prompt.inputs(model), names_filter=names)
    for layer, (name, theirs) in enumerate(zip(names, reference.streams[1:], strict=True)):
        ours = cache[name]
        yield f"block {layer}", model.ln_final(ours) if name == names[-1] else ours, theirs


def logits(model: HookedMultimodalTransformer, reference: ReferenceRun) -> Pairs:
    """The logits of one forward pass."""
    yield "", model(reference.prompt.inputs(model)), reference.logits


def generation(model: HookedMultimodalTransformer, reference: ReferenceRun) -> Check:
    """The same greedy continuation, up to a choice between tokens that rounding decides."""
    name, theirs = "generation", reference.generated
    inputs = reference.prompt.inputs(model)
    ours = continuation(model, inputs)
    same = [bool(a == b) for a, b in zip(ours, theirs, strict=True)]
    if all(same):
        return Check(name, True, f"{len(theirs)} greedy tokens equal")
    first = same.index(False)
    shared = inputs.append(theirs[None, :first].to(model.device))
    here = model(shared)[0, -1].double()
    gap = float((here[ours[first]] - here[theirs[first]]).abs())
    bound = 2 * allowed(model.cfg.dtype) * float(here.square().mean().sqrt())
    return Check(
        name,
        gap <= bound,
        f"{first} of {len(theirs)} greedy tokens equal, then two whose logits are {gap:.1e} apart "
        f"(a tie up to {bound:.1e})",
    )


def continuation(
    model: HookedMultimodalTransformer, inputs: MultimodalInputs, **options: Any
) -> Int[Tensor, " new_pos"]:
    """`N_NEW` greedy tokens."""
    options = {"return_type": "tokens", "stop_at_eos": False, **options}
    tokens: Any = model.generate(inputs, N_NEW, **options)
    return tokens[0, inputs.n_pos :].cpu()


def without_reference(model: HookedMultimodalTransformer, seed: int) -> list[Check]:
    """What can be said where transformers does not know the format."""
    finite = bool(model(random_prompt(model.cfg, seed).inputs(model)).isfinite().all())
    small = random_prompt(model.cfg, seed, picture=SMALL).inputs(model)
    cached, plain = (continuation(model, small, use_past_kv_cache=it) for it in (True, False))
    return [
        Check("parity", None, "no reference in transformers"),
        Check("logits", finite, "finite" if finite else "not finite"),
        Check("generation", bool((cached == plain).all()), "with and without a cache of keys"),
    ]


def hooks_alive(model: HookedMultimodalTransformer, seed: int) -> Check:
    """`verify_hooks`, on a small picture."""
    dead = model.verify_hooks(random_prompt(model.cfg, seed, picture=SMALL).inputs(model))
    n = len(model.hook_dict)
    listed = f"dead: {', '.join(dead[:5])}" + (" ..." if len(dead) > 5 else "")
    return Check("hooks", not dead, listed if dead else f"{n} hook points, all alive")
