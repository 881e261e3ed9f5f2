"""Text, token ids and images to what a model runs on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmlens.inputs.checks import check_ids, image_positions
from mmlens.inputs.layouts import BATCH_KEYS, drop_what_is_known
from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.inputs.processor import Processor
from mmlens.inputs.special_tokens import Side, padding_at, padding_token
from mmlens.model.loss import next_token_loss
from mmlens.model.text import TokenMethods, Tokens

Input = MultimodalInputs | Tensor | str | list[str]


def batch_arguments(input: Any, others: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Take what transformers' processors return out of further arguments.

    Returns:
        What the model runs on (`input`, or `input_ids`), and the tensors of images.

    Raises:
        TypeError: neither or both of `input` and `input_ids`.
    """
    drop_what_is_known(others)
    ids = others.pop("input_ids", None)
    if (input is None) == (ids is None):
        raise TypeError("give either inputs, token ids or text, or input_ids= of a batch")
    visual = {name: others.pop(name) for name in BATCH_KEYS[1:] if name in others}
    return (ids if input is None else input), {
        name: value for name, value in visual.items() if value is not None
    }


def check_text(input: Any) -> None:
    """Raise a TypeError for what is neither a text nor several."""
    is_text = isinstance(input, Iterable) and not isinstance(input, Mapping)
    if not is_text or not all(isinstance(each, str) for each in input):
        raise TypeError(
            "a model runs on what `prepare` returns, a text, a list of texts, or a tensor of token "
            f"ids, not on {type(input).__name__}; what transformers' processor returns with "
            "return_tensors='pt' goes to model(**batch), generate(**batch), or "
            "inputs_from_tokens(batch.pop('input_ids'), **batch)"
        )


def on_device(name: str, value: Any, device: torch.device) -> Tensor | None:
    """Return a tensor of a batch on a device.

    Raises:
        TypeError: no tensor, and not None.
    """
    if value is not None and not isinstance(value, Tensor):
        raise TypeError(
            f"{name} must be a tensor, not {type(value).__name__}: call transformers' processor "
            "with return_tensors='pt'"
        )
    return None if value is None else value.to(device)


