"""Ask the advisory database about the locked versions, and say plainly how many of them it could be asked about.

    python requirements/audit.py requirements/runtime.txt

Exit status 1 where a version has a known vulnerability. A database that cannot be reached is said, and is no failure: pip-audit
alone calls that "no known vulnerabilities found".
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any


def verdict(found: dict[str, Any], file: str) -> tuple[int, list[str]]:
    """The exit status, and what to say: of the report that pip-audit made of `file`, in its JSON."""
    packages = found["dependencies"]
    asked = [package for package in packages if "skip_reason" not in package]
    lines = [f"{file}: {len(asked)} of {len(packages)} packages were looked up in the advisory database."]
    if len(asked) < len(packages):
        lines.append(f"{file}: NOT AUDITED: {len(packages) - len(asked)} packages, which the database here does not know.")
    bad = [
        f"{package['name']} {package['version']}: {one['id']}, fixed in {', '.join(one['fix_versions']) or 'no version yet'}"
        for package in asked for one in package["vulns"]
    ]  # fmt: skip
    return int(bool(bad)), lines + bad


def audit(file: str) -> tuple[int, list[str]]:
    """`verdict` of a file of locked versions, or why there is none."""
    command = [sys.executable, "-m", "pip_audit", "--format", "json", "--no-deps", "--disable-pip", "--progress-spinner", "off"]
    done = subprocess.run([*command, "--requirement", file], capture_output=True, text=True)
    try:
        return verdict(json.loads(done.stdout), file)
    except ValueError:
        why = (done.stderr.strip().splitlines() or ["pip-audit said nothing"])[-1]
        return 0, [f"{file}: NOT AUDITED: {why[:300]}"]


def main(files: list[str]) -> int:
    """Audit each file; 1 if one has a known vulnerability."""
    if not files:
        raise SystemExit("usage: python requirements/audit.py requirements/runtime.txt ...")
    status = 0
    for file in files:
        code, lines = audit(file)
        status |= code
        print("\n".join(lines))
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
