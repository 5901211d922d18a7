"""AnimateDiff's files as they are published, at the size of the golden numbers of MotionClone (tests/golden/motionclone).

    files = animatediff(tmp_path)       # files.base, files.motion, files.sparsectrl, files.adapter: what an export is told

The UNet and SparseCtrl are the golden ones; the autoencoder, the text encoder and the adapter have random weights.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from by_path import load_by_path
from safetensors.torch import load_file, save_file
from torch import Tensor

tiny = load_by_path(Path(__file__).resolve().parents[2] / "tests/helpers/tiny_models.py")
GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "motionclone"
TOKENS, WIDTH = 7, 20  # of a text
UNET: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.6.0", "act_fn": "silu", "attention_head_dim": 4,
    "block_out_channels": [8, 16, 24, 32], "center_input_sample": False, "cross_attention_dim": WIDTH,
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"], "downsample_padding": 1, "flip_sin_to_cos": True,
    "freq_shift": 0, "in_channels": 4, "layers_per_block": 2, "mid_block_scale_factor": 1, "norm_eps": 1e-05,
    "norm_num_groups": 4, "out_channels": 4, "sample_size": 16, "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
}  # fmt: skip
# Stable Diffusion 1.5 has PNDM's, with other betas than AnimateDiff
SCHEDULER: dict[str, Any] = {
    "_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "clip_sample": False, "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
}  # fmt: skip
# The smallest that a step can be traced of in seconds: two levels, the second up block is guided
SMALL: dict[str, Any] = {
    **UNET, "block_out_channels": [8, 16], "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "layers_per_block": 1,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}  # fmt: skip
WORDS = ("blue", "a", "drift", "boat", "on", "lake")
_ATTENTION = re.compile(r"(.*attentions.*\.attn[12])\.(to_q|to_k|to_v|to_out\.0)\.weight")


@dataclass(frozen=True)
class Files:
    """Where the files are; `adapter` is a domain adapter for `base`."""

    base: Path
    motion: Path
    sparsectrl: Path
    adapter: Path


def golden(name: str) -> dict[str, Tensor]:
    """Tensors of a golden file."""
    return load_file(GOLDEN / f"{name}.safetensors")


def split(unet: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The base's own weights, and the motion modules'."""
    moving = {key: value for key, value in unet.items() if "motion_modules." in key}
    return {key: value for key, value in unet.items() if key not in moving}, moving


def released_motion(moving: dict[str, Tensor]) -> dict[str, Any]:
    """What `v3_sd15_mm.ckpt` holds: with tables of positions, and what is no tensor."""
    positions = {
        key.replace("to_q.weight", "pos_encoder.pe"): torch.zeros(1, 32, value.shape[0])
        for key, value in moving.items() if key.endswith("to_q.weight")
    }  # fmt: skip
    return {"state_dict": {**moving, **positions, "animatediff_config": {"unet_additional_kwargs": {}}}}


def released_adapter(base: dict[str, Tensor], rank: int = 2) -> dict[str, Tensor]:
    """A LoRA of every spatial attention, by the released keys."""
    draw = torch.Generator().manual_seed(8)
    found: dict[str, Tensor] = {}
    for key, value in base.items():
        if match := _ATTENTION.fullmatch(key):
            name = f"{match[1]}.processor.{match[2].removesuffix('.0')}_lora"
            found[f"{name}.down.weight"] = torch.randn(rank, value.shape[1], generator=draw) * 0.3
            found[f"{name}.up.weight"] = torch.randn(value.shape[0], rank, generator=draw) * 0.3
    return found


def write_tokenizer(folder: Path) -> None:
    """Vocabulary and merges as CLIP's folders have them: letters, and `WORDS` that merges make of them."""
    letters = sorted({letter for word in WORDS for letter in word})
    merges, made = [], []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merges.append(f"{parts[0]} {parts[1]}")
            parts = [parts[0] + parts[1], *parts[2:]]
            made.append(parts[0])
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *made, "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(dict.fromkeys(tokens))}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{merge}\n" for merge in dict.fromkeys(merges)))
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<|endoftext|>", "model_max_length": TOKENS}))


