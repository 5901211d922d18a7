"""`motionrt export` for the published models: what is missing or does not go together is said before any work."""

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
    assert status == 2 and "dtype is 'int8'; allowed: float32, float16, bfloat16" in err
    status, _, err = run("export", "svd", *folders, "-o", tmp_path / "bundle", "--sos-token", "seed:x")
    assert status == 2 and "seed:NUMBER" in err
    assert not list(tmp_path.iterdir())


def test_export_needs_one_directory_and_no_folders_for_the_demo(run: Run, tmp_path: Path) -> None:
    status, _, err = run("export", "demo.safetensors")
    assert status == 2 and "one bundle directory" in err
    status, _, err = run("export", "demo.safetensors", tmp_path / "a", "-o", tmp_path / "b")
    assert status == 2 and "one bundle directory" in err
    status, _, err = run("export", "demo.safetensors", tmp_path / "a", "--base", tmp_path)
    assert status == 2 and "--base is for the published models" in err
