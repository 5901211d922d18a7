"""The real ComfyUI, where there is one: started on the CPU, and the example workflow run through its HTTP API.

    export COMFYUI_PATH=~/ComfyUI COMFYUI_PYTHON=~/ComfyUI/.venv/bin/python
    .venv-dev/bin/pytest tests/integrations/comfyui/test_real.py

No package registry has ComfyUI, so it must be there already: a checkout, and a Python that has what it requires and motionrt.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from motionrt.runtime.media.video import read_clip

ROOT = Path(__file__).resolve().parents[3]
NODES = ROOT / "integrations/comfyui"
SECONDS = 120.0  # for a start, and for a workflow

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("COMFYUI_PATH" not in os.environ, reason="COMFYUI_PATH names no checkout, and no registry has it"),
]


class Running:
    """ComfyUI with the folders in `base`, on a port of this machine."""

    def __init__(self, base: Path) -> None:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = int(sock.getsockname()[1])
        self.base, self.url, self.log = base, f"http://127.0.0.1:{port}", base / "log.txt"
        python, path = os.environ.get("COMFYUI_PYTHON", sys.executable), Path(os.environ["COMFYUI_PATH"]).expanduser()
        words = ["--cpu", "--disable-api-nodes", "--listen=127.0.0.1", f"--port={port}", f"--base-directory={base}"]
        with self.log.open("wb") as file:
            self.process = subprocess.Popen([python, str(path / "main.py"), *words], cwd=path, stdout=file, stderr=file)

    def ask(self, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as refused:
            raise AssertionError(f"{path}: {refused.code} {refused.read().decode(errors='replace')}") from None

    def until(self, path: str, there: Callable[[Any], Any]) -> Any:
        """What `there` makes of the answer to `path`, once it makes something of it."""
        end = time.monotonic() + SECONDS
        while time.monotonic() < end and self.process.poll() is None:
            try:
                if found := there(self.ask(path)):
                    return found
            except OSError:
                pass  # it does not listen yet
            time.sleep(0.1)
        raise AssertionError(f"{path} did not come to that:\n{self.log.read_text(errors='replace')[-4000:]}")

    def run(self, workflow: dict[str, Any]) -> str:
        """The id of a workflow that was taken."""
        taken = self.ask("/prompt", {"prompt": workflow})
        assert not taken.get("node_errors"), taken
        return str(taken["prompt_id"])

    def ended(self, prompt: str) -> dict[str, Any]:
        """What the history says of it, once it is over."""
        history: dict[str, Any] = self.until(f"/history/{prompt}", lambda history: history.get(prompt))
        return history


@pytest.fixture(scope="module")
def comfy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    base = tmp_path_factory.mktemp("comfyui")
    for name in ("custom_nodes", "input", "models/motionrt", "output", "temp", "user"):
        (base / name).mkdir(parents=True)
    (base / "custom_nodes/motionrt").symlink_to(NODES)
    (base / "models/motionrt/demo").symlink_to(ROOT / "demo")
    shutil.copy(ROOT / "demo/inputs/red_star.png", base / "input")
    running = Running(base)
    try:
        running.until("/system_stats", lambda stats: stats)
        yield running
    finally:
        running.process.terminate()
        try:
            running.process.wait(20)
        except subprocess.TimeoutExpired:
            running.process.kill()
            running.process.wait()


def workflow() -> dict[str, Any]:
    made: dict[str, Any] = json.loads((NODES / "example_workflows/api/image_to_video.json").read_text())
    return made


def test_real_comfyui_knows_the_nodes(comfy: Running) -> None:
    known = comfy.ask("/object_info")
    assert {"MotionRTBundle", "MotionRTMotionSearch", "MotionRTRemote", "MotionRTGenerate_demo"} <= known.keys()
    takes = known["MotionRTGenerate_demo"]["input"]
    assert {"image", "prompt", "motion_scale", "seed"} <= takes["required"].keys() and "references" in takes["optional"]


def test_real_comfyui_runs_the_example(comfy: Running) -> None:
    ended = comfy.ended(comfy.run(workflow()))
    assert ended["status"]["status_str"] == "success", ended["status"]
    (file,) = (comfy.base / "output/video").glob("motionrt_*.mp4")
    assert read_clip(file, 17, 64, 64, 8).shape == (17, 3, 64, 64)


def test_real_comfyui_stops_within_a_step(comfy: Running) -> None:
    long = workflow()
    long["4"]["inputs"] |= {"steps": 50, "seed": 2}
    prompt = comfy.run(long)
    comfy.until("/queue", lambda queue: queue["queue_running"])
    # Asked for until it is over: ComfyUI forgets a stop that comes before the first node is run.
    ended = comfy.until(f"/history/{prompt}", lambda history: history.get(prompt) or comfy.ask("/interrupt", {}))
    assert "execution_interrupted" in [name for name, _ in ended["status"]["messages"]], ended["status"]
    assert comfy.ended(comfy.run(workflow()))["status"]["status_str"] == "success"
