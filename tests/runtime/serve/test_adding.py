"""Reading a clip for a memory without a server: what may be read, and that a job that was cut short is done once or undone."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import sqlite3
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from motionrt.runtime.errors import MediaError
from motionrt.runtime.files import sha256_of
from motionrt.runtime.media.video import write_video
from motionrt.runtime.memory.memory import MotionMemory
from motionrt.runtime.serve.jobs import additions
from motionrt.runtime.serve.jobs.additions import Additions
from motionrt.runtime.serve.jobs.store import ATTEMPTS, JobRow, Store, new_id
from motionrt.runtime.serve.messages import Adding, Said, Written
from motionrt.runtime.serve.settings import Settings
from motionrt.runtime.serve.web.refusal import Refused
from motionrt.runtime.serve.work import adding, changes

DEMO = Path(__file__).resolve().parents[3] / "demo"
VIDEO = next((DEMO / "clips_unseen").glob("*.mp4"))


@pytest.fixture
def memory(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DEMO / "memory", tmp_path / "memory"))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(tmp_path / "store")
    yield opened
    opened.close()


def add(memory: Path, video: Path, **more: Any) -> Said:
    stages: list[str] = []
    given: dict[str, Any] = {"caption": "a heron stands up", "threads": 1, "decoding": 1 << 30, **more}
    bundle = str(DEMO / "bundle")
    said = adding.add(
        Adding(memory=str(memory), bundle=bundle, video=str(video), sha256=sha256_of(video), **given), stages.append
    )
    assert stages in (["opening", "reading", "encoding"], ["opening", "reading"])
    return said


def clips(memory: Path) -> list[int]:
    with MotionMemory.open(memory, readonly=True) as opened:
        return [int(number) for number in opened.ids()]


def kept(store: Store, memory: Path, clip: int = 0) -> JobRow:
    """A job in the store, with its file; finished if it has a clip."""
    name = new_id("memory")
    path = store.uploads / "upload"
    shutil.copyfile(VIDEO, path)
    asked = {"fields": {"caption": "a heron stands up"}, "bundle": "demo", "memory": str(memory)}
    row = JobRow(id=name, key="k", kind="memory", model="memory", created=time.time(), asked=asked)
    row = store.create(row, [(path, Written(f"{name}.mp4", "clip", "video/mp4", path.stat().st_size, sha256_of(path)))])
    return store.end(name, "completed", None, result={"clip": clip, "added": True}) if clip else row


def source(store: Store, row: JobRow) -> Path:
    return store.place(row.id) / f"{row.id}.mp4"


def test_what_was_added_before_a_kill_is_added_once(memory: Path, tmp_path: Path) -> None:
    first = add(memory, VIDEO)
    assert first == Said(clip=193, added=True) == add(memory, VIDEO)  # the second try of the job finds what the first did
    other = tmp_path / "same bytes.mp4"
    shutil.copyfile(VIDEO, other)
    assert add(memory, other) == Said(clip=193, added=False)
    moved = add(memory, other, start=0.5)
    assert moved == Said(clip=194, added=True) and len(clips(memory)) == 194


def test_a_clip_without_a_caption_gets_one_by_its_motion_once(memory: Path, tmp_path: Path) -> None:
    first = add(memory, VIDEO, caption="", describe=True)
    assert first == Said(clip=193, added=True) == add(memory, VIDEO, caption="", describe=True)
    other, third = tmp_path / "same bytes.mp4", tmp_path / "once more.mp4"
    for path in (other, third):
        shutil.copyfile(VIDEO, path)
    with MotionMemory.open(memory, readonly=True) as opened:
        (clip,) = opened.get([193])
    assert clip.metadata["captioned"] == "by motion" and clip.metadata["motion"] in clip.caption
    assert add(memory, other, describe=True) == Said(clip=194, added=True)  # it has one of its own, and is described besides
    assert add(memory, third, caption="", describe=True) == Said(clip=193, added=False)
    with MotionMemory.open(memory, readonly=True) as opened:
        (own,) = opened.get([194])
    assert own.caption == "a heron stands up" and own.metadata.get("captioned") is None
    assert {name: own.metadata[name] for name in ("motion", "path", "camera", "strength")}.items() <= clip.metadata.items()


@pytest.mark.parametrize("head", ["#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{}\n", "ffconcat version 1.0\nfile {}\n"])
@pytest.mark.parametrize("name", ["a.mp4", "a.m3u8"])
def test_check_video_follows_nothing_that_a_file_names(tmp_path: Path, head: str, name: str) -> None:
    path = tmp_path / name
    with socket.create_server(("127.0.0.1", 0)) as bait:
        bait.settimeout(0.05)
        for address in (f"http://127.0.0.1:{bait.getsockname()[1]}/a.mp4", str(VIDEO)):
            path.write_text(head.format(address))
            with pytest.raises(MediaError, match="cannot be read as an mp4, mov or webm"):
                adding.check_video(path)
        with pytest.raises(TimeoutError):
            bait.accept()


def test_check_video_takes_no_more_than_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (5, 32, 48, 3), np.uint8)
    endless, gif = tmp_path / "endless.mp4", tmp_path / "a.gif"
    write_video(endless, frames, 0.001)
    write_video(gif, frames, 10)
    with pytest.raises(MediaError, match="plays for 5000 s; allowed are 3600"):
        adding.check_video(endless)
    with pytest.raises(MediaError, match="cannot be read as an mp4"):
        adding.check_video(gif)
    monkeypatch.setattr(adding, "PIXELS", 32 * 48 - 1)
    with pytest.raises(MediaError, match="frames of 48 x 32"):
        adding.check_video(endless)


def test_reading_has_so_much_memory_and_encoding_has_all() -> None:
    with adding._memory_bound(64 << 20) as lift:
        with pytest.raises(MemoryError):
            np.empty(256 << 20, np.uint8)
        assert lift() and not lift()
        np.empty(256 << 20, np.uint8)


def run(store: Store, memory: Path, *then: Callable[[Additions], Awaitable[None]]) -> None:
    """A server takes up the jobs that it finds, and does them, or what is given. Then it stops at once."""

    async def serve() -> None:
        settings = Settings({"demo": DEMO / "bundle"}, store.folder, {"memory": memory}, run_options={"threads": 1})
        server = Additions(store, settings)
        await server.start()
        for step in then:
            await step(server)
        while server.jobs and not then:
            await asyncio.sleep(0.01)
        await server.stop(0.0, asyncio.Event())

    asyncio.run(serve())


def test_a_job_that_is_given_up_is_taken_out_of_the_memory(store: Store, memory: Path) -> None:
    """Killed after the clip was added, and before that was stored, for the second time."""
    row = kept(store, memory)
    for _ in range(ATTEMPTS):
        store.begin(row.id)
    assert add(memory, source(store, row)).added and len(clips(memory)) == 193
    run(store, memory)
    ended = store.get(row.id)
    assert ended is not None and ended.error is not None and ended.error["code"] == "worker_restarted"
    assert 193 not in clips(memory) and len(clips(memory)) == 192 and not store.files(row.id)
    assert not source(store, row).exists()


def test_a_job_that_was_cut_short_is_done_when_a_server_starts(store: Store, memory: Path) -> None:
    row = kept(store, memory)
    store.begin(row.id)
    run(store, memory)
    ended = store.get(row.id)
    assert ended is not None and (ended.status, ended.attempt, ended.expires) == ("completed", 2, None)
    assert ended.result == {"clip": 193, "added": True} and source(store, row).is_file()


def test_a_server_starts_on_a_full_disk(store: Store, memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = kept(store, memory)
    store.begin(row.id)

    def full(*arguments: Any, **named: Any) -> Any:
        raise sqlite3.OperationalError("database or disk is full")

    for name in ("begin", "requeue", "end"):
        monkeypatch.setattr(store, name, full)

    async def waits(server: Additions) -> None:
        assert [*server.jobs] == [row.id]

    run(store, memory, waits)


@pytest.mark.slow
def test_a_job_that_is_stopped_with_the_server_is_done_by_the_next(store: Store, memory: Path) -> None:
    row = kept(store, memory)

    async def begun(server: Additions) -> None:
        while server.jobs[row.id].stage == "queued":
            await asyncio.sleep(0.01)

    run(store, memory, begun)
    waits = store.get(row.id)
    assert waits is not None and (waits.status, waits.attempt) == ("queued", 0) and source(store, row).is_file()
    run(store, memory)
    ended = store.get(row.id)
    assert ended is not None and (ended.status, ended.attempt) == ("completed", 1) and len(clips(memory)) == 193


def test_what_is_cancelled_leaves_nothing(store: Store, memory: Path) -> None:
    rows = [kept(store, memory) for _ in range(2)]

    async def cancelled(server: Additions) -> None:
        while server.jobs[rows[0].id].stage == "queued":
            await asyncio.sleep(0.01)
        assert server.position(server.jobs[rows[1].id]) == 1
        for row in reversed(rows):  # one that waits, one that runs
            await server.cancel(row.id)
            ended = store.get(row.id)
            assert ended is not None and ended.error is not None and ended.error["code"] == "cancelled"
            assert not source(store, row).exists() and not store.files(row.id)

    run(store, memory, cancelled)
    assert len(clips(memory)) == 192


def test_a_video_that_takes_too_long_to_read_is_given_up(store: Store, memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(additions, "_READING", 1e-6)
    row = kept(store, memory)
    run(store, memory)
    ended = store.get(row.id)
    assert ended is not None and ended.error is not None and "to read" in ended.error["message"], ended
    assert len(clips(memory)) == 192 and not source(store, row).exists()


def test_files_of_clips_stay_as_long_as_their_clips(store: Store, memory: Path, tmp_path: Path) -> None:
    there, removed, elsewhere = kept(store, memory, 5), kept(store, memory, 500), kept(store, tmp_path / "unmounted", 5)
    video = JobRow(id=new_id(), key="k", model="demo", created=time.time(), asked={"fields": {}})
    store.create(video)
    store.end(video.id, "completed", 1e6)
    assert store.expire(10**9) == [] and store.expire(0) == [] and store.sweep() == 0  # no matter how many bytes they have
    run(store, memory)
    assert store.get(removed.id) is None and not source(store, removed).exists()
    assert source(store, there).is_file() and source(store, elsewhere).is_file()
    (source(store, there).parent / "other").touch()
    assert store.sweep() == 1 and source(store, there).is_file()


def test_take_back_leaves_what_others_added(memory: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.mp4"
    shutil.copyfile(VIDEO, other)
    assert [add(memory, VIDEO).clip, add(memory, other, caption="another").clip] == [193, 194]
    changes.take_back(memory, other, sha256_of(VIDEO))
    assert 194 not in clips(memory) and 193 in clips(memory)


def test_a_memory_that_is_read_only_is_refused(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes.check_writable(memory)
    monkeypatch.setattr(os, "access", lambda *args, **named: False)
    for call in (lambda: changes.check_writable(memory), lambda: changes.remove_clip(memory, 1)):
        with pytest.raises(Refused, match="read-only") as refused:
            call()
        assert refused.value.status == 409 and str(memory.parent) not in refused.value.message
    assert 1 in clips(memory)
