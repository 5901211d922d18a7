"""DynamiCrafter's `model.ckpt` as it is published, opened without being loaded: one file with all parts in it.

    files = open_dynamicrafter(Path("DynamiCrafter_1024"))
    DynamiCrafterUNet(files.size)                       # whose weights are files.unet, by its own names

| keys | part |
| --- | --- |
| `model.diffusion_model.` | the UNet |
| `image_proj_model.` | the Resampler of CLIP's tokens |
| `first_stage_model.` | Stable Diffusion's autoencoder of pictures, as CompVis' code has it |
| `cond_stage_model.model.` | open_clip's text tower, ViT-H-14; its last block is not run |
| `embedder.model.visual.`, `embedder.model.` | its image tower, and what was left of a second text tower, which nobody reads |
| `betas`, `alphas_cumprod`, ..., `scale_arr` | the noise schedule, made anew |

A released file is a bare dict, Lightning's (`state_dict`), or DeepSpeed's (`module`, with `_forward_module.` before the names).
No file says what sizes it has: they are read off the tensors. open_clip's own package is not used: its newer versions lay rows
out in another way, and the released code then runs with wrong numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from motionrt.export.checkpoints.animatediff_files import autoencoder, empty_autoencoder
from motionrt.export.checkpoints.encoders import Text, weights_of
from motionrt.export.checkpoints.files import CheckpointError, Component, KeyReport, Lazy, check_keys, open_any
from motionrt.export.checkpoints.motionrag_files import open_resampler
from motionrt.export.checkpoints.renaming import compvis_names, released_names, tower_names, translated
from motionrt.export.compiler.weightless import meta
from motionrt.export.systems.dynamicrafter.unet import DynamiCrafterUNet, Size, sizes_of
from motionrt.export.systems.system import Network

FILES = ("model.ckpt", "model.safetensors")
HEADS = 16  # of both towers, whatever their width is
SCALE = 0.18215  # of the autoencoder's latents
_DEEPSPEED = "_forward_module."
_UNET, _PROJECTOR, _VAE = "model.diffusion_model.", "image_proj_model.", "first_stage_model."
_TEXT, _IMAGE = "cond_stage_model.model.", "embedder.model."
_BUFFERS = (
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
    "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2", "scale_arr",
)  # fmt: skip


@dataclass(frozen=True)
class DynamiCrafter:
    """All parts, lazily. `unet`: weights of a DynamiCrafterUNet of `size` by its names with `unet.` in front; `projector`: a
    Resampler, `clip`: transformers' CLIPVisionModel, `vae`: diffusers' AutoencoderKL, each with its name and a dot in front;
    `text`: token ids `[B, L]` -> `[B, L, D]`; `scale`: of x0 at the noisiest timesteps, None where the file has none."""

    file: Path
    size: Size
    unet: Mapping[str, Lazy]
    projector: Network
    clip: Network
    vae: Network
    text: Network
    scale: float | None
    reports: tuple[KeyReport, ...]


def open_dynamicrafter(path: Path) -> DynamiCrafter:
    """Open and check a `model.ckpt` (or a safetensors file of the same tensors), or the folder that it is in;
    `CheckpointError` for what is missing, foreign or damaged."""
    file = next((path / name for name in FILES if (path / name).is_file()), path)
    if file.is_dir():
        raise CheckpointError(f"{path} has no {' or '.join(FILES)}. Give DynamiCrafter's file, or the folder that it is in.")
    opened = open_any(file, ("state_dict", "module"))
    if any(key.startswith(_DEEPSPEED) for key in opened):
        opened = {key.removeprefix(_DEEPSPEED): lazy for key, lazy in opened.items()}
    parts: dict[str, dict[str, Lazy]] = {}
    for key, lazy in opened.items():
        inside = next((prefix for prefix in (_UNET, _PROJECTOR, _VAE, _TEXT, _IMAGE) if key.startswith(prefix)), "")
        parts.setdefault(inside, {})[key.removeprefix(inside)] = lazy
    for inside in (_UNET, _PROJECTOR, _VAE, _TEXT, _IMAGE):
        if inside not in parts:
            raise CheckpointError(
                f"{file} has no key `{inside}…`; it begins with `{next(iter(opened))}`. Give the whole model.ckpt of "
                "DynamiCrafter: text and image towers are in it."
            )
    try:
        size, unet, report = _unet(parts[_UNET], file)
        text, clip, vae = _text(parts[_TEXT], file), _clip(parts[_IMAGE], file), _vae(parts[_VAE], file)
    except (KeyError, IndexError) as error:  # a name or an axis by which a size is read
        raise CheckpointError(f"{file} lacks `{error.args[0]}`, or has it in another shape. Download it again.") from None
    projector, projector_size, own = open_resampler(parts[_PROJECTOR], ("",), "image_proj_model", file)
    with meta():
        resampler = projector_size.build().eval()
    _, rest = check_keys(parts.get("", {}), {}, what="noise schedule", file=file, ignored=dict.fromkeys(_BUFFERS, "made anew"))
    scale = parts.get("", {}).get("scale_arr")
    return DynamiCrafter(
        file,
        size,
        unet,
        Network(resampler, {f"projector.{name}": lazy for name, lazy in projector.items()}, (own,)),
        clip,
        vae,
        text,
        None if scale is None else float(scale.read().flatten()[-1]),
        (report, own, *clip.reports, *vae.reports, *text.reports, rest),
    )


def _unet(tensors: Mapping[str, Lazy], file: Path) -> tuple[Size, dict[str, Lazy], KeyReport]:
    """The UNet's size and weights; the 256 model calls one part of it by another name."""
    tensors = {key.replace("framestride_embed.", "fps_embedding."): lazy for key, lazy in tensors.items()}
    size = sizes_of({key: tuple(lazy.shape) for key, lazy in tensors.items()})
    with meta():
        network = DynamiCrafterUNet(size)
    found = translated(tensors, released_names(network.state_dict(), ""))
    weights, report = weights_of(network, Component(file, {}, found), "UNet", "unet.")
    return size, weights, report


