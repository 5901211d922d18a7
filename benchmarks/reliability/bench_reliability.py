"""What becomes of damaged files, hostile arguments, killed commands and an hour of aborted requests? Counted.

    .venv-dev/bin/python benchmarks/reliability/bench_reliability.py                # all of it; about two hours
    .venv-dev/bin/python benchmarks/reliability/bench_reliability.py --share 0.01   # a hundredth of it, for a look
    .venv-dev/bin/python benchmarks/reliability/bench_reliability.py --part damage --only "index.json" --first 17 --tries 1
    .venv-dev/bin/python benchmarks/reliability/bench_reliability.py --table                # docs/reliability.md, from the rows

Allowed is one MotionRTError, or exactly the undamaged answer; the exit status is 1 if anything else came out. All that is
random in a try is drawn from its number, which repeats it. Each part writes its rows when it is done. With --only, --tries or a
--share below 1 nothing is written unless --results says where: the tables are of whole runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from motionrt.benchmarks import harness
from motionrt.benchmarks.reliability import hostile, kills, soak, subjects, tries
from motionrt.benchmarks.report.rows import Report, Row
from motionrt.benchmarks.report.text import not_run, source, table

QUESTION = "bench_reliability"
COMMAND = ".venv-dev/bin/python benchmarks/reliability/bench_reliability.py"
DOCS = harness.ROOT / "docs" / "reliability.md"
MARK = "<!-- below: benchmarks/reliability/bench_reliability.py --table -->"
NUMBERS = 30  # of each public function, of `hostile.CALLS` calls
HOUR = 3600
PARTS = ("damage", "hostile", "kills", "soak")
SHOWN = 20  # of what is not fine, in a row


def _planned(part: str, share: float) -> dict[str, int]:
    """How many numbers of each kind."""
    if part == "damage":
        return subjects.plan(share)
    if part == "hostile":
        return dict.fromkeys(hostile.names(), max(1, round(share * NUMBERS)))
    if part == "kills":
        return {kind: max(1, round(share * count)) for kind, count in kills.KILLS.items()}
    return {"requests": max(1, round(share * HOUR))}


def _measure(part: str, kind: str, count: int, first: int) -> dict[str, Any]:
    """The row of one kind: what came of so many tries, or seconds of requests."""
    row: dict[str, Any] = {"what": part, "kind": kind}
    if part == "soak":
        found = soak.run(count, first)
        return row | {
            "tries": found.outcomes.total(), "outcomes": dict(found.outcomes), "seconds": round(found.seconds, 1),
            "rss_mib": found.rss, "grew_mib": found.grew, "open_files": found.files, "bad": found.bad[:SHOWN],
        }  # fmt: skip
    if part == "kills":
        one = kills.run(kind, count, first)
    else:
        module = "damage" if part == "damage" else "hostile"
        one = tries.run(f"motionrt.benchmarks.reliability.{module}:attempts", {kind: count}, first)[kind]
    bad = [f"{number}: {text}" for number, text in list(one.bad.items())[:SHOWN]]
    return row | {
        "tries": one.tries, "outcomes": dict(one.outcomes), "seconds": round(one.seconds, 1), "first": first, "bad": bad,
        "peak_mib": one.peak or None,
    }  # fmt: skip


def failures(row: Mapping[str, Any]) -> int:
    """How many tries of a row are not fine."""
    return sum(row["outcomes"].get(outcome, 0) for outcome in tries.BAD)


# --- the tables -----------------------------------------------------------------------------------------------------------

# Of each part its heading, and the words for its outcomes.
_SAID: dict[str, tuple[str, dict[str, str]]] = {
    "damage": (
        "Damaged files",
        {"error": "refused", "same": "undamaged answer", "other pixels": "other pixels", "other text": "other text"},
    ),
    "hostile": ("Hostile arguments", {"error": "refused", "answer": "answered"}),
    "kills": ("Killed commands", {"killed": "killed, nothing lost", "done before": "done before it was killed"}),
    "soak": ("Requests with random aborts", {"same": "same frames as alone", "aborted": "aborted", "error": "refused"}),
}


def tables(report: Report) -> str:
    """The newest whole run of each part, as Markdown."""
    lines: list[str] = []
    for part, (title, words) in _SAID.items():
        rows = [row for row in report.rows(QUESTION) if row.get("what") == part]
        rows = [row for row in rows if row.run == rows[-1].run]
        lines += [f"## {title}", "", *(_part(rows, words) if rows else [not_run(f"{COMMAND} --part {part}")]), ""]
    return "\n".join(lines).rstrip()


def _part(rows: Sequence[Row], words: Mapping[str, str]) -> Iterator[str]:
    def count(row: Row, outcome: str) -> int:
        return int(row.get("outcomes").get(outcome, 0))

    minutes = sum(row.get("seconds") for row in rows) / 60
    bad = ", ".join(f"{sum(count(row, outcome) for row in rows)} {outcome}" for outcome in tries.BAD)
    yield f"{sum(row.get('tries') for row in rows):,} tries in {minutes:,.0f} minutes: {bad}."
    yield ""
    columns = [word for word in (*words, *tries.BAD) if any(count(row, word) for row in rows)]
    yield from table(
        ["", "tries", *(words.get(word, word) for word in columns)],
        [[row.get("kind"), f"{row.get('tries'):,}", *(f"{count(row, word):,}" for word in columns)] for row in rows],
    )
    yield ""
    for row in rows:
        if rss := row.get("rss_mib"):
            some = ", ".join(map(str, rss[:: max(1, len(rss) // 10)]))
            files = row.get("open_files")
            grew = f"{row.get('grew_mib')} above the most of the first (allowed: {soak.MAY_GROW})"
            yield f"MiB in memory, from the beginning to the end: {some}; the most of the last fifth is {grew}."
            yield f"Open files: {files[0]} at the beginning, {files[-1]} at the end."
            yield ""
    yield source(rows)


def write_tables(report: Report) -> None:
    """Put the tables behind their mark in docs/reliability.md."""
    before, mark, _ = DOCS.read_text(encoding="utf-8").partition(MARK)
    DOCS.write_text(f"{before}{mark}\n\n{tables(report)}\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS, help="all of them if not given")
    parser.add_argument("--only", nargs="+", help="these kinds of the parts")
    parser.add_argument("--share", type=float, default=1.0, help="of the tries of a whole run")
    parser.add_argument("--tries", type=int, help="of each kind (of the soak: seconds), whatever a whole run has")
    parser.add_argument("--first", type=int, default=0, help="number of the first try")
    parser.add_argument("--results", type=Path, help="folder for rows; if not given, the repository's, and whole runs alone")
    parser.add_argument("--table", action="store_true", help="write the tables of docs/reliability.md from the rows there are")
    options = parser.parse_args(arguments)
    if options.table:
        write_tables(Report(options.results or harness.RESULTS))
        return 0
    whole = options.only is None and options.tries is None and options.share >= 1
    folder = options.results or (harness.RESULTS if whole else None)
    wrong = 0
    for part in options.part:
        rows = []
        for kind, count in _planned(part, options.share).items():
            if options.only is None or kind in options.only:
                row = _measure(part, kind, options.tries or count, options.first)
                said = f"{part} {kind}: {row['tries']} tries, {row['outcomes']}, {row['seconds']} s"
                print(said, *row["bad"], sep="\n  ", flush=True)
                rows.append(row)
        wrong += sum(map(failures, rows))
        if folder is not None:
            for row in rows:
                harness.append_row(QUESTION, row, folder=folder)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
