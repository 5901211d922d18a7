"""`demo/run.py`, which `make demo` runs: its videos, its sheet, and what it says of a demo folder that is not whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from by_path import load_by_path
from numpy.typing import NDArray
from PIL import Image

from motionrt.runtime.cli.common import run_app

Run = Callable[..., tuple[int, str, str]]
demo: Any = load_by_path(Path(__file__).resolve().parents[2] / "demo" / "run.py")
DOMAIN = """
import numpy as np
def track(frames):
    assert frames.dtype == np.uint8 and frames.ndim == 4
    return np.stack([frames.mean(axis=(1, 2, 3)), np.zeros(len(frames))], axis=1)
"""


@pytest.fixture
def demo_folder(
    fake_bundle: Path,
    fake_clips: dict[str, Path],
    still: NDArray[np.uint8],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run: Run,
) -> Path:
    """A demo of the fake bundle whose memory names its clips relative to the demo folder."""
    place = tmp_path / "place" / "demo"
    shutil.copytree(fake_bundle, place / "bundle")
    (place / "inputs").mkdir()
    (place / "clips").mkdir()
    Image.fromarray(still).save(place / "inputs" / "still.png")
    (place / "domain.py").write_text(DOMAIN)
    prompts = [{"image": "still.png", "prompt": f"a {word} ball", "name": word} for word in ("red", "blue")]
    (place / "prompts.json").write_text(json.dumps(prompts))
    monkeypatch.chdir(place)
    run("memory", "create", "memory", "-b", "bundle")
    for caption, file in fake_clips.items():
        shutil.copy(file, place / "clips" / file.name)
        assert run("memory", "add", "memory", f"clips/{file.name}", "-b", "bundle", "--caption", caption)[0] == 0
    monkeypatch.setattr(demo, "HERE", place)
    monkeypatch.chdir(tmp_path)
    return place


@pytest.fixture
def run_demo(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the script in this process: (exit status, standard output, standard error)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            run_app(demo.app, "demo/run.py", [str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    return call


def test_demo_makes_videos_a_sheet_and_errors(run_demo: Run, demo_folder: Path, tmp_path: Path) -> None:
    status, out, err = run_demo("--out", "here", "--threads", 1)
    assert status == 0, err
    assert sorted(file.name for file in (tmp_path / "here").iterdir()) == ["blue.mp4", "red.mp4", "sheet.png"]
    with Image.open(tmp_path / "here" / "sheet.png") as sheet:
        assert sheet.size == (3 * 5 * 16 + 4 * 12, 16 + 2 * (16 + 16 + 12))
    assert "a red ball moves right" in out and "motion off" in out and "│ mean " in out and "stage times, 2 videos" in out


@pytest.mark.parametrize("problem", ["missing", "not json", "no name", "empty"])
def test_demo_refuses_its_prompts(run_demo: Run, demo_folder: Path, problem: str) -> None:
    file = demo_folder / "prompts.json"
    file.unlink()
    if problem != "missing":
        file.write_text({"not json": "{", "no name": '[{"image": "x"}]', "empty": "[]"}[problem])
    status, _, err = run_demo()
    assert status == 2 and "prompts.json" in err and err.count("\n") == 1


def test_end_point_error_is_the_mean_distance() -> None:
    def track(frames: Any) -> NDArray[np.float64]:
        return np.array([[5.0, 5.0], [8.0, 9.0]])

    moved = demo.displacement(track, np.zeros((2, 1, 1, 3), np.uint8))
    np.testing.assert_array_equal(moved, [[0, 0], [3, 4]])
    assert demo.end_point_error(moved, np.zeros((2, 2))) == 2.5
