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
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from mmlens.checkpoints.format import Format
from mmlens.checkpoints.formats import gguf
from mmlens.checkpoints.hub import find_folder
from mmlens.checkpoints.json_files import check_folder, read_json
from mmlens.checkpoints.load import checkpoint_dtype, format_of, tower_of, weights_of
from mmlens.checkpoints.loader import check
from mmlens.checkpoints.paths import checkpoint_errors, regular_file
from mmlens.checkpoints.weight_files import all_shapes
from mmlens.config import MultimodalConfig
from mmlens.demo import is_embedded
from mmlens.inputs.layouts import image_layout
from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.model.transformer import HookedMultimodalTransformer
from mmlens.utils.grad_mode import without_gradients
from mmlens.utils.temporary import Changes, temporary

N_NEW = 12
"""Tokens that are generated."""
Pairs = Iterable[tuple[str, Tensor, Tensor]]
"""What is compared: its name, ours, transformers'."""
SEEING = ("vision_tower", "multi_modal_projector", "vision_model", "connector", "visual")
"""What transformers calls tower and projector, in one family or another."""


@dataclass(frozen=True)
class Check:
    """One thing that was compared."""

    name: str
    passed: bool | None
    """None where it was only measured."""
    detail: str


@dataclass(frozen=True)
class RandomPrompt:
    """An image, if the model sees, between words."""

    tokens: Int[Tensor, "1 pos"]
    visual: Mapping[str, Any]
    """What the tower takes, under transformers' names; nothing for a language model."""

    def inputs(self, model: HookedMultimodalTransformer) -> MultimodalInputs:
        """As the model takes it."""
        nothing_padded = torch.ones_like(self.tokens)
        return model.inputs_from_tokens(
            self.tokens, attention_mask=nothing_padded, **dict[str, Any](self.visual)
        )


@dataclass(frozen=True)
class ReferenceRun:
    """What transformers computed."""

    prompt: RandomPrompt
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


def random_prompt(cfg: MultimodalConfig, seed: int, *, small: bool = False) -> RandomPrompt:
    """Random words, and random pixels between them if the model sees.

    Args:
        small: of an image with few visual tokens, where its size does not matter.
    """
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(cfg.d_vocab - 1, (14,), generator=generator)
    if cfg.image_token_id is not None:
        words += words >= cfg.image_token_id  # none of them is the placeholder
    if cfg.vision is None:
        return RandomPrompt(words[None], {})
    image = image_layout(cfg).random_image(generator, small=small)
    ids = torch.tensor(image.ids)
    return RandomPrompt(torch.cat([words[:5], ids, words[5:]])[None], image.visual)


def find_reference(name: str | Path) -> Reference | None:
    """Transformers' own model of a checkpoint; None where it has none, as of the embedded ones.

    Raises:
        CheckpointError: there is no such checkpoint, or its configuration does not fit its files:
            transformers would allocate, and make up, whatever it describes.
    """
    path = Path(name).expanduser()
    if is_embedded(name):
        return None
    if path.suffix == ".gguf" and path.exists():
        cfg = gguf.described_config(regular_file(path))
        return Reference(AutoModelForCausalLM, path, cfg, torch.float32)
    folder = find_folder(name, None)
    check_folder(folder)
    format = format_of(folder)
    config = read_json(folder / "config.json")
    with checkpoint_errors(folder / "config.json"):
        for architecture in config.get("architectures") or ():
            kind = getattr(transformers, architecture, None)
            is_model = isinstance(kind, type) and issubclass(kind, PreTrainedModel)
            # Another model's class would take that model's own sizes.
            own = getattr(getattr(kind, "config_class", None), "model_type", None)
            if is_model and own == config["model_type"]:
                cfg = checked_config(format, folder)
                return Reference(kind, folder, cfg, checkpoint_dtype(folder))
    return None


def checked_config(format: Format, folder: Path) -> MultimodalConfig:
    """Return a folder's configuration, once every size has been compared with its files."""
    cfg = format.config(folder, tower_of(format, folder, None))
    weights = weights_of(format, folder, cfg, None, always=False)
    with torch.device("meta"):
        model = HookedMultimodalTransformer(cfg)
    check(model, dict(all_shapes(weights.files)), weights, str(folder))
    return cfg


