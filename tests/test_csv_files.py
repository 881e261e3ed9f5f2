"""Tables as CSV: no text is a formula, and what is read is what was written."""

from __future__ import annotations

import csv
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_report_page import contribution_of, prompt_of, trace_of

from mmlens.utils.csv_files import read_csv, write_csv

STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
CHARACTERS = st.sampled_from([*STARTS, *"'\",;a1 é", "\u2028", "\x85", "NaN", "None", "True"])
TEXTS = st.lists(CHARACTERS, max_size=6).map("".join)
ROWS = st.lists(
    st.tuples(TEXTS, st.integers(-9, 9), st.floats(allow_nan=True), st.booleans()), min_size=1
)


@settings(max_examples=25)
@given(ROWS)
def test_what_is_read_is_what_was_written(tmp_path_factory, rows):
    table = pd.DataFrame(rows, columns=["text, or so", "whole", "real", "truth"])
    assume(not table["text, or so"].isin(["True", "False"]).all())  # nobody can tell from truths
    path = write_csv(table, tmp_path_factory.mktemp("csv") / "it.csv")
    found = read_csv(path)
    if not table["text, or so"].any():  # nobody can tell empty texts from missing numbers
        table["text, or so"] = np.nan
        found["text, or so"] = np.nan
    pd.testing.assert_frame_equal(found, table, check_dtype=False)
    assert found["whole"].dtype == np.int64 and found["truth"].dtype == bool


@settings(max_examples=25)
@given(ROWS)
def test_no_cell_is_a_formula(tmp_path_factory, rows):
    """Whatever other readers are told about quotes; numbers are numbers for all of them."""
    path = write_csv(
        pd.DataFrame(rows, columns=["text", "whole", "real", "truth"]),
        tmp_path_factory.mktemp("csv") / "it.csv",
    )
    with path.open(encoding="utf-8", newline="") as stream:
        cells = list(csv.reader(stream))[1:]
    for (text, whole, real, _), row in zip(cells, rows, strict=True):
        assert not text.startswith(STARTS)
        assert int(whole) == row[1]
        assert real == "" if np.isnan(row[2]) else float(real) == row[2]


@pytest.mark.parametrize("start", STARTS)
def test_tables_of_results(tmp_path, seed, start):
    """Tokens and answers are texts of others."""
    formula = f"{start}cmd|' /C calc'!A0"
    prompt = prompt_of(words=(" The", formula, "'+1", " this", "'s", " is"))
    trace = replace(trace_of(prompt), answer=formula)
    for result in (trace, contribution_of(prompt)):
        table = result.to_dataframe()
        path = write_csv(table, tmp_path / "it.csv")
        found = read_csv(path)
        lists = table.columns[table.map(lambda x: isinstance(x, list)).any()]
        table[lists] = table[lists].astype(str)
        pd.testing.assert_frame_equal(found, table, check_dtype=False, rtol=1e-6)
        other = pd.read_csv(path, keep_default_na=False)
        labels = other.select_dtypes(exclude="number")
        assert not labels.map(lambda x: str(x).startswith(STARTS)).any(axis=None)
        assert other.select_dtypes("number").shape[1] == table.select_dtypes("number").shape[1]


def test_categories_and_missing_values(tmp_path):
    table = pd.DataFrame(
        {
            "site": pd.Categorical(["=a", "b", "=a"]),
            "role": ["x", None, "-y"],
            "mean": np.array([0.5, np.nan, -np.inf], dtype=np.float32),
        }
    )
    found = read_csv(write_csv(table, tmp_path / "it.csv"))
    assert found["site"].tolist() == ["=a", "b", "=a"]
    assert found["role"].tolist() == ["x", "", "-y"]
    np.testing.assert_array_equal(found["mean"], table["mean"].astype(float))


@pytest.mark.parametrize("content", ['"a"\n"b","c"\n', "a,b\n1,2\n", '"a"\n"b\n', '"a"\nx\n'])
def test_other_files(tmp_path, content):
    path = tmp_path / "it.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"it\.csv is no table that mmlens wrote"):
        read_csv(path)
    with pytest.raises(OSError, match="nowhere"):
        read_csv(tmp_path / "nowhere.csv")


def test_files_are_written_whole_or_not_at_all(tmp_path, seed):
    path = Path(tmp_path / "gone" / "it.csv")
    with pytest.raises(OSError, match="gone"):
        write_csv(pd.DataFrame({"a": [random.random()]}), path)
