"""Rows of Motion-I2V's two loops: DDIM without noise, from the noisiest timestep down to 1, over a linear schedule.

With a the share of signal ("alpha bar") at a timestep and a' at the next, 1 behind the last, and o the network's output after
guidance, a step of DDIM (Song 2021, arXiv 2010.02502, eq. 12 with sigma 0) is x' = p x + q o. What the brush holds still takes
the image, noised as of the next timestep: signal z_ref + spread noise; in the release not in the last step (`hold` 0), whose
result may leave the picture there.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from motionrt.export.systems.motionclone.rows import read
from motionrt.export.systems.system import Schedules

COLUMNS = ("graph", "timestep", "guidance", "p", "q", "signal", "spread", "hold")
FLOW = COLUMNS[:5]  # what the fields' loop has of them
RELEASED = 25  # steps of each loop
STEPS = (10, 15, 20, RELEASED, 30, 50)
GUIDANCE = 7.0


def timesteps(steps: int, trained: int = 1000) -> NDArray[np.int64]:
    """Evenly spaced, descending to 1: 961, 921, ..., 1 for 25. ValueError where there are not so many."""
    if not 1 <= steps <= trained:
        raise ValueError(f"steps is {steps}; allowed: 1 to {trained}")
    made: NDArray[np.int64] = (np.arange(steps, dtype=np.int64) * (trained // steps))[::-1] + 1
    return np.minimum(made, trained - 1)


def rows(
    steps: int, alphas: NDArray[Any], prediction: str = "epsilon", guidance: float = GUIDANCE, to_the_end: bool = False
) -> NDArray[np.float32]:
    """Rows of `COLUMNS`, float32 `[steps, 8]`. `guidance`: the scale g of o_u + g (o_c - o_u). `to_the_end`: the brush holds in
    the last step, too."""
    times = timesteps(steps, len(alphas))
    signal = alphas[times]
    following = np.append(signal[1:], 1.0)
    x0_latents, x0_output, eps_latents, eps_output = read(signal, prediction)
    p, q = (
        np.sqrt(following) * x0 + np.sqrt(1 - following) * eps
        for x0, eps in ((x0_latents, eps_latents), (x0_output, eps_output))
    )
    ones = np.ones(steps)
    hold = (np.arange(steps) < steps - 1) | to_the_end
    columns = [0 * ones, times, guidance * ones, p, q, np.sqrt(following), np.sqrt(1 - following), hold]
    return np.column_stack(columns).astype(np.float32)


def schedules(
    alphas: NDArray[Any], prediction: str = "epsilon", guidance: float = GUIDANCE, steps: Iterable[int] = STEPS,
    to_the_end: bool = False,
) -> tuple[Schedules, Schedules]:  # fmt: skip
    """Rows of both loops for each of `steps`: those of the fields, and of the video."""
    made = {count: rows(count, alphas, prediction, guidance, to_the_end) for count in steps}
    return {"ddim": {count: table[:, : len(FLOW)].copy() for count, table in made.items()}}, {"ddim": made}
