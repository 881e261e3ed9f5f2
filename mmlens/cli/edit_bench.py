"""`mmlens edit-bench`: editing methods side by side, by layer, or one edit after another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from mmlens.cli import options
from mmlens.cli.console import err, progress_bar, waiting
from mmlens.cli.console import out as console
from mmlens.cli.edit import MethodSettings, method_settings
from mmlens.cli.errors import UserError, explained
from mmlens.cli.trace import open_model

DEFAULT = "multedit,fine_tune,fine_tune@all,constrained_fine_tune"


def edit_bench(
    model: options.Model = "demo",
    data: Annotated[
        str,
        typer.Option(
            help="demo, demo:counterfactual, demo:invented; mmedit:FILE or vlkeb:FILE; or "
            "questions of your own (a jsonl file), whose answers are inserted."
        ),
    ] = "demo",
    images: Annotated[
        Path | None, typer.Option(help="The folder of the pictures; by default that of the file.")
    ] = None,
    methods: Annotated[
        str,
        typer.Option(
            help="Names separated by commas; NAME@2, NAME@2-4, NAME@all say which layers are "
            "edited together, NAME-last@23 that the key is at the last token."
        ),
    ] = DEFAULT,
    layers: Annotated[
        str | None,
        typer.Option(
            help="Layers like 0,3-5 for names without @, each by itself; by default 2 of 32, in "
            "proportion."
        ),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Edits.")] = 100,
    settings: MethodSettings = None,
    key_questions: Annotated[
        int, typer.Option(min=0, help="Further prompts of the fact that a method is given.")
    ] = 0,
    kept: Annotated[
        int, typer.Option(min=0, help="Neighbours that a method is given to preserve.")
    ] = 0,
    target_end: Annotated[
        str, typer.Option(help="What methods put behind every target, such as '.': where it ends.")
    ] = "",
    preserved: Annotated[
        str | None,
        typer.Option(
            help="Questions (demo, okvqa:FILE, a jsonl file) whose keys multedit keeps; never one "
            "that is asked."
        ),
    ] = None,
    n_preserved: Annotated[
        int, typer.Option(min=0, help="How many of them keep theirs where the edit's is.")
    ] = 200,
    n_preserved_whole: Annotated[
        int, typer.Option(min=0, help="How many further ones keep theirs at every position.")
    ] = 0,
    unrelated: Annotated[
        str | None,
        typer.Option(
            help="Questions whose accuracy tells what is damaged: okvqa:FILE, mmmu:FOLDER/SUBJECT, "
            "demo, ... separated by commas."
        ),
    ] = None,
    unrelated_images: Annotated[
        Path | None,
        typer.Option(help="The folder of their pictures; by default that of each file."),
    ] = None,
    annotations: Annotated[
        str | None, typer.Option(help="QUESTIONS.json,ANNOTATIONS.json of OK-VQA, for its answers.")
    ] = None,
    n_unrelated: Annotated[int, typer.Option(min=1, help="How many of each, per edit.")] = 8,
    texts: Annotated[
        Path | None, typer.Option(help="Text, a paragraph per line, for ROME's and MEMIT's keys.")
    ] = None,
    sequential: Annotated[
        bool, typer.Option(help="One edit after another, without taking them back.")
    ] = False,
    template: options.Template = "auto",
    seed: Annotated[int, typer.Option(help="Of all choices and the resampling.")] = 0,
    device: options.Device = None,
    dtype: options.Dtype = None,
    out: Annotated[Path, typer.Option(help="A folder for results, tables and figures.")] = Path(
        "mmlens-edit-bench"
    ),
) -> None:
    """Measure what edits do: efficacy, generalisation, specificity, portability, drift, cost.

    Every edit's results are kept in the folder as they are found: the same command goes on where it
    was stopped.
    """
    names = options.comma_list(methods, "--methods")
    chosen_layers = options.layer_list(layers)
    files = options.comma_list(annotations, "--annotations") if annotations else None
    if files is not None and len(files) != 2:
        raise UserError(f"--annotations: two files, questions and annotations, not {annotations!r}")
    named = [name.partition("@")[0] for name in names]
    plain = [name.partition("-")[0] for name in named]
    given = method_settings(settings, tuple(dict.fromkeys([*plain, *named])))
    folder = options.writable_folder(out)
    options.check_device(device)
    with waiting("loading mmlens ..."):
        from mmlens.editing.bench import EditBench
        from mmlens.editing.bench_settings import BenchSettings, Variant, open_cases
    chosen = BenchSettings(
        model=model,
        data=data,
        images=str(images) if images else None,
        methods=names,
        layers=tuple(chosen_layers) if chosen_layers is not None else None,
        limit=limit,
        method_settings=given,
        n_key_questions=key_questions,
        n_kept=kept,
        target_end=target_end,
        preserved=preserved,
        n_preserved=n_preserved,
        n_preserved_whole=n_preserved_whole,
        unrelated=options.comma_list(unrelated, "--unrelated") if unrelated else (),
        unrelated_images=str(unrelated_images) if unrelated_images else None,
        annotations=(files[0], files[1]) if files else None,
        n_unrelated=n_unrelated,
        texts=str(texts) if texts else None,
        template=options.template_of(template),
        sequential=sequential,
        seed=seed,
    )
    with explained():
        for name in names:
            Variant.parsed(name, [0])
        cases = open_cases(chosen)
    loaded = open_model(model, device, dtype)
    with explained():
        bench = EditBench(chosen, loaded, cases)
        _, counts = bench.chosen
    err().print(", ".join(f"{what} {n}" for what, n in counts.items()), style="dim")
    with progress_bar("editing") as moved, explained():
        found = bench.evaluations(folder, moved)
    with waiting("drawing ..."):
        written = bench.write(found, folder)
    for variant, each in found.items():
        for reason, n in each.metadata["failed"].items():
            err().print(f"{variant.label}: {n} edits could not be made: {reason}", soft_wrap=True)
    for path in written:
        console().print(escape(str(path)), soft_wrap=True)
