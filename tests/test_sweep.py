"""Sweeps: rows are what the analyses give by hand; folders, failures, plans, summaries."""

from __future__ import annotations

import json
import random
import shutil
import threading
from collections import Counter
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sweep_cases import (
    SETTINGS,
    assert_same,
    in_order,
    made_model,
    made_questions,
    swept,
    write_image,
)

from mmlens import VisualQuestion, causal_trace, role_positions, swap_span
from mmlens.analyses.aggregation import aggregate_traces
from mmlens.analyses.attention_contribution import attention_contribution
from mmlens.inputs.processor import Processor
from mmlens.sweeps import (
    ContributionsTask,
    FolderInUse,
    OtherSettings,
    Sweep,
    Task,
    TraceTask,
    sweep,
)
from mmlens.sweeps.plan import Turns, data_hash, plan
from mmlens.sweeps.task import Columns


@pytest.fixture
def model(seed):
    return made_model(seed)


@pytest.fixture
def questions(tmp_path):
    return made_questions(tmp_path)


# Rows


def prepared(model, question):
    pictures = question.open_images()
    return model.prepare(question.prompt(), pictures, spans=question.spans(), template="auto")


def by_hand(model, question, task, window, **options):
    """The trace of each role, and the roles."""
    inputs = prepared(model, question)
    roles = dict(role_positions(inputs))
    if question.text_constraints:
        roles["text constraint"] = inputs.span("text_constraint")
    kept = {name: roles[name] for name in task.roles if name in roles}
    corrupted = swap_span(model, inputs, "constraint", "Paris")
    positions = list(kept.values())
    options |= {"sites": task.sites, "window": window, "positions": positions}
    return causal_trace(model, inputs, corrupted, **options), kept


def cells_at(table, **where):
    for name, value in where.items():
        table = table[table[name] == value]
    return table.sort_values("layer")


def test_traces_are_those_by_hand(model, questions, tmp_path):
    task, questions = TraceTask(windows=(1, 2)), questions[:4]
    found = in_order(sweep(task, model, questions, tmp_path / "out", shard_size=3, progress=False))
    counts = Counter()
    for row, question in enumerate(questions):
        for window in task.windows:
            trace, roles = by_hand(model, question, task, window, method="naive")
            for r, role in enumerate(roles):
                for s, site in enumerate(trace.sites):
                    cells = cells_at(found, question=row, window=window, role=role, site=site)
                    np.testing.assert_allclose(cells["restored"], trace.restored[s, r], atol=1e-5)
                    assert (cells["n_positions"] == len(roles[role])).all()
                    counts["rows"] += len(cells)
            cells = cells_at(found, question=row, window=window)
            np.testing.assert_allclose(cells["clean"], trace.clean, atol=1e-5)
            np.testing.assert_allclose(cells["corrupted"], trace.corrupted, atol=1e-5)
            assert set(cells["answer"]) == {trace.answer}
            assert set(cells["source"]) == {question.source}
            assert set(cells["cluster"]) == {question.subject}
    assert counts["rows"] == len(found)
    np.testing.assert_allclose(
        found["indirect_effect"], found["restored"] - found["corrupted"], atol=1e-6
    )


def test_answers_are_judged_where_they_are_known(model, questions, tmp_path):
    found = in_order(swept(model, questions, tmp_path / "out"))
    for row, question in enumerate(questions):
        judged = set(found.loc[found["question"] == row, "is_right"])
        if not question.answers:
            assert judged == {None}
            continue
        said = model.generate(prepared(model, question), max_new_tokens=6)
        assert judged == {question.is_right(said)}


