"""`HookedMultimodalTransformer`: vision tower, projector, splice, decoder, all of it hooked.

    question + picture -> MultimodalInputs -> vision -> projector -> splice -> blocks -> logits

A forward pass may start at any layer from a given residual stream, stop before any layer, and
attend to keys and values of earlier positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mmlens.components import (
    Embed,
    HookedVisionTransformer,
    KeyValueCache,
    Projector,
    Rotary,
    TransformerBlock,
    Unembed,
    make_norm,
)
from mmlens.components.masks import causal_mask, keys_mask, padded_mask
from mmlens.config import MultimodalConfig
from mmlens.generation import generate_tokens
from mmlens.hook_points import ActivationCache, HookedRootModule, HookPoint
from mmlens.inputs import MultimodalInputs
from mmlens.loss import next_token_loss
from mmlens.prompts import inputs_from_tokens, prepare
from mmlens.tokens import TokenMethods
from mmlens.weights import WeightProperties

if TYPE_CHECKING:
    from mmlens.branching import Recording

Tokens = Int[Tensor, "batch pos"]
Residual = Float[Tensor, "batch pos d_model"]
Input = MultimodalInputs | Tensor | str | list[str]
ReturnType = Literal["logits", "loss", "both"]


class HookedMultimodalTransformer(HookedRootModule, WeightProperties, TokenMethods):
    """A multimodal language model (or a language model alone: `model.vision is None`) with hooks.

    Example:
        >>> model = HookedMultimodalTransformer.from_pretrained("demo")
        >>> inputs = model.prepare("The capital of this country is the city of", "flag.png",
        ...                        spans={"constraint": "this country"})
        >>> logits, cache = model.run_with_cache(inputs)
        >>> cache["mlp_out", 3][0, inputs.span("constraint")]
    """

    def __init__(
        self, cfg: MultimodalConfig, tokenizer: Any = None, image_processor: Any = None
    ) -> None:
        super().__init__()
        self.cfg = cfg
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.checkpoint: Path | None = None  # the folder it came from
        self.vision = HookedVisionTransformer(cfg.vision) if cfg.vision else None
        self.projector = Projector(cfg.projector) if cfg.projector else None
        self.embed = Embed(cfg.d_vocab, cfg.d_model)
        self.hook_embed = HookPoint()  # [batch, pos, d_model]
        self.hook_input_embed = HookPoint()  # [batch, pos, d_model]
        self.blocks = nn.ModuleList(
            TransformerBlock(cfg, causal=True, rotary=True, layer=layer)
            for layer in range(cfg.n_layers)
        )
        self.ln_final = make_norm(cfg)
        self.unembed = Unembed(cfg.d_vocab, cfg.d_model, bias=cfg.unembed_bias)
        if cfg.tie_word_embeddings:
            self.unembed.weight = self.embed.W_E
        self.rotary = Rotary(cfg)
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

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        device_map: str | Mapping[str, Any] | None = None,
        vision_tower: str | Path | None = None,
    ) -> HookedMultimodalTransformer:
        """Load a published checkpoint, a local folder, or an embedded model ("demo").

        Args:
            name_or_path: "demo" or "demo-tuned" (`docs/demo-model.md`), a folder, a GGUF file, or a
                name on the Hugging Face hub.
            device: where to put it; by default the GPU if there is one.
            dtype: by default the checkpoint's own.
            revision: branch, tag or commit on the hub.
            device_map: "auto" spreads the model over all GPUs (through accelerate); or module
                names with their devices. Instead of `device`.
            vision_tower: a folder or hub name to take the tower from, for the formats of LLaVA's
                code (original LLaVA, Bunny, TinyLLaVA, LLaVA-Phi); by default the checkpoint's own,
                or else the one that its config.json names.

        Raises:
            CheckpointError: not found, no format knows it, quantised, or names and shapes do not
                fit.

        Example:
            >>> HookedMultimodalTransformer.from_pretrained(
            ...     "llava-hf/llava-1.5-7b-hf", dtype=torch.bfloat16, device_map="auto")
        """
        from mmlens.checkpoints import load_model

        return load_model(
            name_or_path,
            device=device,
            dtype=dtype,
            revision=revision,
            device_map=device_map,
            vision_tower=vision_tower,
        )

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the model, edits included, in the format, names and shards that it came from.

        Raises:
            CheckpointError: it came from no checkpoint folder, or that folder has changed.
            FileExistsError: `folder` has something in it.
        """
        from mmlens.checkpoints.saving import save_model

        return save_model(self, Path(folder).expanduser())

    # Inputs

    @property
    def device(self) -> torch.device:
        """Where the token embedding lies."""
        return self.embed.W_E.device

    def prepare(
        self,
        text: str | Sequence[str],
        image: Any = None,
        *,
        spans: Any = None,
        template: Any = "auto",
        prepend_bos: bool | None = None,
    ) -> MultimodalInputs:
        """Text and pictures to model inputs with named positions; see `mmlens.prompts.prepare`.

        `prepend_bos=None` does what the model was trained with (`cfg.default_prepend_bos`).
        """
        return prepare(
            self.tokenizer,
            self.image_processor,
            self.cfg,
            text,
            image,
            spans=spans,
            template=template,
            default_template=self.cfg.default_template,
            prepend_bos=self.cfg.default_prepend_bos if prepend_bos is None else prepend_bos,
            device=self.device,
        )

    def inputs_from_tokens(
        self,
        tokens: Tokens,
        pixel_values: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        spans: Any = None,
    ) -> MultimodalInputs:
        """Ready token ids (one per visual token, as Hugging Face's processors give them)."""
        return inputs_from_tokens(
            self.cfg,
            tokens.to(self.device),
            None if pixel_values is None else pixel_values.to(self.device),
            attention_mask=None if attention_mask is None else attention_mask.to(self.device),
            spans=spans,
            tokenizer=self.tokenizer,
        )

    def to_inputs(
        self, input: Input, pixel_values: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> MultimodalInputs:
        """Whatever `forward` accepts, as `MultimodalInputs`."""
        if isinstance(input, MultimodalInputs):
            if pixel_values is not None or attention_mask is not None:
                raise ValueError("MultimodalInputs hold their own pixel_values and attention_mask")
            return input if input.device == self.device else input.to(self.device)
        if not isinstance(input, Tensor):
            return self.prepare(input, template=None)
        return self.inputs_from_tokens(input, pixel_values, attention_mask=attention_mask)

    def input_embeddings(
        self,
        inputs: MultimodalInputs,
        visual: Float[Tensor, "image visual_token d_model"] | None = None,
    ) -> Residual:
        """The residual stream that enters block 0: token embeddings with the visual tokens in.

        Args:
            visual: the visual tokens, where the pictures are encoded already.
        """
        is_image = inputs.is_image
        tokens = inputs.tokens
        if self.cfg.image_token_id is not None and self.cfg.image_token_id >= self.cfg.d_vocab:
            tokens = tokens.masked_fill(is_image, 0)  # a placeholder outside of the vocabulary
        resid = self.hook_embed(self.embed(tokens))
        if visual is None and inputs.pixel_values is not None and self.vision and self.projector:
            visual = self.projector(self.vision(inputs.pixel_values))
        if visual is not None:
            if visual.shape[0] * visual.shape[1] != int(is_image.sum()):
                raise ValueError(
                    f"{int(is_image.sum())} image tokens, but {visual.shape[0]} pictures of "
                    f"{visual.shape[1]} visual tokens each"
                )
            resid = resid.masked_scatter(is_image[..., None], visual.to(resid))
        if inputs.noise is not None:
            resid = resid + inputs.noise.to(resid)
        return self.hook_input_embed(resid)

    # Running

    def forward(
        self,
        input: Input | Residual,
        *,
        pixel_values: Float[Tensor, "image channel height width"] | None = None,
        attention_mask: Bool[Tensor, "batch pos"] | Int[Tensor, "batch pos"] | None = None,
        position_ids: Int[Tensor, "rows pos"] | None = None,
        return_type: ReturnType | None = "logits",
        loss_per_token: bool = False,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
        past_kv_cache: KeyValueCache | None = None,
    ) -> Any:
        """Run the model.

        Args:
            input: inputs, token ids or text; with `start_at_layer`, the residual stream
                [batch, pos, d_model] that enters that layer.
            pixel_values: pictures that go with token ids, in reading order.
            attention_mask: with token ids or a residual stream, False at left padding.
            position_ids: rotary positions; by default counted from the mask and the cache.
            return_type: "logits" [batch, pos, d_vocab]; "loss", the mean negative log likelihood
                (nats) of the tokens that follow, pictures and padding left out; "both"; or None.
            loss_per_token: the loss as [batch, pos - 1], NaN where the next token is a visual one
                or padding.
            start_at_layer: skip what is below this layer.
            stop_at_layer: return the residual stream that would enter this layer; `n_layers` gives
                the one before the final norm. Negative counts from the end.
            past_kv_cache: earlier positions to attend to; grows unless it is frozen.

        Raises:
            ValueError: layers that do not exist, a loss without the tokens, an unknown
                `return_type`, inputs that do not fit (see `inputs_from_tokens`).
        """
        if return_type not in ("logits", "loss", "both", None):
            raise ValueError(f"return_type={return_type!r}; it is 'logits', 'loss', 'both' or None")
        first = self._layer("start_at_layer", start_at_layer, default=0)
        last = self._layer("stop_at_layer", stop_at_layer, default=self.cfg.n_layers)
        inputs: MultimodalInputs | None = None
        resid: Any = input
        if start_at_layer is None:
            inputs = self.to_inputs(input, pixel_values, attention_mask)
            resid, attention_mask = self.input_embeddings(inputs), inputs.attention_mask
        mask, cos_sin = self.attention_context(resid, attention_mask, position_ids, past_kv_cache)
        for layer in range(first, last):
            resid = self.blocks[layer](
                resid, cos_sin=cos_sin, mask=mask, cache=past_kv_cache, layer=layer
            )
        if stop_at_layer is not None:
            return resid
        logits = self.unembed(self.ln_final(resid))
        if return_type in ("logits", None):
            return logits if return_type else None
        if inputs is None:
            raise ValueError("a loss needs the tokens; with start_at_layer ask for logits")
        loss = next_token_loss(logits, inputs, loss_per_token)
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

    def attention_context(
        self,
        resid: Residual,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: KeyValueCache | None,
    ) -> tuple[Tensor | None, tuple[Tensor, Tensor]]:
        """What all layers share: where queries may look (None: causal), and the rotary angles."""
        n_new, n_past = resid.shape[1], 0 if cache is None else len(cache)
        key_mask = keys_mask(attention_mask, cache, len(resid), n_new, resid.device)
        if cache is not None and not cache.frozen:
            cache.key_mask = key_mask
        mask = None
        if key_mask is not None:
            counted = (key_mask.cumsum(dim=1) - 1).clamp(min=0)[:, -n_new:]
            mask = padded_mask(key_mask, n_new)
        else:
            counted = torch.arange(n_past, n_past + n_new, device=resid.device)[None]
            if n_past and n_new > 1:
                mask = causal_mask(n_new, n_past + n_new, resid.device)[None, None]
        positions = counted if position_ids is None else position_ids
        return mask, self.rotary.cos_sin(positions, resid.dtype)

    def run_with_cache(
        self,
        *model_args: Any,
        return_cache_object: bool = True,
        remove_batch_dim: bool = False,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """Run the model and keep activations; arguments as in TransformerLens.

        `names_filter` is a name, a list of names or a predicate; None keeps everything but
        `attn.hook_result`, which is kept where it is named. Activations of a model that is spread
        over several GPUs are brought to its first, unless `device` says otherwise.

        Example:
            >>> logits, cache = model.run_with_cache(inputs, names_filter="blocks.3.hook_mlp_out")
        """
        places = set(getattr(self, "hf_device_map", {}).values())  # accelerate's
        if len(places) > 1 and return_cache_object:  # which adds up activations of all layers
            kwargs.setdefault("device", self.device)
        out, stored = super().run_with_cache(
            *model_args, remove_batch_dim=remove_batch_dim, **kwargs
        )
        if not return_cache_object:
            return out, stored
        cache = ActivationCache(stored, self, has_batch_dim=not remove_batch_dim)
        if model_args and isinstance(model_args[0], MultimodalInputs):
            cache.inputs = model_args[0]  # whoever draws activations needs the words for them
        return out, cache

    def record(self, input: Input) -> Recording:
        """Run once and keep what later runs can branch from; see `mmlens.branching`."""
        from mmlens.branching import Recording

        return Recording.of(self, self.to_inputs(input))

    def record_many(self, inputs: Sequence[Input]) -> list[Recording]:
        """Record prompts that share what they have in common: questions on one picture, say."""
        from mmlens.beginnings import record_all

        return record_all(self, [self.to_inputs(each) for each in inputs])

    def generate(
        self,
        input: Input,
        max_new_tokens: int = 16,
        *,
        return_type: Literal["tokens", "str"] = "str",
        **options: Any,
    ) -> Tokens | str | list[str]:
        """Continue the input, greedily unless `do_sample=True`.

        Args:
            max_new_tokens: the most tokens added to each row.
            return_type: "str" gives the new text (a list of texts for a batch); "tokens" all
                tokens, those of the input first.
            options: do_sample, temperature, top_k, top_p, stop_at_eos, use_past_kv_cache.
        """
        inputs = self.to_inputs(input)
        new = generate_tokens(self, inputs, max_new_tokens, **options)
        if return_type == "tokens":
            return torch.cat([inputs.tokens.expand(len(new), -1), new], dim=1)
        texts = [self.to_string(row) for row in new]
        return texts if len(texts) > 1 else texts[0]

    def verify_hooks(self, input: Input) -> list[str]:
        """The hook points that do not fire, or whose activation nothing depends on.

        Perturbs each hook point in turn. An empty list means that every declared hook is live.
        """
        from mmlens.verification import dead_hooks

        return dead_hooks(self, self.to_inputs(input))
