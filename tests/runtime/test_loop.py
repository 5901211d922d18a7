from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from motionrt.runtime.errors import Cancelled, InputError
from motionrt.runtime.loop import dynamic_guidance, sample

SHAPE = (1, 2, 3, 4, 5)


class Step:
    """A network whose output is `field * x + row`, with the solver's update; keeps what it was called with."""

    def __init__(self) -> None:
        self.calls: list[dict[str, NDArray[Any]]] = []

    def __call__(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        self.calls.append(dict(inputs))
        x, previous, noise = inputs["latents"], inputs["previous_x0"], inputs["noise"]
        p0, p1, c0, c1, c2, c3 = inputs["coefficients"]
        x0 = p0 * x + p1 * inputs["guidance"] * (inputs["field"] * x + inputs["row"])
        return {"next_latents": c0 * x + c1 * x0 + c2 * previous + c3 * noise, "x0": x0}


def arguments(steps: int = 5, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    draws = rng.standard_normal((steps, *SHAPE)).astype(np.float32)
    return {
        "latents": rng.standard_normal(SHAPE).astype(np.float32),
        "state": {"field": rng.standard_normal(SHAPE).astype(np.float32)},
        "tables": {"row": rng.standard_normal((steps, 3, 4, 5)).astype(np.float32)},
        "coefficients": (0.5 * rng.standard_normal((steps, 6))).astype(np.float32),
        "guidance": 2.0,
        "noise": lambda index: draws[index],
    }


def test_sample_follows_the_recurrence() -> None:
    given = arguments()
    x, previous = given["latents"].astype(np.float64), np.zeros(SHAPE)
    for t, (p0, p1, c0, c1, c2, c3) in enumerate(given["coefficients"].astype(np.float64)):
        x0 = p0 * x + p1 * 2.0 * (given["state"]["field"] * x + given["tables"]["row"][t])
        x, previous = c0 * x + c1 * x0 + c2 * previous + c3 * given["noise"](t), x0
    got = sample(Step(), **given)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, x, rtol=1e-4, atol=1e-5)


def test_sample_feeds_each_step_its_row_its_noise_and_the_last_x0() -> None:
    step, given, seen = Step(), arguments(4), []
    sample(step, **{**given, "guidance": np.arange(4.0)}, on_step=lambda t, steps: seen.append((t, steps)))
    assert seen == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert not step.calls[0]["previous_x0"].any()
    for t, call in enumerate(step.calls):
        np.testing.assert_array_equal(call["row"], given["tables"]["row"][t])
        np.testing.assert_array_equal(call["noise"], given["noise"](t))
        assert call["guidance"].shape == () and call["guidance"].dtype == np.float32 and call["guidance"] == t
        assert call["coefficients"].shape == (6,) and call["coefficients"].dtype == np.float32


def test_sample_draws_no_noise_that_the_solver_does_not_use() -> None:
    given = arguments(4)
    given["coefficients"][[0, 2], 5] = 0
    asked: list[int] = []

    def noise(index: int) -> NDArray[Any]:
        asked.append(index)
        return np.ones(SHAPE, np.float32)

    step = Step()
    sample(step, **{**given, "noise": noise})
    assert asked == [1, 3]
    assert not step.calls[0]["noise"].any() and step.calls[0]["noise"].shape == SHAPE


def test_sample_does_not_write_into_its_arguments() -> None:
    given = arguments()
    kept = given["latents"].copy()
    given["latents"].setflags(write=False)
    sample(Step(), **given)
    np.testing.assert_array_equal(given["latents"], kept)


def test_sample_stops_within_the_step_that_raises() -> None:
    step = Step()

    def stop(t: int, steps: int) -> None:
        if t == 1:
            raise Cancelled("stop")

    with pytest.raises(Cancelled):
        sample(step, **arguments(5), on_step=stop)
    assert len(step.calls) == 2


@pytest.mark.parametrize(
    "change, message",
    [
        ({"coefficients": np.zeros((5, 5))}, r"coefficients are \(5, 5\)"),
        ({"coefficients": np.zeros((0, 6))}, r"coefficients are \(0, 6\)"),
        ({"guidance": np.ones(4)}, r"guidance is \(4,\) for 5 steps"),
        ({"tables": {"row": np.zeros((4, 2))}}, "`row` has 4 rows; the solver has 5"),
    ],
    ids=["columns", "no steps", "guidance", "table"],
)
def test_sample_refuses_lengths_that_differ(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        sample(Step(), **{**arguments(5), **change})


def test_dynamic_guidance_is_that_of_diffusers_pipeline() -> None:
    import math

    timesteps = [999, 959, 519, 39]
    want = [1 + 3.0 * ((1 - math.cos(math.pi * ((4 - t) / 4) ** 5.0)) / 2) for t in timesteps]
    assert dynamic_guidance(3.0, timesteps) == want
