"""Forms and JSON as clients send them, well and badly: one nested dict and files, or a refusal that leaves nothing."""

from __future__ import annotations

import asyncio
import base64
import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.requests import ClientDisconnect, Request

from motionrt.runtime.serve.web.form import Fields, FormLimits, read_fields
from motionrt.runtime.serve.web.refusal import Refused

PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256))
PNG_URL = "data:image/png;base64," + base64.b64encode(PNG).decode()
FORM = "multipart/form-data; boundary=edge"
LIMITS = FormLimits()
Part = tuple[str, str | bytes] | tuple[str, bytes, str]  # name, text; or name, bytes, file name


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


def form(*parts: Part) -> bytes:
    """A form by hand, so that it may be wrong."""
    body = b""
    for name, value, *file_name in parts:
        head = f'form-data; name="{name}"' + (f'; filename="{file_name[0]}"\r\nContent-Type: text/plain' if file_name else "")
        body += b"--edge\r\nContent-Disposition: " + head.encode() + b"\r\n\r\n"
        body += (value.encode() if isinstance(value, str) else value) + b"\r\n"
    return body + b"--edge--\r\n"


def request(chunks: list[bytes], headers: dict[str, str], *, leaves: bool = False) -> Request:
    """A request whose body arrives in `chunks`; the client may leave instead of ending it."""
    messages = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
    messages += [{"type": "http.disconnect"} if leaves else {"type": "http.request", "body": b"", "more_body": False}]

    async def receive() -> Any:
        return messages.pop(0)

    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    return Request({"type": "http", "method": "POST", "headers": raw}, receive)


Read = Callable[..., Fields]


@pytest.fixture
def read(runner: asyncio.Runner, tmp_path: Path) -> Read:
    """Read a body (parts, bytes, or what becomes JSON) into `tmp_path`."""

    def call(body: Any, limits: FormLimits = LIMITS, kind: str | None = None, step: int = 1000) -> Fields:
        if isinstance(body, tuple):
            body, kind = form(*body), kind or FORM
        elif not isinstance(body, bytes):
            body, kind = json.dumps(body).encode(), kind or "application/json"
        chunks = [body[at : at + step] for at in range(0, len(body), step)]
        return runner.run(read_fields(request(chunks, {"content-type": kind or "application/json"}), limits, tmp_path))

    return call


def test_bracketed_dotted_and_json_fields_are_one(read: Read) -> None:
    text = "ä ball\nrolls"
    expected = {"prompt": text, "motion": {"scale": "1.5", "refs": ["3", "5"]}, "seed": "7"}
    sent: Any = (
        (("seed", "7"), ("motion[scale]", "1.5"), ("motion[refs][]", "3"), ("motion[refs][]", "5"), ("prompt", text)),
        (("seed", "7"), ("prompt", text), ("motion.refs[]", "3"), ("motion.scale", "1.5"), ("motion.refs[]", "5")),
        (("prompt", text), ("motionrt", '{"motion": {"scale": "1.5", "refs": ["3", "5"]}, "seed": "7"}')),
        (("prompt", text), ("motionrt[motion][scale]", "1.5"), ("motionrt[motion][refs][]", "3"),
         ("motion.refs[]", "5"), ("motionrt.seed", "7")),
        expected,
        {"prompt": text, "motion.scale": "1.5", "motion": {"refs": ["3", "5"]}, "motionrt": {"seed": "7"}},
    )  # fmt: skip
    for number, body in enumerate(sent[:3] + sent[4:]):
        fields = read(body)
        assert fields.values == expected, number
        assert fields.digest == read(expected).digest
    with pytest.raises(Refused, match="twice"):
        read(sent[3])  # one list from two places: which order would it have?


def test_json_keeps_types_and_a_form_keeps_text(read: Read) -> None:
    body = {"seed": 7, "scale": 1.0, "on": True, "none": None, "list": [], "object": {}}
    assert read(body).values == body
    assert read((("seed", "7"), ("on", "true"), ("none", ""))).values == {"seed": "7", "on": "true", "none": ""}
    assert read({}).values == {} and read(()).values == {}


