"""Random towers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL, as transformers has them, and what they
compute, under our names and in our order."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from hf_reference import heads, norm_activations, recorded, recorded_attention
from random_models import enliven
from small_models import BOS, IMAGE, PAD, small_config
from torch import Tensor, nn
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen2_5
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen2
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen3
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from mmlens.checkpoints.names import slots
from mmlens.checkpoints.towers.qwen_vl import (
    QWEN2_5_TOWER,
    QWEN2_TOWER,
    merger_config,
    qwen3_tower,
    tower_config,
)
from mmlens.inputs.checks import standard_spans
from mmlens.inputs.image_tokens import ImageTokens, grid_cells
from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.inputs.visual import Visual
from mmlens.model.transformer import HookedMultimodalTransformer

SOURCES = {"qwen2": qwen2, "qwen2.5": qwen2_5, "qwen3": qwen3}
Grids = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Choices:
    """Sizes of a random tower, small and odd."""

    merge: int
    patch: int
    d_head: int
    n_heads: int
    d_out: int
    side: int
    """Rows of learnt positions."""
    squares: int
    """Rows of squares in a window."""

    @classmethod
    def drawn(cls, chance: random.Random, d_out: int) -> Choices:
        return cls(
            merge=chance.choice([2, 2, 3]),
            patch=chance.choice([3, 5]),
            d_head=chance.choice([4, 12]),
            n_heads=chance.choice([1, 3]),
            d_out=d_out,
            side=chance.choice([5, 7]),
            squares=chance.choice([1, 2, 3]),
        )


def random_tower(family: str, chance: random.Random, d_out: int) -> Any:
    """Transformers' own vision model in float32, with lively weights."""
    sizes = Choices.drawn(chance, d_out)
    width = sizes.n_heads * sizes.d_head
    common: dict[str, Any] = {
        "depth": 4,
        "num_heads": sizes.n_heads,
        "patch_size": sizes.patch,
        "spatial_merge_size": sizes.merge,
        "temporal_patch_size": 2,
    }
    if family == "qwen2":
        config = Qwen2VLVisionConfig(
            embed_dim=width, hidden_size=sizes.d_out, mlp_ratio=3, **common
        )
        tower: Any = qwen2.Qwen2VisionTransformerPretrainedModel._from_config(config)
    elif family == "qwen2.5":
        window = sizes.squares * sizes.merge * sizes.patch
        config = Qwen2_5_VLVisionConfig(
            hidden_size=width,
            out_hidden_size=sizes.d_out,
            intermediate_size=17,
            window_size=window + chance.randrange(sizes.merge * sizes.patch),
            fullatt_block_indexes=chance.choice([[1], [0, 3], [2]]),
            **common,
        )
        tower = qwen2_5.Qwen2_5_VisionTransformerPretrainedModel._from_config(config)
    else:
        config = Qwen3VLVisionConfig(
            hidden_size=width,
            out_hidden_size=sizes.d_out,
            intermediate_size=17,
            num_position_embeddings=sizes.side**2,
            deepstack_visual_indexes=chance.choice([[0, 2], [1], [0, 1, 2], [1, 3]]),
            **common,
        )
        tower = qwen3.Qwen3VLVisionModel._from_config(config)
    enliven(tower)
    with torch.no_grad():
        weight = tower.patch_embed.proj.weight
        weight.normal_(std=weight[0].numel() ** -0.5)
        for block in tower.blocks:  # larger queries and keys
            block.attn.qkv.weight[: 2 * width] *= 1.5
    return tower


def random_grids(chance: random.Random, merge: int, n_images: int) -> list[tuple[int, int]]:
    """Of any shape; one in three has one row or one column of squares."""
    found = []
    for _ in range(n_images):
        rows, columns = chance.randint(1, 5), chance.randint(1, 5)
        if chance.random() < 1 / 3:
            rows, columns = chance.choice([(1, columns), (rows, 1)])
        found.append((merge * rows, merge * columns))
    return found


def random_patches(tower: Any, grids: Grids) -> dict[str, Tensor]:
    """What transformers' processor would give."""
    config = tower.config
    width = config.in_channels * config.temporal_patch_size * config.patch_size**2
    return {
        "pixel_values": torch.randn(sum(rows * columns for rows, columns in grids), width),
        "image_grid_thw": torch.tensor([(1, rows, columns) for rows, columns in grids]),
    }


def as_visual(batch: dict[str, Tensor]) -> Visual:
    """The same as the model takes it."""
    counts = tuple(int(grid.prod()) for grid in batch["image_grid_thw"])
    return Visual(batch, {"pixel_values": counts, "image_grid_thw": (1,) * len(counts)})


