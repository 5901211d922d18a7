"""Every command of a page is run by a test, or a comment above it says why not; and what pages say of the code is so.

The one table of it is `RUN_BY`: which test runs the blocks of a page. Blocks of a page that is not in it are all marked.
"""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from by_path import load_by_path

from motionrt.runtime.backends import sidecar
from motionrt.runtime.bundle import manifest
from motionrt.runtime.memory import index, state

ROOT = Path(__file__).resolve().parents[2]
readme = load_by_path(ROOT / "tests/test_readme.py")
PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
RUN_BY = {
    **dict.fromkeys(readme.PAGES, "tests/test_readme.py"), "docs/models.md": "tests/test_models_page.py",
    "docs/comfyui.md": "tests/integrations/comfyui/conftest.py",
    "docs/triton.md": "tests/runtime/deploy/test_tritonserver.py",
}  # fmt: skip
# Pages with commands that are no fenced blocks: the test that runs them, or why none does.
INDENTED = {
    "README.md": "benchmarks that keep rows; tests/benchmarks runs them small",
    "docs/kubernetes.md": "take Docker and a cluster; tests/test_deploy.py holds the files to what the server takes",
    "docs/ray.md": "servers that do not end; tests/runtime/serve/test_ray.py starts them",
    "docs/scale.md": "takes two GPUs; tests/benchmarks/guided runs it small",
    "docs/triton.md": "tests/runtime/deploy/test_tritonserver.py starts the server",
}
REASON = re.compile(r"<!-- not run by tests: \S.{10,} -->")
COMMAND = re.compile(r" {4}(\w+=\S+ )*(motionrt|make|pip|python3?|docker|curl|sudo|\S*\.venv\S*|\S+\.py|\S+\.sh)( |$)")


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def above(markdown: str, line: int) -> str:
    """The last line with something on it before `line`, counted from 1."""
    return next((text for text in reversed(markdown.splitlines()[: line - 1]) if text.strip()), "")


def not_accounted_for(markdown: str, page: str, run_by: dict[str, str], indented: dict[str, str]) -> list[str]:
    """Blocks of commands that no test runs and no comment explains, and comments without a reason."""
    wrong = []
    for block in readme.blocks(markdown, page):
        if block.excluded and not REASON.fullmatch(above(markdown, block.line)):
            wrong.append(f"{page} line {block.line}: say why no test runs it: <!-- not run by tests: REASON -->")
        if block.language in ("bash", "sh", "python", "console") and not block.excluded and page not in run_by:
            wrong.append(f"{page} line {block.line}: name the page in RUN_BY, or say why no test runs it")
    fenced = re.sub(r"^```.*?^```", lambda found: "\n" * found[0].count("\n"), markdown, flags=re.MULTILINE | re.DOTALL)
    for number, line in enumerate(fenced.splitlines(), 1):
        if COMMAND.match(line) and page not in indented:
            wrong.append(f"{page} line {number}: make it a fenced block, so that a test or a comment goes with it")
    return wrong


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_run_or_says_why_not(page: str) -> None:
    assert not_accounted_for(text_of(page), page, RUN_BY, INDENTED) == []


def test_the_tests_of_the_table_run_those_pages() -> None:
    for page, test in RUN_BY.items():
        assert f'"{page}"' in text_of(test), f"{test} does not name {page}"
    assert {*RUN_BY, *INDENTED} <= {*PAGES}


@pytest.mark.parametrize(
    "markdown",
    [
        "```bash\nmotionrt x\n```\n",
        "```python\nprint()\n```\n",
        "<!-- not run by tests: -->\n```bash\nmotionrt x\n```\n",
        "<!-- not run: needs a GPU -->\n```bash\nmotionrt x\n```\n",
        "Type\n\n    motionrt x\n",
        "Type\n\n    PYTHONPATH=src .venv-dev/bin/python x.py\n",
    ],
)
def test_a_command_that_nobody_runs_is_found(markdown: str) -> None:
    assert len(not_accounted_for(markdown, "docs/x.md", {}, {})) == 1


def test_a_marked_command_and_what_is_none_pass() -> None:
    marked = "<!-- not run by tests: needs a GPU with 80 GB -->\n```bash\nmotionrt x\n```\n\n    a picture ──▶ b\n"
    assert not_accounted_for(marked, "docs/x.md", {}, {}) == []


def test_every_page_is_in_the_navigation_of_the_site() -> None:
    nav = text_of("mkdocs.yml").partition("\nnav:\n")[2]
    named = re.findall(r"^ +- [^#\n]+: (\S+\.md)$", nav, re.MULTILINE)
    assert len(named) == len({*named})
    there = {path.removeprefix("docs/") for path in PAGES} | {"CHANGELOG.md"}
    assert {*named} - {"cli.md", "api.md"} == there  # those two are made from the code


