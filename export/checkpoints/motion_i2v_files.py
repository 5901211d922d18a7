"""Motion-I2V's files as they are published, opened without being loaded.

    files = open_motion_i2v(MotionI2VSources(models=Path("Motion-I2V/models")))
    FlowUNet(files.stage1_config)                       # whose weights are files.stage1, by its own names

| file of `models` | what it is |
| --- | --- |
| `stage1/StableDiffusion-FlowGen/unet/diffusion_pytorch_model.bin` | stage 1, with its motion modules |
| `stage1/StableDiffusion-FlowGen/vae_flow/diffusion_pytorch_model.bin` | the autoencoder of fields; its config is in `vae` |
| `stage1/StableDiffusion-FlowGen/controlnet/controlnet.bin` | the ControlNet of drags |
| `stage2/StableDiffusion` | a Stable Diffusion 1.5: sizes, text encoder, tokenizer, schedule |
| `stage2/Motion_Module/motion_block.bin` | the motion modules of stage 2 |
| `stage2/DreamBooth_LoRA/realistic_unet.ckpt` | the UNet of stage 2 but for these |
| `stage2/DreamBooth_LoRA/realisticVisionV51_v20Novae.safetensors` | of which the autoencoder of pictures alone is read |

The release loads most of them with keys too many or too few let pass; here every key is accounted for. No file but the two
configs says what sizes it has: they are those of the Stable Diffusion, and what that does not say is read off the tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from motionrt.export.checkpoints.animatediff_files import (
    autoencoder,
    base_config,
    empty_autoencoder,
    positions_in,
    released_tensors,
    taken,
)
from motionrt.export.checkpoints.encoders import clip_text_encoder
from motionrt.export.checkpoints.files import (
    CheckpointError,
    Component,
    KeyReport,
    Lazy,
    check_pipeline,
    open_any,
    open_component,
    open_torch_file,
    read_json,
)
from motionrt.export.checkpoints.renaming import compvis_names, translated
from motionrt.export.checkpoints.sources import AS_STORED, Keeping
from motionrt.export.checkpoints.tokenizers import clip_tokenizer_json
from motionrt.export.compiler.weightless import meta
from motionrt.export.systems.motion_i2v.augmented import FORMS
from motionrt.export.systems.motion_i2v.networks import FlowUNet, Trajectories, VideoUNet
from motionrt.export.systems.system import Network, TokenizerText

_FLOW, _BASE, _TUNED = "stage1/StableDiffusion-FlowGen", "stage2/StableDiffusion", "stage2/DreamBooth_LoRA"
_WEIGHTS, _HINT = "diffusion_pytorch_model.bin", "controlnet_cond_embedding.layers.0.weight"


@dataclass(frozen=True)
class MotionI2VSources(Keeping):
    """Where an export of Motion-I2V finds its files, and the choices that change numbers.

    `models`: the release's folder of that name. `unet`, `vae`: a file in the place of `realistic_unet.ckpt`, and a diffusers
    folder of an autoencoder in the place of RealisticVision's. `form`: see `VideoUNet`; as released, the ControlNet runs
    always. `dtype`: see `Keeping`.
    """

    models: Path
    unet: Path | None = None
    vae: Path | None = None
    form: str = "own"
    dtype: str = AS_STORED
    text_query: Path | None = None

    def __post_init__(self) -> None:
        self.check(form=FORMS)


@dataclass(frozen=True)
class MotionI2V:
    """All parts, lazily: configs of the networks of `motion_i2v/networks.py` and their weights by their names; `flow_vae`,
    `vae`: AutoencoderKL, its weights by its names with `vae.` in front; `text`: token ids `[B, L]` -> `[B, L, D]`."""

    stage1_config: Mapping[str, Any]
    stage1: Mapping[str, Lazy]
    drawn_config: Mapping[str, Any]
    drawn: Mapping[str, Lazy]
    stage2_config: Mapping[str, Any]
    stage2: Mapping[str, Lazy]
    flow_vae: Network
    vae: Network
    text: Network
    tokenizer: TokenizerText
    scheduler: Mapping[str, Any]
    reports: tuple[KeyReport, ...]


def open_motion_i2v(sources: MotionI2VSources) -> MotionI2V:
    """Open and check every file of `sources`; `CheckpointError` for what is missing, foreign or damaged."""
    flow, base = sources.models / _FLOW, sources.models / _BASE
    check_pipeline(base, "StableDiffusionPipeline")
    config = base_config(open_component(base, "unet", "UNet2DConditionModel"))
    config |= {"motion_num_attention_heads": config["num_attention_heads"]}

    file = flow / "unet" / _WEIGHTS
    tensors = released_tensors(file)
    stage1_config = config | {"in_channels": 2 * config["in_channels"], "motion_max_seq_length": positions_in(tensors)}
    stage1, *reports = _network(FlowUNet, stage1_config, tensors, "stage 1", file)

    file = flow / "controlnet" / "controlnet.bin"
    tensors = {key.removeprefix("controlnet."): lazy for key, lazy in released_tensors(file).items()}
    hint = tensors[_HINT].shape if _HINT in tensors else ()
    if len(hint) != 5:
        raise CheckpointError(f"{file} has no `controlnet.{_HINT}` of five dimensions. Give Motion-I2V's controlnet.bin.")
    drawn_config = stage1_config | {"conditioning_channels": hint[1], "conditioning_hidden_channels": hint[0]}
    drawn, report = _network(Trajectories, drawn_config, tensors, "ControlNet", file)
    reports.append(report)

    motion, still = (
        sources.models / "stage2/Motion_Module/motion_block.bin",
        sources.unet or (sources.models / _TUNED / "realistic_unet.ckpt"),
    )
    tensors = released_tensors(motion)
    stage2_config = config | {"motion_max_seq_length": positions_in(tensors)}
    moving, report = _network(VideoUNet, stage2_config, tensors, "motion modules", motion, motion=True)
    own, second = _network(VideoUNet, stage2_config, released_tensors(still), "stage 2", still, motion=False)

    flow_vae = autoencoder(Component(flow / "vae_flow", read_json(flow / "vae" / "config.json"), open_torch_file(
        flow / "vae_flow" / _WEIGHTS
    )), "autoencoder of fields")  # fmt: skip
    vae, text = _picture_vae(sources, base), clip_text_encoder(base)
    words, pad = clip_tokenizer_json(base / "tokenizer")
    return MotionI2V(
        stage1_config,
        stage1,
        drawn_config,
        drawn,
        stage2_config,
        {**own, **moving},
        flow_vae,
        vae,
        text,
        TokenizerText(words, text.module.model.config.max_position_embeddings, pad),  # type: ignore[union-attr, arg-type]
        read_json(base / "scheduler" / "scheduler_config.json"),
        (*reports, report, second, *flow_vae.reports, *vae.reports, *text.reports),
    )


def _network(
    kind: Any, config: Mapping[str, Any], tensors: Mapping[str, Lazy], what: str, file: Path, motion: bool | None = None
) -> tuple[dict[str, Lazy], KeyReport]:
    """The weights of a network of `motion_i2v/networks.py`, by its names; `motion`: of its motion modules, or of all else."""
    with meta():
        state = kind(config).state_dict()
    shapes = {
        name: tuple(value.shape) for name, value in state.items()
        if not name.endswith(".pos_embed.pe") and motion in (None, ".motion_modules." in name)
    }  # fmt: skip
    inner = {name.removeprefix("unet."): name for name in shapes}
    found, report = taken(
        tensors, {key: shapes[name] for key, name in inner.items()}, what, file,
        lambda key: "the file of motion modules is read for it" if motion is False and ".motion_modules." in key else None,
    )  # fmt: skip
    return {inner[key]: lazy for key, lazy in found.items()}, report


def _picture_vae(sources: MotionI2VSources, base: Path) -> Network:
    """The autoencoder of pictures: the given folder's, or RealisticVision's, whose sizes are those of the base's."""
    if sources.vae is not None:
        return autoencoder(open_component(sources.vae, "", "AutoencoderKL"), "autoencoder of pictures")
    file = sources.models / _TUNED / "realisticVisionV51_v20Novae.safetensors"
    config = open_component(base, "vae", "AutoencoderKL").config
    inside = "first_stage_model."
    tensors = {key: lazy for key, lazy in open_any(file).items() if key.startswith(inside)}
    names = compvis_names(empty_autoencoder(config).state_dict(), len(config["block_out_channels"]), inside)
    return autoencoder(Component(file, config, translated(tensors, names)), "autoencoder of pictures")
