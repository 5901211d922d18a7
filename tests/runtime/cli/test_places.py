"""What is read through pipes, and what is found wrong with an output before anything is run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from motionrt.runtime.backends.seam import Checked
from motionrt.runtime.bundle.bundle import Bundle
from motionrt.runtime.cli import places
from motionrt.runtime.cli.places import check_output, still, video_size
from motionrt.runtime.errors import InputError, MediaError, MotionRTError

Run = Callable[..., tuple[int, str, str]]
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "still.png"
    Image.new("RGB", (20, 30), "red").save(path)
    return path


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """No graph may be run."""

    def refuse(self: Checked, inputs: object) -> None:
        raise AssertionError(f"graph {self.spec.name} is run")

    monkeypatch.setattr(Checked, "run", refuse)


def snapshot(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize(
    "name, words",
    [
        ("folder.mp4", "it is a folder"),
        ("still.png/video.mp4", "still.png is no folder"),
        ("still.png/more/video.mp4", "still.png is no folder"),
        (f"{'a' * 300}.mp4", "too long"),
        (f"new/{'a' * 300}/video.mp4", "too long"),
        ("/".join(["b" * 200] * 30) + "/video.mp4", "too long"),
        ("nowhere/video.mp4", "is a link to nothing"),
        ("locked/video.mp4", "ermission denied"),
        ("locked/new/video.gif", "ermission denied"),
        ("video.mp4", "MiB are free there"),
    ],
    ids=lambda text: text[:20],
)
def test_generate_refuses_an_output_before_the_first_graph(
    run: Run, fake_bundle: Path, fake_memory: Path, picture: Path, tmp_path: Path, name: str, words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "locked").mkdir()
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    if words.startswith("ermission"):  # the superuser may write anywhere
        denied = OSError(13, "Permission denied")
        monkeypatch.setattr(places.tempfile, "TemporaryFile", lambda dir: (_ for _ in ()).throw(denied))
    if "free" in words:
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(1, 1, 50))
    before = snapshot(tmp_path)
    asked = ("-b", fake_bundle, "-m", fake_memory, "-i", picture, "-p", "a red ball", "-o", tmp_path / name)
    status, out, err = run("generate", *asked)
    assert status == 2 and out == "" and words in err and err.startswith("motionrt: cannot write") and err.count("\n") == 1
    assert snapshot(tmp_path) == before


def test_an_output_that_can_be_written_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "there.mp4").write_bytes(b"before")
    (tmp_path / "link.mp4").symlink_to(tmp_path / "gone.mp4")  # it is replaced, not followed
    before = snapshot(tmp_path)
    for name in ("there.mp4", "new.gif", "a/b/c.png", "link.mp4"):
        check_output(tmp_path / name, 1000)
    assert snapshot(tmp_path) == before and (tmp_path / "there.mp4").read_bytes() == b"before"


def test_a_relative_output_is_tried_where_the_process_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_output(Path("video.mp4"))
    with pytest.raises(MediaError, match="it is a folder"):
        check_output(Path("."))
    with pytest.raises(MediaError, match="cannot write"):
        check_output(Path("a\0b.mp4"))


@pytest.mark.usefixtures("idle")
def test_bench_tries_its_file_before_the_work(run: Run, fake_bundle: Path, tmp_path: Path) -> None:
    status, _, err = run("bench", fake_bundle, "-n", 1, "--json", tmp_path)
    assert status == 2 and "it is a folder" in err


def test_video_size_is_of_the_right_order(fake_bundle: Path, tmp_path: Path) -> None:
    """More than a plain picture takes, and no more than the pixels themselves."""
    spec = Bundle.open(fake_bundle).manifest.output
    pixels = spec.frames * spec.height * spec.width
    for name in ("a.mp4", "a.GIF", "a.webp", "a.png"):
        assert pixels // 8 <= video_size(Path(name), spec) <= 3 * pixels


MORE_WAYS = [pytest.param(way, marks=pytest.mark.slow) for way in ("/dev/stdin", "file", "substitution")]


@pytest.mark.parametrize("way", ["-", "fifo", *MORE_WAYS])
def test_a_still_comes_through_a_pipe(fake_bundle: Path, picture: Path, tmp_path: Path, way: str) -> None:
    out, fifo = tmp_path / "x.gif", tmp_path / "fifo"
    os.mkfifo(fifo)
    tool = f'"{sys.executable}" -P -m motionrt generate -b "{fake_bundle}" -p a --motion-scale 0 --steps 1 -o "{out}" -i'
    line = {
        "-": f'cat "{picture}" | {tool} -',
        "/dev/stdin": f'cat "{picture}" | {tool} /dev/stdin',
        "file": f'{tool} /dev/stdin < "{picture}"',
        "fifo": f'cat "{picture}" > "{fifo}" & {tool} "{fifo}"',
        "substitution": f'{tool} <(cat "{picture}")',
    }[way]
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    straight = subprocess.run(["bash", "-c", f'{tool} "{picture}"'.replace("x.gif", "y.gif")], timeout=60, capture_output=True)
    assert straight.returncode == 0 and out.read_bytes() == (tmp_path / "y.gif").read_bytes()


@pytest.mark.parametrize(
    "data, words",
    [(b"", "nothing came through that pipe"), (b"no picture", "came through '-' cannot be read as an image: it is of no")],
    ids=["empty", "text"],
)
def test_a_pipe_without_a_picture_is_said(fake_bundle: Path, tmp_path: Path, data: bytes, words: str) -> None:
    asked = ["-b", fake_bundle, "-p", "a", "--motion-scale", "0", "-o", tmp_path / "x.gif", "-i", "-"]
    command = [sys.executable, "-P", "-m", "motionrt", "generate", *map(str, asked)]
    done = subprocess.run(command, input=data, capture_output=True)
    assert done.returncode == 2 and words in done.stderr.decode() and done.stderr.count(b"\n") == 1


def test_an_endless_pipe_is_not_read_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "MOST", 1 << 20)
    with pytest.raises(InputError, match="image is '/dev/zero', and more than 1 MiB came through that pipe"):
        still("image", "/dev/zero")
    assert still("image", "missing.png") == "missing.png"  # whoever reads it says that it is missing


@pytest.mark.parametrize("url", ["https://example.com/a.png", "http://a/b", "s3://a/b.png"])
def test_nothing_is_fetched(run: Run, fake_bundle: Path, tmp_path: Path, url: str) -> None:
    asked = ("-b", fake_bundle, "-p", "a", "--motion-scale", 0, "-o", tmp_path / "x.gif")
    status, _, err = run("generate", *asked, "-i", url)
    assert status == 2 and f"image is '{url}'; nothing is fetched from elsewhere: download it, or pipe it" in err


def test_check_output_raises_what_it_is_told(tmp_path: Path) -> None:
    with pytest.raises(MotionRTError) as raised:
        check_output(tmp_path, error=MotionRTError)
    assert not isinstance(raised.value, MediaError)
