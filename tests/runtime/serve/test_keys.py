"""API keys: made, found, bounded, revoked; a file that is watched; links that hold for a while and for one path."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request

from motionrt.runtime.errors import InputError, MotionRTError
from motionrt.runtime.serve.web.keys import ANONYMOUS, Key, Keys, Quota, check, sign
from motionrt.runtime.serve.web.refusal import Refused


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new" / "keys.json"


@pytest.fixture
def keys(path: Path) -> Keys:
    return Keys.open(path, new=True)


def request(url: str = "/v1/videos", authorization: str | None = None) -> Request:
    parts = urlsplit(url)
    headers = [] if authorization is None else [(b"authorization", authorization.encode("latin-1"))]
    return Request(
        {"type": "http", "method": "GET", "path": parts.path, "query_string": parts.query.encode(), "headers": headers}
    )


def refusal(keys: Keys, asked: Request, role: str = "read", signed: bool = False) -> tuple[int, str]:
    with pytest.raises(Refused) as caught:
        keys.of(asked, role, signed)
    return caught.value.status, caught.value.code


def test_key_is_found_by_its_secret_which_is_nowhere_in_the_file(keys: Keys, path: Path) -> None:
    token = keys.create("alice", ["generate"], Quota(waiting=2, n=4))
    other = keys.create("bob", ["read"])
    key = keys.find(token)
    assert key is not None and (key.name, key.roles, key.quota.n) == ("alice", {"generate"}, 4)
    assert token.startswith("mrt_") and len(token) == 47 and token != other
    assert token[4:] not in path.read_text() and path.stat().st_mode & 0o777 == 0o600
    for wrong in ("", "mrt_", token[:-1], token + "x", token.swapcase(), key.id, "\udcff"):
        assert keys.find(wrong) is None
    assert [one.name for one in Keys.open(path).every()] == ["alice", "bob"]
    assert Keys.open(path).find(token) == key


def test_request_needs_a_key_and_the_key_its_role(keys: Keys) -> None:
    tokens = {role: keys.create(role, [role]) for role in ("read", "generate", "admin")}
    allowed = {
        role: {one for one in tokens if Key(id="", name="", roles=frozenset({role})).may(one)}  # type: ignore[arg-type]
        for role in tokens
    }
    assert allowed == {"read": {"read"}, "generate": {"read", "generate"}, "admin": {"read", "generate", "admin"}}
    for own, token in tokens.items():
        for role in tokens:
            asked = request(authorization=f"bearer  {token} ")
            if role in allowed[own]:
                assert keys.of(asked, role).name == own
            else:
                assert refusal(keys, asked, role) == (403, "not_allowed")
    for header in (None, "", "Basic abc", "Bearer", "Bearer ", tokens["read"]):
        assert refusal(keys, request(authorization=header)) == (401, "missing_api_key")
    assert refusal(keys, request(authorization="Bearer mrt_\xff")) == (401, "invalid_api_key")
    with pytest.raises(Refused) as caught:
        keys.of(request(), "read")
    assert caught.value.headers["www-authenticate"] == "Bearer" and caught.value.kind == "authentication_error"


def test_without_a_file_everybody_may_do_everything() -> None:
    keys = Keys.open(None)
    assert keys.of(request(authorization="Bearer whatever"), "admin") is ANONYMOUS and keys.anonymous
    assert keys.signed("/v1/videos/a/content", "anonymous") == "/v1/videos/a/content"
    ANONYMOUS.check_request("high", 8)
    ANONYMOUS.check_seconds(1e9, 1e9)


def test_running_server_sees_what_another_process_changes(keys: Keys, path: Path) -> None:
    first = keys.create("first", ["read"])
    server = Keys.open(path)
    second = keys.create("second", ["read"])
    assert server.find(second) is not None
    keys.revoke("first")
    assert server.find(first) is None and server.find(second) is not None
    again = Keys.open(path)
    again.create("first", ["admin"])  # a name is free again; the key is another
    keys.revoke("second")  # a change in between is not lost
    assert [key.name for key in server.every()] != [] and server.find(second) is None
    assert [key.name for key in server.every()] == ["first"]


@pytest.mark.parametrize("damage", ["{", "[]", '{"keys": [{"key": {}}]}', '{"keys": [], "format": 2}', '{"key": []}', "\xff"])
def test_damaged_file_lets_nobody_in(keys: Keys, path: Path, damage: str) -> None:
    token = keys.create("alice", ["read"])
    path.write_bytes(damage.encode("latin-1"))
    with pytest.raises(MotionRTError, match="damaged"):
        Keys.open(path)
    with pytest.raises(Refused) as caught:
        keys.find(token)
    assert (caught.value.status, caught.value.code) == (503, "keys_unreadable") and str(path) not in caught.value.message
    path.unlink()
    with pytest.raises(Refused):
        keys.find(token)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o620])
def test_file_that_others_may_read_is_refused(keys: Keys, path: Path, mode: int) -> None:
    token = keys.create("alice", ["read"])
    path.chmod(mode)
    with pytest.raises(MotionRTError, match="chmod 600"):
        Keys.open(path)
    with pytest.raises(Refused):
        keys.find(token)
    path.chmod(0o600)
    assert keys.find(token) is not None


def test_missing_file_is_an_error_unless_one_is_made(path: Path) -> None:
    with pytest.raises(MotionRTError, match="motionrt keys create"):
        Keys.open(path)


def test_wrong_names_roles_and_quotas_are_refused(keys: Keys, path: Path) -> None:
    keys.create("alice", ["read"])
    before = path.read_bytes()
    for name, roles, text in [
        ("alice", ["read"], "already"), ("", ["read"], "name"), ("a\nb", ["read"], "name"), ("x" * 65, ["read"], "name"),
        ("bob", [], "none"), ("bob", ["root"], "root"),
    ]:  # fmt: skip
        with pytest.raises(InputError, match=text):
            keys.create(name, roles)
    with pytest.raises(InputError, match="alice"):
        keys.revoke("bob")
    for quota in ({"waiting": 0}, {"n": -1}, {"seconds_a_day": float("nan")}, {"priority": "highest"}):
        with pytest.raises(InputError):
            Quota(**quota)  # type: ignore[arg-type]
    assert path.read_bytes() == before and [*path.parent.iterdir()] == [path]
    entry = json.loads(before)
    entry["keys"][0]["key"]["quota"]["waiting"] = -1
    path.write_text(json.dumps(entry))
    with pytest.raises(MotionRTError, match="waiting"):
        Keys.open(path)


def test_quota_bounds_priority_seeds_and_seconds() -> None:
    key = Key(id="key_1", name="a", roles=frozenset({"generate"}), quota=Quota(seconds_a_day=100, priority="normal", n=4))
    for priority, n in [("low", None), ("normal", "4"), ("normal", 4), ("low", "many"), ("low", [5])]:
        key.check_request(priority, n)
    for priority, n, param in [("high", None, "priority"), ("low", 5, "n"), ("low", "5", "n"), ("low", 4.0 + 1, "n")]:
        with pytest.raises(Refused) as caught:
            key.check_request(priority, n)
        assert (caught.value.status, caught.value.param) == (403, param)
    key.check_seconds(40, 60)
    with pytest.raises(Refused) as caught:
        key.check_seconds(41, 60)
    assert (caught.value.status, caught.value.code) == (429, "seconds_used_up")
    assert 0 < int(caught.value.headers["retry-after"]) <= 86400


def test_link_is_good_for_its_path_and_its_key_until_it_expires(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    token = keys.create("alice", ["generate"])
    key = keys.find(token)
    assert key is not None
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    link = keys.signed("/v1/videos/video_1/content?variant=video&index=0", key.id)
    assert link == keys.signed("/v1/videos/video_1/content?variant=video&index=0", key.id)  # a browser may keep what it loaded
    asked = request(link)
    assert asked.query_params["variant"] == "video"
    signer = keys.of(asked, "read", signed=True)
    assert (signer.id, signer.roles) == (key.id, {"read"})
    assert refusal(keys, asked) == (401, "missing_api_key")  # not where signatures do not count
    for path in ("/v1/videos/video_2/content", "/v1/videos/video_1/content/", "/v1/videos/video_1"):
        assert refusal(keys, request(f"{path}?{link.partition('?')[2]}"), signed=True) == (401, "invalid_signature")
    for old, new in (
        ("key=key_", "key=key-"),
        ("expires=", "expires=1"),
        ("signature=", "signature=A"),
        ("&signature", "&sign"),
    ):
        assert refusal(keys, request(link.replace(old, new)), signed=True)[0] == 401
    assert Keys.open(keys._path)._secret != keys._secret  # links end with the process
    now += 899
    keys.of(asked, "read", signed=True)
    now += 902
    assert refusal(keys, asked, signed=True) == (401, "invalid_signature")
    now -= 901
    keys.revoke("alice")
    assert refusal(keys, asked, signed=True) == (401, "invalid_signature")
    bare = keys.signed("/v1/videos/video_1/events", key.id)
    assert bare.startswith("/v1/videos/video_1/events?key=")


@pytest.mark.parametrize("below", ["", "/motion", "/v1"])
def test_link_is_good_where_the_server_is_mounted_and_names_are_no_ascii(keys: Keys, below: str) -> None:
    keys.create("alice", ["read"])
    (key,) = keys.every()
    for link in ("/v1/memories/v%C3%B6gel/clips/1/preview", "/v1/memories/vögel/jobs/1/events"):
        scope = request(keys.signed(link, key.id)).scope
        # As a server and `Mount` hand it on: decoded, and with what it is mounted below.
        scope |= {"path": below + unquote(scope["path"]), "root_path": f"{below}/v1"}
        assert keys.of(Request(scope), "read", signed=True).id == key.id


QUERIES = st.dictionaries(st.sampled_from(["key", "expires", "signature"]), st.text(max_size=30))


@given(QUERIES, st.text(max_size=20))
def test_no_query_is_a_signature_by_chance(query: Mapping[str, str], path: str) -> None:
    secret = b"s" * 32
    assert check(secret, path, query, 0) is None
    right = dict(parse_qsl(sign(secret, "/a", "key_1", 100)))
    assert check(secret, "/a", right, 99) == "key_1" and check(secret, "/a", right, 100) is None
    assert check(secret, "/a", right | query, 0) in (None, "key_1") and check(b"t" * 32, "/a", right, 0) is None


def test_file_of_another_user_is_refused(keys: Keys, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys.create("alice", ["read"])
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    if path.stat().st_uid == 0:
        Keys.open(path)  # root's files are as good as one's own
        os.chown(path, 12345, 12345)
    with pytest.raises(MotionRTError, match="another user"):
        Keys.open(path)
