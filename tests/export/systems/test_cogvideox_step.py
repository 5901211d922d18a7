"""Solver rows against diffusers' own schedulers, and the rewritten step against the plain one over a whole schedule."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler, CogVideoXTransformer3DModel, DDPMScheduler

from motionrt.export.compiler.partition import partition
from motionrt.export.systems import svd_step as svd
from motionrt.export.systems.cogvideox_step import INPUTS, CogVideoXStep, solver_rows
from motionrt.export.systems.motionrag import install_cogvideox_adapter
from motionrt.export.systems.steps import cogvideox_step, step_args, svd_step

CONFIG: dict[str, Any] = {
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "snr_shift_scale": 1.0,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
}


@pytest.mark.parametrize("steps", [2, 3, 8, 25, 50])
@pytest.mark.parametrize("kind", [CogVideoXDDIMScheduler, CogVideoXDPMScheduler])
def test_solver_rows_follow_the_scheduler_step_by_step(kind: Any, steps: int) -> None:
    scheduler = kind(**CONFIG)
    timesteps, rows = solver_rows(scheduler, steps)
    assert timesteps.tolist() == scheduler.timesteps.tolist()
    assert np.isfinite(rows).all()
    torch.manual_seed(0)
    sample, previous = torch.randn(40), None
    ours, our_previous = sample.clone(), torch.zeros(40)
    draws = torch.Generator().manual_seed(5)
    for index, row in enumerate(torch.from_numpy(rows)):
        output = torch.randn(40)
        before = draws.get_state()
        if kind is CogVideoXDDIMScheduler:
            sample, previous = scheduler.step(output, scheduler.timesteps[index], sample, return_dict=False)
            noise = torch.randn(40)  # its coefficient must be 0
        else:
            back = scheduler.timesteps[index - 1] if index else None
            sample, previous = scheduler.step(
                output, previous, scheduler.timesteps[index], back, sample, generator=draws, return_dict=False
            )
            replay = torch.Generator()
            replay.set_state(before)
            noise = torch.randn(40, generator=replay)
            if 0 < index < steps - 1 or not torch.equal(replay.get_state(), draws.get_state()):
                noise = torch.randn(40, generator=replay)  # the multistep branch discards its first draw
        p0, p1, c0, c1, c2, c3 = row
        x0 = p0 * ours + p1 * output
        ours = c0 * ours + c1 * x0 + c2 * our_previous + c3 * noise
        our_previous = x0
        assert previous is not None
        torch.testing.assert_close(x0, previous, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours, sample, atol=1e-4, rtol=1e-4)


def test_dpm_rows_use_the_earlier_prediction_and_noise() -> None:
    _, rows = solver_rows(CogVideoXDPMScheduler(**CONFIG), 8)
    assert (rows[2:-1, 4] != 0).all() and (rows[1:-1, 5] != 0).all()
    _, rows = solver_rows(CogVideoXDDIMScheduler(**CONFIG), 8)
    assert (rows[:, 4:] == 0).all()


@pytest.mark.parametrize("kind", [CogVideoXDDIMScheduler, CogVideoXDPMScheduler])
def test_every_count_ends_on_x0_and_the_release_at_these_does_not(kind: Any) -> None:
    odd = []
    for steps in range(2, 51):
        (_, ours), (_, released) = (solver_rows(kind(**CONFIG), steps, ending) for ending in ("x0", "released"))
        np.testing.assert_allclose(ours[-1, 2:], [0, 1, 0, 0], atol=1e-6)
        np.testing.assert_array_equal(ours[:-1], released[:-1])
        if not np.array_equal(ours[-1], released[-1]):
            odd.append(steps)
    assert odd == [6, 7, 11, 13, 15, 17, 18, 19, 21, 24, 28, 35, 36, 39, 42, 44, 46, 48]
    with pytest.raises(ValueError, match="allowed: x0, released"):
        solver_rows(kind(**CONFIG), 8, "other")


def test_solver_rows_refuse_other_schedulers() -> None:
    with pytest.raises(TypeError, match="DDPMScheduler"):
        solver_rows(DDPMScheduler(), 4)


@pytest.mark.parametrize("rotary", [pytest.param(True, id="rope"), pytest.param(False, id="sincos", marks=pytest.mark.slow)])
def test_rewritten_denoiser_equals_the_plain_one_over_all_steps(rotary: bool) -> None:
    torch.manual_seed(0)
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=32, in_channels=8, out_channels=4, time_embed_dim=32, text_embed_dim=16,
        num_layers=2, sample_width=8, sample_height=8, sample_frames=9, patch_size=2, max_text_seq_length=6,
        use_rotary_positional_embeddings=rotary,
    )  # fmt: skip
    install_cogvideox_adapter(transformer, 24)
    step = CogVideoXStep(transformer, torch.randn(1, 5, 24), (3, 4, 8, 8)).eval()

    def feed(batch: int) -> dict[str, torch.Tensor]:
        frames, text = (batch, 3, 4, 8, 8), (batch, 6, 16)
        shapes = [frames, frames, frames, (batch, 6), (batch,), None, text, text, (batch, 5, 24), frames, (batch,)]
        return {
            name: torch.randint(0, 1000, (batch,)) if shape is None else torch.randn(shape)
            for name, shape in zip(INPUTS, shapes, strict=True)
        }

    batch = torch.export.Dim("batch", min=1, max=8)
    example = feed(2)
    shapes = tuple({0: batch} for _ in example)
    cut = partition(step, tuple(example.values()), INPUTS, outputs=("next", "x0"), dynamic_shapes=shapes)
    assert sum(f.rule == "reassociate" for f in cut.fired) == 2  # one adapter per block
    assert {h.shape[0] for h in cut.hoisted if h.kind == "schedule"} == {1}  # of one request: no row for a half of guidance

    timesteps, rows = solver_rows(CogVideoXDPMScheduler(**CONFIG), 8)
    for size in (1, 2, 3):  # each row at a step, guidance and scale of its own
        env = feed(size) | {"guidance": 3.0 + torch.arange(size), "motion_scale": 0.8 - torch.arange(size) / 3}
        plain = (env["latents"], torch.zeros_like(env["latents"]))
        ours = tuple(part.clone() for part in plain)
        with torch.no_grad():
            tables = dict(zip(cut.schedule.outputs, cut.schedule.module(torch.from_numpy(timesteps)), strict=True))
            request = dict(
                zip(cut.request.outputs, cut.request.module(*(env[n] for n in cut.request.inputs)), strict=True)
            )
            for index in range(len(timesteps)):
                at = [(index + 3 * row) % len(timesteps) for row in range(size)]
                env |= {"timestep": torch.from_numpy(timesteps[at]), "coefficients": torch.from_numpy(rows[at])}
                env["noise"] = torch.randn_like(env["noise"])
                plain = step(**(env | {"latents": plain[0], "previous_x0": plain[1]}))
                state = env | request | {name: table[at] for name, table in tables.items()}
                state |= {"latents": ours[0], "previous_x0": ours[1]}
                ours = cut.step.module(*(state[n] for n in cut.step.inputs))
        torch.testing.assert_close(ours[0], plain[0], atol=1e-4, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["cogvideox tiny", "svd tiny"])
def test_rows_of_a_batch_are_what_they_are_alone(model: str, counts: ModuleType) -> None:
    """The plain step: the rows of one call are requests at steps, and with numbers, of their own."""
    make, config, inputs, latents = {
        "cogvideox tiny": (cogvideox_step, counts.COGVIDEOX, INPUTS, (3, 4, 6, 8)),
        "svd tiny": (svd_step, counts.UNET, svd.INPUTS, (3, 4, 8, 16)),
    }[model]
    step: Any = make(config, latents=latents, motion=counts.MOTION)  # type: ignore[operator]
    draw = torch.Generator().manual_seed(0)
    state = {
        name: torch.randn(value.shape, generator=draw) * 0.3 if value.ndim == 1 else
        torch.randn(value.shape, generator=draw) * value[0].numel() ** -0.5
        for name, value in step.named_parameters()
    }  # fmt: skip
    step.load_state_dict(state, strict=False, assign=True)
    args = step_args(inputs, config, latents, counts.MOTION)
    feed = {name: torch.randn((3, *value.shape[1:]), generator=draw) for name, value in args.items()}
    feed["timestep"] = torch.tensor([999, 400, 3]) if inputs is INPUTS else torch.tensor([0.9, 0.4, -1.2])
    with torch.no_grad():
        together = step(**feed)
        cut = partition(
            step, tuple(feed.values()), inputs, outputs=("next", "x0"),
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=4)},) * len(feed),
        )  # fmt: skip
        known = dict(feed)
        for program in cut.programs.values():
            known.update(zip(program.outputs, program.module(*(known[n] for n in program.inputs)), strict=True))
        for row in range(3):
            alone = step(**{name: value[row : row + 1] for name, value in feed.items()})
            for whole, one in zip(together, alone, strict=True):
                torch.testing.assert_close(whole[row : row + 1], one, atol=1e-5, rtol=1e-5)
    for name, whole in zip(("next", "x0"), together, strict=True):
        torch.testing.assert_close(known[name], whole, atol=1e-5, rtol=1e-5)