def test_file_is_written_under_a_name_of_ours(read: Read, tmp_path: Path) -> None:
    fields = read((("prompt", "a ball"), ("input_reference", PNG, "../../etc/passwd\\x.php")))
    upload = fields.uploads["input_reference"]
    assert fields.values == {"prompt": "a ball"}
    assert (upload.size, upload.sha256, upload.kind) == (len(PNG), hashlib.sha256(PNG).hexdigest(), "png")
    assert upload.path.parent == tmp_path and upload.path.read_bytes() == PNG and upload.path.stat().st_mode & 0o777 == 0o600
    assert [*tmp_path.iterdir()] == [upload.path] and len(upload.path.stem) == 32
    fields.discard()
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    "body",
    [
        (("input_reference[image_url]", PNG_URL),),
        (("input_reference", PNG_URL),),
        (("motionrt", json.dumps({"input_reference": {"image_url": PNG_URL}})),),
        (("input_reference", PNG, "x"),),
        {"input_reference": {"image_url": {"url": PNG_URL}}},
        {"input_reference": PNG_URL.replace("image/png", "text/html")},
        b'{"input_reference": "' + PNG_URL.replace("/", "\\/").encode() + b'"}',
        b'{"input_reference": "\\u0064' + PNG_URL[1:].encode() + b'"}',
    ],
    ids=["address", "text", "in motionrt", "part", "nested address", "another type", "slashes escaped", "a letter escaped"],
)
def test_data_url_is_the_file_that_it_holds(read: Read, body: Any) -> None:
    fields = read(body)
    assert fields.values == {} and fields.uploads["input_reference"].path.read_bytes() == PNG
    assert fields.digest == read((("input_reference", PNG, "y"),)).digest  # by the bytes, however they came


def test_prompt_that_looks_like_an_address_is_a_prompt(read: Read) -> None:
    for text in ("data:image/png;base64,AAAA", "http://example.org/a.png", 'data: shows "a" / b', "data:" + "x" * 60000):
        assert read({"prompt": text, "metadata": {"data:a": "data:b"}}).values["prompt"] == text
        assert read((("prompt", text),)).values == {"prompt": text}


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"\xff\xd8\xff\xe0", "jpeg"), (b"RIFF\0\0\0\0WEBP", "webp"), (b"GIF89a", "gif"), (b"\0\0\0\x20ftypisom", "mp4"),
        (b"\0\0\0\x14ftypqt  ", "mov"), (b"\x1a\x45\xdf\xa3\x9f\x42\x82\x84webm", "webm"),
        (b"\x1a\x45\xdf\xa3\x9f\x42\x82\x88matroska", None), (b"\0\0\0\x20ftypavif", None), (b"BM", None),
        (b"RIFF\0\0\0\0WAVE", None), (b"#EXTM3U", None), (b"<svg", None), (b"\x89PNG", None), (b"", None),
    ],
)  # fmt: skip
def test_kind_is_told_by_the_first_bytes(read: Read, head: bytes, kind: str | None) -> None:
    url = "data:image/png;base64," + base64.b64encode(head).decode()
    for body in ((("input_reference", head, "a.png"),), (("input_reference", url),)):
        if kind is None:
            assert refusal(read, body) == (400, "unsupported_file", "input_reference")
        else:
            assert read(body).uploads["input_reference"].kind == kind


def refusal(read: Read, body: Any, limits: FormLimits = LIMITS, kind: str | None = None) -> tuple[int, str, str | None]:
    with pytest.raises(Refused) as caught:
        read(body, limits, kind)
    assert caught.value.message.endswith(".")
    return caught.value.status, caught.value.code, caught.value.param


MANY = FormLimits(files=3, file_fields=frozenset({"clips", "input_reference"}))


def test_several_files_have_their_places_in_the_names(read: Read) -> None:
    fields = read((("clips[]", PNG, "x"), ("clips[]", b"GIF89a", "x"), ("input_reference", PNG, "x")), MANY)
    assert {name: upload.kind for name, upload in fields.uploads.items()} == {
        "clips.0": "png", "clips.1": "gif", "input_reference": "png",
    }  # fmt: skip
    assert read({"clips": [PNG_URL, {"url": PNG_URL}]}, MANY).uploads.keys() == {"clips.0", "clips.1"}


