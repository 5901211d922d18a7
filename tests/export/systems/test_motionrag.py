"""The plainly written modules against outputs of the released classes (tests/golden/README.md)."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention
from safetensors import safe_open

from motionrt.export.systems.motionrag import (
    Cama,
    MotionAdapterCogVideoX,
    MotionAdapterCrossAttention,
    Resampler,
    sinusoidal_table,
)

GOLDEN = Path(__file__).resolve().parents[2] / "golden"


def golden(name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        return ast.literal_eval(file.metadata()["config"]), {key: file.get_tensor(key) for key in file.keys()}


def part(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def close(got: torch.Tensor, want: torch.Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(got.float(), want, atol=atol, rtol=0)


@torch.no_grad()
def test_resampler_matches_the_release() -> None:
    config, data = golden("resampler")
    module = Resampler(**config)
    module.load_state_dict(part(data, "state."))
    close(module(data["x"]), data["y"])
    close(module.bfloat16()(data["x"].bfloat16()), data["y_bf16"], atol=0.05)


@torch.no_grad()
def test_resampler_with_cls_token_matches_the_release() -> None:
    config, data = golden("resampler")
    module = Resampler(**config, with_cls_token=True)
    module.load_state_dict(part(data, "state_cls."))
    token, tokens = module(data["x"])
    close(token, data["y_cls"])
    close(tokens, data["y_cls_tokens"])


@torch.no_grad()
def test_cama_matches_the_release() -> None:
    config, data = golden("cama")
    resampler = {**config["resampler"]}
    motion_proj = Resampler(**resampler, embedding_dim=config["video_dim"])
    motion_proj.load_state_dict(part(data, "state.vision_proj."))
    image_proj = Resampler(**resampler, embedding_dim=config["image_dim"])
    image_proj.load_state_dict(part(data, "state.condition_proj."))
    cama = Cama(config["Q"], config["D"], config["layers"], config["heads"], config["ff"])
    missing = cama.load_state_dict(part(data, "state."), strict=False).missing_keys
    assert not missing
    motion = motion_proj(data["video_features"].flatten(0, 1)).unflatten(0, (2, 5))
    image = image_proj(data["image_features"].flatten(0, 1)).unflatten(0, (2, 5))
    close(cama.sequence(motion[:, :4], image), data["sequence"])
    assert torch.equal(cama.blocked(25), data["mask_true_is_blocked"])
    arguments = (motion[:, :4], image[:, :4], image[:, 4])
    close(cama.forward_all(*arguments), data["all_blocks"])
    close(cama(*arguments), data["prediction"])
    both = torch.cat([motion_proj(data["uncond_video_features"]), cama(*arguments)])
    close(both, data["predict_cfg_uncond_then_cond"])


def test_sinusoidal_tables_match_the_release() -> None:
    _, data = golden("cama")
    close(sinusoidal_table(25, 64), data["pe_table_vision"], atol=1e-6)
    close(sinusoidal_table(5, 64), data["pe_table_condition"], atol=1e-6)


def cogvideox_attention(config: dict[str, Any], data: dict[str, torch.Tensor]) -> Attention:
    attention = Attention(
        query_dim=config["D"],
        dim_head=config["head_dim"],
        heads=config["heads"],
        qk_norm="layer_norm",
        eps=config["qk_norm_eps"],
        bias=True,
        out_bias=True,
        processor=MotionAdapterCogVideoX(config["D"], config["motion_dim"]),
    )
    attention.load_state_dict(part(data, "state."))
    return attention.eval()


@pytest.mark.parametrize(("scale", "suffix"), [(1.0, ""), (0.5, "_scale_half"), (0.0, "_scale0")])
@torch.no_grad()
def test_cogvideox_adapter_matches_the_release(scale: float, suffix: str) -> None:
    config, data = golden("cogvideox_adapter")
    attention = cogvideox_attention(config, data)
    rope = (data["rope_cos"], data["rope_sin"])
    video, text = attention(
        data["video"], data["text"], image_rotary_emb=rope, motion=data["motion"], motion_scale=scale
    )
    close(video, data[f"out_video{suffix}"])
    close(text, data[f"out_text{suffix}"])


@torch.no_grad()
def test_motion_scale_zero_is_the_base_attention_bit_for_bit() -> None:
    config, data = golden("cogvideox_adapter")
    attention = cogvideox_attention(config, data)
    rope = (data["rope_cos"], data["rope_sin"])
    off = attention(data["video"], data["text"], image_rotary_emb=rope, motion=data["motion"], motion_scale=0.0)
    base = attention(data["video"], data["text"], image_rotary_emb=rope)
    assert all(torch.equal(a, b) for a, b in zip(off, base, strict=True))


@pytest.mark.parametrize(
    ("x", "context", "want"),
    [("x", "image_context", "y"), ("x_other", "image_context", "y_other"), ("x", "image_context_5", "y_5")],
)
@torch.no_grad()
def test_svd_adapter_matches_the_release(x: str, context: str, want: str) -> None:
    config, data = golden("svd_adapter")
    attention = Attention(
        query_dim=config["C"],
        cross_attention_dim=config["cross_dim"],
        heads=config["heads"],
        dim_head=config["head_dim"],
        processor=MotionAdapterCrossAttention(config["C"], config["cross_dim"]),
    )
    attention.load_state_dict(part(data, "state."))
    close(attention.eval()(data[x], data[context], motion=data["motion"]), data[want])
