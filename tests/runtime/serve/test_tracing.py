"""Spans of jobs: what a collector is told of each stage, below the span that the client names."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from serving import Answering, serving

from motionrt.runtime.errors import InputError
from motionrt.runtime.serve.jobs.store import JobRow
from motionrt.runtime.serve.tracing import Traces, export, parent_of

DEMO = Path(__file__).resolve().parents[3] / "demo"
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector(BaseHTTPRequestHandler):
    """What takes spans, as OpenTelemetry's collector does."""

    got: list[ExportTraceServiceRequest] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        assert self.path == "/v1/traces"
        self.got.append(ExportTraceServiceRequest.FromString(body))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()


@pytest.fixture
def collector() -> Iterator[str]:
    Collector.got = []
    with Answering(Collector) as server:
        yield server.url


def test_a_collector_is_told_of_each_stage_of_a_job(
    collector: str, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector)
    header = {"traceparent": f"00-{TRACE}-{SPAN}-01"}
    with serving(tmp_path / "store", DEMO / "bundle", DEMO / "memory", "--no-self-test") as served:
        form = {"prompt": "a red ball moves", "steps": "3"}
        made = served.call("POST", "/v1/videos", form=form, files={"input_reference": picture}, headers=header).json
        assert served.until(made["id"], "completed")["status"] == "completed"
    # the server has ended: it gave what it had
    spans = [
        span for request in Collector.got for resource in request.resource_spans for scope in resource.scope_spans
        for span in scope.spans
    ]  # fmt: skip
    (job,) = (span for span in spans if span.name == "motionrt.job")
    stages = sorted((span for span in spans if span is not job), key=lambda span: span.start_time_unix_nano)
    assert (job.trace_id.hex(), job.parent_span_id.hex()) == (TRACE, SPAN)
    assert {span.parent_span_id for span in stages} == {job.span_id}
    names = [span.name.removeprefix("motionrt.") for span in stages]
    assert names[:2] == ["queued", "starting"] and names[-1] == "encoding" and "denoising" in names
    assert [span.end_time_unix_nano for span in stages[:-1]] == [span.start_time_unix_nano for span in stages[1:]]
    assert (job.start_time_unix_nano, job.end_time_unix_nano) == (
        stages[0].start_time_unix_nano, stages[-1].end_time_unix_nano,
    )  # fmt: skip
    about = {item.key: item.value.string_value or item.value.int_value for item in job.attributes}
    assert about["motionrt.job"] == made["id"] and about["motionrt.outcome"] == "completed" and about["motionrt.steps"] == 3


@pytest.mark.parametrize("header", [None, "", "00-x", f"00-{TRACE}-{SPAN}-01\n", f"00-{TRACE}-{SPAN}", "0" * 9000])
def test_what_names_no_span_is_not_stored(header: str | None) -> None:
    assert parent_of(header) == {}


def test_without_the_packages_nothing_is_kept_and_an_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    traces, row = Traces(), JobRow(id="a", key="k", model="m", created=1.0, asked={"steps": 1})
    traces.stage(row, "starting")
    traces.ended(row, "completed")
    assert traces._stages == {}
    export()  # no address, no word
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match=re.escape("pip install motionrt[otel]")):
        export()
