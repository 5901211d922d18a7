"""What the command line prints: references, stage times, a bundle's partition and interface, measurements."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import isnan
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from motionrt.runtime.bundle.bundle import Bundle
from motionrt.runtime.cli.terminal import visible
from motionrt.runtime.memory.search import WORTH

if TYPE_CHECKING:
    from motionrt.runtime.cli.bench import Comparison, Row
    from motionrt.runtime.memory.memory import Reference
    from motionrt.runtime.pipeline import Result

CLASSES = ("constant", "schedule", "request", "timeline", "step")


def console() -> Console:
    """Standard output; not narrower than 100 columns where it is no terminal, so that tables in logs stay whole."""
    plain = Console(highlight=False)
    return plain if plain.is_terminal else Console(highlight=False, width=max(plain.width, 120))


class _Description(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(visible(task.description))


@contextmanager
def progress() -> Iterator[Progress]:
    """Progress bars on standard error, so that standard output can be kept; descriptions may hold names out of files."""
    columns = (_Description(), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    err = Console(stderr=True)
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bars:
        yield bars


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], left: int = 1) -> Table:
    """A table whose first `left` columns are text and whose others are numbers."""
    title = _plain(title)
    result = Table(title=title, title_justify="left", title_style="bold", min_width=len(title), show_header=any(columns))
    for index, name in enumerate(columns):
        result.add_column(name, justify="left" if index < left else "right", overflow="fold")
    for row in rows:
        result.add_row(*(_plain(str(cell)) for cell in row))
    return result


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(visible(text))  # captions and shapes hold square brackets


def references_table(references: Sequence[Reference]) -> Table:
    """The clips whose motion was used."""
    several, told = any(r.memory for r in references), _worths(references)
    rows = [
        (r.caption, r.source, *([r.memory] if several else []), f"{r.start:g}-{r.start + r.duration:g} s", *_worth(r, told))
        for r in references
    ]
    columns = ("caption", "source", *(["memory"] if several else []), "span", *told)
    return table("references", columns, rows, left=len(columns) - len(told))


def _worths(references: Sequence[Reference]) -> list[str]:
    """What is known of any of these: the score, and what else made the order."""
    return [WORTH[0], *(name for name in WORTH[1:] if not all(isnan(getattr(r, name)) for r in references))]


def _worth(reference: Reference, names: Sequence[str]) -> list[str]:
    values = [getattr(reference, name) for name in names]  # NaN for what was given by hand: nothing was searched
    forms = ["{:.0%}" if name == "probability" else "{:.3f}" for name in names]
    return ["" if isnan(value) else form.format(value) for form, value in zip(forms, values, strict=True)]


def found_table(references: Sequence[Reference]) -> Table:
    """Clips that a search found, with the ids that `memory remove` takes."""
    told = _worths(references)
    rows = [
        (r.caption, r.source, r.dataset, f"{r.start:g}-{r.start + r.duration:g} s", r.id, *_worth(r, told)) for r in references
    ]
    return table("clips found", ("caption", "source", "dataset", "span", "id", *told), rows, left=4)


def stats_table(title: str, stats: Mapping[str, Any]) -> Table:
    """Figures of a motion memory by name; a mapping (datasets) has a row for each of its entries."""
    rows: list[tuple[str, str]] = []
    for name, value in stats.items():
        named = (
            {f"{name}: {key or 'none'}": number for key, number in value.items()}
            if isinstance(value, Mapping)
            else {name: value}
        )
        rows += [(key, f"{number:,}" if isinstance(number, int) else str(number)) for key, number in named.items()]
    return table(title, ("", ""), rows)


def stages_table(results: Sequence[Result], extra: Mapping[str, float] | None = None) -> Table:
    """Milliseconds per stage: the sum over `results`, and `extra` stages such as writing the file."""
    seconds: dict[str, float] = {}
    for result in results:
        for name, value in result.seconds.items():
            seconds[name] = seconds.get(name, 0.0) + value
    seconds |= extra or {}
    total = sum(seconds.values())
    rows = [(name, f"{1e3 * value:.1f}", f"{value / max(total, 1e-9):.0%}") for name, value in seconds.items()]
    title = "stage times" if len(results) == 1 else f"stage times, {len(results)} videos together"
    return table(title, ("stage", "ms", "share"), [*rows, ("total", f"{1e3 * total:.1f}", "")])


def inspect_tables(bundle: Bundle, everything: bool) -> Iterator[Table]:
    """What the partition did; with `everything` the hoisted tensors, the rules that fired, and every graph's ports."""
    partition = bundle.manifest.partition
    if classes := partition.get("classes"):
        original = partition.get("original") or {}
        named = [(f"{name}: {_WHEN[name]}", classes[name]) for name in CLASSES if name in classes]
        if original:
            named.append(("the step as written", original))
        yield table(
            "where the work of a step went",
            ("class", "nodes", "parameters", "bytes in float32", "FLOPs", "FLOPs of original"),
            [(name, *_counts(entry), _share(entry, original)) for name, entry in named],
        )
    if not everything:
        return
    if hoisted := partition.get("hoisted"):
        rows = [(item["name"], item["class"], _shape(item["shape"]), f"{item['bytes']:,}") for item in hoisted]
        total = sum(item["bytes"] for item in hoisted)
        yield table(f"hoisted out of the loop: {len(hoisted)} tensors, {total:,} bytes", _HOISTED, rows, left=3)
    if rules := partition.get("rules"):
        rows = [(r["rule"], r["where"], f"{r['flops_before']:,}", f"{r['flops_after']:,}") for r in rules]
        yield table("rewrite rules that fired", ("rule", "where", "FLOPs before", "after"), rows, left=2)
    all_ports = [
        (name, direction, port.name, port.dtype, _shape(port.dims))
        for name, spec in bundle.graphs.items() for direction, ports in (("in", spec.inputs), ("out", spec.outputs))
        for port in ports
    ]  # fmt: skip
    yield table("graphs and their ports", ("graph", "", "name", "dtype", "dims"), all_ports, left=5)


