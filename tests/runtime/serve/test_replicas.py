"""Replicas behind the server, without Ray: a `Replica` in this process, at a URL as Ray Serve has it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from msgspec.msgpack import encode
from serving import Served, serving
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route

from motionrt.runtime.errors import BackendError, InputError, MotionRTError
from motionrt.runtime.files import sha256_of
from motionrt.runtime.pipeline import MotionPipeline
from motionrt.runtime.serve.messages import Ended, Opening, Order, Progress, Run, Sent
from motionrt.runtime.serve.replicas import replica as replicas
from motionrt.runtime.serve.replicas.relay import Relay
from motionrt.runtime.serve.replicas.replica import Replica
from motionrt.runtime.serve.settings import Settings
from motionrt.runtime.serve.work.engine import Engine
from motionrt.runtime.serve.work.written import sha256_of_frames


class Watched(Replica):
    """A replica that refuses the next `refusals` jobs, and dies in the middle of the next `deaths`. ended: how the last did."""

    refusals, deaths, ended = 0, 0, ""

    async def __call__(self, request: Request) -> Response:
        if self.refusals:
            self.refusals -= 1
            return Response(status_code=503)
        return await super().__call__(request)

    async def carry(self, sent: bytes) -> AsyncIterator[bytes]:
        async with contextlib.aclosing(super().carry(sent)) as pieces:
            async for piece in pieces:
                yield piece
                if self.deaths and b'"denoising"' in piece:
                    self.deaths -= 1
                    raise RuntimeError("died")

    def _tell(self, name: str, said: Progress | Ended | None) -> None:
        self.ended = said.outcome if isinstance(said, Ended) else ""
        super()._tell(name, said)


@contextlib.contextmanager
def at_url(replica: Replica, name: str) -> Iterator[str]:
    """The URL of a replica of the bundle `name`, in a thread of this process."""

    async def routes(request: Request) -> JSONResponse:
        return JSONResponse({f"/{name}": name})

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        await replica.reconfigure({})
        yield
        assert replica._worker is not None
        await replica._worker.stop()

    inner = [Route("/-/routes", routes), Route(f"/{name}", replica.__call__, methods=["POST"])]
    app = Starlette(routes=[Mount("/ray", routes=inner)], lifespan=lifespan)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, ws="none", timeout_graceful_shutdown=1))
    sock = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([sock],))
    thread.start()
    try:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}/ray"
    finally:
        server.should_exit = True
        thread.join(30)


def opening(bundle: Path, memory: Path | None = None, name: str = "fake") -> dict[str, Any]:
    memories = {} if memory is None else {"memory": str(memory)}
    return {name: {"bundles": {name: str(bundle)}, "memories": memories, "run_options": {"threads": 1}}}


@pytest.fixture(scope="module")
def replica(fake_bundle: Path, fake_memory: Path) -> Watched:
    return Watched(opening(fake_bundle, fake_memory))


@pytest.fixture(scope="module")
def served(
    replica: Watched, fake_bundle: Path, fake_memory: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    store = tmp_path_factory.mktemp("served") / "store"
    with (
        at_url(replica, "fake") as url,
        serving(store, Path(f"fake={fake_bundle}"), Path(f"memory={fake_memory}"), f"--replicas={url}") as running,
    ):
        yield running


def until(done: Callable[[], Any], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_replica_gives_the_frames_of_the_pipeline(
    served: Served, replica: Watched, picture: Path, fake_bundle: Path, fake_memory: Path
) -> None:
    told = served.until(served.create(picture, seed=3)["id"], "completed", "failed")
    assert told["status"] == "completed", told
    with MotionPipeline.from_bundle(fake_bundle, memory=fake_memory, threads=1) as pipeline:
        frames = pipeline(image=picture, prompt="a red ball moves", seed=3).frames
    about = told["motionrt"]
    assert about["frames_sha256"] == [sha256_of_frames(frames)] and about["replica"] == replica.name
    assert about["references"] and about["attempt"] == 1
    video = served.call("GET", f"/v1/videos/{told['id']}/content")
    assert video.status == 200 and b"ftyp" in video.body[:32]
    assert replica._jobs == {}  # and its folder is gone


def test_a_job_whose_replica_dies_goes_back_once(served: Served, replica: Watched, picture: Path) -> None:
    replica.deaths = 1
    told = served.until(served.create(picture, seed=4)["id"], "completed", "failed")
    assert (told["status"], told["motionrt"]["attempt"], replica.deaths) == ("completed", 2, 0)
    assert served.until_ready()


def test_a_cancelled_job_stops_in_the_replica_within_a_step(
    served: Served, replica: Watched, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may, turns, turn = threading.Semaphore(0), [0], Engine.turn

    def one_at_a_time(engine: Engine) -> None:
        assert may.acquire(timeout=30)
        turns[0] += 1
        turn(engine)

    monkeypatch.setattr(Engine, "turn", one_at_a_time)
    job = served.create(picture, steps=10, n=8)["id"]
    until(lambda: replica._jobs)
    while served.get(job)["motionrt"]["step"] < 3:
        may.release()
        until(lambda: not may._value)
    assert served.call("POST", f"/v1/videos/{job}/cancel").json["error"]["code"] == "cancelled"
    until(lambda: all(one.left for one in replica._jobs.values()))
    before = turns[0]
    for _ in range(100):  # the call that waited is run, and no other
        may.release()
    until(lambda: replica.ended)
    assert replica.ended == "cancelled" and turns[0] <= before + 1
    assert replica._jobs == {}


def test_a_job_waits_while_no_replica_takes_it(served: Served, replica: Watched, picture: Path) -> None:
    replica.refusals = 1
    told = served.until(served.create(picture, seed=5)["id"], "completed", "failed")
    assert (told["status"], told["motionrt"]["attempt"], replica.refusals) == ("completed", 1, 0)


def test_a_replica_of_another_bundle_makes_nothing(replica: Watched) -> None:
    run = Run(job="a", order=Order(model="other", fields={}), folder="")

    async def lines() -> list[bytes]:
        return [piece async for piece in replica.carry(encode(Sent(run=run, files={}, digest="")))]

    first, last = asyncio.run(lines())
    assert first == b"\n" and json.loads(last)["error"]["code"] == "other_bundle"


def test_a_replica_of_several_bundles_opens_the_one_that_a_job_wants(
    fake_bundle: Path, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says that it is alive while a bundle is being opened: a large one takes longer than a server waits for a word."""
    monkeypatch.setattr(replicas, "BEAT", 0.001)
    asks = {"prompt": "a ball", "motion_scale": 0}

    async def run() -> None:
        several = Replica({name: opening(fake_bundle, name=name)[name] for name in "ab"})
        await several.reconfigure({})
        for name in "aba":
            order = Order(model=name, fields=asks)
            sent = Sent(
                run=Run(job="one", order=order, folder=""), files={"input_reference": picture.read_bytes()},
                digest=sha256_of(fake_bundle / "bundle.json"),
            )  # fmt: skip
            before = several._worker
            lines = [piece async for piece in several.carry(encode(sent))]
            assert any(b'"completed"' in line for line in lines)
            assert several._worker is not None and [*several._worker.opening.bundles] == [name]
            if before is not several._worker:
                assert lines[:2] == [b"\n", b"\n"]
        await several._worker.stop()

    asyncio.run(run())


