"""The memory over HTTP: found and seen as it is without, changed while videos are made, closed to what is hostile."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import sqlite3
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import Reply, Served, serving

from motionrt.runtime.media.video import write_video
from motionrt.runtime.memory.memory import MotionMemory
from motionrt.runtime.memory.search import Search
from motionrt.runtime.pipeline import MotionPipeline
from motionrt.runtime.serve.web.keys import Keys

DEMO = Path(__file__).resolve().parents[3] / "demo"
UNSEEN = sorted((DEMO / "clips_unseen").glob("*.mp4"))
CLIPS = "/v1/memories/demo/clips"


class Curated(Served):
    """A server of a copy of the demo's memory, `demo`, and of another, `old`; with two keys."""

    folder: Path
    reader: dict[str, str]

    def add(self, video: Path, caption: str, **form: Any) -> dict[str, Any]:
        """A job that must be taken."""
        reply = self.call("POST", CLIPS, form={"caption": caption, **form}, files={"video": video})
        assert reply.status == 200, reply.body
        job: dict[str, Any] = reply.json
        return job

    def over(self, job: dict[str, Any]) -> dict[str, Any]:
        """What became of it."""
        got: dict[str, Any] = self.call("GET", f"/v1/memories/demo/jobs/{job['id']}?wait=30").json
        assert got["status"] in ("completed", "failed"), got
        return got

    def search(self, text: str, **fields: Any) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.call("POST", "/v1/memories/demo/search", body={"text": text, **fields}).json["data"]
        return found

    def left(self) -> list[str]:
        """Files of jobs, and uploads."""
        store = self.folder / "store"
        return [path.name for name in ("files", "uploads") for path in (store / name).rglob("*") if path.is_file()]

    def digest(self) -> str:
        """Of all that the memory has."""
        return str(self.call("GET", "/v1/memories/demo").json["digest"])


@pytest.fixture(scope="module")
def curated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Curated]:
    folder = tmp_path_factory.mktemp("curated")
    for name in ("demo", "old"):
        shutil.copytree(DEMO / "memory", folder / name)
    shutil.copytree(DEMO / "clips", folder / "clips")
    keys = folder / "keys.json"
    admin, reader = (Keys.open(keys, new=True).create(name, [role]) for name, role in (("a", "admin"), ("r", "read")))
    options = (f"--memory=demo={folder / 'demo'}", f"--memory=old={folder / 'old'}", f"--keys={keys}")
    with Curated(folder / "store", DEMO / "bundle", None, options) as made:
        made.key, made.folder, made.reader = admin, folder, {"Authorization": f"Bearer {reader}"}
        yield made.start()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- looking ----------------------------------------------------------------------------------------------------------


def test_memories_are_listed_with_what_they_hold(curated: Curated) -> None:
    data = curated.call("GET", "/v1/memories", headers=curated.reader).json["data"]
    assert [(one["id"], one["clips"], one["models"]) for one in data] == [("demo", 192, ["demo"]), ("old", 192, ["demo"])]
    assert curated.call("GET", "/v1/memories/none").code == "memory_not_found"


