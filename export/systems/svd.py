"""Stable Video Diffusion (img2vid) with MotionRAG's released checkpoints as a system, without ever holding the model.

    export_system(svd_system(Sources(base=..., motionrag=..., ...)), out)

The still is read twice: as CLIP's image embedding (the one token of context) and as the VAE's latent of the still with a
little noise on it. A prompt is for the search alone. Guidance rises over the frames from 1 to the number that is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from motionrt.export.checkpoints.encoders import ClipPixels, weights_of
from motionrt.export.checkpoints.files import CheckpointError, check_pipeline, open_component, read_json
from motionrt.export.compiler.weightless import meta
from motionrt.export.systems.decoding import decoding, tile_size
from motionrt.export.systems.motionrag_system import (
    BATCH,
    GUIDANCE,
    Base,
    Sources,
    motionrag_networks,
    motionrag_system,
    solver_table,
    unconditional_tokens,
)
from motionrt.export.systems.split import Branch
from motionrt.export.systems.steps import plain, step_inputs, svd_step
from motionrt.export.systems.svd_step import BRANCH, INPUTS, SvdStep, euler_rows, spatial_attentions
from motionrt.export.systems.system import Array, Graph, Network, System

FIRST_GUIDANCE, FPS = 1.0, 7
MOTION_BUCKET, NOISE_LEVEL = 127.0, 0.02
DECODED = 8  # frames that the decoder sees at once


def antialiased_matrix(length: int, size: int) -> Tensor:
    """diffusers' `_resize_with_antialiasing` (blur, then bicubic) of one axis as a matrix `[size, length]` float32.

    Both are linear and separable and keep constants: a picture that is 1 in row i and constant along the other axis gives
    column i.
    """
    from diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion import _resize_with_antialiasing

    columns = []
    for rows in torch.eye(length).split(64):
        picture = rows[:, None, :, None].expand(-1, -1, -1, 8).contiguous()
        columns.append(_resize_with_antialiasing(picture, (size, size))[:, 0, :, 0])
    return torch.cat(columns).T.contiguous()


class EncodeStill(nn.Module):
    """What SVD reads of a still: CLIP's embedding, and the VAE's mean latent of the still with noise on it."""

    def __init__(self, clip: Any, vae: Any, size: tuple[int, int]) -> None:
        super().__init__()
        self.clip, self.vae = clip, vae
        side = clip.config.image_size
        self.seen = ClipPixels(*(antialiased_matrix(length, side) for length in size))

    def forward(self, image: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """`image`, `noise` `[B, 3, H, W]` -> image_context `[B, 1, D]`, image_latents `[B, 4, H/8, W/8]`, float32."""
        context = self.clip(pixel_values=self.seen(image)).image_embeds[:, None]
        moments = self.vae.quant_conv(self.vae.encoder(image + NOISE_LEVEL * noise))
        return context, moments.chunk(2, dim=1)[0]


class DecodeTemporal(nn.Module):
    """Latents to pictures, `DECODED` frames at a time: the decoder looks along time within a chunk, as diffusers has it."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        """`latents [B, F, 4, h, w]` -> `[B, F, 3, H, W]` float32, about [-1, 1]."""
        batch = latents.shape[0]
        chunks = []
        for chunk in (latents / self.vae.config.scaling_factor).split(DECODED, dim=1):
            frames = chunk.shape[1]
            still = torch.zeros(batch, frames, device=chunk.device)
            pictures = self.vae.decoder(chunk.flatten(0, 1), num_frames=frames, image_only_indicator=still)
            chunks.append(pictures.unflatten(0, (batch, frames)))
        return torch.cat(chunks, dim=1)


def open_vae(base: Path) -> tuple[Any, Network]:
    """The VAE of a folder, without weights, and its network: their places, every key checked."""
    from diffusers import AutoencoderKLTemporalDecoder

    component = open_component(base, "vae", "AutoencoderKLTemporalDecoder")
    with meta():
        vae = AutoencoderKLTemporalDecoder(**plain(component.config)).eval()
    weights, report = weights_of(vae, component, "vae", "vae.")
    return vae, Network(vae, weights, (report,))


def still_encoder(base: Path, vae: Any, network: Network, size: tuple[int, int]) -> Network:
    """CLIP's image encoder and the VAE's encoder as one graph. `force_upcast` of the VAE's config: its encoder leaves the range
    of float16, so that diffusers runs it in float32 there; the same is declared of ours."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    component = open_component(base, "image_encoder", "CLIPVisionModelWithProjection")
    with meta():
        clip = CLIPVisionModelWithProjection(CLIPVisionConfig(**component.config)).eval()
    weights, report = weights_of(
        clip, component, "image_encoder", "clip.",
        unused=lambda key: "a range, made anew" if key.endswith("position_ids") else None,
    )  # fmt: skip
    wide = ("vae.*",) if vae.config.get("force_upcast", True) else ()
    weights |= network.weights or {}
    return Network(EncodeStill(clip, vae, size).eval(), weights, (report, *network.reports), wide)


