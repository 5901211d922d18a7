"""The table of risks, row by row: each is tried against a server on loopback, or the test that tries it is named.

Where a row has more to it than one request shows, the details are in test_limits.py (bodies, connections, hosts, origins), in
test_form.py (what arrives), test_keys.py (keys and links), test_metrics.py (labels) and test_logs.py (lines).
"""

from __future__ import annotations

import ast
import base64
import json
import shutil
import socket
import ssl
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from serving import BOUNDARY, Served, serving

from motionrt.runtime.errors import MediaError
from motionrt.runtime.media.video import read_clip
from motionrt.runtime.serve.web import answers
from motionrt.runtime.serve.web.keys import Keys, Quota
from motionrt.runtime.serve.web.refusal import Refused

ROOT = Path(__file__).resolve().parents[3]
BUNDLE, MEMORY = ROOT / "demo/bundle", ROOT / "demo/memory"
LONG = {"steps": 50, "n": 4}
Users = dict[str, Served]


@pytest.fixture(scope="module")
def users(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Users]:
    """A server with keys, as each of their owners sees it; "nobody" has none."""
    folder = tmp_path_factory.mktemp("users")
    keys = Keys.open(folder / "keys.json", new=True)
    tokens = {
        "alice": keys.create("alice", ["generate"]), "eve": keys.create("eve", ["read"]),
        "root": keys.create("root", ["admin"]), "bob": keys.create("bob", ["generate"], Quota(waiting=1, n=2)),
        "spent": keys.create("spent", ["generate"], Quota(seconds_a_day=1e-6)),
    }  # fmt: skip
    options = (f"--keys={folder / 'keys.json'}", "--queue=2", "--allow-host=video.example")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("CLOUD_ACCESS_KEY", "a-secret-of-the-service")
        with serving(folder / "store", BUNDLE, MEMORY, *options) as running:
            yield {name: running.of(token) for name, token in tokens.items()} | {"nobody": running}


