"""What does a step cost as the request grows? Frames, resolution, motion tokens M, batch, and references K: curves, fitted.

    .venv-dev/bin/python benchmarks/questions/bench_scaling.py                   # all axes, minutes of exports the first time
    .venv-dev/bin/python benchmarks/questions/bench_scaling.py --axes m --rounds 30

A CogVideoX step of a few real blocks at the width of cogvideox-mid (mid_models.py), `base_ours` (no adapters) and `ours`
(with), both after the compiler pass, in ONNX Runtime; values of an axis take turns in one run. K does not reach the step: it
is the cost of the demo's `cama` graph, which reads K references once per request.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from motionrt.benchmarks import harness
from motionrt.benchmarks.models.mid_graphs import WORK, graphs_of
from motionrt.benchmarks.models.mid_models import MID, TOY, Model, cogvideox_model
from motionrt.benchmarks.models.onnx_graph import open_graph
from motionrt.runtime.bundle.bundle import Bundle
from motionrt.runtime.noise import noise

DEMO = harness.ROOT / "demo" / "bundle"
AXES = ("frames", "resolution", "m", "batch", "k")
SMALL = replace(MID, name="scaling", layers=4)
FORMS = {"base_ours": "base_ours", "ours": "folded"}


@dataclass(frozen=True)
class Point:
    """One value of an axis: a model, or for k a number of references, and what the cost is fitted over."""

    value: int
    model: Model | None
    size: int


def points(axis: str, toy: bool) -> list[Point]:
    """The values of `axis`; `size`: L for frames and resolution, the value itself for the others."""
    small = replace(TOY, name="scaling-toy") if toy else SMALL
    if axis == "k":
        return [Point(k, None, k) for k in ((1, 2, 4) if toy else (1, 2, 3, 4, 6, 8))]
    found = []
    if axis == "frames":
        for frames in (1, 2, 3) if toy else (1, 3, 5, 7, 9, 13):
            found.append((frames, replace(small, frames=frames), 1))
    elif axis == "resolution":  # latent places; the aspect stays that of the model
        for part in (1, 2, 3) if toy else (2, 3, 4, 6, 8):
            size = replace(small, height=small.height * part // 4 // 2 * 2, width=small.width * part // 4 // 2 * 2)
            found.append((size.height * size.width, size, 1))
    elif axis == "m":
        for tokens in (2, 3, 5) if toy else (4, 9, 16, 25, 36, 49):
            found.append((tokens, replace(small, motion_tokens=tokens), 1))
    elif axis == "batch":
        for batch in (1, 2) if toy else (1, 2, 3, 4):
            found.append((batch, small, batch))
    else:
        raise ValueError(f"axis is {axis!r}; allowed: {', '.join(AXES)}")
    result = []
    for value, size, batch in found:
        model = cogvideox_model(replace(size, name=f"{small.name}-{axis}-{value}"), batch=batch)
        result.append(Point(value, model, size.tokens if axis in ("frames", "resolution") else value))
    return result


def fit_power(sizes: Sequence[float], seconds: Sequence[float]) -> dict[str, float]:
    """seconds = c * size^exponent, least squares of the logarithms; `worst`: the largest relative residual."""
    x, y = np.log(np.asarray(sizes, float)), np.log(np.asarray(seconds, float))
    exponent, constant = np.polyfit(x, y, 1)
    worst = float(np.abs(np.exp(constant + exponent * x - y) - 1).max())
    return {"exponent": float(exponent), "coefficient_ms": float(np.exp(constant) * 1e3), "worst_relative_residual": worst}


def fit_polynomial(sizes: Sequence[float], seconds: Sequence[float], degree: int) -> dict[str, Any]:
    """seconds = sum c_i size^i up to `degree`, least squares; coefficients in ms from c_0 on, and the worst residual."""
    x, y = np.asarray(sizes, float), np.asarray(seconds, float)
    coefficients = np.polynomial.polynomial.polyfit(x, y, degree)
    worst = float(np.abs(np.polynomial.polynomial.polyval(x, coefficients) / y - 1).max())
    return {"coefficients_ms": [float(c) * 1e3 for c in coefficients], "worst_relative_residual": worst}


def step_candidates(found: Sequence[Point], work: Path, threads: int) -> dict[tuple[str, int], harness.Candidate]:
    """Both forms at every value of an axis."""
    calls: dict[tuple[str, int], harness.Candidate] = {}
    for point in found:
        assert point.model is not None
        for name, graph in zip(FORMS, graphs_of(point.model, tuple(FORMS.values()), work).values(), strict=True):
            run, feed = graph.open(threads), graph.feed
            calls[name, point.value] = lambda run=run, feed=feed: run(feed)  # type: ignore[misc]
    return calls


def k_candidates(found: Sequence[Point], bundle: Bundle, threads: int) -> dict[tuple[str, int], harness.Candidate]:
    """The demo's `cama` graph with K references."""
    run = open_graph(bundle.graph_path("cama"), threads)
    calls: dict[tuple[str, int], harness.Candidate] = {}
    for point in found:
        feed = {}
        for index, port in enumerate(bundle.graph("cama").inputs):
            shape = tuple(point.value if dim.name == "references" else dim.opt for dim in port.dims)
            feed[port.name] = noise(3, 0, index, shape)
        calls["cama", point.value] = lambda feed=feed: run(feed)  # type: ignore[misc]
    return calls