def write_base(
    folder: Path, weights: dict[str, Tensor], unet: dict[str, Any] = UNET, widths: tuple[int, ...] = (4, 4, 8, 8)
) -> None:
    """A Stable Diffusion 1.5 folder with these weights of a UNet, whose config is `unet`; `widths` of the autoencoder."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel

    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "config.json").write_text(json.dumps(unet))
    save_file(weights, folder / "unet" / "diffusion_pytorch_model.safetensors")
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths), up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths, latent_channels=4, layers_per_block=1, norm_num_groups=2, sample_size=128,
    )  # fmt: skip
    write_tokenizer(folder / "tokenizer")
    size = len(json.loads((folder / "tokenizer" / "vocab.json").read_text()))
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=size, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=TOKENS, bos_token_id=size - 2, eos_token_id=size - 1, pad_token_id=size - 1,
        )
    )  # fmt: skip
    tiny.saved(folder, {"vae": tiny.randomise(vae, 2), "text_encoder": tiny.randomise(text, 3)}, torch.float32)
    aged(folder)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))


def aged(base: Path) -> None:
    """The keys of the autoencoder and of the text encoder as the published files have them, and not as today's libraries do."""
    vae, text = base / "vae" / "diffusion_pytorch_model.safetensors", base / "text_encoder" / "model.safetensors"
    tensors = load_file(vae)
    for ours, theirs in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        tensors = {key.replace(f".attentions.0.{ours}.", f".attentions.0.{theirs}."): value for key, value in tensors.items()}
    save_file(tensors, vae)
    tensors = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in load_file(text).items()}
    save_file({**tensors, "text_model.embeddings.position_ids": torch.arange(TOKENS)[None]}, text)


def animatediff(folder: Path) -> Files:
    """Every file in its released layout."""
    still, moving = split(golden("unet"))
    files = Files(folder / "sd15", folder / "v3_sd15_mm.ckpt", folder / "sparsectrl_rgb.ckpt", folder / "adapter.ckpt")
    write_base(files.base, still)
    torch.save(released_motion(moving), files.motion)
    torch.save({"controlnet": golden("sparsectrl")}, files.sparsectrl)
    torch.save({"state_dict": released_adapter(still)}, files.adapter)
    return files


def small_animatediff(folder: Path, mode: str = "rgb") -> Files:
    """Files in the released layout of `SMALL` with random weights; latents are half as large as pictures. `mode`: of
    SparseCtrl."""
    from diffusers import SparseControlNetModel, UNetMotionModel

    sizes: dict[str, Any] = {
        "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": WIDTH,
        "motion_num_attention_heads": 4, "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
    }  # fmt: skip
    ups = ("UpBlockMotion", "CrossAttnUpBlockMotion")
    unet = UNetMotionModel(**sizes, up_block_types=ups, num_attention_heads=4, use_motion_mid_block=False)
    sketch: dict[str, Any] = {
        "use_simplified_condition_embedding": False, "conditioning_channels": 3, "conditioning_embedding_out_channels": (4, 8)
    }  # fmt: skip
    sparse = SparseControlNetModel(**sizes, attention_head_dim=4, **(sketch if mode == "sketch" else {}))
    still, moving = split(released_state(tiny.randomise(unet, 4)))
    files = Files(folder / "sd15", folder / "v3_sd15_mm.ckpt", folder / "sparsectrl.ckpt", folder / "adapter.ckpt")
    write_base(files.base, still, SMALL, (4, 8))
    torch.save(released_motion(moving), files.motion)
    torch.save({"controlnet": released_state(tiny.randomise(sparse, 5))}, files.sparsectrl)
    torch.save({"state_dict": released_adapter(still)}, files.adapter)
    return files


def released_state(module: Any) -> dict[str, Tensor]:
    """Weights of a UNet or SparseCtrl of diffusers by their released names."""
    from motionrt.export.checkpoints.animatediff_files import released_name

    return {
        released_name(name): value for name, value in module.state_dict().items() if not name.endswith("pos_embed.pe")
    }
