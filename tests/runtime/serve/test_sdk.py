"""The OpenAI SDK's `client.videos`, unchanged, against the demo's bundle.

The package is a dependency of the tests alone, at one version: its vendor has ended the service that these methods were for.
"""

from __future__ import annotations

import base64
import http.client
import os
import signal
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from serving import Answering, Served, serving

from motionrt.runtime.serve.web.keys import Keys, Quota

openai = pytest.importorskip("openai", reason="the SDK is not installed; it is part of the extra `dev`")
# Each of these methods says that its vendor has ended the service.
pytestmark = pytest.mark.filterwarnings("ignore:The Sora API is scheduled to permanently shut down:DeprecationWarning")

DEMO = Path(__file__).resolve().parents[3] / "demo"
STAR = DEMO / "inputs" / "red_star.png"
QUICK = {"steps": 3}
LONG = {"steps": 50, "n": 8}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The secrets of API keys by name, and `file`, where the server finds them."""
    file = tmp_path_factory.mktemp("keys") / "keys.json"
    keys = Keys.open(file, new=True)
    made = {"maker": keys.create("maker", ["generate"]), "reader": keys.create("reader", ["read"])}
    made["single"] = keys.create("single", ["generate"], Quota(waiting=1))
    return made | {"file": str(file)}


@pytest.fixture(scope="module")
def keyed(tokens: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server of the demo that asks for keys."""
    store = tmp_path_factory.mktemp("keyed") / "store"
    with serving(store, DEMO / "bundle", DEMO / "memory", f"--keys={tokens['file']}", key=tokens["maker"]) as running:
        yield running


@pytest.fixture
def client(keyed: Served, tokens: dict[str, str]) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{keyed.url}/v1", api_key=tokens["maker"]) as made:
        yield made


def test_a_video_is_made_listed_fetched_remixed_and_deleted(client: Any) -> None:
    with STAR.open("rb") as still:
        video = client.videos.create_and_poll(prompt="a red star bounces", input_reference=still, size="64x64", seconds="2.125")
    assert (video.status, video.progress, video.object, video.error) == ("completed", 100, "video", None)
    assert (video.size, video.seconds, video.prompt) == ("64x64", "2.125", "a red star bounces")
    assert video.created_at <= video.completed_at < video.expires_at
    assert video.model_extra["motionrt"]["stage"] == "done" and video.model_extra["motionrt"]["references"]
    assert client.videos.retrieve(video.id).to_dict() == video.to_dict()
    starts = {"video": b"ftyp", "thumbnail": b"RIFF", "spritesheet": b"\x89PNG"}
    for variant, start in starts.items():
        assert start in client.videos.download_content(video.id, variant=variant).read()[:8]
    again = client.videos.remix(video.id, prompt="a blue star bounces")
    assert (again.remixed_from_video_id, again.prompt) == (video.id, "a blue star bounces")
    assert client.videos.poll(again.id, poll_interval_ms=20).status == "completed"
    for job in (video.id, again.id):
        deleted = client.videos.delete(job)
        assert (deleted.id, deleted.deleted, deleted.object) == (job, True, "video.deleted")
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(video.id)


def test_the_list_is_walked_over_its_pages(client: Any) -> None:
    made = [client.videos.create(prompt=f"star {i}", input_reference=STAR, extra_body=QUICK).id for i in range(5)]
    first = client.videos.list(limit=2)
    assert [job.id for job in first.data] == made[:-3:-1] and first.has_more and first.last_id == made[-2]
    walked = [job.id for job in first]
    assert walked[:5] == made[::-1] and len(set(walked)) == len(walked)
    assert [job.id for job in client.videos.list(order="asc", limit=3, after=made[1])] == made[2:]
    for job in made:
        client.videos.delete(job)
    assert not list(client.videos.list())


@pytest.mark.parametrize("form", ["a bare stream", "bytes", "a name and bytes", "a data URL"])
def test_extras_and_stills_come_in_all_forms_that_it_sends(client: Any, form: str) -> None:
    """Numbers and truth values become text, what is nested becomes names with brackets, and a stream has no name or type."""
    data = STAR.read_bytes()
    still: Any = {"a bare stream": BytesIO(data), "bytes": data, "a name and bytes": ("x.bin", data)}.get(form)
    extras: dict[str, Any] = {
        "seed": 5, "n": 2, "motion_scale": 0.5, "guidance": 1, "where": {"dataset": "demo"}, "without_damaged": True,
        "motionrt": {"steps": 3, "output": "webp"}, "metadata": {"who": "a test"}, "priority": "low",
    }  # fmt: skip
    if still is None:
        extras["input_reference"] = {"image_url": f"data:image/png;base64,{base64.b64encode(data).decode()}"}
        still = openai.omit
    video = client.videos.create(prompt="a red star bounces", input_reference=still, extra_body=extras)
    told = video.model_extra["motionrt"]
    assert told["seeds"] == [5, 6] and told["priority"] == "low" and video.model_extra["metadata"] == {"who": "a test"}
    wanted = {"motion_scale": 0.5, "guidance": 1, "where": {"dataset": "demo"}, "steps": 3, "output": "webp"}
    assert wanted.items() <= told["request"].items() and told["request"]["without_damaged"] is True
    client.videos.delete(video.id)


