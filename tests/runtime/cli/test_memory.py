"""The `motionrt memory` commands and what a person does with them: fill, search, remove, check, move, several at once."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from motionrt.runtime.backends.onnxruntime import OnnxRuntimeBackend
from motionrt.runtime.bundle.bundle import Bundle
from motionrt.runtime.cli.common import _weighted, parse_where
from motionrt.runtime.errors import InputError
from motionrt.runtime.indexing.clips import ClipEncoders

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables are not broken into lines."""
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def folder(fake_clips: dict[str, Path], tmp_path: Path) -> Path:
    """The four clips with a .txt beside each, one of them in a folder of its own, and one file that is no video."""
    place = tmp_path / "clips"
    (place / "more ü").mkdir(parents=True)
    for number, (caption, file) in enumerate(fake_clips.items()):
        target = place / ("more ü" if number == 3 else "") / file.name
        shutil.copy(file, target)
        target.with_suffix(".txt").write_text(caption)
    (place / "bad.mp4").write_bytes(b"no video")
    (place / "bad.txt").write_text("a ball")
    return place


@pytest.fixture
def memory(run: Run, fake_bundle: Path, folder: Path, tmp_path: Path) -> Path:
    """The folder's clips as dataset `mine`, and one of them again, under another caption, as `other`."""
    path = tmp_path / "memory"
    assert run("memory", "create", path, "-b", fake_bundle)[0] == 0
    failed = tmp_path / "failed.csv"
    status, out, err = run("memory", "add", path, folder, "-b", fake_bundle, "--dataset", "mine", "--failed", failed)
    assert status == 2 and "4 added, 4 clips in all" in out
    assert f"1 of 5 clips could not be added (listed in {failed})" in err
    more = ["--caption", "very red", "--dataset", "other"]
    assert run("memory", "add", path, folder / "clip0.mp4", "-b", fake_bundle, *more)[0] == 0
    return path


def test_memory_add_again_adds_nothing_and_mended_failures_are_added(
    run: Run, fake_bundle: Path, memory: Path, folder: Path, tmp_path: Path
) -> None:
    failed = tmp_path / "failed.csv"
    (row,) = csv.DictReader(failed.read_text(encoding="utf-8").splitlines())
    assert row["video"] == str(folder / "bad.mp4") and "cannot be decoded" in row["reason"] and row["dataset"] == "mine"
    shutil.copy(folder / "clip1.mp4", folder / "bad.mp4")
    status, _, err = run("memory", "add", memory, failed, "-b", fake_bundle, "--failed", failed)
    assert status == 2 and "is read from; write what failed to another file" in err
    status, out, _ = run("memory", "add", memory, failed, "-b", fake_bundle)
    assert status == 0 and "1 added, 6 clips in all" in out
    status, out, _ = run("memory", "add", memory, folder, "-b", fake_bundle, "--failed", failed)
    assert status == 0 and "0 added, 5 there before, 6 clips in all" in out
    assert failed.read_text().count("\n") == 1  # nothing failed: a header


