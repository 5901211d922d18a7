"""Stable Video Diffusion (img2vid) with MotionRAG's released checkpoints as a system, without ever holding the model.

    export_system(svd_system(Sources(base=..., motionrag=..., ...)), out)

The still is read twice: as CLIP's image embedding (the one token of context) and as the VAE's latent of the still with a
little noise on it. A prompt is for the search alone. Guidance rises over the frames from 1 to the number that is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from motionrt.export.checkpoints.encoders import weights_of
from motionrt.export.checkpoints.files import (
    CheckpointError,
    Component,
    KeyReport,
    Lazy,
    check_pipeline,
    open_component,
    read_json,
)
from motionrt.export.checkpoints.motionrag_files import MotionRAG, open_motionrag
from motionrt.export.compiler.weightless import meta
from motionrt.export.systems import motionrag_graphs as motionrag
from motionrt.export.systems.decoding import PICTURES, decoding_loop, tile_size, tiles_quality
from motionrt.export.systems.motionrag_graphs import BATCH, GUIDANCE, VIDEO, Sources
from motionrt.export.systems.steps import plain, step_args, svd_step
from motionrt.export.systems.svd_step import INPUTS, euler_rows, spatial_attentions
from motionrt.export.systems.system import Array, Graph, Network, Schedules, Step, System
from motionrt.runtime.bundle.manifest import Output

FIRST_GUIDANCE, FPS = 1.0, 7
MOTION_BUCKET, NOISE_LEVEL = 127.0, 0.02
DECODED = 8  # frames that the decoder sees at once
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


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
        self.rows: Tensor
        self.columns: Tensor
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("rows", antialiased_matrix(size[0], side), persistent=False)
        self.register_buffer("columns", antialiased_matrix(size[1], side).T.contiguous(), persistent=False)
        self.register_buffer("mean", torch.tensor(CLIP_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(CLIP_STD)[:, None, None], persistent=False)

    def forward(self, image: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """`image`, `noise` `[B, 3, H, W]` -> image_context `[B, 1, D]`, image_latents `[B, 4, H/8, W/8]`, float32."""
        seen = ((self.rows @ image @ self.columns + 1) / 2 - self.mean) / self.std
        context = self.clip(pixel_values=seen).image_embeds[:, None]
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


def _vae(component: Component) -> tuple[Any, dict[str, Lazy], KeyReport]:
    from diffusers import AutoencoderKLTemporalDecoder

    with meta():
        vae = AutoencoderKLTemporalDecoder(**plain(component.config))
    weights, report = weights_of(vae, component, "vae", "vae.")
    return vae.eval(), weights, report


def encode_network(image_encoder: Component, component: Component, size: tuple[int, int]) -> Network:
    """CLIP's image encoder and the VAE's encoder as one graph. `force_upcast` of the VAE's config: its encoder leaves the range
    of float16, so that diffusers runs it in float32 there; the same is declared of ours."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    with meta():
        clip = CLIPVisionModelWithProjection(CLIPVisionConfig(**image_encoder.config))
    weights, clip_report = weights_of(
        clip, image_encoder, "image_encoder", "clip.",
        unused=lambda key: "a range, made anew" if key.endswith("position_ids") else None,
    )  # fmt: skip
    vae, more, report = _vae(component)
    module = EncodeStill(clip.eval(), vae, size).eval()
    del vae.decoder
    wide = ("vae.*",) if component.config.get("force_upcast", True) else ()
    return Network(module, weights | more, (clip_report, report), wide)


def decode_network(component: Component) -> Network:
    """The temporal decoder."""
    vae, weights, _ = _vae(component)
    module = DecodeTemporal(vae).eval()
    del vae.encoder, vae.quant_conv
    return Network(module, weights)


def adapter_blocks(config: dict[str, Any]) -> dict[str, int]:
    """Attentions that MotionRAG adapts, `unet.….attn2` -> width."""
    from diffusers import UNetSpatioTemporalConditionModel

    with meta():
        unet = UNetSpatioTemporalConditionModel(**config)
    return {f"unet.{path}": attention.to_q.in_features for path, attention in spatial_attentions(unet)}


def step_weights(component: Component, files: MotionRAG) -> tuple[dict[str, Lazy], KeyReport]:
    """The step's weights by its own names: the base's UNet and the adapters."""
    from diffusers import UNetSpatioTemporalConditionModel

    with meta():
        unet = UNetSpatioTemporalConditionModel(**plain(component.config))
    weights, report = weights_of(unet, component, "unet", "unet.")
    return weights | dict(files.adapter), report


