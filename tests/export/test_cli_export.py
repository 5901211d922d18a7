"""The commands of the build side, `motionrt export` and `build`: what does not go together is said before any work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxscript")

Run = Callable[..., tuple[int, str, str]]


def test_export_of_a_published_model_needs_its_folders(run: Run, tmp_path: Path) -> None:
    status, _, err = run("export", "svd", "-o", tmp_path / "bundle", "--base", tmp_path)
    assert status == 2 and "export svd needs --motionrag, --videomae, --dinov2" in err
    folders = [part for name in ("base", "motionrag", "videomae", "dinov2") for part in (f"--{name}", tmp_path / "none")]
    status, _, err = run("export", "cogvideox-5b-i2v", *folders, "-o", tmp_path / "bundle")
    assert status == 2 and "is no folder" in err
    status, _, err = run("export", "svd", *folders, "-o", tmp_path / "bundle", "--dtype", "int8")
    assert status == 2 and "dtype is 'int8'; allowed: checkpoint, float32, float16, bfloat16" in err
    status, _, err = run("export", "svd", *folders, "-o", tmp_path / "bundle", "--sos-token", "seed:x")
    assert status == 2 and "seed:NUMBER" in err
    assert not list(tmp_path.iterdir())


def test_export_refuses_what_is_no_published_model(run: Run, tmp_path: Path) -> None:
    status, _, err = run("export", "demo/checkpoint.safetensors", "-o", tmp_path / "bundle")
    assert status == 2 and "model is 'demo/checkpoint.safetensors'; it must be one of cogvideox-5b-i2v, svd" in err
    status, _, err = run("export", "svd")
    assert status == 2 and "Missing option '--out'" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [["export", "svd", "-o", "bundle"], ["build", "bundle", "-t", "sm_89"]], ids=lambda c: c[0])
def test_command_of_the_build_side_says_what_to_install(
    run: Run, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    status, _, err = run(*command)
    assert status == 2 and f"{command[0]} needs " in err and ", onnx" in f", {err}" and "pip install motionrt[export]" in err
    assert err.count("\n") == 1 and not list(tmp_path.iterdir())
