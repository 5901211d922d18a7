"""Published models as files of the real names, keys and shapes that hold zeros: sparse, so they take next to no disk.

    write_cogvideox(root, RELEASED)     # root/base, root/rag, root/videomae, root/dinov2
    write_svd(root, RELEASED)
    write_dynamicrafter(root, RELEASED) # root/base/model.safetensors, root/tokenizer, root/rag, root/videomae, root/dinov2
    write_motionclone(root)             # root/base, root/motion.safetensors, root/rgb.safetensors, root/sketch.safetensors
    write_motion_i2v(root)              # root/models, as the release has it

For trials of an export at full size. Configs are those of the public `config.json` files; the text tokenizer is a stand-in.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from motionrt.benchmarks.models.released import COGVIDEOX_5B_I2V, DYNAMICRAFTER, SVD_UNET
from motionrt.export.checkpoints.animatediff_files import base_config, released_name
from motionrt.export.checkpoints.files import Component
from motionrt.export.checkpoints.motionrag_files import (
    DIFFUSERS,
    CamaSize,
    ResamplerSize,
    adapter_shapes,
    overlay_shapes,
)
from motionrt.export.checkpoints.motionrag_files import DYNAMICRAFTER as DYNAMICRAFTER_NAMES
from motionrt.export.checkpoints.renaming import compvis_names, released_names, tower_names
from motionrt.export.checkpoints.safetensors_file import NAMES
from motionrt.export.compiler.weightless import meta
from motionrt.export.systems.dynamicrafter.unet import DynamiCrafterUNet, adapted
from motionrt.export.systems.motion_i2v.networks import FlowUNet, Trajectories, VideoUNet
from motionrt.export.systems.svd import adapter_blocks

Config = Mapping[str, Any]
_DIFFUSERS, _TRANSFORMERS, _PICKLED = "diffusion_pytorch_model.safetensors", "model.safetensors", "diffusion_pytorch_model.bin"

_T5_XXL: Config = {
    "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip
_CAUSAL_VAE: Config = {
    "down_block_types": ["CogVideoXDownBlock3D"] * 4, "up_block_types": ["CogVideoXUpBlock3D"] * 4,
    "block_out_channels": [128, 256, 256, 512], "latent_channels": 16, "layers_per_block": 3, "norm_num_groups": 32,
    "sample_height": 480, "sample_width": 720, "scaling_factor": 0.7, "temporal_compression_ratio": 4,
}  # fmt: skip
_TEMPORAL_VAE: Config = {
    "down_block_types": ["DownEncoderBlock2D"] * 4, "block_out_channels": [128, 256, 512, 512], "latent_channels": 4,
    "layers_per_block": 2, "sample_size": 768, "scaling_factor": 0.18215, "force_upcast": True,
}  # fmt: skip
_CLIP_H: Config = {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16, "image_size": 224,
    "patch_size": 14, "projection_dim": 1024, "hidden_act": "gelu",
}  # fmt: skip
CLIP_H_TEXT: Config = {
    "vocab_size": 49408, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "max_position_embeddings": 77, "hidden_act": "gelu",
}  # fmt: skip
_DINO_L: Config = {
    "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 518, "patch_size": 14
}  # fmt: skip
DPM: Config = {
    "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "snr_shift_scale": 1.0,
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False,
}  # fmt: skip
EULER: Config = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": "v_prediction",
    "timestep_spacing": "leading", "timestep_type": "continuous", "use_karras_sigmas": True, "sigma_min": 0.002,
    "sigma_max": 700.0, "steps_offset": 1, "interpolation_type": "linear",
}  # fmt: skip

# Stable Diffusion 1.5, and AnimateDiff v3 for it
SD_UNET: Config = {
    "attention_head_dim": 8, "block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 768, "in_channels": 4,
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"], "layers_per_block": 2, "norm_num_groups": 32,
    "sample_size": 64, "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
}  # fmt: skip
SD_VAE: Config = {
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4, "latent_channels": 4,
    "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "norm_num_groups": 32, "sample_size": 512,
}  # fmt: skip
CLIP_L: Config = {
    "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "max_position_embeddings": 77, "hidden_act": "quick_gelu",
}  # fmt: skip
ANIMATEDIFF: Config = {
    "block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768, "num_attention_heads": 8,
    "use_motion_mid_block": False,
}  # fmt: skip
_SPARSECTRL: Config = {"block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768, "attention_head_dim": 8}
PNDM: Config = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
    "skip_prk_steps": True, "steps_offset": 1,
}  # fmt: skip
DDIM: Config = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "linear", "num_train_timesteps": 1000, "clip_sample": False,
    "steps_offset": 1, "set_alpha_to_one": True,
}  # fmt: skip


@dataclass(frozen=True)
class MotionSizes:
    """Configs of MotionRAG's own parts; `motion`, `appearance`: Resamplers, `cama`: all of one token width."""

    videomae: Config
    dinov2: Config
    motion: ResamplerSize
    appearance: ResamplerSize
    cama: CamaSize