def svd_system(
    sources: Sources, *, frames: int = 16, height: int = 576, width: int = 1024, say: Callable[[str], None] = lambda text: None
) -> System:
    """The system of the files that `sources` names: every file is opened and every key checked, and nothing is written.

    `CheckpointError` names what does not fit. `say` is told what takes its time: VideoMAE, for the one clip that is encoded here.
    """
    base, size = sources.base, (height, width)
    check_pipeline(base, "StableVideoDiffusionPipeline")
    unet = open_component(base, "unet", "UNetSpatioTemporalConditionModel")
    vae = open_component(base, "vae", "AutoencoderKLTemporalDecoder")
    config = plain(unet.config)
    factor = 2 ** (len(vae.config["block_out_channels"]) - 1)
    if frames < 2 or height % (8 * factor) or width % (8 * factor):
        raise CheckpointError(
            f"frames is {frames} and the size {height}x{width}; allowed: 2 frames or more, multiples of {8 * factor} pixels."
        )
    latents = (frames, config["out_channels"], height // factor, width // factor)
    files = open_motionrag(sources.motionrag, adapter_blocks(config), overlay=False, sos=sources.sos)
    tokens = (files.cama_size.num_queries, files.cama_size.dim)
    networks = motionrag.motionrag_networks(sources, files, frames, size)
    image_encoder = open_component(base, "image_encoder", "CLIPVisionModelWithProjection")
    encode = sources.keeping(encode_network(image_encoder, vae, size))
    weights, step_report = step_weights(unet, files)
    scheduler = _scheduler(base)
    query = sources.sentence_encoder()
    say("unconditional tokens")
    unconditional = motionrag.unconditional_tokens(networks["motion"], frames, size)
    ids = (FPS - 1.0, MOTION_BUCKET, NOISE_LEVEL)
    step = svd_step(
        config, latents=latents, motion=tokens, unconditional=unconditional, time_ids=ids, first_guidance=FIRST_GUIDANCE
    )

    made = (networks["motion"], networks["appearance"], encode, query.network)
    released = sources.target_range == "released"
    clip, picture = (frames, *size), Array(("batch", 3, *size))
    args = {name: Array(("batch", *v.shape[1:]), v.dtype) for name, v in step_args(INPUTS, config, latents, tokens).items()}
    euler = {n: motionrag.solver_table(*euler_rows(scheduler, n), GUIDANCE) for n in sources.steps}
    # chunks of one size are one graph, run for each; a rest is a chunk inside the graph
    count = frames if frames % DECODED else DECODED
    tile = (tile_size(latents[2], sources.tiles), tile_size(latents[3], sources.tiles))
    loops = {VIDEO: motionrag.denoising_loop({"euler": euler}, ("euler", motionrag.default_steps(sources)))}
    schedules: dict[str, Schedules] = {VIDEO: {"euler": euler}}
    if count < frames or tile != latents[2:]:
        loops[PICTURES], schedules[PICTURES] = decoding_loop(
            ("decode",), [(count, count)] * (frames // count), latents, tile, factor
        )
    return System(
        "svd",
        inputs=motionrag.motionrag_inputs(size, GUIDANCE, prompted=False, released_range=released),
        graphs={
            **motionrag.motionrag_graphs(networks, query.graph(), clip, tokens),
            "encode": Graph(
                encode, {"image": picture, "noise": picture}, ("image_context", "image_latents"), {"batch": BATCH}
            ),
            "decode": Graph(
                sources.keeping(decode_network(vae)), {"latents": Array(("batch", count, latents[1], *tile))}, ("video",),
                {"batch": BATCH},
            ),
        },
        steps=(Step(Network(step, sources.kept(weights)), INPUTS, args, motionrag.STEP_OUTPUTS, motionrag.STEP_SIZES),),
        plan=motionrag.motionrag_plan(
            prompted=False, released_range=released, decode=PICTURES if PICTURES in loops else "decode"
        ),
        loops=loops,
        schedules=schedules,
        output=Output("video", *clip, float(FPS)),
        memory=motionrag.motionrag_memory(clip, FPS, tokens),
        tokenizers={"text_query": query.tokenizer},
        approximations=tiles_quality(("decode",), sources.tiles),
        provenance={
            "dtype": sources.dtype, "sos_token": dict(files.sos), "target_range": sources.target_range,
            "first_guidance": FIRST_GUIDANCE, "time_ids": list(ids),
        },
        reports=(*files.reports, step_report, *(report for network in made for report in network.reports)),
    )  # fmt: skip


def _scheduler(base: Path) -> Any:
    from diffusers import EulerDiscreteScheduler

    config = read_json(base / "scheduler" / "scheduler_config.json")
    return EulerDiscreteScheduler.from_config(plain(config))
