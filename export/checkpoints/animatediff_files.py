"""AnimateDiff's files as they are published, opened without being loaded: Stable Diffusion 1.5, motion modules, SparseCtrl.

    files = open_animatediff(MotionCloneSources(base=Path("stable-diffusion-v1-5"), motion=Path("v3_sd15_mm.ckpt")))
    unet = UNetMotionModel(**files.unet_config)         # whose weights are files.unet, by its own names

| file | layouts |
| --- | --- |
| base: `unet`, `vae`, `text_encoder`, `tokenizer`, `scheduler` | diffusers |
| motion modules: `v3_sd15_mm.ckpt` | released, or diffusers' MotionAdapter |
| domain adapter (LoRA, optional): `v3_sd15_adapter.ckpt` | released, or PEFT's; added to the base's weights as they are read |
| SparseCtrl (optional): `v3_sd15_sparsectrl_rgb.ckpt`, `..._scribble.ckpt` | released, or diffusers' SparseControlNetModel |

A released file is a `.ckpt` (mapped, never executed) or a `.safetensors` of the same tensors. It has no config: sizes are those
of the base, and what the base does not say is read off the tensors. Tables of positions are made anew, whichever file has them.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from motionrt.export.checkpoints.encoders import clip_text_encoder, weights_of
from motionrt.export.checkpoints.files import (
    CheckpointError,
    Component,
    KeyReport,
    Lazy,
    check_keys,
    check_pipeline,
    open_any,
    open_component,
    read_json,
)
from motionrt.export.checkpoints.lora import adapted
from motionrt.export.checkpoints.sources import AS_STORED, Keeping
from motionrt.export.checkpoints.tokenizers import clip_tokenizer_json
from motionrt.export.compiler.weightless import meta
from motionrt.export.systems.system import Network, TokenizerText

POSITIONS = 32  # frames that a motion module has positions for, where its file does not say
_INSIDE, _SETTINGS = ("state_dict", "controlnet"), ("animatediff_config",)
_TRAINING = "settings of the training"
# What diffusers calls a part of a motion module -> what the released files call it.
_RELEASED = (
    (".attn1.", ".attention_blocks.0."), (".attn2.", ".attention_blocks.1."), (".norm1.", ".norms.0."),
    (".norm2.", ".norms.1."), (".norm3.", ".ff_norm."),
)  # fmt: skip


@dataclass(frozen=True)
class MotionCloneSources(Keeping):
    """Where an export of MotionClone finds its files, and the choices that change numbers.

    `base`: diffusers folder of a Stable Diffusion 1.5; `motion`: motion modules, file or folder; `domain_adapter`: LoRA file;
    `sparsectrl`: file or folder, for videos that begin with an image or follow a sketch. `text_query`, `dtype`: see
    `Keeping`. `group_norm`: statistics of the motion modules' first norm, "per_frame" as the weights were trained, or
    "shared" by all frames as diffusers has it, which changes what a memory holds. `record`: what that is of a clip: its
    "latents", whose motion is read with the noise of each video, or the "representation" of one noise, an approximation.
    `semantic`: with guidance of what the video shows, as MotionClone's first version had it.
    """

    base: Path
    motion: Path
    domain_adapter: Path | None = None
    sparsectrl: Path | None = None
    text_query: Path | None = None
    dtype: str = AS_STORED
    group_norm: str = "per_frame"
    record: str = "latents"
    semantic: bool = False

    def __post_init__(self) -> None:
        self.check(group_norm=("per_frame", "shared"), record=("latents", "representation"))
        if self.record == "representation" and (self.semantic or self.sparsectrl is not None):
            raise CheckpointError(
                "record is 'representation', and a SparseCtrl is given, or semantic guidance is asked for, which read the clip "
                "itself; allowed with them: latents. Leave one of them out."
            )
        if self.semantic and self.sparsectrl is not None:
            raise CheckpointError("semantic guidance is for videos of words alone; leave it or the SparseCtrl out.")


@dataclass(frozen=True)
class SparseCtrl:
    """`config`: arguments of diffusers' SparseControlNetModel; `weights` by its names; `mode`: it reads the latents of images
    ("rgb"), or RGB pictures of sketches ("sketch")."""

    config: Mapping[str, Any]
    weights: Mapping[str, Lazy]
    mode: str


@dataclass(frozen=True)
class AnimateDiff:
    """All parts, lazily. `unet_config`: arguments of diffusers' UNetMotionModel; `unet`: its weights by its names.

    `vae`: an AutoencoderKL, its weights by its names with `vae.` in front; `text`: token ids `[B, L]` -> `[B, L, D]`;
    `scheduler`: the base's config, whose betas are not AnimateDiff's (see `motionclone/rows.py`).
    """

    unet_config: Mapping[str, Any]
    unet: Mapping[str, Lazy]
    vae: Network
    text: Network
    tokenizer: TokenizerText
    scheduler: Mapping[str, Any]
    sparsectrl: SparseCtrl | None
    reports: tuple[KeyReport, ...]


def open_animatediff(sources: MotionCloneSources) -> AnimateDiff:
    """Open and check every file of `sources`; `CheckpointError` for what is missing, foreign or damaged."""
    from diffusers import UNetMotionModel

    check_pipeline(sources.base, "StableDiffusionPipeline")
    base = open_component(sources.base, "unet", "UNet2DConditionModel")
    motion, adapter_config = _opened(sources.motion, "MotionAdapter")
    config = base_config(base)
    config |= _motion_config(config, sources.motion, motion, adapter_config)
    shapes = _shapes(UNetMotionModel, config, base.folder)
    moving = {name: shape for name, shape in shapes.items() if ".motion_modules." in name}
    still = {name: shape for name, shape in shapes.items() if name not in moving}
    weights, report = check_keys(base.tensors, still, what="unet", file=base.folder)
    reports = [report]
    if sources.domain_adapter is not None:
        file, ignored = sources.domain_adapter, dict.fromkeys(_SETTINGS, _TRAINING)
        weights, report = adapted(weights, released_tensors(file), what="domain adapter", file=file, ignored=ignored)
        reports.append(report)
    modules, report = taken(
        motion, moving, "motion modules", sources.motion,
        lambda key: None if ".motion_modules." in key else "no motion module: the base's own is used",
    )  # fmt: skip
    reports.append(report)
    sparsectrl = None
    if sources.sparsectrl is not None:
        sparsectrl, report = _open_sparsectrl(sources.sparsectrl, config)
        reports.append(report)
    vae, text = open_vae(sources.base), clip_text_encoder(sources.base)
    words, pad = clip_tokenizer_json(sources.base / "tokenizer")
    return AnimateDiff(
        config,
        weights | modules,
        vae,
        text,
        TokenizerText(words, text.module.model.config.max_position_embeddings, pad),  # type: ignore[arg-type]
        read_json(sources.base / "scheduler" / "scheduler_config.json"),
        sparsectrl,
        (*reports, *vae.reports, *text.reports),
    )


def released_name(name: str) -> str:
    """What the released files call a weight of diffusers' UNetMotionModel or SparseControlNetModel."""
    if ".motion_modules." not in name:
        return name
    for ours, theirs in _RELEASED:
        name = name.replace(ours, theirs)
    return re.sub(r"(\.motion_modules\.\d+\.)", r"\1temporal_transformer.", name)


