"""Checkpoint folders: every published layout loads to the same model, or fails as a whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_folders import (
    LAYOUTS,
    WEIGHTS,
    bare,
    edit_config,
    edit_weights,
    first_layout,
    load,
    refused,
    same,
    second_layout,
)
from random_models import (
    SHAPES,
    Shape,
    hooked,
    random_language_model,
    random_llama,
    random_llava,
    random_prompts,
)
from safetensors.torch import load_file
from tiny_checkpoint import tiny_tokenizer, write_tiny_llava
from torch import Tensor
from transformers import (
    AutoConfig,
    CLIPImageProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from mmlens.checkpoints.errors import CheckpointError
from mmlens.checkpoints.formats.hf_llava import FORMAT
from mmlens.checkpoints.loader import unreachable
from mmlens.model.transformer import HookedMultimodalTransformer


@pytest.fixture
def folder(seed: int, tmp_path: Path) -> Path:
    """A LLaVA as transformers writes it."""
    random_llava().save_pretrained(tmp_path)
    assert (tmp_path / WEIGHTS).exists()
    return tmp_path


# Layouts


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_names(layout: Callable[[str], str], folder: Path) -> None:
    expected = load(folder)
    edit_weights(folder, lambda tensors: {layout(n): t for n, t in tensors.items()})
    names = set(load_file(folder / WEIGHTS))
    prefixes = {first_layout: "language_model.model.", second_layout: "model.language_model."}
    assert any(name.startswith(prefixes.get(layout, "model.vision_tower.enc")) for name in names)
    assert same(load(folder), expected)


def test_names_that_transformers_itself_reads(folder: Path) -> None:
    """The rewritten layouts are no invention: transformers loads them to the same weights."""
    expected = LlavaForConditionalGeneration.from_pretrained(folder).state_dict()
    for layout in (first_layout, second_layout):
        edit_weights(folder, lambda t, layout=layout: {layout(n): x for n, x in t.items()})
        again = LlavaForConditionalGeneration.from_pretrained(folder).state_dict()
        assert all(torch.equal(again[name], expected[name]) for name in expected)


def test_old_buffers_are_ignored(folder: Path) -> None:
    expected = load(folder)
    old = {
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(5),
        "vision_tower.vision_model.embeddings.position_ids": torch.arange(10)[None],
    }
    edit_weights(folder, lambda t: {first_layout(n): x for n, x in t.items()} | old)
    assert same(load(folder), expected)


def test_shards(seed: int, tmp_path: Path) -> None:
    hf = random_llava()
    whole = hooked(hf, tmp_path / "whole")
    hf.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    shards = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(shards) > 2
    assert same(load(tmp_path / "shards"), whole)
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=f"1 of {len(shards)} shards.*{shards[1].name}"):
        load(tmp_path / "shards")


def test_configs_of_older_transformers(seed: int, tmp_path: Path) -> None:
    """`rope_theta` and `rope_scaling` at the top of the text config, `torch_dtype`."""
    hf = random_llava(SHAPES["linear rotary"])
    expected = hooked(hf, tmp_path)
    text = json.loads((tmp_path / "config.json").read_text())["text_config"]
    del text["rope_parameters"]
    text |= {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 3.0}}
    edit_config(tmp_path, text_config=text, dtype=None, torch_dtype="float32")
    model = load(tmp_path)
    prompts = random_prompts(hf.config, images=[1])
    assert torch.equal(model(prompts.for_mmlens(model)), expected(prompts.for_mmlens(expected)))


@pytest.mark.parametrize("make", [random_llava, random_llama], ids=["LLaVA", "Llama"])
def test_tied_embeddings(make: Any, seed: int, tmp_path: Path) -> None:
    """The tie may be told by the text config alone, and a copy may lie in the file."""
    expected = hooked(make(tied=True), tmp_path)
    if make is random_llava:
        edit_config(tmp_path, tie_word_embeddings=None)
    assert same(load(tmp_path), expected)
    head = "lm_head.weight"
    edit_weights(tmp_path, lambda t: t | {head: expected.W_E.detach().clone()})
    model = load(tmp_path)
    assert model.unembed.weight is model.embed.W_E
    assert same(model, expected)


def test_a_head_that_contradicts_the_tie(seed: int, tmp_path: Path) -> None:
    """Transformers believes the file there, and not the config."""
    hf = random_llama()
    hf.save_pretrained(tmp_path)
    edit_config(tmp_path, tie_word_embeddings=True)
    reread = type(hf).from_pretrained(tmp_path)
    assert torch.equal(reread.lm_head.weight, hf.lm_head.weight)
    assert torch.equal(load(tmp_path).unembed.weight, hf.lm_head.weight)


# Beside the weights


def test_tokenizer_processor_and_chat_template(seed: int, tmp_path: Path) -> None:
    template = (
        "{% for message in messages %}USER: {% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}{% endif %}"
        "{% endfor %}{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
    )
    write_tiny_llava(tmp_path, seed)
    size = {"height": 24, "width": 24}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size=size, crop_size=size),
        tokenizer=tiny_tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )
    processor.save_pretrained(tmp_path)
    model = load(tmp_path)
    assert model.cfg.default_template == "USER: <image> {question} ASSISTANT:"
    assert model.cfg.model_name == str(tmp_path)
    assert model.to_single_token("Paris") == tiny_tokenizer()("Paris")["input_ids"][0]
    pictures = torch.randint(0, 255, (2, 3, 30, 26), dtype=torch.uint8)
    expected = processor.image_processor(list(pictures), return_tensors="pt")["pixel_values"]
    given = model.image_processor(list(pictures), return_tensors="pt")["pixel_values"]
    assert torch.equal(given, expected)


def test_a_folder_with_nothing_but_weights(folder: Path) -> None:
    model = load(folder)
    assert model.tokenizer is None and model.image_processor is None
    assert model.cfg.default_template is None
    assert not model.training
    for use in (lambda: model.to_str_tokens("Paris"), lambda: model.to_single_token("Paris")):
        with pytest.raises(ValueError, match=r"no tokenizer.*tokenizer\.json"):
            use()


def test_several_end_tokens(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    assert load(folder).cfg.eos_token_ids == (2, 7)
    (folder / "generation_config.json").unlink()
    assert load(folder).cfg.eos_token_ids == (2,)


def test_dtype_and_device(folder: Path) -> None:
    assert load(folder).cfg.dtype == torch.float32
    half = load(folder, dtype=torch.bfloat16)
    assert half.cfg.dtype == torch.bfloat16
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    edit_config(folder, dtype="float16")
    assert {p.dtype for p in load(folder).parameters()} == {torch.float16}
    wide = load(folder, dtype=torch.float64, device=torch.device("cpu"))
    assert {p.device.type for p in wide.parameters()} == {"cpu"}
    assert wide.cfg.device == torch.device("cpu")


# What goes wrong


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    refused(folder, str(folder), "config.json")


def test_config_that_is_not_json(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": ')
    refused(folder, "config.json", "not JSON")


def test_unknown_family(folder: Path) -> None:
    edit_config(folder, model_type="bert", architectures=["BertModel"])
    refused(folder, "bert", "Hugging Face LLaVA")


def test_another_decoder(folder: Path) -> None:
    edit_config(folder, text_config={"model_type": "gpt2"})
    refused(folder, "gpt2", "llama, mistral, qwen2, qwen3, phi")


def test_mixtures_of_experts_are_refused_by_name(folder: Path) -> None:
    edit_config(folder, model_type="qwen3_moe", architectures=["Qwen3MoeForCausalLM"])
    refused(folder, "qwen3_moe", "mixtures of experts")


def test_no_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    refused(folder, str(folder), "safetensors")


@pytest.mark.parametrize("keep", [0, 5, 200, -100])
def test_truncated_file(keep: int, folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:keep])
    refused(folder, str(path))


def test_missing_unknown_and_misshapen_tensors_are_told_together(folder: Path) -> None:
    names = {bare(name): name for name in load_file(folder / WEIGHTS)}
    lost = names["decoder.layers.1.mlp.up_proj.weight"]
    bent = names["multi_modal_projector.linear_1.weight"]

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        del tensors[lost]
        tensors[bent] = tensors[bent][:, :-1].contiguous()
        return tensors | {"adapter.lora_A": torch.zeros(2, 3)}

    edit_weights(folder, change)
    refused(
        folder,
        "missing tensor language_model.model.layers.1.mlp.up_proj.weight",
        f"{bent} is [30, 20], the config makes it [30, 21]",
        "unknown tensor adapter.lora_A [2, 3]",
    )


@pytest.mark.parametrize(
    "part",
    ["decoder.norm.weight", "decoder.embed_tokens.weight", "lm_head.weight",
     "decoder.layers.0.self_attn.k_proj.weight", "vision_tower.embeddings.class_embedding",
     "vision_tower.encoder.layers.2.self_attn.v_proj.bias", "multi_modal_projector.linear_2.bias"],
)  # fmt: skip
def test_any_missing_tensor_is_told(part: str, folder: Path) -> None:
    name = next(n for n in load_file(folder / WEIGHTS) if bare(n) == part)
    edit_weights(folder, lambda tensors: {n: t for n, t in tensors.items() if n != name})
    refused(folder, "missing tensor", part.removeprefix("decoder."))


def test_a_tensor_that_the_tower_does_not_know(folder: Path) -> None:
    """In the blocks that are used; those after the feature layer are left out on purpose."""
    extra = {"vision_tower.vision_model.encoder.layers.0.self_attn.q_norm.weight": torch.ones(7)}
    edit_weights(folder, lambda tensors: tensors | extra)
    refused(folder, "unknown tensor", "q_norm")


def test_unknown_names(tmp_path: Path) -> None:
    refused("no-such-model", "no-such-model", "not a folder", "llava-hf/llava-1.5-7b-hf")
    refused(tmp_path / "nowhere", "nowhere")
    refused("nobody/has-this-model", "nobody/has-this-model", "hub")  # HF_HUB_OFFLINE: no network


# The published sizes

PUBLISHED = {
    "7B": {"vocab_size": 32064, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    "13B": {
        "vocab_size": 32064,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
    },
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_sizes_fit_name_by_name(size: str, tmp_path: Path) -> None:
    """config.json of llava-hf/llava-1.5-*-hf, and transformers' own names, without the weights."""
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "ignore_index": -100,
        "image_token_index": 32000,
        "pad_token_id": 32001,
        "projector_hidden_act": "gelu",
        "text_config": {"model_type": "llama", "torch_dtype": "float16", **PUBLISHED[size]},
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "vision_config": {
            "hidden_size": 1024,
            "image_size": 336,
            "intermediate_size": 4096,
            "model_type": "clip_vision_model",
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "patch_size": 14,
            "projection_dim": 768,
            "vocab_size": 32000,
        },
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    cfg = FORMAT.config(tmp_path, None)
    assert cfg.vision is not None and cfg.vision.n_visual_tokens == 576
    assert cfg.vision.n_layers == 23
    hf_config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(hf_config, LlavaConfig)
    with torch.device("meta"):
        theirs = LlavaForConditionalGeneration(hf_config).state_dict()
        model = HookedMultimodalTransformer(cfg)
    table, parameters = FORMAT.table(cfg), dict(model.named_parameters())
    assert not unreachable(parameters, table)
    for layout in LAYOUTS:
        unused = []
        found = set()
        for name, tensor in theirs.items():
            slot = table.get(FORMAT.rename(layout(name)))
            if slot is None:
                unused.append(bare(name))
                continue
            found.add(FORMAT.rename(layout(name)))
            assert parameters[slot.parameter][slot.start : slot.stop].shape == tensor.shape, name
        assert found == set(table)
        last = ("vision_tower.encoder.layers.23.", "vision_tower.post_layernorm.")
        assert unused and all(name.startswith(last) for name in unused)


