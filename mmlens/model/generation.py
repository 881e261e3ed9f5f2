"""Autoregressive generation, with or without a cache of keys and values.

Two kinds of input have defaults of their own. Text, lists of texts, token ids and embeddings are
what TransformerLens takes, and `generate` does with them what it does there: it draws tokens, and
returns the input with its continuation. `MultimodalInputs` are continued as transformers does it:
as the checkpoint's generation_config.json says, or else greedily; and the new text is returned. A
batch of one of transformers' processors (`generate(**batch)`) is continued in the same way, and its
ids are returned with the new ones, as transformers returns them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import GenerationConfig
from transformers.generation import GenerateDecoderOnlyOutput

from mmlens.config import MultimodalConfig
from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.model.continuation import Continuation, Prompt
from mmlens.model.decoding import Decoding, check_options, decoding, settled
from mmlens.model.hooked_root_module import Intervening, exclusively
from mmlens.model.input_methods import batch_arguments
from mmlens.model.run_positions import computing
from mmlens.model.stream import check_stream
from mmlens.utils.threads import on_free_cores
from mmlens.utils.transformers_arguments import take_transformers_arguments

Input = MultimodalInputs | Tensor | str | list[str]
ReturnType = Literal["input", "str", "tokens", "embeds"]

MAX_NEW_TOKENS = 16
"""How many tokens `generate` adds where nobody says it."""


class GenerationMethods(nn.Module):
    """What a model can say."""

    cfg: MultimodalConfig
    tokenizer: Any
    generation_config: GenerationConfig
    """The checkpoint's generation_config.json, in transformers' class. The end tokens are in
    `cfg.eos_token_ids`; what is set here wins over them."""
    to_inputs: Callable[..., MultimodalInputs]
    run_with_cache: Callable[..., Any]

    @exclusively
    @on_free_cores
    def generate(
        self,
        input: Input = "",
        max_new_tokens: int | None = None,
        stop_at_eos: bool = True,
        eos_token_id: int | Sequence[int] | None = None,
        do_sample: bool | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        temperature: float | None = None,
        freq_penalty: float = 0.0,
        repetition_penalty: float | None = None,
        use_past_kv_cache: bool = True,
        prepend_bos: bool | None = None,
        padding_side: Literal["left", "right"] | None = None,
        return_type: ReturnType = "input",
        verbose: bool = False,
        output_logits: bool = False,
        return_cache: bool = False,
        return_input_tokens: bool = False,
        names_filter: Any = None,
        device: torch.device | str | None = None,
        interventions: Sequence[Intervening] = (),
        **options: Any,
    ) -> Any:
        """Continue the input, token by token, until every row has ended.

        Hooks act in every step; positions of interventions are those of the whole text, padding
        included, and `positions="generated"` is every position after the input's.

        Args:
            input: what `prepare` returns; or, as in TransformerLens, a text, a list of texts,
                token ids, or embeddings [batch, pos, d_model].
            max_new_tokens: the most tokens added to each row; by default what
                generation_config.json says, or else 16. A text ends, with a warning, where it is as
                long as the model was made for.
            stop_at_eos: whether a row ends at an end token.
            eos_token_id: the end tokens, one or several; by default `cfg.eos_token_ids`.
            do_sample: draw tokens, or take the most probable ones. By default True where a setting
                is given that matters only then (`temperature`, `top_k`, `top_p`, ...); else what
                generation_config.json says; else False for `MultimodalInputs` and for transformers'
                batches, and True for the inputs of TransformerLens.
            top_k: draw from the k most probable tokens; 0 for all. By default what
                generation_config.json says; else transformers' default (50) for `MultimodalInputs`
                and transformers' batches, and all for the inputs of TransformerLens.
            top_p: draw from the most probable tokens that together have this probability.
            temperature: what logits are divided by before drawing; 0 takes the most probable token.
            freq_penalty: what is taken off a token's logit for each time that the row holds it;
                where tokens are drawn.
            repetition_penalty: what the logits of tokens that the row holds are divided by (or
                multiplied, where they are negative).
            use_past_kv_cache: compute each position once. Without it every step runs the model on
                everything so far, images included. The result is the same, unless a hook lets
                positions attend to later ones.
            prepend_bos: of text, as in `to_tokens`.
            padding_side: where token ids may have padding, as in `to_inputs`. Rows are continued at
                their ends, so texts are padded on the left, and ids must be.
            return_type: "input" is the type of the input: text, ids or embeddings that begin with
                it; the new text for `MultimodalInputs`. "str" is text, which begins with the input
                where that was text or ids; one row comes without a list. "tokens" are ids [batch,
                pos + new], the new ones alone after embeddings; padding fills the rows that have
                ended. "embeds" is [batch, pos + new, d_model].
            verbose: show a progress bar.
            output_logits: return transformers' `GenerateDecoderOnlyOutput` with `sequences`, the
                tokens, and `logits`, a float32 [batch, d_vocab] for each step.
            return_cache: return also the `ActivationCache` of a run on all tokens in the end, with
                `names_filter` and `device` as in `run_with_cache`.
            return_input_tokens: return also the input's ids, at last.
            interventions: what to change in every step, and where: a list of `Intervention`s.
            options: what else transformers' processor returns, so that `generate(**batch)` works:
                `input_ids` for `input`, `pixel_values`, `attention_mask`, `image_sizes`, ...;
                `stopping_criteria`, one of transformers' or several; and the settings of
                transformers' `GenerationConfig`: `min_p`, `no_repeat_ngram_size`, `stop_strings`,
                `suppress_tokens`, ... They win over generation_config.json. transformers' other
                arguments are taken where they ask for nothing, `use_cache` as `use_past_kv_cache`.

        Raises:
            TypeError: an option that does not exist, or both `input` and `input_ids`.
            NotImplementedError: an argument of transformers that is refused, and what to use.
            ValueError: a value that cannot be, a setting that needs another way of decoding (such
                as `num_beams`), or something to return that the input does not have.

        Example:
            >>> model.generate(model.prepare("What is this?", "flag.png"), 8)
            >>> model.generate("The capital of Italy is", 8, temperature=0.7)
            >>> model.generate(**batch, max_new_tokens=8)  # of transformers' processor
            >>> steer = Intervention("resid_post", 12, "generated", add(direction))
            >>> model.generate(inputs, 32, interventions=[steer])
        """
        continuation = self._continuation(
            self.generate,
            input,
            "tokens" if output_logits else return_type,
            max_new_tokens=max_new_tokens,
            stop_at_eos=stop_at_eos,
            eos_token_id=eos_token_id,
            do_sample=do_sample,
            top_k=top_k,
            top_p=top_p,
            temperature=temperature,
            freq_penalty=freq_penalty,
            repetition_penalty=repetition_penalty,
            use_past_kv_cache=use_past_kv_cache,
            prepend_bos=prepend_bos,
            padding_side=padding_side,
            interventions=interventions,
            **options,
        )
        if return_cache and continuation.prompt.inputs is None:
            raise ValueError("return_cache=True needs tokens to run on, and got embeddings")
        n, logits = continuation.how.max_new_tokens, []
        for step in tqdm(continuation, "generating", n, leave=False, disable=not verbose):
            if output_logits:
                logits.append(step)
        result: Any = continuation.returned()
        if output_logits:
            result = GenerateDecoderOnlyOutput(sequences=result, logits=tuple(logits))
        more: list[Any] = []
        if return_cache:
            grown = continuation.prompt.grown(continuation.new)
            kept = {"names_filter": names_filter, "device": device, "interventions": interventions}
            with computing(prompt=continuation.prompt.n_pos):
                more.append(self.run_with_cache(grown, **kept)[1])
        if return_input_tokens:
            more.append(continuation.prompt.ids)
        return (result, *more) if more else result

    def generate_stream(
        self,
        input: Input = "",
        max_new_tokens: int | None = None,
        max_tokens_per_yield: int = 25,
        *,
        return_type: Literal["input", "str", "tokens"] = "input",
        verbose: bool = False,
        **options: Any,
    ) -> Iterator[Any]:
        """Yield the continuation of the input piece by piece, as it is generated.

        Args:
            max_tokens_per_yield: how many tokens a piece has; an input that is in the first piece
                counts.
            return_type: "tokens" are ids [batch, new], the first piece with the input before them;
                "str" is what the text has grown by since the last piece, a list for a batch.
            options: as in `generate`.

        Raises:
            TypeError, ValueError: as `generate`, when the first piece is asked for.

        Example:
            >>> for piece in model.generate_stream(inputs, 100, max_tokens_per_yield=1):
            ...     print(piece, end="")
        """
        if max_tokens_per_yield < 1:
            raise ValueError(f"max_tokens_per_yield={max_tokens_per_yield}; it is at least 1")
        options["max_new_tokens"] = max_new_tokens
        continuation = self._continuation(self.generate_stream, input, return_type, **options)
        if continuation.return_type == "embeds":
            raise ValueError("generate_stream yields text or tokens; generate returns embeddings")
        n, prompt, sent = continuation.how.max_new_tokens, continuation.prompt, 0
        said = [""] * len(prompt.ids)
        # As in TransformerLens the first piece counts the prompt that is in it.
        waiting = prompt.ids.shape[1] if prompt.type else 0
        for _ in tqdm(continuation, "generating", n, leave=False, disable=not verbose):
            waiting += 1
            if waiting < max_tokens_per_yield and not continuation.done:
                continue
            waiting = 0
            if continuation.return_type == "tokens":
                ids = continuation.returned()
                yield ids[:, sent:]
                sent = ids.shape[1]
                continue
            texts = continuation.texts()
            if not continuation.done:  # the bytes of a character may lie in several tokens
                texts = [text.rstrip("\N{REPLACEMENT CHARACTER}") for text in texts]
            pieces = [new[len(old) :] for old, new in zip(said, texts, strict=True)]
            said = texts
            yield pieces if len(pieces) > 1 else pieces[0]

    def _continuation(
        self,
        caller: Callable[..., Any],
        input: Input,
        return_type: ReturnType,
        *,
        stop_at_eos: bool = True,
        eos_token_id: int | Sequence[int] | None = None,
        freq_penalty: float = 0.0,
        use_past_kv_cache: bool = True,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        stopping_criteria: Any = None,
        interventions: Sequence[Intervening] = (),
        **settings: Any,
    ) -> Continuation:
        """Return the continuation of an input, not yet begun; arguments as in `caller`."""
        is_batch = "input_ids" in settings
        no_input = is_batch and isinstance(input, str) and not input
        input, visual = batch_arguments(None if no_input else input, settings)
        take_transformers_arguments("generate", settings)
        if settings.pop("use_cache", None) is False:  # the same in transformers' words
            use_past_kv_cache = False
        known = (
            inspect.signature(caller).parameters | inspect.signature(self._continuation).parameters
        )
        check_options(caller.__name__, settings, known)
        options = {"prepend_bos": prepend_bos, "padding_side": padding_side}
        prompt = self._prompt(input, pixel_values, attention_mask, **options, **visual)
        if return_type not in ("input", "str", "tokens", "embeds"):
            raise ValueError(
                f"return_type={return_type!r}; it is 'input', 'str', 'tokens' or 'embeds'"
            )
        if return_type == "input":
            return_type = prompt.type or "str"
        if freq_penalty and settings.get("do_sample") is None:
            settings["do_sample"] = True  # it acts only then
        defaults = {"do_sample": True, "top_k": 0} if prompt.type and not is_batch else {}
        ends = self._ends() if eos_token_id is None else eos_token_id
        if isinstance(ends, Sequence):
            ends = list(ends)
        how = self._decoding(
            prompt.ids,
            prompt.attention_mask,
            settings | {"eos_token_id": ends if stop_at_eos else None},
            defaults,
            freq_penalty=freq_penalty,
            stopping_criteria=stopping_criteria,
        )
        if return_type == "str" and self.tokenizer is None:
            raise ValueError("this model has no tokenizer to make text with: return_type='tokens'")
        return Continuation(self, prompt, how, return_type, use_past_kv_cache, interventions)

    def greedy_decoding(self, inputs: MultimodalInputs) -> Decoding:
        """Return how `generate(inputs, do_sample=False)` chooses tokens."""
        settings: dict[str, Any] = {
            "do_sample": False,
            "num_beams": 1,
            "max_new_tokens": self.cfg.n_ctx,
        }
        settings |= {"eos_token_id": self._ends()}
        return self._decoding(inputs.tokens, inputs.attention_mask, settings)

    def _decoding(
        self,
        ids: Int[Tensor, "row n_ids"],
        attention_mask: Bool[Tensor, "row pos"],
        settings: dict[str, Any],
        defaults: dict[str, Any] | None = None,
        **more: Any,
    ) -> Decoding:
        """Return how to choose tokens: the caller's settings, the checkpoint's, the defaults."""
        config, defaults = self.generation_config, dict(defaults or {})
        sizes = (config.max_length, config.max_new_tokens, settings.get("max_length"))
        if all(size is None for size in sizes):
            defaults["max_new_tokens"] = MAX_NEW_TOKENS
        return decoding(
            settled(config, settings, defaults),
            ids,
            attention_mask,
            d_vocab=self.cfg.d_vocab,
            n_ctx=self.cfg.n_ctx,
            never=self.cfg.image_token_id,
            tokenizer=self.tokenizer,
            **more,
        )

    def _ends(self) -> list[int] | None:
        """Return the end tokens of the model."""
        ends = self.generation_config.eos_token_id
        if ends is None:
            return list(self.cfg.eos_token_ids) or None
        return [ends] if isinstance(ends, int) else list(ends)

    def _prompt(
        self,
        input: Input,
        pixel_values: Tensor | None,
        attention_mask: Tensor | None,
        **options: Any,
    ) -> Prompt:
        """Return what is continued; arguments as in `to_inputs`."""
        side = options["padding_side"]
        if side not in (None, "left", "right"):
            raise ValueError(f"padding_side={side!r}; it is 'left' or 'right'")
        if isinstance(input, Tensor) and input.is_floating_point():
            check_stream(input, self.cfg.d_model, "generate")
            return Prompt.of_embeddings(input.to(self.cfg.device), attention_mask)
        inputs = self.to_inputs(input, pixel_values, attention_mask, **options)
        if isinstance(input, MultimodalInputs):
            return Prompt.of(inputs, None)
        return Prompt.of(inputs, "tokens" if isinstance(input, Tensor) else "str")
