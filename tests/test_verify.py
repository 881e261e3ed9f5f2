"""`mmlens verify`: passes what equals transformers, and fails what does not."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gemma_models
import internvl_models
import pytest
import qwen_models
import torch
from anyres_checkpoints import random_anyres, written
from checkpoint_folders import edit_config
from PIL import Image
from random_models import IMAGE, SHAPES, VOCABULARY, random_language_model, random_llava
from tiled_models import FAMILIES, random_idefics, write
from tiny_checkpoint import write_tiny_llava
from transformers.models.smolvlm import processing_smolvlm

from mmlens.checkpoints import parity
from mmlens.checkpoints.errors import CheckpointError
from mmlens.checkpoints.hub import find_folder
from mmlens.checkpoints.processor_parity import compare_processors
from mmlens.cli import main
from mmlens.demo import VARIANTS
from mmlens.inputs.processor import Processor
from mmlens.model.transformer import HookedMultimodalTransformer
from mmlens.sweeps.run import absolute_if_there

PARITY = ("embeddings", "each block alone", "every block's residual", "logits", "generation")


@pytest.fixture
def verify(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run `mmlens verify` in this process: exit code, the table's rows by name, stderr."""
    monkeypatch.setenv("COLUMNS", "300")

    def run(*arguments: object) -> tuple[int, dict[str, str], str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            main(["verify", *map(str, arguments)])
        captured = capsys.readouterr()
        rows = [line for line in captured.out.splitlines() if line.strip()]
        names = [line[3:].split("  ")[0].strip() for line in rows]
        return int(exit.value.code or 0), dict(zip(names, rows, strict=True)), captured.err

    return run


def spoil(monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], None]) -> None:
    """Every model that is loaded gets this change."""
    load = HookedMultimodalTransformer.from_pretrained.__func__

    @torch.no_grad()
    def loaded(cls: Any, *args: Any, **options: Any) -> HookedMultimodalTransformer:
        model = load(cls, *args, **options)
        change(model)
        return model

    monkeypatch.setattr(HookedMultimodalTransformer, "from_pretrained", classmethod(loaded))


@pytest.mark.parametrize("name", ["grouped queries", "phi on siglip"])
def test_a_multimodal_checkpoint(name: str, verify: Any, seed: int, tmp_path: Path) -> None:
    shape = SHAPES[name]
    hf = random_llava(shape)
    hf.save_pretrained(tmp_path)
    code, rows, err = verify(tmp_path, "--device", "cpu")
    assert code == 0, (rows, err)
    assert "LlavaForConditionalGeneration (Hugging Face LLaVA)" in rows["family"]
    assert f"{shape.n_layers} layers, d_model {shape.d_model}" in rows["decoder"]
    assert rows["visual tokens"].split()[-1] == str(hf.config.image_seq_length)
    assert "float32" in rows["dtype"]
    for check in (*PARITY, "hooks"):
        assert rows[check].startswith("✓"), rows[check]