def test_contributions_are_those_by_hand(model, questions, tmp_path):
    found = in_order(
        sweep("contributions", model, questions, tmp_path / "out", shard_size=3, progress=False)
    )
    n_layers = model.cfg.n_layers
    assert len(found) == len(questions) * 2 * n_layers
    for row, question in enumerate(questions):
        inputs = prepared(model, question)
        for source, role, span in (
            ("image", "constraint", "constraint"),
            ("constraint", "last token", "last"),
        ):
            cells = cells_at(found, question=row, source_role=source, role=role)
            values = attention_contribution(model, inputs, source, span).values.double()
            totals = values.mean(dim=1).sum(dim=-1)
            np.testing.assert_allclose(cells["total"], totals, rtol=1e-4)
            np.testing.assert_allclose(cells["layer_share"].sum(), 1.0, atol=1e-5)
        confidence = model(inputs)[0, -1].softmax(-1).max()
        rows = found[found["question"] == row]
        np.testing.assert_allclose(rows["confidence"], confidence, atol=1e-5)


def test_the_manifest_names_the_columns(model, questions, tmp_path):
    for task in ("trace", "contributions"):
        found = sweep(task, model, questions[:2], tmp_path / task, progress=False)
        schema = found.table().schema
        assert list(found.manifest["columns"]) == schema.names
        keys = ["question", *found.manifest["keys"]]
        assert not found.results().duplicated(keys).any()
        assert set(found.manifest["measures"]) <= set(schema.names)


@pytest.mark.parametrize("reader", ["pandas", "polars", "duckdb"])
def test_results_are_read_by_others_while_the_sweep_runs(
    model, questions, tmp_path, reader, require
):
    out, seen = tmp_path / "out", []

    @dataclass(frozen=True, kw_only=True)
    class Watching(TraceTask):
        def rows(self, model, asked, carried):
            if list((out / "results").iterdir()):
                (out / ".unfinished" / ".shard-000099.parquet-x").write_bytes(b"PAR1")
                seen.append(read_with(reader, out))
            return super().rows(model, asked, carried)

    if reader != "pandas":
        pytest.importorskip(reader)
    found = sweep(Watching(), model, questions, out, shard_size=3, progress=False)
    (out / ".unfinished" / ".shard-000099.parquet-x").unlink()
    assert seen and seen == sorted(seen)
    assert 0 < seen[0] < read_with(reader, out) == len(found.results())


def read_with(reader: str, out: Path) -> int:
    """Rows that a program sees which knows nothing of mmlens."""
    if reader == "pandas":
        return len(pd.read_parquet(out / "results"))
    if reader == "polars":
        import polars

        return len(polars.read_parquet(out / "results" / "*.parquet"))
    import duckdb

    return duckdb.sql(f"select count(*) from '{out}/results/*.parquet'").fetchall()[0][0]


# Failures


@dataclass(frozen=True, kw_only=True)
class Counting(Task):
    """One row per question, and trouble where its words ask for it."""

    name: ClassVar[str] = "counting"
    columns: ClassVar[Columns] = {"value": pa.float32()}
    measures: ClassVar[tuple[str, ...]] = ("value",)

    def rows(self, model, asked, carried):
        words = asked.question.question
        if "nan" in words:
            value = float("nan")
        elif "crash" in words:
            raise RuntimeError("a mistake of somebody's")
        elif "memory" in words and (carried.batch_rows or 100) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        elif "never" in words:
            raise MemoryError
        else:
            value = float(carried.batch_rows or 100)
        return [{"site": "none", "role": "none", "layer": 0, "window": 1, "value": value}]


def test_a_question_that_fails_is_a_row_and_the_others_go_on(model, tmp_path):
    picture = write_image(tmp_path / "good.png", 1)
    (tmp_path / "cut.png").write_bytes(picture.read_bytes()[:90])
    texts = ["fine", "give nan", "crash", "memory", "never", "fine again"]
    asked = [VisualQuestion(text, picture, source=text) for text in texts]
    asked += [
        VisualQuestion("damaged", tmp_path / "cut.png"),
        VisualQuestion("missing", tmp_path / "no.png"),
        VisualQuestion("who made it", picture, visual_constraint="this place"),
    ]
    found = sweep(Counting(), model, asked, tmp_path / "out", shard_size=20, progress=False)
    failures = found.failures().set_index("question")
    assert failures["reason"].to_dict() == {
        1: "not finite",
        2: "error",
        4: "out of memory",
        6: "unreadable image",
        7: "unreadable image",
        8: "constraint not found",
    }
    assert "a mistake of somebody's" in failures.loc[2, "message"]
    assert "no.png" in failures.loc[7, "message"]
    assert (found.n_done, found.n_failed) == (9, 6)
    values = found.results().set_index("question")["value"].to_dict()
    # Where memory ran out fewer rows are computed at once, for the rest of the shard.
    assert values == {0: 100.0, 3: 8.0, 5: 8.0}
    assert "crash" in (tmp_path / "out" / "log.txt").read_text()


