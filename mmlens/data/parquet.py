"""Parquet files of rows with images in them, as the hub has them.

    file = ParquetFile("color-00000-of-00001.parquet")
    _, row = next(file.rows())
    file.image(row["original_image"])    # a PIL image that is not decoded yet

`rows` gives `StoredImage`s, so that a file's images need not fit into memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from mmlens.inputs.image_files import one_line, open_image


@dataclass(frozen=True)
class StoredImage:
    """Where an image lies in a parquet file."""

    group: int
    """Of rows."""
    row: int
    """Within the group."""
    column: str


class ParquetFile:
    """A parquet file of which one group of rows at a time is in memory."""

    def __init__(self, path: str | Path) -> None:
        """Open a file.

        Raises:
            FileNotFoundError: no such file.
            ValueError: no parquet file.
        """
        import pyarrow
        import pyarrow.parquet

        try:
            self._file = pyarrow.parquet.ParquetFile(path)
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"{path} is no parquet file: {one_line(error)}") from None
        self._group: tuple[int, Any] = (-1, None)

    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield (place, fields) of every row; an image's field says where it lies in the file."""
        number = 0
        for group in range(self._file.num_row_groups):
            for index, fields in enumerate(self._rows_of(group).to_pylist()):
                yield (
                    f"row {number}",
                    {
                        name: StoredImage(group, index, name) if is_image(value) else value
                        for name, value in fields.items()
                    },
                )
                number += 1

    def image(self, place: StoredImage) -> Any:
        """Return an image of the file; see `embedded_image`."""
        table = self._rows_of(place.group)
        return embedded_image(table[place.column][place.row].as_py())

    def _rows_of(self, group: int) -> Any:
        held, table = self._group  # in one step, for threads may share the file
        if held != group:
            table = self._file.read_row_group(group)
            self._group = (group, table)
        return table


def is_image(value: Any) -> bool:
    """Whether a field is an image: the bytes of a file, or a struct of bytes and a path."""
    if isinstance(value, Mapping):
        return isinstance(value.get("bytes"), bytes) or isinstance(value.get("path"), str)
    return isinstance(value, bytes)


def embedded_image(value: Mapping[str, Any] | bytes) -> Any:
    """Return an image that is not decoded yet; its bytes if it is damaged, or its file's path.

    Args:
        value: the bytes of a file, or `{"bytes": ..., "path": ...}` as Hugging Face's `datasets`
            has images, where the path counts only without bytes.
    """
    content = value["bytes"] if isinstance(value, Mapping) else value
    if content is None:
        assert isinstance(value, Mapping)
        return value["path"]
    try:
        return open_image(BytesIO(content))
    except ValueError:
        return content
