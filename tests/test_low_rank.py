"""Low-rank updates that are added at loading, and the tuned demo model, which is made of one."""

import random
from pathlib import Path

import pytest
import torch
from checkpoint_folders import refused
from random_models import random_llama
from safetensors.torch import save_file
from tiny_checkpoint import tiny_tokenizer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from mmlens.checkpoints.errors import CheckpointError
from mmlens.checkpoints.formats import demo, language_model
from mmlens.checkpoints.loader import Weights, build
from mmlens.checkpoints.low_rank import read_updates, with_update
from mmlens.checkpoints.weight_files import weight_files
from mmlens.model.transformer import HookedMultimodalTransformer

EPSILON = torch.finfo(torch.float32).eps
Factors = dict[str, Tensor]


def random_factors(model: LlamaForCausalLM, rank: int) -> Factors:
    """Of some matrices of the layers, in float16, named after the checkpoint's tensors."""
    names = [name for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    factors = {}
    for name in random.sample(names, random.randint(1, len(names))):
        d_out, d_in = model.get_parameter(name).shape
        matrix = name.removesuffix(".weight")
        factors[f"{matrix}.lora_A"] = torch.randn(rank, d_in).half()
        factors[f"{matrix}.lora_B"] = torch.randn(d_out, rank).half()
    return factors


def write(file: Path, tensors: Factors, **metadata: object) -> Path:
    save_file(tensors, file, metadata={name: str(value) for name, value in metadata.items()})
    return file


@torch.no_grad()
def updated(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """W + scale * B @ A in float64, and how far a sum in float32 may be from it.

    The bound of a sum of rank + 1 terms, each with its roundings: (rank + 3) epsilon times the sum
    of their sizes; twice that, because epsilon's powers are left out.
    """
    terms = abs(scale) * b.double().abs() @ a.double().abs() + weight.double().abs()
    exact = weight.double() + scale * b.double() @ a.double()
    return exact, 2 * (len(a) + 3) * EPSILON * terms


@torch.no_grad()
def test_updated_weights_are_base_plus_scale_times_b_a(seed: int, tmp_path: Path) -> None:
    model = random_llama()
    model.save_pretrained(tmp_path)
    rank, alpha = random.randint(1, 5), random.uniform(0.5, 20)
    factors = random_factors(model, rank)
    file = write(tmp_path / "update.safetensors", factors, rank=rank, alpha=alpha)
    cfg = language_model.config(tmp_path)
    files = with_update(weight_files(tmp_path), file)
    options = {"dtype": torch.float32, "device": torch.device("cpu")}
    table, ignored = language_model.FORMAT.table(cfg), language_model.FORMAT.ignored
    hooked = build(cfg, Weights(files, table, ignored), **options)
    ours = dict(hooked.named_parameters(remove_duplicate=False))
    theirs = model.state_dict()
    for name, slot in table.items():
        matrix = name.removesuffix(".weight")
        if f"{matrix}.lora_A" not in factors:
            assert torch.equal(slot.of(ours), theirs[name])
            continue
        pair = factors[f"{matrix}.lora_A"], factors[f"{matrix}.lora_B"]
        exact, bound = updated(theirs[name], *pair, alpha / rank)
        assert ((slot.of(ours) - exact).abs() <= bound).all()


def test_an_update_that_does_not_fit_is_refused(seed: int, tmp_path: Path) -> None:
    model = random_llama()
    folder, file = tmp_path / "model", tmp_path / "update.safetensors"
    model.save_pretrained(folder)
    factors = random_factors(model, rank=3)
    matrix = random.choice(list(factors)).rpartition(".")[0]
    a, b = f"{matrix}.lora_A", f"{matrix}.lora_B"

    def message(tensors: Factors, **metadata: object) -> str:
        write(file, tensors, **metadata)
        with pytest.raises(CheckpointError) as caught:
            with_update(weight_files(folder), file)
        assert str(file) in str(caught.value)
        return str(caught.value)

    assert "rank and alpha" in message(factors, rank=3)
    lone = {name: tensor for name, tensor in factors.items() if name != b}
    assert f"{matrix}.lora_A" in message(lone, rank=3, alpha=6)
    assert "of rank 4" in message(factors, rank=4, alpha=6)
    elsewhere = {"nowhere.lora_A": factors[a].clone(), "nowhere.lora_B": factors[b].clone()}
    assert "nowhere.weight" in message(factors | elsewhere, rank=3, alpha=6)
    wide = factors | {a: torch.zeros(3, factors[a].shape[1] + 1)}
    assert f"{matrix}.weight" in message(wide, rank=3, alpha=6)
    file.write_bytes(b"not safetensors")
    with pytest.raises(CheckpointError, match="safetensors"):
        read_updates(file)


# The tuned demo model


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The demo's folder with the shipped tower, around a language model of width 32."""
    folder, lm = tmp_path / "package", tmp_path / "language model"
    folder.mkdir()
    for name in ("config.json", "open_clip_config.json", "vision.safetensors"):
        (folder / name).symlink_to(demo.FOLDER / name)
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(lm)
    tokenizer.save_pretrained(lm)
    monkeypatch.setattr(demo, "FOLDER", folder)
    monkeypatch.setattr(demo, "language_model_folder", lambda: lm)
    return folder


def projector() -> Factors:
    shapes = {"linear_1": 192, "linear_2": 32}
    weights = {f"{name}.weight": torch.randn(32, d_in).half() for name, d_in in shapes.items()}
    return weights | {f"{name}.bias": torch.randn(32).half() for name in shapes}


def test_without_its_weights_the_tuned_model_is_refused(package: Path) -> None:
    refused("demo-tuned", "demo-tuned", "tuned.safetensors is missing", "'demo' is there")


@torch.no_grad()
def test_the_tuned_model_has_its_own_projector_and_updated_weights(
    seed: int, package: Path
) -> None:
    shared = projector()
    save_file(shared, package / "projector.safetensors")
    plain = HookedMultimodalTransformer.from_pretrained("demo", device="cpu")
    its_own = {f"multi_modal_projector.{name}": t for name, t in projector().items()}
    factors = {
        "model.layers.1.self_attn.k_proj.lora_A": torch.randn(2, 32).half(),
        "model.layers.1.self_attn.k_proj.lora_B": torch.randn(16, 2).half(),
    }
    write(package / "tuned.safetensors", its_own | factors, rank=2, alpha=4, steps=0, base="demo")
    tuned = HookedMultimodalTransformer.from_pretrained("demo-tuned", device="cpu")
    assert (plain.cfg.model_name, tuned.cfg.model_name) == ("demo", "demo-tuned")
    before, after = dict(plain.named_parameters()), dict(tuned.named_parameters())
    fused = "blocks.1.attn.qkv.weight"
    exact, bound = updated(before[fused][32:48], *factors.values(), 2.0)
    assert ((after[fused][32:48] - exact).abs() <= bound).all()
    assert torch.equal(after[fused][:32], before[fused][:32])
    assert torch.equal(after[fused][48:], before[fused][48:])
    for name, parameter in after.items():
        if name.startswith("projector."):
            source = its_own[name.replace("projector", "multi_modal_projector")]
            assert torch.equal(parameter, source.float())
        elif name != fused:
            assert torch.equal(parameter, before[name])
