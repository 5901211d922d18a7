"""Tables of captions as streams of rows: CSV and JSON lines by themselves, Parquet with pyarrow, LanceDB with lancedb.

A table is looked through before it is used: what is wrong with it as a whole is said before any work is done.
"""

from __future__ import annotations

import csv
import importlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from motionrt.runtime.errors import InputError, install

SUFFIXES = (".csv", ".jsonl", ".ndjson", ".parquet")
_BATCH = 256  # rows in memory at once, of the formats that are read in batches
_LONGEST = 1 << 24  # characters of a CSV cell

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """path: what was opened; columns: names found; count: rows; rows: gives them from the first one on, at each call."""

    path: Path
    columns: tuple[str, ...]
    count: int
    rows: Callable[[], Iterator[Row]]


def is_table(path: Path) -> bool:
    """Whether `path` is read as a table: by its extension, or because it is a LanceDB table or database."""
    return path.suffix.lower() in SUFFIXES or bool(_lance_tables(path))


def open_table(path: Path) -> Table:
    """Open `path` by its kind. Raises InputError: missing, damaged, empty, or a package that reads it is not installed."""
    with _plain_errors(path):
        match path.suffix.lower():
            case ".csv":
                table = _checked(path, lambda: _csv_rows(path))
            case ".jsonl" | ".ndjson":
                table = _checked(path, lambda: _json_rows(path))
            case ".parquet":
                table = _parquet(path)
            case _:
                table = _lance(path)
    if not table.count:
        raise InputError(f"the table {path} has no rows; give one with a column `video` and a column of captions.")
    return table


def _checked(path: Path, rows: Callable[[], Iterator[Row]]) -> Table:
    """A table of a text file, once it was read from beginning to end."""
    columns: dict[str, None] = {}
    count = 0
    for row in rows():
        count += 1
        columns.update(dict.fromkeys(row))

    def plain() -> Iterator[Row]:
        with _plain_errors(path):
            yield from rows()

    return Table(path, tuple(columns), count, plain)


def _csv_rows(path: Path) -> Iterator[Row]:
    csv.field_size_limit(_LONGEST)
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, skipinitialspace=True)
        names = reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
        if len(set(names)) < len(names):
            raise InputError(f"the table {path} names a column twice: {', '.join(names)}. Rename one.")
        for number, row in enumerate(reader, 1):
            if None in row or None in row.values():
                got = len([name for name, cell in row.items() if cell is not None and name]) + len(row.get(None) or [])
                raise InputError(
                    f"row {number} of {path} (line {reader.line_num}) has {got} cells; its header has {len(names)}."
                    ' Put text with commas or line breaks between "double quotes".'
                )
            yield row


def _named(rows: Iterable[Row]) -> Iterator[Row]:
    """Rows under column names without spaces around them."""
    return ({name.strip(): cell for name, cell in row.items()} for row in rows)


def _json_rows(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InputError(f"line {number} of {path} is no JSON: {error}.") from None
            if not isinstance(row, dict):
                raise InputError(f'line {number} of {path} is no object like {{"video": "a.mp4", "caption": "…"}}.')
            yield from _named([row])


def _parquet(path: Path) -> Table:
    file = _package("pyarrow.parquet", "tables", f"the Parquet table {path}").ParquetFile(path)

    def rows() -> Iterator[Row]:
        with _plain_errors(path):
            for batch in file.iter_batches(_BATCH):
                yield from _named(batch.to_pylist())

    return Table(path, tuple(map(str.strip, file.schema_arrow.names)), int(file.metadata.num_rows), rows)


def _lance_tables(path: Path) -> list[Path]:
    if path.suffix == ".lance" and path.is_dir():
        return [path]
    return sorted(path.glob("*.lance")) if path.is_dir() else []


def _lance(path: Path) -> Table:
    tables = _lance_tables(path)
    if len(tables) != 1:
        names = ", ".join(str(table) for table in tables)
        raise InputError(f"{path} holds {len(tables)} LanceDB tables: {names}. Give one of them.")
    lancedb = _package("lancedb", "lancedb", f"the LanceDB table {tables[0]}")
    table = lancedb.connect(str(tables[0].parent)).open_table(tables[0].stem)
    count = int(table.count_rows())

    def rows() -> Iterator[Row]:
        with _plain_errors(path):
            for batch in table.search().limit(count).to_batches(_BATCH):
                yield from _named(batch.to_pylist())

    return Table(tables[0], tuple(map(str.strip, table.schema.names)), count, rows)


def _package(name: str, extra: str, what: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"{what} needs {name.split('.')[0]}: {install(extra)} ({error}).") from None


@contextmanager
def _plain_errors(path: Path) -> Iterator[None]:
    """Turn what the readers raise for a missing or damaged table into InputError."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError, csv.Error) as error:  # UnicodeDecodeError and Arrow's are ValueErrors
        lines = (getattr(error, "strerror", None) or str(error)).splitlines() or [type(error).__name__]
        raise InputError(
            f"the table {path} cannot be read: {lines[0]}. Give an intact UTF-8, Parquet or Lance file."
        ) from error
