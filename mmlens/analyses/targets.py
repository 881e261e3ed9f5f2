"""Answers: the tokens whose probability an analysis follows, and where they are predicted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmlens.branching.recording import Recording
from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.inputs.spans import encode, tokens_of_replacement
from mmlens.interventions.intervention import SiteLayers
from mmlens.model.components.norm import float32_or_wider
from mmlens.utils.divergence import divergence

if TYPE_CHECKING:
    from mmlens.model.transformer import HookedMultimodalTransformer


@dataclass(frozen=True)
class Answer:
    """The tokens whose probability is followed, and where they are predicted."""

    tokens: Int[Tensor, " _"]
    text: str
    positions: Int[Tensor, " _"]

    def probability(self, logits: Float[Tensor, "row n d_vocab"]) -> Float[Tensor, " row"]:
        """The joint probability of the answer's tokens."""
        return self.log_probability(logits).exp()

    def log_probability(self, logits: Float[Tensor, "row n d_vocab"]) -> Float[Tensor, " row"]:
        """Its logarithm, in float32 or wider."""
        log_probs = float32_or_wider(logits).log_softmax(dim=-1)
        index = self.tokens.to(logits.device)[None, :, None].expand(len(logits), -1, 1)
        return log_probs.gather(-1, index).sum(dim=(1, 2))


@dataclass(frozen=True, eq=False)
class Measure:
    """What is read from a run's logits at the answer's positions: up to three numbers for each row.

    A metric, by default the answer's probability; its logit minus that of `contrast` (first
    tokens); and the KL divergence of the next-token distribution from that of another run.
    """

    answer: Answer
    contrast: Answer | None = None
    clean: Float[Tensor, "_ d_vocab"] | None = None
    """Logits of the other run, at the last token of the prompt: one row, or one per row."""
    metric: Callable[[Float[Tensor, "row n d_vocab"]], Float[Tensor, " row"]] | None = None

    def __call__(self, logits: Float[Tensor, "row n d_vocab"]) -> Float[Tensor, "row measure"]:
        """[row, measure]"""
        metric = self.answer.probability if self.metric is None else self.metric
        found = [metric(logits)]
        if self.contrast is not None:
            found.append(self.logit_difference(logits))
        if self.clean is not None:
            found.append(self.kl(logits))
        return torch.stack(found, dim=-1)

    def logit_difference(self, logits: Float[Tensor, "row n d_vocab"]) -> Float[Tensor, " row"]:
        """The logit of the answer's first token minus that of the contrast's."""
        assert self.contrast is not None
        first = float32_or_wider(logits[:, 0])
        return first[:, self.answer.tokens[0]] - first[:, self.contrast.tokens[0]]

    def kl(self, logits: Float[Tensor, "row n d_vocab"]) -> Float[Tensor, " row"]:
        """The divergence from the other run, in nats; its rows over and over, branch by branch."""
        assert self.clean is not None
        first = float32_or_wider(logits[:, 0])
        expected = self.clean.to(first).log_softmax(dim=-1)
        if len(expected) > 1:
            expected = expected.repeat(len(first) // len(expected), 1)
        return divergence(expected, first.log_softmax(dim=-1))

    def named(self, values: Float[Tensor, "*cell measure"]) -> dict[str, Tensor]:
        """The numbers by name."""
        names = ["metric"]
        names += ["logit_difference"] * (self.contrast is not None)
        names += ["kl"] * (self.clean is not None)
        return dict(zip(names, values.unbind(dim=-1), strict=True))


def record_with_answer(
    model: HookedMultimodalTransformer,
    inputs: MultimodalInputs,
    answer: str | int | None,
    sites: Sequence[SiteLayers] = (),
    earlier: Sequence[Recording] = (),
) -> tuple[Recording, Answer]:
    """Return the prompt's run with the answer's tokens after it, and the answer.

    Without an answer it is the run's own most probable next token; over samples of noise, by the
    mean. Activations of `sites` are kept; `earlier` are recordings that the prompt may begin like.
    """
    given = None if answer is None else given_answer(model, inputs, answer)
    longer = inputs if given is None else with_answer(inputs, given)
    [recording] = Recording.of_all(model, [longer], sites, earlier)
    if given is None:
        probability = float32_or_wider(recording.logits()[:, 0]).softmax(dim=-1).mean(dim=0)
        given = make_answer(model, [int(probability.argmax())], inputs.n_pos - 1)
    return recording, given


def given_answer(
    model: HookedMultimodalTransformer, clean: MultimodalInputs, answer: str | int
) -> Answer:
    """The tokens of an answer; a text as it would follow the prompt, after a space.

    Raises:
        ValueError: no token id; a text without a tokenizer, or one that is other tokens after
            other prompts of a batch (a prompt may end with a space).
    """
    last = clean.n_pos - 1
    if not isinstance(answer, str):
        if not 0 <= answer < model.cfg.d_vocab:
            raise ValueError(f"answer={answer}; token ids are 0 ... {model.cfg.d_vocab - 1}")
        return make_answer(model, [int(answer)], last)
    if model.tokenizer is None:
        raise ValueError(f"answer={answer!r}, but the model has no tokenizer: give a token id")
    prompts = clean.texts or ("",)
    ids, *others = [tokens_behind(model.tokenizer, prompt, answer) for prompt in prompts]
    for prompt, other in zip(prompts[1:], others, strict=True):
        if other != ids:
            raise ValueError(
                f"{answer!r} is the tokens {ids} after {prompts[0][-20:]!r}, and {other} after "
                f"{prompt[-20:]!r}: give a token id, or prompts that end alike"
            )
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
