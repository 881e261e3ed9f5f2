"""Checkpoint folders that somebody else made: nothing of them is run, nothing outside is read."""

from __future__ import annotations

import builtins
import json
import os
import random
import socket
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import transformers
from checkpoint_folders import WEIGHTS, edit_config, edit_weights, load, refused, same, to_pickles
from limits import GIGABYTE, peak_of, time_limit
from random_models import enliven, hooked, random_llama, random_llava, random_prompts
from safetensors.torch import load_file, save_file
from tiny_checkpoint import tiny_tokenizer, write_tiny_llava
from transformers import AutoModelForCausalLM
from transformers.activations import ACT2FN

from mmlens.checkpoints import json_files
from mmlens.checkpoints.errors import CheckpointError
from mmlens.checkpoints.paths import is_inside, leaves_its_folder

INDEX = f"{WEIGHTS}.index.json"
posix = pytest.mark.skipif(os.name != "posix", reason="named pipes")


def one_line(folder: Path, *said: str) -> None:
    """It is refused with one line that names a file of the folder, before a minute is over."""
    with time_limit(), pytest.raises(CheckpointError) as error:
        load(folder)
    text = str(error.value)
    assert "\n" not in text and str(folder) in text, text
    for part in said:
        assert part in text


# Code

EVIL = """
from pathlib import Path
Path({mark!r}).write_text("executed")
raise SystemExit("executed")
"""
FILES = {
    "tokenizer_config.json": ["tokenizer_class"],
    "preprocessor_config.json": ["image_processor_type", "feature_extractor_type"],
    "processor_config.json": ["processor_class"],
}
NAMES = ["AutoModelForCausalLM", "AutoTokenizer", "AutoProcessor", "AutoConfig", "LlamaForCausalLM",
         "pipeline", "Trainer"]  # fmt: skip


