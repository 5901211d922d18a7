"""Lines of the log: one JSON object each, whatever is in them, and no prompt unless it was asked for."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from serving import Served, serving

from motionrt.runtime.serve.logs import JsonLines, prompts

NASTY = 'a\n{"event": "ended"}\r\x1b[2J\x9b\u2028\u202e\ud800\x00"'


def line(message: str, *values: object, fields: Any = None, error: BaseException | None = None) -> tuple[str, dict[str, Any]]:
    trace = None if error is None else (type(error), error, error.__traceback__)
    record = logging.LogRecord("motionrt.part", logging.ERROR, "file.py", 1, message, values, trace)
    if fields is not None:
        record.fields = fields
    text = JsonLines().format(record)
    return text, json.loads(text)


def test_an_event_is_its_name_and_its_fields() -> None:
    _, told = line("ended", fields={"job": "video_1", "ms": 12, "error": None})
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", told.pop("ts"))
    assert told == {"level": "error", "event": "ended", "job": "video_1", "ms": 12}


def test_any_other_message_is_one_too() -> None:
    _, told = line("worker %d is gone", 3)
    assert told["event"] == "message" and told["message"] == "worker 3 is gone" and told["logger"] == "motionrt.part"


def test_nothing_in_a_line_ends_it_or_moves_a_cursor() -> None:
    try:
        raise ValueError(NASTY)
    except ValueError as error:
        for text, told in (line("%s", NASTY, error=error), line("ended", fields={"error": {"message": NASTY}})):
            assert text.isascii() and text.isprintable()
            assert NASTY in (told.get("message"), told.get("error", {}).get("message"))
            assert "traceback" not in told or told["traceback"].startswith("Traceback")
    assert len(line("x" * 100_000)[0]) < 9000


def test_what_json_does_not_know_is_written_as_text() -> None:
    assert line("ended", fields={"path": Path("a/b"), "of": {"deep": {1}}})[1]["path"] == "a/b"


@pytest.mark.parametrize("text", ["a red ball", "", NASTY], ids=["plain", "empty", "nasty"])
def test_prompts_are_a_length_and_a_hash_unless_asked_for(text: str) -> None:
    told = prompts({"prompt": text, "seed": 3}, False)
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    assert told == {"prompt_length": len(text), "prompt_sha256": digest}
    assert prompts({"prompt": text, "negative_prompt": "b"}, True) == {"prompt": text, "negative_prompt": "b"}
    assert prompts({"prompt": None}, False) == {} == prompts({}, True)


def test_libraries_write_lines_too_and_only_there() -> None:
    code = """
import logging, warnings
from motionrt.runtime.serve.logs import to_standard_error
to_standard_error(); to_standard_error()
logging.getLogger("uvicorn.error").info("no"); logging.getLogger("uvicorn.error").warning("yes\\n")
logging.getLogger("some.library").info("two"); warnings.warn("three")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = [json.loads(text) for text in done.stderr.splitlines()]
    assert done.stdout == "" and [one["message"][:3].strip() for one in lines] == ["yes", "two", "<st"]


def events(served: Served, job: str) -> list[dict[str, Any]]:
    found = [json.loads(text) for text in served.log.read_text().splitlines() if text.startswith("{")]
    return [one for one in found if one.get("job") == job]


def test_a_server_tells_what_became_of_a_job(served: Served, picture: Path) -> None:
    prompt = "a secret \x1b[2J\nball"
    video = served.until(served.create(picture, prompt=prompt)["id"], "completed")
    told = events(served, video["id"])
    assert [one["event"] for one in told if one["event"] != "stage"] == ["queued", "started", "ended"]
    assert [one["stage"] for one in told if one["event"] == "stage"][-3:] == ["denoising", "decoding", "encoding"]
    assert told[-1]["outcome"] == "completed" and all(one["key"] == "anonymous" and one["level"] == "info" for one in told)
    assert [one["ms"] for one in told] == sorted(one["ms"] for one in told) and told[-1]["ms"] > 0
    digest = hashlib.sha256(video["prompt"].encode()).hexdigest()
    assert told[0]["prompt_sha256"] == digest and told[0]["prompt_length"] == len(video["prompt"])
    assert "secret" not in served.log.read_text()


@pytest.mark.slow
def test_prompts_are_written_where_they_are_asked_for(picture: Path, tmp_path: Path) -> None:
    demo = Path(__file__).resolve().parents[3] / "demo"
    with serving(tmp_path / "store", demo / "bundle", demo / "memory", "--log-prompts") as served:
        job = served.create(picture, prompt="a secret ball")["id"]
        served.until(job, "completed")
        assert events(served, job)[0]["prompt"] == "a secret ball"