@contextmanager
def listener() -> Iterator[tuple[str, list[str]]]:
    """An address of this machine, and who connected to it."""
    seen: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as sock:

        def listen() -> None:
            while True:
                try:
                    connection, peer = sock.accept()
                except OSError:
                    return
                seen.append(str(peer))
                connection.close()

        thread = threading.Thread(target=listen, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{sock.getsockname()[1]}", seen
        sock.shutdown(socket.SHUT_RDWR)
    thread.join(5)


def raw(served: Served, data: bytes) -> bytes:
    """Bytes as they are; what comes back until the server closes."""
    port = int(served.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
        sock.sendall(data)
        found = b""
        while part := sock.recv(65536):
            found += part
        return found


# --- open by default


def test_open_by_default(run: Callable[..., tuple[int, str, str]], users: Users, picture: Path, tmp_path: Path) -> None:
    status, _, err = run("serve", "-b", BUNDLE, "--store", tmp_path, "--host", "0.0.0.0")
    assert status == 2 and "there are no keys" in err and "--no-auth" in err
    every = ("/v1/videos", "/v1/models", "/v1/memories", "/metrics", "/v1/videos/video_0", "/v1/videos/video_0/content")
    assert [users["nobody"].call("GET", path).status for path in every] == [401] * len(every)
    wrong = users["nobody"].of("mrt_" + "A" * 43)
    assert wrong.call("GET", "/v1/videos").code == "invalid_api_key"
    assert users["nobody"].call("GET", "/health/ready").status == 200  # says nothing of anybody
    assert users["eve"].call("GET", "/v1/videos").status == 200 and users["root"].call("GET", "/metrics").status == 200
    made = users["eve"].call("POST", "/v1/videos", form={"prompt": "a"}, files={"input_reference": picture})
    for reply in (made, users["eve"].call("GET", "/metrics"), users["alice"].call("GET", "/metrics")):
        assert (reply.status, reply.code) == (403, "not_allowed")


# --- upload size


def test_upload_size(users: Users, picture: Path) -> None:
    alice = users["alice"]
    head = f"POST /v1/videos HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {alice.key}\r\nexpect: 100-continue\r\n"
    answer = raw(alice, f"{head}connection: close\r\ncontent-length: {(32 << 20) + 1}\r\n\r\n".encode())
    assert b" 413 " in answer and b"body_too_large" in answer
    assert alice.call("POST", "/v1/videos", form={"prompt": "a" * ((64 << 10) + 1)}).code == "field_too_large"
    assert alice.call("POST", "/v1/videos", form={f"x{i}": "1" for i in range(65)}).code == "too_many_fields"
    assert not any(alice.log.with_suffix("").joinpath("uploads").iterdir())


# --- slow upload, many connections: test_limits.py; here, that the server is run with those bounds


@pytest.mark.slow
def test_slow_upload_many_connections(users: Users) -> None:
    start = time.monotonic()
    assert raw(users["nobody"], b"GET / HTTP/1.1\r\nhost: loc") == b"" and 14 < time.monotonic() - start < 17
    head = f"POST /v1/videos HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {users['alice'].key}\r\n"
    head += "content-type: multipart/form-data; boundary=x\r\ncontent-length: 900\r\n"
    answer = raw(users["alice"], f"{head}\r\n--x".encode())
    assert b" 408 " in answer and b"upload_too_slow" in answer and 23 < time.monotonic() - start < 29


# --- image bombs


def test_image_bombs(served: Served, tmp_path: Path) -> None:
    (worker,) = served.workers()
    before = peak(worker)
    for mode, kind, side in (("1", "png", 13000), ("L", "jpeg", 7100), ("1", "gif", 7100)):
        bomb = tmp_path / f"bomb.{kind}"
        Image.new(mode, (side, side)).save(bomb)
        reply = served.call("POST", "/v1/videos", form={"prompt": "a"}, files={"input_reference": bomb})
        assert reply.status == 400 and "at most 50 million are taken" in reply.json["error"]["message"], reply.body
        assert bomb.stat().st_size < 2 << 20
    assert peak(worker) - before < 40 << 20  # decoded they take 50 to 170 MB and more
    for kind in ("tiff", "bmp", "ico", "pcx"):
        Image.new("RGB", (30, 20)).save(other := tmp_path / f"other.{kind}")
        other = other.rename(tmp_path / f"{kind}.png")  # by its bytes, not its name
        assert served.call("POST", "/v1/videos", form={"prompt": "a"}, files={"input_reference": other}).status == 400


def peak(pid: int) -> int:
    """Bytes of memory that a process has had at most."""
    (line,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) << 10


def test_image_bombs_only_the_first_picture_counts(served: Served, tmp_path: Path) -> None:
    stills = [Image.fromarray(np.full((20, 30, 3), level, np.uint8)) for level in (0, 99, 200)]
    stills[0].save(tmp_path / "many.gif", save_all=True, append_images=stills[1:] * 200)
    stills[0].save(tmp_path / "one.gif")
    ids = [served.create(tmp_path / name, seed=1, steps=2)["id"] for name in ("many.gif", "one.gif")]
    many, one = (served.until(job, "completed")["motionrt"]["frames_sha256"] for job in ids)
    assert many == one


# --- video bombs


@pytest.mark.parametrize("name", ["clip.mp4", "clip.m3u8", "clip.webm"])
def test_video_bombs(tmp_path: Path, name: str) -> None:
    with listener() as (address, seen):
        for text in (
            f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{address}/a.ts\n#EXT-X-ENDLIST\n",
            f"ffconcat version 1.0\nfile '{address}/a.mp4'\n",
            f"<?xml version='1.0'?><MPD xmlns='urn:mpeg:dash:schema:mpd:2011'><BaseURL>{address}/</BaseURL></MPD>",
        ):
            (tmp_path / name).write_text(text)
            with pytest.raises(MediaError):
                read_clip(tmp_path / name, 4, 16, 16, 8)
        time.sleep(0.1)
        assert seen == []


# --- SSRF by image_url


def test_ssrf_by_image_url(served: Served) -> None:
    with listener() as (address, seen):
        for url in (f"{address}/a.png", address.replace("http", "ftp") + "/a", "file:///etc/hostname", "//127.0.0.1/a.png"):
            for field in ({"input_reference": {"image_url": url}}, {"input_reference": url}):
                assert served.call("POST", "/v1/videos", body={"prompt": "a", **field}).status == 400, url
        reply = served.call("POST", "/v1/videos", form={"prompt": "a", "input_reference[image_url]": f"{address}/a.png"})
        assert reply.status == 400
        time.sleep(0.1)
        assert seen == []


# --- paths


def test_paths(served: Served, picture: Path, tmp_path: Path) -> None:
    folder = served.log.with_suffix("")
    before = {path for path in folder.parent.rglob("*") if folder not in path.parents}
    names = (b'"../../../outside.png"', b'"/tmp/outside.png"', b'"..\\\\outside.png\x00.png"', b'"' + b"x" * 300 + b'"')
    for name in names:
        head = b'\r\nContent-Disposition: form-data; name="input_reference"; filename=' + name
        text = b'--%b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na\r\n--%b' % (2 * (BOUNDARY.encode(),))
        body = text + head + b"\r\n\r\n" + picture.read_bytes() + b"\r\n--%b--\r\n" % BOUNDARY.encode()
        headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
        request = urllib.request.Request(f"{served.url}/v1/videos", body, headers, method="POST")
        with urllib.request.urlopen(request) as answer:
            video = json.load(answer)
        place = folder / "files" / video["id"][-2:] / video["id"]
        assert [path.name for path in place.glob("input*")] == ["input-input_reference.png"]
        served.until(video["id"], "completed")
    assert {path for path in folder.parent.rglob("*") if folder not in path.parents} == before
    for name in ("../../keys", "..%2f..%2fkeys", "%2e%2e", "video_%00", "video_' OR 1=1 --", "a" * 5000):
        for rest in ("", "/content", "/input", "/preview", "/events", "/record"):
            line = f"GET /v1/videos/{name.replace(' ', '%20')}{rest} HTTP/1.1"
            assert raw(served, f"{line}\r\nhost: a\r\nconnection: close\r\n\r\n".encode())[9:12] in (b"404", b"400")
    for field in ("output_path", "save_to", "input_reference_path"):
        form = {"prompt": "a", field: "/tmp/x"}
        assert served.call("POST", "/v1/videos", form=form, files={"input_reference": picture}).status == 400
    for path in ("/etc/hostname", str(picture)):  # a path is no picture
        assert served.call("POST", "/v1/videos", body={"prompt": "a", "input_reference": path}).status == 400


# --- whose job


def test_whose_job(users: Users, picture: Path) -> None:
    alice, bob, root = users["alice"], users["bob"], users["root"]
    job = alice.until(alice.create(picture, steps=2)["id"], "completed")["id"]
    looks = ("", "?wait=1", "/content", "/input", "/preview", "/events", "/record")
    for method, rest in [*(("GET", rest) for rest in looks), ("DELETE", ""), ("POST", "/cancel")]:
        assert bob.call(method, f"/v1/videos/{job}{rest}").status == 404, rest
    assert bob.call("POST", f"/v1/videos/{job}/remix", body={"prompt": "mine"}).status == 404
    assert bob.call("GET", "/v1/videos").json["data"] == [] and bob.call("GET", "/v1/videos?all=true").json["data"] == []
    assert bob.call("GET", f"/v1/videos?after={job}").status == 400
    assert [one["id"] for one in alice.call("GET", "/v1/videos").json["data"]] == [job]
    assert root.call("GET", "/v1/videos").json["data"] == [] and root.call("GET", f"/v1/videos/{job}").status == 200
    assert job in [one["id"] for one in root.call("GET", "/v1/videos?all=true").json["data"]]
    link = alice.call("GET", f"/v1/videos/{job}").json["motionrt"]["links"]["video-0"]
    nobody = users["nobody"]
    assert nobody.call("GET", link).status == 200
    for other in (link.replace("/content", "/input"), link.replace("signature=", "signature=a"), link.split("?")[0]):
        assert nobody.call("GET", other).status == 401
    for name, path in root.call("GET", f"/v1/videos/{job}").json["motionrt"]["links"].items():
        assert nobody.call("GET", path).status == 200, name  # an admin sees all by links, too
    signature = link.partition("?")[2]
    assert nobody.call("DELETE", f"/v1/videos/{job}?{signature}").status == 401
    next((alice.store / "files" / job[-2:] / job).glob("input*")).unlink()
    for method, rest in (("GET", "/input"), ("GET", "/record"), ("POST", "/remix")):  # it expires while it is asked for
        reply = alice.call(method, f"/v1/videos/{job}{rest}", body={"prompt": "b"} if method == "POST" else None)
        assert (reply.status, reply.code) == (404, "video_expired"), rest
    idempotent = {"Idempotency-Key": "same"}
    form, files = {"prompt": "a", "steps": 2, "seed": 1}, {"input_reference": picture}
    made = [user.call("POST", "/v1/videos", form=form, files=files, headers=idempotent).json["id"] for user in (alice, bob)]
    assert made[0] != made[1]  # one's key is not another's
    for user, own in zip((alice, bob), made, strict=True):
        user.until(own, "completed")


# --- CORS, CSRF, rebinding: test_limits.py; here, against the server


def test_cors_csrf_rebinding(served: Served, users: Users, picture: Path) -> None:
    form, files = {"prompt": "a"}, {"input_reference": picture}
    reply = served.call("POST", "/v1/videos", form=form, files=files, headers={"Origin": "http://evil.example"})
    assert (reply.status, reply.code) == (403, "origin_not_allowed")
    reply = served.call("GET", "/v1/videos", headers={"Host": "evil.example"})
    assert (reply.status, reply.code) == (403, "host_not_allowed")
    alice = users["alice"]
    for host, status in (("video.example", 200), ("evil.example", 403)):
        assert alice.call("GET", "/v1/videos", headers={"Host": host}).status == status
    reply = served.call("GET", "/v1/videos", headers={"Origin": "http://evil.example"})
    assert "access-control-allow-origin" not in reply.headers


# --- log and header injection: test_logs.py, test_refusal.py; here, in answers


def test_log_and_header_injection(served: Served, picture: Path, tmp_path: Path) -> None:
    nasty = 'x\r\nSet-Cookie: a=b\r\n\r\n<script>"\x1b[2J'
    for form in ({"solver": nasty}, {nasty.replace("\r\n", ""): "1"}, {"where": nasty}, {"seed": "9" * 5000}, {"model": nasty}):
        reply = served.call("POST", "/v1/videos", form={"prompt": "a", **form}, files={"input_reference": picture})
        message = reply.json["error"]["message"]
        assert reply.status in (400, 404) and "Set-Cookie" not in reply.headers and message.isprintable() and len(message) < 900
    video = served.until(served.create(picture, prompt=nasty, steps=2)["id"], "completed")
    content = served.call("GET", f"/v1/videos/{video['id']}/content")
    assert content.headers["Content-Disposition"] == f'inline; filename="{video["id"]}-video-0.mp4"'
    broken = tmp_path / "x.png"
    broken.write_bytes(picture.read_bytes()[:60])
    replies = [served.call("POST", "/v1/videos", form={"prompt": "a"}, files={"input_reference": broken})]
    replies += [served.call("GET", path) for path in (f"/v1/videos/{video['id']}", "/v1/models", "/v1/memories", "/metrics")]
    for reply in replies:
        for folder in (ROOT, served.log.parent, Path.home()):
            assert str(folder).encode() not in reply.body


# --- metric cardinality: test_metrics.py::test_a_server_s_values_move_with_its_jobs


# --- cost


def test_cost(users: Users, picture: Path) -> None:
    alice, bob, files = users["alice"], users["bob"], {"input_reference": picture}
    running = bob.create(picture, steps=50, n=2)["id"]
    reply = bob.call("POST", "/v1/videos", form={"prompt": "a"}, files=files)
    assert (reply.status, reply.code) == (429, "too_many_jobs") and int(reply.headers["Retry-After"]) >= 1
    assert bob.call("POST", "/v1/videos", form={"prompt": "a", "n": "3"}, files=files).code in ("not_allowed", "too_many_jobs")
    bob.call("DELETE", f"/v1/videos/{running}")
    for form, code in (({"n": "3"}, "not_allowed"), ({"priority": "high"}, "not_allowed")):
        assert bob.call("POST", "/v1/videos", form={"prompt": "a", **form}, files=files).code == code
    for form in ({"n": "9"}, {"steps": "51"}, {"references": "99"}, {"steps": "1e9"}):
        assert alice.call("POST", "/v1/videos", form={"prompt": "a", **form}, files=files).status == 400
    reply = users["spent"].call("POST", "/v1/videos", form={"prompt": "a"}, files=files)
    assert (reply.status, reply.code, reply.headers["x-should-retry"]) == (429, "seconds_used_up", "false")
    keys = Keys.open(alice.store.parent / "keys.json")
    for turn in range(3):  # the estimate of a job may have changed by more than a quarter when the next one is asked for
        first = alice.create(picture, **LONG)
        # One such job a day: the second is refused while the first is not over, too. A key bound to low asks for low.
        one = Quota(seconds_a_day=1.5 * first["motionrt"]["eta_seconds"], priority="low")
        metered = alice.of(keys.create(f"metered-{turn}", ["generate"], one))
        replies = [metered.call("POST", "/v1/videos", form={"prompt": "a", **LONG}, files=files) for _ in range(2)]
        for job in (first, *(reply.json for reply in replies if reply.status == 200)):
            assert users["root"].call("DELETE", f"/v1/videos/{job['id']}").status == 200
        if [reply.status for reply in replies] == [200, 429]:
            break
    only, refused = replies
    assert only.json["motionrt"]["priority"] == "low" and (refused.status, refused.code) == (429, "seconds_used_up")
    jobs = [alice.create(picture, **LONG)["id"] for _ in range(3)]  # one runs, two wait
    reply = alice.call("POST", "/v1/videos", form={"prompt": "a"}, files=files)
    assert (reply.status, reply.code) == (429, "queue_full") and int(reply.headers["Retry-After"]) >= 1
    for job in jobs:
        assert alice.call("DELETE", f"/v1/videos/{job}").status == 200


# --- disk: what is kept, removed and swept is in test_store.py


def test_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(100, 94, 6))
    answers.check_disk(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(100, 96, 4))
    with pytest.raises(Refused) as caught:
        answers.check_disk(tmp_path)
    refused = caught.value
    assert (refused.status, refused.code, refused.headers["x-should-retry"]) == (503, "storage_full", "false")
    assert str(tmp_path) not in refused.message


# --- denial by regex, JSON depth, `where`


@pytest.mark.parametrize(
    "body",
    [
        b'{"where": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", b'{"where":' * 20_000, b'{"a":"' + b"data:" * 40_000,
        b'{"a": ' + b"9" * 200_000 + b"}", b"[" * 200_000, b'{"prompt": "' + b"a" * (257 << 10) + b'"}', b'"data:' * 30_000,
    ],
    ids=["deep list", "deep object", "half a URL", "long number", "only brackets", "long", "many halves"],
)  # fmt: skip
def test_denial_by_regex_json_depth(served: Served, body: bytes) -> None:
    request = urllib.request.Request(f"{served.url}/v1/videos", body, {"Content-Type": "application/json"}, method="POST")
    start = time.monotonic()
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=20)
    caught.value.close()
    assert caught.value.code in (400, 413) and time.monotonic() - start < 2


def test_denial_by_where(served: Served, picture: Path) -> None:
    for where in ({f"k{i}": 1 for i in range(17)}, {"a": {"b": {"c": {"d": {"e": {}}}}}}):
        for given in ({"where": where}, {"motionrt": {"where": where}}):
            data = f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"
            reply = served.call("POST", "/v1/videos", body={"prompt": "a", "input_reference": {"image_url": data}, **given})
            assert reply.status == 400, reply.body


# --- worker


def test_worker_has_no_secret_in_its_environment(users: Users) -> None:
    server = users["nobody"]
    own, worker = (Path(f"/proc/{pid}/environ").read_text() for pid in (server.process.pid, *server.workers()))
    assert "a-secret-of-the-service" in own and "a-secret-of-the-service" not in worker
    assert "PATH=" in worker and "OMP_NUM_THREADS=" in worker


def test_worker() -> None:
    """Nothing that could be pickled goes over the pipe, and nothing is looked up by a name that came over it."""
    for path in (ROOT / "runtime/serve").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
                assert not {"pickle", "marshal", "shelve", "dill"} & set(names), path
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                assert node.func.attr != "recv", f"{path}: Connection.recv unpickles"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec", "__import__"), path


# --- page


def test_page(served: Served, users: Users, picture: Path) -> None:
    """What is generated is never a page, whatever is in it; the page's own policy: test_limits.py."""
    video = served.until(served.create(picture, steps=2)["id"], "completed")
    for path in ("/content", "/content?variant=thumbnail", "/content?variant=spritesheet", "/input"):
        headers = served.call("GET", f"/v1/videos/{video['id']}{path}").headers
        assert headers["Content-Security-Policy"].startswith("sandbox") and headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "no-referrer" and headers["Content-Type"].split("/")[0] in ("video", "image")
    assert served.call("GET", f"/v1/videos/{video['id']}").headers["Cache-Control"] == "no-store"


# --- TLS


@pytest.mark.slow
def test_tls(tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl to make a certificate")
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    made = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(["openssl", "req", *made, *names], check=True, capture_output=True)
    options = (f"--ssl-certfile={certificate}", f"--ssl-keyfile={key}", "--no-self-test")
    with serving(tmp_path / "store", BUNDLE, None, *options, ready=False) as served:
        context, url = ssl.create_default_context(cafile=str(certificate)), served.url.replace("http", "https")
        end = time.monotonic() + 20
        while True:
            try:
                with urllib.request.urlopen(f"{url}/health/live", context=context, timeout=5) as answer:
                    assert answer.status == 200
                break
            except OSError:
                assert time.monotonic() < end, served.log.read_text()
                time.sleep(0.05)
        with pytest.raises(OSError):
            urllib.request.urlopen(f"{served.url}/health/live", timeout=5)
