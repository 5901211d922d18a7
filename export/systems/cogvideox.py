"""CogVideoX-5B-I2V with MotionRAG's released checkpoints as a system, without ever holding the model.

    export_system(cogvideox_system(Sources(base=..., motionrag=..., ...), frames=17), out)

17 frames take `17_frames.ckpt` (query, key and value of every block) over the base model's; 49 frames do not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from motionrt.export.checkpoints.encoders import text_encoder, weights_of
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
from motionrt.export.checkpoints.tokenizers import tokenizer_json
from motionrt.export.compiler.weightless import meta
from motionrt.export.systems import motionrag_graphs as motionrag
from motionrt.export.systems.cogvideox_step import INPUTS, CogVideoXStep, solver_rows
from motionrt.export.systems.decoding import PICTURES, decoding_loop, tile_size, tiles_quality
from motionrt.export.systems.motionrag_graphs import BATCH, GUIDANCE, VIDEO, Sources
from motionrt.export.systems.steps import Latents, cogvideox_step, plain, step_args
from motionrt.export.systems.system import Array, Graph, Network, Schedules, Step, System, TokenizerText
from motionrt.runtime.bundle.manifest import Loop, Output

FPS = 8
# tests/export/systems/test_decoding.py holds the second half of it
TILES_ERROR = "not measured with released weights; with random ones, RMS below 5 % of the video's spread, as diffusers' own tiles"


class EncodeCausal(nn.Module):
    """The still's latent, drawn from the VAE's posterior, and zeros for the other latent frames: as diffusers has it."""

    def __init__(self, vae: Any, frames: int) -> None:
        super().__init__()
        self.vae, self.frames = vae, frames
        scaling = float(vae.config.scaling_factor)
        self.scale = 1 / scaling if vae.config.invert_scale_latents else scaling

    def forward(self, image: Tensor, noise: Tensor) -> Tensor:
        """`image [B, 3, H, W]` in [-1, 1], `noise [B, C, h, w]` -> `[B, F, C, h, w]` float32."""
        mean, logvar = self.vae._encode(image.unsqueeze(2)).squeeze(2).chunk(2, dim=1)
        latent = self.scale * (mean + torch.exp(0.5 * logvar.clamp(-30.0, 20.0)) * noise)
        return F.pad(latent[:, None], (0, 0, 0, 0, 0, 0, 0, self.frames - 1))


class DecodeCausal(nn.Module):
    """One chunk of latent frames to pictures, as diffusers decodes them: the decoder's causal convolutions read the last two
    frames of the chunk before, which `caches` are. The first chunk has none; a later one is given what the last one left."""

    def __init__(self, vae: Any, caches: Sequence[str] = (), keep: bool = True) -> None:
        """`caches`: names of those that are given; `keep`: another chunk follows."""
        super().__init__()
        self.vae, self.caches, self.keep = vae, tuple(caches), keep

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """`latents [B, f, C, h, w]`, caches by `self.caches` -> video `[B, t, 3, H, W]` float32, about [-1, 1], and the
        caches for the next chunk, in the order of their names."""
        latents, *caches = inputs
        latents = latents.permute(0, 2, 1, 3, 4) / self.vae.config.scaling_factor
        if self.vae.post_quant_conv is not None:
            latents = self.vae.post_quant_conv(latents)
        given = nested_caches(dict(zip(self.caches, caches, strict=True))) if caches else None
        video, left = self.vae.decoder(latents, conv_cache=given)
        return video.permute(0, 2, 1, 3, 4), *(flat_caches(left).values() if self.keep else ())


def flat_caches(caches: Mapping[str, Any], inside: str = "cache") -> dict[str, Tensor]:
    """diffusers' nested caches by path. Its convolutions along time over one frame keep their input too, and never read it."""
    found: dict[str, Tensor] = {}
    for name, value in caches.items():
        if isinstance(value, Mapping):
            found |= flat_caches(value, f"{inside}.{name}")
        elif value is not None and name not in ("conv_y", "conv_b"):
            found[f"{inside}.{name}"] = value
    return found


def nested_caches(caches: Mapping[str, Tensor]) -> dict[str, Any]:
    """What `flat_caches` made flat."""
    tree: dict[str, Any] = {}
    for path, value in caches.items():
        *folders, name = path.split(".")[1:]
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = value
    return tree


def chunks(frames: int) -> tuple[int, int]:
    """Latent frames that the VAE decodes first, and in each chunk after that (0: there is none); as diffusers has it."""
    first = frames if frames < 4 else 2 + frames % 2
    return first, 2 if frames > first else 0


