"""The site: built strictly (links, anchors, pages), with every command and public name, and nothing asked of the network."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import typer
from browsing import chromium
from by_path import load_by_path

import motionrt
from motionrt.runtime.cli.main import app, register

ROOT = Path(__file__).resolve().parents[2]
MKDOCS = ROOT / ".venv-docs/bin/mkdocs"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not MKDOCS.exists(), reason="no .venv-docs: `make test-slow` makes it"),
]


def build(config: Path, target: Path) -> subprocess.CompletedProcess[str]:
    command = [str(MKDOCS), "build", "--config-file", str(config), "--site-dir", str(target)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site") / "site"
    done = build(ROOT / "mkdocs.yml", target)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr, done.stderr
    return target


@pytest.fixture(scope="module")
def served(site: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_every_command_has_its_section(site: Path) -> None:
    register()
    headings = {re.sub(r"<[^>]+>|¶|&para;", "", text) for text in re.findall(r"<h\d.*?</h\d>", (site / "cli.html").read_text())}
    names = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    assert {"generate", "export", "memory"} <= names
    assert {f"motionrt {name}" for name in names} <= headings
    assert {"motionrt memory add", "motionrt client create"} <= headings
    assert "\b" not in (site / "cli.html").read_text()


def test_every_public_name_is_described(site: Path) -> None:
    page = (site / "api.html").read_text()
    for name in set(motionrt.__all__) - {"__version__"}:
        assert f'id="{motionrt._HOME[name]}.{name}"' in page
    assert 'id="motionrt.runtime.memory.memory.MotionMemory.search"' in page  # of the class above it
    assert 'id="motionrt.runtime.errors.Cancelled"' in page


def test_the_house_is_drawn_from_the_table_of_its_test(site: Path) -> None:
    """Every folder, and every line goes down."""
    house = re.search(r'<svg class="house".*?</svg>', (site / "CONTRIBUTING.html").read_text(), re.DOTALL)
    assert house is not None
    assert set(re.findall(r">(\w+)</text>", house[0])) == set(load_by_path(ROOT / "tests/test_house.py").MAY_KNOW)
    lines = re.findall(r'd="M\S+ (\S+) Q\S+ \S+ \S+ (\S+)"', house[0])
    assert len(lines) > 20 and all(float(end) > float(start) for start, end in lines)


def test_a_link_to_nothing_ends_the_build(tmp_path: Path) -> None:
    """What strict promises: a copy of the configuration, with a page that leads nowhere."""
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "index.md").write_text("# A\n\n[b](#c)\n")
    config = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[0]
    config = re.sub(r"^(hooks|watch|extra_css): .*\n", "", config, flags=re.MULTILINE)
    (tmp_path / "mkdocs.yml").write_text(config)
    done = build(tmp_path / "mkdocs.yml", tmp_path / "out")
    assert done.returncode == 1 and "'#c'" in done.stderr, done.stderr


@pytest.mark.browser
@pytest.mark.parametrize("width, scheme", [(1280, "light"), (390, "dark")])
def test_pages_ask_nothing_of_others_and_fit(served: str, width: int, scheme: str) -> None:
    with chromium() as browser:
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)  # type: ignore[arg-type]
        asked: list[str] = []
        errors: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        for name in ("index", "cli", "api", "CONTRIBUTING"):
            page.goto(f"{served}/{name}.html", wait_until="networkidle")
            assert page.evaluate("document.documentElement.scrollWidth") <= width, name
        assert errors == []
        assert [url for url in asked if not url.startswith((served, "data:", "blob:"))] == []


@pytest.mark.browser
def test_search_finds_a_command(served: str) -> None:
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.goto(f"{served}/index.html", wait_until="networkidle")
        words = page.locator("input.md-search__input")
        words.click()  # the search listens for keys from now on
        words.press_sequentially("calibrate")
        page.locator(".md-search-result__link").first.wait_for(timeout=20_000)
        assert "calibrate" in page.locator(".md-search-result__list").inner_text().lower()