def test_form_of_a_browser_without_a_chosen_file_has_none(read: Read) -> None:
    fields = read((("input_reference", b"", ""), ("prompt", "a")))
    assert fields.values == {"prompt": "a"} and fields.uploads == {}
    assert read({"input_reference": None, "prompt": "a"}).uploads == {}


DEEP = {"a": {"b": {"c": {"d": {"e": 1}}}}}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ((("a", "1"), ("a", "2")), (400, "duplicate_field", "a")),
        ((("a", "1"), ("a[b]", "2")), (400, "duplicate_field", "a[b]")),
        ((("a[b]", "1"), ("a.b", "2")), (400, "duplicate_field", "a.b")),
        ((("a[]", "1"), ("a", "2")), (400, "duplicate_field", "a")),
        ((("seed", "1"), ("motionrt", '{"seed": 1}')), (400, "duplicate_field", "seed")),
        ((("input_reference", PNG, "x"), ("input_reference[url]", PNG_URL)), (400, "duplicate_field", "input_reference[url]")),
        (b'{"a": 1, "a": 1}', (400, "duplicate_field", "a")),
        ({"input_reference": {"url": PNG_URL, "image_url": PNG_URL}}, (400, "duplicate_field", "input_reference")),
        (DEEP, (400, "too_deep", "a.b.c.d")),
        ((("a[b][c][d][e]", "1"),), (400, "too_deep", "a.b.c.d")),
        ((("a" + ".a" * 99, "1"),), (400, "too_deep", "a.a.a.a")),
        ({"a": [[[[1]]]]}, (400, "too_deep", "a.0.0.0")),
        (b'{"a":' * 20000 + b"1" + b"}" * 20000, (400, "too_deep", None)),
        ({"motionrt": DEEP, **DEEP}, (400, "duplicate_field", "a.b.c.d.e")),
        (b'{"motionrt":' + b'{"a":' * 300 + b"1" + b"}" * 301, (400, "too_deep", "a.a.a.a")),
        ({f"f{n}": n for n in range(65)}, (400, "too_many_fields", None)),
        ({"a": list(range(65))}, (400, "too_many_fields", None)),
        ({"a": [[]] * 65}, (400, "too_many_fields", None)),
        (tuple((f"f{n}", "") for n in range(65)), (400, "too_many_fields", None)),
        (b"[" + b'"data:",' * 70 + b"1]", (400, "too_many_fields", None)),
        ((("prompt", "x" * 65537),), (400, "field_too_large", "prompt")),
        ({"prompt": "é" * 32769}, (400, "field_too_large", "prompt")),
        ({"prompt": "data:" + "x" * 70000}, (400, "field_too_large", "prompt")),
        ({f"p{n}": "x" * 60000 for n in range(5)}, (413, "json_too_large", None)),
        (b'{"a": NaN}', (400, "invalid_number", None)),
        (b'{"a": -Infinity}', (400, "invalid_number", None)),
        (b'{"a": 1e999}', (400, "invalid_number", "a")),
        ({"a": 2**63}, (400, "invalid_number", "a")),
        ({"a": -(10**400)}, (400, "invalid_number", "a")),
        ((("metadata", "[" * 60000),), (400, "too_deep", "metadata")),
        ((("metadata", '{"a": "\\ud800"}'),), (400, "invalid_text", "metadata.a")),
        (b'{"a": 1' + b"0" * 5000 + b"}", (400, "invalid_json", None)),
        ((("motionrt", '{"a": NaN}'),), (400, "invalid_number", "motionrt")),
        (b'{"a": "\\ud800"}', (400, "invalid_text", "a")),
        (b'{"\\ud800": 1}', (400, "invalid_text", "\\ud800")),
        (b'{"a": "\\u0000"}', (400, "invalid_text", "a")),
        (b'{"a": "\xff"}', (400, "invalid_json", None)),
        (b'{"a": "data:\xff"}', (400, "invalid_text", "a")),
        (b'{"input_reference": "data:image/png;base64,\xff"}', (400, "invalid_file", "input_reference")),
        ((("a", b"\xff"),), (400, "invalid_text", "a")),
        ((("a", b"x\0"),), (400, "invalid_text", "a")),
        (b"", (400, "invalid_json", None)),
        (b"[1]", (400, "invalid_json", None)),
        (b'{"a": 1', (400, "invalid_json", None)),
        ({"motionrt": [1]}, (400, "invalid_json", "motionrt")),
        ((("motionrt", "seed=1"),), (400, "invalid_json", "motionrt")),
        ({"input_reference": "http://169.254.169.254/"}, (400, "url_not_allowed", "input_reference")),
        ((("input_reference[image_url]", "HTTPS://example.org/a.png"),), (400, "url_not_allowed", "input_reference.image_url")),
        ({"input_reference": "file:///etc/passwd"}, (400, "url_not_allowed", "input_reference")),
        ({"input_reference": "/etc/passwd"}, (400, "invalid_file", "input_reference")),
        ({"input_reference": {"id": "video_1"}}, (400, "invalid_file", "input_reference.id")),
        ({"input_reference": 1}, (400, "invalid_file", "input_reference")),
        ({"input_reference": "data:image/png,AAAA"}, (400, "invalid_file", "input_reference")),
        ({"input_reference": "data:image/png;base64,A*AA"}, (400, "invalid_file", "input_reference")),
        ({"input_reference": "data:image/png;base64,AAA"}, (400, "invalid_file", "input_reference")),
        ({"input_reference": [PNG_URL, PNG_URL]}, (400, "too_many_files", "input_reference.1")),
        ((("input_reference[]", PNG, "a"), ("input_reference[]", PNG, "b")), (400, "too_many_files", "input_reference[]")),
        ((("input_reference", b"", "a.png"),), (400, "unsupported_file", "input_reference")),
        ((("prompt", b"a ball", "prompt.txt"),), (400, "unexpected_file", "prompt")),
    ],
)  # fmt: skip
def test_refused_says_which_field_and_leaves_nothing(read: Read, tmp_path: Path, body: Any, expected: tuple[Any, ...]) -> None:
    assert refusal(read, body) == expected
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("name", ["", "[", "a[", "a]", "a[]b", "a[][b]", "[a]", ".a", "a.", "a..b", "a" * 201, "a[b]c"])
def test_name_that_is_none_is_refused(read: Read, name: str) -> None:
    assert refusal(read, ((name, "1"),)) == (400, "invalid_name", None)
    assert refusal(read, {name: 1}) == (400, "invalid_name", None)


