"""What the site has beside docs/*.md: pages of the repository's root, files that pages link to, references made from the code.

The site has one folder. So a link of a page to `../NAME`, and one of README.md to `docs/NAME`, leads to `NAME` there.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import typer
from house import picture
from mkdocs.structure.files import File, Files
from typer.cli import get_docs_for_click

import motionrt
from motionrt.runtime.cli.main import app, register

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
HOUSE = re.compile(r"\n## The house\n.*?\n```.*?\n```\n", re.DOTALL)
SHORTENED = re.compile(r"^\*\*Commands\*\*:\n\n(?:\* [^\n]*\n)+\n", re.MULTILINE)
EXAMPLES = re.compile(r"^(\w[^\n]*:)\n((?:  \S[^\n]*\n)+)", re.MULTILINE)
IMPORT = re.compile(r"^from (motionrt[\w.]*) import (.+?)(?:  #.*)?$", re.MULTILINE)

NAMES = """# Python names

What `motionrt` exports, what else these pages import, and the errors.

## From `motionrt`

{ours}

## From its modules

{others}

## Errors

::: motionrt.runtime.errors
    options:
      filters: ["^[A-Z]"]
      show_root_heading: false
      show_root_toc_entry: false
"""


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and files that do not lie in docs/."""
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in PAGES}
    every = [*texts.values(), *(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")))]
    texts |= {"cli.md": commands(), "api.md": names("\n".join(every))}
    for name, text in texts.items():
        files.append(File.generated(config, name, content=text))
    for name in sorted({name for text in every for name in re.findall(r"\]\(\.\./([^)#]+)", text)} - {*PAGES}):
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as they are in the one folder of the site."""
    if page.file.src_uri == "CONTRIBUTING.md":  # below the list of the house, whose lines stay in the page
        markdown = HOUSE.sub(lambda found: f"{found[0]}\n{picture()}\n", markdown)
    return re.sub(r"\]\(docs/" if page.file.src_uri in PAGES else r"\]\(\.\./", "](", markdown)


def commands() -> str:
    """Every command with its options, as Typer tells them, without its lists of shortened sentences; examples as blocks."""
    register()
    command = typer.main.get_command(app)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command), name="motionrt", title="Commands")
    text = SHORTENED.sub("", text).replace("\b\n", "")  # click's mark of lines that are not to be wrapped
    return EXAMPLES.sub(lambda found: f"{found[1]}\n\n```console\n{re.sub('(?m)^  ', '$ ', found[2])}```\n", text)


def names(pages: str) -> str:
    """What `motionrt` exports, and what else the pages import from it, from the docstrings."""
    public = {name: f"{module}.{name}" for name, module in motionrt._HOME.items()}
    for module, found in IMPORT.findall(pages):
        public |= {name: f"{module}.{name}" for name in found.split(", ") if module != "motionrt"}
    listed = {name: f"::: {path}" for name, path in public.items()}
    ours = [listed.pop(name) for name in motionrt._HOME]
    return NAMES.format(ours="\n\n".join(ours), others="\n\n".join(listed.values()))
