"""docs/jobs-over-http.md says what the program does: every route, field and stage, and no code that there is not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from starlette.routing import Mount, Route

from motionrt.runtime.serve.app import app
from motionrt.runtime.serve.work.engine import _STAGES
from motionrt.runtime.serve.work.order import _OTHERS

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs/jobs-over-http.md").read_text()
SOURCES = "\n".join(path.read_text() for path in (ROOT / "runtime/serve").rglob("*.py"))


def section(name: str) -> str:
    return PAGE.partition(f"## {name}\n")[2].partition("\n## ")[0]


def test_every_route_is_told_and_no_other(tmp_path: Path) -> None:
    served = app(tmp_path, tmp_path / "store")
    (mount,) = (route for route in served.routes if isinstance(route, Mount) and route.path == "/v1")
    routes = [route for route in mount.routes or () if isinstance(route, Route)]
    there = {
        f"{method} /v1{route.path}" for route in routes for method in (route.methods or set()) - {"HEAD"}
        if not re.search(r"/memories|/edits|/extensions|/characters", route.path)
    }  # fmt: skip
    assert set(re.findall(r"`((?:GET|POST|DELETE) /v1/[\w/{}]+)`", section("Routes"))) == there


@pytest.mark.parametrize("name", [*_OTHERS, "model", "priority", "metadata", "prompt", "input_reference"])
def test_every_field_is_told(name: str) -> None:
    assert f"`{name}`" in section("Fields of a request")


@pytest.mark.parametrize("stage", ["queued", *_STAGES, "done"])
def test_every_stage_is_told(stage: str) -> None:
    assert stage in section("What a job says")


def test_codes_are_those_of_the_program() -> None:
    told = set(
        re.findall(r"`(\w+)`", re.sub(r"^.*Errors are.*$|\| status.*", "", section("When something is refused"), flags=re.M))
    )
    assert told - {"param"} and {code for code in told - {"param", "error"} if f'"{code}"' not in SOURCES} == set()