@dataclass(frozen=True)
class Sizes(MotionSizes):
    """Configs of every part."""

    transformer: Config
    causal_vae: Config
    t5: Config
    unet: Config
    temporal_vae: Config
    clip: Config


MOTIONRAG = MotionSizes(
    {"use_mean_pooling": True}, _DINO_L, ResamplerSize(1024, 4, 12, 25, 768, 1024, 4),
    ResamplerSize(1024, 4, 12, 25, 1024, 1024, 4), CamaSize(25, 1024, 4, 16, 4096),
)  # fmt: skip
RELEASED = Sizes(
    **vars(MOTIONRAG), transformer=COGVIDEOX_5B_I2V, causal_vae=_CAUSAL_VAE, t5=_T5_XXL, unet=SVD_UNET,
    temporal_vae=_TEMPORAL_VAE, clip=_CLIP_H,
)  # fmt: skip


def write_cogvideox(root: Path, sizes: Sizes, dtype: torch.dtype = torch.bfloat16) -> None:
    """A CogVideoX image-to-video folder, MotionRAG's files for it, VideoMAE and DINOv2, with weights of `dtype`."""
    from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
    from transformers import T5Config, T5EncoderModel

    base = root / "base"
    _component(base / "transformer", CogVideoXTransformer3DModel, sizes.transformer, _DIFFUSERS, dtype)
    _component(base / "vae", AutoencoderKLCogVideoX, sizes.causal_vae, _DIFFUSERS, dtype)
    text = T5Config(**sizes.t5)
    _component(base / "text_encoder", T5EncoderModel, sizes.t5, _TRANSFORMERS, dtype, lambda: T5EncoderModel(text))
    _pipeline(base, "CogVideoXImageToVideoPipeline", DPM)
    _tokenizer(base / "tokenizer")
    width = sizes.transformer["num_attention_heads"] * sizes.transformer["attention_head_dim"]
    blocks = {f"transformer.transformer_blocks.{i}.attn1": width for i in range(sizes.transformer["num_layers"])}
    write_motionrag(root / "rag", blocks, sizes, dtype, overlay=True)
    write_encoders(root, sizes, dtype)


def write_svd(root: Path, sizes: Sizes, dtype: torch.dtype = torch.bfloat16) -> None:
    """A Stable Video Diffusion folder, MotionRAG's files for it, VideoMAE and DINOv2, with weights of `dtype`."""
    from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    base = root / "base"
    _component(base / "unet", UNetSpatioTemporalConditionModel, sizes.unet, _DIFFUSERS, dtype)
    _component(base / "vae", AutoencoderKLTemporalDecoder, sizes.temporal_vae, _DIFFUSERS, dtype)
    clip = CLIPVisionConfig(**sizes.clip)
    _component(
        base / "image_encoder", CLIPVisionModelWithProjection, sizes.clip, _TRANSFORMERS, dtype,
        lambda: CLIPVisionModelWithProjection(clip),
    )  # fmt: skip
    _pipeline(base, "StableVideoDiffusionPipeline", EULER)
    write_motionrag(root / "rag", adapter_blocks(dict(sizes.unet)), sizes, dtype)
    write_encoders(root, sizes, dtype)


