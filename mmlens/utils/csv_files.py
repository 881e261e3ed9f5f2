"""Tables as CSV files that a spreadsheet can open without running what is in them.

    write_csv(trace.to_dataframe(), "trace.csv"); read_csv("trace.csv")

A spreadsheet takes a text that begins with `=` for a formula, and a formula may run programs or
send what is in other cells. Such texts get an apostrophe, as OWASP advises against CSV injection.
"""

from __future__ import annotations

import csv
import re
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmlens.utils.files import write_atomically

if TYPE_CHECKING:
    import pandas as pd

FORMULA = re.compile(r"'*[=+\-@\t\r\n＝＋－＠]")
"""Texts that a spreadsheet would take for a formula; also those with apostrophes before that, so
that `read_csv` knows what was added."""
TRUTHS = {"True": True, "False": False}


def write_csv(table: pd.DataFrame, path: str | Path) -> Path:
    r"""Write a table without its index: texts in quotes, numbers without, and no formula.

    Example:
        >>> write_csv(pd.DataFrame({"label": ["=1+1"], "value": [-0.5]}), "it.csv").read_text()
        '"label","value"\n"\'=1+1",-0.5\n'
    """
    # Booleans as texts: QUOTE_NONNUMERIC would write them as numbers.
    safe = table.apply(
        lambda column: column if is_number(column) else column.astype(object).map(safe_cell)
    )
    return write_atomically(path, safe.to_csv(index=False, quoting=csv.QUOTE_NONNUMERIC))


def read_csv(path: str | Path) -> pd.DataFrame:
    """Return the table that `write_csv` wrote; a text that is missing comes back empty.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no such file; the message has the path.

    Example:
        >>> read_csv("runs/trace/summary/table.csv").query("layer == 7")
    """
    import pandas as pd

    content = Path(path).read_bytes()
    try:
        text = content.decode()
        lines = StringIO(text, newline="")
        rows = list(csv.reader(lines, quoting=csv.QUOTE_NONNUMERIC, strict=True))
        columns = [str(name) for name in rows[0]] if rows else []
        texts = [
            name
            for name, *values in zip(columns, *rows[1:], strict=True)
            if any(isinstance(value, str) and value for value in values)
        ]
        table = pd.read_csv(
            StringIO(text, newline=""),
            dtype=dict.fromkeys(texts, str),
            keep_default_na=False,
            na_values={name: [""] for name in columns if name not in texts},
        )
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path} is no table that mmlens wrote: {error}") from error
    for name in texts:
        values = table[name].map(original_cell)
        table[name] = values.map(TRUTHS) if values.isin(TRUTHS).all() else values
    return table


def is_number(column: pd.Series) -> bool:
    """Return whether a column holds numbers and no booleans."""
    from pandas.api.types import is_bool_dtype, is_numeric_dtype

    return is_numeric_dtype(column) and not is_bool_dtype(column)


def safe_cell(value: Any) -> Any:
    """Return a text that is no formula; what is no text stays."""
    if isinstance(value, bool):
        return str(value)
    return f"'{value}" if isinstance(value, str) and FORMULA.match(value) else value


def original_cell(text: str) -> str:
    """Return what `safe_cell` was given."""
    return text[1:] if text.startswith("'") and FORMULA.match(text) else text
