from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from motionrt.runtime.media import video

Edit = Callable[..., Path]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def picture(still: NDArray[np.uint8], tmp_path: Path) -> Path:
    path = tmp_path / "still.png"
    Image.fromarray(still).save(path)
    return path


@pytest.fixture
def command(fake_bundle: Path, fake_memory: Path, picture: Path, tmp_path: Path) -> list[object]:
    """A good `generate`; a later option overrides an earlier one."""
    out = tmp_path / "made" / "video.mp4"
    return ["generate", "-b", fake_bundle, "-m", fake_memory, "-i", picture, "-p", "a red ball", "-o", out]


def test_version_prints_and_stops(run: Run) -> None:
    import motionrt

    assert run("--version") == (0, f"motionrt {motionrt.__version__}\n", "")


def test_generate_writes_a_video_and_says_how(run: Run, command: list[object], tmp_path: Path) -> None:
    status, out, _ = run(*command, "--seed", 3, "--steps", 5, "-k", 2, "--solver", "dpm")
    assert status == 0
    assert video.read_clip(tmp_path / "made" / "video.mp4", 3, 16, 16, 8).shape == (3, 3, 16, 16)
    assert "a red ball moves right" in out and "score" in out
    for stage in ("inputs", "text", "search", "appearance", "cama", "request", "schedule", "step", "decode", "write", "total"):
        assert f"│ {stage} " in out, stage
    assert "3 frames of 16x16 at 8 fps, seed 3" in out


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".webp", ".png", ".PNG"])
def test_generate_writes_by_extension(run: Run, command: list[object], tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"other{suffix}"
    assert run(*command, "-o", file)[0] == 0
    assert file.stat().st_size > 0
    assert not list(tmp_path.glob("**/*.partial"))


@pytest.mark.parametrize("prompt", ["a" * 300, "a/" * 3000], ids=["one word", "many"])
def test_a_long_prompt_is_not_taken_for_a_file(
    run: Run, fake_bundle: Path, picture: Path, tmp_path: Path, prompt: str
) -> None:
    """Options are looked up in the bundle that is among the arguments, wherever it stands."""
    asked = ("-p", prompt, "-i", picture, "-b", fake_bundle, "--motion-scale", 0, "-o", tmp_path / "a.gif")
    status, _, err = run("generate", *asked)
    assert (status == 0) if "/" not in prompt else "tokens long" in err


def test_generate_without_motion_needs_no_memory(run: Run, fake_bundle: Path, picture: Path, tmp_path: Path) -> None:
    command = ["generate", "-b", fake_bundle, "-i", picture, "-p", "a", "-o", tmp_path / "x.gif"]
    status, out, _ = run(*command, "--motion-scale", 0)
    assert status == 0 and "references" not in out
    status, _, err = run(*command)
    assert status == 2 and "has no motion memory" in err


@pytest.mark.parametrize(
    "options, message",
    [
        (["-i", "missing.png"], "missing.png"),
        (["-b", "missing"], "bundle missing is not a directory"),
        (["-m", "missing"], "no motion memory at missing"),
        (["-o", "video.avi"], "'.avi' is not one of .mp4, .gif, .webp, .png"),
        (["-o", "video"], "'' is not one of"),
        (["-p", "a " * 7], "7 tokens long"),
        (["-k", "5"], "4 clips"),
        (["-k", "0"], "references is 0"),
        (["--steps", "99"], "steps is 99"),
        (["--solver", "euler"], "solver is 'euler'"),
        (["--seed", "-1"], "seed is -1"),
        (["--guidance", "nan"], "guidance is nan"),
        (["--motion-scale", "inf"], "motion_scale is inf"),
        (["--threads", "0"], "threads is 0"),
        (["--seed", "x"], "Invalid value"),
        (["--no-such-option"], "No such option"),
        (["--where", "a"], "--where is 'a'; allowed is key=value"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_generate_refuses_with_one_line(
    run: Run, command: list[object], tmp_path: Path, options: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    status, out, err = run(*command, *options)
    assert status == 2
    assert message in err and "Traceback" not in err and not out
    if err.startswith("motionrt:"):
        assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n" + bytes(40)], ids=["empty", "text", "cut"])
def test_generate_refuses_a_corrupt_image(run: Run, command: list[object], tmp_path: Path, content: bytes) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(content)
    status, _, err = run(*command, "-i", bad)
    assert status == 2 and "bad.png" in err and err.count("\n") == 1


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".png"])
def test_generate_on_a_full_disk_leaves_nothing(
    run: Run, command: list[object], tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    target = tmp_path / "full" / f"video{suffix}"
    status, _, err = run(*command, "-o", target)
    assert status == 2 and "No space left on device" in err and err.count("\n") == 1
    assert not target.exists() and not list(tmp_path.rglob("*.partial"))


def test_generate_into_a_place_that_is_a_file(run: Run, command: list[object], picture: Path) -> None:
    status, _, err = run(*command, "-o", picture / "video.mp4")
    assert status == 2 and "cannot write" in err and err.count("\n") == 1


@pytest.mark.parametrize("file", ["bundle.json", "graphs/step.onnx", "tables.safetensors", "tokenizers/text.json"])
def test_generate_refuses_a_corrupt_bundle(run: Run, command: list[object], edit_bundle: Edit, file: str) -> None:
    path = edit_bundle()
    (path / file).write_bytes((path / file).read_bytes()[:-7])
    status, _, err = run(*command, "-b", path)
    assert status == 2 and err.startswith("motionrt: ") and err.count("\n") == 1


def test_generate_refuses_a_corrupt_memory(run: Run, command: list[object], fake_memory: Path, tmp_path: Path) -> None:
    path = tmp_path / "memory"
    shutil.copytree(fake_memory, path)
    (path / "memory.sqlite").write_bytes(b"not a database" * 100)
    status, _, err = run(*command, "-m", path)
    assert status == 2 and err.startswith("motionrt: ") and err.count("\n") == 1


def test_inspect_draws_the_system(run: Run, fake_bundle: Path) -> None:
    """Inputs, the way to the video, the loop, and the record: what a stranger asks first."""
    status, out, _ = run("inspect", fake_bundle)
    assert status == 0 and max(map(len, out.splitlines())) <= 120
    for text in (
        "fake: 3 pictures of 16x16 at 8 a second",
        "  motion_scale     a number; 1 if not given. Strength of the retrieved motion.",
        "  negative_prompt  a text of at most 6 tokens; '' if not given. What to keep away from.",
        " prompt ──▶ text_query ──▶ a vector",
        " a vector ──▶   MEMORY   ──▶ reference_motion, reference_appearance",
        " negative_prompt ──▶    text    ──▶ negative_text",
        "┌─ loop video: 4 steps of ddim (there are ddim 1-10 steps, dpm 2-10 steps)",
        " all rows at once ──▶  schedule  ──▶ modulation",
        "│  carried: next_latents → latents, x0 → previous_x0",
        "└─ gives latents",
        " latents ──▶   decode   ──▶ video",
        "  motion           float16 [2, 4]",
        "by motion, appearance; a request takes 3 clips, up to 8, by the words of `prompt`",
        "without a clip: motion = zeros, motion_scale = 0",
        "step: every step",
        "25.0%",
    ):
        assert text in out, text


def test_inspect_shows_every_port_if_asked(run: Run, fake_bundle: Path, fake: ModuleType) -> None:
    status, out, _ = run("inspect", fake_bundle, "--ports")
    assert status == 0
    for text in ("modulation", "softmax-of-one", "block [0]", "batch 1-2, 2, 4, 4, 4", *(f"│ {name} " for name in fake.GRAPHS)):
        assert text in out, text


def test_inspect_needs_no_partition(run: Run, edit_bundle: Edit) -> None:
    status, out, _ = run("inspect", edit_bundle(lambda manifest: manifest.pop("partition")), "--ports")
    assert status == 0 and "graphs and their ports" in out


def test_options_are_what_the_bundle_declares(run: Run, command: list[object], edit_bundle: Edit) -> None:
    """Nothing names an input twice: one that is renamed in bundle.json is renamed on the command line."""

    def rename(manifest: dict[str, Any]) -> None:
        manifest["inputs"]["strength"] = manifest["inputs"].pop("motion_scale")
        manifest["memory"]["absent"] = {"motion": "zeros", "strength": 0}
        for name, reads in (("request", {"motion_scale": "strength"}), ("step_plain", None)):
            if reads:
                manifest["plan"][manifest["plan"].index(name)] = {"graph": name, "reads": reads}

    path = edit_bundle(rename)
    status, out, _ = run("generate", "-b", path, "--help")
    assert status == 0 and "--strength" in out and "--motion-scale <float>" not in out and "Strength of the retrieved" in out
    arguments = [path if item == command[2] else item for item in command]
    assert run(*arguments, "--strength", 0)[0] == 0
    status, _, err = run(*arguments, "--motion-scale", 0)
    assert status == 2 and "No such option: --motion-scale" in err


@pytest.mark.parametrize("with_memory", [True, False], ids=["memory", "no memory"])
def test_bench_gives_percentiles_and_ratios(
    run: Run, fake_bundle: Path, fake_memory: Path, tmp_path: Path, with_memory: bool
) -> None:
    file = tmp_path / "bench.json"
    memory = ["--memory", fake_memory] if with_memory else []
    status, out, _ = run("bench", fake_bundle, *memory, "--repeat", 3, "--json", file, "--threads", 1)
    assert status == 0
    document = json.loads(file.read_text())
    seconds = document["seconds"]
    for stage in ("text", "appearance", "cama", "request", "decode", "first_frame", "write", "all"):
        assert len(seconds[stage]) == 3 and f"│ {stage} " in out
        percentiles = document["percentiles_ms"][stage]
        assert set(percentiles) == {"p50", "p95"} and percentiles["p50"] <= percentiles["p95"], "p99 needs a hundred times"
    assert len(seconds["step"]) == 12
    for index in range(3):
        assert seconds["all"][index] == pytest.approx(seconds["first_frame"][index] + seconds["write"][index])
        assert 0 <= seconds["unaccounted"][index] < seconds["first_frame"][index]
    assert ("search: not run" in out) != with_memory
    assert set(document["step_seconds"]) == {"rewritten", "plain"} and document["step_ratios"]["plain"] > 0
    assert "plain step" in out and "largest difference" in out
    assert "counted: 1,000 FLOPs a step, 25.0% of the 4,000" in out.replace("\n", " ")
    assert document["versions"]["onnxruntime"] and document["threads"] == 1 and document["dtype"] == "float32"
    assert document["processor"] and document["cores"] and document["gpu"] and document["peak_rss_mib"] > 10
    assert document["memory_clips"] == (4 if with_memory else None) and document["schedules"] == {"video": ["ddim", 4]}


def test_bench_takes_a_request_and_memories_of_its_own(run: Run, fake_bundle: Path, fake_memory: Path, tmp_path: Path) -> None:
    other, file = Path(shutil.copytree(fake_memory, tmp_path / "other")), tmp_path / "bench.json"
    Image.new("RGB", (20, 30), "red").save(tmp_path / "still.png")
    asked = ["--prompt", "the star moves up", "--image", tmp_path / "still.png", "--solver", "dpm", "--steps", 2]
    status, _, _ = run("bench", fake_bundle, "-m", fake_memory, "-m", f"{other}=0.5", "-n", 2, "--json", file, *asked)
    assert status == 0
    document = json.loads(file.read_text())
    assert document["schedules"] == {"video": ["dpm", 2]} and document["memory_clips"] == 8
    assert len(document["seconds"]["step"]) == 4 and not any("not run" in note for note in document["notes"])
    status, _, err = run("bench", fake_bundle, "-n", 1, "--image", tmp_path / "none.png")
    assert status == 2 and "none.png" in err
    status, _, err = run("bench", fake_bundle, "-n", 1, "--steps", 77)
    assert status == 2 and "steps is 77" in err


def test_bench_of_a_bundle_without_the_plain_step(run: Run, edit_bundle: Edit, tmp_path: Path) -> None:
    def less(manifest: dict[str, Any]) -> None:
        del manifest["graphs"]["step_plain"], manifest["partition"], manifest["loops"]["video"]["plain"]

    file = tmp_path / "bench.json"
    status, out, _ = run("bench", edit_bundle(less), "-n", 2, "--json", file)
    assert status == 0 and "plain step: not run: loop 'video' of this bundle carries none" in out
    document = json.loads(file.read_text())
    assert document["dtype"] == "float32" and set(document["step_seconds"]) == {"rewritten"} and "counted:" not in out


def test_bench_goes_on_where_the_backend_cannot_run_the_plain_step(run: Run, edit_bundle: Edit, fake: ModuleType) -> None:
    """As TensorRT cannot: nobody builds an engine of it."""
    path = edit_bundle(lambda manifest: manifest["graphs"]["step_plain"].update(sha256=fake.digest(b"no graph")))
    (path / "graphs" / "step_plain.onnx").write_bytes(b"no graph")
    status, out, _ = run("bench", path, "-n", 2)
    assert status == 0 and "plain step: not run: ONNX Runtime" in out and "one step, 2 interleaved rounds" in out


def test_bench_gives_no_ratio_on_a_red_gate(run: Run, edit_bundle: Edit, fake: ModuleType) -> None:
    """A step_plain that computes something else is named, and not timed."""
    body = fake.GRAPHS["step_plain"]
    wrong = {**fake.GRAPHS, "step_plain": (*body[:2], body[2].replace("Cos", "Sin"))}
    original, fake.GRAPHS = fake.GRAPHS, wrong
    try:
        data = fake.onnx_graph("step_plain")
    finally:
        fake.GRAPHS = original
    path = edit_bundle(lambda manifest: manifest["graphs"]["step_plain"].update(sha256=fake.digest(data)))
    (path / "graphs" / "step_plain.onnx").write_bytes(data)
    status, out, _ = run("bench", path, "--repeat", 2)
    assert status == 0 and "plain step: no ratio: it differs from the rewritten step by" in out
    assert "│ plain step" not in out


def test_memory_is_made_filled_and_searched(run: Run, fake_bundle: Path, fake_clips: dict[str, Path], tmp_path: Path) -> None:
    memory, files = tmp_path / "memory", list(fake_clips.values())
    status, out, _ = run("memory", "create", memory, "--bundle", fake_bundle)
    assert status == 0 and "memory add" in out
    status, _, err = run("memory", "search", memory, "a ball", "-b", fake_bundle)
    assert status == 2 and "holds no clips" in err
    assert run("memory", "add", memory, files[0], "-b", fake_bundle, "--caption", "the star moves up")[0] == 0
    captions = tmp_path / "captions.json"
    captions.write_text(json.dumps({file.name: text for text, file in fake_clips.items()}))
    status, out, _ = run("memory", "add", memory, *files[1:], "-b", fake_bundle, "--captions", captions)
    assert status == 0 and "3 added, 4 clips in all" in out
    status, out, _ = run("memory", "search", memory, "a blue ball moves left", "-b", fake_bundle, "-k", 1)
    assert status == 0 and "a blue ball moves left" in out and "the star" not in out
    status, _, err = run("memory", "create", memory, "--bundle", fake_bundle)
    assert status == 2 and "already" in err


def test_memory_add_keeps_the_good_and_names_the_bad(
    run: Run, fake_bundle: Path, fake_clips: dict[str, Path], tmp_path: Path
) -> None:
    memory, bad = tmp_path / "memory", tmp_path / "bad.mp4"
    bad.write_bytes(b"no video")
    run("memory", "create", memory, "--bundle", fake_bundle)
    good = next(iter(fake_clips.values()))
    status, out, err = run("memory", "add", memory, bad, good, "-b", fake_bundle, "--caption", "a ball")
    assert status == 2 and "1 added" in out and "bad.mp4" in err and "1 of 2 clips" in err and "Traceback" not in err


@pytest.mark.parametrize(
    "options, message",
    [
        (["--caption", "a", "--captions", "c.json"], "give either --caption"),
        (["--captions", "c.json"], "cannot be read as JSON"),
        (["--captions", "list.json"], "must hold an object"),
    ],
    ids=["both", "missing", "list"],
)
def test_memory_add_refuses_captions(
    run: Run,
    fake_bundle: Path,
    fake_clips: dict[str, Path],
    tmp_path: Path,
    options: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("list.json").write_text("[]")
    clip = next(iter(fake_clips.values()))
    status, _, err = run("memory", "add", tmp_path / "memory", clip, "-b", fake_bundle, *options)
    assert status == 2 and message in err and err.count("\n") == 1


def test_memory_add_names_files_without_a_caption(
    run: Run, fake_bundle: Path, fake_clips: dict[str, Path], tmp_path: Path
) -> None:
    run("memory", "create", tmp_path / "memory", "--bundle", fake_bundle)
    captions = tmp_path / "captions.json"
    captions.write_text(json.dumps({"clip1.mp4": "a ball"}))
    files = list(fake_clips.values())[:2]
    status, out, err = run("memory", "add", tmp_path / "memory", *files, "-b", fake_bundle, "--captions", captions)
    assert status == 2 and "1 added" in out and "clip0.mp4: it has no caption: write one into clip0.txt" in err


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["export"],
        ["build"],
        ["inspect"],
        ["generate"],
        ["bench"],
        *(["memory", x] for x in "create add search remove verify compact export import stats".split()),
    ],
    ids=lambda command: " ".join(command) or "motionrt",
)
def test_help_shows_an_example(run: Run, command: list[str]) -> None:
    status, out, _ = run(*command, "--help")
    assert status == 0 and " ".join(["motionrt", *command]) in out.split("Usage:")[1]
    assert "xample" in out or not command


def test_main_reports_an_oserror_in_one_line(run: Run, command: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error", "disk")

    monkeypatch.setattr(video, "write_video", broken)
    status, _, err = run(*command)
    assert status == 2 and err == "motionrt: disk: Input/output error.\n"


def test_command_line_process_has_no_traceback(tmp_path: Path) -> None:
    arguments = [sys.executable, "-P", "-m", "motionrt", "inspect", str(tmp_path / "missing")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "is not a directory" in done.stderr