def test_references_go_by_number_or_by_id(client: Any) -> None:
    for given, ids in (([4, 2], {2, 4}), (3, None)):
        made = client.videos.create(prompt="a star", input_reference=STAR, extra_body={"references": given, **QUICK})
        found = client.videos.poll(made.id, poll_interval_ms=20).model_extra["motionrt"]["references"]
        assert {one["id"] for one in found} == ids if ids else len(found) == 3
        client.videos.delete(made.id)


def test_every_refusal_is_the_error_that_it_knows(client: Any, keyed: Served, tokens: dict[str, str]) -> None:
    def refused(kind: type, code: str, call: Any, **named: Any) -> Any:
        with pytest.raises(kind) as caught:
            call(**named)
        error = caught.value
        assert type(error) is kind and error.code == code and error.type.endswith("_error"), error
        return error

    videos = client.videos
    bad = refused(openai.BadRequestError, "invalid_request", videos.create, prompt="a", input_reference=STAR, size="1x1")
    assert "64x64" in bad.message
    wrong = client.with_options(api_key="mrt_wrong").videos
    assert refused(openai.AuthenticationError, "invalid_api_key", wrong.retrieve, video_id="video_0").status_code == 401
    reader = client.with_options(api_key=tokens["reader"]).videos
    refused(openai.PermissionDeniedError, "not_allowed", reader.create, prompt="a", input_reference=STAR)
    refused(openai.NotFoundError, "not_found", videos.retrieve, video_id="video_0")
    refused(openai.NotFoundError, "model_not_found", videos.create, prompt="a", input_reference=STAR, model="sora-2")
    refused(openai.NotFoundError, "not_supported", videos.get_character, character_id="one")

    single = client.with_options(api_key=tokens["single"]).videos
    long = single.create(prompt="a", input_reference=STAR, extra_body=LONG)
    theirs = refused(openai.NotFoundError, "not_found", videos.retrieve, video_id=long.id)
    assert theirs.message == refused(openai.NotFoundError, "not_found", videos.retrieve, video_id="video_0").message
    early = refused(openai.ConflictError, "video_not_ready", single.download_content, video_id=long.id)
    assert early.response.request.headers["x-stainless-retry-count"] == "0"  # it was told that another try is no use
    busy = client.with_options(api_key=tokens["single"], max_retries=0).videos
    full = refused(openai.RateLimitError, "too_many_jobs", busy.create, prompt="b", input_reference=STAR)
    assert int(full.response.headers["retry-after"]) >= 1
    assert single.delete(long.id).deleted


@pytest.mark.slow
def test_a_server_without_a_worker_is_an_error_that_is_tried_again(client: Any, keyed: Served) -> None:
    os.kill(keyed.workers()[0], signal.SIGKILL)
    with pytest.raises(openai.InternalServerError) as caught:
        while True:  # it takes a moment until that is noticed
            client.with_options(max_retries=0).videos.create(prompt="a", input_reference=STAR, extra_body=QUICK)
    assert caught.value.status_code == 503 and caught.value.code in ("worker_lost", "starting")
    made = client.with_options(max_retries=8).videos.create(prompt="tried again", input_reference=STAR, extra_body=QUICK)
    assert client.videos.poll(made.id, poll_interval_ms=50).status == "completed"


def test_no_server_at_all_is_a_connection_error(client: Any) -> None:
    nowhere = client.with_options(base_url="http://127.0.0.1:9/v1", max_retries=0)
    with pytest.raises(openai.APIConnectionError):
        nowhere.videos.list()


# --- a connection that breaks -----------------------------------------------------------------------------------------


class Cutting(Answering):
    """A proxy that passes requests on and closes the first ones' connections: without its answer, or (`early`) before there
    is one. `seen`: the count of retries that each request said."""

    def __init__(self, url: str, cuts: int, early: bool) -> None:
        self.seen: list[str] = []
        host, outer, lock = url.removeprefix("http://"), self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                with lock:
                    number = len(outer.seen)
                    outer.seen.append(self.headers["x-stainless-retry-count"])
                there = http.client.HTTPConnection(host, timeout=30)
                there.request("POST", self.path, body, dict(self.headers.items()))
                if number < cuts and early:
                    self.close_connection = True
                    self.connection.close()
                answer = there.getresponse()
                data = answer.read()
                there.close()
                if number < cuts:
                    self.close_connection = True
                    return
                self.send_response(answer.status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def finish(self) -> None:
                try:
                    super().finish()
                except OSError:
                    pass  # it was cut

        super().__init__(Handler)


@pytest.mark.parametrize(
    ("cuts", "early"), [(1, False), (1, True), pytest.param(2, False, marks=pytest.mark.slow)],
    ids=["answer lost", "cut before the answer", "two answers lost"],
)  # fmt: skip
def test_a_lost_answer_makes_no_second_job(client: Any, keyed: Served, cuts: int, early: bool) -> None:
    """The SDK sends the request again, with no key that would tell that it is the same one."""
    prompt = f"lost {cuts} {early}"
    with Cutting(keyed.url, cuts, early) as proxy:
        through = client.with_options(base_url=f"{proxy.url}/v1")
        made = through.videos.create(prompt=prompt, input_reference=STAR, extra_body=QUICK)
    assert proxy.seen == [str(number) for number in range(cuts + 1)]
    assert [job.id for job in client.videos.list() if job.prompt == prompt] == [made.id]
    other = client.videos.create(prompt=prompt, input_reference=STAR, extra_body=QUICK)  # asked for anew: another job
    assert other.id != made.id
