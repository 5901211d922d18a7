"""Timing that can be trusted on a noisy machine: candidates must agree first, then take turns, and every row is kept.

    result = compare({"rewritten": a, "plain": b}, reference="plain", tolerance=1e-4)
    ratio = result.ratio("plain", "rewritten")          # > 1: rewritten is the faster one
    append_row("bench_step", {**result.row("rewritten"), "what": "step"})

A candidate is a callable without arguments that returns named arrays, on the host and finished: a device backend
synchronises inside its callable. Seconds throughout, by `time.perf_counter`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from time import perf_counter
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = (
    "numpy", "usearch", "lancedb", "onnxruntime", "onnxruntime-gpu", "openvino", "torch", "triton", "tensorrt", "tensorrt-rtx",
    "diffusers",
)  # fmt: skip

INTERVAL_FROM = 10  # rounds below which a bootstrap says nothing: a ratio is then a number and no interval
P99_FROM = 100  # times below which the 99th percentile is the largest of them, by another name
STARTED = datetime.now(UTC).isoformat(timespec="milliseconds")  # what the rows of one run have in common

Candidate = Callable[[], Mapping[str, NDArray[Any]]]
Seconds = NDArray[np.float64]


class ParityError(Exception):
    """Candidates do not compute the same thing, so their times say nothing; nothing was timed."""


def demo_module(name: str) -> ModuleType:
    """A script of demo/ as a module, such as "export": they import each other by name."""
    return _module(name, "demo")


def helper_module(name: str) -> ModuleType:
    """A file of tests/helpers as a module, such as "fake_memory"."""
    return _module(name, "tests/helpers")


def _module(name: str, folder: str) -> ModuleType:
    if (place := str(ROOT / folder)) not in sys.path:
        sys.path.append(place)
    return importlib.import_module(name)


@dataclass(frozen=True)
class Ratio:
    """How many times faster: the ratio of medians and, from INTERVAL_FROM rounds on, the 95 % interval of a paired bootstrap
    over rounds."""

    value: float
    interval: tuple[float, float] | None

    def __str__(self) -> str:
        return said(self.numbers(), "{:.2f}", "x")

    def numbers(self) -> list[float]:
        """[value, low, high], or [value]."""
        return [self.value, *(self.interval or ())]

    def as_row(self) -> list[float] | float:
        """[value, low, high] for a row, or the value alone where there is no interval."""
        return self.numbers() if self.interval else self.value


def said(ratio: Sequence[float] | float, form: str, unit: str = "") -> str:
    """A ratio of a row in words, its numbers by the format `form`: `1.07x [0.98, 1.12]`, or `1.07x` without an interval."""
    value, *interval = (form.format(one) for one in (ratio if isinstance(ratio, Sequence) else [ratio]))
    return value + unit + (f" [{', '.join(interval)}]" if interval else "")


@dataclass(frozen=True)
class Comparison:
    """Times of candidates that agree. `seconds[name]` float64 [rounds], round i of all taken next to each other."""

    reference: str
    tolerance: float
    warmups: int
    errors: Mapping[str, float]
    seconds: Mapping[str, NDArray[np.float64]]
    rounded: Mapping[str, float] = field(default_factory=dict)  # the tolerances of candidates that have their own

    def ratio(self, slow: str, fast: str, resamples: int = 2000, seed: int = 0) -> Ratio:
        """Median seconds of `slow` over median seconds of `fast`; rounds are resampled in pairs."""
        above, below = self.seconds[slow], self.seconds[fast]
        picks = np.random.default_rng(seed).integers(len(above), size=(resamples, len(above)))
        draws = np.median(above[picks], axis=1) / np.median(below[picks], axis=1)
        low, high = (float(end) for end in np.quantile(draws, [0.025, 0.975]))
        return Ratio(float(np.median(above) / np.median(below)), (low, high) if len(above) >= INTERVAL_FROM else None)

    def row(self, name: str) -> dict[str, Any]:
        """The part of a benchmark row that this comparison knows."""
        allowed = self.rounded.get(name, self.tolerance)
        return {
            "backend": name,
            **summary(self.seconds[name]),
            "warmups": self.warmups,
            "error": {"max_abs_difference": self.errors[name], "to": self.reference, "allowed": allowed},
        }


def summary(seconds: NDArray[np.float64]) -> dict[str, float | int]:
    """n, p50, p95 and, of P99_FROM times or more, p99 in milliseconds of `seconds` [n]; by linear interpolation."""
    if len(seconds) == 0:
        raise ValueError("summary of no times; measure at least one round")
    wanted = (50, 95, 99) if len(seconds) >= P99_FROM else (50, 95)
    found = np.percentile(seconds, wanted)
    return {"n": len(seconds), **{f"p{q}_ms": float(value) * 1e3 for q, value in zip(wanted, found, strict=True)}}


def clock(call: Callable[[], object], *, rounds: int, warmups: int, wait: Callable[[], object] | None = None) -> Seconds:
    """Seconds of each of `rounds` calls [rounds], after `warmups` that do not count; on both sides of a call `wait` is called,
    which returns when a device has done what it was given. None: `call` itself returns when it is done."""
    for _ in range(warmups):
        call()
    seconds = np.empty(rounds, np.float64)
    for index in range(rounds):
        if wait is not None:
            wait()
        start = perf_counter()
        call()
        if wait is not None:
            wait()
        seconds[index] = perf_counter() - start
    return seconds


def times(row: Mapping[str, Any]) -> str:
    """The times of a row in words: p50, p95, p99 where there is one, and of how many."""
    found = [f"p{q} {row[f'p{q}_ms']:,.2f} ms" for q in (50, 95, 99) if row.get(f"p{q}_ms") is not None]
    return ", ".join([*found, f"n {row['n']}"])


def too_few(row: Mapping[str, Any]) -> list[str]:
    """The figures of a row that its `n` does not allow: p99, and ratios `over_*` or `of_*` that have an interval."""
    n, found = row.get("n"), []
    for key, value in row.items():
        least = P99_FROM if key == "p99_ms" else INTERVAL_FROM if key.startswith(("over_", "of_")) and _three(value) else 0
        if isinstance(n, int) and value is not None and n < least:
            found.append(key)
    return found


def _three(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 3


def difference(got: Mapping[str, NDArray[Any]], want: Mapping[str, NDArray[Any]]) -> float:
    """Largest absolute difference over all named outputs; ParityError when names, shapes or finiteness differ."""
    if sorted(got) != sorted(want):
        raise ParityError(f"outputs {sorted(got)} are not the reference's {sorted(want)}")
    worst = 0.0
    for name in want:
        if got[name].shape != want[name].shape:
            raise ParityError(f"output `{name}` is {got[name].shape}; the reference's is {want[name].shape}")
        # An inf or NaN on either side makes the difference inf or NaN, and so fails below.
        gap = np.abs(got[name].astype(np.float64) - want[name].astype(np.float64)).max(initial=0.0)
        if not np.isfinite(gap):
            raise ParityError(f"output `{name}` is not finite")
        worst = max(worst, float(gap))
    return worst


def allowance(part: float, outputs: Mapping[str, NDArray[Any]]) -> float:
    """`part` of the largest magnitude in `outputs`, or of 1 where they are all smaller: an absolute tolerance for them."""
    return part * max([1.0, *(float(np.abs(value).max()) for value in outputs.values())])


def errors_to_fp64(
    problem: Any, forms: Mapping[str, Callable[[Any], Any]], truths: Sequence[tuple[slice, Any]], factor: float
) -> dict[str, float]:
    """Largest error of each of `forms`, torch functions of `problem.hidden`, on the rows of `truths` (slice of the second
    dimension, fp64 values there).

    Raises ParityError where one is above `factor` times the error of `problem.released` in the same dtype, + 1e-6.
    """

    def error(form: Callable[[Any], Any]) -> float:
        got = form(problem.hidden.clone())
        return max(float((got[:, rows].double() - want).abs().max()) for rows, want in truths)

    allowed = factor * error(problem.released) + 1e-6
    errors = {name: error(form) for name, form in forms.items()}
    for name, found in errors.items():
        if not found <= allowed:
            raise ParityError(f"{name} differs from fp64 by {found:.3g} at {problem.shape}; allowed is {allowed:.3g}")
    return errors


def compare(
    candidates: Mapping[str, Candidate], *, reference: str, tolerance: float, warmups: int = 3, rounds: int = 30,
    rounded: Mapping[str, float] | None = None,
) -> Comparison:  # fmt: skip
    """Check every candidate against `reference`, then time all in turns, in a new random order each round.

    Raises ParityError before anything is timed when one differs from the reference by more than `tolerance` (absolute),
    and ValueError for arguments that cannot give a result. rounded: candidates that compute in less than the reference, each
    with its own tolerance, which its row then says.
    """
    rounded = dict(rounded or {})
    if reference not in candidates:
        raise ValueError(f"reference {reference!r} is not among the candidates {sorted(candidates)}")
    if rounds < 1 or warmups < 0:
        raise ValueError(f"rounds={rounds}, warmups={warmups}; at least 1 round and 0 warm-ups are needed")
    # Copies, because a candidate may reuse its output buffers.
    outputs = {name: {key: np.array(x) for key, x in call().items()} for name, call in candidates.items()}
    errors: dict[str, float] = {}
    for name, output in outputs.items():
        try:
            errors[name] = difference(output, outputs[reference])
        except ParityError as error:
            raise ParityError(f"{name} against {reference}: {error}") from None
        if errors[name] > (allowed := rounded.get(name, tolerance)):
            raise ParityError(f"{name} differs from {reference} by {errors[name]:.3g}; allowed is {allowed:.3g}")
    for _ in range(warmups):
        for call in candidates.values():
            call()
    names = list(candidates)
    order = np.random.default_rng(0)
    seconds = {name: np.empty(rounds, np.float64) for name in names}
    for index in range(rounds):
        for position in order.permutation(len(names)):
            call = candidates[names[position]]
            start = perf_counter()
            call()
            seconds[names[position]][index] = perf_counter() - start
    return Comparison(reference, tolerance, warmups, errors, seconds, rounded)


def add_options(parser: argparse.ArgumentParser, *, rounds: int, warmups: int, threads: int | None = None) -> None:
    """The options that measurements share, with these defaults: --results, --rounds and --warmups, and, of those that are
    made with a number of `threads`, --threads and --note."""
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for rows")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--warmups", type=int, default=warmups)
    if threads is not None:
        parser.add_argument("--threads", type=int, default=threads)
        parser.add_argument("--note", default="")


def _output(*command: str) -> str | None:
    """First lines of a command's output in the repository, or None where it cannot run."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def machine() -> dict[str, Any]:
    """What a row needs to be understood: date, commit, processor, GPU, versions, load; no host name, no path."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    commit = _output("git", "rev-parse", "--short=12", "HEAD")
    # rows that the last benchmark appended change nothing that the next one runs
    changed = _output("git", "status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude,top)benchmarks/results")
    query = "--query-gpu=name,driver_version,clocks.sm,clocks.mem"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit and commit + ("+changes" if changed else ""),
        "system": platform.system(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "gpu": _output("nvidia-smi", query, "--format=csv,noheader"),
        "versions": versions,
    }


def command(argv: Sequence[str] | None = None, *, root: Path = ROOT) -> str:
    """The shell command that makes a row again, run in the repository's root; by default of this very process.

    Paths inside `root` are written relative to it, whatever the working folder was; any other is written as FOLDER, because
    a row names nothing of the machine but its hardware and versions. What runs the script is `.venv-dev`, as `make` makes it.
    """
    script, *arguments = sys.argv if argv is None else argv

    def inside(path: str) -> str | None:
        """`path` relative to the root, or None where it lies outside; links are followed only if they must be."""
        for absolute in (Path(os.path.abspath(path)), Path(path).resolve()):
            if absolute.is_relative_to(root):
                return absolute.relative_to(root).as_posix()
        return None

    def hidden(argument: str) -> str:
        """`argument` without any place outside the root; the value of `--name=value` is taken by itself."""
        option, equals, value = argument.partition("=") if argument.startswith("-") else ("", "", argument)
        if value.startswith(("/", "~/", "../")) or os.path.exists(value):
            return option + equals + (inside(os.path.expanduser(value)) or "FOLDER")
        return option + equals + re.sub(r"(?<![\w.)~])~?(?:/[\w.@+-]+)+/?", lambda found: inside(found[0]) or "FOLDER", value)

    if script == "-c":
        start = [".venv-dev/bin/python", "-c"]
    elif Path(script).parent == Path(sys.executable).parent:  # an installed command, such as `motionrt`
        start = [f".venv-dev/bin/{Path(script).name}"]
    else:
        start = [".venv-dev/bin/python", inside(script) or "FOLDER"]
    return shlex.join([*start, *map(hidden, arguments)])


def append_row(question: str, row: Mapping[str, Any], *, folder: Path = RESULTS) -> Path:
    """Append `row`, after the machine's facts and the command, as one line to `folder`/`question`.jsonl; return that path.

    `run`, the time when this process began, is the same in all rows of a run: what one table may hold together. Rows are only
    ever appended. ValueError for a row that is not plain JSON (NaN and infinity are not), or has a figure that its n is too
    small for.
    """
    if figures := too_few(row):
        raise ValueError(
            f"a row of {question} has {', '.join(figures)} from n = {row['n']}; a p99 needs {P99_FROM} times, an interval"
            f" {INTERVAL_FROM} rounds. Measure more, or leave it out (`summary` and `Ratio.as_row` do)."
        )
    try:
        line = json.dumps({**machine(), "run": STARTED, "command": command(), "question": question, **row}, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"a row of {question} is not plain JSON: {error}; give numbers, strings, lists") from None
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{question}.jsonl"
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")  # one write: rows of two runs do not mix
    return path