def _vae(tensors: Mapping[str, Lazy], file: Path) -> Network:
    levels = _count(tensors, "encoder.down.")
    widths = [tensors[f"encoder.down.{level}.block.0.conv2.weight"].shape[0] for level in range(levels)]
    config = {
        "down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": widths, "layers_per_block": _count(tensors, "encoder.down.0.block."),
        "latent_channels": tensors["post_quant_conv.weight"].shape[0], "norm_num_groups": 32, "scaling_factor": SCALE,
    }  # fmt: skip
    names = compvis_names(empty_autoencoder(config).state_dict(), levels, "")
    return autoencoder(Component(file, config, translated(tensors, names)), "autoencoder")


def _text(tensors: Mapping[str, Lazy], file: Path) -> Network:
    """The text tower without its last block, whose output the release does not read."""
    from transformers import CLIPTextConfig, CLIPTextModel

    vocabulary, width = tensors["token_embedding.weight"].shape
    last = _count(tensors, "transformer.resblocks.") - 1
    config = CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=tensors["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        num_hidden_layers=last, num_attention_heads=HEADS, max_position_embeddings=tensors["positional_embedding"].shape[0],
        hidden_act="gelu", projection_dim=width, bos_token_id=0, eos_token_id=2,  # of the embedding, unread
    )  # fmt: skip
    with meta():
        model = CLIPTextModel(config)
    reasons = {"text_projection": "tokens are read, not the embedding", "logit_scale": "for training"}

    def unused(key: str) -> str | None:
        return "the last block is not run" if key.startswith(f"transformer.resblocks.{last}.") else reasons.get(key)

    found = translated(tensors, tower_names(model.state_dict(), ""))
    weights, report = weights_of(model, Component(file, {}, found), "text tower", "model.", unused=unused)
    return Network(Text(model.eval()), weights, (report,))


def _clip(tensors: Mapping[str, Lazy], file: Path) -> Network:
    """The image tower."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    width, _, patch, _ = tensors["visual.conv1.weight"].shape
    grid = round((tensors["visual.positional_embedding"].shape[0] - 1) ** 0.5)
    config = CLIPVisionConfig(
        hidden_size=width, intermediate_size=tensors["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        num_hidden_layers=_count(tensors, "visual.transformer.resblocks."), num_attention_heads=HEADS, image_size=grid * patch,
        patch_size=patch, hidden_act="gelu",
    )  # fmt: skip
    with meta():
        model = CLIPVisionModel(config)

    def unused(key: str) -> str | None:
        if key == "visual.proj":
            return "tokens are read, not the embedding"
        return None if key.startswith("visual.") else "of a second text tower, which is not run"

    found = translated(tensors, tower_names(model.state_dict(), "visual."))
    weights, report = weights_of(model, Component(file, {}, found), "image tower", "clip.", unused=unused)
    return Network(model.eval(), weights, (report,))


def _count(tensors: Mapping[str, Any], before: str) -> int:
    """How many numbers follow `before` in the names."""
    return len({key.removeprefix(before).split(".")[0] for key in tensors if key.startswith(before)})