@pytest.fixture
def evil(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A LLaVA whose files name code in `evil.py` wherever transformers takes such names."""

    def asked(*_: Any) -> str:
        raise AssertionError("somebody was asked")

    monkeypatch.setattr(builtins, "input", asked)
    monkeypatch.setattr(sys, "stdin", None)
    monkeypatch.syspath_prepend(str(tmp_path / "model"))
    folder = write_tiny_llava(tmp_path / "model", seed)
    (folder / "evil.py").write_text(EVIL.format(mark=str(tmp_path / "mark")))
    autos = [name for name in dir(transformers) if name.startswith("Auto")]
    for name in ("config.json", "generation_config.json", *FILES):
        path = folder / name
        content = json.loads(path.read_text()) if path.exists() else {}
        content["auto_map"] = dict.fromkeys(autos, "evil.Evil") | {
            "AutoTokenizer": ["evil.Evil", "evil.Evil"]
        }
        if "text_config" in content:
            content["text_config"]["auto_map"] = content["auto_map"]
            content["vision_config"]["auto_map"] = content["auto_map"]
        path.write_text(json.dumps(content))
    (folder / "processor_config.json").unlink()
    return folder


def test_an_auto_map_is_left_aside(evil: Path, tmp_path: Path) -> None:
    """Where transformers has the class itself, as most published checkpoints with one."""
    model = load(evil)
    assert model.to_single_token("Paris") == tiny_tokenizer()("Paris")["input_ids"][0]
    assert model.image_processor is not None
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("file", FILES)
def test_only_tokenizers_and_processors_by_name(
    file: str, name: str, evil: Path, tmp_path: Path
) -> None:
    for field in FILES[file]:
        path = evil / file
        before = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(before | {field: name}))
        one_line(evil, file, f"{field} is {name!r}")
        path.write_text(json.dumps(before))
    nested = {"image_processor": {"image_processor_type": name}, "processor_class": None}
    (evil / "processor_config.json").write_text(json.dumps(nested))
    one_line(evil, "processor_config.json", name)
    assert not (tmp_path / "mark").exists()


def test_no_other_class_of_transformers(seed: int) -> None:
    """Of all its names, those that pass are tokenizers; any other would be a way around."""
    names = [name for name in dir(transformers) if name[0].isupper()]
    assert len(names) > 1000
    for index in torch.randperm(len(names))[:150].tolist():
        try:
            found = getattr(transformers, names[index])
        except Exception:
            continue  # a package of its own is missing
        passes = json_files.is_class(names[index], transformers.PreTrainedTokenizerBase)
        is_tokenizer = isinstance(found, type) and issubclass(
            found, transformers.PreTrainedTokenizerBase
        )
        stand_in = "dummy" in str(getattr(found, "__module__", ""))
        assert passes <= (is_tokenizer or stand_in), names[index]


def test_the_check_itself_causes_no_warning(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers warns of the names with "Fast" that it had, and a user did not write these."""
    warnings: list[str] = []
    logger = transformers.utils.import_utils.logger
    monkeypatch.setattr(logger, "warning_once", lambda text, *others: warnings.append(text))
    names = [name for name in transformers.__all__ if name.endswith("ImageProcessor")]
    names = random.sample(names, 20)
    kind = transformers.image_processing_utils.BaseImageProcessor
    for name in names:
        json_files.is_class(name, kind)
    assert not warnings
    monkeypatch.delitem(vars(transformers), "CLIPImageProcessorFast", raising=False)
    assert json_files.is_class("CLIPImageProcessorFast", kind)  # whoever writes it may be told


def test_a_tokenizer_that_is_no_json_of_the_tokenizers_library(evil: Path, tmp_path: Path) -> None:
    """The class is then looked up by name alone."""
    (evil / "tokenizer.json").unlink()
    (evil / "vocab.json").write_text("{}")
    settings = json.loads((evil / "tokenizer_config.json").read_text())
    for name in ("AutoModelForCausalLM", "AutoTokenizer", "pipeline"):
        changed = settings | {"tokenizer_class": name}
        (evil / "tokenizer_config.json").write_text(json.dumps(changed))
        one_line(evil, "tokenizer_config.json", name)
    assert not (tmp_path / "mark").exists()


def test_a_model_inside_of_a_processor(evil: Path, tmp_path: Path) -> None:
    audio = {"audio_tokenizer_class": "AutoModel", "audio_tokenizer_name_or_path": str(evil)}
    settings = {"processor_class": "LlavaProcessor", "audio_tokenizer": audio}
    (evil / "processor_config.json").write_text(json.dumps(settings))
    one_line(evil, "audio tokenizer")
    assert not (tmp_path / "mark").exists()


# Files that are none


@posix
@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "folder", "link to nowhere", "loop"])
@pytest.mark.parametrize(
    "name",
    ["config.json", WEIGHTS, INDEX, "tokenizer.json", "tokenizer_config.json",
     "generation_config.json", "preprocessor_config.json", "chat_template.jinja"],
)  # fmt: skip
def test_regular_files_only(name: str, kind: str, seed: int, tmp_path: Path) -> None:
    folder = write_tiny_llava(tmp_path, seed)
    if name == INDEX:
        (folder / WEIGHTS).unlink()
    path = folder / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with TemporaryDirectory() as short:  # a socket's path may have 107 characters
            socket.socket(socket.AF_UNIX).bind(f"{short}/s")
            os.rename(f"{short}/s", path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("nowhere" if kind == "link to nowhere" else name)
    one_line(folder, str(path))


@posix
@pytest.mark.parametrize("name", ["shard", "pytorch_model.bin", "a.gguf"])
def test_weights_that_are_pipes(name: str, seed: int, tmp_path: Path) -> None:
    random_llama().save_pretrained(tmp_path, max_shard_size="30KB")
    if name == "pytorch_model.bin":
        for file in tmp_path.glob("model*"):
            file.unlink()
    shard = sorted(tmp_path.glob("*.safetensors"))[0] if name == "shard" else tmp_path / name
    shard.unlink(missing_ok=True)
    os.mkfifo(shard)
    if name == "a.gguf":
        with time_limit(), pytest.raises(CheckpointError, match="named pipe"):
            load(shard)
        return
    one_line(tmp_path, str(shard), "named pipe")


# Paths


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "/{root}/secret.safetensors", "a/../../secret.safetensors",
     "a\\..\\..\\secret.safetensors", "C:\\secret.safetensors", "~/secret.safetensors",
     "notes.txt", "", "config.json", "evil.py"],
)  # fmt: skip
def test_an_index_lists_weights_inside_of_its_folder(name: str, seed: int, tmp_path: Path) -> None:
    folder, secret = tmp_path / "model", tmp_path / "secret.safetensors"
    random_llama().save_pretrained(folder)
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).rename(secret)
    (folder / "notes.txt").write_text("no weights")
    (folder / "evil.py").write_text("no weights")
    name = name.format(root=str(tmp_path).lstrip("/"))
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, name)}))
    one_line(folder, INDEX, repr(name), "inside of the folder")


