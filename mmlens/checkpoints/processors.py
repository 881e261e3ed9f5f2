"""Tokenizer, image processor and chat template of a checkpoint folder, where it has them."""

from __future__ import annotations

import json
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import transformers
from tokenizers import AddedToken
from tokenizers.pre_tokenizers import Metaspace
from transformers import AutoImageProcessor, AutoTokenizer, ProcessorMixin

from mmlens.checkpoints.chat_templates import TemplateError, render
from mmlens.checkpoints.json_files import check_folder, check_growth, read_json
from mmlens.checkpoints.paths import checkpoint_errors
from mmlens.inputs.templates import QUESTION, ChatTemplate

IMAGE_PLACEHOLDER = "<image>"
PROBE = f'{QUESTION} "it\'s" \\ <é>\n{QUESTION}'
"""A question that JSON, Python and HTML would write otherwise."""
# As the tokenizers library writes it; SentencePiece (Llama); byte pairs (Phi).
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def load_tokenizer(folder: Path) -> Any:
    """Return the folder's tokenizer, or None if it has none.

    It pads on the left unless its files name a side: what a decoder says next is then at the last
    position of every row.
    """
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        return None
    check_folder(folder)
    return pads_left(_read_tokenizer(folder))


def pads_left(tokenizer: Any) -> Any:
    """Return the tokenizer, which now pads on the left unless its files name a side."""
    if "padding_side" not in tokenizer.init_kwargs:
        tokenizer.padding_side = "left"
    return tokenizer


def _read_tokenizer(folder: Path) -> Any:
    if (folder / "tokenizer.json").exists():
        check_growth(folder / "tokenizer.json", folder)
    settings = folder / "tokenizer_config.json"
    loader: Any = AutoTokenizer
    if not (folder / "tokenizer.json").exists() and settings.exists():
        # Without that file transformers goes by config.json, of which it may not know the format.
        name = read_json(settings, folder).get("tokenizer_class") or ""
        loader = getattr(transformers, name, AutoTokenizer)
    with checkpoint_errors(folder, "its tokenizer cannot be read: "):
        return loader.from_pretrained(folder, trust_remote_code=False)


def add_image_token(tokenizer: Any) -> int:
    """Make `<image>` one special token, as LLaVA's code treats it, and return its id.

    LLaVA's code tokenises the text between images piece by piece (`tokenizer_image_token`), so
    that SentencePiece's mark stands in front of every piece, and not of the first alone.
    """
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_PLACEHOLDER]})
    splitter = getattr(getattr(tokenizer, "backend_tokenizer", None), "pre_tokenizer", None)
    if isinstance(splitter, Metaspace) and splitter.prepend_scheme == "first":
        splitter.prepend_scheme = "always"
    return tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER)


def learn_placeholder(tokenizer: Any) -> None:
    """Let a tokenizer take `<image>` for one special token, whose id is only looked for."""
    word = AddedToken(IMAGE_PLACEHOLDER, normalized=False, special=True)
    tokenizer.add_tokens([word], special_tokens=True)


def load_image_processor(folder: Path) -> Any:
    """Return the folder's image processor, or None if it has none."""
    names = ("preprocessor_config.json", "processor_config.json")
    if not any((folder / name).exists() for name in names):
        return None
    check_folder(folder)
    with checkpoint_errors(folder, "its image processor cannot be read: "):
        processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
    if getattr(processor, "do_pan_and_scan", False):
        # Gemma 3's processor in transformers calls it without crops, whatever the files say.
        processor.do_pan_and_scan = False
    return processor


