"""CogVideoX-5B-I2V with MotionRAG's released checkpoints as a bundle, without ever holding the model.

    export_cogvideox(Sources(base=..., motionrag=..., ...), out, frames=17)

17 frames take `17_frames.ckpt` (query, key and value of every block) over the base model's; 49 frames do not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from motionrt.export.checkpoints.files import CheckpointError, Lazy, check_pipeline, open_component, read_json
from motionrt.export.checkpoints.motionrag_files import convert_folder, open_motionrag
from motionrt.export.checkpoints.parts import Part, taken, text_part
from motionrt.export.checkpoints.sentence import add_text_query, sentence_encoder
from motionrt.export.checkpoints.tokenizers import tokenizer_json
from motionrt.export.compiler.weightless import meta
from motionrt.export.systems.cogvideox_step import INPUTS, CogVideoXStep, solver_rows
from motionrt.export.systems.published import cogvideox_step, plain, step_args
from motionrt.export.systems.stage import Sources, Stage, encoders, unconditional_tokens
from motionrt.export.write import staged
from motionrt.runtime.decode import tile_size

FPS = 8


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

    def forward(self, latents: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        """`latents [B, f, C, h, w]`, `caches` by `self.caches` -> video `[B, t, 3, H, W]` float32, about [-1, 1], and the
        caches for the next chunk, in the order of their names."""
        latents = latents.permute(0, 2, 1, 3, 4) / self.vae.config.scaling_factor
        if self.vae.post_quant_conv is not None:
            latents = self.vae.post_quant_conv(latents)
        given = _nested(dict(zip(self.caches, caches, strict=True))) if caches else None
        video, left = self.vae.decoder(latents, conv_cache=given)
        return video.permute(0, 2, 1, 3, 4), *(_flat(left).values() if self.keep else ())


def _flat(caches: Mapping[str, Any], inside: str = "cache") -> dict[str, Tensor]:
    """diffusers' nested caches by path. Its convolutions along time over one frame keep their input too, and never read it."""
    found: dict[str, Tensor] = {}
    for name, value in caches.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{inside}.{name}")
        elif value is not None and name not in ("conv_y", "conv_b"):
            found[f"{inside}.{name}"] = value
    return found


def _nested(caches: Mapping[str, Tensor]) -> dict[str, Any]:
    """What `_flat` made flat."""
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


def add_decoder(stage: Stage, base: Path, latents: tuple[int, int, int, int], tiles: int = 1) -> None:
    """The graph `decode`, and `decode_next` where there is more than one chunk: see `motionrt.runtime.decode`.

    `tiles` along the height and along the width; 1 is the whole picture.
    """
    first, after = chunks(latents[0])
    size = tuple(tile_size(length, tiles) for length in latents[2:])

    def part(caches: Sequence[str] = (), keep: bool = True) -> Part:
        return vae_part(base, lambda vae: DecodeCausal(vae, caches, keep), "decoder")

    def chunk(frames: int) -> Tensor:
        return torch.empty(1, frames, latents[1], *size, device="meta")

    with torch.no_grad():
        module: Any = part().module
        kept = _flat(module.vae.decoder(chunk(first).transpose(1, 2))[1])
    outputs = ("video", *(f"next_{name}" for name in kept))
    if not after:
        stage.add_batched("decode", part(keep=False), {"latents": chunk(first)}, outputs[:1])
        return
    stage.add_batched("decode", part(), {"latents": chunk(first)}, outputs)
    stage.add_batched("decode_next", part(tuple(kept)), {"latents": chunk(after), **kept}, outputs)


def vae_part(base: Path, make: Callable[[Any], nn.Module], half: str) -> Part:
    """One `half` ("encoder" or "decoder") of the VAE: its weights, all keys of the file being checked."""
    from diffusers import AutoencoderKLCogVideoX

    component = open_component(base, "vae", "AutoencoderKLCogVideoX")
    with meta():
        vae = AutoencoderKLCogVideoX(**plain(component.config))
    weights, report = taken("vae.", vae, component, "vae")
    module = make(vae.eval()).eval()
    delattr(vae, "decoder" if half == "encoder" else "encoder")
    return Part(module, weights, (report,) if half == "encoder" else ())


