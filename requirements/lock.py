"""Write one of requirements/*.txt: what pip resolves for this project, pinned.

    python requirements/lock.py runtime '.[cpu,serve]'
    python requirements/lock.py dev '.[cpu,export,flow,openvino,otel,rtx,serve,dev]' torch==2.13.0
    python requirements/lock.py kubernetes kubernetes-validate six urllib3        # see the Makefile for all

Nothing is installed: pip's dry run reports its choice. The others list only what `runtime` does not, and keep
its versions.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
PURPOSE = {
    "runtime": "# The run side: no PyTorch.\n",
    "dev": "# The build side, the tests and the checks, on top of the run side.\n-r runtime.txt\n",
    "ray": "# Replicas in Ray Serve, on top of the run side: no PyTorch.\n-r runtime.txt\n",
    "docs": "# The site and what a release is checked with, on top of the run side.\n-r runtime.txt\n",
    "triton": "# The run side in Triton Inference Server, and a client of it. Not with dev.txt: they differ in protobuf.\n",
    "kubernetes": "# What manifests are checked with: the schemas of Kubernetes, and what the classes of kserve.txt import.\n",
}


def pins(report: str) -> dict[str, str]:
    """Return {normalised name: version} of a pip installation report, without this project and local version labels."""
    found = {}
    for item in json.loads(report)["install"]:
        name = re.sub(r"[-_.]+", "-", item["metadata"]["name"]).lower()
        if name != "motionrt":
            found[name] = item["metadata"]["version"].split("+")[0]
    return dict(sorted(found.items()))


def resolve(requirements: list[str]) -> dict[str, str]:
    """Ask pip what it would install for `requirements`, run from the repository root."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
        subprocess.run([*command, "--report", str(report), *requirements], cwd=HERE.parent, check=True)
        return pins(report.read_text())


def main(arguments: list[str]) -> None:
    """Resolve and write one file beside its place, then rename it into place."""
    if len(arguments) < 2 or arguments[0] not in PURPOSE:
        raise SystemExit(f"usage: python requirements/lock.py {'|'.join(PURPOSE)} REQUIREMENT...")
    name, requirements = arguments[0], arguments[1:]
    base: dict[str, str] = {}
    if name != "runtime":
        lines = (HERE / "runtime.txt").read_text().splitlines()
        base = dict(line.split("==", 1) for line in lines if "==" in line)
        requirements += [f"{package}=={version}" for package, version in base.items()]
    chosen = {package: version for package, version in resolve(requirements).items() if package not in base}
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    text = f"# Locked by `make lock` with Python {python} on {sys.platform}.\n" + PURPOSE[name]
    text += "".join(f"{package}=={version}\n" for package, version in chosen.items())
    partial = HERE / f"{name}.txt.partial"
    partial.write_text(text)
    os.replace(partial, HERE / f"{name}.txt")
    print(f"requirements/{name}.txt: {len(chosen)} packages")


if __name__ == "__main__":
    main(sys.argv[1:])
