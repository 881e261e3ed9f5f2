r"""Questions and images -> `MultimodalInputs`: what `model.prepare` does.

    processor = Processor.from_pretrained("llava-hf/llava-1.5-7b-hf")    # needs no weights
    processor("What is the capital of this country?", flag, spans={"constraint": "this country"})

A prompt is text with one `<image>` per image. It is tokenised as such, with character offsets,
and then every `<image>` token becomes the tokens of its image (`mmlens.inputs.layouts`); spans
are found in the text and move with the tokens.

Public names: `Processor`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor

from mmlens.inputs.attention_blocks import attention_blocks
from mmlens.inputs.checks import (
    check_ids,
    check_mask,
    check_span_name,
    check_vocabulary,
    image_positions,
    standard_spans,
)
from mmlens.inputs.collation import collate
from mmlens.inputs.images import load_images
from mmlens.inputs.layouts import (
    ImageLayout,
    ProcessedImage,
    drop_what_is_known,
    image_layout,
)
from mmlens.inputs.layouts.any_grid import AnyGrid, with_pixel_bounds
from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.inputs.named_phrases import (
    char_spans,
    check_image_token,
    span_positions,
    text_spans,
)
from mmlens.inputs.rows import Spans, one_each, rows_of
from mmlens.inputs.spans import (
    PLACEHOLDER,
    EncodedText,
    encode,
    token_strings,
)
from mmlens.inputs.special_tokens import Side, filler, padding_at, special_tokens_around
from mmlens.inputs.templates import (
    ChatTemplate,
    Template,
    fill_template,
    with_image_text,
)
from mmlens.inputs.visual import Visual

if TYPE_CHECKING:
    from mmlens.config import MultimodalConfig
else:
    MultimodalConfig = Any  # anything with image_token_id, bos_token_id and vision will do

__all__ = ["Processor"]


@dataclass(frozen=True, eq=False)
class Processor:
    """A tokenizer, an image processor and a template, which together make a model's inputs.

    `model.processor` is the model's; a thread that only reads prompts needs no weights.

    Example:
        >>> processor = Processor.from_pretrained("llava-hf/llava-v1.6-mistral-7b-hf")
        >>> inputs = processor("What is this?", "photo.jpg")
    """

    cfg: MultimodalConfig
    """The model's configuration."""
    tokenizer: Any
    """A fast Hugging Face tokenizer that knows `<image>` as one special token."""
    image_processor: Any = None
    """transformers', open_clip's, or any `mmlens.inputs.images.ImageProcessor`."""

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        revision: str | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> Processor:
        """Load a checkpoint's processor without its weights.

        Args:
            name_or_path: as in `HookedMultimodalTransformer.from_pretrained`.
            revision: branch, tag or commit on the hub.
            min_pixels: as in `bounded`.
            max_pixels: as in `bounded`.

        Raises:
            CheckpointError: not found, or no format knows it.
            ValueError: bounds as in `bounded`.
        """
        from mmlens.checkpoints.load import load_processor

        return load_processor(name_or_path, revision=revision).bounded(min_pixels, max_pixels)

    @property
    def layout(self) -> ImageLayout:
        """How images become visual tokens."""
        return image_layout(self.cfg)

    def bounded(self, min_pixels: int | None = None, max_pixels: int | None = None) -> Processor:
        """Return the processor with other bounds of an image's area.

        For the families whose images have as many visual tokens as their area asks for (Qwen2-VL,
        Qwen2.5-VL, Qwen3-VL): the image is scaled to lie between the bounds, which decide what it
        costs.

        Args:
            min_pixels: the least that an image has, scaled; None leaves it as it is.
            max_pixels: the most.

        Raises:
            ValueError: bounds that cannot be, or a family whose images have other sizes.

        Example:
            >>> processor = Processor.from_pretrained("Qwen/Qwen2.5-VL-3B-Instruct")
            >>> inputs = processor.bounded(max_pixels=256 * 28 * 28)("What is this?", "photo.jpg")
        """
        if min_pixels is None and max_pixels is None:
            return self
        if not isinstance(self.layout, AnyGrid) or self.image_processor is None:
            has = self.layout.description() if self.cfg.vision else "none"
            raise ValueError(
                "min_pixels and max_pixels are for models whose images have any grid (Qwen2-VL, "
                f"Qwen2.5-VL, Qwen3-VL); the number of this model's visual tokens is: {has}"
            )
        return replace(
            self, image_processor=with_pixel_bounds(self.image_processor, min_pixels, max_pixels)
        )

    def __call__(
        self,
        text: str | Sequence[str],
        image: Any = None,
        *,
        spans: Spans = None,
        template: Template = "auto",
        prepend_bos: bool | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        device: torch.device | str | None = None,
    ) -> MultimodalInputs:
        """Return tokens, pixels and named positions of one question or a batch of them.

        Args:
            text: a question, or a list of them: a batch, padded on the left. Without `<image>` in
                it or in the template, its images come in front of the prompt.
            image: the images. For one text: None, one or a list; for a list of texts a list with
                None, one or a list for each. What one is: see `mmlens.inputs.images.load_image`.
            spans: names for phrases of the text, `{"constraint": "this country"}`, or for
                characters of it (start, end); for a batch also a list of such. A phrase that the
                question does not hold may be in the template. `question` names the whole text by
                itself. A span holds text only, no visual tokens.
            template: what stands around the question. A text with `{question}` and, if the images
                have their place in it, `<image>` (once for all of them or once each); a function
                of (question, number of images) that gives the prompt; None for BOS, images, the
                text as it is; "auto" for the model's own (`cfg.default_template`), in which an
                `<image>` counts only when there is an image.
            prepend_bos: begin with the tokenizer's BOS, if it has one and the prompt does not
                begin with it already; None does what the model was trained with
                (`cfg.default_prepend_bos`), or else what transformers' tokenizer does.
            min_pixels: as in `bounded`, for these images.
            max_pixels: the same.
            device: where the tensors go.

        Raises:
            ValueError: no tokenizer or image processor, images for a model that sees none, another
                number of `<image>` than of images, a list of the wrong length, a reserved span
                name.
            SpanNotFoundError: (a ValueError) a phrase that is not in the text.
        """
        processor, tokenizer = self.bounded(min_pixels, max_pixels), self.tokenizer
        if tokenizer is None:
            raise ValueError(
                "the model has no tokenizer (its folder has no tokenizer.json), so it cannot take "
                "text: put the file there, set model.tokenizer, or use inputs_from_tokens"
            )
        automatic = template == "auto"
        if automatic:
            template = self.cfg.default_template
        if prepend_bos is None:
            prepend_bos = self.cfg.default_prepend_bos
        rows = []
        for question, given, phrases in rows_of(text, image, spans):
            images = load_images(given)
            if isinstance(template, ChatTemplate):
                question, phrases = template.asked(question, phrases)
            prompt, at = fill_template(template, question, len(images), optional_images=automatic)
            image_text = getattr(self.cfg, "image_text", PLACEHOLDER)
            prompt, at, phrases = with_image_text(prompt, at, phrases, image_text)
            complete = isinstance(template, ChatTemplate) and not template.adds_special_tokens
            encoded = encode(tokenizer, prompt)
            around = special_tokens_around(
                tokenizer, prompt, encoded.ids, prepend_bos, is_complete=complete
            )
            rows.append(processor._row(encoded, around, char_spans(encoded, at, phrases), images))
        if processor is not self:  # other images in their place are made in the same way
            own = {"image_processor": processor.image_processor}
            rows = [
                replace(row, images=tuple(replace(image, **own) for image in row.images))
                for row in rows
            ]
        inputs = rows[0] if len(rows) == 1 else collate(rows, filler(tokenizer, self.cfg))
        return inputs if device is None else inputs.to(device)

    def _row(
        self,
        encoded: EncodedText,
        around: tuple[list[int], list[int]],
        chars: dict[str, tuple[int, int]],
        images: tuple[Image.Image, ...],
    ) -> MultimodalInputs:
        """Return one row; `around` are the special tokens before and after the encoded prompt."""
        image_token = self._placeholder_id()
        processed = self._processed(images)
        check_image_token(self.tokenizer, encoded, image_token, len(images))
        before, after = around
        waiting = iter(processed)
        pieces: list[Sequence[int]] = [
            next(waiting).ids if token == image_token else [token]
            for token in [*before, *encoded.ids, *after]
        ]
        starts = list(accumulate(map(len, pieces), initial=0))
        ids = [token for piece in pieces for token in piece]
        if not ids:
            raise ValueError("the prompt is empty: no text, no image, and no BOS in front of it")
        first = len(before)
        places = [starts[first + i] for i, token in enumerate(encoded.ids) if token == image_token]
        placed = tuple(
            replace(one.tokens, start=start) for one, start in zip(processed, places, strict=True)
        )
        tokens = torch.tensor([ids])
        mask = torch.ones_like(tokens, dtype=torch.bool)
        (standard,) = standard_spans(tokens, mask, placed, bos_token_id=self.tokenizer.bos_token_id)
        return MultimodalInputs(
            tokens=tokens,
            attention_mask=mask,
            visual=Visual.joined([Visual.of_one(one.visual) for one in processed]),
            spans=(standard | text_spans(encoded, starts[first:], chars, image_token),),
            images=placed,
            image_token_id=self.cfg.image_token_id,
            str_tokens=(token_strings(self.tokenizer, ids),),
            texts=(encoded.text,),
            char_spans=(chars,),
            blocks=self._blocks(tokens, mask),
        )

    def _placeholder_id(self) -> int | None:
        """Return the id of `<image>` in text: that of visual tokens, unless they have another."""
        if getattr(self.cfg, "image_placeholder", PLACEHOLDER) == PLACEHOLDER:
            return self.cfg.image_token_id
        return self.tokenizer.convert_tokens_to_ids(PLACEHOLDER)

    def _blocks(self, tokens: Tensor, mask: Tensor, follows: Tensor | None = None) -> Tensor | None:
        """Return which positions attend to each other; `follows` is True after the prompt."""
        is_image = image_positions(tokens, self.cfg.image_token_id)
        return attention_blocks(
            getattr(self.cfg, "attention_blocks", None), is_image, mask, follows
        )

    def _processed(self, images: tuple[Image.Image, ...]) -> list[ProcessedImage]:
        if not images:
            return []
        if self.cfg.vision is None:
            raise ValueError(
                f"{len(images)} image(s) for a language model that sees none (cfg.vision is None)"
            )
        if self.image_processor is None:
            raise ValueError(
                "the model has no image processor (its folder has no preprocessor_config.json), so "
                "it cannot take images: put the file there, set model.image_processor, or give "
                "pixel_values to inputs_from_tokens"
            )
        return self.layout.processed(self.image_processor, self.tokenizer, images)

    def from_tokens(
        self,
        tokens: Int[Tensor, "*batch pos"],
        pixel_values: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        spans: Spans = None,
        padding_side: Side | None = None,
        **visual: Tensor,
    ) -> MultimodalInputs:
        """Make inputs from ready token ids, as Hugging Face's processors give them.

        Args:
            tokens: one id per position, the image token's at every visual token; one row may come
                without a batch dimension.
            pixel_values: all images in reading order, as the family's processor in transformers
                returns them. For LLaVA, `[image, channel, height, width]`; of another size than
                the config's they have another number of patches, and the tower interpolates its
                positions.
            attention_mask: 0 or False at the padding, which must be on the left; None takes the
                padding tokens at the left of each row for padding
                (`mmlens.inputs.special_tokens.padding_at`).
            spans: names for positions, `{"constraint": [590, 591]}`; for a batch also a list of
                such. Positions count from the beginning of the padded row.
            padding_side: "right" allows padding tokens outside of the vocabulary at the end of
                rows. They stay unmasked, for nothing before them attends to them.
            visual: what else that processor returns, such as `image_sizes`. Of `token_type_ids` and
                `mm_token_type_ids` PaliGemma's alone count: 0 in the prompt, 1 at what follows it.
                Its `labels` of a prompt, which are of no token, are left out.

        Raises:
            ValueError: everything that does not fit: image tokens and images, ids outside of the
                vocabulary, a mask of another shape or with padding elsewhere, positions outside.
            TypeError: ids that are no whole numbers.
        """
        cfg, tokenizer = self.cfg, self.tokenizer
        drop_what_is_known(visual)
        check_ids(tokens)
        tokens = tokens.reshape(-1, tokens.shape[-1]).long()
        if attention_mask is None:
            mask = ~padding_at("left", tokens, tokenizer, cfg)
        else:
            mask = attention_mask.bool()
            mask = mask[None] if mask.ndim == 1 else mask
        check_mask(tokens, mask)
        types = visual.pop("token_type_ids", None)
        real = mask
        if padding_side == "right":
            real = mask & ~padding_at("right", tokens, tokenizer, cfg)
        check_vocabulary(tokens[real], getattr(cfg, "d_vocab", None), cfg.image_token_id)
        if pixel_values is not None:
            visual = {"pixel_values": pixel_values, **visual}
        packed, images = self.layout.located(tokens, mask, tokenizer, visual)
        bos = cfg.bos_token_id if tokenizer is None else tokenizer.bos_token_id
        rows = standard_spans(tokens, mask, images, bos_token_id=bos)
        if spans is None or isinstance(spans, Mapping):
            spans = [spans] * len(tokens)
        for row, named in zip(rows, one_each("spans", spans, len(tokens)), strict=True):
            for name, positions in (named or {}).items():
                check_span_name(name)
                row[name] = span_positions(name, positions, tokens.device)
        strings = None
        if tokenizer is not None:
            strings = tuple(token_strings(tokenizer, row) for row in tokens.tolist())
        return MultimodalInputs(
            tokens=tokens,
            attention_mask=mask,
            visual=packed,
            spans=rows,
            images=images,
            image_token_id=cfg.image_token_id,
            str_tokens=strings,
            blocks=self._blocks(tokens, mask, ~real if types is None else ~real | (types != 0)),
        )