def test_names_that_leave(seed: int) -> None:
    for name in ("a.safetensors", "a/b.safetensors", "...", "a..b/c", "a/.b/c"):
        assert not leaves_its_folder(name)
    for name in (
        "..",
        "a/..",
        "a/../../b",
        "/a",
        "\\a",
        "\\\\host\\a",
        "c:a",
        "~",
        "~you/a",
        "a\0",
    ):
        assert leaves_its_folder(name)


@posix
@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "tokenizer.json", "merges.txt"])
def test_links_out_of_the_folder(name: str, seed: int, tmp_path: Path) -> None:
    folder = write_tiny_llava(tmp_path / "model", seed)
    elsewhere = tmp_path / f"my-{name}"
    if (folder / name).exists():
        (folder / name).rename(elsewhere)
    else:
        elsewhere.write_text("mine")
    (folder / name).symlink_to(elsewhere)
    one_line(folder, f"{folder / name} is a link to {elsewhere}")


@posix
def test_links_inside_of_the_folder_and_folders_that_are_links(seed: int, tmp_path: Path) -> None:
    expected = hooked(random_llama(), tmp_path / "model")
    (tmp_path / "model" / "files").mkdir()
    (tmp_path / "model" / WEIGHTS).rename(tmp_path / "model" / "files" / "w.safetensors")
    (tmp_path / "model" / WEIGHTS).symlink_to("files/w.safetensors")
    (tmp_path / "link").symlink_to("model", target_is_directory=True)
    assert same(load(tmp_path / "model"), expected)
    assert same(load(tmp_path / "link"), expected)


@posix
@pytest.mark.parametrize("shard", ["1GB", "30KB"])
def test_the_hubs_cache_is_made_of_links(shard: str, seed: int, tmp_path: Path) -> None:
    """A snapshot's files are links to the blobs of its repository."""
    snapshot = tmp_path / "hub" / "models--somebody--model" / "snapshots" / "0123abc"
    hf = random_llava()
    expected = hooked(hf, tmp_path / "plain")
    hf.save_pretrained(snapshot, max_shard_size=shard)
    blobs = snapshot.parents[1] / "blobs"
    blobs.mkdir()
    for index, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(blobs / str(index))
        file.symlink_to(Path("..", "..", "blobs", str(index)))
    model = load(snapshot)
    assert same(model, expected)
    saved = model.save_pretrained(tmp_path / "saved")
    assert not any(file.is_symlink() for file in saved.iterdir())
    assert same(load(saved), expected)
    (tmp_path / "hub" / "other").write_text("{}")
    (snapshot / "generation_config.json").unlink(missing_ok=True)
    (snapshot / "generation_config.json").symlink_to(tmp_path / "hub" / "other")
    one_line(snapshot, "outside")
    assert not is_inside(tmp_path / "hub" / "other", snapshot)


# Saving


@torch.no_grad()
@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "bin"])
def test_shards_of_one_name_in_two_folders(pickled: bool, seed: int, tmp_path: Path) -> None:
    source = tmp_path / "source"
    hf = random_llama()
    expected = hooked(hf, source)
    tensors = {name: x.clone() for name, x in load_file(source / WEIGHTS).items()}
    (source / WEIGHTS).unlink()
    suffix, kind = (".bin", "pytorch_model.bin") if pickled else (".safetensors", WEIGHTS)
    where = {name: f"{'ab'[i % 2]}/w{suffix}" for i, name in enumerate(tensors)}
    for shard in set(where.values()):
        part = {name: x for name, x in tensors.items() if where[name] == shard}
        (source / shard).parent.mkdir()
        torch.save(part, source / shard) if pickled else save_file(part, source / shard)
    (source / f"{kind}.index.json").write_text(json.dumps({"weight_map": where}))
    model = load(source)
    assert same(model, expected)
    model.blocks[1].mlp.W_out.mul_(2)
    saved = model.save_pretrained(tmp_path / "saved")
    index = json.loads((saved / INDEX).read_text())["weight_map"]
    assert index == {name: file.replace(".bin", ".safetensors") for name, file in where.items()}
    assert same(load(saved), model) and not same(load(saved), expected)
    tokens = torch.randint(4, 60, (1, 9))
    theirs = AutoModelForCausalLM.from_pretrained(saved)(tokens).logits
    torch.testing.assert_close(model(tokens), theirs, rtol=0, atol=1e-4)


