"""Folders and tables become items: every video is there, with its caption and span, or says why it cannot be used."""

from __future__ import annotations

import csv
import json
import math
import os
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from motionrt.runtime.errors import InputError, MotionRTError
from motionrt.runtime.indexing.sources import Item, open_sources, write_failed

ROWS: list[dict[str, Any]] = [
    {"video": "a.mp4", "start_sec": 1.5, "end_sec": 4, "motion_caption": "rises, \"slowly\"", "camera": "still"},
    {"video": "ü/b 東.mp4", "start_sec": None, "end_sec": None, "motion_caption": "turns\nleft", "camera": None},
    {"video": "/abs/c.mp4", "start_sec": 0.0, "end_sec": None, "motion_caption": "'; DROP TABLE clips; --", "camera": "é"},
]  # fmt: skip


def items(*paths: Path, **options: Any) -> list[Item]:
    source = open_sources(paths, **options)
    found = list(source.items())
    assert source.count == len(found) == len(list(source.items()))
    return found


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pytest.importorskip("pyarrow").Table.from_pylist(rows), path)
    return path


WRITERS = [(write_csv, "t.csv"), (write_jsonl, "t.jsonl"), (write_parquet, "t.parquet")]
each_table = pytest.mark.parametrize("write, name", WRITERS, ids=["csv", "jsonl", "parquet"])
Write = Callable[[Path, list[dict[str, Any]]], Path]


@each_table
def test_tables_give_captions_spans_and_metadata(tmp_path: Path, write: Write, name: str) -> None:
    first, second, third = items(write(tmp_path / name, ROWS))
    assert first == (tmp_path / "a.mp4", 'rises, "slowly"', 1.5, 4.0, "", {"camera": "still"}, None, "")
    assert second == (tmp_path / "ü/b 東.mp4", "turns\nleft", None, None, "", {}, None, "")
    assert third == (Path("/abs/c.mp4"), "'; DROP TABLE clips; --", 0.0, None, "", {"camera": "é"}, None, "")
    elsewhere = tmp_path / "videos"
    elsewhere.mkdir()
    moved = items(tmp_path / name, videos=elsewhere, dataset="openvid")
    assert [item.video for item in moved] == [elsewhere / "a.mp4", elsewhere / "ü/b 東.mp4", Path("/abs/c.mp4")]
    assert {item.dataset for item in moved} == {"openvid"}


@each_table
@pytest.mark.parametrize("column", ["caption", "text"])
def test_tables_take_captions_of_other_names(tmp_path: Path, write: Write, name: str, column: str) -> None:
    (item,) = items(write(tmp_path / name, [{"video": "a.mp4", column: "rises", "dataset": "mine", "year": 2024}]))
    assert (item.caption, item.dataset, dict(item.metadata)) == ("rises", "mine", {"year": "2024"})


@each_table
def test_tables_say_which_columns_are_missing(tmp_path: Path, write: Write, name: str) -> None:
    with pytest.raises(InputError, match=r"has the columns path, words; needed are `video` and one of motion_caption, caption"):
        items(write(tmp_path / name, [{"path": "a.mp4", "words": "rises"}]))
    with pytest.raises(InputError, match="has the columns video, words"):
        items(write(tmp_path / name, [{"video": "a.mp4", "words": "rises"}]))


def test_a_row_that_cannot_be_used_says_so_and_the_others_are_there(tmp_path: Path) -> None:
    rows = [
        {"video": "", "start_sec": 1, "end_sec": "", "caption": "x"},
        {"video": "a.mp4", "start_sec": "0:12", "end_sec": "", "caption": "x"},
        {"video": "a.mp4", "start_sec": "", "end_sec": "soon", "caption": "x"},
        {"video": "a.mp4", "start_sec": " 1e0 ", "end_sec": "2", "caption": "x"},
    ]
    empty, clock, word, good = items(write_csv(tmp_path / "t.csv", rows))
    assert empty.problem == f"row 1 of {tmp_path / 't.csv'}: its `video` is empty; give the path of a file."
    assert "row 2" in clock.problem and "`start_sec` is '0:12'; allowed are seconds" in clock.problem
    assert clock.start is not None and math.isnan(clock.start)  # written down, it is refused again
    assert "row 3" in word.problem and "`end_sec` is 'soon'" in word.problem
    assert (good.start, good.end, good.problem) == (1.0, 2.0, "")


