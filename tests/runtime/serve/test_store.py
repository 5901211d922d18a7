"""The store: a job is there before anyone is told of it, what has no row goes, and nobody sees the jobs of others."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from motionrt.runtime.serve.jobs.store import JobRow, Store, new_id
from motionrt.runtime.serve.messages import Written
from motionrt.runtime.serve.web.refusal import Refused

DAY = 86400.0


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(tmp_path / "store")
    yield opened
    opened.close()


def row(key: str = "k", **more: Any) -> JobRow:
    return JobRow(id=new_id(), key=key, model="demo", created=time.time(), asked={"fields": {"prompt": "a"}}, **more)


def upload(store: Store, name: str, data: bytes = b"picture") -> tuple[Path, Written]:
    path = store.uploads / name
    path.write_bytes(data)
    return path, Written(name, f"input-{name}", "image/png", len(data), "0" * 64)


def everything(store: Store) -> list[str]:
    return sorted(str(path.relative_to(store.folder)) for path in store.folder.rglob("*") if path.is_file())


def test_a_job_is_what_it_was_when_it_is_read_again(store: Store) -> None:
    made = store.create(row(metadata={"a": "b"}, idempotency="i", expected=2.5), [upload(store, "image")])
    assert store.get(made.id) == made and store.get(made.id, "k") == made and store.get(made.id, "other") is None
    assert store.files(made.id)["input-image"].size == 7 and (store.place(made.id) / "image").read_bytes() == b"picture"
    assert not [*store.uploads.iterdir()]
    begun = store.begin(made.id)
    assert (begun.status, begun.attempt) == ("in_progress", 1)
    assert store.requeue(made.id).attempt == 1 and store.begin(made.id).attempt == 2
    assert store.requeue(made.id, counted=False).attempt == 1
    ended = store.end(made.id, "completed", DAY, result={"x": 1}, files=[Written("v.mp4", "video-0", "video/mp4", 5, "1" * 64)])
    assert ended.over and ended.result == {"x": 1} and ended.expires is not None and ended.ended is not None
    assert ended.expires - ended.ended == DAY and set(store.files(made.id)) == {"input-image", "video-0"}
    assert store.size() == 12


def test_what_was_stored_outlives_a_kill_at_once(tmp_path: Path) -> None:
    """The process that made the job ends without another word."""
    code = (
        "import os, sys; from pathlib import Path; from motionrt.runtime.serve.jobs.store import JobRow, Store\n"
        "store = Store(Path(sys.argv[1]))\n"
        "store.create(JobRow(id='video_' + 'a' * 32, key='k', model='demo', created=1.0, asked={}))\n"
        "print('stored', flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "store")], capture_output=True, text=True)
    assert done.stdout == "stored\n", done.stderr
    store = Store(tmp_path / "store")
    assert [job.id for job in store.waiting()] == ["video_" + "a" * 32]
    store.close()


def test_no_row_no_job(store: Store) -> None:
    """Where the row cannot be written, the files go too."""
    made = store.create(row(idempotency="same"))
    with pytest.raises(sqlite3.IntegrityError):
        store.create(row(idempotency="same"), [upload(store, "image")])
    assert everything(store) == ["jobs.sqlite", "jobs.sqlite-wal"]
    assert store.again("k", "same", "", 0) == made and store.again("other", "same", "", 0) is None


def test_a_repeat_is_known_by_its_digest_for_a_while(store: Store) -> None:
    made = store.create(row(digest="d"))
    assert store.again("k", None, "d", made.created - 1) == made
    assert store.again("k", None, "d", made.created + 1) is None and store.again("other", None, "d", 0) is None
    kept = store.create(row(idempotency="i"))
    store.forget_keys(kept.created - 1)
    assert store.again("k", "i", "", 0) == kept
    store.forget_keys(kept.created + 1)
    assert store.again("k", "i", "", 0) is None


def test_pages_go_on_where_the_last_one_ended(store: Store) -> None:
    jobs = [store.create(row("k" if i % 3 else "other")).id for i in range(12)]
    mine = [job for i, job in enumerate(jobs) if i % 3]
    for descending, wanted in ((False, mine), (True, mine[::-1])):
        got: list[str] = []
        more, after = True, None
        while more:
            rows, more = store.page("k", "video", after, 3, descending)
            got += [one.id for one in rows]
            after = got[-1]
        assert got == wanted
    assert len(store.page(None, "video", None, 100, True)[0]) == 12
    with pytest.raises(Refused, match="after"):
        store.page("k", "video", jobs[0], 3, True)  # another's


def test_what_is_over_expires_by_time_and_by_size_the_oldest_first(store: Store) -> None:
    def finished(name: str, lifetime: float = DAY) -> str:
        made = store.create(row(), [upload(store, name, bytes(100))])
        store.end(made.id, "completed", lifetime, result={})
        return made.id

    running, due, old, new = (
        store.create(row(), [upload(store, "r", bytes(100))]).id,
        finished("a", -1),
        finished("b"),
        finished("c"),
    )
    assert store.expire(10**9) == [due]
    assert store.expire(200) == [old]
    gone = store.get(old)
    assert gone is not None and gone.status == "expired" and gone.result is None  # it is said that it was there
    assert not store.place(old).exists() and store.place(new).exists() and store.place(running).exists()
    assert store.expire(0) == [new] and store.size() == 100  # what is not over never goes
    assert [one.id for one in store.page("k", "video", None, 9, True)[0]] == [running]
    store.delete(running)
    assert store.get(running) is None and store.size() == 0 and not store.place(running).exists()


def test_what_makes_no_room_is_not_given_up_for_it(store: Store) -> None:
    failed, large = store.create(row()), store.create(row(), [upload(store, "image")])
    store.end(failed.id, "failed", DAY, error={"code": "failed", "message": "why"})
    store.end(large.id, "completed", DAY, result={})
    assert store.expire(0) == [large.id]
    kept = store.get(failed.id)
    assert kept is not None and kept.status == "failed"


def test_what_has_no_row_goes_when_the_server_starts(store: Store) -> None:
    kept = store.create(row(), [upload(store, "image")])
    (store.place(kept.id) / "half-written.mp4").write_bytes(b"x")
    orphan = store.place(new_id())
    orphan.mkdir(parents=True)
    (orphan / "video.mp4").write_bytes(b"x")
    upload(store, "left")
    store.sweep()
    assert [name for name in everything(store) if "sqlite" not in name] == [f"files/{kept.id[-2:]}/{kept.id}/image"]


def test_what_a_job_that_failed_has_written_goes_with_its_end(store: Store) -> None:
    made = store.create(row(), [upload(store, "image")])
    (store.place(made.id) / "video-0.mp4").write_bytes(b"the first of two seeds; there was no room for the second")
    store.end(made.id, "failed", DAY, error={"code": "storage_full", "message": "no room"})
    assert [path.name for path in store.place(made.id).iterdir()] == ["image"]


def test_a_store_is_of_one_server_at_a_time(store: Store) -> None:
    with pytest.raises(Refused, match="open in another server"):
        Store(store.folder)