def geometry(base: Path, frames: int) -> tuple[dict[str, Any], dict[str, Any], tuple[int, int, int, int], dict[str, Any]]:
    """(transformer config, VAE config, latents F C H W, the manifest's sizes) of a CogVideoX folder."""
    config = dict(open_component(base, "transformer", "CogVideoXTransformer3DModel").config)
    vae = dict(open_component(base, "vae", "AutoencoderKLCogVideoX").config)
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
    latents = ((frames - 1) // ratio + 1, config["out_channels"], config["sample_height"], config["sample_width"])
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    model = {
        "frames": frames,
        "height": latents[2] * factor,
        "width": latents[3] * factor,
        "fps": FPS,
        "latents": list(latents),
    }
    return config, vae, latents, model


def step_weights(base: Path, files: Any, step: CogVideoXStep) -> tuple[dict[str, Lazy], Any]:
    """The step's weights by its own names: the base's transformer, 17_frames over it, and the adapters."""
    component = open_component(base, "transformer", "CogVideoXTransformer3DModel")
    config = plain(component.config)
    from diffusers import CogVideoXTransformer3DModel

    with meta():
        transformer = CogVideoXTransformer3DModel(**config)
    weights, report = taken("transformer.", transformer, component, "transformer")
    weights |= files.overlay
    weights |= files.adapter
    unknown = weights.keys() - step.state_dict().keys() - {"transformer.patch_embed.pos_embedding"}
    if unknown:
        raise CheckpointError(f"the step has no weight {sorted(unknown)[0]}")
    return weights, report


def export_cogvideox(
    sources: Sources, out: Path, *, frames: int = 17, say: Callable[[str], None] = lambda text: None
) -> list[str]:
    """Write the bundle `out`, whole or not at all; what became of the keys, one line per file.

    Every file is opened and checked before anything is written: `CheckpointError` names what does not fit. `say` is told
    which graph is next.
    """
    base = sources.base
    check_pipeline(base, "CogVideoXImageToVideoPipeline")
    config, vae_config, latents, model = geometry(base, frames)
    width = config["num_attention_heads"] * config["attention_head_dim"]
    blocks = {f"transformer.transformer_blocks.{i}.attn1": width for i in range(config["num_layers"])}
    overlay = frames != config["sample_frames"]
    files = open_motionrag(sources.motionrag, blocks, overlay=overlay, sos=sources.sos)
    motion = (files.cama_size.num_queries, files.cama_size.dim)
    model |= {"motion_tokens": list(motion), "max_references": 9, "default_references": 9}
    size = (model["height"], model["width"])
    made = encoders(sources, files, frames, size)
    step = cogvideox_step(config, latents=latents, motion=motion, positions=sources.positions)
    reports = [*files.reports, step_weights(base, files, step)[1]]
    schedulers = _schedulers(base)
    text = text_part(base)
    tokens = config["max_text_seq_length"]
    tokenizer = tokenizer_json(base / "tokenizer")
    checked = [text, made.motion(), made.appearance()]
    checked.append(vae_part(base, lambda vae: EncodeCausal(vae, latents[0]), "encoder"))
    reports += [report for part in checked for report in part.reports]

    query = sentence_encoder(sources.text_query)
    reports += query.part.reports if query is not None else ()
    convert_folder(sources.motionrag, sources.converted)  # nothing is written before this line
    files = open_motionrag(sources.converted, blocks, overlay=overlay, sos=sources.sos)
    made = encoders(sources, files, frames, size)
    weights, _ = step_weights(base, files, step)
    say("unconditional tokens")
    step.unconditional_motion = unconditional_tokens(made.motion(), frames, size)

    with staged(out) as folder:
        stage = Stage(folder, say, sources)
        ids = {"input_ids": torch.empty(1, tokens, dtype=torch.int64, device="meta")}
        stage.add_batched("text", text, ids, ("text",))
        query_tokenizer, query_digest = add_text_query(stage, query)
        digests = stage.add_encoders(made, model)
        still = {"image": torch.empty(1, 3, *size, device="meta"), "noise": torch.empty(1, *latents[1:], device="meta")}
        part = vae_part(base, lambda vae: EncodeCausal(vae, latents[0]), "encoder")
        stage.add_batched("encode", part, still, ("image_latents",))
        add_decoder(stage, base, latents, sources.tiles)
        cut = stage.add_step(step, step_args(INPUTS, config, latents, motion), INPUTS, weights)
        return stage.finish(
            "cogvideox-5b-i2v", model, cut, reports,
            solvers={name: {n: solver_rows(made, n) for n in sources.steps} for name, made in schedulers.items()},
            tokenizers={"text": (*tokenizer[:1], tokens, tokenizer[1]), "text_query": query_tokenizer},
            digests={"text_query": query_digest, **digests},
            chosen={
                "positions": sources.positions, "sos_token": dict(files.sos), "overlay": "17_frames" if overlay else None,
            },
        )  # fmt: skip


def _schedulers(base: Path) -> Mapping[str, Any]:
    """DPM (what MotionRAG uses, and so the default) and DDIM with the folder's settings."""
    from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler

    config = plain(read_json(base / "scheduler" / "scheduler_config.json"))
    return {"dpm": CogVideoXDPMScheduler.from_config(config), "ddim": CogVideoXDDIMScheduler.from_config(config)}
