"""What Prometheus reads: that it parses, that it moves with jobs, and that nothing that a client sends becomes a label."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from serving import Served

from motionrt.runtime.serve.metrics import SECONDS, Metrics

# Of the specification of the server, and what each may be told apart by.
LABELS = {
    "motionrt_jobs": {"model", "outcome"}, "motionrt_jobs_active": {"status"}, "motionrt_queue_seconds": {"model"},
    "motionrt_first_step_seconds": {"model"}, "motionrt_job_seconds": {"model"}, "motionrt_stage_seconds": {"model", "stage"},
    "motionrt_step_seconds": {"model", "backend"}, "motionrt_memory_search_seconds": {"model"},
    "motionrt_references_used": {"model"}, "motionrt_fallbacks": {"model", "reason"}, "motionrt_batch_size": {"model"},
    "motionrt_jobs_restarted": set(), "motionrt_worker_up": {"worker"}, "motionrt_worker_restarts": {"worker"},
    "motionrt_worker_memory_bytes": {"worker"}, "motionrt_store_bytes": set(), "motionrt_expired": set(),
    "motionrt_http_requests": {"route", "code"}, "motionrt_http_request_seconds": {"route"}, "motionrt_build_info": {"version"},
}  # fmt: skip
RESULT = {
    "seconds": {"text": 0.01, "search": 0.002, "step": 0.4, "write": 0.1}, "step_seconds": [0.2, 0.2], "references": [{}, {}],
    "fallback": None, "backend": "onnxruntime CPU", "batch": {"size": 3, "exact": True},
}  # fmt: skip
MODELS = {"a": {"references": {"default": 4, "max": 8}}, "b": {"references": None}}


def families(text: bytes) -> dict[str, Metric]:
    found: dict[str, Metric] = {}
    for family in text_string_to_metric_families(text.decode()):
        # `_created` is the time at which a counter began, which the parser takes for a metric of its own.
        if not family.name.endswith("_created"):
            assert family.name not in found, f"two families are named {family.name}"
            found[family.name] = family
    return found


def value(text: bytes, name: str, **labels: str) -> float:
    """One sample; a sum over those that have these labels."""
    samples = [sample for family in families(text).values() for sample in family.samples if sample.name == name]
    return math.fsum(sample.value for sample in samples if labels.items() <= sample.labels.items())


@pytest.fixture
def metrics() -> Metrics:
    return Metrics("1.2", ["a", "b"])


def looked(metrics: Metrics, jobs: dict[str, Any], restarts: int = 0, size: int = 0) -> None:
    queued = [live for live in jobs.values() if live.worker is None]
    workers = [SimpleNamespace(number=0, ready=True, rss=1000, restarts=restarts)]
    metrics.look(SimpleNamespace(jobs=jobs, queued=queued, workers=workers), SimpleNamespace(size=lambda: size))  # type: ignore[arg-type]


def test_every_metric_is_declared_and_has_no_other_label(metrics: Metrics) -> None:
    metrics.started("a", 0.1)
    metrics.stepping("a", 0.2)
    metrics.ended("a", "completed", 1.0, RESULT | {"fallback": "nothing was found"}, MODELS)
    metrics.requested("/v1/videos", 200, 0.01)
    looked(metrics, {})
    found = {name: family for name, family in families(metrics.render()).items() if name.startswith("motionrt_")}
    assert set(found) == set(LABELS)
    for name, family in found.items():
        assert family.documentation and family.samples
        assert all(set(sample.labels) - {"le"} == LABELS[name] for sample in family.samples), name


def test_numbers_are_those_that_were_told(metrics: Metrics) -> None:
    assert value(metrics.render(), "motionrt_jobs_total", model="a", outcome="failed") == 0
    assert 'motionrt_jobs_total{model="b",outcome="cancelled"} 0.0' in metrics.render().decode()  # a rate needs its zero
    metrics.started("a", 0.03)
    metrics.stepping("a", 0.06)
    metrics.ended("a", "completed", 0.7, RESULT, MODELS)
    metrics.ended("a", "cancelled", 9.0, {}, MODELS)
    metrics.ended("b", "completed", 0.7, RESULT | {"references": []}, MODELS)
    metrics.restarted()
    metrics.expired(3)
    text = metrics.render()
    told = {
        ("motionrt_jobs_total", "completed"): 1, ("motionrt_jobs_total", "cancelled"): 1,
        ("motionrt_queue_seconds_sum", ""): 0.03, ("motionrt_first_step_seconds_sum", ""): 0.06,
        ("motionrt_job_seconds_count", ""): 1, ("motionrt_job_seconds_sum", ""): 0.7,
        ("motionrt_step_seconds_count", ""): 2, ("motionrt_memory_search_seconds_sum", ""): 0.002,
        ("motionrt_references_used_sum", ""): 2, ("motionrt_batch_size_sum", ""): 3, ("motionrt_fallbacks_total", ""): 0,
    }  # fmt: skip
    for (name, outcome), wanted in told.items():
        assert value(text, name, model="a", **({"outcome": outcome} if outcome else {})) == pytest.approx(wanted), name
    assert value(text, "motionrt_stage_seconds_sum", model="a", stage="step") == 0.4
    assert value(text, "motionrt_stage_seconds_count", stage="search") == 0  # that one has a metric of its own
    assert value(text, "motionrt_references_used_count", model="b") == 0  # which takes none
    assert value(text, "motionrt_jobs_restarted_total") == 1 and value(text, "motionrt_expired_total") == 3


def test_a_look_says_how_it_is_now(metrics: Metrics) -> None:
    queued, running = SimpleNamespace(worker=None), SimpleNamespace(worker=0)
    looked(metrics, {"1": queued, "2": queued, "3": running}, restarts=2, size=77)
    looked(metrics, {"2": queued, "3": running}, restarts=3, size=78)
    looked(metrics, {"2": queued, "3": running}, restarts=1)  # of a server that was stopped and run again in this process
    text = metrics.render()
    assert [value(text, "motionrt_jobs_active", status=status) for status in ("queued", "in_progress")] == [1, 1]
    assert value(text, "motionrt_worker_restarts_total", worker="0") == 3 and value(text, "motionrt_store_bytes") == 0
    assert value(text, "motionrt_worker_up", worker="0") == 1 and value(text, "motionrt_worker_memory_bytes") == 1000


def test_buckets_reach_from_a_step_of_the_demo_to_ten_minutes(metrics: Metrics) -> None:
    assert SECONDS[0] == 0.001 and SECONDS[-1] == 600 and list(SECONDS) == sorted(SECONDS)
    metrics.started("a", 601.0)
    buckets = [one for one in families(metrics.render())["motionrt_queue_seconds"].samples if one.name.endswith("_bucket")]
    assert [one.value for one in buckets] == [0.0] * len(SECONDS) + [1.0] and buckets[-1].labels["le"] == "+Inf"


def test_what_clients_make_up_makes_no_series(metrics: Metrics) -> None:
    looked(metrics, {})
    for name in ("a", "gone", "sora"):
        metrics.ended(name, "completed", 0.7, RESULT, MODELS)
        metrics.ended(name, "strange", 0.7, {}, MODELS)
    text = metrics.render()
    assert {one.labels["model"] for one in families(text)["motionrt_jobs"].samples} == {"a", "b", "other"}
    assert value(text, "motionrt_jobs_total", model="other", outcome="failed") == 2


def test_two_servers_in_one_process_count_by_themselves() -> None:
    one, other = Metrics("1", ["a"]), Metrics("1", ["a"])
    one.expired(1)
    assert value(one.render(), "motionrt_expired_total") == 1 and value(other.render(), "motionrt_expired_total") == 0


def test_a_server_s_values_move_with_its_jobs(served: Served, picture: Path) -> None:
    def scraped() -> bytes:
        reply = served.call("GET", "/metrics")
        assert reply.status == 200 and reply.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        return reply.body

    before = scraped()
    video = served.until(served.create(picture, steps=4, n=2)["id"], "completed")
    cancelled = served.create(picture, steps=50, n=4)
    while served.get(cancelled["id"])["motionrt"]["step"] == 0:
        pass
    running = scraped()
    assert value(running, "motionrt_jobs_active", status="in_progress") == 1
    served.call("DELETE", f"/v1/videos/{cancelled['id']}")
    for path in ("/v1/videos/video_0", "/v1/videos/video_1", "/a", "/b", "/v1/models/sora"):
        served.call("GET", path)
    after = scraped()

    def moved(name: str, **labels: str) -> float:
        return value(after, name, **labels) - value(before, name, **labels)

    assert moved("motionrt_jobs_total", outcome="completed") == 1 == moved("motionrt_jobs_total", outcome="cancelled")
    assert moved("motionrt_queue_seconds_count", model="demo") == 2 == moved("motionrt_first_step_seconds_count", model="demo")
    assert moved("motionrt_step_seconds_count", backend=video["motionrt"]["backend"]) == 8
    assert moved("motionrt_step_seconds_sum") == pytest.approx(sum(video["motionrt"]["step_seconds"]))
    stages = video["motionrt"]["seconds"]
    assert moved("motionrt_stage_seconds_sum", stage="decode") == pytest.approx(stages["decode"])
    assert moved("motionrt_memory_search_seconds_sum") == pytest.approx(stages["search"])
    assert moved("motionrt_references_used_sum") == len(video["motionrt"]["references"])
    assert value(after, "motionrt_worker_up", worker="0") == 1 and value(after, "motionrt_store_bytes") > 1000
    assert moved("motionrt_http_requests_total", route="/v1/videos/{video}", code="404") == 2
    assert moved("motionrt_http_requests_total", route="other", code="404") == 2
    text = after.decode()
    assert "sora" not in text and video["id"] not in text and "red ball" not in text and "127.0.0.1" not in text
    routes = {one.labels["route"] for one in families(after)["motionrt_http_requests"].samples}
    assert all("video_" not in route for route in routes)

    (worker,) = served.workers()
    os.kill(worker, signal.SIGKILL)
    while value(lost := scraped(), "motionrt_worker_restarts_total") == value(before, "motionrt_worker_restarts_total"):
        pass
    assert value(lost, "motionrt_worker_up", worker="0") == 0
