"""Base models as they are released, of the same classes with small widths, and MotionRAG's files to go with them.

Loaded by path: the tests are not a package.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from by_path import load_by_path
from torch import nn

release = load_by_path(Path(__file__).resolve().parents[2] / "tests/helpers/release_files.py")
TEXT_TOKENS = 6
COGVIDEOX: dict[str, Any] = {
    "num_attention_heads": 1, "attention_head_dim": 64, "in_channels": 8, "out_channels": 4, "num_layers": 2,
    "time_embed_dim": 16, "text_embed_dim": 16, "max_text_seq_length": TEXT_TOKENS, "sample_width": 8, "sample_height": 4,
    "sample_frames": 49, "patch_size": 2, "temporal_compression_ratio": 4, "use_rotary_positional_embeddings": True,
    "use_learned_positional_embeddings": True,
}  # fmt: skip
SCHEDULER: dict[str, Any] = {
    "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "snr_shift_scale": 1.0,
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False, "set_alpha_to_one": True,
}  # fmt: skip


def randomise(module: nn.Module, seed: int = 0) -> Any:
    """Random weights everywhere: libraries begin some at 0 or 1, which hides faults."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            spread = 0.1 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * spread + (0.5 if parameter.ndim < 2 else 0))
    return module.eval()


def tokenizer_file(folder: Path, size: int = 40) -> None:
    """A word tokenizer as `tokenizer.json`, which puts `</s>` behind every text as T5's does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {"<pad>": 0, "</s>": 1, "<unk>": 2, **{f"w{i}": i for i in range(3, size)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))


def cogvideox_config(layers: int, heads: int = 1, grid: tuple[int, int] = (4, 8)) -> dict[str, Any]:
    """Heads of 64, and a grid of latents (height, width)."""
    sizes = {"num_layers": layers, "num_attention_heads": heads, "sample_height": grid[0], "sample_width": grid[1]}
    return {**COGVIDEOX, **sizes}


def saved(folder: Path, parts: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Write each of `parts` as the file of its name in `dtype`, and give them back in float32, rounded as the files are."""
    for name, module in parts.items():
        module.to(dtype).save_pretrained(folder / name, safe_serialization=True)
    return {name: module.float() for name, module in parts.items()}


def write_cogvideox(
    folder: Path, config: dict[str, Any] = COGVIDEOX, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """A CogVideoX image-to-video folder with random weights, stored in `dtype`; its modules by folder name."""
    from diffusers import AutoencoderKLCogVideoX, CogVideoXDPMScheduler, CogVideoXTransformer3DModel
    from transformers import T5Config, T5EncoderModel

    transformer = randomise(CogVideoXTransformer3DModel(**config), 1)
    positions, draw = transformer.patch_embed.pos_embedding.shape, torch.Generator().manual_seed(9)
    transformer.patch_embed.pos_embedding = torch.randn(positions, generator=draw) * 0.1
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 3, up_block_types=("CogVideoXUpBlock3D",) * 3,
        block_out_channels=(4, 4, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2, sample_height=24,
        sample_width=32, scaling_factor=0.7,
    )  # fmt: skip
    text = T5EncoderModel(
        T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu")
    )
    parts = saved(folder, {"transformer": transformer, "vae": randomise(vae, 2), "text_encoder": randomise(text, 3)}, dtype)
    CogVideoXDPMScheduler(**SCHEDULER).save_pretrained(folder / "scheduler")
    tokenizer_file(folder / "tokenizer")
    index = {"_class_name": "CogVideoXImageToVideoPipeline", "_diffusers_version": "0.30.3"}
    (folder / "model_index.json").write_text(json.dumps(index))
    return parts


def write_encoders(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """VideoMAE (as it is finetuned) and DINOv2 folders of the widths in `release_files`, stored in `dtype`."""
    from transformers import Dinov2Config, Dinov2Model, VideoMAEConfig, VideoMAEForVideoClassification

    video = VideoMAEForVideoClassification(
        VideoMAEConfig(
            image_size=32, patch_size=16, num_frames=16, tubelet_size=2, hidden_size=release.VIDEO_WIDTH, num_hidden_layers=2,
            num_attention_heads=2, intermediate_size=32, use_mean_pooling=True, num_labels=3,
        )
    )  # fmt: skip
    image = Dinov2Model(
        Dinov2Config(
            hidden_size=release.IMAGE_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=70,
            patch_size=14,
            mlp_ratio=2,
        )
    )
    return saved(folder, {"videomae": randomise(video, 4), "dinov2": randomise(image, 5)}, dtype)


UNET: dict[str, Any] = {
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
    "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    "layers_per_block": 1, "num_attention_heads": (2, 4), "cross_attention_dim": 24, "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 24, "num_frames": 9,
}  # fmt: skip
# The released structure, 16 spatial and 16 temporal transformers: its export takes minutes, so bundles of tests have `UNET`.
WHOLE_UNET: dict[str, Any] = {
    **UNET, "block_out_channels": (32, 64, 64, 64), "layers_per_block": 2, "num_attention_heads": (1, 2, 2, 2),
    "down_block_types": (*(("CrossAttnDownBlockSpatioTemporal",) * 3), "DownBlockSpatioTemporal"),
    "up_block_types": ("UpBlockSpatioTemporal", *(("CrossAttnUpBlockSpatioTemporal",) * 3)),
}  # fmt: skip
EULER: dict[str, Any] = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": "v_prediction",
    "timestep_spacing": "leading", "timestep_type": "continuous", "use_karras_sigmas": True, "sigma_min": 0.002,
    "sigma_max": 700.0, "steps_offset": 1, "interpolation_type": "linear",
}  # fmt: skip


def unet_config(width: int) -> dict[str, Any]:
    """Of `width` at the highest resolution; the other levels have twice and four times that, as released, and heads of 64."""
    widths = (width, 2 * width, 4 * width, 4 * width)
    return {**WHOLE_UNET, "block_out_channels": widths, "num_attention_heads": tuple(n // 64 for n in widths)}


def write_svd(folder: Path, config: dict[str, Any] = UNET, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """A Stable Video Diffusion folder with random weights, stored in `dtype`; its modules by folder name."""
    from diffusers import AutoencoderKLTemporalDecoder, EulerDiscreteScheduler, UNetSpatioTemporalConditionModel
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    vae = AutoencoderKLTemporalDecoder(
        down_block_types=("DownEncoderBlock2D",) * 2, block_out_channels=(32, 32), layers_per_block=1, latent_channels=4
    )
    clip = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=224, patch_size=56,
            projection_dim=24,
        )
    )  # fmt: skip
    unet = UNetSpatioTemporalConditionModel(**config)
    parts = saved(folder, {"unet": randomise(unet, 1), "vae": randomise(vae, 2), "image_encoder": randomise(clip, 3)}, dtype)
    EulerDiscreteScheduler(**EULER).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableVideoDiffusionPipeline"}))
    return parts


def sources(folder: Path, seed: int, steps: tuple[int, ...], encoders: Path | None = None) -> Any:
    """What an export of the files in `folder` is told, `encoders` being elsewhere if given; `seed`: of the sos token."""
    from motionrt.export.checkpoints.motionrag_files import SosToken
    from motionrt.export.systems.motionrag_system import Sources

    where = encoders or folder
    return Sources(
        folder / "base", folder / "rag", where / "videomae", where / "dinov2", sos=SosToken(seed=seed), steps=steps
    )
