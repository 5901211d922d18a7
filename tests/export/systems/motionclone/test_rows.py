"""MotionClone's uneven timesteps and rows against the released functions' numbers (tests/golden/motionclone)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from safetensors.numpy import load_file

from motionrt.export.systems.motionclone.rows import (
    COLUMNS,
    GUIDANCE,
    RELEASED,
    SHORT,
    Recipe,
    noise_schedule,
    released_schedules,
    rows,
)

GOLDEN = Path(__file__).resolve().parents[3] / "golden" / "motionclone"
SCHEDULES: dict[str, Any] = json.loads((GOLDEN / "schedules.json").read_text())
# Stable Diffusion's own betas are not linear
SCHEDULER = {"_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TINY = Recipe(10, 5, 0.3, 100, 3, 3)
NAMES = {"camera": "t2v_camera", "object": "t2v_object", "image": "i2v_rgb", "sketch": "i2v_sketch"}


def column(table: Any, name: str) -> Any:
    return table[:, COLUMNS.index(name)]


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "alpha_bar"])
def test_timesteps_and_factors_are_the_released_ones(name: str) -> None:
    said = SCHEDULES[name]
    recipe = Recipe(said["N"], said["G"], said["r"], said["lam"], said["warm_up_steps"], said["cool_up_steps"])
    assert recipe.timesteps().tolist() == said["timesteps"] and [*said["timesteps"][1:], -1] == said["prev_timesteps"]
    np.testing.assert_allclose(recipe.factors(), said["s"], atol=1e-12)
    table = rows(recipe, noise_schedule(SCHEDULER)[0])
    assert column(table, "timestep").tolist() == said["timesteps"]
    assert column(table, "graph").tolist() == [0] * said["G"] + [1] * (said["N"] - said["G"])
    np.testing.assert_allclose(column(table, "weight")[: said["G"]], said["lam"] * np.array(said["s"]), rtol=1e-6)
    assert not column(table, "weight")[said["G"] :].any()


def test_released_configurations_are_those_of_the_release() -> None:
    for ours, theirs in NAMES.items():
        said, recipe = SCHEDULES[theirs], RELEASED[ours]
        assert [recipe.steps, recipe.guided, recipe.share, recipe.weight] == [said[key] for key in ("N", "G", "r", "lam")]
        assert [recipe.warm_up, recipe.cool_down] == [said["warm_up_steps"], said["cool_up_steps"]]
        assert recipe.factors().sum() == pytest.approx(said["sum_s"])


def test_noise_is_that_of_animatediff_and_not_that_of_the_base() -> None:
    alphas, prediction = noise_schedule(SCHEDULER)
    said = {int(t): value for t, value in SCHEDULES["alpha_bar"].items() if t != "-1"}
    np.testing.assert_allclose(alphas[list(said)], list(said.values()), rtol=1e-6)
    assert prediction == "epsilon"
    with pytest.raises(ValueError, match="prediction_type is 'sample'; allowed: epsilon, v_prediction"):
        noise_schedule({**SCHEDULER, "prediction_type": "sample"})


@pytest.mark.parametrize(("file", "index"), [("guided_step", 1), ("plain_step", 5)])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_row_makes_the_released_step(file: str, index: int, prediction: str) -> None:
    golden = load_file(GOLDEN / f"{file}.safetensors")
    alphas, _ = noise_schedule(SCHEDULER)
    row = dict(zip(COLUMNS, rows(TINY, alphas, prediction)[index].astype(np.float64), strict=True))
    x, unconditional, conditional = (golden[name].astype(np.float64) for name in ("x_t", "eps_u", "eps_c"))
    epsilon = unconditional + row["guidance"] * (conditional - unconditional)
    np.testing.assert_allclose(epsilon, golden["eps_cfg"], atol=1e-5)
    assert row["guidance"] == golden["w"].item() + 1 == GUIDANCE and row["timestep"] == golden["t"].item()
    signal = alphas[golden["t"].item()]
    output = epsilon
    if prediction == "v_prediction":
        output = (epsilon - np.sqrt(1 - signal) * x) / np.sqrt(signal)
    x0 = row["x0_latents"] * x + row["x0_output"] * output
    direction = row["eps_latents"] * x + row["eps_output"] * output
    np.testing.assert_allclose(direction, epsilon, atol=1e-4)
    following = row["next_x0"] * x0 + row["next_output"] * direction
    if file == "guided_step":
        assert row["weight"] == pytest.approx(golden["lam"].item() * golden["s"].item())
        following = following - row["next_gradient"] * golden["grad"]
    np.testing.assert_allclose(following, golden["x_prev"], atol=1e-4, rtol=1e-5)


def test_shortened_schedules_spend_the_same_weight_on_fewer_steps() -> None:
    made = released_schedules(*noise_schedule(SCHEDULER), names=("camera", "sketch"))
    assert list(made) == ["camera", "camera_short", "sketch", "sketch_short"]
    assert list(made["camera"]) == [100] and tuple(made["sketch_short"]) == SHORT
    for name in ("camera", "sketch"):
        recipe, whole = RELEASED[name], made[name][RELEASED[name].steps]
        for count, table in made[f"{name}_short"].items():
            assert table.shape == (count, len(COLUMNS)) and table.dtype == np.float32
            assert column(table, "weight").sum() == pytest.approx(column(whole, "weight").sum(), rel=1e-5)
            assert (column(table, "graph") == 0).mean() == pytest.approx(recipe.guided / recipe.steps, abs=0.5001 / count)
    assert RELEASED["camera"].shortened(20) == Recipe(20, 10, 0.3, pytest.approx(2000 * 41 / 9), 2, 2)


def test_recipes_with_more_steps_than_timesteps_are_refused() -> None:
    for recipe in (Recipe(400, 301, 0.3), Recipe(800, 20, 0.3), Recipe(10, 11, 0.3)):
        with pytest.raises(ValueError, match="does not fit 1000 timesteps"):
            recipe.timesteps()
    # one guided step is on both ramps; and there need be no ramps
    assert Recipe(1, 1, 0.3).factors().tolist() == pytest.approx([0.01])
    assert Recipe(4, 2, 0.3, 1, 0, 0).factors().tolist() == [1, 1]