def test_questions_without_a_constraint_cannot_be_traced(model, questions, tmp_path):
    bare = [replace(questions[0], visual_constraint=""), questions[1]]
    found = swept(model, bare, tmp_path / "out")
    (failure,) = found.failures().to_dict("records")
    assert (failure["question"], failure["reason"]) == (0, "cannot be asked")
    assert "no visual constraint" in failure["message"]


def test_repaired_images_are_done_when_asked_for(model, questions, tmp_path):
    expected = swept(model, questions, tmp_path / "expected")
    picture = questions[0].image
    whole = picture.read_bytes()
    picture.write_bytes(whole[:60])
    broken = swept(model, questions, tmp_path / "out")
    assert broken.n_failed == sum(question.image == picture for question in questions)
    picture.write_bytes(whole)
    assert swept(model, questions, tmp_path / "out").n_failed == broken.n_failed
    assert_same(swept(model, questions, tmp_path / "out", retry_failures=True), expected)


# Reading ahead


def test_images_are_read_while_others_are_computed(model, questions, tmp_path):
    read: Counter[str] = Counter()
    all_read = threading.Event()

    @dataclass(frozen=True, kw_only=True)
    class Slow(Counting):
        def read(self, processor, question):
            assert isinstance(processor, Processor)
            assert processor.tokenizer is not model.tokenizer  # which the computing thread uses
            read[threading.current_thread().name.partition("_")[0]] += 1
            if sum(read.values()) == 4:  # of the first two shards
                all_read.set()
            return super().read(processor, question)

        def rows(self, model, asked, carried):
            assert all_read.wait(60), "nothing was read in the meantime"
            return super().rows(model, asked, carried)

    found = sweep(Slow(), model, questions[:6], tmp_path / "out", shard_size=2, progress=False)
    assert found.n_failed == 0
    assert read == {"reading": 6}


# Which questions, in which order


@given(
    pictures=st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=40),
    size=st.integers(1, 9),
    limit=st.none() | st.integers(1, 50),
    chosen=st.integers(0, 2**31),
)
def test_every_question_is_in_one_shard_beside_its_neighbours(pictures, size, limit, chosen):
    asked = [VisualQuestion(f"{i}", f"{name}.png") for i, name in enumerate(pictures)]
    shards = plan(asked, limit=limit, seed=chosen, shard_size=size)
    assert [shard.index for shard in shards] == list(range(len(shards)))
    planned = [each for shard in shards for each in shard.questions]
    n = len(asked) if limit is None else min(limit, len(asked))
    assert len({each.row for each in planned}) == len(planned) == n
    assert all(each.question.question == str(each.row) for each in planned)
    assert all(1 <= len(shard.questions) <= size for shard in shards)
    names = [each.images for each in planned]
    changes = sum(one != other for one, other in pairwise(names))
    assert changes == len(set(names)) - 1  # the same image without a break
    for name, count in Counter(names).items():
        where = [shard for shard in shards if any(each.images == name for each in shard.questions)]
        assert len(where) == 1 or count > size
    again = plan(asked, limit=limit, seed=chosen, shard_size=size)
    assert data_hash(again) == data_hash(shards)