@pytest.mark.parametrize(
    ("body", "kind", "code"),
    [
        (b"a=1", "application/x-www-form-urlencoded", "unsupported_media_type"),
        (form(), "multipart/form-data", "invalid_multipart"),
        (form(), "multipart/form-data; boundary=" + "x" * 300, "invalid_multipart"),
        (b"", FORM, "invalid_multipart"),
        (form(("a", "1"))[:-6], FORM, "invalid_multipart"),
        (form(("input_reference", PNG, "x"))[:200], FORM, "invalid_multipart"),
        (b"nonsense", FORM, "invalid_multipart"),
        (b"--edge\r\nContent-Disposition: form-data\r\n\r\n1\r\n--edge--\r\n", FORM, "invalid_multipart"),
        (b"--edge\r\nX: y\r\n\r\n1\r\n--edge--\r\n", FORM, "invalid_multipart"),
        (b"--edge\r\n" + b"X: y\r\n" * 50 + b"\r\n1\r\n--edge--\r\n", FORM, "invalid_multipart"),
        (b"--edge\r\nX: " + b"y" * 10000 + b"\r\n\r\n1\r\n--edge--\r\n", FORM, "invalid_multipart"),
        (b'--edge\r\nContent-Disposition: form-data; name="\xff"\r\n\r\n1\r\n--edge--\r\n', FORM, "invalid_text"),
    ],
)
def test_body_of_another_kind_or_damaged_is_refused(read: Read, tmp_path: Path, body: bytes, kind: str, code: str) -> None:
    assert refusal(read, body, kind=kind)[1] == code
    assert [*tmp_path.iterdir()] == []


