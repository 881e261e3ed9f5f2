"""`HookedMultimodalTransformer`: vision tower, projector, splice, decoder, all of it hooked.

    question + image -> MultimodalInputs -> vision -> projector -> splice -> blocks -> logits

A forward pass may start at any layer from a given residual stream, stop before any layer, and
attend to keys and values of earlier positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import GenerationConfig

from mmlens.config import MultimodalConfig
from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.inputs.rope_positions import counted
from mmlens.inputs.special_tokens import Side
from mmlens.model.activation_cache import ActivationCache, check_one_row
from mmlens.model.checkpoint_methods import CheckpointMethods
from mmlens.model.components import (
    Embed,
    KeyValueCache,
    Projector,
    RMSNorm,
    TransformerBlock,
    Unembed,
    make_norm,
)
from mmlens.model.components.attention import Residual
from mmlens.model.components.attention_rule import AttentionRule, Places
from mmlens.model.components.key_value_cache import continuing, for_rows, keys_mask
from mmlens.model.components.past import CachedPast, Past, PlainPast
from mmlens.model.components.rotary import Angles
from mmlens.model.generation import GenerationMethods
from mmlens.model.hook_points import HookPoint
from mmlens.model.hooked_root_module import HookedRootModule
from mmlens.model.input_methods import Input, InputMethods, batch_arguments
from mmlens.model.loss import next_token_loss
from mmlens.model.sites import Site, SiteTable, within
from mmlens.model.stream import StreamMethods, check_stream
from mmlens.model.verify_hooks import dead_hooks
from mmlens.model.vision_tower import HookedVisionTransformer
from mmlens.model.weights import WeightProperties
from mmlens.utils.texts import check_several
from mmlens.utils.threads import on_free_cores
from mmlens.utils.transformer_lens_names import Refusing, refuse_arguments
from mmlens.utils.transformers_arguments import take_transformers_arguments

if TYPE_CHECKING:
    from mmlens.branching.recording import Recording

INPUT_OPTIONS = ("pixel_values", "attention_mask", "prepend_bos", "padding_side")
"""Arguments of `forward` that say more of tokens or text, in the order of `_given`."""


class HookedMultimodalTransformer(
    HookedRootModule,
    CheckpointMethods,
    StreamMethods,
    WeightProperties,
    InputMethods,
    GenerationMethods,
    Refusing,
):
    """A multimodal language model (or a language model alone: `model.vision is None`) with hooks.

    Example:
        >>> model = HookedMultimodalTransformer.from_pretrained("demo")
        >>> inputs = model.prepare("The capital of this country is the city of", "flag.png",
        ...                        spans={"constraint": "this country"})
        >>> logits, cache = model.run_with_cache(inputs)
        >>> cache["mlp_out", 3][0, inputs.span("constraint")]
    """

    SITES = SiteTable(
        *within("blocks.{layer}", TransformerBlock.SITES),
        Site("embed", "batch pos d_model"),
        Site("input_embed", "batch pos d_model"),
        *within("ln_final", RMSNorm.SITES, "ln_final.", after=True),
        *within("vision", HookedVisionTransformer.SITES.values(), "vision."),
        *within("projector", Projector.SITES, "projector.", stack="connector"),
    )

    def __init__(
        self, cfg: MultimodalConfig, tokenizer: Any = None, image_processor: Any = None
    ) -> None:
        super().__init__()
        self.cfg = cfg
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.generation_config = GenerationConfig(pad_token_id=cfg.pad_token_id)
        self.checkpoint: Path | None = None  # the folder it came from
        self.vision = HookedVisionTransformer(cfg.vision) if cfg.vision else None
        self.projector = Projector(cfg.projector) if cfg.projector else None
        self.embed = Embed(cfg.d_vocab, cfg.d_model, cfg.embed_scale)
        self.hook_embed = HookPoint()
        self.hook_input_embed = HookPoint()
        self.rules = AttentionRule.of_decoder(cfg)
        """Who attends to whom, by the kind of layer (`cfg.kind(layer)`)."""
        self.blocks = nn.ModuleList(
            TransformerBlock(
                cfg,
                rotary=True,
                rule=self.rules[cfg.kind(layer)],
                deepstack=layer < cfg.n_deepstack,
            )
            for layer in range(cfg.n_layers)
        )
        self.ln_final = make_norm(cfg, cfg.d_model)
        self.unembed = Unembed(
            cfg.d_vocab, cfg.d_model, cfg.unembed_bias, cfg.logits_softcap, cfg.logits_scale
        )
        if cfg.tie_word_embeddings:
            self.unembed.weight = self.embed.W_E
        self.setup()
        self.eval()  # nothing here behaves differently in training; TransformerLens's tools ask
        self._note_device()

    def _apply(self, *args: Any, **kwargs: Any) -> HookedMultimodalTransformer:
        """What `to`, `cuda`, `half` ... end in: the config says where the model now is."""
        super()._apply(*args, **kwargs)
        self._note_device()
        return self

    def _note_device(self) -> None:
        self.cfg.device, self.cfg.dtype = self.embed.W_E.device, self.embed.W_E.dtype

    @property
    def device(self) -> torch.device:
        """Where the token embedding lies."""
        return self.embed.W_E.device

    # Running

    @continuing
    @on_free_cores
    def forward(
        self,
        input: Input | Residual | None = None,
        return_type: Literal["logits", "loss", "both"] | None = "logits",
        loss_per_token: bool = False,
        *,
        pixel_values: Tensor | None = None,
        attention_mask: Bool[Tensor, "batch pos"] | Int[Tensor, "batch pos"] | None = None,
        position_ids: Int[Tensor, "*axis rows pos"] | None = None,
        blocks: Int[Tensor, "rows pos"] | None = None,
        prepend_bos: bool | None = None,
        padding_side: Side | None = None,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
        past_kv_cache: KeyValueCache | None = None,
        deepstack: Sequence[Residual] = (),
        **others: Any,
    ) -> Any:
        """Run the model.

        Args:
            input: inputs, token ids or text; with `start_at_layer`, the residual stream
                [batch, pos, d_model] that enters that layer.
            return_type: "logits" [batch, pos, d_vocab]; "loss", the mean negative log likelihood
                (nats) of the tokens that follow, images and padding left out; "both"; or None.
            loss_per_token: the loss as [batch, pos - 1], NaN where the next token is a visual one
                or padding.
            pixel_values: images that go with token ids, as the family's processor in transformers
                returns them; see `Processor.from_tokens`.
            attention_mask: with token ids or a residual stream, False at left padding. By default
                the padding tokens at the left of each row of ids are taken for padding.
            position_ids: rotary positions, or three of them where images have rows and columns (see
                `MultimodalInputs.rope_positions`); by default those of the inputs, after the cache.
                A residual stream has no images: give `inputs.rope_positions` where it had some.
            blocks: with a residual stream, which positions attend to each other in both directions,
                as in `MultimodalInputs.blocks`.
            prepend_bos: of text, whether it begins with BOS; see `to_tokens`.
            padding_side: where shorter texts, or rows of token ids, are padded; by default
                `tokenizer.padding_side`. On the right the last position is not the end of a text.
            start_at_layer: skip what is below this layer.
            stop_at_layer: return the residual stream that would enter this layer; `n_layers` gives
                the one before the final norm. Negative counts from the end.
            past_kv_cache: earlier positions to attend to; grows unless it is frozen, or the run
                fails.
            deepstack: with `start_at_layer`, what images add in block 0, 1, ... (`hook_deepstack`).
            others: what else that processor returns, so that `model(**batch)` works: `input_ids`
                for `input`, `image_sizes`, ...; and transformers' and TransformerLens's, such as
                `use_cache` and `labels`, where they ask for nothing.

        Raises:
            NotImplementedError: one of their arguments that is refused, and why.
            TypeError: an unknown argument, or nothing to run on.
            ValueError: layers that do not exist, a loss without the tokens, an unknown
                `return_type`, inputs that do not fit (see `inputs_from_tokens`), more tokens than
                the model was made for (`cfg.longest_input`).
        """
        input, visual = batch_arguments(input, others)
        take_transformers_arguments("forward", others)
        refuse_arguments("forward", self.forward, others)
        if not isinstance(return_type, str | None):
            raise TypeError(
                f"return_type is a name or None, not {type(return_type).__name__}: images go to "
                "`model.prepare` with their text, and pixel values are given by name"
            )
        if return_type not in ("logits", "loss", "both", None):
            raise ValueError(f"return_type={return_type!r}; it is 'logits', 'loss', 'both' or None")
        first = self._layer("start_at_layer", start_at_layer, default=0)
        last = self._layer("stop_at_layer", stop_at_layer, default=self.cfg.n_layers)
        if past_kv_cache is not None:
            past_kv_cache.check_layers(range(first, last))
        inputs: MultimodalInputs | None = None
        real: Any = None
        resid: Any = input
        if start_at_layer is not None:
            check_stream(resid, self.cfg.d_model, "start_at_layer")
        else:
            inputs, real = self._given(
                input,
                pixel_values,
                attention_mask,
                prepend_bos,
                padding_side,
                follows_past=bool(past_kv_cache),
                **visual,
            )
            seen, attention_mask = self.visual_tokens(inputs), inputs.attention_mask
            resid, deepstack = self.input_embeddings(inputs, seen), self.deepstack(inputs, seen)
            blocks = inputs.blocks
        if position_ids is None:
            if inputs is not None:
                position_ids = inputs.rope_positions
            elif attention_mask is not None:
                position_ids = counted(attention_mask.bool())[None]
            position_ids = self._after(past_kv_cache, position_ids, resid)
        past, angles = self.attention_context(
            resid, attention_mask, position_ids, past_kv_cache, blocks
        )
        resid = self.run_blocks(resid, range(first, last), past, angles, deepstack)
        if stop_at_layer is not None:
            return resid
        logits = self.unembed(self.ln_final(resid))
        if return_type in ("logits", None):
            return logits if return_type else None
        if inputs is None:
            raise ValueError("a loss needs the tokens; with start_at_layer ask for logits")
        loss = next_token_loss(logits, inputs.tokens, real, inputs.is_image, loss_per_token)
        return loss if return_type == "loss" else (logits, loss)

    def _layer(self, name: str, layer: int | None, default: int) -> int:
        n_layers = self.cfg.n_layers
        if layer is None:
            return default
        if not -n_layers <= layer <= n_layers:
            raise ValueError(
                f"{name}={layer}, but this model has {n_layers} layers: it must be 0 ... "
                f"{n_layers}, or -{n_layers} ... -1 counted from the end"
            )
        return layer + n_layers * (layer < 0)

    def _after(
        self, cache: KeyValueCache | None, positions: Tensor | None, resid: Residual
    ) -> Int[Tensor, "axis rows pos"]:
        """Rotary positions of a pass, counted from 0 or given so, after those of a cache."""
        if positions is None:
            positions = torch.arange(resid.shape[1], device=resid.device)[None, None]
        first = 0 if cache is None else cache.next_position()
        if isinstance(first, Tensor):
            first = for_rows(first, len(resid) if len(first) > 1 else 1).to(positions)
        return positions + first

    def attention_context(
        self,
        resid: Residual,
        attention_mask: Tensor | None,
        positions: Int[Tensor, "*axis rows pos"],
        cache: KeyValueCache | None,
        blocks: Int[Tensor, "rows pos"] | None = None,
    ) -> tuple[Past, Angles]:
        """What all layers share: what queries attend to, and the rotary angles of positions."""
        n_new, n_past = resid.shape[1], 0 if cache is None else len(cache)
        key_mask = keys_mask(attention_mask, cache, len(resid), n_new, resid.device)
        self.cfg.check_length(n_past + n_new, key_mask)
        if cache is not None and not cache.frozen:
            cache.place(positions if positions.ndim == 3 else positions[None])
            cache.key_mask = key_mask
        at = torch.arange(n_past + n_new, device=resid.device)
        if blocks is not None and n_past:
            # What follows a past is no prompt; an image is one all the same.
            is_image = self.cfg.attention_blocks == "image"
            blocks = pad(blocks, (n_past, 0), value=-1) if is_image else None
        places = Places(at, key_mask, blocks)
        past = PlainPast(places) if cache is None else CachedPast(places, cache=cache)
        return past, self.rotary_angles(positions.to(resid.device), resid.dtype)

    def rotary_angles(
        self, positions: Int[Tensor, "*axis batch pos"], dtype: torch.dtype
    ) -> Angles:
        """Cosines and sines of every position's angles, by the kind of layer."""
        positions = positions + self.cfg.first_rope_position
        return {
            kind: rule.rotary.cos_sin(positions, dtype)
            for kind, rule in self.rules.items()
            if rule.rotary is not None
        }

    def run_with_cache(
        self,
        input: Input | None = None,
        *model_args: Any,
        return_cache_object: bool = True,
        remove_batch_dim: bool = False,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """Run the model and keep activations; arguments as in TransformerLens.

        `names_filter` is a name, a list of names or a predicate; None keeps everything but what is
        kept where it is named: `attn.hook_result` and the like (see
        `mmlens.model.hooked_root_module`). Activations of a model that is spread over several GPUs
        are brought to its first, unless `device` says otherwise. `interventions` are as in
        `run_with_hooks`; the cache holds what they made of the activations.

        Raises:
            KeyError: a name that is not a hook point.
            ValueError: `remove_batch_dim` of several rows; what `forward` raises.

        Example:
            >>> logits, cache = model.run_with_cache(inputs, names_filter="blocks.3.hook_mlp_out")
        """
        input, visual = batch_arguments(input, kwargs)
        inputs: MultimodalInputs | None = None
        n_rows = len(input) if isinstance(input, Tensor) else 1
        if kwargs.get("start_at_layer") is None:
            given: Any = {name: kwargs[name] for name in INPUT_OPTIONS if name in kwargs}
            past = kwargs.get("past_kv_cache")
            inputs, _ = self._given(input, **given, follows_past=bool(past), **visual)
            input = inputs if isinstance(input, MultimodalInputs) else input
            n_rows = inputs.n_rows
        if remove_batch_dim:
            check_one_row(n_rows)
        places = set(getattr(self, "hf_device_map", {}).values())  # accelerate's
        if len(places) > 1 and return_cache_object:  # which adds up activations of all layers
            kwargs.setdefault("device", self.device)
        out, stored = super().run_with_cache(
            input, *model_args, remove_batch_dim=remove_batch_dim, **kwargs, **visual
        )
        if not return_cache_object:
            return out, stored
        cache = ActivationCache(stored, self, has_batch_dim=not remove_batch_dim)
        cache.inputs = inputs  # whoever draws activations needs the words for them
        return out, cache

    def record(self, input: Input, sites: Sequence[Any] = ()) -> Recording:
        """Run once and keep what later runs can branch from; see `mmlens.branching`.

        Args:
            sites: activations that are kept besides: `("resid_post", 12)`, `("z", range(4))`, and
                those without layers as they are, `"input_embed"`.

        Raises:
            ValueError: no such site.
            KeyError: the model has no such hook point.

        Example:
            >>> recording = model.record(inputs, sites=[("resid_post", 12)])
            >>> recording["resid_post", 12]      # [batch, pos, d_model]
        """
        from mmlens.branching.recording import Recording

        return Recording.of(self, self.to_inputs(input), sites)

    def record_many(self, inputs: Sequence[Input], sites: Sequence[Any] = ()) -> list[Recording]:
        """Record prompts that share what they have in common: questions on one image, say.

        `sites` are kept besides, as in `record`. A single text is a TypeError.
        """
        from mmlens.branching.recording import Recording

        check_several(inputs=inputs)
        return Recording.of_all(self, map(self.to_inputs, inputs), sites)

    def verify_hooks(self, input: Input) -> list[str]:
        """The hook points that do not fire, or whose activation nothing depends on.

        Perturbs each hook point in turn. An empty list means that every declared hook is live. A
        ValueError says that the model gives NaN or infinity without an edit.
        """
        return dead_hooks(self, self.to_inputs(input))