@given(n=st.integers(0, 30), n_workers=st.integers(1, 5), chosen=st.integers(0, 2**31))
def test_shards_are_done_once_whoever_is_lost(n, n_workers, chosen):
    choices = random.Random(chosen)
    shards = plan([VisualQuestion(f"{i}", None) for i in range(n + 1)], shard_size=1)
    turns, done, at_work = Turns(shards), Counter(), {}
    new_worker = n_workers
    idle = list(range(n_workers))
    while True:
        for worker in list(idle):
            turn = turns.take(worker)
            if turn is not None:
                idle.remove(worker)
                at_work[worker] = turn[0]
                assert turn[1] is None or turn[1].index != turn[0].index
        if not at_work:
            break
        worker = choices.choice(list(at_work))
        shard = at_work.pop(worker)
        if choices.random() < 0.2:  # it dies
            turns.give_back(worker)
            turns.give_back(None, shard)
            idle.append(new_worker)
            new_worker += 1
        else:
            done[shard.index] += 1
            idle.append(worker)
    assert done == {shard.index: 1 for shard in shards}


def test_an_idle_worker_takes_what_another_was_only_told_of():
    shards = plan([VisualQuestion(f"{i}", None) for i in range(2)], shard_size=1)
    turns = Turns(shards)
    assert turns.take("one") == (shards[0], shards[1])
    assert turns.take("two") == (shards[1], None)
    assert turns.take("one") is None


# The folder


def test_going_on_does_nothing_twice(model, questions, tmp_path):
    out = tmp_path / "out"
    first = swept(model, questions, out)
    files = {path: path.stat().st_mtime_ns for path in (out / "results").iterdir()}
    victim = random.choice(list(files))
    victim.unlink()
    again = swept(model, questions, out)
    changed = {path for path in files if path.stat().st_mtime_ns != files[path]}
    assert changed == {victim}
    assert first.n_questions == again.n_done


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"windows": (2,)}, "settings.windows"),
        ({"sites": ("attn_out",)}, "settings.sites"),
        ({"template": None}, "settings.template"),
        ({"shard_size": 2}, "shards"),
        ({"limit": 5}, "data"),
    ],
)
def test_other_settings_are_refused(model, questions, tmp_path, changes, named):
    swept(model, questions, tmp_path / "out", template="{question}")
    before = sorted((tmp_path / "out" / "results").iterdir())
    with pytest.raises(OtherSettings, match=named):
        swept(model, questions, tmp_path / "out", **{"template": "{question}"} | changes)
    assert sorted((tmp_path / "out" / "results").iterdir()) == before


def test_other_weights_and_other_questions_are_refused(model, questions, tmp_path):
    out = tmp_path / "out"
    swept(model, questions, out)
    with pytest.raises(OtherSettings, match="data"):
        swept(model, [*questions[:-1], replace(questions[-1], answers=("b",))], out)
    weight = random.choice([p for p in model.parameters() if p.numel()])
    weight.data.view(-1)[random.randrange(weight.numel())] += 1
    with pytest.raises(OtherSettings, match="model"):
        swept(model, questions, out)


def test_a_data_set_may_move(model, questions, tmp_path):
    expected = swept(model, questions, tmp_path / "out")
    folder = questions[0].image.parent
    moved = tmp_path / "elsewhere" / folder.name
    moved.mkdir(parents=True)
    for picture in folder.glob("*.png"):
        shutil.copy(picture, moved)
    there = [replace(each, image=moved / each.image.name) for each in questions]
    assert_same(swept(model, there, tmp_path / "out"), expected)


def test_versions_of_other_packages_are_noted(model, questions, tmp_path):
    path = tmp_path / "out" / "manifest.json"
    swept(model, questions, tmp_path / "out")
    manifest = json.loads(path.read_text())
    old = manifest["versions"][0] | {"torch": "0.1"}
    path.write_text(json.dumps(manifest | {"versions": [old]}))
    found = swept(model, questions, tmp_path / "out")
    assert found.manifest["versions"] == [old, *manifest["versions"]]


def test_two_sweeps_cannot_write_to_one_folder(model, questions, tmp_path):
    @dataclass(frozen=True, kw_only=True)
    class Nested(Counting):
        def rows(self, model, asked, carried):
            with pytest.raises(FolderInUse, match="another sweep"):
                swept(model, questions, tmp_path / "out")
            return super().rows(model, asked, carried)

    found = sweep(Nested(), model, questions[:1], tmp_path / "out", progress=False)
    assert found.n_failed == 0


