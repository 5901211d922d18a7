"""The SVD denoiser with MotionRAG's adapters as one function: per-frame guidance and the Euler update are in the step.

MotionRAG puts an adapter on the 16 spatial cross-attentions. The image context has ONE token, so all 32 cross-attentions,
adapters included, are vectors that are constant per request: written plainly here, they leave the loop by themselves.

Latents are kept divided by sqrt(sigma^2 + 1). That is what the network reads, it begins as plain unit noise, and it makes
Euler's method in sigma (Karras et al. 2022, algorithm 1) a row of the same six numbers as any other solver's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from motionrt.export.systems.motionrag import MotionAdapter, MotionAdapterCrossAttention, merge_heads, split_heads
from motionrt.export.systems.rows import guided, like, paired, repeated, solved

INPUTS: Mapping[str, str] = MappingProxyType(
    {
        "latents": "step",
        "previous_x0": "step",
        "noise": "step",
        "coefficients": "step",
        "guidance": "step",
        "timestep": "schedule",
        "image_context": "request",
        "motion": "request",
        "image_latents": "request",
        "motion_scale": "request",
    }
)


class Conditions:
    """What a call of the UNet hands to its cross-attentions, one row per batch element: the UNet has no way for it."""

    def __init__(self) -> None:
        self.context: Tensor | None = None
        self.motion: Tensor | None = None
        self.scale: Tensor | float = 1.0


class SharedCrossAttention(MotionAdapter):
    """Processor of an `attn2`: all rows of a batch element (frames, or places) share its one row of context.

    The rows are laid out as one long sequence, so context, keys, values and adapters are computed once per element
    instead of once per frame or place. Same formula as `MotionAdapterCrossAttention`; without adapter weights it is
    attention alone.
    """

    def __init__(self, conditions: Conditions, adapter: MotionAdapter | None) -> None:
        nn.Module.__init__(self)
        self.conditions = conditions
        self.adapted = adapter is not None
        if adapter is not None:  # under the released names
            self.to_q_ip, self.to_k_ip, self.to_v_ip = adapter.to_q_ip, adapter.to_k_ip, adapter.to_v_ip

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`hidden_states [B R, L, C]` -> the same shape; context `[B, n, Dc]` and motion `[B, M, Dm]` from `conditions`."""
        context, motion = self.conditions.context, self.conditions.motion
        assert context is not None
        rows = hidden_states.reshape(context.shape[0], -1, hidden_states.shape[-1])
        query = split_heads(attn.to_q(rows), attn.heads)
        key, value = (split_heads(project(context), attn.heads) for project in (attn.to_k, attn.to_v))
        hidden = merge_heads(F.scaled_dot_product_attention(query, key, value))
        if self.adapted and motion is not None:
            hidden = self.adapt(hidden, motion, self.conditions.scale, attn.heads)
        return attn.to_out[1](attn.to_out[0](hidden)).reshape(hidden_states.shape)


def spatial_attentions(unet: Any) -> Iterator[tuple[str, Any]]:
    """(path inside the UNet, `attn2`) of every spatial transformer: where MotionRAG has adapters."""
    for path, module in unet.named_modules():
        if path.endswith(".attn2") and ".temporal_transformer_blocks." not in path:
            yield path, module


def temporal_attentions(unet: Any) -> Iterator[tuple[str, Any]]:
    """(path, `attn2`) of every temporal transformer."""
    for path, module in unet.named_modules():
        if path.endswith(".attn2") and ".temporal_transformer_blocks." in path:
            yield path, module


def install_svd_adapter(unet: Any, motion_width: int) -> None:
    """Put a Motion-Adapter on every spatial `attn2`; new weights are drawn from torch's generator."""
    for _, attention in spatial_attentions(unet):
        adapter = MotionAdapterCrossAttention(attention.to_q.in_features, motion_width)
        attention.set_processor(adapter.to(attention.to_q.weight))