def _opened(path: Path, kind: str) -> tuple[Mapping[str, Lazy], Mapping[str, Any] | None]:
    """Tensors of a folder of the diffusers class `kind`, with its config, or of a released file, without one."""
    if path.is_dir():
        component = open_component(path, "", kind)
        return component.tensors, component.config
    return released_tensors(path), None


def released_tensors(path: Path) -> dict[str, Lazy]:
    """Tensors of a released file, whatever is around them; training on many devices leaves `module.` before their names."""
    return {key.removeprefix("module."): lazy for key, lazy in open_any(path, _INSIDE, _SETTINGS).items()}


def _shapes(kind: Any, config: Mapping[str, Any], file: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights of a diffusers class; `CheckpointError` where it does not take the config of `file`."""
    try:
        with meta():
            state = kind(**config).state_dict()
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{file}: diffusers cannot build a {kind.__name__} of its config ({error!s:.200}). Give the files of a Stable "
            "Diffusion 1.5 and of AnimateDiff."
        ) from None
    return {name: tuple(value.shape) for name, value in state.items() if not name.endswith(".pos_embed.pe")}


def taken(
    tensors: Mapping[str, Lazy],
    shapes: Mapping[str, tuple[int, ...]],
    what: str,
    file: Path,
    unused: Callable[[str], str | None] = lambda key: None,
) -> tuple[dict[str, Lazy], KeyReport]:
    """The weights `shapes` of a file in either layout; `unused(key)`: why a key may be there and is not read, or None."""
    released = any(".temporal_transformer." in key for key in tensors)
    keys = {name: released_name(name) if released else name for name in shapes}
    ignored = {key: why for key in tensors if (why := unused(key)) is not None}
    ignored |= {key: "positions, made anew" for key in tensors if is_positions(key)}
    ignored |= dict.fromkeys(_SETTINGS, _TRAINING)
    wanted = {keys[name]: shape for name, shape in shapes.items()}
    found, report = check_keys(tensors, wanted, what=what, file=file, ignored=ignored)
    return {name: found[key] for name, key in keys.items()}, report


def is_positions(key: str) -> bool:
    return key.endswith((".pos_encoder.pe", ".pos_embed.pe"))


def positions_in(tensors: Mapping[str, Lazy]) -> int:
    """Frames that the tables of positions `[1, F, C]` in a file are for."""
    tables = [lazy.shape for key, lazy in tensors.items() if is_positions(key)]
    return min((shape[1] for shape in tables if len(shape) == 3), default=POSITIONS)


def base_config(base: Component) -> dict[str, Any]:
    """Arguments of UNetMotionModel that the base's UNet decides; `CheckpointError` for what that class cannot be told."""
    from diffusers import UNet2DConditionModel, UNetMotionModel

    allowed = inspect.signature(UNetMotionModel.__init__).parameters
    defaults = {name: at.default for name, at in inspect.signature(UNet2DConditionModel.__init__).parameters.items()}
    config: dict[str, Any] = {}
    for name, value in base.config.items():
        value = tuple(value) if isinstance(value, list) else value
        if name in allowed:
            config[name] = value
        elif name in defaults and name != "attention_head_dim" and value != defaults[name]:
            raise CheckpointError(
                f"{base.folder / 'config.json'}: {name} is {value!r}; AnimateDiff's UNet allows {defaults[name]!r} alone. "
                "Give the folder of a Stable Diffusion 1.5."
            )
    # diffusers has the number of heads under the other name in the configs of Stable Diffusion
    config["num_attention_heads"] = config.get("num_attention_heads") or base.config.get("attention_head_dim", 8)
    for name in ("down_block_types", "up_block_types"):
        config[name] = tuple(kind.replace("2D", "Motion") for kind in config.get(name, defaults[name]))
    return config


def _motion_config(
    unet: Mapping[str, Any], file: Path, tensors: Mapping[str, Lazy], config: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Arguments of UNetMotionModel that the motion modules decide. A released file does not say how many heads there are: as
    many as in the base, both have 8."""
    if config is None:
        return {
            "use_motion_mid_block": any(key.startswith("mid_block.motion_modules.") for key in tensors),
            "motion_max_seq_length": positions_in(tensors),
            "motion_num_attention_heads": unet["num_attention_heads"],
        }
    groups = unet.get("norm_num_groups", 32)
    if config.get("conv_in_channels"):
        raise CheckpointError(f"{file} is PIA's adapter, with an input of its own. Give AnimateDiff's motion modules.")
    if config.get("motion_norm_num_groups", 32) != groups:
        raise CheckpointError(
            f"{file / 'config.json'}: motion_norm_num_groups is {config['motion_norm_num_groups']}, and the base's "
            f"norm_num_groups is {groups}; they must be equal. Give motion modules for this base."
        )
    return {
        "use_motion_mid_block": config.get("use_motion_mid_block", True),
        "motion_max_seq_length": config.get("motion_max_seq_length", POSITIONS),
        "motion_num_attention_heads": config.get("motion_num_attention_heads", 8),
        "temporal_transformer_layers_per_block": config.get("motion_transformer_layers_per_block", 1),
        "temporal_transformer_layers_per_mid_block": config.get("motion_transformer_layers_per_mid_block", 1),
    }


def _open_sparsectrl(file: Path, unet: Mapping[str, Any]) -> tuple[SparseCtrl, KeyReport]:
    """SparseCtrl for the UNet of the arguments `unet`, whose encoder it is a copy of."""
    from diffusers import SparseControlNetModel

    tensors, given = _opened(file, "SparseControlNetModel")
    allowed = inspect.signature(SparseControlNetModel.__init__).parameters
    if given is None:
        config = {name: value for name, value in unet.items() if name in allowed} | _sparsectrl_config(file, tensors)
        # the UNet's number of heads is what this class calls their dimension
        config |= {"attention_head_dim": unet["num_attention_heads"], "motion_max_seq_length": positions_in(tensors)}
    else:
        config = {name: value for name, value in given.items() if name in allowed}
    weights, report = taken(tensors, _shapes(SparseControlNetModel, config, file), "SparseCtrl", file)
    mode = "rgb" if config.get("use_simplified_condition_embedding", True) else "sketch"
    return SparseCtrl(config, weights, mode), report


def _sparsectrl_config(file: Path, tensors: Mapping[str, Lazy]) -> dict[str, Any]:
    """What the condition's embedding says: one convolution of latents and mask, or a stack of them of a picture and mask."""
    name = "controlnet_cond_embedding"
    one, first = tensors.get(f"{name}.weight"), tensors.get(f"{name}.conv_in.weight")
    if one is not None and len(one.shape) == 4:
        return {"use_simplified_condition_embedding": True, "conditioning_channels": one.shape[1] - 1}
    if first is None or len(first.shape) != 4:
        raise CheckpointError(
            f"{file} has neither `{name}.weight` nor `{name}.conv_in.weight`. Give AnimateDiff's v3_sd15_sparsectrl_rgb.ckpt "
            "or v3_sd15_sparsectrl_scribble.ckpt."
        )
    blocks = [tensors[key] for i in range(1, 16, 2) if (key := f"{name}.blocks.{i}.weight") in tensors]
    return {
        "use_simplified_condition_embedding": False,
        "conditioning_channels": first.shape[1] - 1,
        "conditioning_embedding_out_channels": (first.shape[0], *(lazy.shape[0] for lazy in blocks)),
    }


def open_vae(base: Path) -> Network:
    return autoencoder(open_component(base, "vae", "AutoencoderKL"), "vae")


def empty_autoencoder(config: Mapping[str, Any]) -> Any:
    """diffusers' AutoencoderKL of a config, without weights."""
    from diffusers import AutoencoderKL

    with meta():
        return AutoencoderKL(**{name: value for name, value in config.items() if not name.startswith("_")})


def autoencoder(component: Component, what: str) -> Network:
    """The AutoencoderKL of `component`, its weights by its names with `vae.` in front."""
    vae = empty_autoencoder(component.config)
    weights, report = weights_of(vae, component, what, "vae.")
    return Network(vae.eval(), weights, (report,))
