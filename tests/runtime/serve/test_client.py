"""runtime/serve/client.py and `motionrt client`: against a real server, and against one that does what servers should not."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from serving import Answering

from motionrt.runtime.serve import client as module
from motionrt.runtime.serve.client import Client, ServerError

DEMO = Path(__file__).resolve().parents[3] / "demo"
STAR = DEMO / "inputs" / "red_star.png"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def client(served: Any) -> Client:
    return Client(served.url)


# --- a real server ----------------------------------------------------------------------------------------------------


def test_client_is_one_file_of_the_standard_library(tmp_path: Path) -> None:
    """A copy of it works in an interpreter that has nothing else, and as a module it brings nothing of the runtime."""
    shutil.copy(module.__file__, tmp_path / "client.py")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import client; client.Client()"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    code = "import sys, motionrt.runtime.serve.client; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"numpy", "msgspec", "starlette"} & set(loaded)
    ours = {name for name in loaded if name.startswith("motionrt")}
    assert ours == {"motionrt", "motionrt.runtime", "motionrt.runtime.serve", "motionrt.runtime.serve.client"}


@pytest.mark.parametrize("form", ["path", "bytes", "data URL"])
def test_create_takes_a_still_in_three_forms_and_any_field(client: Client, form: str, tmp_path: Path) -> None:
    data = STAR.read_bytes()
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    image = {"path": STAR, "bytes": data, "data URL": url}[form]
    job = client.create("a red star", image, seed=5, n=2, steps=4, motion_scale=0.5, references=[1, 2], metadata={"of": form})
    seen = list(client.events(job["id"]))
    last = seen[-1]
    assert last["status"] == "completed" and last["metadata"] == {"of": form}
    assert last["motionrt"]["seeds"] == [5, 6] and [one["id"] for one in last["motionrt"]["references"]] == [1, 2]
    assert [one["progress"] for one in seen] == sorted(one["progress"] for one in seen)
    videos = [client.content(job["id"], tmp_path / f"{index}.mp4", index=index).read_bytes() for index in range(2)]
    assert videos[0] != videos[1] and all(video[4:8] == b"ftyp" for video in videos)
    assert client.content(job["id"], tmp_path / "still.webp", "thumbnail").read_bytes()[:4] == b"RIFF"
    assert client.content(job["id"], tmp_path / "sheet.png", "spritesheet").read_bytes()[:4] == b"\x89PNG"


def test_a_job_is_listed_remixed_cancelled_and_deleted(client: Client) -> None:
    first = client.create("a red star", STAR, steps=2)
    assert client.wait(first["id"])["id"] == first["id"]
    assert client.retrieve(first["id"], wait=5)["status"] == "completed"
    second = client.remix(first["id"], prompt="a blue square", seed=8)
    assert second["remixed_from_video_id"] == first["id"] and second["motionrt"]["seed"] == 8
    long = client.create("a red star", STAR, steps=50, n=8)
    assert client.cancel(long["id"])["error"]["code"] == "cancelled"
    with pytest.raises(ServerError, match="cancelled") as caught:
        client.wait(long["id"])
    assert (caught.value.status, caught.value.code) == (409, "cancelled")
    listed = [job["id"] for job in client.jobs(page=2)]
    assert listed[:3] == [long["id"], second["id"], first["id"]] and len(set(listed)) == len(listed)
    assert [job["id"] for job in client.jobs(page=2, order="asc")] == listed[::-1]
    client.delete(long["id"])
    client.delete(long["id"])  # the first call's answer may have been lost
    with pytest.raises(ServerError, match="no such job") as caught:
        client.retrieve(long["id"])
    assert (caught.value.status, caught.value.code) == (404, "not_found")


def test_models_and_errors_are_those_of_the_server(client: Client, tmp_path: Path) -> None:
    assert "motion_scale" in client.models()[0]["motionrt"]["inputs"]
    with pytest.raises(ServerError) as caught:
        client.create("a red star", STAR, priority="urgent")
    error = caught.value
    assert (error.status, error.code, error.param, error.again) == (400, "invalid_request", "priority", None)
    assert error.message == str(error) and "low, normal, high" in error.message
    job = client.create("a red star", STAR, steps=50, n=8)
    with pytest.raises(ServerError) as caught:
        client.content(job["id"], tmp_path / "early.mp4")
    assert caught.value.code == "video_not_ready" and not list(tmp_path.iterdir())
    client.delete(job["id"])


def test_the_same_idempotency_key_makes_one_job(client: Client) -> None:
    first = client.create("a red star", STAR, steps=2, seed=1, idempotency_key="one")
    assert client.create("a red star", STAR, steps=2, seed=1, idempotency_key="one")["id"] == first["id"]
    with pytest.raises(ServerError) as caught:
        client.create("a red star", STAR, steps=2, seed=2, idempotency_key="one")
    assert caught.value.code == "idempotency_mismatch"


# --- a server that does what servers should not -----------------------------------------------------------------------

Answer = Callable[[BaseHTTPRequestHandler], None]


class Scripted(Answering):
    """Answers each request with the next of `answers`, the last one again and again; `seen`: the requests."""

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self.seen: list[tuple[str, str, dict[str, str], bytes]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                headers = {name.lower(): value for name, value in self.headers.items()}
                outer.seen.append((self.command, self.path, headers, body))
                (outer.answers.pop(0) if len(outer.answers) > 1 else outer.answers[0])(self)

            do_GET = do_POST = do_DELETE = answer

        super().__init__(Handler)


def reply(body: Any, status: int = 200, length: int | None = None, **headers: str) -> Answer:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(data) if length is None else length))
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(data)

    return answer


def hang_up(handler: BaseHTTPRequestHandler) -> None:
    """Close the connection without an answer, behind the body."""


def stream(*jobs: Any) -> Answer:
    text = ": still here\n\n" + "".join(f"id: 1\nevent: progress\ndata: {json.dumps(job)}\n\n" for job in jobs)
    return lambda handler: reply(text.encode() + b"data: {half", Content_Type="text/event-stream")(handler)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scripted]:
    monkeypatch.setattr(module.time, "sleep", lambda seconds: slept.append(seconds))
    slept.clear()
    with Scripted() as server:
        yield server


slept: list[float] = []
REFUSED = {"error": {"message": "the queue is full.", "type": "rate_limit_error", "param": None, "code": "queue_full"}}
GOING, DONE = {"id": "a", "status": "in_progress"}, {"id": "a", "status": "completed"}


def test_a_call_is_repeated_where_that_can_help(scripted: Scripted) -> None:
    scripted.answers = [hang_up, reply(REFUSED, 429, Retry_After="3"), reply(REFUSED, 503), reply(DONE)]
    assert Client(scripted.url).create("a star", b"png") == DONE
    keys = {headers["idempotency-key"] for _, _, headers, _ in scripted.seen}
    assert len(scripted.seen) == 4 and len(keys) == 1 and slept == [0.5, 3.0, 2.0]
    assert {body for *_, body in scripted.seen} == {scripted.seen[0][-1]}


@pytest.mark.parametrize(
    "answer",
    [
        reply(REFUSED, 429, X_Should_Retry="false"), reply(REFUSED, 409), reply(REFUSED, 400),
        reply(REFUSED, 429, Retry_After="900"),
    ],
)  # fmt: skip
def test_a_call_is_not_repeated_where_it_cannot_help(scripted: Scripted, answer: Answer) -> None:
    scripted.answers = [answer]
    with pytest.raises(ServerError, match="the queue is full"):
        Client(scripted.url).create("a star")
    assert len(scripted.seen) == 1


def test_a_call_ends_after_so_many_tries(scripted: Scripted) -> None:
    scripted.answers = [hang_up]
    with pytest.raises(ServerError, match="cannot be reached") as caught:
        Client(scripted.url, tries=3).models()
    assert (caught.value.status, caught.value.code, len(scripted.seen)) == (0, "unreachable", 3)


def test_content_that_breaks_off_is_fetched_again_and_never_half_there(scripted: Scripted, tmp_path: Path) -> None:
    scripted.answers = [reply(b"who", length=5), reply(b"whole")]
    path = Client(scripted.url).content("a", tmp_path / "a.mp4")
    assert path.read_bytes() == b"whole" and len(scripted.seen) == 2 and [*tmp_path.iterdir()] == [path]
    path.write_bytes(b"old")
    scripted.answers = [reply(b"who", length=5)]
    with pytest.raises(ServerError, match="cannot be reached"):
        Client(scripted.url).content("a", path)
    assert path.read_bytes() == b"old" and [*tmp_path.iterdir()] == [path]


def test_events_go_on_where_the_stream_breaks(scripted: Scripted) -> None:
    scripted.answers = [stream(GOING, GOING), hang_up, reply(REFUSED, 503), stream(DONE)]
    client = Client(scripted.url, tries=1)
    assert list(client.events("a")) == [GOING, GOING, DONE]
    asked = [path.removeprefix("/v1/videos/a") for _, path, *_ in scripted.seen]
    assert asked == ["/events", "?wait=2", "/events", "/events"]


def test_events_of_previews_are_passed_over(scripted: Scripted) -> None:
    look = b'id: 1\nevent: preview\ndata: {"id": "a", "step": 3, "link": "/v1"}\n\n'
    whole = b"".join(b"id: 1\nevent: progress\ndata: " + json.dumps(job).encode() + b"\n\n" for job in (GOING, DONE))
    scripted.answers = [reply(look + whole, Content_Type="text/event-stream")]
    assert list(Client(scripted.url).events("a")) == [GOING, DONE]


def test_events_are_polled_where_no_stream_comes_through(scripted: Scripted) -> None:
    page = reply(b"<html>", Content_Type="text/html")
    scripted.answers = [page, reply(GOING), page, hang_up, reply(DONE)]
    assert list(Client(scripted.url).events("a")) == [GOING, DONE]
    assert [path for _, path, *_ in scripted.seen][-2:] == ["/v1/videos/a?wait=2"] * 2


@pytest.mark.parametrize("answer", [hang_up, reply(REFUSED, 503)])
def test_events_end_when_the_server_stays_away(scripted: Scripted, answer: Answer) -> None:
    scripted.answers = [answer]
    impatient = Client(scripted.url)
    impatient.patience = 0.05
    with pytest.raises(ServerError):
        list(impatient.events("a"))
    scripted.answers, scripted.seen[:] = [reply(REFUSED, 404)], []
    with pytest.raises(ServerError):
        list(Client(scripted.url).events("a"))
    assert len(scripted.seen) == 1


def test_the_key_is_sent_to_the_server_and_to_nobody_else(scripted: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    with Scripted() as other:
        other.answers = [reply({"data": []})]
        scripted.answers = [reply(b"", 302, Location=f"{other.url}/v1/models")]
        monkeypatch.setenv("MOTIONRT_API_KEY", "mrt_secret")
        monkeypatch.setenv("MOTIONRT_SERVER", f"{scripted.url}/")
        assert Client().models() == []
        assert scripted.seen[0][1:3][1]["authorization"] == "Bearer mrt_secret"
        assert len(other.seen) == 1 and "authorization" not in other.seen[0][2]


def test_answers_of_another_kind_of_server_are_told_plainly(scripted: Scripted) -> None:
    scripted.answers = [reply(b"<html>Bad gateway</html>", 404), reply(b"<html>hello</html>")]
    with pytest.raises(ServerError, match="status 404") as caught:
        Client(scripted.url).models()
    assert caught.value.code == "http_error"
    with pytest.raises(ServerError, match="not JSON"):
        Client(scripted.url).models()
    with pytest.raises(ServerError, match="must begin with http"):
        Client("box:8420")


# --- the command ------------------------------------------------------------------------------------------------------


def test_create_writes_the_video_that_was_asked_for(run: Run, served: Any, tmp_path: Path) -> None:
    out = tmp_path / "made" / "star.webp"
    said = ("--image", STAR, "-p", "a red star", "--server", served.url, "--set", "steps=3", "--set", "motion_scale=0.5")
    status, printed, err = run("client", "create", *said, "--seed", 4, "-n", 2, "-o", out)
    assert status == 0, err
    assert printed.splitlines() == [f"{tmp_path}/made/star-{index}.webp: seed {4 + index}" for index in range(2)]
    assert all((tmp_path / "made" / f"star-{index}.webp").read_bytes()[:4] == b"RIFF" for index in range(2))
    job = err.split()[0]
    assert json.loads(run("client", "get", job, "--server", served.url)[1])["motionrt"]["request"]["motion_scale"] == 0.5
    assert run("client", "get", job, "-o", tmp_path / "again.webp", "--server", served.url)[0] == 0


def test_jobs_are_watched_listed_cancelled_and_deleted(run: Run, served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOTIONRT_SERVER", served.url)
    status, printed, _ = run("client", "create", "--image", STAR, "-p", "a red star", "--set", "steps=50", "-n", 8)
    job = printed.strip()
    assert status == 0 and job.startswith("video_")
    assert "was cancelled" in run("client", "cancel", job)[1]
    assert run("client", "watch", job)[::2] == (2, "motionrt: cancelled: the job was cancelled.\n")
    assert job in run("client", "list", "--limit", 1)[1] and len(run("client", "list", "--limit", 1)[1].splitlines()) == 1
    assert run("client", "delete", job)[1] == f"{job}: deleted.\n"
    assert run("client", "get", job)[::2] == (2, "motionrt: not_found: there is no such job, or it is not yours.\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("create", "-o", "a.mov"), "extension '.mov' is not one of"),
        (("create", "--set", "steps"), "it takes NAME=VALUE"),
        (("create", "--seed", 3, "--set", "seed=4"), "each name once"),
        (("create", "-p", "a star", "--set", "prompt=a moon"), "each name once"),
        (("create", "--image", "gone.png"), "gone.png: No such file"),
        (("get", "a", "--server", "http://127.0.0.1:1"), "cannot be reached"),
    ],
)
def test_what_is_wrong_is_one_sentence(
    run: Run, arguments: tuple[object, ...], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    status, _, err = run("client", *arguments)
    assert status == 2 and words in err and len(err.splitlines()) == 1
