"""Words, tables and numbers of docs/performance.md, for benchmarks/report/report.py."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

INTRODUCTION = """# Performance

Written by `make report` from the rows in `benchmarks/results`; do not edit it. Under each table and figure stand its rows:
file and lines, commit, date, machine, and the command that makes them again.

- Where several runs answered a question, the newest counts and the older ones stay in the file. A run counts only if all of its
  rows name a clean commit; what has no such run says so.
- Each table and figure is of one run: times of different runs are never set beside each other.
- Ratios are of candidates that took turns, with the 95 % interval of a bootstrap over rounds where there were at least 10. A
  p99 is given where there are at least 100 times.
- Nothing was timed before it was shown to compute the same: `difference` is how far a candidate is from the reference that its
  row names, and what was allowed.
- Parts that nobody ran say so.
- A command is that of its row's commit; since then the scripts moved into folders of `benchmarks`: questions, models and gpu.
"""
# What every row says about its machine, and so no line of a table.
COMMON = frozenset(
    "date commit system processor cores load gpu versions question run command what model axis backend note".split()
)


class Row(Protocol):
    """What is needed of a row here."""

    @property
    def file(self) -> str: ...
    @property
    def line(self) -> int: ...
    def get(self, key: str, default: Any = None) -> Any: ...


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table; all but the first column to the right."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (head, rule, *body)]


def number(value: Any) -> str:
    """A number with three places that matter; "-" for none."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return "-" if value is None else str(value)
    if isinstance(value, int) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.3g}"


def ratio(value: Any) -> str:
    """`[value, low, high]` or a plain value."""
    if isinstance(value, (list, tuple)) and len(value) == 3:
        places = 3 if max(value) < 2 else 2 if max(value) < 100 else 0
        return f"{value[0]:.{places}f} [{value[1]:.{places}f}, {value[2]:.{places}f}]"
    return f"{value:.3f}" if isinstance(value, (int, float)) else "-"


def error(value: Any) -> str:
    """How far a row's result is from its reference, in whatever measure it has."""
    if isinstance(value, (int, float)):
        return f"{value:.1e}"
    if not isinstance(value, Mapping):
        return "-"
    found = [f"{key.replace('_', ' ')} {value[key]:.1e}" for key in value if isinstance(value[key], float) and key != "allowed"]
    allowed = value.get("allowed")
    return ", ".join(found) + (f" (of {allowed:g})" if found and isinstance(allowed, (int, float)) else "") or "-"


def facts(data: Mapping[str, Any], skip: Iterable[str] = ()) -> str:
    """What else a row says: `key value`, numbers rounded."""
    skipped = set(skip)
    return ", ".join(f"{key} {_plain(value)}" for key, value in data.items() if key not in skipped and value is not None)


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_plain, value)) + "]"
    if isinstance(value, Mapping):
        return facts(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def source(rows: Sequence[Row]) -> str:
    """Where a table's or figure's rows are: file and lines, commit, date, machine, and their commands."""
    made: dict[tuple[str, ...], list[int]] = {}
    for row in rows:
        machine = f"{row.get('device') if row.get('device') not in (None, 'cpu') else row.get('processor')}"
        date, command = str(row.get("date", "?"))[:10], str(row.get("command") or "")
        made.setdefault((row.file, str(row.get("commit")), date, machine, command), []).append(row.line)
    said = []
    for (file, commit, date, machine, command), numbers in made.items():
        again = f"`{command}`" if command else "a command that rows did not keep yet"
        said.append(f"[{file}](../benchmarks/results/{file}) {_lines(numbers)}, {commit}, {date}, {machine}: {again}")
    return "Rows: " + "; ".join(said) + "."


def _lines(numbers: Iterable[int]) -> str:
    """Line numbers with runs drawn together: lines 3-7, 9."""
    spans: list[list[int]] = []
    for number in sorted(set(numbers)):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    shown = ", ".join(str(begin) if begin == end else f"{begin}-{end}" for begin, end in spans)
    return f"line {shown}" if len(spans) == 1 and spans[0][0] == spans[0][1] else f"lines {shown}"


def not_run(command: str) -> str:
    """What stands where rows are missing."""
    return f"Not run: `{command}` would answer it."


def unclean(command: str, names: Iterable[str]) -> str:
    """What stands where there are rows, but none from a clean commit: a line of a list."""
    what = "; ".join(filter(None, names)) or "all of it"
    return f"- Not run at a clean commit: {what}. {f'`{command}`' if command else 'A command that rows did not keep yet'}."


def slug(name: str) -> str:
    """A file name of a model's name."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") or "all"
