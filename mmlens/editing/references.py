"""References: prompts whose answers an edit must leave as they are.

    edit = multedit(model, inputs, "Rome")                           # mmlens' own references
    edit = multedit(model, inputs, "Rome", references="my-photos")   # a folder of images
    edit.check()                                                     # asks those that were not kept

References are some images and some questions. Around one request they are prompts of four kinds:
its question about the other images, other questions about its image, other questions about other
images, and texts without an image. Of every three images (questions, texts) two are kept, and the
third is held out: no edit is told of it, and `Edit.check` asks it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from mmlens.data import VisualQuestion
from mmlens.data.edits import SAME_IMAGE, SAME_QUESTION
from mmlens.data.open import open_questions
from mmlens.data.questions import images_in
from mmlens.data.reference_pool import (
    DEMO_QUESTIONS,
    QUESTIONS,
    TEXTS,
    reference_flags,
    reference_photographs,
)
from mmlens.demo import is_embedded
from mmlens.editing.request import EditRequest, begins_with_bos
from mmlens.inputs.images import image_key
from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.inputs.spans import PLACEHOLDER

if TYPE_CHECKING:
    from mmlens.model.transformer import HookedMultimodalTransformer

__all__ = ["KINDS", "Reference", "References"]

UNRELATED, TEXT = "unrelated", "text"
KINDS = (SAME_QUESTION, SAME_IMAGE, UNRELATED, TEXT)
MOST_IMAGES = 96
"""Of which 64 are kept. Each costs one pass of its visual tokens, once per question."""
MOST_QUESTIONS = 30
PER_IMAGE = 4
"""Other questions about each other image."""


@dataclass(frozen=True, eq=False)
class Reference:
    """A prompt whose answer is to stay."""

    kind: str
    """One of `KINDS`."""
    inputs: MultimodalInputs
    question: str
    image: str = ""
    """A name for the image; "" for the request's own, or for none."""