@pytest.mark.parametrize(("name", "dtype"), [("idefics3", "float32"), ("smolvlm", "bfloat16")])
def test_idefics3_and_smolvlm(
    name: str,
    dtype: str,
    verify: Any,
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(processing_smolvlm, "num2words", str)  # as if it were installed
    write(FAMILIES[name], tmp_path, random_idefics(FAMILIES[name]))
    code, rows, err = verify(tmp_path, "--device", "cpu", "--dtype", dtype)
    assert code == 0, (rows, err)
    assert f"{FAMILIES[name].n_tokens} of each tile" in rows["visual tokens"]
    judged = PARITY if dtype == "float32" else ("embeddings", "each block alone", "generation")
    for check in ("processor", *judged, "hooks"):
        assert rows[check].startswith("✓"), rows[check]


@pytest.mark.parametrize("family", qwen_models.FAMILIES)
def test_qwen(family: str, verify: Any, seed: int, tmp_path: Path) -> None:
    qwen_models.write(family, tmp_path, qwen_models.random_qwen(family, random.Random(seed)))
    code, rows, err = verify(tmp_path, "--device", "cpu")
    assert code == 0, (rows, err)
    for check in ("processor", *PARITY, "hooks"):
        assert rows[check].startswith("✓"), rows[check]


@pytest.mark.parametrize("name", internvl_models.FAMILIES)
def test_internvl(name: str, verify: Any, seed: int, tmp_path: Path) -> None:
    family = internvl_models.FAMILIES[name]
    internvl_models.write(family, tmp_path, internvl_models.random_internvl(family))
    code, rows, err = verify(tmp_path, "--device", "cpu")
    assert code == 0, (rows, err)
    assert f"{family.n_tokens} of each tile" in rows["visual tokens"]
    for check in ("processor", *PARITY, "hooks"):
        assert rows[check].startswith("✓"), rows[check]


@pytest.mark.parametrize("name", ["NeXT, several layers of SigLIP", "OneVision"])
def test_a_model_of_tiles(name: str, verify: Any, seed: int, tmp_path: Path) -> None:
    random_anyres(name, vocabulary=VOCABULARY, image_id=IMAGE).save_pretrained(tmp_path)
    code, rows, err = verify(tmp_path, "--device", "cpu")
    assert code == 0, (rows, err)
    assert "25 of the whole image, and 25 of each of up to" in rows["visual tokens"]
    for check in (*PARITY, "hooks"):
        assert rows[check].startswith("✓"), rows[check]


@pytest.mark.parametrize("name", ["gpt_neox", "gpt_neox, one part after the other", "gemma2"])
def test_a_language_model(name: str, verify: Any, seed: int, tmp_path: Path) -> None:
    random_language_model(SHAPES[name]).save_pretrained(tmp_path)
    code, rows, err = verify(tmp_path, "--device", "cpu")
    assert code == 0, (rows, err)
    for check in (*PARITY, "hooks"):
        assert rows[check].startswith("✓"), rows[check]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype: str, verify: Any, seed: int, tmp_path: Path) -> None:
    random_language_model(SHAPES["qwen2"]).save_pretrained(tmp_path)
    code, rows, err = verify(tmp_path, "--device", "cpu", "--dtype", dtype)
    assert code == 0, (rows, err)
    assert dtype in rows["dtype"] and "vision tower" not in rows
    assert rows["each block alone"].startswith("✓")
    for name in ("logits", "every block's residual"):
        assert rows[name].startswith(" ") and "judged in float32 only" in rows[name]


