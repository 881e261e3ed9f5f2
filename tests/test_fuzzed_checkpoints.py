"""Checkpoints with something changed at random: right numbers, or one CheckpointError."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import fuzzing
import llava_code_checkpoints as llava_code
import open_clip_models
import pytest
import torch
from checkpoint_folders import load, to_pickles
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from random_models import SHAPES, random_language_model, random_llava, random_prompts
from tiny_checkpoint import write_tiny_llava

from mmlens.checkpoints import chat_templates
from mmlens.checkpoints.errors import CheckpointError

KINDS = ["llama", "mistral, window", "qwen2, some windows", "phi", "LLaVA", "shards", "pickle"]
EXAMPLES = int(os.environ.get("MMLENS_FUZZED", "1000"))
"""How many folders the slow test changes; `MMLENS_FUZZED=20000` is a night's work."""
quiet = pytest.mark.filterwarnings("ignore")


@cache
def unchanged(kind: str) -> tuple[fuzzing.Files, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """A folder's files, a prompt, and transformers' logits."""
    torch.manual_seed(KINDS.index(kind))  # hypothesis repeats what failed on the same weights
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        hf: Any
        if kind == "LLaVA":
            hf = random_llava(SHAPES["grouped queries"])
            write_tiny_llava(folder)
            for name in ("config.json", "model.safetensors"):
                (folder / name).unlink()
        else:
            hf = random_language_model(SHAPES.get(kind, SHAPES["grouped queries"]))
        hf.save_pretrained(folder, max_shard_size="30KB" if kind == "shards" else "1GB")
        if kind == "pickle":
            to_pickles(folder)
        files = fuzzing.read(folder)
    prompts = random_prompts(hf.config, images=[int(kind == "LLaVA")], words=[6])
    tokens, pixels = prompts.tokens, prompts.pixel_values
    return files, tokens, pixels, fuzzing.logits(hf, tokens, pixels, ours=False)


def try_one(data: st.DataObject, kind: str) -> None:
    files, tokens, pixels, before = unchanged(kind)
    files = fuzzing.changed(data.draw, files)
    with TemporaryDirectory() as scratch:
        event(fuzzing.check(fuzzing.write(files, Path(scratch)), tokens, pixels, before))


@pytest.mark.parametrize("kind", KINDS)
@quiet
def test_unchanged(kind: str, tmp_path: Path) -> None:
    files, tokens, pixels, before = unchanged(kind)
    assert fuzzing.check(fuzzing.write(files, tmp_path), tokens, pixels, before) == "equal"


@given(data=st.data(), kind=st.sampled_from(KINDS))
@settings(max_examples=25, suppress_health_check=list(HealthCheck))
@quiet
def test_changed(data: st.DataObject, kind: str) -> None:
    try_one(data, kind)


@pytest.mark.slow
@given(data=st.data(), kind=st.sampled_from(KINDS))
@settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
@quiet
def test_changed_very_often(data: st.DataObject, kind: str) -> None:
    try_one(data, kind)


# Every message names the file that it is about, or the folder where that may be one of several


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each kind that can be opened."""
    path = tmp_path_factory.mktemp("published")
    write_tiny_llava(path / "HF")
    llava_code.write(path / "LLaVA", llava_code.llava(llava_code.parts("llama", "clip")))
    config = open_clip_models.model_cfg("plain")
    open_clip_models.write(path / "open_clip", open_clip_models.random_clip("plain"), config)
    return path


def setting(file: str, *way: str, **fields: Any) -> Callable[[Path], None]:
    """A change of fields of a JSON file, or of the part of it to which `way` leads."""

    def change(folder: Path) -> None:
        value = part = json.loads((folder / file).read_text())
        for key in way:
            part = part[key]
        part.update(fields)
        (folder / file).write_text(json.dumps(value))

    return change


def text(name: str, content: str) -> Callable[[Path], None]:
    """Another file of that name."""
    return lambda folder: (folder / name).write_text(content) and None


def without(name: str) -> Callable[[Path], None]:
    """A file is gone."""
    return lambda folder: (folder / name).unlink()


def index(**fields: Any) -> Callable[[Path], None]:
    """The weights under another name, and an index."""

    def change(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "w.safetensors")
        (folder / INDEX).write_text(json.dumps(fields))

    return change


CONFIG, INDEX, CLIP = "config.json", "model.safetensors.index.json", "open_clip_config.json"
SETTINGS, PIXELS = "generation_config.json", "preprocessor_config.json"
HUGE = {"height": 9999, "width": 9999}
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
# The kind of folder, what is changed, and the file that is at fault: "" for the folder.
FAULTS: list[tuple[str, Callable[[Path], None], str]] = [
    ("HF", without(CONFIG), ""),
    ("HF", text(CONFIG, "{"), CONFIG),
    ("HF", text(CONFIG, "[]"), CONFIG),
    ("HF", setting(CONFIG, model_type="nonsense"), CONFIG),
    ("HF", setting(CONFIG, quantization_config={"quant_method": "awq"}), CONFIG),
    ("HF", setting(CONFIG, dtype="nonsense"), CONFIG),
    ("HF", setting(CONFIG, "text_config", hidden_size=-1), CONFIG),
    ("HF", setting(CONFIG, "text_config", model_type="gpt2"), CONFIG),
    ("HF", setting(CONFIG, "text_config", hidden_act="nonsense"), CONFIG),
    ("HF", setting(CONFIG, "text_config", intermediate_size=49), ""),
    ("HF", setting(CONFIG, "text_config", num_hidden_layers=999), ""),
    ("HF", setting(CONFIG, "vision_config", model_type="vit"), CONFIG),
    ("HF", setting(CONFIG, vision_feature_select_strategy="nonsense"), CONFIG),
    ("HF", setting(CONFIG, vision_feature_layer=77), CONFIG),
    ("HF", setting(SETTINGS, early_stopping="soon"), SETTINGS),
    ("HF", setting("tokenizer_config.json", tokenizer_class="Trainer"), "tokenizer_config.json"),
    ("HF", text("tokenizer.json", "{}"), ""),
    ("HF", setting(PIXELS, image_processor_type=1), PIXELS),
    ("HF", setting(PIXELS, size=HUGE, crop_size=HUGE), ""),
    ("HF", text("chat_template.jinja", ENDLESS), ""),
    ("HF", text("model.safetensors", "no weights"), "model.safetensors"),
    ("HF", without("model.safetensors"), ""),
    ("HF", index(), INDEX),
    ("HF", index(weight_map={"a": "gone.safetensors"}), INDEX),
    ("HF", index(weight_map={"a": "../w.safetensors"}), INDEX),
    ("LLaVA", setting(CONFIG, mm_projector_type="nonsense"), CONFIG),
    ("LLaVA", setting(CONFIG, mm_vision_select_layer=None), CONFIG),
    ("LLaVA", setting(CONFIG, mm_vision_select_layer=-99), CONFIG),
    ("LLaVA", setting(CONFIG, image_aspect_ratio="anyres"), CONFIG),
    ("LLaVA", setting(CONFIG, mm_vision_tower=None), CONFIG),
    ("LLaVA", setting(CONFIG, mm_vision_tower="../tower"), CONFIG),
    ("LLaVA", setting(CONFIG, mm_vision_tower="nobody/nothing"), CONFIG),
    ("LLaVA", setting(CONFIG, mm_vision_tower="openai/clip-vit-large-patch14"), ""),
    ("LLaVA", setting(f"tower/{CONFIG}", model_type="llama"), CONFIG),
    ("LLaVA", text(f"tower/{CONFIG}", "{"), f"tower/{CONFIG}"),
    ("LLaVA", text(f"tower/{PIXELS}", "{"), f"tower/{PIXELS}"),
    ("open_clip", text(CLIP, "{}"), CLIP),
    ("open_clip", setting(CLIP, "model_cfg", "vision_cfg", layers=[1, 1, 1, 1]), CLIP),
    ("open_clip", setting(CLIP, "model_cfg", "vision_cfg", head_width=8), CLIP),
    ("open_clip", setting(CLIP, "model_cfg", "vision_cfg", patch_size=[5, 3]), CLIP),
    ("open_clip", setting(CLIP, "preprocess_cfg", resize_mode="nonsense"), CLIP),
]


@pytest.mark.parametrize("number", range(len(FAULTS)))
@quiet
def test_an_error_names_the_file(
    number: int, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_templates, "SECONDS", 0.5)
    kind, change, name = FAULTS[number]
    folder = Path(shutil.copytree(published / kind, tmp_path / kind))
    change(folder)
    with pytest.raises(CheckpointError) as error:
        open_clip_models.load(folder) if kind == "open_clip" else load(folder)
    said = str(error.value)
    assert str(folder / name) in said, said
    assert len(said.splitlines()) == 1 or "does not fit its configuration" in said
