"""The table of sites: one entry for each hook point, whose axes are those of the activation."""

from __future__ import annotations

import ast
import random
import re
from pathlib import Path

import pytest
import torch
from small_models import KINDS, any_family, small_inputs, small_model

import mmlens
from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.model.sites import Site
from mmlens.model.transformer import HookedMultimodalTransformer as Model

FAMILIES = {
    "": {},
    "gated": {"gated_mlp": True},
    "not gated": {"gated_mlp": False},
    "parallel": {"parallel_attn_mlp": True},
    "normalised queries": {"qk_norm": True},
    "local": {"n_layers": 2, "attn_types": ("local", "global"), "window_size": 3},
}


def sizes(model: Model, inputs: MultimodalInputs, site: Site, layer: int | None) -> dict[str, int]:
    """How long each axis of an activation of this site is, by the config alone."""
    cfg, vision, projector = model.cfg, model.cfg.vision, model.cfg.projector
    assert vision is not None and projector is not None
    n_patches = vision.grid[0] * vision.grid[1]
    n_visual = n_patches + (vision.class_token and vision.select == "full")
    own = vision if site.stack == "tower" else cfg
    n_pos = n_patches + vision.class_token if site.stack == "tower" else inputs.n_pos
    return {
        "1": 1,
        "batch": len(inputs),
        "tile": len(inputs.visual["pixel_values"]) if inputs.visual else 0,
        "all": 1,
        "pos": n_pos,
        "query": n_pos,
        "key": n_pos,
        "patch": n_patches,
        "feature": n_visual,
        "square": n_visual,
        "normed": n_visual,
        "visual_token": n_visual * sum(inputs.n_images),
        "head": own.n_heads,
        "kv_head": own.n_kv_heads,
        "d_head": own.d_head,
        "d_mlp": own.d_mlp,
        "d_model": own.d_model,
        "d_features": projector.d_in,
        "d_in": projector.d_in,
        "d_normed": projector.d_in,
        "d_hidden": projector.d_hidden,
        "d_out": projector.d_out,
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_every_hook_point_has_a_site_with_the_axes_of_its_activation(
    seed: int, family: str
) -> None:
    make = small_model if family else any_family
    model = make(seed, **FAMILIES[family])
    inputs = small_inputs(model, seed, images=(1, 2))
    _, cache = model.run_with_cache(inputs, names_filter=list(model.hook_dict))
    assert set(cache) == set(model.hook_dict)
    declared = list(Model.SITES.values())
    for name, activation in cache.items():
        site, layer = Model.SITES.of(name)
        assert [each.hook.format(layer=layer) for each in declared].count(name) == 1, name
        assert (
            model.hook_dict[name].site is site and Model.SITES.hook_name(site.name, layer) == name
        )
        expected = sizes(model, inputs, site, layer)
        assert list(activation.shape) == [expected[axis] for axis in site.axes], name


def test_keys_are_made_of_the_key_side(seed: int) -> None:
    """What keys and values of the last layer are computed from is needed at every position: an edit
    at an earlier one there reaches the last position exactly where the table says so."""
    kind = random.Random(seed).choice(["plain", "parallel", "normalised queries"])
    model = small_model(seed, n_layers=2, **KINDS[kind]).double()
    inputs = small_inputs(model, seed)
    plain = model(inputs)[:, -1]
    for site in Model.SITES.values():
        name = site.hook.format(layer=1)
        if site.stack != "decoder" or not site.is_layered or name not in model.hook_dict:
            continue

        def edit(x: torch.Tensor, hook: object, axis: int = site.position_axis) -> torch.Tensor:
            part = x.narrow(axis, inputs.n_pos - 2, 1)
            part += torch.rand(part.shape, dtype=x.dtype)
            return x

        edited = model.run_with_hooks(inputs, fwd_hooks=[(name, edit)])[:, -1]
        same = torch.allclose(edited, plain, rtol=1e-9, atol=1e-9)  # in float64
        assert same != site.key_side, site.name


def test_a_hook_point_that_nobody_declared_lies_where_its_neighbours_do() -> None:
    for name, stack, shape, layer in (
        ("blocks.2.mlp.hook_post.hook_sae_acts", "decoder", "batch pos unit", 2),
        ("blocks.0.attn.hook_pattern.hook_sae_acts", "decoder", "batch query unit", 0),
        ("vision.blocks.11.hook_new", "tower", "tile pos unit", 11),
        ("projector.hook_out.hook_sae_acts", "connector", "all visual_token unit", None),
        ("hook_new", "decoder", "batch pos unit", None),
    ):
        site, found = Model.SITES.of(name)
        assert (site.stack, site.shape, found) == (stack, shape, layer), name


def test_later_layers_of_a_projector_have_sites() -> None:
    assert Model.SITES.of("projector.hook_pre_3") == (Model.SITES["projector.later_pre"], 3)
    assert Model.SITES.hook_name("projector.later_post", 2) == "projector.hook_post_2"


# Nobody else takes a name apart

TABLES = ("model/sites.py", "model/hook_aliases.py")  # the second: names of TransformerLens
WEIGHTS = ("checkpoints/", "editing/")  # these take names of parameters apart
TESTS = {"startswith", "endswith", "removeprefix", "removesuffix", "split", "rsplit", "partition"}
TESTS |= {"rpartition", "find", "index", "count", "search", "match", "fullmatch", "sub"}
HOOK = re.compile(r"\bhook_[a-z]|^(vision|projector|blocks|ln_final)\.|\bblocks\\?\.")
SHORT = {name for name in Model.SITES if "_" in name or "." in name}


def parsed_names(source: str) -> list[str]:
    """Lines that compare a hook point's or a site's name with what is written there."""
    found = []
    for node in ast.walk(ast.parse(source)):
        asked: list[ast.expr] = []
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            asked = node.args if node.func.attr in TESTS else []
        elif isinstance(node, ast.Compare):  # `name in table` only asks whether it is there
            looks_up = isinstance(node.ops[0], ast.In | ast.NotIn)
            asked = node.comparators if looks_up else [node.left, *node.comparators]
        texts = [
            part.value
            for each in asked
            for part in ast.walk(each)
            if isinstance(part, ast.Constant) and isinstance(part.value, str)
        ]
        compared = isinstance(node, ast.Compare)
        if any(HOOK.search(text) or (compared and text in SHORT) for text in texts):
            found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize(
    "line",
    [
        'name.endswith("hook_resid_post")',
        'name.startswith(("vision.", "projector."))',
        'name.startswith(f"blocks.{layer}.")',
        'name == "hook_embed"',
        'part.site in ("embed", "input_embed")',
        'part.site == "resid_post"',
        're.fullmatch(r"blocks\\.(\\d+)\\..*", name)',
    ],
)
def test_what_counts_as_parsing(line: str) -> None:
    assert parsed_names(line)
    assert not parsed_names('site.stack == "tower" and hook_name("resid_post", 3)')


def test_no_hook_name_is_parsed_outside_of_the_table() -> None:
    root = Path(mmlens.__file__).parent
    found = {
        f"{path.relative_to(root)}:{line}"
        for path in root.rglob("*.py")
        if not path.relative_to(root).as_posix().startswith((*TABLES, *WEIGHTS))
        for line in parsed_names(path.read_text("utf-8"))
    }
    assert not found
