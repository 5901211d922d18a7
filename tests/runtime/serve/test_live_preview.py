"""What a job will be, while it runs: made now and then, shown to its key alone, gone with its end, and no frame is another."""

from __future__ import annotations

import io
import json
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageSequence
from serving import Served, serving

from motionrt.runtime.errors import InputError
from motionrt.runtime.job import Job
from motionrt.runtime.serve.client import Client
from motionrt.runtime.serve.messages import Ended, FromWorker, Opening, Order, Progress, Run
from motionrt.runtime.serve.settings import Settings
from motionrt.runtime.serve.web.keys import Keys
from motionrt.runtime.serve.work.engine import Engine
from motionrt.runtime.serve.work.written import animated

DEMO = Path(__file__).resolve().parents[3] / "demo"
LONG = {"steps": 50, "n": 4}  # more than a second


def pictures(data: bytes) -> list[NDArray[np.uint8]]:
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "WEBP"
        return [np.asarray(one.convert("RGB")) for one in ImageSequence.Iterator(image)]


@pytest.mark.parametrize(("shape", "size"), [((5, 8, 8), (96, 96)), ((13, 5, 60), (10, 120)), ((2, 90, 160), (90, 160))])
def test_pictures_are_as_large_as_can_be_seen_with_pixels_that_stay_squares(
    shape: tuple[int, ...], size: tuple[int, int]
) -> None:
    shape = (*shape, 3)
    given = np.random.default_rng(1).integers(0, 256, shape, np.uint8)
    made = pictures(animated(given, 2.0))
    assert [one.shape[:2] for one in made] == [size] * shape[0]
    times = size[0] // shape[1]
    if times >= 10:  # a codec of pictures blurs less than this
        middle = [one[times // 2 :: times, times // 2 :: times].astype(float) for one in made]
        assert np.abs(np.stack(middle).mean(-1) - given.mean(-1)).mean() < 12
    with Image.open(io.BytesIO(animated(given, 2.0))) as image:
        image.load()
        assert image.info["loop"] == 0 and abs(image.info["duration"] * shape[0] - 2000) <= shape[0]


def run_one(folder: Path, still: Path, every: float, **fields: Any) -> tuple[list[Progress], Ended]:
    """What an engine of the demo says of one job."""
    said: list[FromWorker] = []
    bundles, memories = {"demo": str(DEMO / "bundle")}, {"clips": str(DEMO / "memory")}
    opening = Opening(bundles=bundles, memories=memories, run_options={"threads": 1}, self_test=False, preview=every)
    folder.mkdir()
    fields |= {"prompt": "a red star moves in a circle", "seed": 3}
    order = Order(model="demo", fields=fields, files={"image": str(still)})
    with Engine(opening, said.append) as engine:
        running = engine.prepare(Run(job="one", order=order, folder=str(folder), key="k"))
        assert running is not None, said
        engine.enter(running)
        end = time.monotonic() + 60
        while engine._running:
            assert time.monotonic() < end
            engine.turn()
    assert isinstance(said[-1], Ended) and said[-1].outcome == "completed", said[-1]
    return [one for one in said if isinstance(one, Progress)], said[-1]


def test_a_worker_shows_steps_now_and_then_and_makes_the_same_frames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    still, asked = DEMO / "inputs" / "red_star.png", list[int]()
    preview = Job.preview
    monkeypatch.setattr(Job, "preview", lambda job: (asked.append(len(job.step_seconds)), preview(job))[1])
    often, shown = run_one(tmp_path / "often", still, 1e-6, steps=50, n=2)
    looks = [one for one in often if one.preview is not None]
    assert len(looks) >= 3 and [one.step for one in looks] == sorted({one.step for one in looks})
    assert {one.stage for one in looks} == {"denoising", "decoding"}
    assert all(len(pictures(one.preview or b"")) == 5 for one in looks)
    assert looks[-1].preview != looks[0].preview
    asked.clear()
    rarely, same = run_one(tmp_path / "rarely", still, 1000.0, steps=50, n=2)
    assert len([one for one in rarely if one.preview]) == 2  # the first step, and the last before it is decoded
    asked.clear()
    never, hidden = run_one(tmp_path / "never", still, 0.0, steps=50, n=2)
    assert not any(one.preview for one in never) and asked == []
    assert shown.result["frames_sha256"] == same.result["frames_sha256"] == hidden.result["frames_sha256"]


def test_a_preview_that_cannot_be_made_ends_no_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(job: Job) -> None:
        raise MemoryError

    monkeypatch.setattr(Job, "preview", broken)
    said, _ = run_one(tmp_path / "one", DEMO / "inputs" / "red_star.png", 1e-6, steps=8)
    assert not any(one.preview for one in said)
    assert 1 <= sum("a preview could not be made" in text for text in caplog.messages) <= 2


@pytest.mark.parametrize("every", [-1.0, float("nan"), 1e9])
def test_seconds_that_are_none_are_refused(tmp_path: Path, every: float) -> None:
    with pytest.raises(InputError, match="preview is .*; allowed is 0 to 3600"):
        Settings({"demo": DEMO / "bundle"}, tmp_path, preview=every)


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, Served, Served]]:
    """A server as three know it: two with a key each, and one without."""
    folder = tmp_path_factory.mktemp("keyed")
    alice, bob = (Keys.open(folder / "keys.json", new=True).create(name, ["generate"]) for name in ("alice", "bob"))
    options = ("--keys", str(folder / "keys.json"), "--preview", "0.05")
    with serving(folder / "store", DEMO / "bundle", DEMO / "memory", *options) as running:
        yield running.of(alice), running.of(bob), running


