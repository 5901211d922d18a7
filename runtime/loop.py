"""The denoising loop: maths on arrays. It knows no model and no file, and of devices only that a graph may keep values on one.

The network and the solver are both inside `step`: with rows (p0, p1, c0, c1, c2, c3) taken from a scheduler,

    x0     = p0 x + p1 v                                   (v: the guided output of the network)
    x_next = c0 x + c1 x0 + c2 x0_previous + c3 noise      (DDIM: Song 2021, eq. 12; DPM-Solver++: Lu 2022)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from motionrt.runtime.backends.onnxruntime import Array, DeviceGraph, Graph, place
from motionrt.runtime.errors import InputError


def sample(
    step: Graph,
    *,
    latents: Array,
    state: Mapping[str, Any],
    tables: Mapping[str, Any],
    coefficients: Array,
    guidance: Array | float,
    noise: Callable[[int], Array],
    on_step: Callable[[int, int], None] | None = None,
    fetch: bool = True,
) -> Any:
    """Denoise `latents` float32 [B, F, C, H, W] in T steps and return them, same shape and dtype.

    `state`: arrays that every step reads; `tables`: arrays [T, ...], of which step t reads row t under the same name;
    `coefficients` float32 [T, 6]; `guidance` float32 [T] or one number; `noise(t)`: standard normal of the shape of
    `latents`, asked for only where c3 of step t is not 0. `on_step(t, T)` is called after step t and may raise to stop.
    A `step` that can keep values on its device (`DeviceGraph`) is given `state` and `tables` once (or gets them as `place`
    made them), and its results stay there until the last; any other must not write into what it has returned.
    `fetch`: give the latents as a host array; otherwise where the last step left them, until `step` runs again.
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
    device = step if isinstance(step, DeviceGraph) else None
    state, tables = place(step, state), place(step, tables)
    x: Any = latents
    x0: Any = place(step, {"previous_x0": np.zeros_like(latents)})["previous_x0"]
    zeros = x0
    loop = place(step, {"coefficients": rows, "guidance": scales})
    run: Callable[[Mapping[str, Any]], dict[str, Any]] = step if device is None else device.run
    for t in range(steps):
        outputs = run(
            {
                **state,
                **{name: table[t : t + 1] for name, table in tables.items()},
                "latents": x,
                "previous_x0": x0,
                "noise": noise(t) if rows[t, 5] else zeros,
                "coefficients": loop["coefficients"][t : t + 1],
                "guidance": loop["guidance"][t : t + 1],
            }
        )
        x, x0 = outputs["next_latents"], outputs["x0"]
        if on_step is not None:
            on_step(t, steps)
    return device.get(x) if device is not None and fetch else x


def dynamic_guidance(scale: float, timesteps: Sequence[int] | Array) -> list[float]:
    """CogVideoX's `use_dynamic_cfg`: one guidance scale for each step, to be given as `guidance`.

    g_t = 1 + scale (1 - cos(pi ((T - t) / T)^5)) / 2 with T the number of steps and t the timestep, as diffusers has it
    (T and t are of different units there too).
    """
    steps = len(timesteps)
    return [1 + scale * (1 - math.cos(math.pi * ((steps - float(t)) / steps) ** 5)) / 2 for t in timesteps]
