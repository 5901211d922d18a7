"""Counter-based host noise: the same seed gives the same video, alone or in a batch, on any NumPy.

Philox-4x64 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) is a function of (key, counter), so
each request owns a key and each draw of it owns a range of counters: nothing depends on what was drawn before. NumPy
promises that the raw bits of Philox never change, not those of its normal sampler: normals are made here (Box-Muller).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from motionrt.runtime.errors import InputError, shown

MAX_SEED = 2**64 - 1


def check_seed(seed: int) -> int:
    """Return `seed` as an int in [0, 2**64 - 1]; `InputError` otherwise."""
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer):
        raise InputError(f"seed is {shown(seed)}; it must be a whole number between 0 and {MAX_SEED}.")
    if not 0 <= seed <= MAX_SEED:
        raise InputError(f"seed is {shown(seed)}; it must be between 0 and {MAX_SEED}.")
    return int(seed)


def noise(seed: int, stream: int, step: int, shape: Sequence[int]) -> NDArray[np.float32]:
    """Standard normal float32 of `shape`: draw `step` of `stream` (a loop of a bundle, or a graph that reads noise), for
    `seed`.

    A pure function of its arguments: no two draws share a number, whatever was drawn before. A longer shape begins with the
    values of a shorter one. Raises `InputError` for a seed outside [0, 2**64 - 1], or a negative stream or step.
    """
    if stream < 0 or step < 0:
        raise InputError(f"draw {step} of noise stream {stream} was asked for; both must be 0 or more.")
    index = stream << 64 | step
    count = math.prod(shape)
    pairs = (count + 1) // 2
    # Two 64-bit words a pair; the counter's high half is the draw, its low half counts the words of the draw.
    bits = np.random.Philox(key=check_seed(seed), counter=index << 128).random_raw(2 * pairs).reshape(pairs, 2)
    uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53  # in (0, 1): the logarithm is finite
    radius = np.sqrt(-2.0 * np.log(uniform[:, 0]))
    angle = 2.0 * np.pi * uniform[:, 1]
    normal = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)
    return normal[:count].astype(np.float32).reshape(tuple(shape))
