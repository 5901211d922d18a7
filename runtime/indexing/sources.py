"""Where clips come from: video files, folders with captions beside the videos, tables of captions. All give `Item`s."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from motionrt.runtime.errors import InputError, MotionRTError
from motionrt.runtime.files import replacing
from motionrt.runtime.indexing.tables import Row, Table, is_table, open_table

CAPTIONS = ("motion_caption", "caption", "text")  # columns that a caption is taken from: the first that is there
VECTOR = "text_embedding"
VIDEOS = frozenset(".3gp .avi .flv .gif .m4v .mkv .mov .mp4 .mpeg .mpg .mts .ogv .webm .wmv".split())
_TAKEN = ("video", "start_sec", "end_sec", "dataset", "reason", VECTOR)  # columns that are no metadata


class Item(NamedTuple):
    """A captioned span to index. start, end: its limits in seconds, None: those of the file.

    embedding: float32 [E], if the caption's vector is known; problem: why it cannot be used, if that is known.
    """

    video: str | Path
    caption: str
    start: float | None = None
    end: float | None = None
    dataset: str = ""
    metadata: Mapping[str, str] = {}
    embedding: NDArray[np.float32] | None = None
    problem: str = ""


@dataclass(frozen=True)
class Source:
    """items: gives the items from the first one on, at each call; count: how many there are."""

    count: int
    items: Callable[[], Iterator[Item]]


def open_sources(
    paths: Sequence[Path],
    *,
    caption: str | None = None,
    captions: Path | None = None,
    start: float | None = None,
    videos: Path | None = None,
    dataset: str | None = None,
) -> Source:
    """Everything in `paths`, each by its kind: a video file, a folder of them, or a table (`tables.is_table`).

    caption: of all videos; captions: a JSON file {"name or path in the folder": "caption"}; else the caption is the text
    in the .txt file of the video's name. start: where the spans of videos begin, in seconds. videos: the folder that
    relative paths of a table start from, its own if None. dataset: of all items, else a table's column. Raises InputError
    for what is wrong with a source as a whole; an item that cannot be used says so in `problem`.
    """
    if caption is not None and captions is not None:
        raise InputError("give either --caption (one for all clips) or --captions (a JSON file with one for each).")
    named = {} if captions is None else _read_captions(captions)
    tables = [path for path in paths if is_table(path)]
    if tables and (caption is not None or captions is not None or start is not None):
        raise InputError(f"{tables[0]} has captions and spans of its own; leave out --caption, --captions and --start.")
    if videos is not None and not videos.is_dir():
        raise InputError(f"there is no folder {videos}; --videos is the folder that a table's relative paths start from.")
    sources: list[Source] = []
    for path in paths:
        if path in tables:
            sources.append(_from_table(open_table(path), videos, dataset))
        else:
            files = _files(path) if path.is_dir() else [(path, path.name)]
            items = [_with_caption(file, name, caption, named, start, dataset or "") for file, name in files]
            sources.append(Source(len(items), items.__iter__))
    return Source(sum(s.count for s in sources), lambda: (item for s in sources for item in s.items()))


def write_failed(path: Path, failed: Iterable[tuple[Item, str]]) -> None:
    """Write items and the reasons why they failed as a CSV table that `open_sources` reads again once it is mended."""
    rows = list(failed)
    extra = sorted(
        {key for item, _ in rows for key in item.metadata} - {"video", "start_sec", "end_sec", CAPTIONS[0], "reason"}
    )
    with (
        replacing(path, MotionRTError) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(["video", "start_sec", "end_sec", CAPTIONS[0], "dataset", "reason", *extra])
        for item, reason in rows:
            limits = ["" if value is None else f"{value:.12g}" for value in (item.start, item.end)]
            video = Path(item.video).absolute() if str(item.video) else ""
            writer.writerow(
                [video, *limits, item.caption, item.dataset, reason, *(item.metadata.get(key, "") for key in extra)]
            )


def _files(folder: Path) -> list[tuple[Path, str]]:
    """The videos below `folder` in a fixed order, each with its path in it."""
    found = [
        Path(directory, name)
        for directory, _, names in os.walk(folder)
        for name in names
        if Path(name).suffix.lower() in VIDEOS
    ]
    if not found:
        raise InputError(f"the folder {folder} holds no video ({', '.join(sorted(VIDEOS))}); choose another one.")
    return sorted((file, file.relative_to(folder).as_posix()) for file in found)


def _with_caption(
    file: Path, name: str, caption: str | None, named: Mapping[str, str], start: float | None, dataset: str
) -> Item:
    text = caption if caption is not None else named.get(name, named.get(file.name))
    problem, beside = "", file.with_suffix(".txt")
    if text is None:
        try:
            text = beside.read_text(encoding="utf-8-sig").strip()
        except FileNotFoundError:
            problem = f"it has no caption: write one into {beside.name} beside it, or give --caption or --captions."
            if not file.is_file():
                problem = "there is no such file; check the path."
        except (OSError, ValueError) as error:
            problem = f"its caption {beside.name} cannot be read: {error}."
    return Item(file, text or "", start, None, dataset, problem=problem)


def _read_captions(path: Path) -> dict[str, str]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"captions file {path} cannot be read as JSON: {error}.") from None
    if not isinstance(table, dict) or not all(isinstance(text, str) for text in table.values()):
        raise InputError(f'captions file {path} must hold an object like {{"wave.mp4": "a wave rolls"}}.')
    return table


def _from_table(table: Table, videos: Path | None, dataset: str | None) -> Source:
    column = next((name for name in CAPTIONS if name in table.columns), None)
    if "video" not in table.columns or column is None:
        raise InputError(
            f"the table {table.path} has the columns {', '.join(table.columns)}; needed are `video` and one of"
            f" {', '.join(CAPTIONS)} (and `start_sec`, `end_sec` for spans). Rename its columns."
        )
    root = table.path.parent if videos is None else videos

    def items() -> Iterator[Item]:
        for number, row in enumerate(table.rows(), 1):
            item = _from_row(row, column, root, dataset)
            yield item._replace(problem=f"row {number} of {table.path}: {item.problem}") if item.problem else item

    return Source(table.count, items)


def _from_row(row: Row, column: str, root: Path, dataset: str | None) -> Item:
    video, caption = _text(row.get("video")), _text(row.get(column))
    problem = "" if video else "its `video` is empty; give the path of a file."
    limits: list[float | None] = []
    for name in ("start_sec", "end_sec"):
        try:
            limits.append(float(text) if (text := _text(row.get(name))) else None)
        except ValueError:
            limits.append(math.nan)
            problem = problem or f"its `{name}` is {row[name]!r}; allowed are seconds, or nothing."
    metadata = {key: text for key, cell in row.items() if key not in (*_TAKEN, column) and (text := _text(cell))}
    vector = row.get(VECTOR)
    return Item(
        root / video if video else "", caption, limits[0], limits[1],
        _text(row.get("dataset")) if dataset is None else dataset,
        metadata, np.asarray(vector, np.float32) if isinstance(vector, list) else None, problem,
    )  # fmt: skip


def _text(cell: Any) -> str:
    """A cell as text; nothing for None and NaN, as which tables keep what is missing."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return ""
    return cell if isinstance(cell, str) else json.dumps(cell, ensure_ascii=False, default=str).strip('"')