def chat_template(
    folder: Path, tokenizer: Any, with_images: bool, placeholder: str = IMAGE_PLACEHOLDER
) -> ChatTemplate | None:
    """Return the folder's chat template for one turn of a user, or None if it has none.

    A template takes a message's content as a string, as a list of typed parts (`{"type": "image"}`,
    `{"type": "text", "text": ...}`), or either; both are tried, and the first that the question and
    the images come through is taken. In a string, `<image>` and a line break stand for an image, as
    in LLaVA's own prompts.

    Args:
        with_images: whether the model sees any.
        placeholder: what the template writes for an image; `<image>` stands there in the result.
    """
    source = _template_source(folder, tokenizer, with_images)
    return written_out(source, tokenizer, with_images, folder, placeholder)


def written_out(
    source: str | None,
    tokenizer: Any,
    with_images: bool,
    where: Path,
    placeholder: str = IMAGE_PLACEHOLDER,
) -> ChatTemplate | None:
    """Return a chat template's source for one turn of a user; see `chat_template`."""
    if source is None:
        return None
    n_images = int(with_images)
    special_tokens = tokenizer.special_tokens_map
    reason = "the question does not appear in it"
    # Whether the content has parts, and how many `<image>` it must lead to.
    forms = [(True, 1), (False, 1), (True, 0)] if with_images else [(False, 0), (True, 0)]
    for typed, n_expected in forms:
        turn = partial(render_turn, source, special_tokens, str(where), typed, placeholder)
        asked = (QUESTION, f" {QUESTION} ", PROBE)
        try:
            prompt, spaced, probed = (turn(n_images, question) for question in asked)
        except TemplateError as error:
            reason = str(error)
            continue
        found = prompt.count(QUESTION), prompt.count(IMAGE_PLACEHOLDER)
        if found[0] == 1 and probed != prompt.replace(QUESTION, PROBE):
            reason = "it changes the question's characters"
        elif found == (1, n_expected) and spaced.count(QUESTION) == 1 and not _shows_parts(prompt):
            ends = zip(prompt.split(QUESTION), spaced.split(QUESTION), strict=True)
            left, right = (plain == wider for plain, wider in ends)
            return ChatTemplate.of(
                turn, n_images, adds_special_tokens=with_images, strips=(left, right)
            )
    warnings.warn(
        f"the chat template of {where} cannot be used ({reason.splitlines()[0]}): prompts are "
        f"taken as they are, unless you give template= to `prepare`",
        stacklevel=2,
    )
    return None


def _template_source(folder: Path, tokenizer: Any, with_images: bool) -> str | None:
    """The Jinja source; a processor's before the tokenizer's, where the model sees images."""
    found = None
    if with_images and any(
        (folder / name).exists() for name in ("processor_config.json", "chat_template.json")
    ):
        check_folder(folder)
        with checkpoint_errors(folder, "its processor cannot be read: "):
            # Its settings alone: making it may need a package that images do not (SmolVLM).
            settings, _ = ProcessorMixin.get_processor_dict(folder)
        found = settings.get("chat_template")
    return default_template(found or getattr(tokenizer, "chat_template", None))


def default_template(found: Any) -> str | None:
    """Return the one of several chat templates that is called so, or the only one."""
    return found.get("default") if isinstance(found, dict) else found


def render_turn(
    source: str,
    special_tokens: dict[str, Any],
    where: str,
    typed: bool,
    placeholder: str,
    n_images: int,
    text: str = QUESTION,
) -> str:
    """Return a user's turn, and the beginning of the answer, as a chat template writes them.

    Args:
        typed: whether the content is a list of parts; else it is one string.
        placeholder: what the template writes for an image, in whose place `<image>` is returned.
        n_images: how many images stand before the text.
    """
    content: Any = f"{IMAGE_PLACEHOLDER}\n" * n_images + text
    if typed:
        content = [*[{"type": "image"}] * n_images, {"type": "text", "text": text}]
    turn = [{"role": "user", "content": content}]
    return render(source, turn, special_tokens, where).replace(placeholder, IMAGE_PLACEHOLDER)


def _shows_parts(prompt: str) -> bool:
    """Whether a part of the content was written out as Python or JSON."""
    part = {"type": "text", "text": QUESTION}
    return str(part) in prompt or json.dumps(part) in prompt
