"""A real server process: what is asked for is made, stops when it is told to, and outlives kills."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from serving import Served, serving

from motionrt.runtime.pipeline import MotionPipeline

DEMO = Path(__file__).resolve().parents[3] / "demo"
BUNDLE, MEMORY = DEMO / "bundle", DEMO / "memory"
LONG = {"steps": 50, "n": 4}  # more than a second


def digest(picture: Path, prompt: str, **named: Any) -> str:
    """SHA-256 of the frames that the pipeline itself gives."""
    with MotionPipeline.from_bundle(BUNDLE, MEMORY, threads=1) as pipeline:
        return hashlib.sha256(pipeline(str(picture), prompt, **named).frames.tobytes()).hexdigest()


def test_a_video_is_made_and_is_that_of_the_pipeline(served: Served, picture: Path) -> None:
    made = served.create(picture, seed=7, n=2, steps=5)
    video = served.until(made["id"], "completed")
    told = video["motionrt"]
    assert video["progress"] == 100 and told["stage"] == "done" and told["seeds"] == [7, 8] and told["attempt"] == 1
    wanted = [digest(picture, "a red ball moves", seed=seed, steps=5) for seed in (7, 8)]
    assert told["frames_sha256"] == wanted
    assert [one["score"] for one in told["references"]] == sorted((one["score"] for one in told["references"]), reverse=True)
    for variant, kind in (("video", "video/mp4"), ("thumbnail", "image/webp"), ("spritesheet", "image/png")):
        for index in (0, 1):
            whole = served.call("GET", f"/v1/videos/{video['id']}/content?variant={variant}&index={index}")
            assert whole.status == 200 and whole.headers["Content-Type"] == kind and len(whole.body) > 50
            part = served.call(
                "GET", f"/v1/videos/{video['id']}/content?variant={variant}&index={index}", headers={"Range": "bytes=10-19"}
            )
            assert part.status == 206 and part.body == whole.body[10:20] and part.headers["ETag"] == whole.headers["ETag"]
            same = {"If-None-Match": whole.headers["ETag"]}
            assert (
                served.call("GET", f"/v1/videos/{video['id']}/content?variant={variant}&index={index}", headers=same).status
                == 304
            )
    assert served.call("GET", f"/v1/videos/{video['id']}/content?index=2").status == 404
    assert served.call("GET", f"/v1/videos/{video['id']}/input").body == picture.read_bytes()


@pytest.mark.parametrize(
    ("form", "says"),
    [
        ({"steps": "0"}, "steps"), ({"steps": "x"}, "steps is 'x'"), ({"seed": "-1"}, "seed"), ({"n": "9"}, "n is 9"),
        ({"motion_scale": "big"}, "motion_scale"), ({"solver": "euler"}, "euler"), ({"bla": "1"}, "bla is no field"),
        ({"references": "99"}, "references is 99"), ({"references": "[1, 999]"}, "999"),
        ({"memory": "other"}, "memory is 'other'"),
        ({"size": "4x4"}, "size is '4x4'"), ({"seconds": "4"}, "seconds is '4'"), ({"output": "avi"}, "output is 'avi'"),
        ({"where": "[]"}, "where"), ({"priority": "top"}, "priority is 'top'"), ({"metadata": "[]"}, "metadata"),
        ({"guidance": "[1]"}, "guidance"), ({"prompt": "a " * 200}, "prompt"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)  # fmt: skip
def test_a_request_is_refused_before_it_is_a_job(served: Served, picture: Path, form: dict[str, Any], says: str) -> None:
    before = served.call("GET", "/v1/videos").json["first_id"]
    reply = served.call("POST", "/v1/videos", form={"prompt": "a", **form}, files={"input_reference": picture})
    error, name = reply.json["error"], next(iter(form))
    assert reply.status == 400 and says in error["message"], reply.body
    assert error["param"] == (name if error["message"].split()[0] == name else None), error
    assert served.call("GET", "/v1/videos").json["first_id"] == before


def test_what_is_missing_or_unknown_is_said(served: Served, picture: Path, tmp_path: Path) -> None:
    assert "input_reference" in served.call("POST", "/v1/videos", form={"prompt": "a"}).json["error"]["message"]
    assert "prompt is missing" in served.call("POST", "/v1/videos", files={"input_reference": picture}).json["error"]["message"]
    unknown = served.call("POST", "/v1/videos", form={"model": "sora"}, files={"input_reference": picture})
    assert (unknown.status, unknown.code) == (404, "model_not_found")
    broken = tmp_path / "x.png"
    broken.write_bytes(picture.read_bytes()[:60])
    reply = served.call("POST", "/v1/videos", form={"prompt": "a"}, files={"input_reference": broken})
    assert reply.status == 400 and str(tmp_path) not in reply.json["error"]["message"]
    assert reply.json["error"]["message"].startswith("input_reference")
    for path in ("/v1/videos/video_0", "/v1/videos/..%2f..%2fetc", "/v1/models/none"):
        assert served.call("GET", path).status == 404
    assert served.call("POST", "/v1/videos/edits", form={}).code == "not_supported"
    assert served.call("PUT", "/v1/videos").code == "method_not_allowed"


def test_delete_stops_within_a_step_and_says_so_then(served: Served, picture: Path) -> None:
    made = served.create(picture, **LONG)
    while served.get(made["id"])["motionrt"]["step"] == 0:
        pass
    assert served.call("DELETE", f"/v1/videos/{made['id']}").json == {
        "id": made["id"],
        "deleted": True,
        "object": "video.deleted",
    }
    assert served.call("GET", f"/v1/videos/{made['id']}").status == 404
    log = [json.loads(line) for line in served.log.read_text().splitlines() if made["id"] in line]
    assert log[-1]["event"] == "ended" and log[-1]["outcome"] == "cancelled"  # and nothing of it afterwards
    assert served.until(served.create(picture, seed=1)["id"], "completed", seconds=20)  # the worker is free


def test_cancel_keeps_what_is_known(served: Served, picture: Path) -> None:
    first, second = served.create(picture, **LONG), served.create(picture, **LONG)
    for video in (second, first):  # one that waits, one that runs
        got = served.call("POST", f"/v1/videos/{video['id']}/cancel").json
        assert got["status"] == "failed" and got["error"]["code"] == "cancelled"
        content = served.call("GET", f"/v1/videos/{video['id']}/content")
        assert (content.status, content.code, content.headers["x-should-retry"]) == (409, "cancelled", "false")


def test_events_tell_every_stage_and_end(served: Served, picture: Path) -> None:
    made = served.create(picture, **LONG)
    with urllib.request.urlopen(f"{served.url}/v1/videos/{made['id']}/events", timeout=30) as stream:
        text = stream.read().decode()
    events = [block.split("\n") for block in text.split("\n\n") if block.startswith("id:")]
    names = [lines[1].removeprefix("event: ") for lines in events]
    said = [json.loads(lines[2].removeprefix("data: ")) for lines in events if lines[1] != "event: preview"]
    assert names[-1] == "done" and set(names[:-1]) == {"progress", "preview"} and said[-1]["status"] == "completed"
    steps, percents = [one["motionrt"]["step"] for one in said], [one["progress"] for one in said]
    assert steps == sorted(steps) and percents == sorted(percents) and steps[-1] == 200 and max(percents[:-1]) < 100
    order = ["queued", "starting", "retrieving", "conditioning", "denoising", "decoding", "encoding", "done"]
    stages = [order.index(one["motionrt"]["stage"]) for one in said]
    assert stages == sorted(stages) and order.index("denoising") in stages
    again = urllib.request.Request(f"{served.url}/v1/videos/{made['id']}/events", headers={"Last-Event-ID": "3"})
    with urllib.request.urlopen(again, timeout=30) as stream:
        assert stream.read().count(b"event: done") == 1
    # A number that is not reached yet is of a server before this one: it is no reason to be silent.
    again = urllib.request.Request(f"{served.url}/v1/videos/{served.create(picture, **LONG)['id']}/events")
    again.add_header("Last-Event-ID", "999999")
    with urllib.request.urlopen(again, timeout=30) as stream:
        assert b"event: progress" in stream.read()


def test_a_long_poll_waits_for_the_end(served: Served, picture: Path) -> None:
    made = served.create(picture, steps=10)
    assert served.call("GET", f"/v1/videos/{made['id']}?wait=30").json["status"] == "completed"
    start = time.monotonic()
    long = served.create(picture, **LONG)
    assert served.call("GET", f"/v1/videos/{long['id']}?wait=0.05").json["status"] in ("queued", "in_progress")
    assert time.monotonic() - start < 5
    assert served.call("GET", f"/v1/videos/{long['id']}?wait=x").status == 400


def test_a_request_sent_again_is_one_job(served: Served, picture: Path) -> None:
    form, files = {"prompt": "a ball", "seed": 5}, {"input_reference": picture}
    keyed = {"Idempotency-Key": "one"}
    first = served.call("POST", "/v1/videos", form=form, files=files, headers=keyed).json
    assert served.call("POST", "/v1/videos", form=form, files=files, headers=keyed).json["id"] == first["id"]
    other = served.call("POST", "/v1/videos", form={**form, "seed": 6}, files=files, headers=keyed)
    assert (other.status, other.code) == (409, "idempotency_mismatch")
    retried = served.call("POST", "/v1/videos", form=form, files=files, headers={"x-stainless-retry-count": "1"}).json
    assert retried["id"] == first["id"]
    assert served.call("POST", "/v1/videos", form=form, files=files).json["id"] != first["id"]
    found: list[str] = []

    def same() -> None:
        found.append(served.call("POST", "/v1/videos", form=form, files=files, headers={"Idempotency-Key": "two"}).json["id"])

    threads = [threading.Thread(target=same) for _ in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(found) == 8 and len(set(found)) == 1


def test_a_list_has_pages(served: Served, picture: Path) -> None:
    ids = [served.create(picture, seed=i)["id"] for i in range(3)]
    page = served.call("GET", "/v1/videos?limit=2").json
    assert [one["id"] for one in page["data"]] == ids[:0:-1] and page["has_more"] and page["last_id"] == ids[1]
    older = served.call("GET", f"/v1/videos?limit=1&after={ids[1]}").json
    assert [one["id"] for one in older["data"]] == ids[:1]
    newer = served.call("GET", f"/v1/videos?order=asc&after={ids[1]}").json
    assert [one["id"] for one in newer["data"]] == ids[2:] and not newer["has_more"]
    for query in ("limit=0", "limit=x", "order=up", "after=video_0"):
        assert served.call("GET", f"/v1/videos?{query}").status == 400


def test_a_remix_is_the_request_with_other_words(served: Served, picture: Path) -> None:
    before = served.until(served.create(picture, steps=3, seed=4, motion_scale=0.5)["id"], "completed")
    after = served.call("POST", f"/v1/videos/{before['id']}/remix", body={"prompt": "a blue star"})
    assert after.status == 200, after.body
    video = served.until(after.json["id"], "completed")
    assert video["remixed_from_video_id"] == before["id"] and video["prompt"] == "a blue star"
    asked = video["motionrt"]["request"]
    assert (asked["steps"], asked["motion_scale"]) == (3, 0.5)
    assert served.call("GET", f"/v1/videos/{video['id']}/input").body == picture.read_bytes()


def test_sync_gives_the_file_and_stops_when_the_client_goes(served: Served, picture: Path) -> None:
    reply = served.call("POST", "/v1/videos/sync", form={"prompt": "a", "output": "webp"}, files={"input_reference": picture})
    assert reply.status == 200 and reply.headers["Content-Type"] == "image/webp" and reply.body[:4] == b"RIFF"
    with pytest.raises(TimeoutError):
        served.call("POST", "/v1/videos/sync", form={"prompt": "a", **LONG}, files={"input_reference": picture}, timeout=0.15)
    newest = served.call("GET", "/v1/videos?limit=1").json["data"][0]
    assert served.until(newest["id"], "failed", seconds=10)["error"]["code"] == "cancelled"


def test_a_worker_that_is_killed_costs_no_job(served: Served, picture: Path) -> None:
    running, waiting = served.create(picture, seed=2, **LONG), served.create(picture, seed=3)
    while served.get(running["id"])["motionrt"]["step"] == 0:
        pass
    (worker,) = served.workers()
    os.kill(worker, signal.SIGKILL)
    video = served.until(running["id"], "completed")
    assert video["motionrt"]["attempt"] == 2
    assert video["motionrt"]["frames_sha256"][0] == digest(picture, "a red ball moves", seed=2, steps=50)
    assert served.until(waiting["id"], "completed")["motionrt"]["attempt"] == 1


@pytest.mark.slow
def test_what_kills_two_workers_is_given_up(served: Served, picture: Path) -> None:
    assert served.until_ready()
    running = served.create(picture, **LONG)
    for attempt in (1, 2):
        while (got := served.get(running["id"]))["motionrt"]["step"] == 0 or got["motionrt"]["attempt"] < attempt:
            assert got["status"] != "failed"
        (worker,) = served.workers()
        os.kill(worker, signal.SIGKILL)
    assert served.until(running["id"], "failed")["error"]["code"] == "worker_restarted"


@pytest.mark.slow
def test_a_server_that_is_killed_loses_no_job(picture: Path, tmp_path: Path) -> None:
    with serving(tmp_path / "store", BUNDLE, MEMORY) as first:
        done = first.until(first.create(picture, seed=1)["id"], "completed")
        jobs = [first.create(picture, seed=i, **LONG)["id"] for i in range(3)]
        while first.get(jobs[0])["motionrt"]["step"] == 0:
            pass
        workers = first.workers()
        first.kill()
    end = time.monotonic() + 5
    while any(Path(f"/proc/{pid}").exists() and b"worker" in Path(f"/proc/{pid}/cmdline").read_bytes() for pid in workers):
        assert time.monotonic() < end, "a worker outlived its server"
        time.sleep(0.02)
    (tmp_path / "store/uploads/left").write_bytes(b"of a request that was cut off")
    with serving(tmp_path / "store", BUNDLE, MEMORY) as second:
        assert second.get(done["id"]) == done
        for job in jobs:
            video = second.until(job, "completed")
            assert video["motionrt"]["attempt"] == (2 if job == jobs[0] else 1)
        assert not list((tmp_path / "store/uploads").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_server_that_is_told_to_stop_lets_jobs_end(picture: Path, tmp_path: Path, workers: int) -> None:
    with serving(tmp_path / "store", BUNDLE, MEMORY, f"--workers={workers}") as first:
        running, waiting = first.create(picture, **LONG)["id"], first.create(picture)["id"]
        while first.get(running)["motionrt"]["step"] == 0:
            pass
        first.process.send_signal(signal.SIGTERM)
        while (reply := first.call("GET", "/health/ready")).json["status"] != "stopping":
            pass
        assert reply.status == 503
        late = first.call("POST", "/v1/videos", form={"prompt": "a"}, files={"input_reference": picture})
        assert (late.status, late.code) == (503, "stopping")
        assert first.process.wait(20) == 0
    with serving(tmp_path / "store", BUNDLE, MEMORY, "--drain=0") as second:
        video = second.get(running)
        assert video["status"] == "completed" and video["motionrt"]["attempt"] == 1
        assert second.until(waiting, "completed")["motionrt"]["attempt"] == 1
        long = second.create(picture, **LONG)["id"]
        while second.get(long)["motionrt"]["step"] == 0:
            pass
    with serving(tmp_path / "store", BUNDLE, MEMORY) as third:
        assert third.until(long, "completed")["motionrt"]["attempt"] == 1  # it was no fault of the job's


def test_a_server_without_what_it_needs_says_so(tmp_path: Path, picture: Path) -> None:
    (tmp_path / "bundle.json").write_text("{}")
    with serving(tmp_path / "store", tmp_path, ready=False) as served:
        assert served.process.wait(20) == 2
    assert "this version reads format 2" in served.log.read_text() and "Traceback" not in served.log.read_text()
    with serving(tmp_path / "one", BUNDLE) as one, serving(tmp_path / "one", BUNDLE, ready=False) as other:
        assert other.process.wait(20) == 2 and "is open in another server" in one.log.read_text()
