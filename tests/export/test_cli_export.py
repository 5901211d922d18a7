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
    status, _, err = run("export", "svd", "-o", tmp_path / "bundle", "--base", tmp_path, "--fusion", "mean")
    assert status == 2 and "export svd needs --motionrag, --videomae. " in err
    status, _, err = run("export", "svd", *folders, "-o", tmp_path / "bundle", "--fusion", "concat", "--sos-token", "seed:1")
    assert status == 2 and "dinov2, sos_token: for fusion cama, and fusion is concat. Leave that out, or choose cama" in err
    status, _, err = run("export", "svd", *folders, "-o", tmp_path / "bundle", "--fusion", "median")
    assert status == 2 and "fusion is 'median'; allowed: cama, mean, concat, top1, weight" in err
    status, _, err = run("export", "motionclone", "-o", tmp_path / "bundle", "--fusion", "mean")
    assert status == 2 and "--fusion: not for motionclone" in err
    assert not list(tmp_path.iterdir())


def test_export_of_motionclone_needs_its_files_and_takes_no_others(run: Run, tmp_path: Path) -> None:
    out = ("-o", tmp_path / "bundle")
    status, _, err = run("export", "motionclone", *out, "--base", tmp_path)
    assert status == 2 and "export motionclone needs --motion. See docs/models.md" in err
    status, _, err = run("export", "motionclone", *out, "--motion", tmp_path, "--dinov2", tmp_path, "--target-range", "correct")
    assert status == 2 and "--dinov2, --target-range: not for motionclone" in err
    status, _, err = run("export", "svd", *out, "--group-norm", "shared")
    assert status == 2 and "--group-norm: not for svd" in err
    files = ("--base", tmp_path / "none", "--motion", tmp_path / "none.ckpt")
    status, _, err = run("export", "motionclone", *out, *files)
    assert status == 2 and "none is no folder. Give the diffusers folder of the base model" in err
    status, _, err = run("export", "motionclone", *out, *files, "--group-norm", "per-frame")
    assert status == 2 and "group_norm is 'per-frame'; allowed: per_frame, shared" in err
    status, _, err = run("export", "motionclone", *out, *files, "--record", "representation", "--sparsectrl", tmp_path / "rgb")
    assert status == 2 and "record is 'representation', and a SparseCtrl is given, or" in err
    assert not list(tmp_path.iterdir())


def test_export_of_motion_i2v_needs_its_folder_and_takes_no_others(run: Run, tmp_path: Path) -> None:
    out = ("-o", tmp_path / "bundle")
    status, _, err = run("export", "motion-i2v", *out)
    assert status == 2 and "export motion-i2v needs --models. See docs/models.md" in err
    status, _, err = run("export", "motion-i2v", *out, "--models", tmp_path, "--base", tmp_path, "--motion", tmp_path)
    assert status == 2 and "--base, --motion: not for motion-i2v" in err
    status, _, err = run("export", "motionclone", *out, "--form", "released")
    assert status == 2 and "--form: not for motionclone" in err
    status, _, err = run("export", "motion-i2v", *out, "--models", tmp_path / "none")
    assert status == 2 and "none/stage2/StableDiffusion is no folder" in err
    status, _, err = run("export", "motion-i2v", *out, "--models", tmp_path, "--form", "mixed")
    assert status == 2 and "form is 'mixed'; allowed: own, released" in err
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


def test_export_of_dynamicrafter_needs_its_files_and_takes_no_others(run: Run, tmp_path: Path) -> None:
    out = ("-o", tmp_path / "bundle")
    status, _, err = run("export", "dynamicrafter-1024", *out, "--base", tmp_path)
    assert status == 2 and "export dynamicrafter-1024 needs --tokenizer. See docs/models.md" in err
    files = ("--base", tmp_path / "none", "--tokenizer", tmp_path)
    status, _, err = run("export", "dynamicrafter-512", *out, *files, "--positions", "learned", "--models", tmp_path)
    assert status == 2 and "--positions, --models: not for dynamicrafter-512" in err
    status, _, err = run("export", "svd", *out, "--frame-tokens", "all", "--tokenizer", tmp_path)
    assert status == 2 and "--frame-tokens, --tokenizer: not for svd" in err
    status, _, err = run("export", "dynamicrafter-256", *out, *files, "--passes", "4")
    assert status == 2 and "passes is 4; allowed: 2, or 3" in err
    rag = ("--motionrag", tmp_path, "--videomae", tmp_path, "--dinov2", tmp_path)
    status, _, err = run("export", "dynamicrafter-1024", *out, *files, *rag, "--adapter-queries", "42")
    assert status == 2 and "--adapter-queries is '42'; allowed is seed:NUMBER" in err
    status, _, err = run("export", "dynamicrafter-1024", *out, *files, *rag[:2])
    assert status == 2 and "without videomae or dinov2" in err
    status, _, err = run("export", "dynamicrafter-1024", *out, *files)
    assert status == 2 and "there is no file" in err and "none" in err
    assert not list(tmp_path.iterdir())
