"""What a Prometheus server scrapes of this one: jobs, stages, workers, requests, in seconds and bytes.

Every label has few values, whatever clients send: models are those that are served, stages the graphs of their bundles, routes
templates. No prompt, id, key or address is one. The registry is this server's own, so that an application that mounts it may
have another.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, GCCollector, Histogram, ProcessCollector, generate_latest

if TYPE_CHECKING:
    from motionrt.runtime.serve.jobs.dispatch import Dispatcher
    from motionrt.runtime.serve.jobs.store import Store

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
COUNTS = (0, 1, 2, 4, 8, 16, 32, 64)
OUTCOMES = ("completed", "failed", "cancelled")
_OTHER = "other"  # a model that is served no more, of which the store still has jobs


class Metrics:
    """See the module. models: the names of those that are served."""

    def __init__(self, version: str, models: Collection[str]) -> None:
        self.registry = registry = CollectorRegistry()
        self._models = frozenset(models)

        def seconds(name: str, help_: str, labels: tuple[str, ...] = ("model",)) -> Histogram:
            return Histogram(f"motionrt_{name}_seconds", help_, labels, registry=registry, buckets=SECONDS)

        def counted(name: str, help_: str) -> Histogram:
            return Histogram(f"motionrt_{name}", help_, ("model",), registry=registry, buckets=COUNTS)

        def counter(name: str, help_: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"motionrt_{name}", help_, labels, registry=registry)

        def gauge(name: str, help_: str, labels: tuple[str, ...] = ()) -> Gauge:
            return Gauge(f"motionrt_{name}", help_, labels, registry=registry)

        self._jobs = counter("jobs", "Jobs that are over.", ("model", "outcome"))
        # Not `motionrt_jobs`: beside the counter `motionrt_jobs_total` it would be one family of two types in OpenMetrics.
        self._active = gauge("jobs_active", "Jobs that are not over.", ("status",))
        self._queue = seconds("queue", "From being asked for to being given to a worker.")
        self._first = seconds("first_step", "From being asked for to the first denoising step.")
        self._job = seconds("job", "From being asked for to the end, of completed jobs.")
        self._stage = seconds("stage", "What one graph, or other part of the work, took in one job.", ("model", "stage"))
        self._step = seconds("step", "One denoising step.", ("model", "backend"))
        self._search = seconds("memory_search", "One search of a motion memory, without reading the query.")
        self._references = counted("references_used", "Retrieved clips whose motion a job used.")
        self._batch = counted("batch_size", "Jobs in the largest call that a job was a part of.")
        self._fallbacks = counter("fallbacks", "Jobs that asked for clips and got none.", ("model", "reason"))
        self._restarted = counter("jobs_restarted", "Jobs that were begun again because their worker was lost.")
        self._up = gauge("worker_up", "1 if the worker can take jobs.", ("worker",))
        self._restarts = counter("worker_restarts", "Times that the worker was lost.", ("worker",))
        self._memory = gauge("worker_memory_bytes", "Memory of the worker's process that is resident.", ("worker",))
        self._stored = gauge("store_bytes", "Files of jobs.")
        self._expired = counter("expired", "Jobs whose files were removed, because of their age or to make room.")
        self._requests = counter("http_requests", "Answers, by the template of the route.", ("route", "code"))
        self._http = seconds("http_request", "From a request's head to the begin of its answer.", ("route",))
        gauge("build_info", "1; what runs.", ("version",)).labels(version).set(1)
        for model in models:  # a rate needs the zero before the first
            for outcome in OUTCOMES:
                self._jobs.labels(model, outcome)
        ProcessCollector(registry=registry)
        GCCollector(registry=registry)
        self._seen: dict[int, int] = {}  # restarts by worker, as they were when last looked at

    # --- jobs ---------------------------------------------------------------------------------------------------------

    def started(self, model: str, seconds: float) -> None:
        """A job was given to a worker, so long after it was asked for."""
        self._queue.labels(self._of(model)).observe(seconds)

    def stepping(self, model: str, seconds: float) -> None:
        """A job's first denoising step begins, so long after it was asked for."""
        self._first.labels(self._of(model)).observe(seconds)

    def restarted(self) -> None:
        """A job lost its worker and is begun again."""
        self._restarted.inc()

    def ended(
        self, model: str, outcome: str, seconds: float, result: Mapping[str, Any], models: Mapping[str, Mapping[str, Any]]
    ) -> None:
        """A job is over, so long after it was asked for. result: what the worker said of a completed one, else empty; models:
        what the workers said of each bundle."""
        name = self._of(model)
        self._jobs.labels(name, outcome if outcome in OUTCOMES else "failed").inc()
        if outcome != "completed":
            return
        self._job.labels(name).observe(seconds)
        for stage, value in result.get("seconds", {}).items():
            (self._search.labels(name) if stage == "search" else self._stage.labels(name, stage)).observe(value)
        steps = self._step.labels(name, result.get("backend") or "unknown")
        for value in result.get("step_seconds", ()):
            steps.observe(value)
        if models.get(model, {}).get("references") is not None:  # it can take any
            self._references.labels(name).observe(len(result.get("references", ())))
        if result.get("fallback"):
            self._fallbacks.labels(name, "nothing_found").inc()  # the only reason that there is; the job has the sentence
        self._batch.labels(name).observe(result.get("batch", {}).get("size", 1))

    def expired(self, jobs: int) -> None:
        """So many jobs were removed by the sweeper."""
        self._expired.inc(jobs)

    # --- requests -----------------------------------------------------------------------------------------------------

    def requested(self, route: str, code: int, seconds: float) -> None:
        """A request was answered. route: its template; code: the status; seconds: until the answer began."""
        self._requests.labels(route, code).inc()
        self._http.labels(route).observe(seconds)

    # --- the page that is scraped ---------------------------------------------------------------------------------------

    def look(self, dispatcher: Dispatcher, store: Store) -> None:
        """Take up what is not told of but can be seen: queue, workers, store."""
        queued = len(dispatcher.queued)
        self._active.labels("queued").set(queued)
        self._active.labels("in_progress").set(len(dispatcher.jobs) - queued)
        for worker in dispatcher.workers:
            self._up.labels(worker.number).set(worker.ready)
            self._memory.labels(worker.number).set(worker.rss)
            self._restarts.labels(worker.number).inc(max(0, worker.restarts - self._seen.get(worker.number, 0)))
            self._seen[worker.number] = worker.restarts
        self._stored.set(store.size())

    def render(self) -> bytes:
        """Everything in Prometheus' text format 0.0.4."""
        return generate_latest(self.registry)

    def _of(self, model: str) -> str:
        return model if model in self._models else _OTHER
