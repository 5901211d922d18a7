"""The tiny DynamiCrafter of tests/golden/dynamicrafter, and files of the released layout with small widths.

Loaded by path: the tests are not a package.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from by_path import load_by_path
from safetensors.torch import load_file
from torch import Tensor

from motionrt.export.checkpoints.renaming import compvis_names
from motionrt.export.systems.dynamicrafter.unet import DynamiCrafterUNet, Size, adapted, sizes_of
from motionrt.export.systems.motionrag import Resampler

models = load_by_path(Path(__file__).resolve().parents[2] / "tests/helpers/tiny_models.py")
GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden" / "dynamicrafter"
NETWORK, ALPHA = "model.diffusion_model.", "alpha_variant.model.diffusion_model."


@cache
def golden(name: str) -> dict[str, Tensor]:
    """Tensors of a golden file; weights, which it holds in float16 exactly, in float32."""
    return {key: value.float() if value.dtype == torch.float16 else value for key, value in stored(name).items()}


def part(name: str, prefix: str) -> dict[str, Tensor]:
    """Tensors of a golden file that have `prefix` before their names, without it."""
    return {key.removeprefix(prefix): value for key, value in golden(name).items() if key.startswith(prefix)}


def golden_size(**changes: Any) -> Size:
    """The size of the golden network, without adapters unless `changes` says so."""
    weights = part("weights_unet_imageproj", NETWORK)
    return replace(sizes_of({key: tuple(value.shape) for key, value in weights.items()}), **changes)


def fitted(module: torch.nn.Module, weights: dict[str, Tensor]) -> Any:
    """`module` with `weights`, axes of one element left out where it has none."""
    shapes = {key: value.shape for key, value in module.state_dict().items()}
    module.load_state_dict({key: weights[key].reshape(shape) for key, shape in shapes.items()})
    return module.eval()


def network(**changes: Any) -> DynamiCrafterUNet:
    """The golden network; `changes` of its size."""
    weights = part("weights_unet_imageproj", NETWORK) | part("weights_unet_imageproj", ALPHA)
    found: DynamiCrafterUNet = fitted(DynamiCrafterUNet(golden_size(**changes)), weights)
    return found


def turned(x: Tensor) -> Tensor:
    """`[B, C, F, h, w]` as the release has it to `[B, F, C, h, w]`, or back."""
    return x.transpose(1, 2)


def stored(name: str) -> dict[str, Tensor]:
    """Tensors of a golden file as they are stored."""
    found: dict[str, Tensor] = load_file(GOLDEN / f"{name}.safetensors")
    return found


def golden_vae() -> Any:
    """The golden autoencoder as diffusers' class."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(32, 32),
        layers_per_block=1, latent_channels=4, norm_num_groups=32,
    )  # fmt: skip
    names = compvis_names(vae.state_dict(), 2, "")
    return fitted(vae, {ours: part("vae", "first_stage_model.")[place.key] for ours, place in names.items()})


# --- files of the released layout -----------------------------------------------------------------------------------

TEXT, IMAGE, WIDTH, TOKENS, LENGTH = 16, 32, 32, 48, 7  # widths of the towers and the network; image tokens; of a prompt
SIZE = Size(channels=WIDTH, widths=(1, 2), blocks=1, attended=1, head=16, context=TEXT)
SCALE_ARR = {"1024": 0.3, "512": 0.7, "256": None}


@dataclass
class Parts:
    """The modules of a small DynamiCrafter, in float32, and `state`, what its file holds."""

    size: Size
    unet: DynamiCrafterUNet
    text: Any
    clip: Any
    projector: Resampler
    vae: Any
    state: dict[str, Tensor]