def test_memory_add_from_a_table_with_spans(run: Run, fake_bundle: Path, memory: Path, folder: Path, tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text("video,start_sec,end_sec,motion_caption,camera\nclip0.mp4,0.1,,moves up,still\nclip1.mp4,9,10,down,\n")
    status, out, err = run("memory", "add", memory, table, "-b", fake_bundle, "--videos", folder, "--span", "centre")
    assert status == 2 and "1 added" in out and "clip1.mp4 ends at" in err and "--failed failed.csv keeps them all" in err
    status, out, _ = run("memory", "search", memory, "moves up", "-b", fake_bundle, "--where", "camera=still", "-k", 1)
    assert status == 0 and "0.1-" in out and "moves up" in out
    assert run("memory", "search", memory, "up", "-b", fake_bundle, "--where", "span=centre", "-k", 1)[0] == 0
    status, _, err = run("memory", "add", memory, table, "-b", fake_bundle, "--caption", "x")
    assert status == 2 and "leave out --caption" in err
    status, _, err = run("memory", "add", memory, folder, "-b", fake_bundle, "--span", "end")
    assert status == 2 and "span rule is 'end'; allowed are start, centre" in err


@pytest.mark.filterwarnings("default")
def test_memory_add_from_parquet_and_lancedb(run: Run, fake_bundle: Path, memory: Path, folder: Path, tmp_path: Path) -> None:
    """Rows as the release's script writes them: vectors of the bundle's own encoder are kept, those of another are refused."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    lancedb = pytest.importorskip("lancedb")
    bundle = Bundle.open(fake_bundle)
    encoders = ClipEncoders.from_bundle(bundle, OnnxRuntimeBackend(1))

    def rows(words: str, sign: int, width: int) -> object:
        vector = np.resize(sign * encoders.embed(words), width)
        columns = {"text": [words] * 2, "id": [0, 1], "uid": ["openvid/0", "openvid/1"], "dataset": ["openvid"] * 2,
                   "video": ["clip0.mp4", "clip1.mp4"], "start_sec": [0.0, 0.0], "end_sec": [0.3, 0.3]}  # fmt: skip
        return arrow.table({**columns, "text_embedding": arrow.array([vector] * 2, arrow.list_(arrow.float32(), width))})

    add = ["memory", "add", memory, "-b", fake_bundle, "--videos", folder]
    database = lancedb.connect(str(tmp_path / "db"))
    database.create_table("own", rows("the star", 1, 8))
    database.create_table("other", rows("the circle", -1, 8))
    database.create_table("wide", rows("up and down", 1, 768))
    status, out, _ = run(*add, tmp_path / "db" / "own.lance")
    assert status == 0 and "2 added, 7 clips" in out and "2 vectors were kept as they came: they must be of this" in out
    status, _, err = run(*add, tmp_path / "db" / "other.lance")
    assert status == 2 and "another text encoder made it. Embed the captions anew: --reembed." in err and err.count("\n") == 1
    status, out, _ = run(*add, tmp_path / "db" / "other.lance", "--reembed")
    assert status == 0 and "2 added, 9 clips" in out and "vectors" not in out
    status, out, _ = run(*add, tmp_path / "db" / "wide.lance")
    assert status == 0 and "2 added, 11 clips" in out and "vectors" not in out
    parquet.write_table(rows("a blue circle", 1, 8), tmp_path / "t.parquet")
    status, out, _ = run(*add, tmp_path / "t.parquet")
    assert status == 0 and "2 added, 13 clips" in out and "2 vectors" in out
    search = ["memory", "search", memory, "-b", fake_bundle, "--where", "uid=openvid/1", "-k", 4, "the circle"]
    status, out, _ = run(*search)
    assert status == 0 and set(captions(out)) == {"the star", "the circle", "up and down", "a blue circle"}
    assert captions(out)[0] == "the circle" and "openvid" in out


def test_memory_add_lists_no_more_failures_than_one_can_read(run: Run, fake_bundle: Path, memory: Path, tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text("video,caption\n" + "missing.mp4,x\n" * 30)
    status, _, err = run("memory", "add", memory, table, "-b", fake_bundle)
    assert status == 2 and err.count("\n") == 21 and "(listed above and 10 more; --failed" in err


def captions(out: str) -> list[str]:
    return [line.split("│")[1].strip() for line in out.splitlines() if line.startswith("│")]


def test_memory_search_by_prompt_image_and_video(
    run: Run, fake_bundle: Path, memory: Path, folder: Path, tmp_path: Path
) -> None:
    search = ["memory", "search", memory, "-b", fake_bundle]
    status, out, _ = run(*search, "a red ball moves right", "-k", 2)
    assert status == 0 and captions(out)[0] == "a red ball moves right" and "mine" in out and "1.000" in out
    status, out, _ = run(*search, "--video", folder / "clip1.mp4", "-k", 1)
    assert status == 0 and captions(out) == ["a blue ball moves left"] and "1.000" in out
    Image.new("RGB", (40, 30), (80, 80, 80)).save(tmp_path / "still.png")
    status, out, _ = run(*search, "--image", tmp_path / "still.png", "-k", 2, "--where", "dataset=mine")
    assert status == 0 and len(captions(out)) == 2
    for wrong in ([], ["a ball", "--video", folder / "clip1.mp4"], ["--image", "x.png", "--video", "y.mp4"]):
        status, _, err = run(*search, *wrong)
        assert status == 2 and "give one thing to search by" in err


@pytest.mark.parametrize("way", ["-", "/dev/stdin", "fifo"])
def test_memory_search_takes_a_still_through_a_pipe(
    run: Run, fake_bundle: Path, memory: Path, tmp_path: Path, way: str
) -> None:
    Image.new("RGB", (40, 30), (80, 80, 80)).save(tmp_path / "still.png")
    search = ["memory", "search", str(memory), "-b", str(fake_bundle), "-k", "2", "--image"]
    if way == "fifo":
        os.mkfifo(tmp_path / "fifo")
        with subprocess.Popen(["cp", tmp_path / "still.png", tmp_path / "fifo"]):
            got = run(*search, tmp_path / "fifo")
    else:
        command = [sys.executable, "-P", "-m", "motionrt", *search, way]
        done = subprocess.run(command, input=(tmp_path / "still.png").read_bytes(), capture_output=True, timeout=60)
        got = done.returncode, done.stdout.decode(), done.stderr.decode()
    assert got == run(*search, tmp_path / "still.png") and got[0] == 0


def test_memory_search_says_what_it_cannot_read(
    run: Run, fake_bundle: Path, memory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any graph is loaded."""
    monkeypatch.setattr(OnnxRuntimeBackend, "load", None)
    (tmp_path / "text.png").write_bytes(b"no picture")
    search = ["memory", "search", memory, "-b", fake_bundle]
    for asked, words in (
        (["--image", "https://example.com/a.png"], "nothing is fetched from elsewhere: download it, or pipe it"),
        (["--image", tmp_path / "none.png"], "there is no image file"),
        (["--image", tmp_path / "text.png"], "text.png cannot be read as an image"),
        (["--image", "/dev/null"], "nothing came through that pipe; pipe one image in"),
        (["--video", tmp_path / "text.png"], "text.png cannot be decoded"),
    ):
        status, out, err = run(*search, *asked)
        assert status == 2 and out == "" and words in err and err.count("\n") == 1, err


def test_limits_of_decoding_are_an_option(run: Run, fake_bundle: Path, memory: Path, folder: Path, tmp_path: Path) -> None:
    """Of every command that reads stills or clips."""
    Image.new("RGB", (40, 30), (80, 80, 80)).save(tmp_path / "still.png")
    search = ["memory", "search", memory, "-b", fake_bundle]
    shutil.copy(folder / "clip0.mp4", tmp_path / "new.mp4")
    for asked in (
        [*search, "--image", tmp_path / "still.png"],
        [*search, "--video", folder / "clip1.mp4"],
        ["memory", "add", memory, tmp_path / "new.mp4", "-b", fake_bundle, "--caption", "new"],
        ["generate", "-b", fake_bundle, "-i", tmp_path / "still.png", "-p", "a", "--motion-scale", 0, "-o", tmp_path / "a.gif"],
        ["bench", fake_bundle, "-i", tmp_path / "still.png", "-n", 1],
    ):
        for limit in ("pixels=1000", "memory=9000"):
            status, _, err = run(*asked, "--limit", limit)
            assert status == 2 and f"raise the limit (--limit {limit[:7]}" in err, (asked, err)
        status, _, err = run(*asked, "--limit", "pixel=1")
        assert status == 2 and "--limit is 'pixel=1'; allowed is NAME=VALUE with one of pixels, frames, seconds, memory." in err
        assert run(*asked, "--limit", "pixels=1200", "--limit", "memory=1e6")[0] == 0, asked
    for command in (["memory", "search"], ["memory", "add"], ["generate"], ["bench"]):
        text = " ".join(run(*command, "--help")[1].replace("│", " ").split())
        assert "again for another NAME: pixels of a still or a frame, as the file stores it (300,000,000 unless given)" in text


def test_memory_search_filters_and_switches(run: Run, fake_bundle: Path, memory: Path, folder: Path) -> None:
    search = ["memory", "search", memory, "-b", fake_bundle, "a red ball moves right"]
    status, out, _ = run(*search, "-k", 1, "--where", "dataset=other")
    assert status == 0 and captions(out) == ["very red"]
    status, out, _ = run(*search, "-k", 5, "--where", "dataset=other", "--where", "dataset=mine")
    assert status == 0 and len(captions(out)) == 5
    status, out, _ = run(*search, "-k", 5, "--distinct", 0.9999)
    assert status == 0 and "very red" not in captions(out) and captions(out)[0] == "a red ball moves right"
    status, out, _ = run(*search, "-k", 4, "--min-score", 0.99)
    assert status == 0 and captions(out) == ["a red ball moves right"]
    status, out, _ = run(*search, "-k", 4, "--min-score", 0.99, "--exclude-source", folder / "clip0.mp4")
    assert status == 0 and out.startswith("no clip passes: ")
    assert run(*search, "-k", 3, "--diversity", 0.5)[0] == 0
    for wrong in ("dataset", "=mine"):
        status, _, err = run(*search, "--where", wrong)
        assert status == 2 and f"--where is {wrong!r}; allowed is key=value" in err


def test_memory_remove(run: Run, fake_bundle: Path, memory: Path) -> None:
    status, out, _ = run("memory", "remove", memory, "--where", "dataset=other")
    assert status == 0 and "1 removed, 4 clips in all" in out
    status, out, _ = run("memory", "remove", memory, "--where", "dataset=other")
    assert status == 0 and "0 removed, 4 clips in all" in out
    status, out, _ = run("memory", "remove", memory, 1, 2)
    assert status == 0 and "2 removed, 2 clips in all" in out
    for wrong in ([], [3, "--where", "dataset=mine"]):
        status, _, err = run("memory", "remove", memory, *wrong)
        assert status == 2 and "say what to remove" in err
    assert run("memory", "search", memory, "a ball", "-b", fake_bundle, "-k", 2)[0] == 0


def test_memory_stats_verify_and_compact(run: Run, memory: Path) -> None:
    status, out, _ = run("memory", "stats", memory)
    assert status == 0 and "datasets: mine" in out and "float16" in out
    status, out, _ = run("memory", "stats", memory, "--json")
    stats = json.loads(out)
    assert status == 0 and stats["clips"] == 5 and stats["datasets"] == {"mine": 4, "other": 1} and stats["bytes_db"] > 0
    assert run("memory", "verify", memory) == (0, f"{memory}: 5 clips, all sound.\n", "")
    status, out, _ = run("memory", "compact", memory)
    assert status == 0 and "MiB before" in out
    assert run("memory", "verify", memory)[0] == 0
    file = memory / "memory.sqlite"
    data = bytearray(file.read_bytes())
    data[-3000:] = bytes(3000)
    file.write_bytes(data)
    status, _, err = run("memory", "verify", memory)
    assert status == 2 and ("problems (listed above)" in err or "damaged" in err)


def test_memory_moves_as_one_file(run: Run, fake_bundle: Path, memory: Path, tmp_path: Path) -> None:
    file, moved = tmp_path / "moved.mrtm", tmp_path / "elsewhere" / "memory"
    status, out, _ = run("memory", "export", memory, file)
    assert status == 0 and "5 clips" in out
    status, out, _ = run("memory", "import", file, moved)
    assert status == 0 and "5 clips" in out
    assert run("memory", "verify", moved)[0] == 0
    before, after = (run("memory", "search", place, "red", "-b", fake_bundle, "-k", 5)[1] for place in (memory, moved))
    assert before == after
    status, _, err = run("memory", "import", file, moved)
    assert status == 2 and err.count("\n") == 1
    file.write_bytes(file.read_bytes()[:5000])
    status, _, err = run("memory", "import", file, tmp_path / "third")
    assert status == 2 and "Traceback" not in err and not (tmp_path / "third" / "memory.sqlite").exists()


def test_memory_of_int8_tokens(run: Run, fake_bundle: Path, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "small"
    assert run("memory", "create", path, "-b", fake_bundle, "--tokens", "int8")[0] == 0
    assert run("memory", "add", path, folder / "clip0.mp4", "-b", fake_bundle)[0] == 0
    assert json.loads(run("memory", "stats", path, "--json")[1])["tokens"] == "int8"
    status, _, err = run("memory", "create", tmp_path / "other", "-b", fake_bundle, "--tokens", "int4")
    assert status == 2 and "int4" in err and not (tmp_path / "other" / "memory.sqlite").exists()


def test_memory_of_records_on_demand(run: Run, fake_bundle: Path, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "bare"
    assert run("memory", "create", path, "-b", fake_bundle, "--on-demand")[0] == 0
    status, out, _ = run("memory", "add", path, folder / "clip0.mp4", folder / "clip1.mp4", "-b", fake_bundle)
    assert status == 0 and "2 added" in out
    assert json.loads(run("memory", "stats", path, "--json")[1])["tokens"] == "on demand"
    search = ["memory", "search", path, "-b", fake_bundle]
    status, out, _ = run(*search, "a red ball moves right", "-k", 1)
    assert status == 0 and captions(out) == ["a red ball moves right"]
    for more in (["--video", folder / "clip1.mp4"], ["a ball", "--distinct", 0.9]):
        status, _, err = run(*search, *more)
        assert status == 2 and "makes records on demand: it cannot be searched by them, nor by `distinct`" in err


def test_memory_search_shows_every_option_of_a_search(run: Run) -> None:
    out = run("memory", "search", "--help")[1]
    for option in ("--where", "--exclude-source", "--min-score", "--distinct", "--diversity"):
        assert option in out
    assert "Leave out copies: cosine of records" in out and "--search" not in out


@pytest.fixture
def generate(fake_bundle: Path, tmp_path: Path) -> list[object]:
    Image.new("RGB", (40, 30), (80, 80, 80)).save(tmp_path / "still.png")
    command = ["generate", "-b", fake_bundle, "-i", tmp_path / "still.png", "-p", "a blue ball moves left"]
    return [*command, "-o", tmp_path / "out.gif"]


def test_generate_with_several_memories(
    run: Run, fake_bundle: Path, generate: list[object], memory: Path, folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("COLUMNS", "400")  # the table names the memories by their whole paths
    second = tmp_path / "second"
    run("memory", "create", second, "-b", fake_bundle)
    run("memory", "add", second, folder / "clip1.mp4", "-b", fake_bundle)
    status, out, _ = run(*generate, "-m", memory, "-m", f"{second}=0.5", "-k", 6)
    assert status == 0 and (tmp_path / "out.gif").stat().st_size > 0
    scores = [float(line.split("│")[5]) for line in out.splitlines() if line.startswith("│ a blue ball")]
    assert str(second) in out and scores == pytest.approx([1, 0.5], abs=2e-3)
    for wrong, message in (
        ([f"{second}=much"], "directory=weight"), ([second, second], "named twice"), ([second, "no"], "no motion memory at no"),
        ([f"{second}=0"], "above 0"),
    ):  # fmt: skip
        status, _, err = run(*generate, *(x for path in wrong for x in ("-m", path)))
        assert status == 2 and message in err and err.count("\n") == 1


def test_generate_chooses_what_may_be_retrieved(run: Run, generate: list[object], memory: Path) -> None:
    status, out, _ = run(*generate, "-m", memory, "--where", "dataset=other", "-k", 1)
    assert status == 0 and "very red" in out
    status, out, _ = run(*generate, "-m", memory, "--min-score", 0.999)
    assert status == 0 and "a blue ball moves left" in out and "very red" not in out
    status, out, _ = run(*generate, "-m", memory, "--min-score", 0.999, "-p", "star")
    assert status == 0 and "no motion: no clip of the motion memory passes" in out and "references" not in out
    status, _, err = run(*generate, "-m", memory, "--diversity", 2)
    assert status == 2 and "diversity" in err


def test_weights_and_conditions_are_read_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkdir("a=2")
    assert [_weighted(x) for x in ("a", "a=2", "b=2", "x/c=d=0.5")] == [("a", 1), ("a=2", 1), ("b", 2), ("x/c=d", 0.5)]
    with pytest.raises(InputError, match="allowed is a directory, or directory=weight"):
        _weighted("b=")
    assert parse_where(["a=1", "b=x=y", "a="]) == {"a": ["1", ""], "b": ["x=y"]} and parse_where([]) is None