def model_of(family: str, tower: Any, d_model: int) -> HookedMultimodalTransformer:
    """A model with this tower and merger, by the name tables, and a random decoder."""
    chance = random.Random(int(torch.randint(2**31, ())))
    cfg = small_config(chance, d_model=d_model, n_layers=chance.randint(3, 5))
    cfg.vision = tower_config(tower.config)
    cfg.projector = merger_config(cfg.vision, tower.config, d_model)
    model = HookedMultimodalTransformer(cfg).requires_grad_(False)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.4)
    parameters = dict(model.named_parameters())
    table, filled = slots(cfg, table_of(family, cfg)), set()
    weights = tower.state_dict()
    for name, slot in table.items():
        assert slot.of(parameters).shape == weights[name].shape, name
        slot.fill(parameters, weights[name].detach())
        filled.add(slot.parameter)
    assert weights.keys() == table.keys()
    seeing = {name for name in parameters if name.partition(".")[0] in ("vision", "projector")}
    assert filled == seeing
    return model


def table_of(family: str, cfg: Any) -> dict[str, str]:
    """The name table of a tower and its mergers."""
    return {"qwen2": QWEN2_TOWER, "qwen2.5": QWEN2_5_TOWER, "qwen3": qwen3_tower(cfg)}[family]


def their_order(tower: Any, batch: dict[str, Tensor], windows: bool) -> Tensor:
    """Which of our positions each of transformers' patches has: ours lie row by row."""
    config, grids = tower.config, batch["image_grid_thw"]
    places = get_vision_position_ids(grids, config.spatial_merge_size)
    sizes = grids.prod(dim=1)
    columns = grids[:, 2].repeat_interleave(sizes)
    first = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    order = first + places[:, 0] * columns + places[:, 1]
    if not windows:
        return order
    index, _ = get_vision_window_index(
        grids, config.spatial_merge_size, config.window_size, config.patch_size
    )
    return order.unflatten(0, (-1, config.spatial_merge_size**2))[index].flatten()