def place(path: Path) -> AbstractContextManager[dict[str, Any]]:
    """Return arguments of `from_pretrained` for a folder, or for a GGUF file by itself."""
    if path.is_file():
        return gguf.alone(path)
    return nullcontext({"pretrained_model_name_or_path": path, "trust_remote_code": False})


@without_gradients
def run_reference(
    reference: Reference, device: torch.device, dtype: torch.dtype | None, seed: int
) -> ReferenceRun:
    """Open it, run it on a random prompt, and let it go."""
    rope, scaled = reference.cfg.rope_parameters, {}
    if reference.path.is_file() and rope.get("rope_type", "default") != "default":
        scaled = {"rope_parameters": rope}  # which transformers leaves out of GGUF files
    with place(reference.path) as where:
        hf: Any = reference.kind.from_pretrained(
            **where,
            **scaled,
            dtype=dtype or reference.dtype,
            device_map=device,
            # A config.json could name a kernel of the hub. No other than eager caps scores.
            attn_implementation="sdpa" if reference.cfg.scores_softcap is None else "eager",
        )
    hf.eval().generation_config = GenerationConfig()  # nothing of the checkpoint's own taste
    prompt = random_prompt(reference.cfg, seed)
    tokens = prompt.tokens.to(device)
    given: dict[str, Any] = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    suppressed = None
    if prompt.visual:
        see_in_float32(hf)
        given |= {name: tensor.to(device) for name, tensor in prompt.visual.items()}
        suppressed = [reference.cfg.image_token_id]
        if "image_grid_thw" in prompt.visual:  # rotary positions are told from it
            given["mm_token_type_ids"] = tokens.eq(reference.cfg.image_token_id or 0).int()
    if reference.cfg.attention_blocks is not None:  # else transformers' attention is causal
        is_image = tokens.eq(reference.cfg.image_token_id or 0)
        given["token_type_ids"] = is_image.long() * (reference.cfg.attention_blocks == "image")
    with what_enters(hf, reference.cfg.n_deepstack) as entering:
        out = hf(**given, output_hidden_states=True, use_cache=False)
    generated = hf.generate(
        **given,
        max_new_tokens=N_NEW,
        do_sample=False,
        suppress_tokens=suppressed,
        min_new_tokens=N_NEW,
        pad_token_id=0,
    )[0, tokens.shape[1] :]
    streams = tuple(entering.get(i, each).cpu() for i, each in enumerate(out.hidden_states))
    run = ReferenceRun(prompt, streams, out.logits.cpu(), generated.cpu())
    del hf, out
    gc.collect()  # the machine's memory, and the GPU's
    torch.cuda.empty_cache()
    return run


@contextmanager
def what_enters(hf: Any, n_deepstack: int) -> Iterator[dict[int, Tensor]]:
    """Keep the streams after the blocks to which images add: `hidden_states` lack what is added."""
    kept: dict[int, Tensor] = {}

    def keep(layer: int, module: Any, args: Any, kwargs: Any) -> None:
        kept[layer] = args[0] if args else kwargs["hidden_states"]

    with ExitStack() as stack:
        blocks = hf.get_decoder().layers if n_deepstack else ()
        for layer, block in list(enumerate(blocks))[1 : n_deepstack + 1]:
            handle = block.register_forward_pre_hook(partial(keep, layer), with_kwargs=True)
            stack.callback(handle.remove)
        yield kept


def see_in_float32(hf: Any) -> None:
    """Let transformers' model encode images in float32; its decoder gets them in its own dtype."""
    dtype = hf.get_input_embeddings().weight.dtype
    for name in SEEING:
        getattr(hf.model, name, torch.nn.Identity()).float()

    def rounded(module: Any, args: Any, kwargs: Any) -> Any:
        kwargs["inputs_embeds"] = kwargs["inputs_embeds"].to(dtype)
        return args, kwargs

    # SmolVLM's does not bring visual tokens to the dtype of the words between which they stand.
    hf.get_input_embeddings().register_forward_hook(lambda module, args, words: words.float())
    hf.get_decoder().register_forward_pre_hook(rounded, with_kwargs=True)


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