def test_the_folder_can_go_once_it_is_loaded(folder: Path) -> None:
    model = load(folder)
    copy = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    shutil.rmtree(folder)
    assert all(torch.equal(tensor, copy[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["class token kept, several layers", "projector without bias"])
def test_choices_reach_the_config(name: str, seed: int, tmp_path: Path) -> None:
    shape: Shape = SHAPES[name]
    model = hooked(random_llava(shape), tmp_path)
    vision, projector = model.cfg.vision, model.cfg.projector
    assert vision is not None and projector is not None
    assert vision.select == shape.select
    layers = shape.feature_layer if isinstance(shape.feature_layer, list) else [shape.feature_layer]
    counted = tuple(i if i >= 0 else i + shape.vision_layers + 1 for i in layers)
    assert vision.feature_layers == counted and vision.n_layers == max(counted)
    assert projector.d_in == shape.vision_width * len(layers)
    assert projector.bias == shape.projector_bias
    assert (model.projector.linear_1.bias is None) == (not shape.projector_bias)


def test_layers_with_a_window_need_one(seed: int, tmp_path: Path) -> None:
    """transformers runs such a configuration without a window, and `generate` crashes there."""
    random_language_model(SHAPES["qwen2, some windows"]).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["use_sliding_window"]
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="layer_types has sliding_attention"):
        HookedMultimodalTransformer.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["residual_multiplier", "logits_scaling"])
def test_factors_of_granite_that_are_not_positive_are_refused(name: str, tmp_path: Path) -> None:
    random_language_model(SHAPES["granite"]).save_pretrained(tmp_path)
    edit_config(tmp_path, **{name: 0.0})
    with pytest.raises(CheckpointError, match=f"{name} is 0.0; it must be above 0"):
        HookedMultimodalTransformer.from_pretrained(tmp_path)