def test_two_files_that_would_have_one_name(seed: int, tmp_path: Path) -> None:
    random_llama().save_pretrained(tmp_path / "source")
    tensors = load_file(tmp_path / "source" / WEIGHTS)
    (tmp_path / "source" / WEIGHTS).unlink()
    where = {name: f"w.{'bin' if i % 2 else 'safetensors'}" for i, name in enumerate(tensors)}
    for file, write in (("w.bin", torch.save), ("w.safetensors", save_file)):
        part = {name: x.clone() for name, x in tensors.items() if where[name] == file}
        write(part, tmp_path / "source" / file)
    (tmp_path / "source" / INDEX).write_text(json.dumps({"weight_map": where}))
    model = load(tmp_path / "source")
    with pytest.raises(CheckpointError, match=r"one name: w\.bin, w\.safetensors"):
        model.save_pretrained(tmp_path / "saved")
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


@posix
def test_what_is_no_file_of_the_folder_is_not_copied(seed: int, tmp_path: Path) -> None:
    source = write_tiny_llava(tmp_path / "source", seed)
    (tmp_path / "secret").write_text("mine")
    (source / "notes.md").symlink_to(tmp_path / "secret")
    (source / "up").symlink_to(tmp_path, target_is_directory=True)
    (source / "here").symlink_to(source, target_is_directory=True)
    os.mkfifo(source / "pipe")
    (source / "more").mkdir()
    (source / "more" / "kept.md").write_text("kept")
    (source / "more" / "zero.md").symlink_to("/dev/zero")
    with time_limit(), pytest.warns(UserWarning, match="is not copied") as warned:
        saved = load(source).save_pretrained(tmp_path / "saved")
    assert len(warned) == 5
    left = {"notes.md", "up", "here", "pipe", "zero.md"}
    assert not left & {file.name for file in saved.rglob("*")}
    assert (saved / "more" / "kept.md").read_text() == "kept"


@posix
@pytest.mark.parametrize("there", ["an empty folder", "nothing"])
def test_nothing_is_written_through_a_link(there: str, seed: int, tmp_path: Path) -> None:
    model = hooked(random_llama(), tmp_path / "source")
    if there == "an empty folder":
        (tmp_path / "elsewhere").mkdir()
    (tmp_path / "target").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    with pytest.raises(FileExistsError, match="target is a link to .*elsewhere"):
        model.save_pretrained(tmp_path / "target")
    assert not (tmp_path / "elsewhere").exists() or not list((tmp_path / "elsewhere").iterdir())


FULL = """
import resource, signal, sys
from mmlens import HookedMultimodalTransformer

model = HookedMultimodalTransformer.from_pretrained(sys.argv[1], device="cpu")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # files of 20 KB at most, as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
model.save_pretrained(sys.argv[2])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_full_disk(seed: int, tmp_path: Path) -> None:
    random_llama().save_pretrained(tmp_path / "source")
    target = tmp_path / "saved"
    name, said, _ = peak_of(FULL, str(tmp_path / "source"), str(target))
    assert name == "OSError" and "too large" in said and str(tmp_path) in said
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


# Which weights

SETS = [WEIGHTS, INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json"]


def write_set(folder: Path, name: str, model: Any) -> None:
    """A model's weights, as one of the sets that a folder may hold."""
    scratch = folder / "scratch"
    model.save_pretrained(scratch, max_shard_size="30KB" if "index" in name else "1GB")
    if ".bin" in name:
        to_pickles(scratch)
    for file in scratch.iterdir():
        file.rename(folder / file.name)
    scratch.rmdir()


