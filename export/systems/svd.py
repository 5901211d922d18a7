"""Stable Video Diffusion (img2vid) with MotionRAG's released checkpoints as a bundle, without ever holding the model.

    export_svd(Sources(base=..., motionrag=..., ...), out)

The still is read twice: as CLIP's image embedding (the one token of context) and as the VAE's latent of the still with a
little noise on it. A prompt is for the search alone. Guidance rises over the frames from 1 to the number that is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from motionrt.export.checkpoints.files import CheckpointError, Lazy, check_pipeline, open_component, read_json
from motionrt.export.checkpoints.motionrag_files import MotionRAG, convert_folder, open_motionrag
from motionrt.export.checkpoints.parts import Part, taken
from motionrt.export.checkpoints.sentence import add_text_query, sentence_encoder
from motionrt.export.compiler.weightless import meta
from motionrt.export.systems.published import plain, step_args, svd_step
from motionrt.export.systems.stage import Sources, Stage, encoders, unconditional_tokens
from motionrt.export.systems.svd_step import INPUTS, euler_rows, spatial_attentions
from motionrt.export.write import staged
from motionrt.runtime.decode import tile_size

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


def _vae(base: Path) -> tuple[Any, dict[str, Lazy], Any]:
    from diffusers import AutoencoderKLTemporalDecoder

    component = open_component(base, "vae", "AutoencoderKLTemporalDecoder")
    with meta():
        vae = AutoencoderKLTemporalDecoder(**plain(component.config))
    weights, report = taken("vae.", vae, component, "vae")
    return vae.eval(), weights, report


def encode_part(base: Path, size: tuple[int, int]) -> Part:
    """CLIP's image encoder and the VAE's encoder as one graph. `force_upcast` of the VAE's config: its encoder leaves the range
    of float16, so that diffusers runs it in float32 there; the same is declared of ours."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    component = open_component(base, "image_encoder", "CLIPVisionModelWithProjection")
    with meta():
        clip = CLIPVisionModelWithProjection(CLIPVisionConfig(**component.config))
    weights, clip_report = taken(
        "clip.", clip, component, "image_encoder",
        optional=lambda key: "a range, made anew" if key.endswith("position_ids") else None,
    )  # fmt: skip
    upcast = open_component(base, "vae", "AutoencoderKLTemporalDecoder").config.get("force_upcast", True)
    vae, more, report = _vae(base)
    module = EncodeStill(clip.eval(), vae, size).eval()
    del vae.decoder
    return Part(module, weights | more, (clip_report, report), ("vae.*",) if upcast else ())


def decode_part(base: Path) -> Part:
    """The temporal decoder."""
    vae, weights, _ = _vae(base)
    module = DecodeTemporal(vae).eval()
    del vae.encoder, vae.quant_conv
    return Part(module, weights, ())


def adapter_blocks(config: dict[str, Any]) -> dict[str, int]:
    """Attentions that MotionRAG adapts, `unet.….attn2` -> width."""
    from diffusers import UNetSpatioTemporalConditionModel

    with meta():
        unet = UNetSpatioTemporalConditionModel(**config)
    return {f"unet.{path}": attention.to_q.in_features for path, attention in spatial_attentions(unet)}


def step_weights(base: Path, files: MotionRAG) -> tuple[dict[str, Lazy], Any]:
    """The step's weights by its own names: the base's UNet and the adapters."""
    from diffusers import UNetSpatioTemporalConditionModel

    component = open_component(base, "unet", "UNetSpatioTemporalConditionModel")
    with meta():
        unet = UNetSpatioTemporalConditionModel(**plain(component.config))
    weights, report = taken("unet.", unet, component, "unet")
    return weights | dict(files.adapter), report


def export_svd(
    sources: Sources,
    out: Path,
    *,
    frames: int = 16,
    height: int = 576,
    width: int = 1024,
    say: Callable[[str], None] = lambda text: None,
) -> list[str]:
    """Write the bundle `out`, whole or not at all; what became of the keys, one line per file.

    Every file is opened and checked before anything is written: `CheckpointError` names what does not fit.
    """
    base, size = sources.base, (height, width)
    check_pipeline(base, "StableVideoDiffusionPipeline")
    config = plain(open_component(base, "unet", "UNetSpatioTemporalConditionModel").config)
    vae_config = open_component(base, "vae", "AutoencoderKLTemporalDecoder").config
    factor = 2 ** (len(vae_config["block_out_channels"]) - 1)
    if frames < 2 or height % (8 * factor) or width % (8 * factor):
        raise CheckpointError(
            f"frames is {frames} and the size {height}x{width}; allowed: 2 frames or more, multiples of {8 * factor} pixels."
        )
    latents = (frames, config["out_channels"], height // factor, width // factor)
    blocks = adapter_blocks(config)
    files = open_motionrag(sources.motionrag, blocks, overlay=False, sos=sources.sos)
    motion = (files.cama_size.num_queries, files.cama_size.dim)
    model = {
        "frames": frames, "height": height, "width": width, "fps": FPS, "latents": list(latents),
        "motion_tokens": list(motion), "max_references": 9, "default_references": 9,
    }  # fmt: skip
    made = encoders(sources, files, frames, size)
    checked = [made.motion(), made.appearance(), encode_part(base, size)]
    reports = [*files.reports, step_weights(base, files)[1], *(report for part in checked for report in part.reports)]
    scheduler = _scheduler(base)

    query = sentence_encoder(sources.text_query)
    reports += query.part.reports if query is not None else ()
    convert_folder(sources.motionrag, sources.converted)  # nothing is written before this line
    files = open_motionrag(sources.converted, blocks, overlay=False, sos=sources.sos)
    made = encoders(sources, files, frames, size)
    weights, _ = step_weights(base, files)
    say("unconditional tokens")
    unconditional = unconditional_tokens(made.motion(), frames, size)
    ids = (FPS - 1.0, MOTION_BUCKET, NOISE_LEVEL)
    step = svd_step(
        config, latents=latents, motion=motion, unconditional=unconditional, time_ids=ids,
        first_guidance=FIRST_GUIDANCE,
    )  # fmt: skip

    with staged(out) as folder:
        stage = Stage(folder, say, sources)
        query_tokenizer, query_digest = add_text_query(stage, query)
        digests = stage.add_encoders(made, model)
        picture = torch.empty(1, 3, *size, device="meta")
        feed = {"image": picture, "noise": picture}
        stage.add_batched("encode", encode_part(base, size), feed, ("image_context", "image_latents"))
        # chunks of one size are one graph, run for each (`motionrt.runtime.decode`); a rest is a chunk inside the graph
        tile = (tile_size(length, sources.tiles) for length in latents[2:])
        shape = (1, frames if frames % DECODED else DECODED, latents[1], *tile)
        feed = {"latents": torch.empty(shape, device="meta")}
        stage.add_batched("decode", decode_part(base), feed, ("video",))

        cut = stage.add_step(step, step_args(INPUTS, config, latents, motion), INPUTS, weights)
        return stage.finish(
            "svd", model, cut, reports,
            solvers={"euler": {n: euler_rows(scheduler, n) for n in sources.steps}},
            tokenizers={"text_query": query_tokenizer},
            digests={"text_query": query_digest, **digests},
            chosen={"sos_token": dict(files.sos), "first_guidance": FIRST_GUIDANCE, "time_ids": list(ids)},
        )  # fmt: skip


def _scheduler(base: Path) -> Any:
    from diffusers import EulerDiscreteScheduler

    config = read_json(base / "scheduler" / "scheduler_config.json")
    return EulerDiscreteScheduler.from_config(plain(config))
