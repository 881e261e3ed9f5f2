"""The tables of docs/transformer-lens.md: each name of TransformerLens's, and what it is here.

    python docs/make_transformer_lens_table.py

compares the public names of the installed TransformerLens's bridge, cache, config and hook point
with those of mmlens, and writes the tables into the page. It fails where a name is neither here nor
refused with a reason (`mmlens.utils.transformer_lens_names`).
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformer_lens
from torch import nn
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from mmlens import (
    ActivationCache,
    HookedMultimodalTransformer,
    MultimodalConfig,
    ProjectorConfig,
    VisionConfig,
)
from mmlens.model.hook_aliases import (
    TIMES_WEIGHTS,
    is_after_weights,
    our_name,
    reason_for_no_hook,
    related_name,
)
from mmlens.model.hook_points import HookPoint as OurHookPoint
from mmlens.utils.transformer_lens_names import ARGUMENTS, REFUSALS

PAGE = Path(__file__).parent / "transformer-lens.md"
BEGIN, END = "<!-- made by docs/make_transformer_lens_table.py -->", "<!-- end of what is made -->"
HEADINGS = {
    "model": "The model",
    "cache": "The cache",
    "config": "The config",
    "hook point": "Hook points",
}


def small_model() -> HookedMultimodalTransformer:
    """A model with every part, as small as can be."""
    sizes: dict[str, Any] = {"n_layers": 1, "d_model": 4, "n_heads": 2, "d_head": 2, "d_mlp": 4}
    vision = VisionConfig(
        **sizes,
        act_fn="gelu",
        normalization_type="LN",
        eps=1e-5,
        image_size=(2, 2),
        patch_size=1,
        feature_layers=(1,),
    )
    cfg = MultimodalConfig(
        **sizes,
        act_fn="silu",
        normalization_type="RMS",
        eps=1e-5,
        gated_mlp=True,
        d_vocab=8,
        n_ctx=16,
        image_token_id=7,
        vision=vision,
        projector=ProjectorConfig(d_in=4, d_hidden=4, d_out=4),
    )
    return HookedMultimodalTransformer(cfg)


def public(names: Any) -> set[str]:
    """Those without an underscore."""
    return {name for name in names if not name.startswith("_")}


def names_of_config(cls: type) -> set[str]:
    """Methods, properties, fields, and what `__init__` takes."""
    parameters = inspect.signature(cls).parameters.values()
    named = {each.name for each in parameters if each.kind is not each.VAR_KEYWORD}
    bases = [getattr(base, "__dataclass_fields__", {}) for base in cls.__mro__]
    return public(dir(cls)) | named | {name for base in bases for name in base}


def theirs() -> dict[str, set[str]]:
    """Public names of the installed TransformerLens, by kind; those of torch left out."""
    classes = [TransformerBridge, transformer_lens.HookedRootModule]
    with suppress(ImportError):  # TransformerLens 3 alone has it
        classes.append(transformer_lens.HookedTransformer)
    model = {name for cls in classes for name in public(dir(cls))} - set(dir(nn.Module))
    return {
        "model": model,
        "cache": public(dir(transformer_lens.ActivationCache)),
        "config": names_of_config(TransformerBridgeConfig),
        "hook point": public(dir(HookPoint)) - set(dir(nn.Module)),
    }


def ours() -> dict[str, set[str]]:
    """The same of mmlens: what `hasattr` finds."""
    model = small_model()
    _, cache = model.run_with_cache(torch.tensor([[1, 2, 3]]))
    assert isinstance(cache, ActivationCache)
    return {
        "model": public(dir(model)) | {"tokenizer"},
        "cache": public(dir(cache)),
        "config": public(dir(model.cfg)) | set(MultimodalConfig.__dataclass_fields__),
        "hook point": public(dir(OurHookPoint)),
    }


def small_bridge() -> TransformerBridge:
    """TransformerLens's bridge of a LLaVA, as small as can be."""
    sizes = {
        "hidden_size": 4,
        "intermediate_size": 4,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    text = LlamaConfig(vocab_size=8, **sizes)
    config = LlavaConfig(
        text_config=text,
        vision_config=CLIPVisionConfig(image_size=2, patch_size=1, **sizes),
        image_token_index=7,
    )
    hf = LlavaForConditionalGeneration(config)
    return build_bridge_from_module(hf, type(hf).__name__, hf_config=hf.config)


def hook_points_of(bridge: TransformerBridge) -> dict[str, str | None]:
    """Hook points of the bridge that have another name here: that name, or why they have none."""
    known = small_model().hook_dict
    others = [name for name in bridge.hook_dict if name not in known]
    return {name: here_for(name, known) for name in others}


def here_for(name: str, known: Any) -> str | None:
    """One cell of the table; None where nothing is known of the name."""
    same, related, reason = (
        our_name(name, known),
        related_name(name, known),
        reason_for_no_hook(name),
    )
    if same is not None:
        return f"`{same}`; this name is accepted"
    if related is not None:
        return f"`{related}`{TIMES_WEIGHTS * is_after_weights(name, related)}"
    return None if reason is None else sentence(reason)


def unaccounted() -> dict[str, list[str]]:
    """Names of TransformerLens that are neither here nor refused with a reason."""
    here = ours()
    found = {
        kind: sorted(names - here[kind] - set(REFUSALS.get(kind, {})))
        for kind, names in theirs().items()
    }
    points = hook_points_of(small_bridge())
    return found | {"hooks": sorted(name for name, cell in points.items() if cell is None)}


def sentence(text: str) -> str:
    """With a full stop, and a capital letter where it begins with a word, for a table."""
    word = re.match(r"[a-z]+(?= )", text)
    return f"{text[0].upper() if word else text[0]}{text[1:]}."


def rows(head: tuple[str, str], cells: Mapping[str, str]) -> list[str]:
    """A table of two columns."""
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|"]
    return [*lines, *(f"| `{name}` | {cell} |" for name, cell in cells.items()), ""]


def tables() -> str:
    """All of them, in Markdown."""
    here, lines = ours(), [f"Made with TransformerLens {version('transformer_lens')}.", ""]
    refused: set[str] = set()
    for kind, names in theirs().items():
        same, reasons = sorted(names & here[kind]), REFUSALS.get(kind, {})
        lines += [
            f"### {HEADINGS[kind]}",
            "",
            f"{len(same)} names are here, with the same meaning:",
        ]
        lines += [", ".join(f"`{name}`" for name in same) + ".", ""]
        others = {
            name: sentence(reasons[name]) for name in sorted(names & set(reasons) - set(same))
        }
        refused |= {f"{kind}.{name}" for name in others}
        if others:
            lines += [f"{len(others)} are not:", "", *rows(("name", "why, and what to do"), others)]
    earlier = {
        name: sentence(reason)
        for kind, reasons in REFUSALS.items()
        for name, reason in sorted(reasons.items())
        if f"{kind}.{name}" not in refused and name not in here[kind]
    }
    lines += ["### Names of TransformerLens 3 alone", ""]
    lines += rows(("name", "why it is not here, and what to do"), earlier)
    lines += ["### Arguments", ""]
    lines += ["Values that ask for nothing (`fold_ln=False`) are accepted.", ""]
    arguments = {
        f"{function}({name})": sentence(reason)
        for function, reasons in ARGUMENTS.items()
        for name, (_, reason) in reasons.items()
    }
    lines += rows(("argument", "why it is not taken, and what to do"), arguments)
    lines += ["### Hook points of TransformerLens 4 that are called otherwise", ""]
    lines += [
        "The tower's blocks, `vision_encoder.encoder_layers.{l}` there, are `vision.blocks.{l}`"
    ]
    lines += ["here; inside of a block names are as in the decoder.", ""]
    points = {
        name: cell
        for name, cell in hook_points_of(small_bridge()).items()
        if not name.startswith("vision_encoder.encoder_layers.")
    }
    lines += rows(
        ("in TransformerLens 4", "here"),
        {
            name.replace(".0.", ".{l}."): str(cell).replace(".0.", ".{l}.")
            for name, cell in points.items()
        },
    )
    return "\n".join(lines)


def with_tables(page: str) -> str:
    """The page with its tables made anew."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{tables()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    missing = {kind: names for kind, names in unaccounted().items() if names}
    if missing:
        sys.exit(f"neither here nor in mmlens/utils/transformer_lens_names.py: {missing}")
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