def write_dynamicrafter(root: Path, sizes: Sizes, dtype: torch.dtype = torch.bfloat16) -> None:
    """DynamiCrafter's one file by its released keys but for the noise schedule, MotionRAG's files for it, and the encoders."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel

    with meta():
        unet, vae = DynamiCrafterUNet(DYNAMICRAFTER), AutoencoderKL(**SD_VAE)
        text, clip = CLIPTextModel(CLIPTextConfig(**CLIP_H_TEXT)), CLIPVisionModel(CLIPVisionConfig(**sizes.clip))
        projector = ResamplerSize(1024, 4, 12, 256, 1280, 1024, 4).build()
    shapes: dict[str, tuple[int, ...]] = {}
    for names in (
        released_names(unet.state_dict(), "model.diffusion_model."),
        released_names(projector.state_dict(), "image_proj_model."),
        compvis_names(vae.state_dict(), 4, "first_stage_model."),
        tower_names(text.state_dict(), "cond_stage_model.model."),
        tower_names(clip.state_dict(), "embedder.model.visual."),
    ):  # fmt: skip
        for place in names.values():
            rows, *rest = place.shape or (1,)
            shapes[place.key] = (rows if place.part is None else 3 * rows, *rest)
    sparse_file(root / "base" / "model.safetensors", shapes, dtype)
    _tokenizer(root / "tokenizer", "<|endoftext|>")
    blocks = {f"model.diffusion_model.{path}": width for path, width in adapted(DYNAMICRAFTER).items()}
    write_motionrag(root / "rag", blocks, sizes, dtype, names=DYNAMICRAFTER_NAMES)
    write_encoders(root, sizes, dtype)


def write_motionclone(root: Path, dtype: torch.dtype = torch.float16) -> None:
    """A Stable Diffusion 1.5 folder, AnimateDiff's motion modules and both SparseCtrls by their released keys."""
    from diffusers import SparseControlNetModel, UNetMotionModel

    _stable_diffusion(root / "base", PNDM, dtype)

    def released(kind: Any, config: Config, only: str = "") -> dict[str, tuple[int, ...]]:
        with meta():
            state = kind(**config).state_dict()
        found = {name: tuple(value.shape) for name, value in state.items() if not name.endswith(".pos_embed.pe")}
        return {released_name(name): shape for name, shape in found.items() if only in name}

    sketch = {**_SPARSECTRL, "conditioning_channels": 3, "use_simplified_condition_embedding": False}
    sparse_file(root / "motion.safetensors", released(UNetMotionModel, ANIMATEDIFF, ".motion_modules."), dtype)
    sparse_file(root / "rgb.safetensors", released(SparseControlNetModel, _SPARSECTRL), dtype)
    sparse_file(root / "sketch.safetensors", released(SparseControlNetModel, sketch), dtype)


def write_motion_i2v(
    root: Path, unet: Config = SD_UNET, vae: Config = SD_VAE, text: Config = CLIP_L, dtype: torch.dtype = torch.float32
) -> None:
    """Motion-I2V's folder `models` by its released names and keys, tables of positions among them: what was tuned for pictures
    in float16, all else in `dtype`. `unet`, `vae`, `text`: of the Stable Diffusion; `vae` of the fields' autoencoder too."""
    from diffusers import AutoencoderKL

    models, half = root / "models", torch.float16
    flow, base = models / "stage1/StableDiffusion-FlowGen", models / "stage2/StableDiffusion"
    tuned = models / "stage2/DreamBooth_LoRA"
    _stable_diffusion(base, DDIM, dtype, unet, vae, text)
    config = base_config(Component(base, dict(unet), {}))
    config |= {"motion_num_attention_heads": config["num_attention_heads"], "motion_max_seq_length": 32}
    of_fields = config | {"in_channels": 2 * config["in_channels"]}
    with meta():
        nets = FlowUNet(of_fields), Trajectories(of_fields), VideoUNet(config)
        fields, pictures = AutoencoderKL(**{**vae, "in_channels": 2, "out_channels": 2}), AutoencoderKL(**vae)
    stage1, drawn, stage2 = ({
        key: tuple(value.shape) for name, value in net.state_dict().items() for key in named(name.removeprefix("unet."))
    } for net in nets)  # fmt: skip
    still = {key: shape for key, shape in stage2.items() if ".motion_modules." not in key}
    torch_file(flow / "unet" / _PICKLED, stage1, dtype)
    torch_file(flow / "controlnet" / "controlnet.bin", {f"controlnet.{key}": shape for key, shape in drawn.items()}, dtype)
    torch_file(models / "stage2/Motion_Module/motion_block.bin", {k: s for k, s in stage2.items() if k not in still}, dtype)
    torch_file(tuned / "realistic_unet.ckpt", still, half)
    torch_file(flow / "vae_flow" / _PICKLED, {key: tuple(v.shape) for key, v in fields.state_dict().items()}, dtype)
    (flow / "vae").mkdir()
    (flow / "vae" / "config.json").write_text(json.dumps({**vae, "in_channels": 2, "out_channels": 2}))
    names = compvis_names(pictures.state_dict(), len(vae["block_out_channels"]), "first_stage_model.")
    sparse_file(tuned / "realisticVisionV51_v20Novae.safetensors", {p.key: p.shape for p in names.values()}, half)


def named(name: str) -> tuple[str, ...]:
    """The keys of a weight of a network of Motion-I2V in the released files: a table of positions is in both attentions."""
    key = released_name(name)
    block, _, table = key.partition(".pos_embed.")
    return tuple(f"{block}.attention_blocks.{i}.pos_encoder.{table}" for i in range(2)) if table else (key,)