def test_body_over_the_limit_is_refused_before_and_while_it_is_read(runner: asyncio.Runner, tmp_path: Path) -> None:
    limits = FormLimits(body=10_000)
    body = form(("input_reference", PNG + bytes(20_000), "x"))
    unread = request([], {"content-type": FORM, "content-length": str(len(body))})
    for sent in (unread, request([body[at : at + 500] for at in range(0, len(body), 500)], {"content-type": FORM})):
        with pytest.raises(Refused) as caught:
            runner.run(read_fields(sent, limits, tmp_path))
        assert (caught.value.status, caught.value.code) == (413, "body_too_large")
    with pytest.raises(Refused) as caught:
        runner.run(read_fields(request([], {"content-type": FORM, "content-encoding": "gzip"}), limits, tmp_path))
    assert caught.value.status == 415
    assert [*tmp_path.iterdir()] == []


def test_client_that_leaves_leaves_no_file(runner: asyncio.Runner, tmp_path: Path) -> None:
    with pytest.raises(ClientDisconnect):
        body = form(("input_reference", PNG, "x"))[:200]
        runner.run(read_fields(request([body], {"content-type": FORM}, leaves=True), LIMITS, tmp_path))
    assert [*tmp_path.iterdir()] == []


def test_full_disk_is_the_server_s_fault(read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path))

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(Refused) as caught:
        read((("input_reference", PNG, "x"),))
    refused = caught.value
    assert (refused.status, refused.code, refused.kind) == (503, "storage_full", "server_error")
    assert str(tmp_path) not in refused.message and refused.headers["retry-after"] == "60"


def test_large_data_url_does_not_count_as_json(read: Read) -> None:
    content = PNG + bytes(3_000_000)
    url = "data:image/png;base64," + base64.b64encode(content).decode()
    for body in ({"input_reference": {"image_url": url}}, (("input_reference[image_url]", url),)):
        assert read(body, step=65536).uploads["input_reference"].size == len(content)


def test_digest_is_that_of_what_is_asked(read: Read) -> None:
    asked = (("prompt", "a"), ("seed", "1"), ("input_reference", PNG, "x"))
    others = [
        (("prompt", "a"), ("seed", "2"), ("input_reference", PNG, "x")),
        (("prompt", "a"), ("seed", "1"), ("input_reference", PNG + b"1", "x")),
        (("prompt", "a"), ("seed", "1")),
        (("prompt", "a"), ("seeds", "1"), ("input_reference", PNG, "x")),
    ]
    digests = [read(body).digest for body in (asked, asked[::-1], *others)]
    assert digests[0] == digests[1] and len(set(digests)) == 1 + len(others)


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")  # each call of the SDK says that it is one of the last
def test_what_the_sdk_sends_is_read(runner: asyncio.Runner, tmp_path: Path) -> None:
    import httpx2
    import openai

    sent: list[Any] = []

    def answer(asked: httpx2.Request) -> httpx2.Response:
        sent.append(asked)
        return httpx2.Response(200, json={"id": "video_1"})

    with openai.OpenAI(
        api_key="mrt_x", base_url="http://localhost/v1", http_client=httpx2.Client(transport=httpx2.MockTransport(answer))
    ) as client:
        extra = {"seed": 7, "motion_scale": 1.5, "diversity": True, "motion": {"refs": [3, 5]}}
        client.videos.create(prompt="a ball", model="demo", size="64x64", input_reference=BytesIO(PNG), extra_body=extra)
        client.videos.create(prompt="a ball", extra_body={"input_reference": {"image_url": PNG_URL}})
        client.post("/videos", body={"prompt": "a ball", "input_reference": {"image_url": PNG_URL}}, cast_to=object)
    fields = [runner.run(read_fields(request([one.read()], dict(one.headers)), LIMITS, tmp_path)) for one in sent]
    assert fields[0].values == {
        "prompt": "a ball", "model": "demo", "size": "64x64", "seed": "7", "motion_scale": "1.5", "diversity": "true",
        "motion": {"refs": ["3", "5"]},
    }  # fmt: skip
    assert [one.uploads["input_reference"].path.read_bytes() for one in fields] == [PNG] * 3
    assert fields[1].digest == fields[2].digest and fields[2].values == {"prompt": "a ball"}