@dataclass(frozen=True)
class References:
    """Images, questions and texts, of which references are made.

    Example:
        >>> References.of("auto", model).kept.around(model, request)
    """

    images: tuple[Any, ...] = ()
    """Paths or PIL images."""
    questions: tuple[str, ...] = ()
    """About any of the images."""
    texts: tuple[str, ...] = ()
    """Prompts without an image."""
    name: str = "references"
    """For metadata and messages."""
    hidden: tuple[str, ...] = ()
    """Questions that are not made about a request's own image."""

    @classmethod
    def of(cls, given: Any, model: HookedMultimodalTransformer) -> References | None:
        """Return references from what an editing method was given.

        Args:
            given: references; "auto" for the images and questions that are shipped (flags for the
                demo model, photographs and some flags for others); a folder of images; a data set
                as `open_questions` names it; a list of questions or of images; None for none.
            model: whose references they will be.

        Raises:
            FileNotFoundError: no such folder or file.
            ValueError: neither images nor questions in what was given.
        """
        if given is None or isinstance(given, References):
            return given
        if isinstance(given, str) and given == "auto":
            return shipped(model)
        if isinstance(given, str | Path):
            folder = Path(given)
            names = images_in(folder) if folder.is_dir() else []
            if names and not (folder / "questions.jsonl").is_file():
                images = tuple(folder / name for name in names)
                return cls(images[:MOST_IMAGES], QUESTIONS, TEXTS, str(given))
            given, name = open_questions(given), str(given)
        else:
            given, name = list(given), "references"
        if not given:
            raise ValueError(f"{name}: no questions and no images, so there are no references")
        if not isinstance(given[0], VisualQuestion):
            return cls(tuple(given)[:MOST_IMAGES], QUESTIONS, TEXTS, name)
        by_image = {question.image_keys(): question.images for question in given}
        single = [each[0] for each in by_image.values() if len(each) == 1]
        questions = dict.fromkeys(question.prompt() for question in given if question.images)
        texts = dict.fromkeys(question.prompt() for question in given if not question.images)
        return cls(
            tuple(single[:MOST_IMAGES]), tuple(questions)[:MOST_QUESTIONS], tuple(texts), name
        )

    @property
    def kept(self) -> References:
        """Those that an edit may be told of: two of three."""
        return self._chosen(lambda index: index % 3 != 2)

    @property
    def held_out(self) -> References:
        """Those that no edit is told of: every third image, question and text."""
        return self._chosen(lambda index: index % 3 == 2)

    def _chosen(self, wanted: Callable[[int], bool]) -> References:
        def some(values: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(value for index, value in enumerate(values) if wanted(index))

        return replace(
            self,
            images=some(self.images),
            questions=some(self.questions),
            texts=some(self.texts),
        )

    def without(
        self, asked: Iterable[VisualQuestion], edited: Sequence[VisualQuestion]
    ) -> References:
        """Return references that hold nothing that is asked about edits.

        Args:
            asked: the questions; their images are left out, and those about an edited image.
            edited: the questions that get new answers.

        Example:
            >>> told = references.without(examination.questions, [case.question])
            >>> multedit(model, request_of(model, case), references=told)
        """
        mine = {question.image_keys() for question in edited}
        others, hidden = set[str](), []
        for question in asked:
            if question.image_keys() in mine:
                hidden.append(question.prompt())
            else:
                others |= {*question.image_keys()}
        images = tuple(image for image in self.images if image_key(image) not in others)
        return replace(self, images=images, hidden=(*self.hidden, *dict.fromkeys(hidden)))

    # Around a request

    def around(
        self,
        model: HookedMultimodalTransformer,
        request: EditRequest,
        kinds: Sequence[str] = KINDS,
    ) -> list[Reference]:
        """Return the references of a request, image by image; none that it is itself about.

        They have what stands around its question, such as a chat template.

        Args:
            model: for its tokenizer and image processor.
            request: whose prompt's text is known.
            kinds: of `KINDS`, those that are wanted.

        Raises:
            ValueError: the prompt's text is not known, or as `model.prepare`.
        """
        inputs = model.to_inputs(request.inputs)
        own = question_of(inputs, model.cfg.image_text)
        others = [question for question in self.questions if question != own]
        found: list[Reference] = []
        if inputs.pixel_values is None:
            found += [Reference(UNRELATED, asked(model, inputs, each), each) for each in others]
        elif SAME_IMAGE in kinds:
            about = [question for question in others if question not in self.hidden]
            found += [Reference(SAME_IMAGE, asked(model, inputs, each), each) for each in about]
        if inputs.pixel_values is not None and {SAME_QUESTION, UNRELATED} & {*kinds}:
            for index, image in enumerate(self.images):
                name = Path(image).stem if isinstance(image, str | Path) else f"image {index}"
                first = asked(model, inputs, own, image)
                if shows_the_same(first, request):
                    continue
                if SAME_QUESTION in kinds:
                    found.append(Reference(SAME_QUESTION, first, own, name))
                if UNRELATED in kinds:
                    # By the image's name: the same for whatever is edited.
                    few = random.Random(name).sample(self.questions, len(self.questions))
                    found += [
                        Reference(UNRELATED, asked(model, inputs, each, image), each, name)
                        for each in few[:PER_IMAGE]
                        if each != own
                    ]
        if TEXT in kinds:
            bos = "bos" in inputs.spans[0]
            found += [
                Reference(TEXT, model.prepare(each, template=None, prepend_bos=bos), each)
                for each in self.texts
            ]
        return found


def shipped(model: HookedMultimodalTransformer) -> References:
    """Return mmlens' own references for a model."""
    photographs, flags = reference_photographs(), reference_flags()
    if is_embedded(model.cfg.model_name):
        return References(flags[:MOST_IMAGES], DEMO_QUESTIONS, TEXTS, "auto")
    mixed = photographs + flags[: len(photographs)]
    return References(mixed, QUESTIONS, TEXTS, "auto")


def question_of(inputs: MultimodalInputs, image_text: str = PLACEHOLDER) -> str:
    """Return the question that a prompt asks, without what stands around it.

    Args:
        inputs: a single prompt.
        image_text: what stands in it for an image, as `MultimodalConfig.image_text`.

    Raises:
        ValueError: the text is not known: inputs from tokens, or words that were swapped.
    """
    if inputs.texts is None:
        raise ValueError(
            "the text of this prompt is not known (inputs from tokens, or words that were "
            "swapped), so no references can be made of it: use model.prepare, or references=None"
        )
    start, end = question_span(inputs, image_text)
    return inputs.texts[0][start:end]


def question_span(inputs: MultimodalInputs, image_text: str) -> tuple[int, int]:
    """Return the question's characters in the prompt's text, which must be known."""
    text = (inputs.texts or ("",))[0]
    spans = inputs.char_spans[0] if inputs.char_spans else {}
    start, end = spans.get("question", (0, len(text)))
    if (last := text.rfind(image_text, start, end)) >= 0:
        start = last + len(image_text)
    return start, end


def asked(
    model: HookedMultimodalTransformer, like: MultimodalInputs, question: str, image: Any = None
) -> MultimodalInputs:
    """Return another prompt of the same form: another question, or another image.

    Args:
        model: for its tokenizer and image processor.
        like: a single prompt whose text is known.
        question: in the place of its question.
        image: in the place of each of its images; None keeps them.

    Raises:
        ValueError: the images are kept, and neither they nor their number of patches is known.
    """
    start, end = question_span(like, model.cfg.image_text)
    text = (like.texts or ("",))[0]
    text = text[:start] + question + text[end:]
    n_images = like.n_images[0]
    images = [image or kept.image or blank() for kept in like.images]
    made = model.prepare(text, images or None, template=None, prepend_bos=begins_with_bos(like))
    if image is not None or not n_images:
        return made
    if any(
        not torch.equal(new.cells, kept.cells)
        for new, kept in zip(made.images, like.images, strict=True)
    ):
        raise ValueError(
            "the prompt does not hold its images as they were given, which other questions about "
            "them need: make it with model.prepare, or give references= without this image"
        )
    images_kept = (
        replace(kept, start=new.start, row=new.row)
        for new, kept in zip(made.images, like.images, strict=True)
    )
    return replace(made, visual=like.visual, images=tuple(images_kept))


def blank() -> Image.Image:
    """Return an image in the place of one whose pixels alone are known."""
    return Image.new("RGB", (8, 8))


def shows_the_same(inputs: MultimodalInputs, request: EditRequest) -> bool:
    """Whether a prompt has the pixels of one that is to get the new answer."""
    return any(
        prompt.pixel_values is not None
        and inputs.pixel_values is not None
        and torch.equal(prompt.pixel_values.to(inputs.device), inputs.pixel_values)
        for prompt in request.prompts
    )