@pytest.mark.filterwarnings("ignore:.*two sets of weights")
def test_any_sets_in_transformers_order(seed: int, tmp_path: Path) -> None:
    """Several sets of weights in one folder: those are taken that transformers takes."""
    models = [random_llama() for _ in SETS]
    for count in range(1, len(SETS) + 1):
        folder = tmp_path / str(count)
        folder.mkdir()
        for index in torch.randperm(len(SETS))[:count].tolist():
            write_set(folder, SETS[index], models[index])
        theirs = AutoModelForCausalLM.from_pretrained(folder)
        assert torch.equal(load(folder).W_E, theirs.get_input_embeddings().weight)


def test_an_index_whose_shards_are_gone(seed: int, tmp_path: Path) -> None:
    """What `save_pretrained` leaves where there was a larger model, or one in shards."""
    random_llama().save_pretrained(tmp_path, max_shard_size="30KB")
    index = (tmp_path / INDEX).read_text()
    for file in tmp_path.glob("model-*"):
        file.unlink()
    expected = hooked(random_llama(), tmp_path)
    (tmp_path / INDEX).write_text(index)
    assert same(load(tmp_path), expected)
    (tmp_path / WEIGHTS).unlink()
    one_line(tmp_path, "shards that model.safetensors.index.json lists are missing")


@pytest.mark.parametrize("other", [INDEX, "pytorch_model.bin"])
def test_two_sets_that_differ_are_told(
    other: str, seed: int, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    first, second = random_llama(), random_llama()
    write_set(tmp_path, WEIGHTS, first)
    write_set(tmp_path, other, first)
    load(tmp_path)
    assert not [each for each in recwarn if "two sets" in str(each.message)]
    weight = next(iter(torch.randperm(len(list(second.parameters()))).tolist()))
    changed = first.state_dict()
    name = sorted(changed)[weight % len(changed)]
    changed[name].view(-1)[seed % changed[name].numel()] += 1
    first.load_state_dict(changed)
    write_set(tmp_path, other, first)
    with pytest.warns(UserWarning, match=f"two sets .*{WEIGHTS} is taken.*{other} is not"):
        load(tmp_path)


def test_a_config_may_name_its_weights(seed: int, tmp_path: Path) -> None:
    expected, other = random_llama(), random_llama()
    other.save_pretrained(tmp_path)
    (tmp_path / WEIGHTS).rename(tmp_path / "mine.safetensors")
    expected.save_pretrained(tmp_path)
    edit_config(tmp_path, transformers_weights="mine.safetensors")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"mine.safetensors is taken"):
        model = load(tmp_path)
    assert torch.equal(model.W_E, theirs.get_input_embeddings().weight)
    assert torch.equal(model.W_E, other.get_input_embeddings().weight)
    saved = model.save_pretrained(tmp_path / "saved")
    theirs = AutoModelForCausalLM.from_pretrained(saved)
    assert torch.equal(model.W_E, theirs.get_input_embeddings().weight)


# Text that is none of a configuration

TEXTS = {
    "a list": b"[]",
    "a number": b"3",
    "nothing": b"",
    "null": b"null",
    "half": b'{"model_type": "llama", ',
    "UTF-16": '{"model_type": "llama"}'.encode("utf-16"),
    "bytes": bytes(range(256)),
    "deep": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "a long number": b'{"vocab_size": ' + b"9" * 10_000 + b"}",
    "no fields": b"{}",
    "fields of wrong types": b'{"model_type": ["llama"], "architectures": 3}',
    "quantised, oddly": b'{"quantization_config": 4}',
}


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer_config.json",
                                  "tokenizer.json", "preprocessor_config.json", INDEX])  # fmt: skip
@pytest.mark.parametrize("text", TEXTS)
def test_text_that_is_no_configuration(file: str, text: str, seed: int, tmp_path: Path) -> None:
    folder = write_tiny_llava(tmp_path, seed)
    if file == INDEX:
        (folder / WEIGHTS).unlink()
    (folder / file).write_bytes(TEXTS[text])
    harmless = {"no fields", "fields of wrong types", "quantised, oddly", "a long number"}
    with time_limit():
        try:
            load(folder)
        except CheckpointError as error:
            assert "\n" not in str(error) and str(folder) in str(error)
        else:
            assert file not in ("config.json", INDEX) and text in harmless