def timed(
    calls: Mapping[tuple[str, int], harness.Candidate], warmups: int, rounds: int
) -> tuple[harness.Comparison, dict[tuple[str, int], str]]:
    """Times of all, in turns. They compute different things: all that is checked is that every output is finite."""
    names = {key: f"{key[0]} {key[1]}" for key in calls}

    def quiet(call: harness.Candidate) -> harness.Candidate:
        def run() -> dict[str, NDArray[Any]]:
            call()
            return {}

        return run

    for key, call in calls.items():
        for output in call().values():
            if not np.isfinite(output).all():
                raise harness.ParityError(f"{names[key]} gives values that are not finite")
    quieted = {names[key]: quiet(call) for key, call in calls.items()}
    result = harness.compare(quieted, reference=next(iter(quieted)), tolerance=0.0, warmups=warmups, rounds=rounds)
    return result, names


def measure(axis: str, options: argparse.Namespace) -> None:
    """One axis: a row for each value and backend, and the fits."""
    found = points(axis, options.toy)
    if axis == "k":
        calls = k_candidates(found, Bundle.open(options.bundle), options.threads)
    else:
        calls = step_candidates(found, options.work, options.threads)
    result, names = timed(calls, options.warmups, options.rounds)
    sizes = {point.value: point.size for point in found}
    shapes = {point.value: point.model.shape if point.model else {"K": point.value} for point in found}
    same = {"model": "demo" if axis == "k" else "scaling", "axis": axis, "dtype": "float32", "threads": options.threads}
    for (backend, value), name in names.items():
        row = {
            **result.row(name),
            **same,
            "backend": backend,
            "what": f"{axis} {value}",
            "value": value,
            "size": sizes[value],
            "shape": dict(shapes[value]),
            "error": {"finite": True},
            "note": options.note,
        }
        if backend == "ours":
            ratio = result.ratio(name, names["base_ours", value])
            row["over_base_ours"] = ratio.as_row()
        harness.append_row("bench_scaling", row, folder=options.results)
        print("{what:>18} {backend:>10}: p50 {p50_ms:.2f} ms, p95 {p95_ms:.2f} ms, n {n}".format(**row))
    for backend in dict.fromkeys(backend for backend, _ in names):
        values = [value for other, value in names if other == backend]
        seconds = [float(np.median(result.seconds[names[backend, value]])) for value in values]
        x = [float(sizes[value]) for value in values]
        degree = 2 if axis in ("frames", "resolution") else 1
        over = "L" if axis in ("frames", "resolution") else axis
        power, polynomial = fit_power(x, seconds), fit_polynomial(x, seconds, degree)
        row = {**same, "what": "fit", "backend": backend, "over": over, "power": power, "polynomial": polynomial}
        harness.append_row("bench_scaling", {**row, "values": values, "note": options.note}, folder=options.results)
        print(
            f"{axis}, {backend}: time ~ {over}^{power['exponent']:.2f} (within {power['worst_relative_residual']:.0%}); "
            f"polynomial {polynomial['coefficients_ms']} ms (within {polynomial['worst_relative_residual']:.0%})"
        )


def main(arguments: list[str] | None = None) -> None:
    """Export what is missing, time each axis, append rows and fits."""
    parser = argparse.ArgumentParser(description="Cost curves over frames, resolution, M, batch and K.")
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--toy", action="store_true", help="tiny sizes, for the test of this file")
    parser.add_argument("--bundle", type=Path, default=DEMO, help="for k")
    parser.add_argument("--work", type=Path, default=WORK, help="folder where exported graphs are kept")
    harness.add_options(parser, rounds=15, warmups=2, threads=1)
    options = parser.parse_args(arguments)
    for axis in options.axes:
        measure(axis, options)


if __name__ == "__main__":
    main()