def adapter_blocks(config: dict[str, Any]) -> dict[str, int]:
    """Attentions that MotionRAG adapts, `unet.….attn2` -> width."""
    from diffusers import UNetSpatioTemporalConditionModel

    with meta():
        unet = UNetSpatioTemporalConditionModel(**config)
    return {f"unet.{path}": attention.to_q.in_features for path, attention in spatial_attentions(unet)}


def svd_system(
    sources: Sources, *, frames: int = 16, height: int = 576, width: int = 1024, say: Callable[[str], None] = lambda text: None
) -> System:
    """The system of the files that `sources` names: every file is opened and every key checked, and nothing is written.

    `CheckpointError` names what does not fit. `say` is told what takes its time.
    """
    base, size = sources.base, (height, width)
    check_pipeline(base, "StableVideoDiffusionPipeline")
    unet = open_component(base, "unet", "UNetSpatioTemporalConditionModel")
    config = plain(unet.config)
    vae, vae_network = open_vae(base)
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    if frames < 2 or height % (8 * factor) or width % (8 * factor):
        raise CheckpointError(
            f"frames is {frames} and the size {height}x{width}; allowed: 2 frames or more, multiples of {8 * factor} pixels."
        )
    latents = (frames, config["out_channels"], height // factor, width // factor)
    files = sources.files(adapter_blocks(config), overlay=False)
    tokens = files.tokens
    networks = motionrag_networks(sources, files, frames, size)
    encode = sources.keeping(still_encoder(base, vae, vae_network, size))
    ids = (FPS - 1.0, MOTION_BUCKET, NOISE_LEVEL)
    step = svd_step(
        config, latents=latents, motion=tokens, time_ids=ids, first_guidance=FIRST_GUIDANCE, branch=sources.split
    )
    weights, report = weights_of(step.unet, unet, "unet", "unet.", added=".processor.")
    scheduler = _scheduler(base)
    query = sources.sentence_encoder()
    say("unconditional tokens")
    step.unconditional_motion = unconditional_tokens(networks["motion"], frames, size)

    network, inputs = Network(step, sources.kept({**weights, **files.adapter})), step_inputs(INPUTS, config, latents, tokens)
    picture = Array(("batch", 3, *size))
    # chunks of one size are one graph, run for each; a rest is a chunk inside the graph
    count = frames if frames % DECODED else DECODED
    tile = (tile_size(latents[2], sources.tiles), tile_size(latents[3], sources.tiles))
    decode = Graph(
        sources.keeping(Network(DecodeTemporal(vae).eval(), vae_network.weights)),
        {"latents": Array(("batch", count, latents[1], *tile))}, ("video",), {"batch": BATCH},
    )  # fmt: skip
    return motionrag_system(
        Base(
            name="svd",
            clip=(frames, *size),
            fps=FPS,
            encode=Graph(
                encode, {"image": picture, "noise": picture}, ("image_context", "image_latents"), {"batch": BATCH}
            ),
            decoding=decoding({"decode": decode}, [(count, count)] * (frames // count), latents, factor),
            step=network,
            changes=INPUTS,
            inputs=inputs,
            branch=branch_of(network, step, inputs) if sources.split else None,
            solvers={"euler": {n: solver_table(*euler_rows(scheduler, n), GUIDANCE) for n in sources.steps}},
        ),
        networks,
        query,
        tokens,
        released_range=sources.target_range == "released",
        provenance={**sources.provenance(files), "first_guidance": FIRST_GUIDANCE, "time_ids": list(ids)},
        reports=(*files.reports, report),
    )  # fmt: skip


def branch_of(network: Network, step: SvdStep, inputs: Mapping[str, Array]) -> Branch:
    """SVD's step for one branch of guidance: without conditions there is neither still nor motion."""
    makes = {f"no_{name}": name for name in ("image_context", "image_latents", "motion")}
    reads = {name: made for made, name in makes.items()}
    own = {name: inputs[name] for name in BRANCH}
    return Branch(network, BRANCH, own, reads, makes, step.unconditional_motion, step.strength)


def _scheduler(base: Path) -> Any:
    from diffusers import EulerDiscreteScheduler

    config = read_json(base / "scheduler" / "scheduler_config.json")
    return EulerDiscreteScheduler.from_config(plain(config))