VALUES: list[Any] = [None, -1, 0, 1.5, 10**9, 2**63, 10**40, "3", "", [], {}, True, float("nan")]
FIELDS = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
          "num_key_value_heads", "vocab_size", "head_dim", "rms_norm_eps", "hidden_act",
          "max_position_embeddings", "rope_parameters", "tie_word_embeddings"]  # fmt: skip


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
def test_values_of_wrong_types_and_sizes(part: str, seed: int, tmp_path: Path) -> None:
    """Whatever a field says: a model as transformers', or one line with the file's path."""
    hf = random_llava()
    hf.save_pretrained(tmp_path)
    before = (tmp_path / "config.json").read_text()
    fields = [*FIELDS, "image_size", "patch_size"] if part == "vision_config" else FIELDS
    expected = load(tmp_path).state_dict()
    for field in fields:
        value = VALUES[torch.randint(len(VALUES), ()).item()]
        config = json.loads(before)
        config[part][field] = value
        (tmp_path / "config.json").write_text(json.dumps(config))
        with time_limit():
            try:
                model = load(tmp_path)
            except CheckpointError as error:
                text = str(error)
                assert str(tmp_path) in text
                assert "\n" not in text or "does not fit its configuration" in text
            else:  # null is the default, and a default may be right
                state = model.state_dict()
                assert state.keys() == expected.keys(), (field, value)
                assert all(torch.equal(state[name], expected[name]) for name in state)


def test_sizes_are_told_by_name(seed: int, tmp_path: Path) -> None:
    random_llama().save_pretrained(tmp_path)
    before = (tmp_path / "config.json").read_text()
    for field, value in (("num_hidden_layers", 10**9), ("hidden_size", -4), ("vocab_size", "67"),
                         ("num_attention_heads", 0), ("intermediate_size", 4.0)):  # fmt: skip
        edit_config(tmp_path, **{field: value})
        one_line(tmp_path, "config.json", f"{field} is {value!r}", "a whole number from 1 to")
        (tmp_path / "config.json").write_text(before)
    edit_config(tmp_path, num_hidden_layers=900)
    one_line(tmp_path, "the decoder has 900 layers", "its files hold ")


@pytest.mark.parametrize("name", ["nonsense", "int8", "float8_e4m3fn", "torch.nonsense", 7, ["a"]])
def test_a_dtype_that_is_none(name: Any, seed: int, tmp_path: Path) -> None:
    random_llama().save_pretrained(tmp_path)
    edit_config(tmp_path, dtype=name)
    one_line(tmp_path, "config.json", f"dtype is {name!r}", "float32, float16, bfloat16, float64")


@pytest.mark.parametrize("name", ["nonsense", ""])
@pytest.mark.parametrize(
    ("part", "field"),
    [
        ("text_config", "hidden_act of the decoder"),
        ("vision_config", "vision_config.hidden_act"),
        ("projector", "projector_hidden_act"),
    ],
)
def test_an_unknown_activation_function(
    part: str, field: str, name: Any, seed: int, tmp_path: Path
) -> None:
    """The error names the field that says it."""
    random_llava().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    if part == "projector":
        edit_config(tmp_path, projector_hidden_act=name)
    else:
        edit_config(tmp_path, **{part: config[part] | {"hidden_act": name}})
    one_line(tmp_path, f" {field} is {name!r}; known are ", "gelu", "silu", "quick_gelu")


@pytest.mark.parametrize("index", [2**32, 10**30, -1])
def test_a_placeholder_that_no_tokenizer_has(index: int, seed: int, tmp_path: Path) -> None:
    random_llava().save_pretrained(tmp_path)
    edit_config(tmp_path, image_token_index=index)
    one_line(tmp_path, f"image_token_id={index}")


@pytest.mark.parametrize(
    ("rope", "said"),
    [
        ({"rope_type": "nonsense", "rope_theta": 1e4}, "nonsense"),
        ({"rope_type": "default", "rope_theta": float("nan")}, "rope_theta=nan"),
        ({"rope_type": "default", "rope_theta": -3.0}, "rope_theta=-3.0"),
        ({"rope_type": "linear", "rope_theta": 1e4, "factor": "two"}, "factor"),
        ({"rope_type": "linear", "rope_theta": 1e4, "factor": 0.0}, "no finite angles"),
        ({"rope_type": "yarn", "rope_theta": 1e4, "factor": float("inf")}, ""),
    ],
    ids=str,
)
def test_rotary_parameters_that_give_no_angles(
    rope: dict[str, Any], said: str, seed: int, tmp_path: Path
) -> None:
    random_llama().save_pretrained(tmp_path)
    edit_config(tmp_path, rope_parameters=rope)
    one_line(tmp_path, said)