SPOILT: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a query": (lambda model: model.blocks[1].attn.W_Q.mul_(1.3), "each block alone"),
    "the last norm": (lambda model: model.ln_final.w.mul_(1.1), "each block alone"),
    "a visual bias": (lambda model: model.vision.blocks[0].attn.b_O.add_(0.5), "embeddings"),
    "the output layer": (lambda model: model.unembed.weight.mul_(1.01), "unembedding alone"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_wrong_weight_is_an_exit_code(
    case: str, verify: Any, monkeypatch: pytest.MonkeyPatch, seed: int, tmp_path: Path
) -> None:
    random_llava().save_pretrained(tmp_path)
    change, where = SPOILT[case]
    spoil(monkeypatch, change)
    code, rows, _ = verify(tmp_path, "--device", "cpu")
    assert code == 1
    failed = {name for name, row in rows.items() if row.startswith("✗")}
    alone = {"embeddings", "each block alone", "unembedding alone"}
    assert failed & alone == {where}  # it says where
    assert "logits" in failed
    assert rows["hooks"].startswith("✓")


@pytest.mark.parametrize("family", gemma_models.FAMILIES)
def test_processors_of_gemma(family: str, seed: int, tmp_path: Path) -> None:
    gemma_models.write(gemma_models.FAMILIES[family], tmp_path)
    check = compare_processors(Processor.from_pretrained(tmp_path), tmp_path, seed)
    assert check.passed, check


@pytest.mark.parametrize("name", ["NeXT, several layers of SigLIP", "OneVision"])
def test_processors_of_tiles(name: str, seed: int, tmp_path: Path) -> None:
    model = written(name, tmp_path).model
    check = compare_processors(model.processor, tmp_path, seed)
    assert check.passed, check


PROCESSED: dict[str, tuple[dict[str, Any], str]] = {
    "pixels": ({"image_std": [0.5, 0.5, 0.25]}, "pixel_values differs, for an image of 201 x 130"),
    "ids": ({"max_image_size": {"longest_edge": 12}}, " tokens instead of "),
}


@pytest.mark.parametrize("case", PROCESSED)
def test_a_processor_that_differs_is_an_exit_code(
    case: str, verify: Any, monkeypatch: pytest.MonkeyPatch, seed: int, tmp_path: Path
) -> None:
    family = FAMILIES["idefics3"]
    write(family, tmp_path, random_idefics(family))
    change, message = PROCESSED[case]
    kind = type(Processor.from_pretrained(tmp_path).image_processor)
    ours = kind.from_pretrained(tmp_path, **change)
    spoil(monkeypatch, lambda model: setattr(model, "image_processor", ours))
    code, rows, _ = verify(tmp_path, "--device", "cpu")
    assert code == 1
    assert rows["processor"].startswith("✗") and message in rows["processor"]
    assert rows["logits"].startswith("✓")


def test_images_that_mmlens_refuses_are_an_exit_code(
    verify: Any, seed: int, tmp_path: Path
) -> None:
    """Patches in squares of another size would be taken for other places of the image."""
    made = qwen_models.write(
        "qwen2", tmp_path, qwen_models.random_qwen("qwen2", random.Random(seed))
    )
    made.image_processor.merge_size *= 2
    made.save_pretrained(tmp_path)
    model = HookedMultimodalTransformer.from_pretrained(tmp_path, device="cpu")
    with pytest.raises(ValueError, match=r"merge_size=\d, but the model merges squares of \d"):
        model.prepare("Which?", Image.new("RGB", (90, 60)))
    code, rows, err = verify(tmp_path, "--device", "cpu")
    assert code == 1 and "Traceback" not in err
    assert rows["processor"].startswith("✗") and "mmlens refuses it" in rows["processor"]


@pytest.mark.parametrize("option", ["device_map", "vision_tower"])
def test_the_embedded_models_take_no_option_of_folders(option: str) -> None:
    with pytest.raises(CheckpointError, match=f"{option}='auto'.* checkpoint folders take it"):
        HookedMultimodalTransformer.from_pretrained("demo", **{option: "auto"})


def test_num2words_is_asked_for_where_it_is_missing(
    verify: Any, monkeypatch: pytest.MonkeyPatch, seed: int, tmp_path: Path
) -> None:
    monkeypatch.setattr(processing_smolvlm, "num2words", None)
    write(FAMILIES["smolvlm"], tmp_path, random_idefics(FAMILIES["smolvlm"]))
    code, rows, _ = verify(tmp_path, "--device", "cpu")
    assert code == 0  # what is not compared does not fail
    assert rows["processor"].startswith(" ")
    assert "needs num2words: pip install 'mmlens[smolvlm]'" in rows["processor"]


def test_a_folder_without_processor(verify: Any, seed: int, tmp_path: Path) -> None:
    random_llava().save_pretrained(tmp_path)
    code, rows, _ = verify(tmp_path, "--device", "cpu")
    assert code == 0
    assert rows["processor"].startswith(" ") and "the folder has no tokenizer" in rows["processor"]


def test_a_model_without_reference(verify: Any, seed: int, tmp_path: Path) -> None:
    """The same weights under an architecture that transformers does not know."""
    write_tiny_llava(tmp_path, seed, n_layers=2)
    edit_config(tmp_path, architectures=["SomebodysLlava"])
    code, rows, err = verify(tmp_path, "--device", "cpu")
    assert code == 0, (rows, err)
    assert "no reference in transformers" in rows["parity"]
    assert rows["generation"].startswith("✓") and rows["hooks"].startswith("✓")
    assert "each block alone" not in rows


def test_a_reference_that_cannot_be_run(
    verify: Any, monkeypatch: pytest.MonkeyPatch, seed: int, tmp_path: Path
) -> None:
    random_language_model(SHAPES["one head"]).save_pretrained(tmp_path)

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setattr(parity, "run_reference", fail)
    code, rows, _ = verify(tmp_path, "--device", "cpu")
    assert code == 1
    assert rows["parity"].startswith("✗") and "out of memory" in rows["parity"]
    assert rows["hooks"].startswith("✓")


def test_dead_hooks_are_named(
    verify: Any, monkeypatch: pytest.MonkeyPatch, seed: int, tmp_path: Path
) -> None:
    random_language_model(SHAPES["one head"]).save_pretrained(tmp_path)
    monkeypatch.setattr(
        HookedMultimodalTransformer, "verify_hooks", lambda *_: ["blocks.1.hook_extra"]
    )
    code, rows, _ = verify(tmp_path, "--device", "cpu")
    assert code == 1
    assert rows["hooks"].startswith("✗") and "blocks.1.hook_extra" in rows["hooks"]


def test_what_is_no_checkpoint(verify: Any, tmp_path: Path) -> None:
    for arguments in [(tmp_path,), (tmp_path / "nowhere",), ("demo", "--device", "abacus")]:
        code, rows, err = verify(*arguments)
        assert code == 2 and not rows
        assert err.startswith("mmlens: ")


def test_a_checkpoint_that_does_not_fit(verify: Any, seed: int, tmp_path: Path) -> None:
    random_language_model(SHAPES["one head"]).save_pretrained(tmp_path / "source")
    other = shutil.copytree(tmp_path / "source", tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    edit_config(other, num_hidden_layers=config["num_hidden_layers"] + 1)
    code, rows, err = verify(other, "--device", "cpu")
    assert code == 2 and not rows
    assert "missing tensor model.layers.3" in err


@pytest.mark.parametrize("name", VARIANTS)
def test_the_embedded_models_are_known_by_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everywhere the same, even where a folder is called so."""
    assert parity.find_reference(name) is None
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    assert absolute_if_there(name) == name
    assert absolute_if_there(f"./{name}/.") == str(tmp_path / name)
    with pytest.raises(ValueError, match=f"not a folder, not .*{name}"):
        find_folder("no-such-model", None)


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_the_demo(verify: Any, name: str) -> None:
    code, rows, err = verify(name)
    assert code == 0, (rows, err)
    assert "no reference in transformers" in rows["parity"]
    assert rows["hooks"].startswith("✓")


@pytest.mark.parametrize(
    "fields",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 900},
        {"vocab_size": 2**26, "hidden_size": 2**20},
    ],
    ids=str,
)
def test_sizes_are_compared_before_transformers_builds_them(
    fields: dict[str, int], verify: Any, monkeypatch: pytest.MonkeyPatch, seed: int, tmp_path: Path
) -> None:
    random_language_model(SHAPES["one head"]).save_pretrained(tmp_path)
    edit_config(tmp_path, **fields)

    asked: list[object] = []
    monkeypatch.setattr(parity, "run_reference", lambda *given: asked.append(given))
    code, rows, err = verify(tmp_path, "--device", "cpu")
    assert code == 2 and not rows
    assert not asked and err.startswith("mmlens: ") and str(tmp_path) in err


def test_another_models_class_is_no_reference(seed: int, tmp_path: Path) -> None:
    """It would be built in its own sizes: GPT-NeoX's are 20 billion."""
    random_language_model(SHAPES["one head"]).save_pretrained(tmp_path)
    assert parity.find_reference(tmp_path) is not None
    edit_config(tmp_path, architectures=["GPTNeoXForCausalLM"])
    assert parity.find_reference(tmp_path) is None