@pytest.mark.parametrize(
    ("fields", "count", "search"),
    [
        ({}, 4, Search()), ({"k": 7}, 7, Search()), ({"k": 64, "minimum_score": 0.5}, 64, Search(minimum_score=0.5)),
        ({"k": 5, "diversity": 0.7}, 5, Search(diversity=0.7)), ({"where": {"span": "start"}}, 4, Search({"span": "start"})),
        ({"exclude_source": "clips/000_slide_left.mp4"}, 4, Search(exclude_source="clips/000_slide_left.mp4")),
        ({"exclude_source": ["a", "b"], "most_seconds": 3}, 4, Search(exclude_source=["a", "b"], most_seconds=3)),
        ({"words": 0, "agreement": 0.5, "least_seconds": 1}, 4, Search(words=0, agreement=0.5, least_seconds=1)),
        ({"minimum_probability": 0.6}, 4, Search(minimum_probability=0.6)),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_a_search_is_that_of_the_memory(curated: Curated, fields: dict[str, Any], count: int, search: Search) -> None:
    text = "a red ball slides to the left"
    got = curated.call("POST", "/v1/memories/demo/search", body={"text": text, **fields}, headers=curated.reader).json["data"]
    with MotionPipeline.from_bundle(DEMO / "bundle", DEMO / "memory", threads=1) as pipeline:
        assert isinstance(pipeline.memory, MotionMemory)
        wanted = pipeline.memory.search(pipeline.embed(text), count, search.lenient(), text)
    assert wanted and [(one["id"], one["score"]) for one in got] == [(one.id, round(float(one.score), 4)) for one in wanted]
    for told, reference in zip(got, wanted, strict=True):
        assert told["caption"] == reference.caption and told["source"] == Path(reference.source).name
        assert (told["start"], told["duration"]) == (reference.start, reference.duration)
        assert told["metadata"] == {"span": "start"} and 0 < told.get("probability", 1) <= 1


@pytest.mark.parametrize("body", [{}, {"text": " "}, {"text": "a", "k": 0}, {"text": "a", "bla": 1}, {"text": 7}])
def test_a_search_that_says_nothing_is_refused(curated: Curated, body: dict[str, Any]) -> None:
    assert curated.call("POST", "/v1/memories/demo/search", body=body).status == 400


def test_a_preview_is_a_small_video_and_leaves_its_clip_alone(curated: Curated, tmp_path: Path) -> None:
    before = {path: sha256(path) for path in (curated.folder / "clips").iterdir()}
    (found,) = curated.search("slides to the left", k=1)
    link = found["links"]["preview"]
    assert "signature=" in link
    whole = urllib.request.urlopen(curated.url + link, timeout=30).read()  # no header: as a <video> asks
    source = curated.folder / "clips" / found["source"]
    assert whole != source.read_bytes() and whole[4:8] == b"ftyp"
    part = curated.call("GET", link, headers={"Range": "bytes=10-19"})
    assert part.status == 206 and part.body == whole[10:20]
    same = curated.call("GET", link, headers={"If-None-Match": part.headers["ETag"]})
    assert same.status == 304 and same.body == b""
    assert {path: sha256(path) for path in (curated.folder / "clips").iterdir()} == before
    assert sha256(source) == sha256(DEMO / "clips" / found["source"])
    for clip in ("9999", "x", "-1", "9" * 30):
        assert curated.call("GET", f"{CLIPS}/{clip}/preview").code == "not_found"
    (other,) = curated.search("circles around clockwise", k=1)  # whose preview nobody has asked for
    gone = curated.folder / "clips" / other["source"]
    gone.rename(tmp_path / "away")
    assert curated.call("GET", f"{CLIPS}/{other['id']}/preview").code == "no_preview"
    shutil.copyfile(source, gone)  # another video in its place
    assert curated.call("GET", f"{CLIPS}/{other['id']}/preview").code == "no_preview"
    (tmp_path / "away").rename(gone)
    assert curated.call("GET", f"{CLIPS}/{other['id']}/preview").status == 200


# --- adding -----------------------------------------------------------------------------------------------------------


def test_a_clip_is_found_at_once_and_disturbs_no_job(curated: Curated, picture: Path, tmp_path: Path) -> None:
    with MotionPipeline.from_bundle(DEMO / "bundle", DEMO / "memory", threads=1) as pipeline:
        wanted = pipeline(str(picture), "a red ball moves", seed=3, steps=50)
    running = curated.create(picture, seed=3, steps=50, n=2, memory="demo")
    while curated.get(running["id"])["motionrt"]["step"] == 0:
        pass
    job = curated.add(UNSEEN[0], "a zebra gallops wildly", dataset="mine", **{"metadata[who]": "me"})
    assert job["status"] in ("queued", "in_progress") and job["clip"] is None and job["request"]["dataset"] == "mine"
    done = curated.over(job)
    assert (done["status"], done["progress"], done["added"], done["expires_at"]) == ("completed", 100, True, None)
    (found,) = curated.search("a zebra gallops wildly", k=1)
    assert (found["id"], found["score"], found["dataset"]) == (done["clip"], 1.0, "mine")
    assert curated.search("x", where={"who": "me"})[0]["id"] == done["clip"]
    video = curated.until(running["id"], "completed")
    assert video["motionrt"]["frames_sha256"][0] == hashlib.sha256(wanted.frames.tobytes()).hexdigest()
    assert video["motionrt"]["attempt"] == 1
    moved = curated.until(curated.create(picture, references=f"[{done['clip']}]", memory="demo")["id"], "completed")
    assert [one["caption"] for one in moved["motionrt"]["references"]] == ["a zebra gallops wildly"]
    # The same once more is the same clip, and no second file.
    again = curated.over(curated.add(UNSEEN[0], "a zebra gallops wildly"))
    assert (again["status"], again["added"], again["clip"]) == ("completed", False, done["clip"])
    clips = [name for name in curated.left() if name.startswith("memory_")]
    assert clips == [f"{job['id']}.mp4"]
    source = curated.folder / "store/files" / job["id"][-2:] / job["id"] / clips[0]
    preview = curated.call("GET", f"{CLIPS}/{done['clip']}/preview")
    assert preview.status == 200 and sha256(source) == sha256(UNSEEN[0])
    # Removed: the memory, its file, its job and its previews.
    assert [*(curated.folder / "store/previews").glob(f"{sha256(source)[:16]}-*")]
    assert curated.call("DELETE", f"{CLIPS}/{done['clip']}").json["deleted"] is True
    assert not [name for name in curated.left() if name.startswith("memory_")]
    assert not [*(curated.folder / "store/previews").glob(f"{sha256(UNSEEN[0])[:16]}-*")]
    assert found["id"] not in [one["id"] for one in curated.search("a zebra gallops wildly", k=64)]
    gone = ("GET", f"{CLIPS}/{done['clip']}/preview"), ("DELETE", f"{CLIPS}/{done['clip']}")
    assert [curated.call(*call).status for call in gone] == [404, 404]
    assert curated.call("GET", f"/v1/memories/demo/jobs/{job['id']}").status == 404


def test_a_clip_that_came_with_the_memory_is_removed_without_its_file(curated: Curated) -> None:
    with MotionMemory.open(curated.folder / "demo", readonly=True) as memory:
        (clip,) = memory.get([17])
    assert curated.call("DELETE", f"{CLIPS}/17").json == {
        "id": 17, "memory": "demo", "deleted": True, "object": "memory.clip.deleted",
    }  # fmt: skip
    assert curated.call("DELETE", f"{CLIPS}/17").code == "not_found"
    assert (curated.folder / clip.source).is_file()
    assert 17 not in [one["id"] for one in curated.search(clip.caption, k=64)]


def test_events_tell_every_stage_of_an_addition(curated: Curated) -> None:
    job = curated.add(UNSEEN[1], "a heron stands up")
    with urllib.request.urlopen(curated.url + job["links"]["events"], timeout=30) as stream:  # signed: no header
        blocks = [block.split("\n") for block in stream.read().decode().split("\n\n") if block.startswith("id:")]
    said = [json.loads(lines[2].removeprefix("data: ")) for lines in blocks]
    order = ["queued", "opening", "reading", "encoding", "completed"]
    stages = [order.index(one["stage"]) for one in said]
    assert stages == sorted(stages) and {3, 4} <= {*stages} and blocks[-1][1] == "event: done"
    assert [one["progress"] for one in said] == sorted(one["progress"] for one in said)
    listed = curated.call("GET", "/v1/memories/demo/jobs").json["data"]
    assert listed[0] == curated.over(job) and curated.call("GET", "/v1/memories/old/jobs").json["data"] == []
    assert curated.call("GET", f"/v1/memories/old/jobs/{job['id']}").status == 404
    assert curated.call("GET", f"/v1/videos/{job['id']}").status == 404


def test_who_may_read_may_not_change(curated: Curated) -> None:
    before = curated.digest()
    form, files = {"caption": "a"}, {"video": UNSEEN[2]}
    calls: list[tuple[str, str, dict[str, Any]]] = [
        ("POST", CLIPS, {"form": form, "files": files}), ("DELETE", f"{CLIPS}/1", {}), ("GET", "/v1/memories/demo/jobs", {}),
        ("GET", "/v1/memories/demo/jobs/memory_0", {}), ("POST", "/v1/memories/demo/jobs/memory_0/cancel", {}),
    ]  # fmt: skip
    for method, path, more in calls:
        assert curated.call(method, path, headers=curated.reader, **more).status == 403
        assert curated.call(method, path, headers={"Authorization": "Bearer mrt_none"}, **more).status == 401
    assert curated.digest() == before


@pytest.mark.slow
def test_what_is_cancelled_leaves_nothing(curated: Curated) -> None:
    before, files = curated.digest(), curated.left()
    first, second = (curated.add(video, "a cancelled clip") for video in UNSEEN[2:4])
    assert second["queue_position"] == 1
    for job in (second, first):  # one that waits, one that runs
        got = curated.call("POST", f"/v1/memories/demo/jobs/{job['id']}/cancel").json
        assert (got["status"], got["error"]["code"], got["clip"]) == ("failed", "cancelled", None)
    assert curated.digest() == before and curated.left() == files and not adding(curated)


@pytest.mark.slow
def test_a_reading_process_that_is_killed_fails_its_job_alone(curated: Curated, picture: Path) -> None:
    clips = curated.call("GET", "/v1/memories/demo").json["clips"]
    running = curated.create(picture, seed=3, steps=50, n=8, memory="old")
    job, waits = curated.add(UNSEEN[2], "a killed clip"), curated.add(UNSEEN[3], "a clip after it")
    while not (pids := adding(curated)):
        pass
    os.kill(pids[0], signal.SIGKILL)
    got = curated.over(job)
    assert (got["status"], got["error"]["code"], got["attempt"]) == ("failed", "worker_lost", 1)
    assert not [name for name in curated.left() if name.startswith(job["id"])]
    after = curated.over(waits)
    assert after["added"] and curated.call("DELETE", f"{CLIPS}/{after['clip']}").status == 200
    assert curated.search("a killed clip", k=1)[0]["caption"] != "a killed clip"
    assert curated.until(running["id"], "completed")["motionrt"]["attempt"] == 1
    assert curated.call("GET", "/v1/memories/demo").json["clips"] == clips


@pytest.mark.slow
def test_a_server_that_is_killed_adds_once(tmp_path: Path) -> None:
    shutil.copytree(DEMO / "memory", tmp_path / "demo")
    with serving(tmp_path / "store", DEMO / "bundle", tmp_path / "demo") as first:
        replies = [
            first.call("POST", CLIPS, form={"caption": f"clip {i}"}, files={"video": UNSEEN[i]}).json["id"] for i in range(2)
        ]
        while not (pids := adding(first)):
            pass
        first.kill()
    end = time.monotonic() + 5
    while any(Path(f"/proc/{pid}").exists() and b"adding" in Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids):
        assert time.monotonic() < end, "it outlived its server"
        time.sleep(0.02)
    with serving(tmp_path / "store", DEMO / "bundle", tmp_path / "demo") as second:
        got = [second.call("GET", f"/v1/memories/demo/jobs/{job}?wait=30").json for job in replies]
        assert [(one["status"], one["attempt"], one["clip"]) for one in got] == [("completed", 2, 193), ("completed", 1, 194)]
        assert second.call("GET", "/v1/memories/demo").json["clips"] == 194


def adding(served: Served) -> list[int]:
    """Processes that add clips."""
    text = Path(f"/proc/{served.process.pid}/task/{served.process.pid}/children").read_text()
    return [pid for pid in map(int, text.split()) if b"work.adding" in Path(f"/proc/{pid}/cmdline").read_bytes()]


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["playlist", "list", "text", "picture", "empty"])
def test_what_is_no_video_is_refused_and_nothing_is_fetched(curated: Curated, picture: Path, tmp_path: Path, kind: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as bait:
        bait.settimeout(0.05)  # who connects is there already
        address = f"http://127.0.0.1:{bait.getsockname()[1]}/a.mp4"
        path = tmp_path / "clip.mp4"
        path.write_bytes({
            "playlist": f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{address}\n#EXT-X-ENDLIST\n".encode(),
            "list": f"ffconcat version 1.0\nfile {address}\n".encode(),
            "text": b"a video", "picture": picture.read_bytes(), "empty": b"",
        }[kind])  # fmt: skip
        before = curated.left()
        reply = curated.call("POST", CLIPS, form={"caption": "a"}, files={"video": path})
        assert (reply.status, reply.code) == (400, "unsupported_file"), reply.body
        assert "mp4" in reply.json["error"]["message"] and curated.left() == before
        with pytest.raises(TimeoutError):
            bait.accept()


@pytest.mark.parametrize(
    ("form", "says"),
    [
        ({}, "caption is missing"), ({"caption": " "}, "caption is missing"), ({"caption": "a", "start": "x"}, "start is 'x'"),
        ({"caption": "a", "start": "nan"}, "start is nan"), ({"describe": "maybe"}, "describe is 'maybe'"),
        ({"caption": "a", "start": "2", "end": "1"}, "start is 2 and end 1"),
        ({"caption": "a", "span": "end"}, "span is 'end'"), ({"caption": "a", "path": "/etc/passwd"}, "path is no field"),
        ({"caption": "a", "metadata": "[]"}, "metadata is []"), ({"caption": "a", "metadata": '{"a": 1}'}, "metadata is"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_a_clip_without_sound_fields_is_refused(curated: Curated, form: dict[str, Any], says: str) -> None:
    reply = curated.call("POST", CLIPS, form=form, files={"video": UNSEEN[2]})
    assert reply.status == 400 and says in reply.json["error"]["message"], reply.body
    assert curated.call("POST", CLIPS, form={"caption": "a"}).json["error"]["param"] == "video"
    assert curated.call("POST", "/v1/memories/none/clips", form={"caption": "a"}).code == "memory_not_found"


def test_an_upload_beyond_the_limit_is_refused_before_it_is_sent(curated: Curated) -> None:
    host, port = curated.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as sock:
        head = f"POST {CLIPS} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {curated.key}\r\nContent-Length: {600 << 20}\r\n"
        sock.sendall(f"{head}Content-Type: multipart/form-data; boundary=x\r\n\r\n".encode())
        answer = sock.recv(65536)
    assert b" 413 " in answer.split(b"\r\n")[0]


@pytest.mark.slow
def test_what_cannot_be_used_fails_with_the_reason(curated: Curated, tmp_path: Path) -> None:
    before, files = curated.digest(), curated.left()
    broken, still, endless = (tmp_path / f"{name}.mp4" for name in ("broken", "still", "endless"))
    broken.write_bytes(UNSEEN[2].read_bytes()[:40] + b"\0" * 4000)
    write_video(still, np.zeros((20, 32, 32, 3), np.uint8), 8)
    write_video(endless, np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8), 0.001)
    jobs = {
        says: curated.add(path, caption)
        for says, path, caption in (
            ("cannot be read", broken, "a"), ("no motion", still, "a"), ("plays for 5000 s", endless, "a"),
            ("502 tokens", UNSEEN[2], "a " * 500),
        )
    }  # fmt: skip
    for says, job in jobs.items():
        got = curated.over(job)
        assert got["status"] == "failed" and got["error"]["code"] in ("invalid_media", "invalid_clip"), got
        assert says in got["error"]["message"] and str(curated.folder) not in got["error"]["message"], got
        assert job["id"] not in got["error"]["message"]
    assert curated.digest() == before and curated.left() == files


def test_a_memory_that_this_version_cannot_write_is_refused(curated: Curated) -> None:
    file = curated.folder / "old" / "memory.sqlite"

    def post() -> Reply:
        return curated.call("POST", "/v1/memories/old/clips", form={"caption": "a"}, files={"video": UNSEEN[2]})

    with closing(sqlite3.connect(file, isolation_level=None)) as db:
        (version,) = db.execute("PRAGMA user_version").fetchone()
        db.execute(f"PRAGMA user_version={version - 1}")
        try:
            for reply in (post(), curated.call("DELETE", "/v1/memories/old/clips/1")):
                assert (reply.status, reply.code) == (409, "memory_not_writable")
                assert "schema 4" in reply.json["error"]["message"] and str(curated.folder) not in reply.body.decode()
        finally:
            db.execute(f"PRAGMA user_version={version}")
