"""The demo's bundle in a real Triton Inference Server on the CPU: over HTTP, and over gRPC with NVIDIA's client."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tritonserver import ENVIRONMENT, Running, triton

from motionrt.runtime.media.video import decode_clip
from motionrt.runtime.pipeline import MotionPipeline

ROOT = Path(__file__).resolve().parents[3]
BUNDLE, MEMORY, STILL = ROOT / "demo/bundle", ROOT / "demo/memory", ROOT / "demo/inputs/red_star.png"
PROMPT = "a red star bounces in place"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (ENVIRONMENT / ".installed").exists(), reason="Triton is not installed: make .venv-triton/.installed"
    ),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, Path]]:
    """A server that has the demo, copied into its repository by the command; and the model's folder."""
    from motionrt.runtime.cli.main import main

    folder = tmp_path_factory.mktemp("triton")
    places = ["-b", BUNDLE, "-m", MEMORY, "-o", folder / "repository"]
    with pytest.raises(SystemExit) as ended:
        main(["deploy", "triton", *map(str, places), "--copy", "--threads", "1"])
    assert not ended.value.code
    with triton(folder / "repository", folder) as running:
        yield running, folder / "repository/demo"


def test_the_page_works_as_it_is_typed(server: tuple[Running, Path], tmp_path: Path) -> None:
    """Every block of docs/triton.md, in order; this server in place of the one that a reader starts."""
    running, _ = server
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    (tmp_path / "out").mkdir()
    page = (ROOT / "docs/triton.md").read_text()
    page = page.replace("localhost:8000", running.http).replace("localhost:8001", running.grpc)
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert [language for language, _ in blocks] == ["bash", "bash", "python"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    said = ""
    for language, block in blocks:
        shell = ["bash", "-euo", "pipefail", "-c", block]
        command = shell if language == "bash" else [str(ENVIRONMENT / "bin/python"), "-P", "-c", block]
        done = subprocess.run(
            command, cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stdout + done.stderr
        said += done.stdout
    assert (tmp_path / "out/repository/demo/config.pbtxt").is_file() and "[b'step'] [0.5]" in said and "(17, 64, 64, 3)" in said
    assert decode_clip(tmp_path / "out/triton.mp4", 17, 64, 64, 8.0).video.shape == (17, 3, 64, 64)


def get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return json.loads(answer.read() or b"null")


def test_it_is_ready_and_tells_what_the_bundle_takes(server: tuple[Running, Path]) -> None:
    running, _ = server
    get(f"{running.http}/v2/health/ready")  # raises where it is not
    told = get(f"{running.http}/v2/models/demo")
    inputs = {one["name"]: (one["datatype"], one["shape"]) for one in told["inputs"]}
    assert inputs["image"] == ("UINT8", [-1, -1, 3]) and inputs["prompt"] == ("BYTES", [1])
    assert inputs["motion_scale"] == ("FP32", [1]) and "negative_prompt" in inputs
    assert {"stage", "progress", "frames", "video"} <= {one["name"] for one in told["outputs"]}
    (model,) = get(f"{running.http}/v2/models/demo/stats")["model_stats"]
    assert model["inference_stats"]["success"]["count"] >= 1  # the warm-up, before anybody asked


def streamed(running: Running, **given: Any) -> list[dict[str, Any]]:
    """The events of one request by `generate_stream`."""
    body = json.dumps({"image_file": base64.b64encode(STILL.read_bytes()).decode(), "prompt": PROMPT, **given}).encode()
    with urllib.request.urlopen(f"{running.http}/v2/models/demo/generate_stream", body, timeout=60) as answer:
        return [json.loads(line[6:]) for line in answer.read().decode().splitlines() if line.startswith("data: ")]


def test_events_come_before_the_video(server: tuple[Running, Path], tmp_path: Path) -> None:
    running, _ = server
    *before, last = streamed(running, seed=1, steps=4, output="base64")
    assert [event["progress"] for event in before if event["stage"] == "step"] == [0.25, 0.5, 0.75, 1]
    assert before[0]["stage"] == "text_query" and before[-1]["stage"] == "decode"
    assert len(json.loads(last["about"])["references"]) == 4 and last["fps"] == 8
    (tmp_path / "made.mp4").write_bytes(base64.b64decode(last["video"]))
    assert decode_clip(tmp_path / "made.mp4", 17, 64, 64, 8.0).video.shape == (17, 3, 64, 64)
    with pytest.raises(urllib.error.HTTPError, match="400") as refused:
        streamed(running, steps=900)
    assert "steps is 900; solver 'ddim' of this bundle takes 1 to 50." in refused.value.read().decode()
    refused.value.close()


def test_a_client_gets_the_frames_of_the_pipeline_and_can_stop(server: tuple[Running, Path], tmp_path: Path) -> None:
    """Two at once, a bad one, and one that is cancelled."""
    running, model = server
    still = np.asarray(Image.open(STILL).convert("RGB"))
    np.save(tmp_path / "still.npy", still)
    command = [ENVIRONMENT / "bin/python", "-P", ROOT / "tests/helpers/triton_client.py", running.grpc, "demo"]
    done = subprocess.run(
        [*command, model / "config.pbtxt", tmp_path / "still.npy"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr + "".join(running.log)[-2000:]
    told = json.loads(done.stdout)
    assert told["decoupled"] and "guidance" in told["inputs"]  # of config.pbtxt, read by NVIDIA's own ModelConfig
    with MotionPipeline.from_bundle(BUNDLE, MEMORY, threads=1) as pipeline:
        for seed in (1, 2):
            frames = pipeline(still, PROMPT, seed=seed, steps=4).frames
            assert told["frames"][str(seed)] == [list(frames.shape), hashlib.sha256(frames.tobytes()).hexdigest()]
            assert [share for stage, share in told["progress"][str(seed)] if stage == "step"] == [0.25, 0.5, 0.75, 1]
    assert told["error"] == "steps is 900; solver 'ddim' of this bundle takes 1 to 50."
    line = running.wait("cancelled after", 30)
    found = re.search(r"cancelled after (\d+) of 50 steps", line)
    assert found is not None and told["seen"] <= int(found[1]) < 50