def until_shown(served: Served, job: str) -> dict[str, Any]:
    end = time.monotonic() + 30
    while (got := served.get(job))["motionrt"].get("preview") is None:
        assert time.monotonic() < end and got["status"] in ("queued", "in_progress"), got
        time.sleep(0.02)
    return got


def test_a_preview_is_for_the_jobs_key_while_it_runs(keyed: tuple[Served, Served, Served], picture: Path) -> None:
    alice, bob, nobody = keyed
    job = alice.create(picture, **LONG)["id"]
    path = f"/v1/videos/{job}/preview"
    waits = alice.create(picture, **LONG)["id"]
    reply = alice.call("GET", f"/v1/videos/{waits}/preview")
    assert (reply.status, reply.code) == (404, "no_preview")
    assert "nothing to see of the job yet" in reply.json["error"]["message"]
    got = until_shown(alice, job)["motionrt"]
    first = alice.call("GET", path)
    assert (first.status, first.headers["Content-Type"], first.headers["Cache-Control"]) == (200, "image/webp", "no-store")
    assert int(first.headers["X-MotionRT-Step"]) >= got["preview"] and len(pictures(first.body)) == 5
    assert first.headers["X-Content-Type-Options"] == "nosniff"
    link = got["links"]["preview"]
    assert link.startswith(f"{path}?step={got['preview']}&") and nobody.call("GET", link).status == 200
    assert nobody.call("GET", path).status == 401 and nobody.call("GET", link.replace("/preview", "/content")).status == 401
    for other in (path, f"/v1/videos/{job}"):
        reply = bob.call("GET", other)
        assert (reply.status, reply.code) == (404, "not_found")
    for one in (waits, job):
        alice.call("POST", f"/v1/videos/{one}/cancel")
    for address in (path, link):
        reply = alice.call("GET", address)
        assert (reply.status, reply.code) == (404, "no_preview")
    ended = alice.get(job)["motionrt"]
    assert "preview" not in ended["links"] and ended.get("preview") is None


def test_events_name_the_step_of_each_preview_and_clients_see_whole_jobs(
    keyed: tuple[Served, Served, Served], picture: Path
) -> None:
    alice, _, nobody = keyed
    made = alice.create(picture, steps=50, n=2)
    with urllib.request.urlopen(nobody.url + made["motionrt"]["links"]["events"], timeout=60) as stream:  # signed: no header
        blocks = [block.split("\n") for block in stream.read().decode().split("\n\n") if block.startswith("id:")]
    told = [(lines[1].removeprefix("event: "), json.loads(lines[2].removeprefix("data: "))) for lines in blocks]
    looks = [data for name, data in told if name == "preview"]
    assert {name for name, _ in told} == {"progress", "preview", "done"} and told[-1][0] == "done"
    steps = [one["step"] for one in looks]
    assert len(steps) >= 3 and steps == sorted({*steps}) and 1 <= steps[0] and steps[-1] <= 100
    assert all(one.keys() == {"id", "step", "link"} and len(json.dumps(one)) < 400 for one in looks)
    number = [lines[0] for lines in blocks]
    assert number == sorted(number, key=lambda text: int(text.removeprefix("id: ")))
    client = Client(alice.url, alice.key)
    again = client.create("a red ball", str(picture), steps=50)
    assert all(one["object"] == "video" for one in client.events(again["id"]))
