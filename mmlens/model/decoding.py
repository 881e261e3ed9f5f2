"""How the next token is chosen: transformers' generation settings, processors and criteria.

    generation_config.json -> GenerationConfig <- arguments of `generate`
                                     |
                          Decoding: logits -> next token

Settings, their checks and what becomes of them (repetition penalties, top-k, end tokens ...) are
transformers' own: its `generate` prepares everything, and hands over where its loop would begin.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedConfig,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation import GenerationMixin

from mmlens.utils.grad_mode import gradients

Tokens = Int[Tensor, "row pos"]
Logits = Float[Tensor, "row d_vocab"]

SAMPLING = "temperature top_k top_p min_p top_h typical_p epsilon_cutoff eta_cutoff".split()
"""Settings that only matter where tokens are drawn: whoever gives one wants them drawn."""

HOW_IT_RUNS = (
    "use_cache cache_implementation cache_config max_cache_len compile_config disable_compile "
    "continuous_batching_config low_memory prefill_chunk_size return_dict_in_generate "
    "output_attentions output_hidden_states output_scores output_logits"
).split()
"""What transformers computes with and returns; it does not change which tokens are chosen."""

OTHER_WAYS: dict[str, Any] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "constraints": None,
    "force_words_ids": None,
    "penalty_alpha": 0.0,
    "dola_layers": None,
    "guidance_scale": 1.0,
    "token_healing": False,
    "prompt_lookup_num_tokens": None,
    "assistant_early_exit": None,
    "speculation_type": None,
    "use_mtp": False,
}
"""Settings that another loop than "one token for each row, then the next" would honour, with the
value that switches them off."""

FLOATS = (
    "temperature top_p min_p top_h typical_p repetition_penalty encoder_repetition_penalty".split()
)


def setting_names() -> set[str]:
    """Return the names of transformers' settings that decide which tokens are chosen."""
    names = vars(GenerationConfig()).keys() - set(HOW_IT_RUNS) - {"transformers_version"}
    return {name for name in names if not name.startswith("_")}


