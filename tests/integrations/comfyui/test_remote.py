"""The node *Remote* against a server that says what a test wants it to say."""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from comfy_runner import Comfy
from comfy_stand_in import InterruptProcessingException, ProgressBar
from serving import Answering

from motionrt.runtime.errors import InputError
from motionrt.runtime.media.video import write_video
from motionrt.runtime.serve.client import ServerError

NODES = Path(__file__).resolve().parents[3] / "integrations/comfyui"


class Server(BaseHTTPRequestHandler):
    """Takes a job, says that it is half done, and then how it ended."""

    asked: ClassVar[list[tuple[str, str, Any]]]
    end: ClassVar[str]
    video: ClassVar[bytes]

    def _answer(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(size)) if size else None
        self.asked.append((self.command, self.path, body))
        looks = [path for _, path, _ in self.asked if "wait=" in path]
        job = {"id": "v1", "status": "in_progress", "progress": 50, "error": None, "motionrt": {"references": []}}
        if len(looks) > 1:
            clip = {"score": 0.5, "caption": "goes left"}
            job |= {"status": self.end, "progress": 100, "motionrt": {"references": [clip]}}
            job["error"] = {"code": "broken", "message": "it broke."} if self.end == "failed" else None
        data = self.video if "/content" in self.path else json.dumps(job).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = _answer


@pytest.fixture
def handler(tmp_path: Path) -> type[Server]:
    frames = np.full((3, 16, 16, 3), 100, np.uint8)
    write_video(tmp_path / "made.mp4", frames, 12.5)
    return type("One", (Server,), {"asked": [], "end": "completed", "video": (tmp_path / "made.mp4").read_bytes()})


def run(comfy: Comfy, server: str, **changed: Any) -> Any:
    inputs = {"server": server, "prompt": "a star", "seed": 7, "steps": 0, **changed}
    return comfy.nodes["MotionRTRemote"].execute(**inputs).values


def test_remote_sends_picture_and_fields_and_gives_the_video(comfy: Comfy, handler: type[Server]) -> None:
    comfy.load(NODES)
    with Answering(handler) as server:
        image, fields = torch.rand(1, 8, 8, 3), '{"motion_scale": 0.5}'
        frames, video, fps, references = run(comfy, server.url, image=image, fields=fields, steps=4)
    _, path, body = handler.asked[0]
    assert path == "/v1/videos" and body.pop("input_reference").startswith("data:")
    assert body == {"prompt": "a star", "seed": 7, "steps": 4, "motion_scale": 0.5}
    assert frames.shape == (3, 16, 16, 3) and (frames * 255 - 100).abs().max() < 4 and fps == 12.5
    assert torch.equal(video.get_components().images, frames) and references == "0.500  goes left"
    assert [shown[:2] for shown in ProgressBar.shown] == [(50, 100), (100, 100)]


def test_a_stop_stops_the_server_as_well(comfy: Comfy, handler: type[Server]) -> None:
    comfy.load(NODES)
    comfy.stop_after = 1  # before the job is made it is asked once
    with Answering(handler) as server, pytest.raises(InterruptProcessingException):
        run(comfy, server.url)
    assert [path for method, path, _ in handler.asked if method == "POST"] == ["/v1/videos", "/v1/videos/v1/cancel"]


def test_a_job_that_fails_says_why(comfy: Comfy, handler: type[Server]) -> None:
    comfy.load(NODES)
    handler.end = "failed"
    with Answering(handler) as server:
        with pytest.raises(ServerError, match="it broke"):
            run(comfy, server.url)
        with pytest.raises(InputError, match="fields is '\\['; allowed is a JSON object"):
            run(comfy, server.url, fields="[")


def test_the_environments_key_goes_to_its_own_server_alone(
    comfy: Comfy, handler: type[Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    comfy.load(NODES)
    keys: list[str | None] = []
    answer = handler._answer

    def noting(self: Server) -> None:
        keys.append(self.headers.get("Authorization"))
        answer(self)

    monkeypatch.setattr(handler, "do_GET", noting)
    monkeypatch.setenv("MOTIONRT_API_KEY", "mine")
    with Answering(handler) as server:
        tried = [("http://mine:1", "", None), (f"{server.url}/", "", "mine"), ("http://mine:1", "typed", "typed")]
        for own, key, sent in tried:
            monkeypatch.setenv("MOTIONRT_SERVER", own)
            keys.clear()
            run(comfy, server.url, key=key)
            assert {*keys} == {sent and f"Bearer {sent}"}
