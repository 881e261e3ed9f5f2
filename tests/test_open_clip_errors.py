"""open_clip towers that are refused, each with an error that says what and why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip_models import (
    ODD_TIMM,
    WEIGHTS,
    load,
    make_known,
    model_cfg,
    random_clip,
    tensors_of,
    write,
)
from safetensors.torch import save_file
from torch import nn

from mmlens.checkpoints.errors import CheckpointError
from mmlens.checkpoints.towers import open_clip_config


@pytest.mark.parametrize("said", ODD_TIMM)
def test_a_timm_model_that_is_no_plain_vit(said: str) -> None:
    with pytest.raises(CheckpointError) as error:
        open_clip_config.vision_config(model_cfg(f"timm: {said}"), -1, "full")
    assert said in str(error.value) and "supported are plain vision" in str(error.value)


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({"layers": [1, 1, 1, 1]}, "ModifiedResNet"),
        ({"qk_norm": True}, "CustomResidualAttentionBlock"),
        ({"timm_model_name": "convnext_atto"}, "ConvNeXt"),
        ({"timm_model_name": "no_such_model"}, "no_such_model"),
        ({"input_patchnorm": True}, "input_patchnorm"),
        ({"patch_size": [5, 3]}, "5 x 3"),
        ({"head_width": 8}, "cannot build"),  # 21 / 8 heads
    ],
)
def test_another_tower(choices: dict[str, Any], said: str) -> None:
    config = model_cfg("plain")
    config["vision_cfg"] = config["vision_cfg"] | choices
    with pytest.raises(CheckpointError) as error:
        open_clip_config.vision_config(config, -1, "full")
    assert said in str(error.value)


def test_layers_and_selections_that_are_not_there() -> None:
    for layer in (4, -5, [], [1, 7]):
        with pytest.raises(CheckpointError, match=r"features 0 \.\.\. 3"):
            open_clip_config.vision_config(model_cfg("plain"), layer, "full")
    with pytest.raises(CheckpointError, match="'patch'.*'full', or 'default'"):
        open_clip_config.vision_config(model_cfg("plain"), -1, "patch")


def test_names_that_lead_nowhere(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no model 'ViT-L-14-33'.*ViT-L-14-336"):
        load("ViT-L-14-33", "openai")
    for nothing in ({}, {"pretrained": "laion9b"}, {"pretrained": tmp_path / "nowhere.pt"}):
        with pytest.raises(CheckpointError, match=r"a file of weights.*\(openai\)"):
            load("ViT-L/14-336", **nothing)
    for name in ("ViT-L-14-336:openai", "hf-hub:nobody/has-this-model"):  # HF_HUB_OFFLINE is set
        with pytest.raises(CheckpointError, match=f"could not fetch {name}.*Without network"):
            load(name)
    with pytest.raises(CheckpointError, match=r"no open_clip_config\.json"):
        load(tmp_path)


def test_folders_that_do_not_fit(seed: int, tmp_path: Path) -> None:
    clip = random_clip("plain")
    folder = write(tmp_path / "clip", clip, model_cfg("plain"))
    with pytest.raises(CheckpointError, match="weights of its own.*pretrained='openai'"):
        load(folder, "openai")
    tensors = tensors_of(clip)
    bent = "visual.transformer.resblocks.1.mlp.c_fc.weight"
    lost = tensors.pop("visual.class_embedding")
    more = {bent: tensors[bent][1:].clone(), "visual.transformer.resblocks.2.ls_1.gamma": lost}
    save_file(tensors | more, folder / WEIGHTS)
    with pytest.raises(CheckpointError) as error:
        load(folder)
    for said in ("missing tensor visual.class_embedding", f"{bent} is", "unknown tensor", "ls_1"):
        assert said in str(error.value)
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        load(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        load(folder)
    texts = {"{": "not JSON", "[]": "not a JSON object", '{"model": 1}': "no model_cfg"}
    for text, said in texts.items():
        (folder / "open_clip_config.json").write_text(text)
        with pytest.raises(CheckpointError, match=f"open_clip_config.json is .*{said}"):
            load(folder)


@pytest.mark.filterwarnings("ignore:.*(deprecated|TorchScript)")
def test_a_pickle_that_holds_code(seed: int, tmp_path: Path) -> None:
    """OpenAI's own files are TorchScript archives: programs."""
    name, clip = make_known(tmp_path)
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "ViT-L-14-336px.pt"))
    torch.save(clip, tmp_path / "model.pt")
    for file in ("ViT-L-14-336px.pt", "model.pt"):
        with pytest.raises(CheckpointError, match="more than tensors"):
            load(name, tmp_path / file)