@dataclass(frozen=True)
class Decoder:
    """The decoder's graphs, and the loop over its chunks and tiles where it does not run in one piece."""

    graphs: dict[str, Graph]
    loops: dict[str, Loop]
    schedules: dict[str, Schedules]

    @property
    def name(self) -> str:
        """What the plan runs."""
        return PICTURES if self.loops else "decode"


def vae_network(component: Component, make: Callable[[Any], nn.Module], half: str) -> Network:
    """One `half` ("encoder" or "decoder") of the VAE of `component` inside `make`'s module, all keys of the file checked."""
    from diffusers import AutoencoderKLCogVideoX

    with meta():
        vae = AutoencoderKLCogVideoX(**plain(component.config))
    weights, report = weights_of(vae, component, "vae", "vae.")
    delattr(vae, "decoder" if half == "encoder" else "encoder")
    return Network(make(vae.eval()).eval(), weights, (report,))


def decoder(
    component: Component, latents: Latents, tiles: int = 1, keeping: Callable[[Network], Network] = lambda network: network
) -> Decoder:
    """The graph `decode`, and `decode_next` where there is more than one chunk of frames; `tiles` along height and width;
    `keeping` decides what the weights are kept in."""
    first, after = chunks(latents[0])
    size = (tile_size(latents[2], tiles), tile_size(latents[3], tiles))
    whole = keeping(vae_network(component, lambda vae: DecodeCausal(vae, keep=after > 0), "decoder"))
    vae: Any = whole.module.vae

    def chunk(frames: int) -> dict[str, Array]:
        return {"latents": Array(("batch", frames, latents[1], *size))}

    def pictures(frames: int, kept: Mapping[str, Tensor] | None = None) -> tuple[int, dict[str, Tensor]]:
        """How many pictures a chunk of latent frames makes, and what it leaves for the next one; on the meta device."""
        with torch.no_grad():
            given = nested_caches(kept) if kept else None
            video, left = vae.decoder(torch.empty(1, latents[1], frames, *size, device="meta"), conv_cache=given)
        return video.shape[2], flat_caches(left)

    count, kept = pictures(first)
    made = [(first, count), *((after, pictures(after, kept)[0]) for _ in range((latents[0] - first) // max(1, after)))]
    leaves = tuple(f"next_{name}" for name in kept) if after else ()
    graphs = {"decode": Graph(whole, chunk(first), ("video", *leaves), {"batch": BATCH})}
    if after:
        inputs = {**chunk(after), **{name: Array(("batch", *value.shape[1:])) for name, value in kept.items()}}
        following = Network(DecodeCausal(vae, tuple(kept)).eval(), whole.weights)
        graphs["decode_next"] = Graph(following, inputs, ("video", *leaves), {"batch": BATCH}, weights_of="decode")
    if not after and size == latents[2:]:
        return Decoder(graphs, {}, {})
    scale = 2 ** (len(component.config["block_out_channels"]) - 1)
    loop, rows = decoding_loop(tuple(graphs), made, latents, size, scale, tuple(kept) if after else ())
    return Decoder(graphs, {PICTURES: loop}, {PICTURES: rows})


def geometry(config: Mapping[str, Any], base: Path, frames: int) -> Latents:
    """Latents F, C, H, W of `frames` pictures of a transformer; `CheckpointError` for what MotionRAG was not made for."""
    if config["in_channels"] != 2 * config["out_channels"]:
        raise CheckpointError(
            f"{base} has {config['in_channels']} input and {config['out_channels']} output channels: a text-to-video model. "
            "Give the folder of an image-to-video one."
        )
    if config.get("patch_size_t") is not None:
        raise CheckpointError(f"{base} is a CogVideoX 1.5 model (patches in time); MotionRAG was trained on 1.0 (5b-I2V).")
    ratio = config["temporal_compression_ratio"]
    every = 2 * ratio  # of an even number of latent frames the VAE makes 4 pictures each, of the first one too
    if frames < 1 or (frames - 1) % every or frames > config["sample_frames"]:
        raise CheckpointError(
            f"frames is {frames}; allowed: 1 + a multiple of {every}, up to {config['sample_frames']}, such as 17 or 49."
        )
    return (frames - 1) // ratio + 1, config["out_channels"], config["sample_height"], config["sample_width"]


def step_weights(transformer: Component, files: MotionRAG, step: CogVideoXStep) -> tuple[dict[str, Lazy], KeyReport]:
    """The step's weights by its own names: the base's transformer, 17_frames over it, and the adapters."""
    from diffusers import CogVideoXTransformer3DModel

    with meta():
        model = CogVideoXTransformer3DModel(**plain(transformer.config))
    weights, report = weights_of(model, transformer, "transformer", "transformer.")
    weights |= files.overlay
    weights |= files.adapter
    unknown = weights.keys() - step.state_dict().keys() - {"transformer.patch_embed.pos_embedding"}
    if unknown:
        raise CheckpointError(f"the step has no weight {sorted(unknown)[0]}")
    return weights, report


def cogvideox_system(sources: Sources, *, frames: int = 17, say: Callable[[str], None] = lambda text: None) -> System:
    """The system of the files that `sources` names: every file is opened and every key checked, and nothing is written.

    `CheckpointError` names what does not fit. `say` is told what takes its time: VideoMAE, for the one clip that is encoded here.
    """
    base = sources.base
    check_pipeline(base, "CogVideoXImageToVideoPipeline")
    transformer = open_component(base, "transformer", "CogVideoXTransformer3DModel")
    vae = open_component(base, "vae", "AutoencoderKLCogVideoX")
    config = dict(transformer.config)
    latents = geometry(config, base, frames)
    factor = 2 ** (len(vae.config["block_out_channels"]) - 1)
    size = (latents[2] * factor, latents[3] * factor)
    width = config["num_attention_heads"] * config["attention_head_dim"]
    blocks = {f"transformer.transformer_blocks.{i}.attn1": width for i in range(config["num_layers"])}
    overlay = frames != config["sample_frames"]
    files = open_motionrag(sources.motionrag, blocks, overlay=overlay, sos=sources.sos)
    tokens = (files.cama_size.num_queries, files.cama_size.dim)
    step = cogvideox_step(config, latents=latents, motion=tokens, positions=sources.positions)
    weights, step_report = step_weights(transformer, files, step)
    schedulers = _schedulers(base)
    length = config["max_text_seq_length"]
    words, pad = tokenizer_json(base / "tokenizer")
    text = sources.keeping(text_encoder(base))
    networks = motionrag.motionrag_networks(sources, files, frames, size)
    encode = sources.keeping(vae_network(vae, lambda model: EncodeCausal(model, latents[0]), "encoder"))
    query = sources.sentence_encoder()
    decoding = decoder(vae, latents, sources.tiles, sources.keeping)
    say("unconditional tokens")
    step.unconditional_motion = motionrag.unconditional_tokens(networks["motion"], frames, size)

    made = (text, networks["motion"], networks["appearance"], encode, query.network)
    released = sources.target_range == "released"
    clip = (frames, *size)
    ids = {"input_ids": Array(("batch", length), torch.int64)}
    still = {"image": Array(("batch", 3, *size)), "noise": Array(("batch", *latents[1:]))}
    args = {name: Array(("batch", *v.shape[1:]), v.dtype) for name, v in step_args(INPUTS, config, latents, tokens).items()}
    solvers = {
        name: {n: motionrag.solver_table(*solver_rows(scheduler, n), GUIDANCE) for n in sources.steps}
        for name, scheduler in schedulers.items()
    }
    return System(
        "cogvideox-5b-i2v",
        inputs=motionrag.motionrag_inputs(size, GUIDANCE, released_range=released),
        graphs={
            "text": Graph(text, ids, ("text",), {"batch": BATCH}),
            **motionrag.motionrag_graphs(networks, query.graph(), clip, tokens),
            "encode": Graph(encode, still, ("image_latents",), {"batch": BATCH}),
            **decoding.graphs,
        },
        steps=(Step(Network(step, sources.kept(weights)), INPUTS, args, motionrag.STEP_OUTPUTS, motionrag.STEP_SIZES),),
        plan=motionrag.motionrag_plan(released_range=released, decode=decoding.name),
        loops={VIDEO: motionrag.denoising_loop(solvers, ("dpm", motionrag.default_steps(sources))), **decoding.loops},
        schedules={VIDEO: solvers, **decoding.schedules},
        output=Output("video", *clip, float(FPS)),
        memory=motionrag.motionrag_memory(clip, FPS, tokens),
        tokenizers={"text": TokenizerText(words, length, pad), "text_query": query.tokenizer},
        approximations=tiles_quality(tuple(decoding.graphs), sources.tiles, TILES_ERROR),
        provenance={
            "dtype": sources.dtype, "positions": sources.positions, "sos_token": dict(files.sos),
            "target_range": sources.target_range, "overlay": "17_frames" if overlay else None,
        },
        reports=(*files.reports, step_report, *(report for network in made for report in network.reports)),
    )  # fmt: skip


def _schedulers(base: Path) -> Mapping[str, Any]:
    """DPM (what MotionRAG uses, and so the default) and DDIM with the folder's settings."""
    from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler

    config = plain(read_json(base / "scheduler" / "scheduler_config.json"))
    return {"dpm": CogVideoXDPMScheduler.from_config(config), "ddim": CogVideoXDDIMScheduler.from_config(config)}
