"""Tokenizer, image processor and chat template of a checkpoint folder, where it has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

IMAGE_PLACEHOLDER = "<image>"


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, or None if it has none."""
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        return None
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


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