def _stable_diffusion(
    base: Path, scheduler: Config, dtype: torch.dtype, unet: Config = SD_UNET, vae: Config = SD_VAE, words: Config = CLIP_L
) -> None:
    """A diffusers folder of a Stable Diffusion 1.5."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    text = CLIPTextConfig(**words)
    _component(base / "unet", UNet2DConditionModel, unet, _DIFFUSERS, dtype)
    _component(base / "vae", AutoencoderKL, vae, _DIFFUSERS, dtype)
    _component(base / "text_encoder", CLIPTextModel, words, _TRANSFORMERS, dtype, lambda: CLIPTextModel(text))
    _pipeline(base, "StableDiffusionPipeline", scheduler)
    _tokenizer(base / "tokenizer", "<|endoftext|>")


def _component(
    folder: Path, kind: type, config: Config, file: str, dtype: torch.dtype, make: Callable[[], nn.Module] | None = None
) -> None:
    """A folder with the config of a `kind` and zeros for all its weights."""
    with meta():
        module = make() if make is not None else kind(**config)
    folder.mkdir(parents=True, exist_ok=True)
    named: dict[str, Any] = {"_class_name": kind.__name__}
    if file == _TRANSFORMERS:
        named = {"architectures": [kind.__name__], "model_type": kind.config_class.model_type}  # type: ignore[attr-defined]
    (folder / "config.json").write_text(json.dumps({**config, **named}))
    sparse_file(folder / file, {key: tuple(value.shape) for key, value in module.state_dict().items()}, dtype)


def _pipeline(base: Path, name: str, scheduler: Config) -> None:
    (base / "model_index.json").write_text(json.dumps({"_class_name": name}))
    (base / "scheduler").mkdir()
    (base / "scheduler" / "scheduler_config.json").write_text(json.dumps(dict(scheduler)))


def _tokenizer(folder: Path, end: str = "</s>") -> None:
    """Words as tokens, and `end` behind every text as T5's and CLIP's do: the real one's model is not here."""
    from tokenizers import Tokenizer, models, processors

    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, end: 1, "<unk>": 2}, unk_token="<unk>"))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, 1)])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))


def write_encoders(root: Path, sizes: MotionSizes, dtype: torch.dtype) -> None:
    """The folders `videomae` and `dinov2` in `root`, with weights of `dtype`."""
    from transformers import Dinov2Config, Dinov2Model, VideoMAEConfig, VideoMAEModel

    video, image = VideoMAEConfig(**sizes.videomae), Dinov2Config(**sizes.dinov2)
    _component(root / "videomae", VideoMAEModel, sizes.videomae, _TRANSFORMERS, dtype, lambda: VideoMAEModel(video))
    _component(root / "dinov2", Dinov2Model, sizes.dinov2, _TRANSFORMERS, dtype, lambda: Dinov2Model(image))


def write_motionrag(
    folder: Path, blocks: Mapping[str, int], sizes: MotionSizes, dtype: torch.dtype, overlay: bool = False,
    names: tuple[str, str, str] = DIFFUSERS,
) -> None:  # fmt: skip
    """MotionRAG's files with their released prefixes, and without `sos_token`, which the release does not save.

    `blocks`, `names`: widths of the attentions that have an adapter, by path: see `adapter_shapes`; `overlay`: `17_frames` too.
    """

    def shapes(size: ResamplerSize | CamaSize, prefix: str) -> dict[str, tuple[int, ...]]:
        with torch.device("meta"):
            state = size.build().state_dict()
        return {f"{prefix}{key}": tuple(value.shape) for key, value in state.items() if key != "sos_token"}

    adapters = adapter_shapes(blocks, sizes.cama.dim, names) | shapes(sizes.motion, "action_proj_model.")
    sparse_file(folder / "Motion-Adapter.safetensors", adapters, dtype)
    sparse_file(folder / "motion_proj.safetensors", shapes(sizes.motion, ""), dtype)
    transformer = shapes(sizes.cama, "") | shapes(sizes.appearance, "condition_proj.")
    sparse_file(folder / "motion_transformer.safetensors", transformer, dtype)
    if overlay:
        sparse_file(folder / "17_frames.safetensors", overlay_shapes(blocks), dtype)


def sparse_file(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> None:
    """A safetensors file of zeros that takes (nearly) no room on a disk with sparse files: for trials at full size."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def torch_file(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> None:
    """The same as `torch.save` writes it: its storages are holes."""
    with FakeTensorMode():
        tensors: dict[str, Tensor] = {name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(tensors, path)