def test_what_is_given_wrongly_is_said(model, questions, tmp_path):
    out = tmp_path / "out"
    for task, options, message in [
        ("tracing", {}, "trace, contributions"),
        ("trace", {"roles": ("constrain",)}, "constrain"),
        ("trace", {"windows": (0,)}, "windows"),
        ("contributions", {"pairs": (("image", "end"),)}, "end"),
        (TraceTask(), {"windows": (1,)}, "settings already"),
        ("trace", {"limit": 0}, "limit 0"),
        ("trace", {"ray": "local"}, "name or folder"),
    ]:
        with pytest.raises(ValueError, match=message):
            sweep(task, model, questions, out, **options)
    with pytest.raises(TypeError, match="pairs"):
        sweep("trace", model, questions, out, pairs=(("image", "constraint"),))
    with pytest.raises(FileNotFoundError, match="no sweep"):
        Sweep(tmp_path / "nothing")


# Summaries


def test_the_summary_is_that_of_the_traces(model, questions, tmp_path):
    found = swept(model, questions, tmp_path / "out", windows=(1, 2))
    summary = found.summarize(samples=50, seed=3)
    task = TraceTask(sites=SETTINGS["sites"], roles=SETTINGS["roles"])
    for window in (1, 2):
        made = [by_hand(model, question, task, window) for question in questions]
        profile = aggregate_traces(
            [trace for trace, _ in made],
            [roles for _, roles in made],
            clusters=[question.subject for question in questions],
            samples=50,
            seed=3,
        )
        keys = ["site", "role", "layer"]
        ours = summary.table[summary.table["window"] == window].astype({"site": str, "role": str})
        theirs = profile.to_dataframe()
        both = ours.merge(theirs, on=keys, suffixes=("", "_traces"), validate="1:1")
        assert len(both) == len(ours) == len(theirs)
        for name in ("n", "mean", "low", "high"):
            np.testing.assert_allclose(both[name], both[f"{name}_traces"], atol=2e-5)
    assert summary.counts["used"] == len(questions)
    best = summary.table.groupby(["site", "role", "window"], observed=True)["mean"].max()
    assert sorted(summary.peaks["mean"]) == sorted(best)


def test_summaries_leave_out_what_they_are_told_to(model, questions, tmp_path):
    found = swept(model, questions, tmp_path / "out")
    rows = in_order(found)
    firsts = rows.drop_duplicates("question").set_index("question")
    gaps = firsts["clean"] - firsts["corrupted"]
    gap = float(np.median(gaps))
    summary = found.summarize(minimum_gap=gap, samples=20)
    assert summary.counts["used"] == (gaps >= gap).sum()
    assert summary.counts["gap too small"] == (gaps < gap).sum()
    n_right = (firsts["is_right"] == True).sum()  # noqa: E712 (it may be None)
    if n_right:
        assert found.summarize(only_right=True, samples=20).counts["used"] == n_right
    else:
        with pytest.raises(ValueError, match="filters"):
            found.summarize(only_right=True)


def test_summaries_of_contributions(model, questions, tmp_path):
    found = sweep("contributions", model, questions, tmp_path / "out", progress=False)
    summary = found.summarize(samples=20)
    assert set(summary.figures) == {"total", "late_share", "largest_share", "layer_share"}
    means = in_order(found).groupby(["source_role", "layer"])["total"].mean()
    rows = summary.table[summary.table["measure"] == "total"].set_index(["source_role", "layer"])
    np.testing.assert_allclose(rows["mean"].loc[means.index], means, rtol=1e-5)
    with pytest.raises(ValueError, match="no corrupted runs"):
        found.summarize(minimum_gap=0.1)


def test_settings_are_in_the_manifest(model, questions, tmp_path):
    found = swept(model, questions, tmp_path / "out")
    settings = found.manifest["identity"]["settings"]
    assert settings["roles"] == list(SETTINGS["roles"])
    assert settings == TraceTask(sites=("mlp_out",), roles=SETTINGS["roles"]).settings()
    assert ContributionsTask().settings()["pairs"][0] == ["image", "constraint"]
