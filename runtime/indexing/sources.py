"""Where clips come from: video files, folders with captions beside the videos, tables of captions. All give `Item`s."""

from __future__ import annotations

import csv
import json
import math
import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from motionrt.runtime.arguments import listed, path_of, real, text_of
from motionrt.runtime.errors import InputError, MotionRTError, shown
from motionrt.runtime.files import here, replacing
from motionrt.runtime.indexing.tables import Row, Table, is_table, open_table

CAPTIONS = ("motion_caption", "caption", "text")  # columns that a caption is taken from: the first that is there
VECTOR = "text_embedding"
VIDEOS = frozenset(
    ".3g2 .3gp .apng .asf .avi .avif .f4v .flv .gif .m2ts .m2v .m4v .mjpeg .mkv .mov .mp4 .mpeg .mpg .mts .mxf .ogm .ogv .qt"
    " .ts .vob .webm .webp .wmv .y4m".split()
)
_COMPANIONS = frozenset({"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "Thumbs.db", "desktop.ini"})
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
    """items: gives the items from the first one on, at each call; count: how many there are.

    left_out: what else was found in folders and is no item, and why.
    """

    count: int
    items: Callable[[], Iterator[Item]]
    left_out: Sequence[tuple[Path, str]] = ()


def open_sources(
    paths: Sequence[Path],
    *,
    caption: str | None = None,
    captions: Path | None = None,
    start: float | None = None,
    videos: Path | None = None,
    dataset: str | None = None,
    describe: bool = False,
) -> Source:
    """Everything in `paths`, each by its kind: a video file, a folder of them, or a table (`tables.is_table`).

    A folder is read with all folders in it, links to others too; every file there is an item, lies beside one (.txt, and .npy,
    its field) or is in `left_out`.
    caption: of all videos; captions: a JSON file {"name or path in the folder": "caption"}; else the caption is the text
    in the .txt file of the video's name. Names match whatever their Unicode form is. start: where the spans of videos begin,
    in seconds. videos: the folder that relative paths of a table start from, its own if None. dataset: of all items, else a
    table's column. describe: items may have no caption, and tables no column of them, since one is made later (`index_clips`).
    Raises InputError for what is wrong with a source as a whole; an item that cannot be used says so in `problem`. All paths
    are absolute from here on, so that the process may change its folder.
    """
    paths = [path_of("a source", path) for path in listed("paths", paths, "paths of videos, folders and tables")]
    captions = None if captions is None else path_of("captions", captions)
    videos = None if videos is None else path_of("videos", videos)
    for name, text in (("caption", caption), ("dataset", dataset)):
        if text is not None:
            text_of(name, text)
    if start is not None and real(start) is None:
        raise InputError(f"start is {shown(start)}; allowed are seconds.")
    if caption is not None and captions is not None:
        raise InputError("give either --caption (one for all clips) or --captions (a JSON file with one for each).")
    _listed.cache_clear()
    folder = here()
    paths = [folder / path for path in paths]
    captions, videos = (None if path is None else folder / path for path in (captions, videos))
    named = {} if captions is None else _read_captions(captions)
    tables = [path for path in paths if is_table(path)]
    if tables and (caption is not None or captions is not None or start is not None):
        raise InputError(f"{tables[0]} has captions and spans of its own; leave out --caption, --captions and --start.")
    if videos is not None and not videos.is_dir():
        raise InputError(f"there is no folder {videos}; --videos is the folder that a table's relative paths start from.")
    sources: list[Source] = []
    for path in paths:
        if path in tables:
            sources.append(_from_table(open_table(path), videos, dataset, describe))
        else:
            files, unread, other = _files(path) if path.is_dir() else ([(path, path.name)], [], [])
            items = [_with_caption(file, name, caption, named, start, dataset or "", describe) for file, name in files]
            items += [Item(place, "", problem=f"this folder cannot be read: {why}.") for place, why in unread]
            used = {_composed(str(Path(item.video).with_suffix(kind))) for item in items for kind in (".txt", ".npy")}
            used |= set() if captions is None else {str(captions)}
            left = [(file, why) for file, why in other if not {_composed(str(file)), str(file)} & used]
            sources.append(Source(len(items), items.__iter__, left))
    left_out = [one for source in sources for one in source.left_out]
    return Source(sum(s.count for s in sources), lambda: (item for s in sources for item in s.items()), left_out)


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


def _files(folder: Path) -> tuple[list[tuple[Path, str]], list[tuple[Path, str]], list[tuple[Path, str]]]:
    """What is below `folder`, each in a fixed order: videos with their paths in it, folders that cannot be read and other
    files, both with why. A folder is read once, by its own path rather than by a link to it.
    """
    videos: list[Path] = []
    unread: list[tuple[Path, str]] = []
    other: list[tuple[Path, str]] = []
    seen: set[str] = set()
    places = [folder]
    for place in places:  # links to folders are added behind
        if os.path.realpath(place) in seen:
            continue
        for directory, folders, names in os.walk(
            place, onerror=lambda e: unread.append((Path(e.filename), e.strerror or str(e)))
        ):
            seen.add(os.path.realpath(directory))
            inside = [Path(directory, name) for name in sorted(folders)]
            other += [(path, "a companion of another system, or hidden") for path in inside if _hidden(path)]
            inside = [path for path in inside if not _hidden(path)]
            places += [path for path in inside if path.is_symlink()]
            folders[:] = [path.name for path in inside if not path.is_symlink() and os.path.realpath(path) not in seen]
            for path in (Path(directory, name) for name in names):
                if why := _no_video(path):
                    other.append((path, why))
                else:
                    videos.append(path)
    if not videos and not unread:
        raise InputError(f"the folder {folder} holds no video ({', '.join(sorted(VIDEOS))}); choose another one.")
    return sorted((file, file.relative_to(folder).as_posix()) for file in videos), sorted(unread), sorted(other)


def _hidden(path: Path) -> bool:
    """Whether other systems put it there (`._name` and `.DS_Store` of macOS, `Thumbs.db`, ...), or it is hidden by its name."""
    return path.name.startswith(".") or path.name in _COMPANIONS


def _no_video(path: Path) -> str:
    """Why a file of a folder is no video; nothing if it may be one: what cannot be decoded is said when it is tried."""
    if _hidden(path):
        return "a companion of another system, or hidden"
    suffix = path.suffix.lower()
    if suffix not in VIDEOS:
        return "no video by its extension"
    if path.exists() and not path.is_file():
        return "no regular file"
    try:
        with path.open("rb") as file:
            head = file.read(21)
    except OSError:
        return ""
    if suffix == ".webp" and head[8:12] == b"WEBP" and not (head[12:16] == b"VP8X" and head[20] & 2):
        return "a still picture"
    return "text" if suffix == ".ts" and head and head[0] != 0x47 else ""  # TypeScript, or a translation


def _composed(name: str) -> str:
    """`name` in the Unicode form that names are compared in: macOS writes an accent as a character of its own."""
    return unicodedata.normalize("NFC", name)


def _on_disk(path: Path) -> Path:
    """`path`, or the file of this name in another Unicode form if only that exists."""
    if str(path).isascii() or path.exists() or path == path.parent:
        return path
    place = _on_disk(path.parent)
    return place / _listed(place).get(_composed(path.name), path.name)


@lru_cache(64)
def _listed(folder: Path) -> dict[str, str]:
    """The names in a folder by their composed form; none where it cannot be read."""
    try:
        return {_composed(name): name for name in sorted(os.listdir(folder))}
    except OSError:
        return {}


def _with_caption(
    file: Path, name: str, caption: str | None, named: Mapping[str, str], start: float | None, dataset: str, describe: bool
) -> Item:
    text = caption if caption is not None else named.get(_composed(name), named.get(_composed(file.name)))
    problem, beside = "", _on_disk(file.with_suffix(".txt"))
    if text is None:
        try:
            text = beside.read_text(encoding="utf-8-sig").strip()
        except FileNotFoundError:
            if not describe:
                problem = (
                    f"it has no caption: write one into {beside.name} beside it, give --caption or --captions, or have one made"
                    " of its motion: --describe."
                )
            if not file.is_file():
                problem = "there is no such file; check the path."
        except (OSError, ValueError) as error:
            problem = f"its caption {beside.name} cannot be read: {error}."
    return Item(file, text or "", start, None, dataset, problem=problem)


def _read_captions(path: Path) -> dict[str, str]:
    try:
        table = json.loads(path.read_bytes())  # UTF-8, UTF-16 or UTF-32, with a byte order mark or without
    except (OSError, ValueError) as error:
        raise InputError(f"captions file {path} cannot be read as JSON: {error}.") from None
    if not isinstance(table, dict) or not all(isinstance(text, str) for text in table.values()):
        raise InputError(f'captions file {path} must hold an object like {{"wave.mp4": "a wave rolls"}}.')
    composed = {_composed(name): text for name, text in table.items()}
    for name, text in table.items():
        if composed[_composed(name)] != text:
            raise InputError(f"captions file {path} has two captions for {name!r}, in two Unicode forms; leave one.")
    return composed


def _from_table(table: Table, videos: Path | None, dataset: str | None, describe: bool) -> Source:
    column = next((name for name in CAPTIONS if name in table.columns), None)
    if "video" not in table.columns or (column is None and not describe):
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


def _from_row(row: Row, column: str | None, root: Path, dataset: str | None) -> Item:
    video, caption = _text(row.get("video")).strip(), "" if column is None else _text(row.get(column))
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
        _on_disk(root / video) if video else "", caption, limits[0], limits[1],
        _text(row.get("dataset")) if dataset is None else dataset,
        metadata, np.asarray(vector, np.float32) if isinstance(vector, list) else None, problem,
    )  # fmt: skip


def _text(cell: Any) -> str:
    """A cell as text; nothing for None and NaN, as which tables keep what is missing."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return ""
    return cell if isinstance(cell, str) else json.dumps(cell, ensure_ascii=False, default=str).strip('"')
