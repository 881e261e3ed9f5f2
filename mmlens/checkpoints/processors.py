"""Tokenizer, image processor and chat template of a checkpoint folder, where it has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers
from tokenizers.pre_tokenizers import Metaspace
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

IMAGE_PLACEHOLDER = "<image>"
# As the tokenizers library writes it; SentencePiece (Llama); byte pairs (Phi).
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, or None if it has none."""
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        return None
    settings = folder / "tokenizer_config.json"
    if not (folder / "tokenizer.json").exists() and settings.exists():
        # Without that file transformers goes by config.json, of which it may not know the format.
        name = json.loads(settings.read_text()).get("tokenizer_class") or ""
        if hasattr(transformers, name):
            return getattr(transformers, name).from_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def add_image_token(tokenizer: Any) -> int:
    """Make `<image>` one special token, as LLaVA's code treats it, and return its id.

    LLaVA's code tokenises the text between pictures piece by piece (`tokenizer_image_token`), so
    that SentencePiece's mark stands in front of every piece, and not of the first alone.
    """
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_PLACEHOLDER]})
    splitter = getattr(getattr(tokenizer, "backend_tokenizer", None), "pre_tokenizer", None)
    if isinstance(splitter, Metaspace) and splitter.prepend_scheme == "first":
        splitter.prepend_scheme = "always"
    return tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER)


def begins_with_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer itself puts BOS in front of a text."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


def load_image_processor(folder: Path) -> Any:
    """The folder's image processor, or None if it has none."""
    names = ("preprocessor_config.json", "processor_config.json")
    if not any((folder / name).exists() for name in names):
        return None
    return AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)


def chat_template(folder: Path, with_image: bool) -> str | None:
    """The folder's chat template as a plain string with "{question}" (and "<image>") in it.

    A chat template is a program; one turn of a user with one picture is all that a prompt needs of
    it, so it is run once, on a placeholder. None if the folder has no chat template.
    """
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        return None
    loader = AutoProcessor if (folder / "processor_config.json").exists() else AutoTokenizer
    processor = loader.from_pretrained(folder, trust_remote_code=False)
    if not getattr(processor, "chat_template", None):
        return None
    content: Any = "{question}"
    if with_image:
        content = [{"type": "image"}, {"type": "text", "text": "{question}"}]
    turn = [{"role": "user", "content": content}]
    return processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
