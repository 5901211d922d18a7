"""What stands before the routes, in a real server of a small application: bodies, hosts, origins, headers, connections."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from select import select
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Mount, Route

from motionrt.runtime.errors import InputError
from motionrt.runtime.serve.settings import Settings
from motionrt.runtime.serve.web.connections import guarded_protocol
from motionrt.runtime.serve.web.limits import OTHER_POLICY, PAGE_POLICY, Pace, guarded

FAST = Pace(grace=0.2, rate=1e6, total=0.6, drain=0.3, drained=1 << 20)


@dataclass
class Watcher:
    seen: list[tuple[str, int]] = field(default_factory=list)

    def requested(self, route: str, code: int, seconds: float) -> None:
        assert 0 <= seconds < 60
        self.seen.append((route, code))


@dataclass
class Small:
    """A server of `routes`; `say` sends bytes as they are and gives all that comes back until the server closes."""

    port: int
    watcher: Watcher
    bodies: list[bytes]

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=5)

    def say(self, *pieces: bytes, pause: float = 0.0) -> bytes:
        with closing(self.connect()) as sock:
            for piece in pieces:
                sock.sendall(piece)
                time.sleep(pause)
            return everything(sock)

    def ask(
        self, method: str = "GET", path: str = "/v1/things/7", body: bytes = b"", **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        given = {"host": "localhost", "connection": "close", "content-length": str(len(body))} | headers
        head = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in given.items())
        return parsed(self.say(f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + body))


def everything(sock: socket.socket) -> bytes:
    found = b""
    while data := sock.recv(65536):
        found += data
    return found


def parsed(answer: bytes) -> tuple[int, dict[str, str], bytes]:
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    return int(first.split()[1]), {line.partition(":")[0].lower(): line.partition(":")[2].strip() for line in lines}, body


@contextmanager
def small(tmp_path: Path, pace: Pace = FAST, seconds: float = 0.4, **settings: Any) -> Iterator[Small]:
    bodies: list[bytes] = []

    async def thing(request: Request) -> Response:
        bodies.append(await request.body())
        return PlainTextResponse(str(len(bodies[-1])))

    async def unread(request: Request) -> Response:
        return PlainTextResponse("done", 202)

    async def page(request: Request) -> Response:
        return HTMLResponse("<p>")

    async def fault(request: Request) -> Response:
        raise RuntimeError("a fault")

    routes: list[BaseRoute] = [
        Mount("/v1", routes=[Route("/things/{thing}", thing, methods=["GET", "POST"]), Route("/unread", unread)]),
        Route("/", page), Route("/fault", fault),
    ]  # fmt: skip
    given = Settings({"a": tmp_path}, tmp_path, **({"body": 1 << 16, "clips": 0} | settings))
    watcher = Watcher()
    app = Starlette(routes=routes, middleware=guarded(given, watcher, pace))
    config = uvicorn.Config(app, log_level="critical", http=guarded_protocol(seconds=seconds), timeout_keep_alive=1)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as sock:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield Small(sock.getsockname()[1], watcher, bodies)
        finally:
            server.should_exit = True
            thread.join(10)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Small]:
    with small(tmp_path_factory.mktemp("small")) as running:
        yield running


HEAD = b"POST /v1/things/7 HTTP/1.1\r\nhost: localhost\r\n"


def test_a_body_of_the_limit_is_taken_and_one_more_byte_is_not(server: Small) -> None:
    assert server.ask("POST", body=bytes(1 << 16))[::2] == (200, b"65536")
    status, headers, body = server.ask("POST", body=bytes((1 << 16) + 1))
    assert (status, json.loads(body)["error"]["code"], headers["cache-control"]) == (413, "body_too_large", "no-store")
    seen = len(server.bodies)
    chunk = b"8000\r\n" + bytes(0x8000) + b"\r\n"
    chunked = b"connection: close\r\ntransfer-encoding: chunked\r\n\r\n"
    status, _, body = parsed(server.say(HEAD + chunked + 3 * chunk + b"0\r\n\r\n"))
    assert (status, json.loads(body)["error"]["code"]) == (413, "body_too_large")
    assert len(server.bodies) == seen  # the route never had it whole


def test_a_client_that_asks_first_sends_nothing_that_is_refused(server: Small) -> None:
    """`Expect: 100-continue`, as curl does for large files."""
    expecting = HEAD + b"connection: close\r\nexpect: 100-continue\r\n"
    assert parsed(server.say(expecting + b"content-length: 65537\r\n\r\n"))[0] == 413
    with closing(server.connect()) as sock:
        sock.sendall(expecting + b"content-length: 4\r\n\r\n")
        assert sock.recv(100).startswith(b"HTTP/1.1 100")
        sock.sendall(b"body")
        assert parsed(everything(sock))[2] == b"4"


@pytest.mark.parametrize(
    "pieces", [[b"content-length: 9\r\n\r\n", b"half"], [b"content-length: 40\r\n\r\n", *[b"x"] * 12]], ids=["stops", "drips"]
)
def test_a_body_that_is_too_slow_is_cut_off(server: Small, pieces: list[bytes]) -> None:
    start = time.monotonic()
    with closing(server.connect()) as sock:
        sock.sendall(HEAD + pieces[0])
        for piece in pieces[1:]:
            if not select([sock], [], [], 0.05)[0]:  # nothing is said yet
                sock.sendall(piece)
        status, headers, body = parsed(everything(sock))  # the connection ends: nobody can go on dripping
    assert (status, json.loads(body)["error"]["code"]) == (408, "upload_too_slow")
    assert headers["connection"] == "close" and headers["x-should-retry"] == "false"
    assert 0.15 < time.monotonic() - start < 2


def test_a_steady_body_may_take_longer_than_the_grace(tmp_path: Path) -> None:
    with small(tmp_path, Pace(grace=0.2, rate=100, total=5)) as server:
        pieces = [HEAD + b"connection: close\r\ncontent-length: 300\r\n\r\n", *[bytes(50)] * 6]
        assert parsed(server.say(*pieces, pause=0.08))[::2] == (200, b"300")


def test_a_client_that_leaves_is_no_fault(server: Small) -> None:
    with closing(server.connect()) as sock:
        sock.sendall(HEAD + b"content-length: 9\r\n\r\nhalf")
    until(lambda: ("/v1/things/{thing}", 499) in server.watcher.seen)
    assert server.ask()[0] == 200


def test_an_answer_is_read_although_the_body_was_not(server: Small) -> None:
    """A server that closes with a body unread resets the connection, and the answer is lost with it."""
    body = bytes(60_000)
    status, _, said = server.ask("GET", "/v1/unread", body)
    assert (status, said) == (202, b"done")


@pytest.mark.parametrize("drips", [False, True])
def test_a_body_that_nobody_reads_keeps_no_connection(server: Small, drips: bool) -> None:
    with closing(server.connect()) as sock:
        sock.sendall(b"GET /v1/unread HTTP/1.1\r\nhost: localhost\r\ncontent-length: 60000\r\n\r\n")
        assert b"done" in everything_until(sock, b"done")
        end = time.monotonic() + 3
        while not select([sock], [], [], 0.1)[0]:
            assert time.monotonic() < end
            if drips:
                sock.sendall(b"x")


def everything_until(sock: socket.socket, end: bytes) -> bytes:
    found = b""
    while end not in found:
        found += sock.recv(65536)
    return found


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.1\r\n", b"GET / HT"], ids=["nothing", "a part", "half a line"])
def test_a_connection_without_a_request_is_closed(server: Small, said: bytes) -> None:
    start = time.monotonic()
    assert server.say(said) == b"" and 0.3 < time.monotonic() - start < 2


def test_a_second_request_has_its_time_too(server: Small) -> None:
    get = b"GET /v1/things/7 HTTP/1.1\r\nhost: localhost\r\n\r\n"
    with closing(server.connect()) as sock:
        for _ in range(3):
            sock.sendall(get)
            assert everything_until(sock, b"\r\n\r\n0").startswith(b"HTTP/1.1 200")
            time.sleep(0.25)  # together longer than what one may take
        sock.sendall(get[:20])
        start = time.monotonic()
        assert everything(sock) == b"" and 0.3 < time.monotonic() - start < 2


class Transport(asyncio.Transport):
    """Of a connection from an address that this machine does not have."""

    def __init__(self, address: str) -> None:
        super().__init__({"peername": (address, 1234)})
        self.written, self.closed = b"", False

    def write(self, data: Any) -> None:
        self.written += data

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed


def connections(proxies: tuple[str, ...] = ()) -> Callable[[str], tuple[Any, Transport]]:
    """Connects to a server that has room for two of an address."""
    config = uvicorn.Config(lambda *_: None, log_config=None, lifespan="off")  # type: ignore[arg-type]
    config.load()
    state = uvicorn.server.ServerState()
    kind = guarded_protocol(connections=2, proxies=proxies)

    def connect(address: str) -> tuple[Any, Transport]:
        made, transport = kind(config=config, server_state=state, app_state={}), Transport(address)  # type: ignore[call-arg]
        made.connection_made(transport)
        return made, transport

    return connect


def in_a_loop(test: Callable[[], None]) -> None:
    async def run() -> None:
        test()

    asyncio.run(run())


def test_connections_of_one_address_are_counted() -> None:
    in_a_loop(counted)


def counted() -> None:
    connect = connections()
    first, _ = connect("192.0.2.1")
    assert not connect("192.0.2.1")[1].closed and not connect("192.0.2.2")[1].closed
    over, refused = connect("192.0.2.1")
    status, headers, body = parsed(refused.written)
    assert (status, json.loads(body)["error"]["code"], headers["retry-after"]) == (429, "too_many_connections", "1")
    assert refused.closed
    over.data_received(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")  # what was under way already
    over.connection_lost(None)
    again, refused = connect("192.0.2.1")
    assert refused.closed  # there are still two
    for one in (again, first):
        one.connection_lost(None)
    assert not connect("192.0.2.1")[1].closed


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "::ffff:127.0.0.9", "192.0.2.7", "::ffff:192.0.2.7", "2001:db8::9"])
def test_connections_of_a_proxy_and_of_this_machine_are_not(address: str) -> None:
    def many() -> None:
        connect = connections(("192.0.2.7", "2001:db8::/64"))
        assert not any(connect(address)[1].closed for _ in range(9))
        assert [connect("192.0.2.8")[1].closed for _ in range(3)] == [False, False, True]

    in_a_loop(many)
    with pytest.raises(InputError, match=r"the proxy 'proxy.example' is no address"):
        guarded_protocol(proxies=["proxy.example"])


@pytest.mark.parametrize(
    ("host", "keyless", "hosts", "status"),
    [
        ("localhost:8420", True, (), 200), ("127.0.0.1", True, (), 200), ("[::1]:8420", True, (), 200),
        ("box", True, (), 200), ("a.localhost", True, (), 200), ("evil.example", True, (), 403), ("", True, (), 403),
        ("evil.example", False, (), 200), ("evil.example", False, ("video.example",), 403),
        ("VIDEO.example:8420", False, ("video.example",), 200), ("192.0.2.1", False, ("video.example",), 200),
        ("localhost", False, ("video.example",), 200),
        ("[", True, (), 403), ("evil.example@127.0.0.1", True, (), 200),
    ],
)  # fmt: skip
def test_a_server_answers_to_names_that_are_its_own(
    tmp_path: Path, host: str, keyless: bool, hosts: tuple[str, ...], status: int
) -> None:
    """A page whose name was made to lead here (DNS rebinding) has a name with a dot, and no key."""
    given = Settings({"a": tmp_path}, tmp_path, hosts=hosts, keys=None if keyless else tmp_path / "keys")
    answered = asyncio.run(answer(given, {"host": host}))
    assert answered.status == status
    if status == 403:
        error = json.loads(answered.body)["error"]
        assert error["code"] == "host_not_allowed" and "--allow-host" in error["message"]


@dataclass
class Answered:
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


async def answer(settings: Settings, headers: dict[str, str], method: str = "GET", status: int = 200) -> Answered:
    """What an application behind the layers answers, without a server."""
    made = Answered()

    async def ok(request: Request) -> Response:
        return HTMLResponse("<p>", status) if status == 200 else Response(status_code=status)

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            made.status = message["status"]
            made.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        made.body += message.get("body", b"")

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    app = Starlette(routes=[Route("/", ok, methods=["GET", "POST"])], middleware=guarded(settings, Watcher()))
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": method, "path": "/", "headers": raw, "query_string": b"", "root_path": ""}
    await app(scope, receive, send)  # type: ignore[arg-type]
    return made


@pytest.mark.parametrize(
    ("method", "origin", "status"),
    [
        ("POST", None, 200), ("POST", "http://localhost:8420", 200), ("POST", "http://LOCALHOST:8420", 200),
        ("POST", "http://localhost:9", 403), ("POST", "http://evil.example", 403), ("POST", "null", 403),
        ("POST", "http://[", 403),
        ("GET", "http://evil.example", 200), ("POST", "https://app.example", 200), ("POST", "https://app.example.evil", 403),
    ],
)  # fmt: skip
def test_a_page_elsewhere_cannot_send_anything(tmp_path: Path, method: str, origin: str | None, status: int) -> None:
    given = Settings({"a": tmp_path}, tmp_path, origins=("https://APP.example/",))
    headers = {"host": "localhost:8420"} | ({} if origin is None else {"origin": origin})
    answered = asyncio.run(answer(given, headers, method))
    assert answered.status == status
    allowed = answered.headers.get("access-control-allow-origin")
    assert allowed == (origin if origin == "https://app.example" else None)  # and without it a browser keeps the answer back


def test_a_page_that_is_named_may_ask_first(tmp_path: Path) -> None:
    asked = {"host": "localhost", "origin": "https://app.example", "access-control-request-method": "DELETE"}
    asked["access-control-request-headers"] = "authorization"
    for origins, status in ((("https://app.example",), 200), ((), 405), (("https://other.example",), 400)):
        answered = asyncio.run(answer(Settings({"a": tmp_path}, tmp_path, origins=origins), asked, "OPTIONS"))
        assert answered.status == status
        assert ("access-control-allow-origin" in answered.headers) == (status == 200)
        assert "access-control-allow-credentials" not in answered.headers


@pytest.mark.parametrize("origin", ["*", "app.example", "https://*.example", "https://app.example/page", "file:///a"])
def test_an_origin_that_is_none_is_refused_at_the_start(tmp_path: Path, origin: str) -> None:
    with pytest.raises(InputError, match="allowed is a scheme and a host"):
        guarded(Settings({"a": tmp_path}, tmp_path, origins=(origin,)), Watcher())


def test_every_answer_keeps_a_browser_careful(server: Small) -> None:
    page, plain = server.ask(path="/")[1], server.ask()[1]
    for headers in (page, plain, server.ask(path="/nothing")[1], server.ask(host="evil.example")[1]):
        assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
        assert headers["cross-origin-resource-policy"] == "same-origin" and "set-cookie" not in headers
    assert page["content-security-policy"] == PAGE_POLICY and plain["content-security-policy"] == OTHER_POLICY
    for policy in (PAGE_POLICY, OTHER_POLICY):
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy


def test_a_page_that_has_not_changed_keeps_its_policy(tmp_path: Path) -> None:
    """A browser takes headers of a 304 over those that it has."""
    given = Settings({"a": tmp_path}, tmp_path, origins=("https://app.example",))
    headers = asyncio.run(answer(given, {"host": "localhost"}, status=304)).headers
    assert "content-security-policy" not in headers and headers["cross-origin-resource-policy"] == "cross-origin"


def test_requests_are_told_by_the_template_of_their_route(tmp_path: Path) -> None:
    with small(tmp_path) as server:
        for path in ("/v1/things/7", "/v1/things/8", "/v1/nothing", "/made/up", "/fault"):
            server.ask(path=path)
        server.ask("PUT", "/v1/things/7")
        server.ask(host="evil.example")
        seen = [("/v1/things/{thing}", 200)] * 2 + [("/v1", 404), ("other", 404), ("/fault", 500), ("/v1/things/{thing}", 405)]
        assert server.watcher.seen == [*seen, ("other", 403)]


def until(true: Callable[[], bool], seconds: float = 5) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)
