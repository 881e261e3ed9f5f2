"""What a configuration may say, and how long a run may be."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from small_models import any_family, small_inputs, small_model

from mmlens.config import MultimodalConfig


def config(**choices: Any) -> MultimodalConfig:
    given = {
        "n_layers": 2, "d_model": 12, "n_heads": 2, "d_head": 6, "d_mlp": 8, "act_fn": "silu",
        "normalization_type": "RMS", "eps": 1e-5, "d_vocab": 20, "n_ctx": 100,
    }  # fmt: skip
    return MultimodalConfig(**given | choices)


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({"n_layers": 0}, "n_layers=0"),
        ({"d_model": -3}, "d_model=-3"),
        ({"d_vocab": 0}, "d_vocab=0"),
        ({"n_ctx": 0}, "n_ctx=0"),
        ({"n_key_value_heads": 0}, "n_kv_heads=0"),
        ({"n_key_value_heads": 3}, "n_heads=2 is no multiple"),
        ({"eps": float("nan")}, "eps=nan"),
        ({"eps": -1e-5}, "eps=-1e-05"),
        ({"window_size": 0}, "window_size=0"),
        ({"image_token_id": -1}, "image_token_id=-1"),
        ({"rope_parameters": {}}, "rope_theta=None"),
        ({"rope_parameters": {"rope_theta": 0.0}}, "rope_theta=0.0"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 1.5}}, "factor=1.5"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.1}}, "0 of 6"),
        ({"d_head": 5}, "5 of 5 dimensions"),
    ],
    ids=str,
)
def test_sizes_that_no_model_has(choices: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        config(**choices)


def test_configurations_that_there_are(seed: int) -> None:
    """Every family that the tests build, changed by `replace` as well."""
    for index in range(8):
        cfg = any_family(seed + index).cfg
        assert replace(cfg) == cfg
        assert {each.name for each in fields(cfg)} >= {"vision", "projector"}


@pytest.mark.parametrize(
    ("rope", "longest"),
    [
        ({"rope_type": "default"}, 100),
        ({"rope_type": "linear", "factor": 4.0}, 400),  # LongChat: 4,096 and a factor of 4
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 25}, 100),
        # Qwen2.5's way: the length stays what it was; Llama's: it is the longer one.
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100}, 400),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 25}, 100),
    ],
    ids=str,
)
def test_the_longest_run(rope: dict[str, Any], longest: int) -> None:
    cfg = config(rope_parameters={"rope_theta": 1e4, **rope})
    assert cfg.longest_input == longest
    cfg.check_length(longest)
    with pytest.raises(ValueError, match=f"{longest + 1} tokens, .* for {longest}"):
        cfg.check_length(longest + 1)
    padded = torch.ones(2, longest + 3, dtype=torch.bool)
    padded[0, :4] = padded[1, :3] = False
    cfg.check_length(longest + 3, padded)
    padded[0, 0] = padded[0, 1] = True
    with pytest.raises(ValueError, match=f"{longest + 1} tokens"):
        cfg.check_length(longest + 3, padded)


@torch.no_grad()
def test_every_door_knows_how_long_a_run_may_be(seed: int) -> None:
    """Exactly: `n_ctx` tokens run, one more is refused, by whatever runs the model."""
    model = small_model(seed)
    model.cfg.n_ctx = 40
    fits = torch.randint(4, 20, (1, 40))
    longer = torch.cat([fits, fits[:, :1]], dim=1)
    recording = model.record(fits[:, :9])
    doors = [
        model,
        model.run_with_cache,
        model.record,
        lambda x: model.record_many([x]),
        lambda x: recording.record(model.inputs_from_tokens(x)),
        lambda x: model.generate(x, 1, return_type="tokens"),
        lambda x: model(model.embed(x), start_at_layer=0),
        lambda x: model.inputs_from_tokens(x) and model(model.inputs_from_tokens(x)),
    ]
    for door in doors:
        door(fits)
        with pytest.raises(ValueError, match="41 tokens, but this model was made for 40"):
            door(longer)
    for cached in (True, False):
        with pytest.warns(UserWarning, match="ended after 1 tokens, at the 40"):
            options = {"use_past_kv_cache": cached, "stop_at_eos": False, "return_type": "tokens"}
            assert model.generate(fits, 2, **options).shape[1] == 41
    model.cfg.n_ctx = 41
    assert model(longer).shape[1] == 41
    inputs = small_inputs(model, seed, images=(2, 0)) if model.vision else None
    if inputs is not None:
        model.cfg.n_ctx = inputs.n_pos - 1
        with pytest.raises(ValueError, match=f"{inputs.n_pos} tokens"):
            model(inputs)
