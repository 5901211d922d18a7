"""Weights that released files have under other names, or as parts of others, than the modules that take them.

names = compvis_names(vae.state_dict(), 4, "first_stage_model.")       # our name -> Place(released name, shape, part)
tensors = translated(opened, names)                                    # by our names; keys that no name takes keep theirs
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from motionrt.export.checkpoints.files import Lazy
from motionrt.export.onnx.stored import Computed

# Parts of an autoencoder as diffusers calls them, and as CompVis' code does; its decoder counts from the other end.
_CELLS = (
    (r"(encoder|decoder)\.conv_norm_out\.", r"\1.norm_out."),
    (r"(encoder|decoder)\.mid_block\.resnets\.0\.", r"\1.mid.block_1."),
    (r"(encoder|decoder)\.mid_block\.resnets\.1\.", r"\1.mid.block_2."),
    (r"(encoder|decoder)\.mid_block\.attentions\.0\.", r"\1.mid.attn_1."),
    (r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\.", r"encoder.down.\1.block.\2."),
    (r"encoder\.down_blocks\.(\d+)\.downsamplers\.0\.", r"encoder.down.\1.downsample."),
    (r"\.conv_shortcut\.", ".nin_shortcut."), (r"attn_1\.group_norm\.", "attn_1.norm."),
    (r"attn_1\.to_([qkv])\.", r"attn_1.\1."), (r"attn_1\.to_out\.0\.", "attn_1.proj_out."),
)  # fmt: skip
# Parts of a CLIP tower as transformers calls them, and as open_clip does.
_TOWER = (
    (r"^embeddings\.token_embedding\.weight$", "token_embedding.weight"),
    (r"^embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^embeddings\.class_embedding$", "class_embedding"), (r"^embeddings\.patch_embedding\.", "conv1."),
    (r"^pre_layrnorm\.", "ln_pre."), (r"^post_layernorm\.", "ln_post."), (r"^final_layer_norm\.", "ln_final."),
    (r"^encoder\.layers\.", "transformer.resblocks."), (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."), (r"\.mlp\.fc2\.", ".mlp.c_proj."), (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
    (r"\.self_attn\.[qkv]_proj\.", ".attn.in_proj_"),
)  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where a weight of `shape` is: under `key`, or as the third `part` of its rows."""

    key: str
    shape: tuple[int, ...]
    part: int | None = None


def translated(tensors: Mapping[str, Lazy], names: Mapping[str, Place]) -> dict[str, Lazy]:
    """Tensors by our names, those that are there; keys of which nothing is taken keep theirs. A shape is made ours where only
    axes of one element tell both apart."""
    found: dict[str, Lazy] = {}
    for name, place in names.items():
        if (lazy := tensors.get(place.key)) is not None:
            found[name] = _shaped(lazy if place.part is None else _third(lazy, place.part), place.shape)
    used = {place.key for place in names.values()}
    return found | {key: lazy for key, lazy in tensors.items() if key not in used}


def released_names(state: Mapping[str, Tensor], inside: str) -> dict[str, Place]:
    """Weights that are called alike, with `inside` in front."""
    return {name: Place(inside + name, tuple(value.shape)) for name, value in state.items()}


def compvis_names(state: Mapping[str, Tensor], levels: int, inside: str) -> dict[str, Place]:
    """Where CompVis' code has the weights of diffusers' AutoencoderKL of so many levels, with `inside` in front."""
    return {name: Place(inside + compvis_name(name, levels), tuple(value.shape)) for name, value in state.items()}


def tower_names(state: Mapping[str, Tensor], inside: str) -> dict[str, Place]:
    """Where open_clip has the weights of transformers' CLIPTextModel or CLIPVisionModel, with `inside` in front. Queries, keys
    and values are one matrix there."""
    found = {}
    for name, value in state.items():
        key = name
        for ours, theirs in _TOWER:
            key = re.sub(ours, theirs, key)
        part = re.search(r"\.self_attn\.([qkv])_proj\.", name)
        found[name] = Place(inside + key, tuple(value.shape), "qkv".index(part[1]) if part else None)
    return found


def compvis_name(name: str, levels: int) -> str:
    """What CompVis' code calls a weight of diffusers' AutoencoderKL of so many levels."""
    for ours, theirs in _CELLS:
        name = re.sub(ours, theirs, name)
    up = lambda match: f"decoder.up.{levels - 1 - int(match[1])}."  # noqa: E731
    name = re.sub(r"decoder\.up_blocks\.(\d+)\.", up, name)
    return name.replace(".upsamplers.0.", ".upsample.").replace(".resnets.", ".block.")


def _third(lazy: Lazy, part: int) -> Lazy:
    rows = lazy.shape[0] // 3
    return Computed(lazy.dtype, (rows, *lazy.shape[1:]), lambda: lazy.read()[part * rows : (part + 1) * rows])


def _shaped(lazy: Lazy, shape: tuple[int, ...]) -> Lazy:
    if lazy.shape == shape or [n for n in lazy.shape if n != 1] != [n for n in shape if n != 1]:
        return lazy
    return Computed(lazy.dtype, shape, lambda: lazy.read().reshape(shape))