@torch.no_grad()
def test_every_activation_function_that_is_known(seed: int, tmp_path: Path) -> None:
    """Logits and hooks, for some of the names drawn anew; listening changes nothing."""
    names = [name for name in sorted(ACT2FN) if not list(ACT2FN[name].parameters())]
    drawn = [names[index] for index in torch.randperm(len(names))[:4].tolist()]
    for name in {"linear", *drawn}:  # which returns what it got
        hf = random_llama()
        hf.config.hidden_act = name
        hf = enliven(type(hf)(hf.config))
        model = hooked(hf, tmp_path / name)
        prompts = random_prompts(hf.config, images=[0, 0])
        inputs = prompts.for_mmlens(model)
        real = prompts.real
        logits, cache = model.run_with_cache(inputs)
        theirs = hf(**prompts.for_hf()).logits
        torch.testing.assert_close(logits[real], theirs[real], rtol=0, atol=1e-4)
        torch.testing.assert_close(model(inputs)[real], theirs[real], rtol=0, atol=1e-4)
        block = model.blocks[0]
        entering = cache["blocks.0.ln2.hook_normalized"] * block.ln2.w
        torch.testing.assert_close(cache["pre", 0], entering @ block.mlp.W_gate)


# Weights that are none


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.bool])
def test_weights_that_are_no_floating_point_numbers(
    dtype: torch.dtype, seed: int, tmp_path: Path
) -> None:
    random_llama().save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda t: t | {"model.norm.weight": t["model.norm.weight"].to(dtype)})
    refused(tmp_path, "model.norm.weight", str(dtype), "floating point")


@pytest.mark.parametrize("form", ["one entry shown often", "sparse", "compressed"])
def test_pickles_that_are_larger_than_their_files(form: str, seed: int, tmp_path: Path) -> None:
    random_llama().save_pretrained(tmp_path)
    to_pickles(tmp_path)
    path = tmp_path / "pytorch_model.bin"
    tensors = torch.load(path, weights_only=True)
    embedding = tensors["model.embed_tokens.weight"]
    if form == "one entry shown often":
        tensors["model.embed_tokens.weight"] = torch.zeros(1).expand(embedding.shape)
    elif form == "sparse":
        tensors["model.embed_tokens.weight"] = embedding.to_sparse()
    torch.save(tensors, path)
    if form == "compressed":
        with zipfile.ZipFile(path) as stored:
            entries = [(each, stored.read(each)) for each in stored.namelist()]
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in entries:
                archive.writestr(name, content)
        one_line(tmp_path, str(path), "compressed")
    else:
        one_line(tmp_path, str(path), "model.embed_tokens.weight", "entry by entry")


LOAD = """
import sys
from mmlens import HookedMultimodalTransformer
HookedMultimodalTransformer.from_pretrained(sys.argv[1], device="cpu")
"""
WARM = LOAD.replace("sys.argv[1]", "sys.argv[2]")


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    "fields",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 10**9, "model_type": "qwen2"},
        {"num_hidden_layers": 1000},
        {"vocab_size": 2**26, "hidden_size": 2**20},
        {"head_dim": 2**16, "num_attention_heads": 2**14, "num_key_value_heads": 2**14},
        {"vocab_size": 2**62},
    ],
    ids=str,
)
def test_sizes_are_compared_before_memory_is_taken(
    fields: dict[str, Any], seed: int, tmp_path: Path
) -> None:
    random_llama().save_pretrained(tmp_path / "good")
    random_llama().save_pretrained(tmp_path / "bad")
    edit_config(tmp_path / "bad", **fields)
    name, said, peak = peak_of(LOAD, str(tmp_path / "bad"), str(tmp_path / "good"), setup=WARM)
    assert name == "CheckpointError" and str(tmp_path / "bad") in said
    assert peak < GIGABYTE / 4
