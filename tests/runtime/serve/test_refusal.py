"""What leaves the server in a refusal: the shape that clients read, and nothing that they could not bear."""

from __future__ import annotations

import json

import pytest

from motionrt.runtime.errors import MotionRTError
from motionrt.runtime.serve.web.refusal import REPEATED, Refused, named, quoted, told


def test_json_and_answer_have_the_shape_of_the_protocol() -> None:
    refused = Refused(429, "queue_full", "the queue is full.", "n", {"retry-after": "3"}, "rate_limit_error")
    error = {"message": "the queue is full.", "type": "rate_limit_error", "param": "n", "code": "queue_full"}
    assert refused.json() == {"error": error} and str(refused) == "the queue is full."
    answer = refused.response()
    assert answer.status_code == 429 and json.loads(bytes(answer.body)) == {"error": error}
    assert answer.headers["retry-after"] == "3" and answer.headers["cache-control"] == "no-store"
    assert isinstance(refused, MotionRTError)


def test_control_characters_and_half_characters_are_written_out() -> None:
    refused = Refused(400, "x", "a\r\nSet-Cookie: b\x00\x1b[31m\u2028\ud800é", "na\nme")
    assert refused.message == r"a\r\nSet-Cookie: b\x00\x1b[31m\u2028\ud800é" and refused.param == r"na\nme"
    refused.response()  # can be encoded


@pytest.mark.parametrize("sent", ["x" * 10**6, "\x00" * 10**6, "\U000e0001" * 500, b"\xff" * 1000, list(range(1000))])
def test_what_was_sent_is_repeated_at_most_200_characters_long(sent: object) -> None:
    assert len(quoted(sent)) <= REPEATED + 2
    assert len(named(str(sent))) <= REPEATED + 2
    assert len(Refused(400, "x", f"got {sent!r}").message) <= 1001


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cannot write /srv/store/ab/x.png: No space. Free it.", "cannot write x.png: No space. Free it."),
        ("cannot read '/home/a/b.json'", "cannot read 'b.json'"),
        ("`/home/a/bundle/` is no bundle\nat all", "`bundle` is no bundle at all"),
        ("see (/etc/passwd), and/or 3/4 of image/png", "see (passwd), and/or 3/4 of image/png"),
        ("https://example.org/a/b", "https://example.org/a/b"),
    ],
)
def test_told_has_no_folder_of_this_machine(text: str, expected: str) -> None:
    assert told(MotionRTError(text)) == expected
