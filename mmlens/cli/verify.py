"""`mmlens verify`: what a checkpoint is, and whether it gives the numbers that it should."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from mmlens.cli import options, trace
from mmlens.cli.console import out, waiting
from mmlens.cli.errors import explained

if TYPE_CHECKING:
    from mmlens.checkpoints.parity import Check, ReferenceRun
    from mmlens.config import TransformerConfig, VisionConfig
    from mmlens.model.transformer import HookedMultimodalTransformer

MARKS = {True: "[green]✓[/]", False: "[red]✗[/]", None: " "}
SEED = 0


def verify(
    model: Annotated[
        str,
        typer.Argument(
            help='A checkpoint folder, a GGUF file, a name on the Hugging Face hub, "demo" or '
            '"demo-tuned".',
            show_default=False,
        ),
    ],
    device: options.Device = None,
    dtype: options.Dtype = None,
) -> None:
    """Say what a checkpoint is, and compare it with transformers on a random prompt.

    Where transformers knows the format: ids and pixels, embeddings, every block's residual, logits
    and generated tokens. For every format: are all hooks alive? Exit code 1 if anything fails. Half
    precision is judged block by block; --dtype float32 is the strict comparison.
    """
    options.check_device(device)
    with waiting("loading mmlens ..."):
        from mmlens.checkpoints import parity, processor_parity
    checks, reference = reference_run(model, device, dtype)
    loaded = trace.open_model(model, device, dtype)
    with waiting("comparing ..."):
        if reference is not None:
            if loaded.vision is not None and loaded.checkpoint is not None:
                folder = loaded.checkpoint
                checks.append(processor_parity.compare_processors(loaded.processor, folder, SEED))
            checks += parity.compare(loaded, reference)
        elif not checks:
            checks += parity.without_reference(loaded, SEED)
    with waiting("perturbing every hook ..."):
        checks.append(parity.hooks_alive(loaded, SEED))
    out().print(checks_table(loaded, checks))
    if any(check.passed is False for check in checks):
        raise typer.Exit(1)


def reference_run(
    model: str, device: str | None, dtype: str | None
) -> tuple[list[Check], ReferenceRun | None]:
    """Return what transformers computes; the check that failed if it cannot open its own format."""
    import torch

    from mmlens.checkpoints import parity
    from mmlens.inputs.image_files import one_line

    with explained():
        reference = parity.find_reference(model)
    if reference is None:
        return [], None
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        with waiting("running transformers ..."):
            wanted = getattr(torch, dtype) if dtype else None
            return [], parity.run_reference(reference, where, wanted, SEED)
    except Exception as error:  # whatever a file that does not fit leads transformers to
        why = f"transformers could not run it: {one_line(error)}"
        return [parity.Check("parity", False, why)], None


def checks_table(model: HookedMultimodalTransformer, checks: list[Check]) -> Table:
    """What the model is, and below it what was checked."""
    rows = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    rows.add_column(width=1)
    rows.add_column(style="dim")
    rows.add_column(overflow="fold")
    for name, value in facts(model).items():
        rows.add_row("", name, escape(value))
    rows.add_section()
    for check in checks:
        style = "red" if check.passed is False else ""
        rows.add_row(MARKS[check.passed], check.name, escape(check.detail), style=style)
    return rows


def facts(model: HookedMultimodalTransformer) -> dict[str, str]:
    """The model in words and numbers."""
    from mmlens.checkpoints.load import format_of
    from mmlens.inputs.layouts import image_layout

    cfg = model.cfg
    family = cfg.original_architecture
    if model.checkpoint is not None:
        family += f" ({format_of(model.checkpoint).name})"
    found = {
        "model": cfg.model_name,
        "family": family,
        "decoder": f"{sizes(cfg)}, vocabulary {cfg.d_vocab}, context {cfg.n_ctx}",
    }
    if cfg.vision is not None and cfg.projector is not None:
        found |= {
            "vision tower": f"{sizes(cfg.vision)}, {patches(cfg.vision)}; features of layer "
            f"{', '.join(map(str, cfg.vision.feature_layers))}",
            "projector": f"{cfg.projector.n_layers} layers, {cfg.projector.d_in} to "
            f"{cfg.projector.d_out}",
            "visual tokens": image_layout(cfg).description(),
        }
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    kind = str(cfg.dtype).removeprefix("torch.")
    return found | {"parameters": f"{n_parameters:,}", "dtype": f"{kind}, on {cfg.device}"}


def patches(cfg: VisionConfig) -> str:
    """What images a tower takes."""
    if cfg.packed:
        return f"images of any size in patches of {cfg.patch_size} x {cfg.patch_size} pixels"
    (height, width), (rows, columns) = cfg.image_size, cfg.grid
    return f"{height} x {width} pixels in {rows} x {columns} patches"


def sizes(cfg: TransformerConfig) -> str:
    """Layers, widths and heads."""
    grouped = "" if cfg.n_kv_heads == cfg.n_heads else f" ({cfg.n_kv_heads} of keys and values)"
    return (
        f"{cfg.n_layers} layers, d_model {cfg.d_model}, {cfg.n_heads} heads{grouped} of "
        f"{cfg.d_head}, d_mlp {cfg.d_mlp}"
    )