def check_options(function: str, given: Iterable[str], arguments: Iterable[str]) -> None:
    """Raise a TypeError that names an option that there is not.

    Args:
        function: what it was given to.
        given: the names of options beyond the arguments that the function declares.
        arguments: the names of those.
    """
    settings = setting_names()
    for name in given:
        if name not in settings:
            near = difflib.get_close_matches(name, sorted(settings.union(arguments)), n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise TypeError(
                f"{function} has no option {name!r}{hint} (it takes its arguments, and the "
                "settings of transformers' GenerationConfig)"
            )


def settled(
    checkpoint: GenerationConfig, given: Mapping[str, Any], defaults: Mapping[str, Any]
) -> GenerationConfig:
    """Return the settings of the caller, else the checkpoint's, else the defaults.

    Args:
        given: by transformers' names; None leaves the choice to the checkpoint. The end tokens are
            always the caller's.
        defaults: what neither has, `do_sample` first; where they say nothing, transformers' own
            defaults hold. Settings of sampling are left out where the most probable token is taken,
            unless they are the caller's: transformers warns of them.

    Raises:
        ValueError: values that cannot be, or settings that need another way of decoding.
    """
    config = copy.deepcopy(checkpoint)
    wanted = {name: value for name, value in given.items() if value is not None}
    check_values(wanted)
    if wanted.get("temperature") == 0:  # the limit: always the most probable token
        wanted |= {"do_sample": False, "temperature": None}
    elif any(name in wanted for name in SAMPLING):
        wanted.setdefault("do_sample", True)
    if wanted.get("max_new_tokens") is not None:
        config.max_length = None  # else transformers warns that both are set
    for name, value in {"eos_token_id": None, **wanted}.items():
        setattr(config, name, value)
    complete(config, wanted, defaults)
    for name in FLOATS:
        value = getattr(config, name, None)
        if isinstance(value, int):  # transformers takes 2.0 and refuses 2
            setattr(config, name, float(value))
    for name, off in OTHER_WAYS.items():
        value = getattr(config, name, None)
        if value is not None and value != off:
            without = f"generate(..., {name}={off!r})"
            if off is None:  # as an argument it leaves the choice to the checkpoint
                without = f"model.generation_config.{name} = None"
            raise ValueError(
                f"{name}={value!r} (an argument, or of the checkpoint's generation_config.json): "
                "generate chooses one token for each row, and then the next, which cannot honour "
                f"it. transformers can; to go without it: {without}"
            )
    return config


def complete(
    config: GenerationConfig, wanted: Mapping[str, Any], defaults: Mapping[str, Any]
) -> None:
    """Fill a configuration with defaults, and leave out what has no use in it."""
    for name, value in defaults.items():
        if getattr(config, name) is None:
            setattr(config, name, value)
    if not config.do_sample:
        for name in set(SAMPLING) - wanted.keys():
            setattr(config, name, None)


def check_values(given: Mapping[str, Any]) -> None:
    """Raise a ValueError for values that no setting can have."""
    n = given.get("max_new_tokens")
    if n is not None and (isinstance(n, bool) or not isinstance(n, int) or n < 0):
        raise ValueError(f"max_new_tokens={n!r}; it is a number of tokens: 0, 1, ...")
    temperature = given.get("temperature", 1.0)
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature={temperature}; it must be positive, or 0 for greedy choice")
    top_p = given.get("top_p", 1.0)
    if not 0 <= top_p <= 1:
        raise ValueError(f"top_p={top_p}; it is a probability, and 1.0 switches it off")
    top_k = given.get("top_k", 0)
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 0:
        raise ValueError(f"top_k={top_k!r}; it is a number of tokens, and 0 switches it off")


@dataclass(frozen=True)
class Decoding:
    """How the tokens of one call of `generate` are chosen, and when it ends."""

    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    do_sample: bool
    max_new_tokens: int
    ends: list[int]
    """The end tokens."""
    pad_token_id: int
    """What fills rows that have ended."""
    never: int | None
    """A token that is never chosen: the placeholder of images, which is no text."""

    def choose(self, ids: Tokens, logits: Logits) -> Int[Tensor, " row"]:
        """Return the next token of every row.

        Args:
            ids: all tokens so far.
            logits: float32, as transformers processes them.
        """
        n_tokens = logits.shape[1]
        scores = pad(logits, (0, 1), value=-torch.inf)  # a copy, with the column of `within`
        if self.never is not None:
            ids = within(ids, n_tokens, self.never)
            scores[:, min(self.never, n_tokens)] = -torch.inf
        scores = self.processors(ids, scores)[:, :n_tokens]
        if not self.do_sample:
            return scores.argmax(dim=-1)
        return torch.multinomial(scores.softmax(dim=-1), 1)[:, 0]


def within(ids: Tokens, d_vocab: int, placeholder: int) -> Tokens:
    """Return ids with `d_vocab` in the place of a placeholder outside of the vocabulary.

    Processors look up every token of the prompt. A checkpoint may give the placeholder any number,
    and a row of scores has one more column for it, not as many as it says.
    """
    return ids if placeholder < d_vocab else ids.where(ids != placeholder, d_vocab)


def decoding(
    config: GenerationConfig,
    ids: Int[Tensor, "row n_ids"],
    attention_mask: Bool[Tensor, "row pos"],
    *,
    d_vocab: int,
    n_ctx: int,
    never: int | None = None,
    tokenizer: Any = None,
    freq_penalty: float = 0.0,
    stopping_criteria: Any = None,
) -> Decoding:
    """Return how to choose tokens under a configuration, for prompts of these tokens.

    Args:
        ids: no tokens where the prompts are embeddings; the mask is that of the positions.

    Raises:
        ValueError: settings that transformers refuses; stop strings without a tokenizer.
    """
    config = copy.deepcopy(config)
    if never is not None:
        ids = within(ids, d_vocab, never)
    if not ids.shape[1]:  # one row, whose last token transformers does not read
        ids, attention_mask = ids[:1], torch.ones_like(attention_mask[:1, :1])
    processors, criteria = LogitsProcessorList(), StoppingCriteriaList()
    if freq_penalty < 0:
        raise ValueError(f"freq_penalty={freq_penalty}; it must not be negative")
    if freq_penalty and config.do_sample:
        n_padding = (~attention_mask).sum(dim=1)
        # TransformerLens takes it off after the division by the temperature, which is yet to come.
        scale = 1.0 if config.temperature is None else config.temperature
        processors.append(FrequencyPenalty(freq_penalty * scale, n_padding))
    if config.stop_strings is not None:
        if tokenizer is None:
            raise ValueError("stop_strings need the model's tokenizer, and it has none")
        criteria.append(StopStringCriteria(tokenizer, config.stop_strings))
        config.stop_strings = None  # transformers' own preparation would want the tokenizer
    if stopping_criteria is not None:
        several = isinstance(stopping_criteria, list)  # a StoppingCriteriaList is one
        criteria.extend(stopping_criteria if several else [stopping_criteria])
    n_new = config.max_new_tokens
    config.max_new_tokens = n_new or (1 if n_new == 0 else None)  # transformers refuses 0
    with gradients(False):  # transformers' own switch can be interrupted, and leaves them off
        prepared = _Prepares(config, d_vocab, n_ctx, ids.device).generate(
            ids,
            attention_mask=attention_mask.long(),
            custom_generate=_hand_over,
            use_cache=False,
            logits_processor=processors,
            stopping_criteria=criteria,
        )
    ends = prepared.config.eos_token_id
    ends = [ends] if isinstance(ends, int) else list(ends or ())
    filler = prepared.config.pad_token_id
    if filler is None:
        filler = ends[0] if ends else 0
    return Decoding(
        processors=prepared.processors,
        criteria=prepared.criteria,
        do_sample=bool(prepared.config.do_sample),
        max_new_tokens=prepared.config.max_length - ids.shape[1] if n_new != 0 else 0,
        ends=ends,
        pad_token_id=filler,
        never=never,
    )


@dataclass(frozen=True)
class _Prepared:
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    config: GenerationConfig


def _hand_over(
    model: Any,
    input_ids: Any,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    **rest: Any,
) -> _Prepared:
    """Stand where transformers' decoding loop would, and return what it was to use."""
    return _Prepared(logits_processor, stopping_criteria, generation_config)


class _Prepares(GenerationMixin):
    """What transformers' `generate` asks of a model before it runs it."""

    main_input_name = "input_ids"
    _is_stateful = False

    def __init__(
        self, config: GenerationConfig, d_vocab: int, n_ctx: int, device: torch.device
    ) -> None:
        self.config = PreTrainedConfig(vocab_size=d_vocab, max_position_embeddings=n_ctx)
        self.generation_config = config
        self.device = device

    def forward(self, input_ids: Any, attention_mask: Any = None) -> None:
        """Declare the inputs; it is never called."""


class FrequencyPenalty(LogitsProcessor):
    """Take a penalty off each token's logit for each time that the row holds it already."""

    def __init__(self, penalty: float, n_padding: Int[Tensor, " row"]) -> None:
        self.penalty, self.n_padding = penalty, n_padding

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores less the penalties."""
        at = torch.arange(input_ids.shape[1], device=input_ids.device)
        real = (at >= self.n_padding.to(at.device)[:, None]).to(scores)
        counts = torch.zeros_like(scores).scatter_add_(1, input_ids, real)
        return scores - self.penalty * counts