# --- what pages say of the code ---------------------------------------------------------------------------------------


def test_idea_has_the_counts_of_the_compiler() -> None:
    counts = json.loads(text_of("benchmarks/baseline.json"))["parts"]["demo step"]["counts"]
    table = text_of("docs/idea.md").partition("<!-- counts")[2].partition("<!-- end of counts")[0]
    told = [float(number) for number in re.findall(r"\| ([\d.]+) \|", table)]
    assert told == [round(counts[f"{part}/flops"] / 1e6, 3) for part in ("schedule", "request", "step")]


def test_upgrade_has_the_numbers_of_the_formats() -> None:
    told = re.findall(r"^\| .*? \| (?:format|schema) (\d+)\b", text_of("docs/upgrade.md"), re.MULTILINE)
    assert [int(number) for number in told] == [manifest.FORMAT, state.SCHEMA, sidecar.FORMAT, index._FORMAT]


def quoted(page: str) -> list[str]:
    """The indented lines of a page: messages, with `…` for what differs."""
    return re.findall(r"^ {4}(\S.*)$", text_of(page), re.MULTILINE)


def broken(folder: Path, bundle: Path, memory: Path) -> dict[str, Path]:
    """Things that newcomers have: of another version, cut short, empty, no picture."""
    for name in ("newer", "cut"):
        shutil.copytree(bundle, folder / name)
    file = folder / "newer/bundle.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": manifest.FORMAT + 1}))
    graph = next((folder / "cut").rglob("*.onnx"))
    graph.write_bytes(graph.read_bytes()[:-9])
    shutil.copytree(memory, folder / "older")
    with sqlite3.connect(folder / "older/memory.sqlite") as db:
        (version,) = db.execute("PRAGMA user_version").fetchone()
        db.execute(f"PRAGMA user_version={version - 1}")  # the schema is its last byte
    db.close()
    (folder / "no.png").write_text("no picture")
    return {name: folder / name for name in ("newer", "cut", "older", "no.png", "nowhere", "empty", "x.mp4")}


@pytest.fixture
def told(
    run: Callable[..., tuple[int, str, str]], guided_memory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[list[Any]], str]:
    """What the command says that refuses: one line."""
    monkeypatch.setenv("MOTIONRT_SERVER", "http://127.0.0.1:9")

    def refusal(arguments: list[Any]) -> str:
        status, _, err = run(*arguments)
        assert status == 2, err
        return err.strip().removeprefix("motionrt: ")

    return refusal


def test_troubleshoot_quotes_what_the_code_says(
    told: Callable[[list[Any]], str], guided_memory: Path, run: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    """Each message of the page is met by a command, and each command by one message of the page."""
    bundle, memory = ROOT / "demo/bundle", ROOT / "demo/memory"
    made = broken(tmp_path, bundle, memory)
    run("memory", "create", made["empty"], "-b", bundle)
    still, out = ("-i", ROOT / "demo/inputs/red_star.png"), ("-o", made["x.mp4"])
    ask = ["generate", "-b", bundle, "-p", "a star", *still]
    commands = [
        ["inspect", made["nowhere"]],
        ["inspect", made["newer"]],
        ["verify", made["cut"]],
        [*ask, *out, "-m", made["nowhere"]],
        [*ask, *out, "-m", guided_memory],
        ["memory", "stats", made["older"]],
        [*ask, *out, "-m", made["empty"]],
        [*ask, *out],
        ["generate", "-b", bundle, "-p", "a star", *out],
        ["generate", "-b", bundle, "-p", "a star", "-m", memory, "-i", made["no.png"], *out],
        [*ask, "-m", memory, "-o", tmp_path / "x.avi"],
        [*ask, *out, "-m", memory, "--steps", 5000],
        [*ask, *out, "-m", memory, "-k", 50],
        [*ask, *out, "-m", memory, "--device", "cuda"],
        [*ask, *out, "-m", memory, "--backend", "tensorrt"],
        [*ask, *out, "-m", memory, "--precision", "int8"],
        ["build", bundle, "--target", "sm_10"],
        ["client", "list"],
        ["serve", "--bundle", bundle, "--store", tmp_path / "store", "--host", "0.0.0.0"],
    ]
    messages = quoted("docs/troubleshoot.md")
    assert len(messages) == len(commands)
    for message, command in zip(messages, commands, strict=True):
        pattern = ".*".join(re.escape(part) for part in message.split("…"))
        assert re.match(pattern, told(command)), f"docs/troubleshoot.md: {message}"