# Fuzz: whatever arrives, in whatever pieces, is read or refused, and a refusal leaves no file.
MANY_FIELDS = FormLimits(files=3, field=400, json=3000, fields=12, file_fields=frozenset({"input_reference", "clips"}))
NAMES = st.sampled_from(["prompt", "a[b]", "a.b", "a[c][]", "motionrt", "input_reference", "clips[]", "clips[][url]", "[x"])
SAMPLES = [PNG, PNG_URL.encode(), b'{"seed": 1, "a": {"b": "\\ud800"}}', b"http://x", b"data:;base64,", b"\r\n--edge--\r\n"]
VALUES = st.one_of(st.binary(max_size=40), st.text(max_size=40).map(str.encode), st.sampled_from(SAMPLES))
FILES = st.tuples(
    st.sampled_from(["input_reference", "clips[]", "clips[]", "prompt"]), st.sampled_from(SAMPLES[:1] * 4 + [b""])
)
PARTS = st.lists(
    st.one_of(
        st.tuples(NAMES, VALUES), st.tuples(FILES, st.sampled_from(["", "x", "../x"])).map(lambda part: (*part[0], part[1]))
    ),
    max_size=6,
)
JSONS = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=20),
        st.sampled_from([PNG_URL, "data:\\/", '"data:']),
    ),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=15,
)
BODIES = st.one_of(
    PARTS.map(lambda parts: (FORM, form(*parts))),
    JSONS.map(lambda value: ("application/json", json.dumps(value).encode())),
    st.tuples(st.sampled_from([FORM, "application/json"]), st.binary(max_size=200)),
)


SENT = (BODIES, st.lists(st.integers(0, 400), max_size=4), st.tuples(st.integers(0, 400), st.binary(max_size=3)))


def read_or_refused(runner: asyncio.Runner, sent: tuple[str, bytes], cuts: list[int], damage: tuple[int, bytes]) -> None:
    """As it is and with some bytes changed, in pieces and whole: where the pieces end does not matter."""
    kind, body = sent
    at, new = damage
    for altered in (body, body[:at] + new + body[at + len(new) :]):
        ends = [0, *sorted(min(cut, len(altered)) for cut in cuts), len(altered)]
        pieces = [altered[start:end] for start, end in zip(ends, ends[1:], strict=False)]
        outcomes = []
        for chunks in (pieces, [altered]):
            with tempfile.TemporaryDirectory() as name:
                try:
                    fields = runner.run(read_fields(request(chunks, {"content-type": kind}), MANY_FIELDS, Path(name)))
                except Refused as refused:
                    assert 400 <= refused.status < 500 and refused.message.isprintable()
                    outcomes.append(refused.code)
                    assert os.listdir(name) == []
                else:
                    json.dumps(fields.values, allow_nan=False).encode()
                    outcomes.append(fields.digest)
                    assert {Path(name) / one for one in os.listdir(name)} == {one.path for one in fields.uploads.values()}
        assert outcomes[0] == outcomes[1]


@settings(max_examples=50, deadline=None)
@given(*SENT)
def test_whatever_arrives_is_read_or_refused(sent: tuple[str, bytes], cuts: list[int], damage: tuple[int, bytes]) -> None:
    with asyncio.Runner() as runner:
        read_or_refused(runner, sent, cuts, damage)


@pytest.mark.slow
@settings(max_examples=1500, deadline=None)
@given(*SENT)
def test_whatever_arrives_is_read_or_refused_at_length(
    sent: tuple[str, bytes], cuts: list[int], damage: tuple[int, bytes]
) -> None:
    with asyncio.Runner() as runner:
        read_or_refused(runner, sent, cuts, damage)
