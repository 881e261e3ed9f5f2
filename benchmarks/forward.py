"""Plain use: forward, run_with_cache, generate, loading, memory, beside Hugging Face and others.

    python benchmarks/forward.py --shape smollm2
    python benchmarks/forward.py --shape llava-7b      # on a GPU

A prompt of words alone, as long as the shape's prompt with its image, since all four programs
take that in the same way. The same weights, in one process, in turns; medians. Writes to
benchmarks/results/.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from measuring import machine, median_seconds, megabytes, seconds, table, write
from random_case import Case
from shapes import SHAPES, build
from torch import Tensor
from transformers import AutoModelForCausalLM

from mmlens import HookedMultimodalTransformer
from mmlens.utils.memory import peak_memory

SITES = ("resid_post", "attn_out", "mlp_out")
PROGRAMS = ("Hugging Face (SDPA)", "mmlens", "TransformerLens bridge", "nnsight")
Runs = dict[str, Callable[[], Any]]


def cached_by_hooks(lm: Any, tokens: Tensor) -> dict[str, Tensor]:
    """What `run_with_cache` does, by hand."""
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            kept[name] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = []
    for layer, block in enumerate(lm.model.layers):
        for site, module in zip(SITES, (block, block.self_attn, block.mlp), strict=True):
            handles.append(module.register_forward_hook(keep(f"{layer}.{site}")))
    lm(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return kept


def cached_by_nnsight(wrapped: Any, tokens: Tensor) -> list[Tensor]:
    """The same in nnsight."""
    kept = []
    with wrapped.trace(tokens, use_cache=False):
        for block in wrapped.model.layers:
            kept.append(block.self_attn.output[0].save())
            kept.append(block.mlp.output.save())
            kept.append(block.output.save())
    return kept


def runs(case: Case, tokens: Tensor, n_new: int) -> dict[str, Runs]:
    """What is measured: per task, a call of each program."""
    from nnsight import NNsight
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    model, lm, inner = case.model, case.decoder(), case.decoder()
    bridge = build_bridge_from_module(inner, type(inner).__name__, hf_config=inner.config)
    wrapped = NNsight(case.decoder())
    names = [f"blocks.{i}.hook_{site}" for i in range(model.cfg.n_layers) for site in SITES]
    greedy = {"max_new_tokens": n_new, "min_new_tokens": n_new, "do_sample": False}
    short = tokens[:, :64]

    def traced() -> Tensor:
        with wrapped.trace(tokens, use_cache=False):
            logits = wrapped.lm_head.output.save()
        return logits  # noqa: RET504 (nnsight reads the block's source)

    hf, ours, theirs, sight = PROGRAMS
    return {
        "forward": {
            hf: lambda: lm(tokens, use_cache=False).logits,
            ours: lambda: model(tokens),
            theirs: lambda: bridge(tokens),
            sight: traced,
        },
        "run_with_cache of three sites": {
            hf: lambda: cached_by_hooks(lm, tokens),
            ours: lambda: model.run_with_cache(tokens, names_filter=names),
            theirs: lambda: bridge.run_with_cache(tokens, names_filter=names),
            sight: lambda: cached_by_nnsight(wrapped, tokens),
        },
        f"generate {n_new} tokens after 64": {
            hf: lambda: lm.generate(short, **greedy),
            ours: lambda: model.generate(short, n_new, return_type="tokens", stop_at_eos=False),
        },
    }


def loading(case: Case, repeats: int) -> dict[str, float]:
    """Seconds to load the decoder's checkpoint from a local folder (warm file cache)."""
    with tempfile.TemporaryDirectory() as folder:
        case.decoder().save_pretrained(folder)
        dtype, device = case.model.cfg.dtype, case.device
        ways: Runs = {
            PROGRAMS[0]: lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(
                device
            ),
            PROGRAMS[1]: lambda: HookedMultimodalTransformer.from_pretrained(
                folder, dtype=dtype, device=device
            ),
        }
        return median_seconds(ways, device, repeats)


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="smollm2")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--new-tokens", type=int, default=32)
    options = parser.parse_args()
    case = build(options.shape)
    device, n_pos = case.device, case.clean.n_pos
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(5, 20_000, (1, n_pos), generator=generator).to(device)
    times: dict[str, dict[str, float]] = {}
    memory: dict[str, dict[str, int]] = {}
    with torch.no_grad():
        for task, each in runs(case, tokens, options.new_tokens).items():
            times[task] = median_seconds(each, device, options.repeats)
            memory[task] = {}
            for name, run in each.items():
                with peak_memory(device) as peak:
                    seconds(run, device)
                memory[task][name] = peak.size
        times["load the checkpoint"] = loading(case, 3)
    rows = []
    for task, each in times.items():
        for name, took in each.items():
            peak_size = memory.get(task, {}).get(name)
            rows.append(
                [
                    task,
                    name,
                    f"{took * 1e3:,.1f}",
                    f"{took / each[PROGRAMS[0]]:.3f}",
                    "" if peak_size is None else megabytes(peak_size),
                ]
            )
    header = ["", "program", "ms (median)", "ratio to Hugging Face", "peak memory, MB"]
    cfg = case.model.cfg
    text = (
        f"# Plain use: {case.name}\n\n"
        f"{machine(device)}; {str(cfg.dtype).removeprefix('torch.')}; {n_pos} tokens, one row, "
        f"{cfg.n_layers} layers. TransformerLens's bridge and nnsight load and generate through "
        "transformers. Memory is what is held above the weights; where torch had enough cached, "
        f"the resident set of a CPU process does not grow.\n\n{table(header, rows)}\n"
    )
    write(f"forward-{options.shape}-{device.type}", text)


if __name__ == "__main__":
    main()
