"""The denoising loop: pure maths on arrays. It knows no model, device or file.

The network and the solver are both inside `step`: with rows (p0, p1, c0, c1, c2, c3) taken from a scheduler,

    x0     = p0 x + p1 v                                   (v: the guided output of the network)
    x_next = c0 x + c1 x0 + c2 x0_previous + c3 noise      (DDIM: Song 2021, eq. 12; DPM-Solver++: Lu 2022)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from motionrt.runtime.backend import Array, Graph
from motionrt.runtime.errors import InputError


def sample(
    step: Graph,
    *,
    latents: Array,
    state: Mapping[str, Array],
    tables: Mapping[str, Array],
    coefficients: Array,
    guidance: Array | float,
    noise: Callable[[int], Array],
    on_step: Callable[[int, int], None] | None = None,
) -> Array:
    """Denoise `latents` float32 [B, F, C, H, W] in T steps and return them, same shape and dtype.

    `state`: arrays that every step reads; `tables`: arrays [T, ...], of which step t reads row t under the same name;
    `coefficients` float32 [T, 6]; `guidance` float32 [T] or one number; `noise(t)`: standard normal of the shape of
    `latents`, asked for only where c3 of step t is not 0. `on_step(t, T)` is called after step t and may raise to stop.
    `step` may reuse its output buffers between calls only if it does not read them as inputs.
    Raises `InputError` where the lengths of tables, guidance and coefficients differ.
    """
    rows = np.asarray(coefficients, np.float32)
    if rows.ndim != 2 or rows.shape[1] != 6 or not len(rows):
        raise InputError(f"solver coefficients are {rows.shape}; they must be [T, 6] with T of 1 or more.")
    steps = len(rows)
    scales = np.asarray(guidance, np.float32)
    if scales.ndim == 0:
        scales = np.full(steps, scales)
    if scales.shape != (steps,):
        raise InputError(f"guidance is {scales.shape} for {steps} steps; give one number, or one for each step.")
    for name, table in tables.items():
        if len(table) != steps:
            raise InputError(f"schedule table `{name}` has {len(table)} rows; the solver has {steps} steps.")
    x = latents
    x0 = zeros = np.zeros_like(latents)
    for t in range(steps):
        outputs = step(
            {
                **state,
                **{name: table[t] for name, table in tables.items()},
                "latents": x,
                "previous_x0": x0,
                "noise": noise(t) if rows[t, 5] else zeros,
                "coefficients": rows[t],
                "guidance": np.asarray(scales[t]),  # [] rather than a NumPy scalar
            }
        )
        x, x0 = outputs["next_latents"], outputs["x0"]
        if on_step is not None:
            on_step(t, steps)
    return x