def differs(name: str, pairs: Pairs, bound: float | None) -> Check:
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


@without_gradients
def compare(model: HookedMultimodalTransformer, reference: ReferenceRun) -> list[Check]:
    """The model against what transformers computed from the same prompt."""
    precision, bound = torch.finfo(model.cfg.dtype), allowed(model.cfg.dtype)
    in_a_row = None if precision.bits < 32 else bound
    inputs, theirs = reference.prompt.inputs(model), reference.logits
    with seeing_in_float32(model):  # words, and visual tokens from tower and projector
        embedded = model(inputs, stop_at_layer=0)
    entering = reference.streams[-1].to(model.unembed.weight.device)
    return [
        differs("embeddings", [("", embedded, reference.streams[0])], precision.eps + 1e-4),
        differs("each block alone", blocks_alone(model, reference), bound),
        differs("unembedding alone", [("", model.unembed(entering), theirs)], bound),
        differs("every block's residual", whole_run(model, reference), in_a_row),
        differs("logits", [("", model(inputs), theirs)], in_a_row),
        generation(model, reference),
    ]


@temporary
def seeing_in_float32(model: HookedMultimodalTransformer) -> Changes[None]:
    """The model with its tower and projector in float32, as transformers' reference has them."""
    parts = [part for part in (model.vision, model.projector) if part is not None]
    yield model.exclusive()
    yield lambda: [part.to(model.cfg.dtype) for part in parts]
    for part in parts:
        part.float()


def blocks_alone(model: HookedMultimodalTransformer, reference: ReferenceRun) -> Pairs:
    """Each block on the residual stream that transformers' has got."""
    inputs = reference.prompt.inputs(model)
    for layer, (entering, leaving) in enumerate(
        zip(reference.streams[:-1], reference.streams[1:], strict=True)
    ):
        options = {"start_at_layer": layer, "stop_at_layer": layer + 1}
        ours = model(entering.to(model.device), **options, **model.resuming(inputs, layer))
        last = layer == model.cfg.n_layers - 1
        yield f"block {layer}", model.ln_final(ours) if last else ours, leaving


def whole_run(model: HookedMultimodalTransformer, reference: ReferenceRun) -> Pairs:
    """The residual streams of one forward pass."""
    names = [f"blocks.{layer}.hook_resid_pre" for layer in range(1, model.cfg.n_layers)]
    names += [f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"]
    _, cache = model.run_with_cache(reference.prompt.inputs(model), names_filter=names)
    for layer, (name, theirs) in enumerate(zip(names, reference.streams[1:], strict=True)):
        ours = cache[name]
        yield f"block {layer}", model.ln_final(ours) if name == names[-1] else ours, theirs


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
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        tokens = model.generate(inputs, N_NEW, **options)
    finally:
        model.generation_config = own
    return tokens[0, inputs.n_pos :].cpu()


def without_reference(model: HookedMultimodalTransformer, seed: int) -> list[Check]:
    """What can be said where transformers does not know the format."""
    finite = bool(model(random_prompt(model.cfg, seed).inputs(model)).isfinite().all())
    small = random_prompt(model.cfg, seed, small=True).inputs(model)
    cached, plain = (continuation(model, small, use_past_kv_cache=it) for it in (True, False))
    return [
        Check("parity", None, "no reference in transformers"),
        Check("logits", finite, "finite" if finite else "not finite"),
        Check("generation", bool((cached == plain).all()), "with and without a cache of keys"),
    ]


def hooks_alive(model: HookedMultimodalTransformer, seed: int) -> Check:
    """`verify_hooks`, on a small image."""
    dead = model.verify_hooks(random_prompt(model.cfg, seed, small=True).inputs(model))
    n = len(model.hook_dict)
    listed = f"dead: {', '.join(dead[:5])}" + (" ..." if len(dead) > 5 else "")
    return Check("hooks", not dead, listed if dead else f"{n} hook points, all alive")