@torch.no_grad()
def hf_tower_activations(family: str, tower: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Activations of transformers' tower in eager attention, under our names, in our order."""
    tower.set_attn_implementation("eager")
    seen: dict[str, Tensor] = {}
    attended: list[tuple[Tensor, ...]] = []
    with ExitStack() as stack:
        stack.enter_context(recorded(dict(tower.named_modules()), seen))
        stack.enter_context(recorded_attention(SOURCES[family], attended))
        output = tower(batch["pixel_values"], batch["image_grid_thw"])
    grouped = their_order(tower, batch, windows=False)
    order = their_order(tower, batch, windows=family == "qwen2.5")

    def ours(x: Tensor, order: Tensor = order) -> Tensor:
        return torch.empty_like(x).index_copy_(0, order, x)[None]

    by_head = heads(tower.blocks[0].attn.head_dim)
    found = {
        "vision.hook_patch_embed": ours(seen["patch_embed:out"], grouped),
        "vision.hook_embed": ours(seen["blocks.0:in"]),
    }
    if family == "qwen3":
        added = seen["blocks.0:in"] - seen["patch_embed:out"]
        found["vision.hook_pos_embed"] = ours(added)
    for layer, block in enumerate(tower.blocks):
        there, here = f"blocks.{layer}", f"vision.blocks.{layer}"
        mid = seen[f"{there}.norm2:in"]
        q, k, v = seen[f"{there}.attn.qkv:out"].chunk(3, dim=-1)
        found |= {
            f"{here}.hook_resid_pre": ours(seen[f"{there}:in"]),
            f"{here}.hook_resid_mid": ours(mid),
            f"{here}.hook_resid_post": ours(seen[f"{there}:out"]),
            f"{here}.hook_attn_out": ours(seen[f"{there}.attn:out"]),
            f"{here}.hook_mlp_out": ours(seen[f"{there}.mlp:out"]),
            f"{here}.attn.hook_q": ours(by_head(q)),
            f"{here}.attn.hook_k": ours(by_head(k)),
            f"{here}.attn.hook_v": ours(by_head(v)),
            f"{here}.attn.hook_z": ours(by_head(seen[f"{there}.attn.proj:in"])),
            **rows_of(norm_activations(f"{here}.ln1", block.norm1, seen[f"{there}:in"]), ours),
            **rows_of(norm_activations(f"{here}.ln2", block.norm2, mid), ours),
        }
        into, down = MLPS[family]
        found[f"{here}.mlp.hook_pre"] = ours(seen[f"{there}.mlp.{into}:out"])
        found[f"{here}.mlp.hook_post"] = ours(seen[f"{there}.mlp.{down}:in"])
        if family == "qwen2.5":
            found[f"{here}.mlp.hook_pre_linear"] = ours(seen[f"{there}.mlp.up_proj:out"])
    found |= attention_of(tower, attended, order)
    return found | merger_activations(family, tower, seen, output, batch["image_grid_thw"], ours)


MLPS = {
    "qwen2": ("fc1", "fc2"),
    "qwen2.5": ("gate_proj", "down_proj"),
    "qwen3": ("linear_fc1", "linear_fc2"),
}


def rows_of(activations: dict[str, Tensor], ours: Any) -> dict[str, Tensor]:
    return {name: ours(x) for name, x in activations.items()}


def attention_of(
    tower: Any, attended: list[tuple[Tensor, ...]], order: Tensor
) -> dict[str, Tensor]:
    """Scores and patterns over all pairs of patches, from those of each segment."""
    n_patches, found, rest = len(order), {}, list(attended)
    for layer in range(len(tower.blocks)):
        parts = []
        while sum(q.shape[2] for q, _, _ in parts) < n_patches:
            parts.append(rest.pop(0))
        q, k = (torch.cat([part[i] for part in parts], dim=2) for i in (0, 1))
        scores = torch.full((q.shape[1], n_patches, n_patches), -torch.inf)
        pattern, first = torch.zeros_like(scores), 0
        for query, key, weights in parts:
            own = slice(first, first + query.shape[2])
            first = own.stop
            scores[:, own, own] = (query @ key.mT)[0] / query.shape[-1] ** 0.5
            pattern[:, own, own] = weights[0]
        back = order.argsort()
        here = f"vision.blocks.{layer}.attn"
        found |= {
            f"{here}.hook_rot_q": q.transpose(1, 2)[:, back],
            f"{here}.hook_rot_k": k.transpose(1, 2)[:, back],
            f"{here}.hook_attn_scores": scores[:, back][:, :, back][None],
            f"{here}.hook_pattern": pattern[:, back][:, :, back][None],
        }
    assert not rest
    return found


def merger_activations(
    family: str,
    tower: Any,
    seen: dict[str, Tensor],
    output: Any,
    grids: Tensor,
    ours: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """What the merger computes, and those of deepstack; squares lie in reading order."""
    last = ours(seen["merger:in"])
    config = tower.config
    names = ("linear_fc1", "linear_fc2") if family == "qwen3" else ("mlp.0", "mlp.2")

    def squares(x: Tensor) -> Tensor:
        """Of windows, in the order of the output."""
        if family != "qwen2.5":
            return x[None]
        order, _ = get_vision_window_index(
            grids, config.spatial_merge_size, config.window_size, config.patch_size
        )
        return torch.empty_like(x).index_copy_(0, order, x)[None]

    def of(merger: nn.Module, there: str, here: str, out: Tensor) -> dict[str, Tensor]:
        norm: Any = merger.norm if family == "qwen3" else merger.ln_q
        given = seen[f"{there}:in"]
        merged = getattr(merger, "use_postshuffle_norm", False)
        if merged:
            given = given.view(-1, merger.hidden_size)
        return {
            f"{here}.hook_in": ours(seen[f"{there}:in"]),
            **rows_of(
                norm_activations(f"{here}.ln", norm, given),
                (lambda x: x[None]) if merged else ours,
            ),
            f"{here}.hook_pre": squares(seen[f"{there}.{names[0]}:out"]),
            f"{here}.hook_post": squares(seen[f"{there}.{names[1]}:in"]),
            f"{here}.hook_out": out[None],
        }

    found = of(tower.merger, "merger", "projector", output.pooler_output)
    streams = [last]
    for i, layer in enumerate(getattr(config, "deepstack_visual_indexes", [])):
        merger = tower.deepstack_merger_list[i]
        out = output.deepstack_features[i]
        found |= of(merger, f"deepstack_merger_list.{i}", f"projector.deepstack.{i}", out)
        streams.append(ours(seen[f"blocks.{layer}:out"]))
    found["vision.hook_out"] = torch.cat(streams, dim=-1)
    return found


def packed_inputs(
    model: HookedMultimodalTransformer,
    batch: dict[str, Tensor],
    images: Sequence[int],
    chance: random.Random,
) -> MultimodalInputs:
    """Prompts of random words with the images, so many in each row; padded on the left."""
    assert model.cfg.vision is not None
    merge, rows, placed = model.cfg.vision.merge_size, [], []
    grids = iter((batch["image_grid_thw"].reshape(-1, 3)[:, 1:] // merge).tolist())
    for row, n_images in enumerate(images):
        ids = [BOS, chance.randrange(2, IMAGE)]
        for _ in range(n_images):
            height, width = next(grids)
            placed.append(
                ImageTokens(len(ids), grid_cells((height, width)), ((height, width),), row=row)
            )
            ids += [IMAGE] * (height * width) + [chance.randrange(2, IMAGE)]
        rows.append(ids + [chance.randrange(2, IMAGE) for _ in range(chance.randint(2, 5))])
    longest = max(map(len, rows))
    tokens = torch.tensor([[PAD] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]).bool()
    placed = [replace(each, start=each.start + longest - len(rows[each.row])) for each in placed]
    return MultimodalInputs(
        tokens=tokens,
        attention_mask=mask,
        visual=as_visual(batch) if sum(images) else None,
        spans=standard_spans(tokens, mask, placed, bos_token_id=BOS),
        images=tuple(placed),
        image_token_id=IMAGE,
    )
