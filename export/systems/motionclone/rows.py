"""When MotionClone guides, and how strongly: its uneven timesteps, and the solver's rows that are made of them.

    alphas, prediction = noise_schedule(scheduler_config)
    table = rows(RELEASED["camera"], alphas, prediction)            # [100, 12]
    table = rows(RELEASED["camera"].shortened(25), alphas, prediction)

MotionClone (arXiv 2406.05338) spends many steps on the noisy end, guided, and few on the rest. A step reads one row:

    x0     = x0_latents x + x0_output out                  (out: the network's output after classifier-free guidance)
    eps    = eps_latents x + eps_output out
    x_next = next_x0 x0 + next_output eps - next_gradient g

g is the gradient of `weight` x energy with respect to x. Only the direction term carries it (x0 is the unguided one), so that
a step goes down by sqrt((1 - a)(1 - a_next)) g, about g itself: strength does not shrink with the length of a step, and fewer
guided steps need a larger weight. a is the share of signal ("alpha bar") at a timestep, 1 behind the last.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from motionrt.export.systems.system import Schedules

COLUMNS = (
    "graph", "timestep", "guidance", "motion_scale", "weight", "x0_latents", "x0_output", "eps_latents", "eps_output",
    "next_x0", "next_output", "next_gradient",
)  # fmt: skip
GUIDED, PLAIN = 0, 1  # values of the column `graph`
# The release computes eps_c + 7.5 (eps_c - eps_u); as the scale g of eps_u + g (eps_c - eps_u) that is 8.5.
GUIDANCE = 8.5
PREDICTIONS = ("epsilon", "v_prediction")
SHORT = (20, 25, 30, 40, 50)  # steps of the shortened schedules


@dataclass(frozen=True)
class Recipe:
    """A configuration of the release. `steps`: all of them, of which the first `guided` are spread over the noisiest `share`
    of the timesteps. `weight`: of the energy (lambda), which rises over `warm_up` guided steps and falls over `cool_down`.

    """

    steps: int
    guided: int
    share: float
    weight: float = 2000.0
    warm_up: int = 10
    cool_down: int = 10

    def timesteps(self, trained: int = 1000) -> NDArray[np.int64]:
        """All timesteps, descending, `[steps]`; the next of a step is the next entry. ValueError where there are not enough."""
        refused = ValueError(f"{self} does not fit {trained} timesteps: no two steps may have the same one")
        if not 0 <= self.guided <= self.steps:
            raise refused
        border = int((1 - self.share) * trained)
        noisy = np.linspace(border, trained - 1, self.guided).round()[::-1]
        rest = np.linspace(0, border - 1, self.steps - self.guided).round()[::-1]
        made = np.concatenate([noisy, rest]).astype(np.int64)
        if (np.diff(made) >= 0).any():
            raise refused
        return made

    def factors(self) -> NDArray[np.float64]:
        """What the weight is multiplied by in each guided step, `[guided]`: both ramps, also where they overlap."""
        i = np.arange(self.guided)
        up = np.where(i < self.warm_up, (i + 1) / max(self.warm_up, 1), 1.0)
        return up * np.where(i > self.guided - self.cool_down, (self.guided - i) / max(self.cool_down, 1), 1.0)

    def shortened(self, steps: int) -> Recipe:
        """The same with fewer steps: as many of them guided by share, and a weight that sums to the same over the ramps.

        An estimate, not the release's. Ramps take a fifth of the guided steps each, or less where the recipe's own are shorter.
        """
        guided = max(1, round(self.guided * steps / self.steps))
        warm_up, cool_down = (min(length, guided // 5) for length in (self.warm_up, self.cool_down))
        short = replace(self, steps=steps, guided=guided, warm_up=warm_up, cool_down=cool_down)
        return replace(short, weight=self.weight * float(self.factors().sum() / short.factors().sum()))


# By what is followed (camera, object; from text), and by what a clip begins with (an image, a sketch).
RELEASED: Mapping[str, Recipe] = {
    "camera": Recipe(100, 50, 0.3), "object": Recipe(300, 180, 0.4), "image": Recipe(100, 40, 0.3),
    "sketch": Recipe(200, 120, 0.4),
}  # fmt: skip


def noise_schedule(config: Mapping[str, Any]) -> tuple[NDArray[np.float64], str]:
    """(shares of signal by timestep, `[1000]`; what the network predicts) of a base model's `scheduler_config.json`.

    The betas are linear whatever the file says: Stable Diffusion's are not, and AnimateDiff's motion modules were trained so.
    ValueError for a prediction that rows are not known for.
    """
    from diffusers import DDIMScheduler

    settings = {key: value for key, value in config.items() if not key.startswith("_")}
    scheduler = DDIMScheduler.from_config({**settings, "beta_schedule": "linear", "trained_betas": None})
    prediction = str(scheduler.config.prediction_type)
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction_type is {prediction!r}; allowed: {', '.join(PREDICTIONS)}")
    return scheduler.alphas_cumprod.double().numpy(), prediction


def read(signal: NDArray[np.float64], prediction: str) -> list[NDArray[np.float64]]:
    """What latents x and output o say at shares of signal `[steps]`: x0 = a x + b o and eps = c x + d o; a, b, c, d.

    ValueError for a prediction that is none of PREDICTIONS.
    """
    noise = 1 - signal
    if prediction == "epsilon":
        return [1 / np.sqrt(signal), -np.sqrt(noise / signal), np.zeros_like(signal), np.ones_like(signal)]
    if prediction == "v_prediction":
        return [np.sqrt(signal), -np.sqrt(noise), np.sqrt(noise), np.sqrt(signal)]
    raise ValueError(f"prediction is {prediction!r}; allowed: {', '.join(PREDICTIONS)}")


def rows(
    recipe: Recipe, alphas: NDArray[np.float64], prediction: str = "epsilon", guidance: float = GUIDANCE
) -> NDArray[np.float32]:
    """Rows of `COLUMNS`, float32 `[steps, 12]`. `guidance`: the scale g of eps_u + g (eps_c - eps_u)."""
    times = recipe.timesteps(len(alphas))
    signal = alphas[times]
    following, ones = np.append(signal[1:], 1.0), np.ones(recipe.steps)
    plain = np.arange(recipe.steps) >= recipe.guided
    weight = np.zeros(recipe.steps)
    weight[: recipe.guided] = recipe.weight * recipe.factors()
    columns = [
        np.where(plain, PLAIN, GUIDED), times, guidance * ones, ones, weight, *read(signal, prediction),
        np.sqrt(following), np.sqrt(1 - following), np.sqrt((1 - following) * (1 - signal)),
    ]  # fmt: skip
    return np.column_stack(columns).astype(np.float32)


def released_schedules(
    alphas: NDArray[np.float64], prediction: str, names: Iterable[str] = RELEASED, steps: Iterable[int] = SHORT
) -> Schedules:
    """Rows of the release's configurations `names`, each by its name with its own number of steps; and, as `NAME_short`, of
    fewer `steps` with the weight made larger."""
    made: dict[str, Mapping[int, NDArray[np.float32]]] = {}
    short = tuple(steps)
    for name in names:
        recipe = RELEASED[name]
        made[name] = {recipe.steps: rows(recipe, alphas, prediction)}
        made[f"{name}_short"] = {count: rows(recipe.shortened(count), alphas, prediction) for count in short}
    return made
