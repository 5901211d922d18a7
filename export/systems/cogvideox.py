"""CogVideoX-5B-I2V with MotionRAG's released checkpoints as a system, without ever holding the model.

    export_system(cogvideox_system(Sources(base=..., motionrag=..., ...), frames=17), out)

17 frames take `17_frames.ckpt` (query, key and value of every block) over the base model's; 49 frames do not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from motionrt.export.checkpoints.encoders import text_encoder, weights_of
from motionrt.export.checkpoints.files import CheckpointError, check_pipeline, open_component, read_json
from motionrt.export.checkpoints.tokenizers import tokenizer_json
from motionrt.export.compiler.weightless import meta
from motionrt.export.systems.cogvideox_step import BRANCH, INPUTS, CogVideoXStep, solver_rows
from motionrt.export.systems.decoding import Decoding, decoding, tile_size
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
from motionrt.export.systems.steps import Latents, cogvideox_step, plain, step_inputs
from motionrt.export.systems.system import Array, Graph, Network, System, TokenizerText

FPS = 8
# what is known of tiles; tests/export/systems/test_decoding.py holds it
TILES_ERROR = "not measured with released weights; with random ones, RMS below 5 % of the video's spread, and below diffusers'"


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


def open_vae(base: Path) -> tuple[Any, Network]:
    """The VAE of a folder, without weights, and its network: their places, every key checked."""
    from diffusers import AutoencoderKLCogVideoX

    component = open_component(base, "vae", "AutoencoderKLCogVideoX")
    with meta():
        vae = AutoencoderKLCogVideoX(**plain(component.config)).eval()
    weights, report = weights_of(vae, component, "vae", "vae.")
    return vae, Network(vae, weights, (report,))


def decoder(vae: Any, network: Network, latents: Latents, tiles: int = 1) -> Decoding:
    """The graph `decode`, and `decode_next` where there is more than one chunk of frames; `tiles` along height and width."""
    first, after = chunks(latents[0])
    size = (tile_size(latents[2], tiles), tile_size(latents[3], tiles))

    def pictures(frames: int, kept: Mapping[str, Tensor] | None = None) -> tuple[int, dict[str, Tensor]]:
        """How many pictures a chunk of latent frames makes, and what it leaves for the next one; on the meta device."""
        with torch.no_grad():
            given = nested_caches(kept) if kept else None
            video, left = vae.decoder(torch.empty(1, latents[1], frames, *size, device="meta"), conv_cache=given)
        return video.shape[2], flat_caches(left)

    def graph(frames: int, caches: Mapping[str, Tensor], weights_of: str | None = None) -> Graph:
        module = DecodeCausal(vae, tuple(caches), keep=after > 0).eval()
        inputs = {"latents": (frames, latents[1], *size), **{name: tuple(value.shape[1:]) for name, value in caches.items()}}
        arrays = {name: Array(("batch", *shape)) for name, shape in inputs.items()}
        outputs = ("video", *(f"next_{name}" for name in kept)) if after else ("video",)
        return Graph(Network(module, network.weights), arrays, outputs, {"batch": BATCH}, weights_of)

    count, kept = pictures(first)
    graphs, made = {"decode": graph(first, {})}, [(first, count)]
    if after:
        graphs["decode_next"] = graph(after, kept, "decode")
        made += [(after, pictures(after, kept)[0])] * ((latents[0] - first) // after)
    scale = 2 ** (len(vae.config.block_out_channels) - 1)
    return decoding(graphs, made, latents, scale, caches=tuple(kept) if after else (), tiles_error=TILES_ERROR)


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


def cogvideox_system(sources: Sources, *, frames: int = 17, say: Callable[[str], None] = lambda text: None) -> System:
    """The system of the files that `sources` names: every file is opened and every key checked, and nothing is written.

    `CheckpointError` names what does not fit. `say` is told what takes its time.
    """
    base = sources.base
    check_pipeline(base, "CogVideoXImageToVideoPipeline")
    transformer = open_component(base, "transformer", "CogVideoXTransformer3DModel")
    config = transformer.config
    latents = geometry(config, base, frames)
    width = config["num_attention_heads"] * config["attention_head_dim"]
    blocks = {f"transformer.transformer_blocks.{i}.attn1": width for i in range(config["num_layers"])}
    overlay = frames != config["sample_frames"]
    files = sources.files(blocks, overlay=overlay)
    tokens = files.tokens
    step = cogvideox_step(config, latents=latents, motion=tokens, positions=sources.positions, branch=sources.split)
    weights, report = weights_of(step.transformer, transformer, "transformer", "transformer.", added=".processor.")
    weights = {**weights, **files.overlay, **files.adapter}
    solvers = {
        name: {n: solver_table(*solver_rows(scheduler, n, sources.ending), GUIDANCE) for n in sources.steps}
        for name, scheduler in _schedulers(base).items()
    }
    length = config["max_text_seq_length"]
    words, pad = tokenizer_json(base / "tokenizer")
    text = sources.keeping(text_encoder(base))
    vae, vae_network = open_vae(base)
    vae_network = sources.keeping(vae_network)
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    size = (latents[2] * factor, latents[3] * factor)
    networks = motionrag_networks(sources, files, frames, size)
    encode = replace(vae_network, module=EncodeCausal(vae, latents[0]).eval())
    query = sources.sentence_encoder()
    say("unconditional tokens")
    step.unconditional_motion = unconditional_tokens(networks["motion"], frames, size)
    still = {"image": Array(("batch", 3, *size)), "noise": Array(("batch", *latents[1:]))}
    network, inputs = Network(step, sources.kept(weights)), step_inputs(INPUTS, config, latents, tokens)
    return motionrag_system(
        Base(
            name="cogvideox-5b-i2v",
            clip=(frames, *size),
            fps=FPS,
            encode=Graph(encode, still, ("image_latents",), {"batch": BATCH}),
            decoding=decoder(vae, vae_network, latents, sources.tiles),
            step=network,
            changes=INPUTS,
            inputs=inputs,
            branch=branch_of(network, step, inputs) if sources.split else None,
            solvers=solvers,
            text=Graph(text, {"input_ids": Array(("batch", length), torch.int64)}, ("text",), {"batch": BATCH}),
            tokenizer=TokenizerText(words, length, pad),
        ),
        networks,
        query,
        tokens,
        released_range=sources.target_range == "released",
        provenance={
            **sources.provenance(files), "positions": sources.positions, "ending": sources.ending,
            "overlay": "17_frames" if overlay else None,
        },
        reports=(*files.reports, report),
    )  # fmt: skip


def branch_of(network: Network, step: CogVideoXStep, inputs: Mapping[str, Array]) -> Branch:
    """CogVideoX's step for one branch of guidance: without conditions it reads the negative prompt, and no motion."""
    tokens: Any = step.unconditional_motion
    own = {name: inputs[name] for name in BRANCH}
    return Branch(network, BRANCH, own, {"text": "negative_text", "motion": "no_motion"}, {"no_motion": "motion"}, tokens)


def _schedulers(base: Path) -> Mapping[str, Any]:
    """DPM (what MotionRAG uses, and so the default) and DDIM with the folder's settings."""
    from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler

    config = plain(read_json(base / "scheduler" / "scheduler_config.json"))
    return {"dpm": CogVideoXDPMScheduler.from_config(config), "ddim": CogVideoXDDIMScheduler.from_config(config)}
