"""Schedules that do not run the network in every step: rows of their own, made of those that a bundle has.

    table = extrapolated(manifest.loops["video"], rows, [True, True, False, False, True])

A solver's rows say p0 and p1 of x0 = p0 x + p1 v. A step that is left out takes v from the straight line through the two last
steps that ran the network (the graph `Loop.extrapolates`), and the solver goes on as it would have. That is a schedule like any
other: data, the same in every run and on every backend.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray

from motionrt.runtime.bundle.manifest import Loop
from motionrt.runtime.errors import InputError

_LEAST = 2  # steps that a straight line takes
_FEW = 9  # steps of which every way to leave some out is tried


def extrapolated(loop: Loop, rows: NDArray[np.float32], runs: Sequence[bool]) -> NDArray[np.float32]:
    """Rows `[T, R]` of `loop` that run the network in the steps of `runs` alone, from `rows`, which run it in all.

    Distances are counted in steps. Raises InputError for a loop that has no such steps, for rows that are no such rows, and
    unless the two first steps run the network.
    """
    if loop.extrapolates is None:
        raise InputError("this loop has no step that does without its network; export the bundle again with this version.")
    at = {name: index for index, name in enumerate(loop.columns)}
    there = loop.graphs.index(loop.extrapolates)
    if len(runs) != len(rows) or not all(runs[:_LEAST]):
        what = f"runs is {pattern(runs)} for {len(rows)} steps"
        raise InputError(f"{what}; each step must be named, and the first {_LEAST} run the network.")
    if (rows[:, at["graph"]] == there).any():
        raise InputError("these rows leave out steps already; give those of a solver that runs the network in every step.")
    kept, (p0, p1) = [at[name] for name in loop.feeds["kept"]], (rows[:, at[name]].astype(np.float64) for name in ("p0", "p1"))
    made = rows.copy()
    ran: list[int] = []
    for step, run in enumerate(runs):
        if run:
            ran.append(step)
            continue
        earlier, last = ran[-2:]
        ahead = (step - last) / (last - earlier)
        made[step, at["graph"]] = there
        # v = (1 + a) v_last - a v_earlier, with v = (x0 - p0 x) / p1
        weights = ((1 + ahead) / p1[last], -ahead / p1[earlier])
        made[step, kept] = [weights[0], -weights[0] * p0[last], weights[1], -weights[1] * p0[earlier]]
    return made


def patterns(steps: int) -> Iterator[tuple[bool, ...]]:
    """Ways to leave out steps, each once, those with the fewest runs of the network first: of up to nine steps all that there
    are; else behind the first two or three every k-th runs it (k from 2 to 8), and so may the last."""
    if steps <= _FEW:
        runs_of = ((True,) * _LEAST + rest for rest in product((False, True), repeat=max(0, steps - _LEAST)))
        yield from sorted((runs for runs in runs_of if not all(runs)), key=lambda runs: (sum(runs), runs))
        return
    seen = set[tuple[bool, ...]]()
    for every in range(2, 9):
        for first in (2, 3):
            for final in (0, 1):
                runs = tuple(t < first or (t - first + 1) % every == 0 or t >= steps - final for t in range(steps))
                if not all(runs):
                    seen.add(runs)
    yield from sorted(seen, key=lambda runs: (sum(runs), runs))


def pattern(runs: Sequence[bool]) -> str:
    """A pattern for people: F where the network runs, - where it does not."""
    return "".join("F" if run else "-" for run in runs)
