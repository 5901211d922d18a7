"""DynamiCrafter's sampler as rows: DDIM (Song 2021, arXiv 2010.02502, eq. 12) that may draw noise in every step, the last too.

    ab = signal(zero_terminal=True)                                     # share of signal by timestep, float64
    table = rows(timesteps(31, "uniform"), ab, "v_prediction", eta=1.0, scales=scales(0.3))

With ab at a step's timestep and ab' at the next one visited (at 0 behind the last, and not 1), o the guided output:

    x0    = sqrt(ab) x - sqrt(1 - ab) o        (v)      or (x - sqrt(1 - ab) o) / sqrt(ab)      (epsilon)
    eps   = (x - sqrt(ab) x0) / sqrt(1 - ab)
    x'    = sqrt(ab') r x0 + d eps + sigma n,   d^2 = 1 - ab' - sigma^2,   sigma^2 = eta^2 (1 - ab') / (1 - ab) (1 - ab / ab')

r is the ratio of `scales` at both timesteps: the training multiplied x0 by them ("dynamic rescale"). d^2 is exactly 0 where ab
is (the zero-terminal schedule's noisiest timestep, eta 1); the released samplers round it, and where it comes out negative they
return NaN (trailing, among others 15 and 25 steps; in MotionRAG's copy 15, 25, 30, 50). Here it is held at 0.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from motionrt.export.systems.motionclone.rows import read
from motionrt.export.systems.system import Schedules

TRAINED = 1000
SPACINGS = ("uniform", "trailing")
FIRST, TURNING = 1.0, 400  # of the scale of x0: where it begins, and the timestep from which on it stays
Floats = NDArray[np.float64]


def signal(zero_terminal: bool) -> Floats:
    """Share of signal ("alpha bar") by timestep, `[1000]`; with `zero_terminal` the last is 0 (Lin 2024, arXiv 2305.08891)."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, TRAINED) ** 2
    root = np.sqrt(np.cumprod(1 - betas))
    if zero_terminal:
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return root**2


def scales(base: float | None) -> Floats:
    """What x0 was multiplied by in training, by timestep `[1000]`: from 1 down to `base`; ones without."""
    if base is None:
        return np.ones(TRAINED)
    return np.concatenate([np.linspace(FIRST, base, TURNING), np.full(TRAINED - TURNING, base)])


def timesteps(steps: int, spacing: str) -> NDArray[np.int64]:
    """What is visited, descending, when the release is asked for `steps`; of another number than that where the release's is.

    "uniform": 1, 1 + c, 1 + 2 c, ... with c = floor(1000 / steps), which for 30 are 31 steps, from 991; "trailing": from 999.
    ValueError for what the release cannot do: less than one step, more than 1000, or (uniform: 3, 9, 27, 36, 37, ...) numbers
    whose noisiest timestep would be 1000, where it ends with an index out of range.
    """
    if spacing not in SPACINGS:
        raise ValueError(f"spacing is {spacing!r}; allowed: {', '.join(SPACINGS)}")
    if not 1 <= steps <= TRAINED:
        raise ValueError(f"steps is {steps}; allowed: 1 to {TRAINED}")
    if spacing == "trailing":
        made: NDArray[np.int64] = np.round(np.arange(TRAINED, 0, -TRAINED / steps)).astype(np.int64) - 1
        return made
    made = np.arange(0, TRAINED, TRAINED // steps)[::-1] + 1
    if made[0] >= TRAINED:
        raise ValueError(f"{steps} uniform steps begin at timestep {made[0]}, and the last is {TRAINED - 1}; take others")
    return made


def rows(times: NDArray[np.int64], ab: Floats, prediction: str, eta: float, scaled: Floats) -> NDArray[np.float32]:
    """The solver's coefficients (p0, p1, c0, c1, c2, c3) of `rows.solved`, float32 `[T, 6]`, for descending `times [T]`.

    `ab`: see `signal`; `prediction`: v_prediction or epsilon; `eta` from 0 (no noise) to 1; `scaled`: see `scales`. ValueError
    for an eta outside.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}; allowed: 0 to 1")
    now, after = ab[times], ab[np.append(times[1:], 0)]
    ratio = scaled[np.append(times[1:], times[-1])] / scaled[times]
    sigma = eta * np.sqrt((1 - after) / (1 - now) * np.maximum(0, 1 - now / after))
    # (1 - ab) ab' / (1 - ab') times d^2, written so that it is 0 where d is, and no rounding of it
    kept = after * (1 - now) - eta**2 * np.maximum(0, after - now)
    direction = np.sqrt(np.maximum(0, kept) * (1 - after) / after) / (1 - now)
    x0_latents, x0_output, _, _ = read(now, prediction)
    columns = [x0_latents, x0_output, direction, np.sqrt(after) * ratio - direction * np.sqrt(now), np.zeros_like(now), sigma]
    return np.stack(columns, axis=1).astype(np.float32)


def schedules(
    zero_terminal: bool, prediction: str, base: float | None, steps: Iterable[int], guidance: float, first: str
) -> Schedules:
    """Rows of `motionrag_system.COLUMNS` for all numbers of steps among `steps` that a spacing can give, spacing `first` first:
    as NAME with noise in every step (eta 1, as released), as NAME_eta0 without.

    `prediction`, `base`: see `rows` and `scales`; `guidance`: of every step unless a request says otherwise.
    """
    from motionrt.export.systems.motionrag_system import solver_table

    ab, scaled, wanted = signal(zero_terminal), scales(base), frozenset(steps)
    made: dict[str, dict[int, NDArray[np.float32]]] = {}
    for spacing in sorted(SPACINGS, key=lambda name: name != first):
        visited = {}
        for asked in range(1, max(wanted) + 1):
            try:
                times = timesteps(asked, spacing)
            except ValueError:
                continue
            if len(times) in wanted:
                visited[len(times)] = times
        for eta, name in ((1.0, spacing), (0.0, f"{spacing}_eta0")):
            made[name] = {
                count: solver_table(times, rows(times, ab, prediction, eta, scaled), guidance)
                for count, times in sorted(visited.items())
            }
    return {name: found for name, found in made.items() if found}
