"""The rewritten steps in the dtypes they ship in: no further from the fp32 module than the plain module of that dtype."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from by_path import load_by_path  # noqa: E402

from motionrt.export.compiler.partition import Partition, partition  # noqa: E402
from motionrt.export.systems import cogvideox as cogvideox_system  # noqa: E402
from motionrt.export.systems import cogvideox_step as cogvideox  # noqa: E402
from motionrt.export.systems import svd as svd_system  # noqa: E402
from motionrt.export.systems import svd_step as svd  # noqa: E402
from motionrt.export.systems.split import PARTS, Combined, Conditional  # noqa: E402
from motionrt.export.systems.steps import OUTPUTS, Latents, cogvideox_step, step_args, step_inputs, svd_step  # noqa: E402
from motionrt.export.systems.system import Network, Range  # noqa: E402

models = load_by_path(Path(__file__).resolve().parents[3] / "tests/helpers/tiny_models.py")
MOTION = (5, 64)
MODELS: dict[str, tuple[Callable[..., Any], Any, dict[str, Any], Latents]] = {
    "cogvideox": (cogvideox_step, cogvideox.INPUTS, models.cogvideox_config(3, heads=2), (3, 4, 4, 8)),
    "svd": (svd_step, svd.INPUTS, models.UNET, (3, 4, 8, 8)),
}
# Fewer roundings than the plain form should have less error; a tenth is left for the luck of one draw.
ALLOWED = 1.1


def drawn(make: Callable[..., Any], config: dict[str, Any], latents: Latents, dtype: Any) -> Any:
    """The step with weights that are exact in bfloat16 and float16, so that every dtype computes with the same."""
    tokens = torch.randn(1, *MOTION, generator=torch.Generator().manual_seed(2)).half().bfloat16().float()
    step = make(config, latents=latents, motion=MOTION, dtype=dtype, unconditional=tokens)
    real = {name: torch.empty(value.shape) for name, value in step.named_parameters()}
    holder = torch.nn.ParameterDict({name.replace(".", "/"): torch.nn.Parameter(value) for name, value in real.items()})
    models.randomise(holder)
    state = {name.replace("/", "."): value.detach().bfloat16().half().to(dtype) for name, value in holder.items()}
    if "transformer.patch_embed.pos_embedding" in step.state_dict():
        state["transformer.patch_embed.pos_embedding"] = step.state_dict()["transformer.patch_embed.pos_embedding"]
    step.load_state_dict(state, strict=False, assign=True)
    return step


def request(inputs: Any, config: dict[str, Any], latents: Latents) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(1)
    values = {name: torch.randn(v.shape, generator=draw) for name, v in step_args(inputs, config, latents, MOTION).items()}
    time = torch.tensor([500]) if inputs is cogvideox.INPUTS else torch.tensor([0.4])
    fixed = {"coefficients": torch.tensor([[0.8, -0.6, 0.7, 0.3, 0.0, 0.0]]), "guidance": torch.tensor([3.0])}
    return {**values, **fixed, "timestep": time, "motion_scale": torch.tensor([1.0])}


def rewritten(cut: Partition, values: dict[str, Any]) -> list[Any]:
    known = dict(values)
    for program in (cut.schedule, cut.request, cut.step):
        results = program.module(*(known[name] for name in program.inputs))
        known |= dict(zip(program.outputs, results, strict=True))
    return [known[name] for name in OUTPUTS]


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=["bfloat16", "float16"]
)
@pytest.mark.parametrize("model", ["cogvideox", pytest.param("svd", marks=pytest.mark.slow)])
def test_the_rewritten_step_loses_no_more_than_the_plain_one(model: str, dtype: Any, record_property: Any) -> None:
    make, inputs, config, latents = MODELS[model]
    values = request(inputs, config, latents)
    with torch.no_grad():
        exact = drawn(make, config, latents, torch.float32)(**values)
        module = drawn(make, config, latents, dtype)
        plain = module(**values)
        ours = rewritten(partition(module, tuple(values[name] for name in inputs), inputs, outputs=OUTPUTS), values)

    def error(got: Any, want: Any) -> float:
        return float((got.double() - want.double()).norm() / want.double().norm())

    for name, want, theirs, own in zip(OUTPUTS, exact, plain, ours, strict=True):
        plain_error, own_error = error(theirs, want), error(own, want)
        print(f"{model} {dtype} {name}: plain {plain_error:.2e}, rewritten {own_error:.2e}")
        record_property(f"{name}: plain, rewritten", (plain_error, own_error))
        assert plain_error > 0 and own_error <= ALLOWED * plain_error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("model", MODELS)
@torch.no_grad()
def test_the_parts_of_a_step_give_what_the_whole_gives(model: str, dtype: Any) -> None:
    """Two calls for the branches and one that puts them together; with guidance 1 one call is enough."""
    make, inputs, config, latents = MODELS[model]
    branch_of = {"cogvideox": cogvideox_system.branch_of, "svd": svd_system.branch_of}[model]
    part, whole = (drawn(partial(make, branch=branch), config, latents, dtype) for branch in (True, False))
    exact = drawn(make, config, latents, torch.float32)
    branch = branch_of(Network(part), part, step_inputs(inputs, config, latents, MOTION))
    makes, combined = branch.unconditional(Range(1, 1, 4)).network.module, Combined(branch.strength)
    for guidance in (3.0, 1.0):
        values = {**request(inputs, config, latents), "guidance": torch.tensor([guidance])}
        made = values | dict(zip(branch.makes, makes(*(values[name] for name in branch.makes.values())), strict=True))
        vs = [part(**{name: made[reads.get(name, name)] for name in branch.inputs}) for reads in (branch.reads, {})]
        solver = {name: values[name] for name in ("latents", "previous_x0", "noise", "coefficients")}
        ours = combined(**solver, guidance=values["guidance"], **dict(zip(PARTS, vs, strict=True)))
        alone = Conditional()(**solver, conditioned=vs[1])
        for index, (plain, want) in enumerate(zip(whole(**values), exact(**values), strict=True)):
            lost = (plain - want).abs().max()
            for got in (ours[index], *([alone[index]] if guidance == 1 else [])):
                assert got.dtype == plain.dtype and (got - want).abs().max() <= ALLOWED * lost + 1e-5 * want.abs().max()
