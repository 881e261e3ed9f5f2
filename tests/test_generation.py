"""Generation equals transformers' `generate` on the same checkpoint, token for token.

Runs are compared in float64, whose logits transformers rounds to float32 before it chooses, and so
do we: a tie between two tokens, or a draw on an edge between them, that the rounding of two
programs would decide differently does not happen.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import (
    BOS,
    DECODERS,
    EOS,
    IMAGE,
    PAD,
    SHAPES,
    VOCABULARY,
    Prompts,
    hooked,
    random_language_model,
    random_llama,
    random_llava,
    random_prompts,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

from mmlens import CheckpointError, HookedMultimodalTransformer
from mmlens.model.decoding import OTHER_WAYS

NEW = 32
MULTIMODAL = ["mistral, window", "qwen2, some windows", "siglip", "phi on siglip"]


def in_double(prompts: Prompts) -> Prompts:
    pixels = prompts.pixel_values
    return Prompts(
        prompts.tokens, prompts.attention_mask, None if pixels is None else pixels.double()
    )


def hf_generate(hf: Any, prompts: Prompts, n: int, ends: int | None = None) -> Tensor:
    """Transformers' greedy continuation, alone; it never says `<image>`, and ends at `ends`.

    To a language model alone that token is one like the others.
    """
    given = prompts.for_hf()
    del given["position_ids"]
    tokens = hf.generate(
        **given,
        max_new_tokens=n,
        do_sample=False,
        suppress_tokens=[IMAGE] if hasattr(hf.config, "vision_config") else None,
        eos_token_id=-1 if ends is None else ends,
    )
    return tokens[:, prompts.tokens.shape[1] :]


@pytest.mark.parametrize("images", [[1], [2, 0, 1]], ids=str)
@pytest.mark.parametrize("name", ["grouped queries", *MULTIMODAL])
def test_greedy_equals_hugging_face(
    name: str, images: list[int], seed: int, tmp_path: Path
) -> None:
    hf = random_llava(SHAPES[name]).double()
    model = hooked(hf, tmp_path)
    assert model.cfg.dtype == torch.float64
    prompts = in_double(random_prompts(hf.config, images))
    expected = hf_generate(hf, prompts, NEW)
    inputs = prompts.for_mmlens(model)
    options: dict[str, Any] = {"return_type": "tokens", "stop_at_eos": False}
    for cached in (True, False):
        tokens = model.generate(inputs, NEW, use_past_kv_cache=cached, **options)
        assert torch.equal(tokens[:, : inputs.n_pos], inputs.tokens)
        assert torch.equal(tokens[:, inputs.n_pos :], expected)


@pytest.mark.parametrize("name", ["tied", *DECODERS])
def test_greedy_of_a_language_model_alone(name: str, seed: int, tmp_path: Path) -> None:
    hf = random_language_model(SHAPES[name]).double()
    model = hooked(hf, tmp_path)
    # Gemma 2 has eager attention alone, which in float64 makes NaN of padding.
    prompts = random_prompts(hf.config, [0] if name.startswith("gemma2") else [0, 0, 0])
    tokens = model.generate(prompts.for_mmlens(model), NEW, return_type="tokens", stop_at_eos=False)
    assert torch.equal(tokens[:, prompts.tokens.shape[1] :], hf_generate(hf, prompts, NEW))


@pytest.mark.parametrize("cached", [True, False])
def test_a_row_that_has_ended_stays_ended(cached: bool, seed: int, tmp_path: Path) -> None:
    """The end token is what the first row says third, so rows end at different times."""
    hf = random_llava().double()
    model = hooked(hf, tmp_path)
    assert model.cfg.eos_token_ids == (EOS,)
    prompts = in_double(random_prompts(hf.config, [1, 0]))
    end = int(hf_generate(hf, prompts, 3)[0, 2])
    model.cfg.eos_token_ids = (end,)
    model.generation_config.pad_token_id = PAD + 7  # an ordinary token may be the padding
    hf.generation_config.pad_token_id = PAD + 7
    expected = hf_generate(hf, prompts, NEW, ends=end)
    inputs = prompts.for_mmlens(model)
    tokens = model.generate(inputs, NEW, return_type="tokens", use_past_kv_cache=cached)
    assert torch.equal(tokens[:, inputs.n_pos :], expected)  # the padding too


def test_it_stops_when_all_have_ended(seed: int, tmp_path: Path) -> None:
    hf = random_llava()
    model = hooked(hf, tmp_path)
    prompts = random_prompts(hf.config, [1])
    inputs = prompts.for_mmlens(model)
    free = model.generate(inputs, 8, return_type="tokens", stop_at_eos=False)[0, inputs.n_pos :]
    model.cfg.eos_token_ids = (VOCABULARY + 5, int(free[3]))  # several end tokens: any of them ends
    ended = model.generate(inputs, 8, return_type="tokens")[0, inputs.n_pos :]
    first = free.tolist().index(int(free[3])) + 1
    assert ended.tolist() == free[:first].tolist()
    assert model.generate(inputs, 0, return_type="tokens").shape == inputs.tokens.shape


@pytest.mark.parametrize("cached", [True, False])
def test_an_image_is_never_said(cached: bool, seed: int, tmp_path: Path) -> None:
    hf = random_llava()
    model = hooked(hf, tmp_path)
    with torch.no_grad():  # nothing but <image> is worth saying
        model.unembed.weight.zero_()
        model.unembed.weight[IMAGE] = 1.0
    prompts = random_prompts(hf.config, [1])
    with model.hooks(fwd_hooks=[("ln_final.hook_normalized", lambda x, hook: x.abs() + 1.0)]):
        tokens = model.generate(
            prompts.for_mmlens(model), 5, return_type="tokens", use_past_kv_cache=cached
        )
    assert tokens.shape[1] == prompts.tokens.shape[1] + 5
    assert not (tokens[:, prompts.tokens.shape[1] :] == IMAGE).any()


def test_hooks_act_while_it_generates(seed: int, tmp_path: Path) -> None:
    hf = random_llava()
    model = hooked(hf, tmp_path)
    inputs = random_prompts(hf.config, [1]).for_mmlens(model)
    plain = model.generate(inputs, 12, return_type="tokens", stop_at_eos=False)
    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_post", lambda x, hook: -x)]):
        edited = model.generate(inputs, 12, return_type="tokens", stop_at_eos=False)
    assert not torch.equal(plain, edited)
    assert torch.equal(plain, model.generate(inputs, 12, return_type="tokens", stop_at_eos=False))


# Settings of generation_config.json

SETTINGS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "repetition penalty": {"repetition_penalty": 1.7},
    "no repeated pairs": {"no_repeat_ngram_size": 2},
    "bad words": {"bad_words_ids": [[9], [14, 23], [31, 8]]},
    "suppressed": {"suppress_tokens": [IMAGE, *range(20, 50)]},
    "suppressed at the beginning": {"begin_suppress_tokens": list(range(4, 40))},
    "forced end": {"forced_eos_token_id": 11, "max_new_tokens": 6},
    "several ends": {"eos_token_id": list(range(4, 30))},
    "ends, at least some new tokens": {"eos_token_id": list(range(4, 40)), "min_new_tokens": 5},
    "ends, at least some tokens": {"eos_token_id": list(range(4, 40)), "min_length": 30},
    "padding": {"eos_token_id": list(range(4, 30)), "pad_token_id": 33},
    "a number of new tokens": {"max_new_tokens": 5},
    "a number of tokens": {"max_length": 35},
    "ever shorter": {"eos_token_id": 12, "exponential_decay_length_penalty": (3, 1.9)},
    "biases": {"sequence_bias": [[[17], 3.0], [[22, 40], 6.0], [[18], -2.0]]},
    "the prompt's words": {"encoder_repetition_penalty": 1.6},
    "the prompt's pairs": {"encoder_no_repeat_ngram_size": 2},
    "sampled": {"do_sample": True},  # from transformers' default, the 50 most probable
    "temperature": {"do_sample": True, "temperature": 1.9, "top_k": 0},
    "top k": {"do_sample": True, "top_k": 7},
    "top p": {"do_sample": True, "top_p": 0.6, "temperature": 0.8},
    "min p": {"do_sample": True, "min_p": 0.2},
    "top h": {"do_sample": True, "top_h": 0.5},
    "typical p": {"do_sample": True, "typical_p": 0.5},
    "cutoffs": {"do_sample": True, "epsilon_cutoff": 0.02, "eta_cutoff": 0.05},
    "watermark": {"do_sample": True, "watermarking_config": {"bias": 3.0, "context_width": 2}},
    "all together": {
        "do_sample": True,
        "temperature": 1.3,
        "top_k": 30,
        "top_p": 0.9,
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 3,
        "eos_token_id": [6, 41],
        "renormalize_logits": True,
        "remove_invalid_values": True,
    },
}


def settled(hf: Any, settings: dict[str, Any]) -> Any:
    """The model with these settings; like every LLaVA here it never says `<image>`."""
    if hasattr(hf.config, "vision_config"):
        settings = {"suppress_tokens": [IMAGE], **settings}
    hf.generation_config = GenerationConfig(**{"eos_token_id": EOS, "pad_token_id": PAD} | settings)
    return hf.double()


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_the_checkpoint(name: str, seed: int, tmp_path: Path) -> None:
    """Batches with left padding, with images or (by chance) without."""
    with_images = random.random() < 0.5
    images = [1, 0, 2] if with_images else [0, 0, 0]
    hf = settled(random_llava() if with_images else random_llama(), SETTINGS[name])
    model = hooked(hf, tmp_path)
    prompts = in_double(random_prompts(hf.config, images))
    given = prompts.for_hf()
    del given["position_ids"]
    said = SETTINGS[name].keys() & {"max_length", "max_new_tokens"}
    n_new = {} if said else {"max_new_tokens": 12}
    torch.manual_seed(seed)
    expected = hf.generate(**given, **n_new)
    inputs = prompts.for_mmlens(model)
    for cached in (True, False):
        torch.manual_seed(seed)
        tokens = model.generate(inputs, return_type="tokens", use_past_kv_cache=cached, **n_new)
        assert torch.equal(tokens, expected)


ARGUMENTS = ["repetition penalty", "several ends", "padding", "top p", "all together"]


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_win(name: str, seed: int, tmp_path: Path) -> None:
    """The same settings as arguments, over a checkpoint that says otherwise."""
    hf = settled(random_llama(), {"repetition_penalty": 3.0, "do_sample": True, "top_k": 2})
    model = hooked(hf, tmp_path)
    prompts = in_double(random_prompts(hf.config, [0, 0]))
    options = {"max_new_tokens": 9, "do_sample": False} | SETTINGS[name]
    torch.manual_seed(seed)
    expected = hf.generate(prompts.tokens, attention_mask=prompts.attention_mask, **options)
    torch.manual_seed(seed)
    tokens = model.generate(prompts.for_mmlens(model), return_type="tokens", **options)
    assert torch.equal(tokens, expected)


def test_a_forced_beginning(seed: int, tmp_path: Path) -> None:
    """It acts where the prompt is a single token."""
    hf = settled(random_llama(), {"forced_bos_token_id": 44})
    model = hooked(hf, tmp_path)
    expected = hf.generate(torch.tensor([[BOS]]), max_new_tokens=4)
    assert int(expected[0, 1]) == 44
    inputs = model.inputs_from_tokens(torch.tensor([[BOS]]))
    assert torch.equal(model.generate(inputs, 4, return_type="tokens"), expected)


def test_settings_in_config_json_count_where_there_is_no_other_file(
    seed: int, tmp_path: Path
) -> None:
    """As in transformers, for checkpoints from before generation_config.json."""
    hf = random_llama().double()
    hf.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"repetition_penalty": 1.8, "no_repeat_ngram_size": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.generation_config.repetition_penalty == 1.8
    model = HookedMultimodalTransformer.from_pretrained(tmp_path, device="cpu")
    prompts = random_prompts(hf.config, [0, 0])
    expected = theirs.generate(
        prompts.tokens, attention_mask=prompts.attention_mask, max_new_tokens=12
    )
    tokens = model.generate(prompts.for_mmlens(model), 12, return_type="tokens")
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"num_beams": 3}, "num_beams"),
        ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha"),
        ({"guidance_scale": 1.5}, "guidance_scale"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
        ({"dola_layers": "low"}, "dola_layers"),
        ({"force_words_ids": [[5]]}, "force_words_ids"),
        ({"token_healing": True}, "token_healing"),
    ],
)
def test_what_needs_another_loop_is_refused_by_name(
    settings: dict[str, Any], name: str, seed: int, tmp_path: Path
) -> None:
    hf = random_llama()
    hf.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    model = HookedMultimodalTransformer.from_pretrained(tmp_path, device="cpu")
    inputs = random_prompts(hf.config, [0]).for_mmlens(model)
    with pytest.raises(ValueError, match=f"{name}=.*cannot honour it.*{name} ?="):
        model.generate(inputs, 3)
    off = OTHER_WAYS[name]  # the message says how to go without
    if off is None:
        setattr(model.generation_config, name, None)
    tokens = model.generate(inputs, 3, return_type="tokens", **{name: off})
    assert tokens.shape[1] <= inputs.n_pos + 3
    plain = hooked(hf, tmp_path / "plain")
    with pytest.raises(ValueError, match=f"{name}="):
        plain.generate(inputs, 3, **settings)


@pytest.mark.parametrize(
    ("text", "says"),
    [("[1, 2]", "list"), ("{", "not JSON"), ('{"early_stopping": "soon"}', "early_stopping")],
)
def test_a_damaged_file_is_one_clear_error(text: str, says: str, tmp_path: Path) -> None:
    random_llama().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=rf"generation_config\.json.*{says}"):
        HookedMultimodalTransformer.from_pretrained(tmp_path, device="cpu")


def test_how_transformers_runs_does_not_matter(seed: int, tmp_path: Path) -> None:
    hf = random_llama()
    hf.save_pretrained(tmp_path)
    settings = {"use_cache": False, "cache_implementation": "static", "output_attentions": True}
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    model = HookedMultimodalTransformer.from_pretrained(tmp_path, device="cpu")
    inputs = random_prompts(hf.config, [0]).for_mmlens(model)
    plain = hooked(hf, tmp_path / "plain")
    assert model.generate(inputs, 5, return_type="tokens").equal(
        plain.generate(inputs, 5, return_type="tokens")
    )