class InputMethods(TokenMethods):
    """What a model takes, as `MultimodalInputs`, and the loss of its tokens."""

    image_processor: Any
    input_embeddings: Callable[..., Tensor]
    visual_tokens: Callable[..., Tensor | None]
    deepstack: Callable[..., tuple[Tensor, ...]]

    @property
    def processor(self) -> Processor:
        """What makes inputs of text and images: the tokenizer, image processor and template."""
        return Processor(self.cfg, self.tokenizer, self.image_processor)

    def prepare(
        self,
        text: str | Sequence[str],
        image: Any = None,
        *,
        spans: Any = None,
        template: Any = "auto",
        prepend_bos: bool | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> MultimodalInputs:
        """Return text and images as model inputs with named positions; see `Processor.__call__`.

        Example:
            >>> model.prepare("What is the capital of this country?", "flag.png",
            ...               spans={"constraint": "this country"})
        """
        return self.processor(
            text,
            image,
            spans=spans,
            template=template,
            prepend_bos=prepend_bos,
            min_pixels=min_pixels,
            max_pixels=max_pixels,
            device=self.device,
        )

    def inputs_from_tokens(
        self,
        tokens: Tokens,
        pixel_values: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        spans: Any = None,
        padding_side: Side | None = None,
        **visual: Any,
    ) -> MultimodalInputs:
        """Return inputs made of ready token ids; see `Processor.from_tokens`.

        There is one id per visual token, as Hugging Face's processors give them.

        Raises:
            TypeError: anything that is no tensor.

        Example:
            >>> batch = processor(text=prompt, images=image, return_tensors="pt")  # transformers'
            >>> inputs = model.inputs_from_tokens(batch.pop("input_ids"), **batch)
        """
        given = {"pixel_values": pixel_values, "attention_mask": attention_mask, **visual}
        ids: Any = on_device("input_ids", tokens, self.device)
        moved: Any = {name: on_device(name, value, self.device) for name, value in given.items()}
        return self.processor.from_tokens(
            ids,
            spans=spans,
            padding_side=padding_side,
            **{name: tensor for name, tensor in moved.items() if tensor is not None},
        )

    def to_inputs(
        self,
        input: Input,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        prepend_bos: bool | None = None,
        padding_side: Side | None = None,
        **visual: Any,
    ) -> MultimodalInputs:
        """Return whatever `forward` accepts as `MultimodalInputs`, padded on the left.

        Args:
            input: inputs, token ids [batch, pos] or [pos], a text or a list of texts.
            pixel_values: of the images that go with token ids, in reading order.
            attention_mask: with token ids, False at left padding; by default it is told from the
                ids.
            prepend_bos: of text, as in `to_tokens`.
            padding_side: where token ids may have padding; by default `tokenizer.padding_side`.
            visual: what else transformers' processor returns of the images, such as `image_sizes`.

        Raises:
            TypeError: none of these inputs, such as a batch of transformers' processor as a whole.
            ValueError: token ids with padding on the right, whose last position is no end of a
                text; or inputs that do not fit (see `inputs_from_tokens`).
        """
        if isinstance(input, MultimodalInputs):
            if pixel_values is not None or attention_mask is not None or visual:
                raise ValueError(
                    "MultimodalInputs hold their own pixel_values and attention_mask: give "
                    "these with token ids"
                )
            return input if input.device == self.device else input.to(self.device)
        if not isinstance(input, Tensor):
            check_text(input)
            if pixel_values is not None or attention_mask is not None or visual:
                raise ValueError(
                    "pixel_values and attention_mask go with token ids; give text and images to "
                    "`model.prepare`, and the result to the model"
                )
            return self.prepare(input, template=None, prepend_bos=prepend_bos)
        check_ids(input)
        if attention_mask is None and self._padding_side(padding_side) == "right":
            at_end = padding_at("right", input.reshape(-1, input.shape[-1]), *self._vocabulary())
            if bool(at_end.any()):
                row = int(at_end.any(dim=1).nonzero()[0])
                raise ValueError(
                    f"row {row} of the tokens ends with padding (id "
                    f"{padding_token(*self._vocabulary())}), and what is read or generated here "
                    f"follows the last position of every row: pad on the left "
                    f"(`model.to_tokens(..., padding_side='left')`), or use `model.prepare`"
                )
        return self.inputs_from_tokens(input, pixel_values, attention_mask=attention_mask, **visual)

    def resuming(self, inputs: MultimodalInputs, layer: int) -> dict[str, Any]:
        """Return the arguments with which a run of inputs goes on from their residual stream.

        Args:
            inputs: as `prepare` returns them.
            layer: which layer the stream enters.

        Example:
            >>> resid = model(inputs, stop_at_layer=3)
            >>> logits = model(resid, start_at_layer=3, **model.resuming(inputs, 3))
        """
        adds = layer < self.cfg.n_deepstack
        return {
            "attention_mask": inputs.attention_mask,
            "position_ids": inputs.rope_positions,
            "blocks": inputs.blocks,
            "deepstack": self.deepstack(inputs, self.visual_tokens(inputs)) if adds else (),
        }

    def _given(
        self,
        input: Input,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        prepend_bos: bool | None = None,
        padding_side: Side | None = None,
        *,
        follows_past: bool = False,
        **visual: Any,
    ) -> tuple[MultimodalInputs, Bool[Tensor, "batch pos"]]:
        """What `forward` runs on, and where it has text or images and no padding.

        Padding on the right is left unmasked, as in TransformerLens: no real position attends to
        it. After a past nothing is padded.
        """
        side = self._padding_side(padding_side)
        if isinstance(input, str | list) and (side == "right" or attention_mask is not None):
            check_text(input)
            input = self.to_tokens(input, prepend_bos, side, truncate=False)
        if follows_past and isinstance(input, Tensor):
            input = self._with_embeddings(input)
            attention_mask = torch.ones_like(input) if attention_mask is None else attention_mask
        if not isinstance(input, Tensor) or attention_mask is not None or side == "left":
            inputs = self.to_inputs(
                input, pixel_values, attention_mask, prepend_bos=prepend_bos, **visual
            )
            return inputs, inputs.attention_mask
        inputs = self.inputs_from_tokens(input, pixel_values, padding_side="right", **visual)
        at_end = padding_at("right", inputs.tokens, *self._vocabulary())
        return inputs, inputs.attention_mask & ~at_end

    def _with_embeddings(self, tokens: Tensor) -> Tensor:
        """Token ids with another for a padding token without embedding, in rows that have ended."""
        pad = padding_token(*self._vocabulary())
        if pad is None or pad < self.cfg.d_vocab:
            return tokens
        return tokens.masked_fill(tokens == pad, 0)

    def input_to_embed(
        self,
        input: Input,
        prepend_bos: bool | None = None,
        padding_side: Side | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
    ) -> tuple[Float[Tensor, "batch pos d_model"], Tokens, None, Bool[Tensor, "batch pos"]]:
        """Return the residual stream that enters block 0, tokens, None, and the attention mask.

        TransformerLens's method; the third is None for every model with rotary positions. The run
        goes on with `model(resid, start_at_layer=0, attention_mask=mask)` where there is no image.
        With images this leaves out their rotary positions, which of them attend to themselves in
        both directions, and what they add in first blocks, where a family has these: then it goes
        on with `model(resid, start_at_layer=0, **model.resuming(inputs, 0))`.
        """
        inputs, _ = self._given(input, pixel_values, attention_mask, prepend_bos, padding_side)
        return self.input_embeddings(inputs), inputs.tokens, None, inputs.attention_mask

    def loss_fn(
        self,
        logits: Float[Tensor, "batch pos d_vocab"],
        tokens: Int[Tensor, "rows pos"] | MultimodalInputs,
        attention_mask: Bool[Tensor, "rows pos"] | Int[Tensor, "rows pos"] | None = None,
        per_token: bool = False,
    ) -> Float[Tensor, ""] | Float[Tensor, "batch pos_but_first"]:
        """Return the mean negative log likelihood (nats) of every next token that is text.

        Args:
            logits: of a run on the tokens; of several samples of noise, on the same row.
            tokens: what it ran on.
            attention_mask: False where nothing is counted; by default at padding, as in `forward`.
            per_token: the loss of each next token instead, 0 where it is not counted.
        """
        if isinstance(tokens, MultimodalInputs):
            mask, tokens = tokens.attention_mask, tokens.tokens
        else:
            mask = ~padding_at("left", tokens, *self._vocabulary())
            if self._padding_side(None) == "right":
                mask &= ~padding_at("right", tokens, *self._vocabulary())
        mask = mask if attention_mask is None else attention_mask.bool()
        is_image = image_positions(tokens, self.cfg.image_token_id)
        tokens, mask, is_image = (each.to(logits.device) for each in (tokens, mask, is_image))
        return next_token_loss(logits, tokens, mask, is_image, per_token, not_counted=0.0)
