"""Solver rows against diffusers' own schedulers, and the rewritten step against the plain one over a whole schedule."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler, CogVideoXTransformer3DModel, DDPMScheduler

from motionrt.export.compiler.partition import partition
from motionrt.export.systems.cogvideox_step import INPUTS, CogVideoXStep, solver_rows
from motionrt.export.systems.motionrag import install_cogvideox_adapter

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


def test_solver_rows_refuse_other_schedulers() -> None:
    with pytest.raises(TypeError, match="DDPMScheduler"):
        solver_rows(DDPMScheduler(), 4)


@pytest.mark.parametrize("rotary", [True, False], ids=["rope", "sincos"])
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
        shapes = [frames, frames, frames, (6,), (), None, text, text, (batch, 5, 24), frames, ()]
        return {
            name: torch.tensor([500]) if shape is None else torch.randn(shape)
            for name, shape in zip(INPUTS, shapes, strict=True)
        }

    batch = torch.export.Dim("batch", min=1, max=8)
    example = feed(2)
    shapes = tuple({0: batch} if value.ndim > 1 else {} for value in example.values())
    cut = partition(step, tuple(example.values()), INPUTS, outputs=("next", "x0"), dynamic_shapes=shapes)
    assert sum(f.rule == "reassociate" for f in cut.fired) == 2  # one adapter per block

    timesteps, rows = solver_rows(CogVideoXDPMScheduler(**CONFIG), 8)
    for size in (1, 3):  # sizes that were not traced
        env = feed(size) | {"guidance": torch.tensor(3.0), "motion_scale": torch.tensor(0.8)}
        plain = (env["latents"], torch.zeros_like(env["latents"]))
        ours = tuple(part.clone() for part in plain)
        with torch.no_grad():
            request = dict(
                zip(cut.request.outputs, cut.request.module(*(env[n] for n in cut.request.inputs)), strict=True)
            )
            for timestep, row in zip(timesteps, rows, strict=True):
                env |= {"timestep": torch.tensor([int(timestep)]), "coefficients": torch.from_numpy(row)}
                env["noise"] = torch.randn_like(env["noise"])
                plain = step(**(env | {"latents": plain[0], "previous_x0": plain[1]}))
                tables = dict(zip(cut.schedule.outputs, cut.schedule.module(env["timestep"]), strict=True))
                state = env | request | tables | {"latents": ours[0], "previous_x0": ours[1]}
                ours = cut.step.module(*(state[n] for n in cut.step.inputs))
        torch.testing.assert_close(ours[0], plain[0], atol=1e-4, rtol=1e-5)