def test_a_bundle_that_cannot_be_opened_is_said(tmp_path: Path) -> None:
    async def run() -> None:
        replica = Replica({"a": {"bundles": {"a": str(tmp_path / "none")}}})
        with pytest.raises(MotionRTError, match="none"):
            await replica.reconfigure({})
        with pytest.raises(MotionRTError, match="none"):
            replica.check_health()

    asyncio.run(run())


def test_a_server_without_its_replicas_says_so(fake_bundle: Path, replica: Watched) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        nobody = f"http://127.0.0.1:{sock.getsockname()[1]}"
    with pytest.raises(BackendError, match=f"no replicas answer at {nobody}"):
        Relay(Opening(bundles={"fake": str(fake_bundle)}, replicas=nobody), print)
    with at_url(Replica(opening(fake_bundle)), "fake") as url, pytest.raises(BackendError, match="has no replicas of other"):
        Relay(Opening(bundles={"other": str(fake_bundle)}, replicas=url), print)


@pytest.mark.parametrize(
    "options", [{"replicas": "ray://here"}, {"batch": 2}, {"devices": ("cuda:0",)}, {"workers": 0}], ids=str
)
def test_options_that_are_the_replicas_are_refused(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="replicas"):
        Settings({"a": tmp_path}, tmp_path, **{"replicas": "http://127.0.0.1:8000", **options})