_WHEN = {
    "constant": "at export",
    "schedule": "once per schedule",
    "request": "once per request",
    "timeline": "once per request, for all steps",
    "step": "every step",
}
_HOISTED = ("tensor", "class", "shape", "bytes")


def _counts(entry: Mapping[str, int]) -> list[str]:
    return [f"{entry.get(key, 0):,}" for key in ("nodes", "parameters", "weight_bytes", "flops")]


def _share(entry: Mapping[str, int], original: Mapping[str, int]) -> str:
    return f"{entry.get('flops', 0) / original['flops']:.1%}" if original.get("flops") else ""


def _shape(dims: Sequence[object]) -> str:
    return f"[{', '.join(map(str, dims))}]"


def bench_tables(rows: Sequence[Row], compared: Sequence[Comparison], notes: Sequence[str]) -> Iterator[Table | str]:
    """Percentiles per graph, then the ratios of the steps."""
    stages = []
    for row in rows:
        ms = row.percentiles()
        stages.append((row.what, *(f"{ms[q]:.2f}" if q in ms else "-" for q in ("p50", "p95", "p99")), len(row.seconds)))
    yield table("stages", ("stage", "p50 ms", "p95 ms", "p99 ms", "n"), stages)
    for comparison in (one for one in compared if one.seconds):
        lines = [
            (f"{name} step", f"{1e3 * sorted(seconds)[len(seconds) // 2]:.3f}", f"{comparison.ratio(name):.3f}", len(seconds))
            for name, seconds in comparison.seconds.items()
        ]
        yield table(f"one step, {lines[0][-1]} interleaved rounds", ("", "p50 ms", "time / rewritten", "n"), lines)
    yield from notes


def counted(partition: Mapping[str, Any]) -> str | None:
    """What the rewrites took out of a step, counted at export; None where the bundle does not say."""
    step, original = (partition.get("classes") or {}).get("step"), partition.get("original")
    if not step or not original or not original.get("flops"):
        return None
    share = step["flops"] / original["flops"]
    return f"counted: {step['flops']:,} FLOPs a step, {share:.1%} of the {original['flops']:,} of the step as written"

