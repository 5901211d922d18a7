"""Spans of jobs for OpenTelemetry: one for each job and one for each of its stages, below the span that the client names.

Off without the extra `otel`, and without somebody who takes spans: an application that mounts the server and has a tracer
provider, or the environment's OTEL_EXPORTER_OTLP_ENDPOINT under `motionrt serve`. A client names its span by the header
`traceparent` (W3C Trace Context), which is stored with the job.
"""

from __future__ import annotations

import importlib.util
import os
import re
import time
from typing import TYPE_CHECKING, Any

from motionrt.runtime.errors import InputError, install
from motionrt.runtime.serve.jobs.store import JobRow

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

PARENT = "traceparent"
_PARENT = re.compile(r"00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


def parent_of(header: str | None) -> dict[str, str]:
    """What is stored of a request's header; nothing where it is none."""
    return {PARENT: header} if header is not None and _PARENT.fullmatch(header) else {}


def export() -> None:
    """Send spans to where the environment says, if it does. Raises InputError without the extra `otel`."""
    if not (os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") or os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")):
        return
    if importlib.util.find_spec("opentelemetry") is None or importlib.util.find_spec("opentelemetry.exporter") is None:
        raise InputError(f"OTEL_EXPORTER_OTLP_ENDPOINT is set, and nothing is installed to send spans with; {install('otel')}.")
    from opentelemetry import trace
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", "motionrt")}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)


class Traces:
    """When which stage of a job began, and in the end its spans. Nothing is kept where nobody can take them."""

    def __init__(self) -> None:
        self._tracer: Tracer | None = None
        self._stages: dict[str, list[tuple[str, int]]] = {}
        if importlib.util.find_spec("opentelemetry") is not None:
            from opentelemetry import trace

            self._tracer = trace.get_tracer("motionrt")

    def stage(self, row: JobRow, name: str) -> None:
        """Say that a job is in a stage from now on."""
        if self._tracer is not None:
            self._stages.setdefault(row.id, [("queued", int(row.created * 1e9))]).append((name, time.time_ns()))

    def ended(self, row: JobRow, outcome: str) -> None:
        """Give the spans of a job that is over to whoever takes them."""
        stages = self._stages.pop(row.id, [("queued", int(row.created * 1e9))])
        if self._tracer is None:
            return
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        about: dict[str, Any] = {"motionrt.job": row.id, "motionrt.model": row.model, "motionrt.outcome": outcome}
        about |= {"motionrt.attempt": row.attempt, "motionrt.steps": row.asked["steps"]}
        above = TraceContextTextMapPropagator().extract({PARENT: row.asked.get(PARENT, "")})
        job = self._tracer.start_span("motionrt.job", above, trace.SpanKind.SERVER, about, start_time=stages[0][1])
        if outcome == "failed" and row.error is not None:
            job.set_status(trace.StatusCode.ERROR, row.error["code"])
        within, end = trace.set_span_in_context(job), time.time_ns()
        for (name, begun), (_, over) in zip(stages, [*stages[1:], ("", end)], strict=True):
            self._tracer.start_span(f"motionrt.{name}", within, start_time=begun).end(over)
        job.end(end)
