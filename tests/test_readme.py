"""What README.md and the pages of docs/ tell people to type works: their blocks run, in a folder like the root.

The folder holds links to what the README names, so that `out/` lands in a temporary place. A block is left out only
where a comment above it says so, in the README only if it does nothing but make environments; any other block runs.
Which page is run by which test: tests/docs/test_pages.py.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from serving import serving

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
# In this order, in one folder.
PAGES = (
    "README.md", "docs/jobs-over-http.md", "docs/bring-your-own-videos.md", "docs/openvino.md", "docs/diffusers.md",
    "docs/idea.md", "docs/embed.md", "docs/edge.md", "docs/engines.md", "docs/approximations.md", "docs/serve.md",
    "docs/troubleshoot.md", "docs/upgrade.md",
)  # fmt: skip
LINKED = ("comfyui", "kubernetes", "scale", "triton")  # pages with links, whose blocks run elsewhere or which have none
EXCLUDED = "<!-- not run by tests:"
SETS_UP = re.compile(r"(make [a-z]+|pip install .*|git clone .*|cd .*|\. \.venv/bin/activate)")


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, text, first line number, whether a comment above it leaves it out, and its page."""

    language: str
    text: str
    line: int
    excluded: bool
    page: str = "README.md"

    def __str__(self) -> str:
        return f"{Path(self.page).stem}-{self.language}-line{self.line}"


def blocks(markdown: str, page: str = "README.md") -> list[Block]:
    """Every fenced block of `markdown`, in order."""
    found = []
    lines = markdown.splitlines()
    start = None
    for index, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if start is None:
            start = index
            continue
        above = next((text for text in reversed(lines[:start]) if text.strip()), "")
        text = "\n".join(lines[start + 1 : index])
        found.append(Block(lines[start][3:].strip(), text, start + 1, above.startswith(EXCLUDED), page))
        start = None
    assert start is None, f"{page}: the block at line {start} is not closed"
    return found


ALL = [block for page in PAGES for block in blocks((ROOT / page).read_text(encoding="utf-8"), page)]
RUN = [block for block in ALL if not block.excluded]
SHELL = "\n".join(block.text for block in ALL if block.language == "bash" and not block.excluded)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the root, with `motionrt` and `python` of this interpreter first on PATH."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("demo", "benchmarks", "demo/clips"):  # clips: as in the folder where the demo's memory was made
        (folder / Path(name).name).symlink_to(ROOT / name)
    for name, source in (("my-bundle", "bundle"), ("my-memory", "memory")):  # what pages call yours
        shutil.copytree(ROOT / "demo" / source, folder / name)
    shutil.copy(ROOT / "demo/inputs/red_star.png", folder / "star.png")
    (folder / "out").mkdir()
    (folder / "bin").mkdir()
    # -P: the folder itself stays off sys.path, as it does for an installed command.
    scripts = {"python": '"$@"', "motionrt": '-c "from motionrt.runtime.cli.main import main; main()" "$@"'}
    for name, arguments in scripts.items():
        script = folder / "bin" / name
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -P {arguments}\n')
        script.chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of what `make serve` starts, on a port of its own."""
    with serving(tmp_path_factory.mktemp("server") / "store", ROOT / "demo/bundle", ROOT / "demo/memory") as served:
        yield served.url


def run(command: list[str], place: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{place / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"
    every = {**os.environ, "PATH": path, "COLUMNS": "120", **environment}
    return subprocess.run(command, cwd=place, env=every, capture_output=True, text=True, timeout=240)


LONG = ("motionrt bench", "demo/motion_i2v", "preview calibrate")
LONG_PAGES = ("docs/approximations.md", "docs/edge.md", "docs/embed.md", "docs/engines.md", "docs/upgrade.md")


def slow(block: Block) -> bool:
    return block.page in LONG_PAGES or any(part in block.text for part in LONG)


@pytest.mark.parametrize("block", [pytest.param(b, marks=pytest.mark.slow if slow(b) else ()) for b in RUN], ids=str)
def test_readme_block_runs(block: Block, place: Path, request: pytest.FixtureRequest) -> None:
    """In order of the pages: a later block may use what an earlier one wrote. What asks the server has one, elsewhere."""
    text, environment = block.text, {}
    if re.search(r"localhost:8420|motionrt client|serve\.client", text):
        environment["MOTIONRT_SERVER"] = request.getfixturevalue("server")
        text = text.replace("localhost:8420", environment["MOTIONRT_SERVER"])
    if block.language == "bash":
        # As typed, one after the other; the first failure stops, with the command shown.
        done = run(["bash", "-euxo", "pipefail", "-c", text], place, **environment)
    else:
        script = place / f"line{block.line}.py"
        script.write_text(block.text)
        done = run([sys.executable, "-P", str(script)], place, **environment)
    assert done.returncode == 0, f"{block.page} line {block.line}:\n{done.stdout}\n{done.stderr}"
    for output in re.findall(r"\bout/[\w./-]+\.(?:mp4|gif|webp|png)\b", block.text):
        assert (place / output).stat().st_size > 0, f"{block.page} line {block.line} should have written {output}"


@pytest.mark.parametrize("block", ALL, ids=str)
def test_readme_block_is_of_a_kind_that_runs(block: Block) -> None:
    assert block.language in {"bash", "python"}, f"{block.page} line {block.line}: mark the block as bash or python"


@pytest.mark.parametrize("block", [block for block in ALL if block.excluded and block.page == "README.md"], ids=str)
def test_readme_block_left_out_only_sets_up(block: Block) -> None:
    lines = [line for line in block.text.splitlines() if line.strip() and not line.startswith("#")]
    assert block.language == "bash"
    assert [line for line in lines if not SETS_UP.fullmatch(line)] == []


def test_readme_has_what_it_promises() -> None:
    assert any(block.language == "python" for block in RUN)
    assert {"generate", "inspect", "bench", "memory", "client"} <= set(re.findall(r"\bmotionrt ([a-z]+)", SHELL))
    memory = {"create", "add", "search", "remove", "verify", "compact", "export", "import", "stats"}
    assert memory == set(re.findall(r"\bmotionrt memory ([a-z]+)", SHELL))


def test_readme_targets_exist_in_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    wanted = set(re.findall(r"^make ([a-z-]+)", README.read_text(encoding="utf-8"), re.MULTILINE))
    wanted |= set(re.findall(r"`make ([a-z-]+)`", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")))
    assert wanted and {name for name in wanted if not re.search(rf"^{name}:", makefile, re.MULTILINE)} == set()


@pytest.mark.parametrize("page", [*PAGES, *(f"docs/{name}.md" for name in LINKED), "CONTRIBUTING.md", "CHANGELOG.md"])
def test_page_links_lead_somewhere(page: str) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / page).read_text(encoding="utf-8"))
    assert [link for link in links if not ((ROOT / page).parent / link).is_file()] == []


def test_blocks_reads_markers_languages_and_lines() -> None:
    text = "a\n```bash\nx\n```\n<!-- not run by tests: why -->\n\n```bash\nmake it\n```\n```python\ny\nz\n```\n"
    got = [(block.language, block.text, block.line, block.excluded) for block in blocks(text)]
    assert got == [("bash", "x", 2, False), ("bash", "make it", 7, True), ("python", "y\nz", 10, False)]