@pytest.mark.parametrize("name, content, message", [
    ("t.csv", b"", "has no rows"), ("t.csv", b"video,caption\n", "has no rows"), ("t.jsonl", b"\n\n", "has no rows"),
    ("t.csv", b"video,caption\na.mp4,rises, slowly\n", r"row 1 of .* \(line 2\) has 3 cells; its header has 2"),
    ("t.csv", b"video,caption\nb.mp4,x\na.mp4\n", r"row 2 of .* \(line 3\) has 1 cells; its header has 2"),
    ("t.csv", b"video,caption,video\na.mp4,x,y\n", "names a column twice"),
    ("t.csv", b"video,caption\na.mp4,\xff\xfe\n", "cannot be read: 'utf-8' codec"),
    ("t.jsonl", b'{"video": "a.mp4"}\n{"video": \n', "line 2 of .* is no JSON"),
    ("t.jsonl", b'["a.mp4"]\n', "line 1 of .* is no object"),
    ("t.parquet", b"PAR1 no parquet", "cannot be read"), ("t.parquet", b"", "cannot be read"),
])  # fmt: skip
def test_damaged_tables_are_refused_before_any_work(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        open_sources([tmp_path / name])


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.parquet"])
def test_a_missing_table_is_a_plain_error(tmp_path: Path, name: str) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    with pytest.raises(InputError, match="cannot be read: .*(No such file|Failed to open)"):
        open_sources([tmp_path / name])


def test_csv_of_a_spreadsheet_and_of_very_long_captions(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes("\ufeffvideo,caption\r\na.mp4,ü\r\n".encode() + b"b.mp4," + b"word " * 60_000 + b"\r\n")
    first, second = items(tmp_path / "t.csv")
    assert first.video == tmp_path / "a.mp4" and first.caption == "ü" and len(second.caption) == 300_000


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.parquet").write_bytes(b"")
    (tmp_path / "t.lance").mkdir()
    for module in ("pyarrow", "pyarrow.parquet", "lancedb"):
        monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(InputError, match=r"needs pyarrow: `pip install motionrt\[tables\]`"):
        open_sources([tmp_path / "t.parquet"])
    with pytest.raises(InputError, match=r"needs lancedb: `pip install motionrt\[lancedb\]`"):
        open_sources([tmp_path / "t.lance"])


def release_rows(count: int) -> list[dict[str, Any]]:
    """Rows as the release's script writes them."""
    vectors = np.random.default_rng(0).standard_normal((count, 768)).astype(np.float32)
    return [
        {"text": f"caption {i}", "text_embedding": vectors[i].tolist(), "id": i, "uid": f"openvid/{i}",
         "dataset": "openvid", "video": f"{i}.mp4", "start_sec": float(i), "end_sec": i + 2.0}
        for i in range(count)
    ]  # fmt: skip


def write_lance(database: Path, name: str, rows: list[dict[str, Any]]) -> None:
    lancedb, arrow = pytest.importorskip("lancedb"), pytest.importorskip("pyarrow")
    table = arrow.Table.from_pylist(rows)
    vectors = arrow.array([row["text_embedding"] for row in rows], arrow.list_(arrow.float32(), 768))
    place = table.schema.get_field_index("text_embedding")
    lancedb.connect(str(database)).create_table(name, table.set_column(place, "text_embedding", vectors))


@pytest.mark.filterwarnings("default")
def test_a_lancedb_table_of_the_release_gives_its_vectors_too(tmp_path: Path) -> None:
    rows = release_rows(600)
    write_lance(tmp_path / "db", "motion_caption", rows)
    for path in (tmp_path / "db", tmp_path / "db" / "motion_caption.lance"):
        found = items(path, videos=tmp_path)
        assert len(found) == 600
        for number in (0, 1, 300, 599):
            item = found[number]
            assert item[:5] == (tmp_path / f"{number}.mp4", f"caption {number}", number, number + 2, "openvid")
            assert item.metadata == {"id": str(number), "uid": f"openvid/{number}"} and item.embedding is not None
            np.testing.assert_array_equal(item.embedding, np.float32(rows[number]["text_embedding"]))
    write_lance(tmp_path / "db", "other", rows[:2])
    with pytest.raises(InputError, match=r"holds 2 LanceDB tables: .*motion_caption.lance, .*other.lance. Give one"):
        open_sources([tmp_path / "db"])
    (tmp_path / "broken.lance").mkdir()
    with pytest.raises(InputError, match="cannot be read"):
        open_sources([tmp_path / "broken.lance"])


def test_a_folder_gives_its_videos_with_the_captions_beside_them(tmp_path: Path) -> None:
    for name in ("b.mp4", "sub/ü.WEBM", "a.mov", "none.mp4", "notes.txt", "cover.jpg", "bad.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "a.txt").write_text("\ufeffrises\n", encoding="utf-8")
    (tmp_path / "b.txt").write_text(" turns left ", encoding="utf-8")
    (tmp_path / "sub/ü.txt").write_text("東へ", encoding="utf-8")
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    found = items(tmp_path, dataset="mine", start=2.0)
    assert [Path(item.video).name for item in found] == ["a.mov", "b.mp4", "bad.mp4", "none.mp4", "ü.WEBM"]
    assert [item.caption for item in found] == ["rises", "turns left", "", "", "東へ"]
    assert "bad.txt cannot be read" in found[2].problem and "write one into none.txt beside it" in found[3].problem
    assert items(tmp_path / "gone.mp4")[0].problem == "there is no such file; check the path."
    assert {(item.dataset, item.start) for item in found} == {("mine", 2.0)}
    assert [item.caption for item in items(tmp_path, caption="same")] == ["same"] * 5
    (tmp_path / "c.json").write_text(json.dumps({"none.mp4": "named", "sub/ü.WEBM": "by path"}), encoding="utf-8")
    named = items(tmp_path, captions=tmp_path / "c.json")
    assert [item.caption for item in named] == ["rises", "turns left", "", "named", "by path"]


def left_out(folder: Path, **options: Any) -> dict[str, str]:
    return {str(path.relative_to(folder)): why for path, why in open_sources([folder], caption="x", **options).left_out}


def test_every_file_of_a_folder_is_an_item_or_named_with_its_reason(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "f", tmp_path / "elsewhere"
    (elsewhere / "deep").mkdir(parents=True)
    for name in ("a.mp4", "c.m2ts", "d.TS", "e.ts", "g.webp", "h.webp", "i.y4m", "k.f4v", "a.txt", "cover.jpg", "sub/l.mp4",
                 "._a.mp4", ".DS_Store", "__MACOSX/._a.mp4", "@eaDir/a.mp4", "Thumbs.db"):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    (folder / "d.TS").write_bytes(b"G@\0\x10")
    (folder / "e.ts").write_bytes(b"export const x = 1")
    (folder / "g.webp").write_bytes(b"RIFF\0\0\0\0WEBPVP8X\x0a\0\0\0\x02")
    (folder / "h.webp").write_bytes(b"RIFF\0\0\0\0WEBPVP8 \x0a\0\0\0\x02")
    os.mkfifo(folder / "m.mp4")
    (elsewhere / "b.mp4").write_bytes(b"")
    (elsewhere / "deep" / "b.mp4").write_bytes(b"")
    (folder / "linked").symlink_to(elsewhere)
    (folder / "sub" / "up").symlink_to(folder)  # neither a loop nor a folder twice is read
    (elsewhere / "back").symlink_to(folder / "sub")
    (folder / "n.mp4").symlink_to("nowhere")
    found = [str(Path(item.video).relative_to(folder)) for item in items(folder, caption="x")]
    assert found == ["a.mp4", "c.m2ts", "d.TS", "g.webp", "i.y4m", "k.f4v", "linked/b.mp4", "linked/deep/b.mp4", "n.mp4",
                     "sub/l.mp4"]  # fmt: skip
    hidden = "a companion of another system, or hidden"
    assert left_out(folder) == {
        "e.ts": "text", "h.webp": "a still picture", "cover.jpg": "no video by its extension", "._a.mp4": hidden,
        ".DS_Store": hidden, "__MACOSX": hidden, "@eaDir": hidden, "Thumbs.db": hidden, "m.mp4": "no regular file",
    }  # fmt: skip
    (folder / "c.json").write_text("{}")
    assert "c.json" in left_out(folder)
    assert "c.json" not in [file.name for file, _ in open_sources([folder], captions=folder / "c.json").left_out]


def test_a_folder_that_cannot_be_read_is_an_item_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its videos are missing: that is said. (The tests may run as root, who may read everything.)"""
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.mp4").write_bytes(b"")
    real = os.scandir

    def scandir(path: Any) -> Any:
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    good, closed = items(tmp_path, caption="x")
    assert not good.problem and closed.video == tmp_path / "closed"
    assert closed.problem == "this folder cannot be read: Permission denied."
    assert [item.problem for item in items(tmp_path / "closed", caption="x")] == [closed.problem]


FORMS = [("NFC", "NFD"), ("NFD", "NFC"), ("NFD", "NFD")]


@pytest.mark.parametrize("asked, there", FORMS)
def test_names_match_whatever_their_unicode_form(tmp_path: Path, asked: Any, there: Any) -> None:
    """macOS gives names with the accents apart, everything else writes them composed."""
    name, other = (unicodedata.normalize(form, "ä/café.mp4") for form in (there, asked))
    file = tmp_path / "f" / name
    file.parent.mkdir(parents=True)
    file.write_bytes(b"")
    for key in (other, other.split("/")[1]):
        for coding in ("utf-8", "utf-8-sig", "utf-16"):
            (tmp_path / "c.json").write_text(json.dumps({key: "left"}, ensure_ascii=False), encoding=coding)
            (item,) = items(tmp_path / "f", captions=tmp_path / "c.json")
            assert (item.video, item.caption) == (file, "left")
    (item,) = items(write_csv(tmp_path / "t.csv", [{"video": f"f/{other}", "caption": "left"}]))
    assert item.video == file
    (tmp_path / "f" / other).parent.mkdir(exist_ok=True)
    (file.parent / other.split("/")[1]).with_suffix(".txt").write_text("beside")
    assert items(file)[0].caption == "beside" and not open_sources([tmp_path / "f"]).left_out


def test_two_captions_for_one_name_are_refused(tmp_path: Path) -> None:
    names = [unicodedata.normalize(form, "é.mp4") for form in ("NFC", "NFD")]
    (tmp_path / "c.json").write_text(json.dumps(dict.fromkeys(names, "same")))
    assert items(tmp_path / names[1], captions=tmp_path / "c.json")[0].caption == "same"
    (tmp_path / "c.json").write_text(json.dumps(dict(zip(names, ("one", "other"), strict=True))))
    with pytest.raises(InputError, match="two captions for .* in two Unicode forms"):
        items(tmp_path / "é.mp4", captions=tmp_path / "c.json")


@pytest.mark.parametrize("name, content", [
    ("t.csv", '\ufeffvideo, caption ,  camera\na.mp4, "left, then right", still\n'),
    ("t.csv", "video ,caption, camera\r\na.mp4 ,\"left, then right\",still\r\n"),
    ("t.jsonl", '\ufeff{" video": "a.mp4", "caption ": "left, then right", "camera": "still"}\n'),
])  # fmt: skip
def test_a_byte_order_mark_and_spaces_in_headers_are_nothing(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    (item,) = items(tmp_path / name)
    assert item[:2] == (tmp_path / "a.mp4", "left, then right") and item.metadata == {"camera": "still"}


def test_spaces_around_the_columns_of_a_parquet_table_are_nothing(tmp_path: Path) -> None:
    (item,) = items(write_parquet(tmp_path / "t.parquet", [{" video": "a.mp4", "caption ": "left"}]))
    assert item[:2] == (tmp_path / "a.mp4", "left")


def test_sources_of_several_kinds_come_in_the_order_given(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for name in ("z.mp4", "folder/a.mp4"):
        (tmp_path / name).write_bytes(b"")
        (tmp_path / name).with_suffix(".txt").write_text(name)
    table = write_csv(tmp_path / "t.csv", ROWS[:1])
    found = items(tmp_path / "z.mp4", table, tmp_path / "folder")
    assert [Path(item.video).name for item in found] == ["z.mp4", "a.mp4", "a.mp4"]


def test_open_sources_refuses(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    table = write_csv(tmp_path / "t.csv", ROWS)
    with pytest.raises(InputError, match="holds no video"):
        open_sources([tmp_path / "empty"])
    for options in ({"caption": "x"}, {"captions": tmp_path / "c.json"}, {"start": 1.0}):
        (tmp_path / "c.json").write_text("{}")
        with pytest.raises(InputError, match="has captions and spans of its own"):
            open_sources([tmp_path / "a.mp4", table], **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="there is no folder .*nowhere; --videos is"):
        open_sources([table], videos=tmp_path / "nowhere")
    with pytest.raises(InputError, match="give either --caption"):
        open_sources([tmp_path / "a.mp4"], caption="x", captions=tmp_path / "c.json")


def test_paths_are_absolute_from_the_moment_of_opening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the process does before it reads the items, and however often it reads them."""
    (tmp_path / "folder").mkdir()
    for name in ("one.mp4", "folder/two.mp4"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder/two.txt").write_text("left")
    (tmp_path / "captions.json").write_text('{"one.mp4": "up", "two.mp4": "left"}')
    write_csv(tmp_path / "t.csv", [{"video": "one.mp4", "caption": "up"}])
    monkeypatch.chdir(tmp_path)
    named = open_sources([Path("one.mp4"), Path("folder")], captions=Path("captions.json"))
    beside = open_sources([Path("folder")])
    table = open_sources([Path("t.csv")])
    elsewhere = open_sources([Path("t.csv")], videos=Path("folder"))
    monkeypatch.chdir("/")
    two = (tmp_path / "folder/two.mp4", "left")
    assert [item[:2] for item in named.items()] == [(tmp_path / "one.mp4", "up"), two]
    assert [item[:2] for item in beside.items()] == [two] and not beside.left_out
    assert [item[:2] for item in table.items()] == [(tmp_path / "one.mp4", "up")]
    assert [item[:2] for item in elsewhere.items()] == [(tmp_path / "folder/one.mp4", "up")]


def test_failed_items_make_a_table_that_can_be_mended_and_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = Item(Path("a.mp4"), 'rises,\n"slowly"', 1.5, 4.25, "mine", {"camera": "still"})
    second = Item("/abs/é.mp4", "", None, None, "", {"uid": "7"}, problem="no caption")
    write_failed(tmp_path / "failed.csv", [(first, "it is broken"), (second, "no caption"), (Item("b\udcff.mp4", "x"), "name")])
    rows = csv.DictReader((tmp_path / "failed.csv").read_text(encoding="utf-8").splitlines(keepends=True))
    assert [row["reason"] for row in rows] == ["it is broken", "no caption", "name"]
    again = items(tmp_path / "failed.csv")
    assert again[0] == first._replace(video=tmp_path / "a.mp4")
    assert again[1] == second._replace(video=Path("/abs/é.mp4"), problem="")
    with pytest.raises(MotionRTError, match="cannot write"):
        write_failed(tmp_path / "failed.csv" / "x.csv", [])