def small(model: str = "1024", dtype: torch.dtype = torch.float32) -> Parts:
    """A small model with random weights that are rounded to `dtype`, under the released names."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel

    size = replace(SIZE, learned=model == "256")
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=40, hidden_size=TEXT, intermediate_size=32, num_hidden_layers=3, num_attention_heads=16,
        max_position_embeddings=LENGTH, hidden_act="gelu", bos_token_id=0, eos_token_id=2,
    ))  # fmt: skip
    clip = CLIPVisionModel(CLIPVisionConfig(
        hidden_size=IMAGE, intermediate_size=32, num_hidden_layers=2, num_attention_heads=16, image_size=224, patch_size=56,
        hidden_act="gelu",
    ))  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(32, 32),
        layers_per_block=1, latent_channels=4, norm_num_groups=32, scaling_factor=0.18215,
    )  # fmt: skip
    modules: dict[str, Any] = {
        "unet": DynamiCrafterUNet(size), "text": text, "clip": clip, "vae": vae,
        "projector": Resampler(64, 1, 64, 1, TOKENS, IMAGE, TEXT, 2),
    }  # fmt: skip
    for index, module in enumerate(modules.values()):
        models.randomise(module, index).to(dtype).float()
    modules["unet"].out[2].weight.data.mul_(0.1).to(dtype)  # steps of a random network stay small
    modules["unet"].to(dtype).float()
    parts = Parts(size, state={}, **modules)
    parts.state |= {key: value.to(dtype) for key, value in released_state(parts, model).items()}
    return parts


def released_state(parts: Parts, model: str) -> dict[str, Tensor]:
    """All that a `model.ckpt` holds, by its keys."""
    state = {f"model.diffusion_model.{key}": value for key, value in parts.unet.state_dict().items()}
    for key in [key for key in state if ".temopral_conv." in key and state[key].ndim == 4]:
        state[key] = state[key][..., None]
    for key in ("proj_in", "proj_out"):
        state[f"model.diffusion_model.init_attn.0.{key}.weight"] = state[f"model.diffusion_model.init_attn.0.{key}.weight"][
            ..., None
        ]
    if model == "256":
        state = {key.replace(".fps_embedding.", ".framestride_embed."): value for key, value in state.items()}
    state |= {f"image_proj_model.{key}": value for key, value in parts.projector.state_dict().items()}
    own = parts.vae.state_dict()
    for name, place in compvis_names(own, 2, "first_stage_model.").items():
        pixels = ".attentions." in name and own[name].ndim == 2
        state[place.key] = own[name][..., None, None] if pixels else own[name]
    drawn = {"text_projection": torch.ones(TEXT, TEXT), "logit_scale": torch.ones(())}
    words = {f"cond_stage_model.model.{key}": value for key, value in {**tower(parts.text.state_dict()), **drawn}.items()}
    last = {key.replace(".resblocks.2.", ".resblocks.3."): value + 1 for key, value in words.items() if ".resblocks.2." in key}
    state |= words | last
    seen = tower(parts.clip.state_dict())
    state |= {f"embedder.model.visual.{key}": value for key, value in seen.items()}
    state["embedder.model.visual.proj"] = torch.ones(IMAGE, TEXT)
    left = (
        "positional_embedding",
        "token_embedding.weight",
        "ln_final.weight",
        "ln_final.bias",
        "text_projection",
        "logit_scale",
    )
    state |= {f"embedder.model.{key}": words[f"cond_stage_model.model.{key}"] for key in left}
    state |= {key: torch.zeros(1000) for key in ("betas", "alphas_cumprod", "posterior_variance")}  # wrong: they are made anew
    if (base := SCALE_ARR[model]) is not None:
        state["scale_arr"] = torch.cat([torch.linspace(1, base, 400), torch.full((1000,), base)])
    return state


def tower(own: dict[str, Tensor]) -> dict[str, Tensor]:
    """A CLIP tower of transformers by the keys of open_clip, written out here: its code is not installed."""
    found: dict[str, Tensor] = {}
    for key, value in own.items():
        match key.split("."):
            case ["embeddings", "class_embedding"]:
                found["class_embedding"] = value
            case ["embeddings", "patch_embedding", kind]:
                found[f"conv1.{kind}"] = value
            case ["embeddings", "token_embedding", kind]:
                found[f"token_embedding.{kind}"] = value
            case ["embeddings", "position_embedding", _]:
                found["positional_embedding"] = value
            case ["pre_layrnorm", kind]:
                found[f"ln_pre.{kind}"] = value
            case ["post_layernorm", kind]:
                found[f"ln_post.{kind}"] = value
            case ["final_layer_norm", kind]:
                found[f"ln_final.{kind}"] = value
            case ["encoder", "layers", i, "self_attn", "q_proj", kind]:
                three = [own[key.replace("q_proj", name)] for name in ("q_proj", "k_proj", "v_proj")]
                found[f"transformer.resblocks.{i}.attn.in_proj_{kind}"] = torch.cat(three)
            case ["encoder", "layers", i, "self_attn", "out_proj", kind]:
                found[f"transformer.resblocks.{i}.attn.out_proj.{kind}"] = value
            case ["encoder", "layers", i, "mlp", which, kind]:
                name = {"fc1": "c_fc", "fc2": "c_proj"}[which]
                found[f"transformer.resblocks.{i}.mlp.{name}.{kind}"] = value
            case ["encoder", "layers", i, which, kind]:
                name = {"layer_norm1": "ln_1", "layer_norm2": "ln_2"}[which]
                found[f"transformer.resblocks.{i}.{name}.{kind}"] = value
    return found


def write(folder: Path, model: str = "1024", dtype: torch.dtype = torch.float32) -> Parts:
    """`model.ckpt` and the folder `tokenizer` in `folder`; the parts."""
    parts = small(model, dtype)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": parts.state, "epoch": 3}, folder / "model.ckpt")
    models.tokenizer_file(folder / "tokenizer")
    settings = {"pad_token": "<pad>"}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))
    return parts


@cache
def blocks() -> dict[str, int]:
    """Attentions with adapters as MotionRAG's file calls them, and their widths."""
    return {f"model.diffusion_model.{path}": width for path, width in adapted(SIZE).items()}
