"""The CogVideoX denoiser as one function: classifier-free guidance and the solver update are part of the step.

Every input is declared with what it depends on (`INPUTS`), which is all the compiler pass needs to know.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType, MethodType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from motionrt.export.systems.rows import guided, like, paired, repeated, solved

INPUTS: Mapping[str, str] = MappingProxyType(
    {
        "latents": "step",
        "previous_x0": "step",
        "noise": "step",
        "coefficients": "step",
        "guidance": "step",
        "timestep": "schedule",
        "text": "request",
        "negative_text": "request",
        "motion": "request",
        "image_latents": "request",
        "motion_scale": "request",
    }
)


def rotary_tables(config: Any, frames: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """RoPE (cos, sin), each `[F * H/p * W/p, d]` fp32, for a latent grid; as diffusers' CogVideoX pipeline makes them."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

    patch = config.patch_size
    base_height, base_width = config.sample_height // patch, config.sample_width // patch
    grid = (height // patch, width // patch)
    crops = get_resize_crop_region_for_grid(grid, base_width, base_height)
    cos, sin = get_3d_rotary_pos_embed(
        embed_dim=config.attention_head_dim, crops_coords=crops, grid_size=grid, temporal_size=frames
    )
    return cos, sin


def fix_positions(patch_embed: Any, frames: int, height: int, width: int, rule: str = "released") -> None:
    """Make the table that diffusers adds to a latent grid of F, H, W a buffer, computed now and not in every trace.

    `released` is what diffusers does: the learned (or stored) table where the grid is the config's, else a sine-cosine
    table made for the grid. So MotionRAG's 17 frames do NOT use the positions that CogVideoX-5B-I2V learned at 49.
    `learned` takes the beginning of the learned table instead: other numbers, for those who trained so.
    """
    if rule not in ("released", "learned"):
        raise ValueError(f"positions is {rule!r}; allowed: released, learned.")
    if not (patch_embed.use_positional_embeddings or patch_embed.use_learned_positional_embeddings):
        return
    pixels = (frames - 1) * patch_embed.temporal_compression_ratio + 1
    native = (patch_embed.sample_height, patch_embed.sample_width, patch_embed.sample_frames) == (height, width, pixels)
    if patch_embed.use_learned_positional_embeddings and (native or rule == "learned"):
        rows = patch_embed.max_text_seq_length + frames * (height // patch_embed.patch_size) * (width // patch_embed.patch_size)
        if not native:
            first = lambda self, *args, **kwargs: self.pos_embedding[:, :rows]  # noqa: E731
            patch_embed._get_positional_embeddings = MethodType(first, patch_embed)  # a method: a deep copy has its own table
        return
    table = patch_embed._get_positional_embeddings(height, width, pixels).float()
    patch_embed.register_buffer("grid_positions", table, persistent=False)
    patch_embed._get_positional_embeddings = MethodType(lambda self, *args, **kwargs: self.grid_positions, patch_embed)
    patch_embed.sample_frames = 0  # no grid is the config's any more: always the table above


class CogVideoXStep(nn.Module):
    """One denoising step of a CogVideoX image-to-video transformer with Motion-Adapters.

    Guidance v = v_u + g (v_c - v_u), then the solver's update with a row of `solver_rows`: see rows.py.
    B batch, F C H W latent frames, channels, height, width.
    """

    def __init__(
        self,
        transformer: nn.Module,
        unconditional_motion: Tensor,
        latents: tuple[int, int, int, int],
        positions: str = "released",
    ) -> None:
        """`unconditional_motion [1, M, D]`; `latents` (F, C, H, W), the fixed grid that positions are made for, by the
        rule `positions` (see `fix_positions`)."""
        super().__init__()
        self.transformer = transformer
        fix_positions(transformer.patch_embed, latents[0], latents[2], latents[3], positions)
        self.register_buffer("unconditional_motion", unconditional_motion)
        config: Any = transformer.config
        self.rotary = bool(config.use_rotary_positional_embeddings)
        if self.rotary:
            cos, sin = rotary_tables(config, latents[0], latents[2], latents[3])
            self.register_buffer("rope_cos", cos, persistent=False)
            self.register_buffer("rope_sin", sin, persistent=False)

    def forward(
        self,
        latents: Tensor,
        previous_x0: Tensor,
        noise: Tensor,
        coefficients: Tensor,
        guidance: Tensor,
        timestep: Tensor,
        text: Tensor,
        negative_text: Tensor,
        motion: Tensor,
        image_latents: Tensor,
        motion_scale: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """`latents`, `previous_x0`, `noise`, `image_latents` `[B, F, C, H, W]`; `coefficients [B, 6]`; `guidance [B]`;
        `timestep [B]` int64; `text`, `negative_text` `[B, Lt, Dt]`; `motion [B, M, D]`; `motion_scale [B]`
        -> (next latents, x0), both `[B, F, C, H, W]`. Row b is of request b, which may be at a step of its own.
        """
        unconditional: Tensor = self.unconditional_motion  # type: ignore[assignment]
        sample = repeated(torch.cat([latents, image_latents], dim=2), 2)
        tokens = paired(unconditional.expand(latents.shape[0], -1, -1), motion.to(unconditional.dtype))
        output = self.network(sample, repeated(timestep, 2), paired(negative_text, text), tokens, repeated(motion_scale, 2))
        return solved(coefficients, latents, guided(output, like(guidance, latents)), previous_x0, noise)

    def network(self, sample: Tensor, timestep: Tensor, text: Tensor, motion: Tensor, scale: Tensor) -> Tensor:
        """The transformer on rows of `sample [n, F, 2 C, H, W]` -> v, `[n, F, C, H, W]` in the dtype of `sample`."""
        unconditional: Tensor = self.unconditional_motion  # type: ignore[assignment]
        kind = unconditional.dtype  # of the weights; guidance and solver keep what came in, fp32 in a bundle
        tokens = motion.to(kind)
        output: Tensor = self.transformer(
            hidden_states=sample.to(kind),
            encoder_hidden_states=text.to(kind),
            timestep=timestep,
            image_rotary_emb=(self.rope_cos, self.rope_sin) if self.rotary else None,
            attention_kwargs={"motion": tokens, "motion_scale": like(scale.to(kind), tokens)},
            return_dict=False,
        )[0]
        return output.to(sample.dtype)


BRANCH: Mapping[str, str] = MappingProxyType(
    {name: INPUTS[name] for name in ("latents", "timestep", "text", "motion", "image_latents", "motion_scale")}
)


class CogVideoXBranch(CogVideoXStep):
    """The network of the step for one branch of guidance."""

    def forward(  # type: ignore[override]
        self, latents: Tensor, timestep: Tensor, text: Tensor, motion: Tensor, image_latents: Tensor, motion_scale: Tensor
    ) -> Tensor:
        """As of the step, for the conditions of one branch -> v, `[B, F, C, H, W]`."""
        return self.network(torch.cat([latents, image_latents], dim=2), timestep, text, motion, motion_scale)


ENDS_ON_X0 = (0.0, 1.0, 0.0, 0.0)  # c0 to c3 of a last step whose result is x0
ENDINGS = ("x0", "released")


def solver_rows(scheduler: Any, steps: int, ending: str = "x0") -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """A solver as data, read off diffusers' own scheduler: (timesteps [T], coefficients `[T, 6]` fp32).

    A step of these solvers is linear in (sample, model output, previous x0, noise), so four probes of `scheduler.step`
    with one of them set to 1 and the others to 0 give its coefficients exactly. Works for `CogVideoXDDIMScheduler` and
    `CogVideoXDPMScheduler` (stochastic terms included); raises TypeError for any other class.

    Where 1000 / steps is rounded up (6, 7, 11, 13, 15 steps and others), diffusers takes the last step for one before the last:
    it is extrapolated (by DPM with c1 of 3.2 at 6 steps) and noise is left in the video. `ending` "x0" ends there as at all
    other counts; "released" keeps what diffusers does.
    """
    if ending not in ENDINGS:
        raise ValueError(f"ending is {ending!r}; allowed: {', '.join(ENDINGS)}.")
    kind = type(scheduler).__name__
    if kind not in ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"):
        raise TypeError(f"solver_rows reads CogVideoXDDIMScheduler and CogVideoXDPMScheduler; got {kind}.")
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps
    rows = np.zeros((len(timesteps), 6))
    for index, timestep in enumerate(timesteps):

        def probe(sample: float, output: float, previous: float, seed: int | None) -> tuple[float, float]:
            tensors = [torch.tensor([value], dtype=torch.float64) for value in (output, sample, previous)]
            if kind == "CogVideoXDDIMScheduler":
                result = scheduler.step(tensors[0], timestep, tensors[1], return_dict=False)  # noqa: B023
                return float(result[0]), float(result[1])
            back = timesteps[index - 1] if index > 0 else None  # noqa: B023
            generator = torch.Generator().manual_seed(seed or 0)
            result = scheduler.step(
                tensors[0],
                tensors[2] if index > 0 else None,  # noqa: B023
                timestep,  # noqa: B023
                back,
                tensors[1],
                generator=generator,
                return_dict=False,
            )
            return float(result[0]), float(result[1])

        drift = probe(0, 0, 0, 0)[0]  # the noise term alone: zero inputs
        draws = torch.Generator().manual_seed(0)
        first, second = (torch.randn(1, generator=draws, dtype=torch.float64) for _ in range(2))
        last = int(timestep) - scheduler.config.num_train_timesteps // steps < 0
        unit = float(first if index == 0 or last else second)  # the multistep branch discards its first draw
        (from_sample, p0), (from_output, p1) = probe(1, 0, 0, 0), probe(0, 1, 0, 0)
        c2 = probe(0, 0, 1, 0)[0] - drift
        # next = c0 x + c1 (p0 x + p1 v): the output enters through x0 alone
        c1 = (from_output - drift) / p1 if p1 else 0.0
        rows[index] = (p0, p1, from_sample - drift - c1 * p0, c1, c2, drift / unit)
    if ending == "x0" and not np.allclose(rows[-1, 2:], ENDS_ON_X0, atol=1e-6):
        rows[-1, 2:] = ENDS_ON_X0
    return timesteps.numpy().astype(np.int64), rows.astype(np.float32)