class Upsample(nn.Module):
    """diffusers' `Upsample2D` for any batch: that one asks whether there are 64 rows (frames, of every request, twice), which a
    trace takes for a limit of the batch. `conv` keeps its name, and so its weights."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, hidden_states: Tensor, output_size: Any = None) -> Tensor:
        """`[n, C, h, w]` -> `[n, C, 2 h, 2 w]`, or `output_size`."""
        doubled = [2 * size for size in hidden_states.shape[-2:]]
        return self.conv(F.interpolate(hidden_states, size=output_size or doubled, mode="nearest"))


class RisingGuidance(nn.Module):
    """Guidance that rises over the frames of a video, from `first` to that of the request."""

    def __init__(self, frames: int, first: float) -> None:
        super().__init__()
        self.first = first
        self.ramp: Tensor
        self.register_buffer("ramp", torch.linspace(0, 1, frames)[None, :, None, None, None], persistent=False)

    def forward(self, guidance: Tensor, latents: Tensor) -> Tensor:
        """`guidance [B]`, of the last frame; `latents [B, F, C, H, W]` -> `[B, F, 1, 1, 1]`."""
        return self.first + (like(guidance, latents) - self.first) * self.ramp.to(latents.dtype)


class SvdStep(nn.Module):
    """One denoising step of SVD's image-to-video UNet with Motion-Adapters.

    v = v_u + g_f (v_c - v_u) with g_f rising from `first_guidance` to g over the frames, then the solver's update (rows.py) of
    x, the latents over sqrt(sigma^2 + 1): see `euler_rows`.
    """

    def __init__(
        self,
        unet: nn.Module,
        unconditional_motion: Tensor,
        frames: int,
        time_ids: tuple[float, float, float],
        first_guidance: float = 1.0,
    ) -> None:
        """`unconditional_motion [1, M, D]`; `time_ids`: frames per second - 1, motion bucket, noise level: fixed."""
        super().__init__()
        self.unet = unet
        self.conditions = Conditions()
        for _, attention in spatial_attentions(unet):
            attention.set_processor(SharedCrossAttention(self.conditions, attention.processor))
        for _, attention in temporal_attentions(unet):
            attention.set_processor(SharedCrossAttention(self.conditions, None))
        for block in unet.up_blocks:
            if block.upsamplers is not None:
                block.upsamplers = nn.ModuleList(Upsample(upsampler.conv) for upsampler in block.upsamplers)
        self.strength = RisingGuidance(frames, first_guidance)
        self.unconditional_motion: Tensor
        self.time_ids: Tensor
        self.register_buffer("unconditional_motion", unconditional_motion)
        self.register_buffer("time_ids", torch.tensor(time_ids), persistent=False)

    def forward(
        self,
        latents: Tensor,
        previous_x0: Tensor,
        noise: Tensor,
        coefficients: Tensor,
        guidance: Tensor,
        timestep: Tensor,
        image_context: Tensor,
        motion: Tensor,
        image_latents: Tensor,
        motion_scale: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """`latents`, `previous_x0`, `noise` `[B, F, 4, H, W]`; `coefficients [B, 6]`; `guidance [B]`, of the last frame;
        `timestep [B]` float32, log(sigma) / 4; `image_context [B, 1, Dc]`; `motion [B, M, D]`; `image_latents
        [B, 4, H, W]`; `motion_scale [B]` -> (next latents, x0), both `[B, F, 4, H, W]`. Row b is of request b, which may be
        at a step of its own.
        """
        still = image_latents[:, None].expand(-1, latents.shape[1], -1, -1, -1)
        # without conditions: no image. zeros of the latents' shape, and so no input of the request
        nothing = torch.zeros(still.shape, dtype=latents.dtype, device=latents.device)
        kind = self.unconditional_motion.dtype  # of the weights; guidance and solver keep what came in, fp32 in a bundle
        sample = paired(torch.cat([latents, nothing], dim=2), torch.cat([latents, still], dim=2)).to(kind)
        self.conditions.context = paired(torch.zeros_like(image_context), image_context).to(kind)
        unconditional = self.unconditional_motion.expand(latents.shape[0], -1, -1)
        self.conditions.motion = paired(unconditional, motion.to(kind))
        self.conditions.scale = like(repeated(motion_scale.to(kind), 2), unconditional)
        output = self.network(sample, timestep).to(latents.dtype)
        self.conditions.context = self.conditions.motion = None
        return solved(coefficients, latents, guided(output, self.strength(guidance, latents)), previous_x0, noise)

    def network(self, sample: Tensor, timestep: Tensor, branches: int = 2) -> Tensor:
        """The UNet on `[branches B, F, 8, H, W]` -> `[branches B, F, 4, H, W]`: as diffusers' forward, with one row of time
        embedding for each request (the release repeats it for samples and frames before the embedding)."""
        unet: Any = self.unet
        batch, frames = sample.shape[:2]
        x = sample.flatten(0, 1)
        time = unet.time_embedding(unet.time_proj(timestep).to(x.dtype))
        ids = unet.add_time_proj(self.time_ids).reshape(1, -1).to(x.dtype)
        embedding = repeated(time + unet.add_embedding(ids), branches * frames)
        images = torch.zeros(batch, frames, dtype=x.dtype, device=x.device)  # 0: every row is a frame of a video
        context = self.conditions.context
        assert context is not None
        rows = context[:, None].expand(-1, frames, -1, -1).reshape(batch * frames, *context.shape[1:])  # looked at, not used
        x = unet.conv_in(x)
        skips = (x,)
        for block in unet.down_blocks:
            crossed = {"encoder_hidden_states": rows} if getattr(block, "has_cross_attention", False) else {}
            x, states = block(hidden_states=x, temb=embedding, image_only_indicator=images, **crossed)
            skips += states
        x = unet.mid_block(hidden_states=x, temb=embedding, encoder_hidden_states=rows, image_only_indicator=images)
        for block in unet.up_blocks:
            crossed = {"encoder_hidden_states": rows} if getattr(block, "has_cross_attention", False) else {}
            count = len(block.resnets)
            skips, states = skips[:-count], skips[-count:]
            size = {} if not skips else {"upsample_size": skips[-1].shape[2:]}
            x = block(
                hidden_states=x, temb=embedding, res_hidden_states_tuple=states, image_only_indicator=images, **crossed, **size
            )
        x = unet.conv_out(unet.conv_act(unet.conv_norm_out(x)))
        return x.unflatten(0, (batch, frames))


BRANCH: Mapping[str, str] = MappingProxyType(
    {name: INPUTS[name] for name in ("latents", "timestep", "image_context", "motion", "image_latents", "motion_scale")}
)


class SvdBranch(SvdStep):
    """The network of the step for one branch of guidance."""

    def forward(  # type: ignore[override]
        self, latents: Tensor, timestep: Tensor, image_context: Tensor, motion: Tensor, image_latents: Tensor,
        motion_scale: Tensor,
    ) -> Tensor:  # fmt: skip
        """As of the step, for the conditions of one branch -> v, `[B, F, 4, H, W]`."""
        still = image_latents[:, None].expand(-1, latents.shape[1], -1, -1, -1)
        kind = self.unconditional_motion.dtype
        self.conditions.context, self.conditions.motion = image_context.to(kind), motion.to(kind)
        self.conditions.scale = like(motion_scale.to(kind), motion)
        output = self.network(torch.cat([latents, still], dim=2).to(kind), timestep, branches=1).to(latents.dtype)
        self.conditions.context = self.conditions.motion = None
        return output


def euler_rows(scheduler: Any, steps: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """`EulerDiscreteScheduler` as data: (timesteps [T] float32, coefficients `[T, 6]` float32), for scaled latents.

    With s = sqrt(sigma^2 + 1), y = x / s and v-prediction: x0 = y / s - (sigma / s) v, and the Euler step
    x' = x + (sigma' - sigma) (x - x0) / sigma becomes y' = (sigma' s / (sigma s')) y + ((1 - sigma' / sigma) / s') x0.
    The last sigma is 0, where y is x. Raises TypeError for other schedulers, ValueError for settings that this is not.
    """
    kind = type(scheduler).__name__
    if kind != "EulerDiscreteScheduler":
        raise TypeError(f"euler_rows reads EulerDiscreteScheduler; got {kind}.")
    for name, want in (("prediction_type", "v_prediction"), ("timestep_type", "continuous"), ("timestep_spacing", "leading")):
        if scheduler.config[name] != want:
            raise ValueError(f"euler_rows: the scheduler's {name} is {scheduler.config[name]!r}; SVD's is {want!r}.")
    scheduler.set_timesteps(steps)
    sigma = scheduler.sigmas.double().numpy()
    now, after = sigma[:-1], sigma[1:]
    s, s_after = np.sqrt(now**2 + 1), np.sqrt(after**2 + 1)
    ratio = after / now
    zeros = np.zeros_like(now)
    rows = np.stack([1 / s, -now / s, ratio * s / s_after, (1 - ratio) / s_after, zeros, zeros], axis=1)
    return scheduler.timesteps.float().numpy().astype(np.float32), rows.astype(np.float32)
