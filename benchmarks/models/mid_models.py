"""Models of the published depth that a CPU can time: real blocks, adapters and head width, reduced width, random weights.

    model = MODELS["cogvideox-mid"]
    step, values = model.step(adapter=True), model.feed()
    graph = open_graph(export(folder / "plain.onnx", step, values, model.outputs), threads=1)

Width and resolution shrink together, so that the adapter's share of a step's FLOPs stays what it is at full size: with
M tokens and heads of 64 it is about M (1/32 + 2/D) / (24 + 4 L/D) of a CogVideoX step when folded, which falls with L/D and
rises as D falls. `shares` counts it, in the mid model and in the real one, and every row carries both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from motionrt.benchmarks.models import full_step, released
from motionrt.benchmarks.models.full_step import OUTPUTS, Size, known_values
from motionrt.export.compiler.partition import Partition, partition
from motionrt.export.compiler.weightless import fake_partition
from motionrt.export.onnx.from_torch import Example
from motionrt.export.onnx.streamed import stream_real
from motionrt.export.systems import cogvideox_step as cogvideox
from motionrt.export.systems import steps
from motionrt.export.systems import svd_step as svd
from motionrt.export.systems.dynamicrafter import unet as crafter
from motionrt.export.systems.dynamicrafter.step import CHANGES, MOTION, MotionStep
from motionrt.export.systems.motionrag import MotionAdapter, MotionAdapterCogVideoX
from motionrt.export.systems.rows import like

Arrays = dict[str, NDArray[Any]]
Values = Mapping[str, Tensor]


@dataclass(frozen=True)
class Model:
    """A step to measure: its module with or without adapters (the same other weights), inputs, and their declared classes.

    `real`: the name of the model that it stands for, for `shares`; None for a toy. `runtime`: onnxruntime, or torch where
    ONNX Runtime, which keeps all attention scores of a layer in memory, would need 9 GB for each session.
    """

    name: str
    step: Callable[..., nn.Module]
    feed: Callable[[], dict[str, Tensor]]
    inputs: Mapping[str, str]
    outputs: tuple[str, ...]
    shape: Mapping[str, int]
    real: str | None = None
    runtime: str = "onnxruntime"

    def cut(self, *, adapter: bool) -> Partition:
        """The step after the compiler pass."""
        return partition(self.step(adapter=adapter), tuple(self.feed().values()), self.inputs, outputs=self.outputs)


def _sharpen(module: nn.Module, seed: int) -> None:
    """Draw adapter weights that matter: attention that picks among the tokens, or a wrong fold would pass the gate."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, MotionAdapter) and hasattr(part, "to_q_ip"):
                weights = [getattr(part, name)[0].weight for name in ("to_q_ip", "to_k_ip", "to_v_ip")]
            elif isinstance(part, crafter.CrossAttention) and part.adapted:
                weights = [getattr(part, name).weight for name in ("to_q_a", "to_k_a", "to_v_a")]
            else:
                continue
            for weight, gain in zip(weights, (8.0, 1.0, 1.0), strict=True):
                weight.normal_(0.0, gain * weight.shape[1] ** -0.5, generator=draw)


def _tokens(count: int, width: int) -> Tensor:
    return torch.randn(1, count, width, generator=torch.Generator().manual_seed(7))


# --- CogVideoX ------------------------------------------------------------------------------------------------------


def cogvideox_model(size: Size, real: str | None = None, batch: int = 1) -> Model:
    """The whole CogVideoX step at `size`, fp32, for `batch` requests at once."""

    def step(adapter: bool = True) -> nn.Module:
        module = full_step.build_step(size, torch.float32, adapter=adapter)
        _sharpen(module, 1)
        unconditional: Any = module.unconditional_motion
        unconditional.copy_(_tokens(size.motion_tokens, size.motion_width))
        return module

    def feed() -> dict[str, Tensor]:
        requests = [full_step.feed(size, torch.float32, seed=seed) for seed in range(batch)]
        return {name: torch.cat([request[name] for request in requests]) for name in requests[0]}

    widths = {"L": size.tokens, "D": size.model_width, "N": size.heads, "M": size.motion_tokens}
    return Model(size.name, step, feed, cogvideox.INPUTS, OUTPUTS, {"B": 2 * batch, **widths, "layers": size.layers}, real)


class Layer(nn.Module):
    """One CogVideoX block with its Motion-Adapter, without guidance: B is 1."""

    def __init__(self, size: Size, adapter: bool) -> None:
        super().__init__()
        from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock

        self.block: Any = CogVideoXBlock(size.model_width, size.heads, size.head_width, size.time_width, attention_bias=True)
        self.adapted = adapter
        if adapter:
            self.block.attn1.set_processor(MotionAdapterCogVideoX(size.model_width, size.motion_width))
        config = SimpleNamespace(
            patch_size=2, attention_head_dim=size.head_width, sample_height=size.height, sample_width=size.width
        )
        cos, sin = cogvideox.rotary_tables(config, size.frames, size.height, size.width)
        self.rope_cos: Tensor
        self.rope_sin: Tensor
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)

    def forward(
        self, hidden: Tensor, text: Tensor, time: Tensor, motion: Tensor, motion_scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`hidden [1, Lv, D]`, `text [1, Lt, D]`, `time [1, time width]`, `motion [1, M, Dm]`, `motion_scale [1]`."""
        extra = {"attention_kwargs": {"motion": motion, "motion_scale": like(motion_scale, motion)}} if self.adapted else {}
        video, words = self.block(hidden, text, time, image_rotary_emb=(self.rope_cos, self.rope_sin), **extra)
        return video, words


def layer_model(size: Size, real: str | None = None) -> Model:
    """One block of `size` at its full sequence length."""

    def step(adapter: bool = True) -> nn.Module:
        torch.manual_seed(0)
        module = Layer(size, adapter).eval()
        _sharpen(module, 1)
        return module

    def feed() -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(0)
        rows = {"hidden": size.tokens - size.text_tokens, "text": size.text_tokens}
        values = {name: torch.randn(1, count, size.model_width, generator=draw) for name, count in rows.items()}
        values["time"] = torch.randn(1, size.time_width, generator=draw)
        values["motion"] = torch.randn(1, size.motion_tokens, size.motion_width, generator=draw)
        return {**values, "motion_scale": torch.ones(1)}

    inputs = {"hidden": "step", "text": "step", "time": "schedule", "motion": "request", "motion_scale": "request"}
    shape = {"B": 1, "L": size.tokens, "D": size.model_width, "N": size.heads, "M": size.motion_tokens, "layers": 1}
    return Model(size.name, step, feed, inputs, ("video", "words"), shape, real, "torch")


# --- SVD ------------------------------------------------------------------------------------------------------------

SVD_MID: Mapping[str, Any] = {
    **released.SVD_UNET,
    "block_out_channels": (64, 128, 256, 256), "num_attention_heads": (1, 2, 4, 4), "cross_attention_dim": 208,
    "addition_time_embed_dim": 64, "projection_class_embeddings_input_dim": 192,
}  # fmt: skip
SVD_TOY: Mapping[str, Any] = {
    **released.SVD_UNET,
    "block_out_channels": (32, 32), "num_attention_heads": (1, 1), "cross_attention_dim": 16, "layers_per_block": 1,
    "addition_time_embed_dim": 16, "projection_class_embeddings_input_dim": 48,
    "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
    "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
}  # fmt: skip


def svd_model(
    name: str, config: Mapping[str, Any], latents: tuple[int, int, int, int], motion: tuple[int, int], real: str | None = None
) -> Model:
    """The whole SVD step, fp32; `latents` F, C, H, W, `motion` M, D."""

    def step(adapter: bool = True) -> nn.Module:
        from diffusers import UNetSpatioTemporalConditionModel

        torch.manual_seed(0)
        unet = UNetSpatioTemporalConditionModel(**steps.plain(config))
        svd.install_svd_adapter(unet, motion[1])
        module = svd.SvdStep(unet, _tokens(*motion), latents[0], (6.0, 127.0, 0.02)).eval()
        _sharpen(module, 1)
        if not adapter:
            for _, attention in svd.spatial_attentions(unet):
                attention.set_processor(svd.SharedCrossAttention(module.conditions, None))
        return module

    def feed() -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(0)
        values = {
            key: torch.randn(value.shape, generator=draw)
            for key, value in steps.step_args(svd.INPUTS, config, latents, motion).items()
        }
        fixed = {"coefficients": torch.tensor([[0.8, -0.6, 0.7, 0.3, 0.0, 0.0]]), "timestep": torch.tensor([0.4])}
        return {**values, **fixed, "guidance": torch.tensor([3.0]), "motion_scale": torch.tensor([1.0])}

    widths = config["block_out_channels"]
    shape = {"B": 2, "F": latents[0], "H": latents[2], "W": latents[3], "D": widths[0], "M": motion[0]}
    return Model(name, step, feed, svd.INPUTS, OUTPUTS, shape, real)


# --- DynamiCrafter ----------------------------------------------------------------------------------------------------


def dynamicrafter_model(
    name: str, size: crafter.Size, latents: tuple[int, int, int, int], motion: tuple[int, int], tokens: tuple[int, int],
    real: str | None = None,
) -> Model:  # fmt: skip
    """The whole DynamiCrafter step with two passes, fp32; `latents` F, C, H, W, `motion` M, D, `tokens` of text and image."""

    def step(adapter: bool = True) -> nn.Module:
        torch.manual_seed(0)
        unet = crafter.DynamiCrafterUNet(replace(size, motion=motion[1]))
        _sharpen(unet, 1)
        if not adapter:
            plain = crafter.DynamiCrafterUNet(size)
            plain.load_state_dict({name: unet.state_dict()[name] for name in plain.state_dict()})
            unet = plain
        words, picture = (_tokens(count, size.context) for count in tokens)
        return MotionStep(unet, words, picture, _tokens(*motion)).eval()

    def feed() -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(0)
        args = released.crafter_args(released.dynamicrafter_step(size, motion, tokens), latents)
        values = {key: torch.randn(value.shape, generator=draw) for key, value in args.items()}
        fixed = {"coefficients": torch.tensor([[0.8, -0.6, 0.7, 0.3, 0.0, 0.1]]), "timestep": torch.tensor([500.0])}
        numbers = {"guidance": 2.0, "motion_scale": 1.0, "fs": 15.0, "guidance_rescale": 0.0}
        return {**values, **fixed, **{key: torch.tensor([value]) for key, value in numbers.items()}}

    shape = {"B": 2, "F": latents[0], "H": latents[2], "W": latents[3], "D": size.channels, "M": motion[0]}
    return Model(name, step, feed, {**CHANGES, **MOTION}, OUTPUTS, shape, real)


CRAFTER_MID = crafter.Size(channels=64, context=208)
CRAFTER_TOY = crafter.Size(channels=32, widths=(1, 2), blocks=1, attended=1, head=32, context=16)
MID = Size("cogvideox-mid", 42, 4, 64, 5, 24, 34, 34, 344, 44, 25, 88)
TOY = replace(full_step.TOY, name="cogvideox-toy")
MODELS: Mapping[str, Model] = {
    model.name: model
    for model in (
        cogvideox_model(MID, "cogvideox-5b-i2v"),
        layer_model(replace(full_step.FULL, name="cogvideox-layer"), "cogvideox-5b-i2v"),
        svd_model("svd-mid", SVD_MID, (14, 4, 16, 24), (25, 208), "svd"),
        dynamicrafter_model("dynamicrafter-mid", CRAFTER_MID, (16, 4, 16, 24), (25, 208), (77, 256), "dynamicrafter-1024"),
        cogvideox_model(TOY),
        layer_model(replace(TOY, name="layer-toy")),
        svd_model("svd-toy", SVD_TOY, (3, 4, 8, 8), (5, 12)),
        dynamicrafter_model("dynamicrafter-toy", CRAFTER_TOY, (3, 4, 8, 8), (5, 12), (7, 9)),
    )
}


# --- running --------------------------------------------------------------------------------------------------------


def export(path: Path, module: nn.Module, values: Values, outputs: tuple[str, ...], atol: float = 1e-3) -> Path:
    """`module` as an ONNX graph of exactly these sizes, checked against PyTorch; `values` in the order of its arguments."""
    example = Example({}, dict(values))
    # values pass through 42 blocks of random weights: the gates of the benchmarks are what proves equality
    stream_real(path, module, [example, example], outputs, {}, atol=atol)
    return path


def export_step(path: Path, cut: Partition, values: Values) -> tuple[Path, dict[str, Tensor]]:
    """The rewritten step as an ONNX graph, and what it reads."""
    known = known_values(cut, values)
    reads = {name: known[name].contiguous() for name in cut.step.inputs}
    return export(path, cut.step.module, reads, cut.step.outputs), reads


def arrays(values: Values) -> Arrays:
    """Tensors as NumPy arrays, without a copy."""
    return {name: np.asarray(value.numpy()) for name, value in values.items()}


# --- FLOPs ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shares:
    """Counted FLOPs of one step: without adapters, with them as released, and after the compiler pass."""

    base: int
    base_ours: int
    released: int
    ours: int


def shares(with_adapter: Partition, without: Partition) -> Shares:
    """Counts of two partitions of the same model."""
    return Shares(
        without.original.flops, without.classes["step"].flops, with_adapter.original.flops, with_adapter.classes["step"].flops
    )


def real_shares(model: str) -> Shares:
    """The same counts at the published size, from structure alone: CogVideoX at 480x720x17, the others at 576x1024x16."""
    if model == "svd":
        return _real_svd()
    if model == "dynamicrafter-1024":
        return _real_dynamicrafter()
    one, two = (_real_cogvideox(layers) for layers in (1, 2))  # every further block adds what the second did
    count = released.COGVIDEOX_5B_I2V["num_layers"]
    return Shares(*(a + (count - 1) * (b - a) for a, b in zip(vars(one).values(), vars(two).values(), strict=True)))


def _real_cogvideox(layers: int) -> Shares:
    config, latents, motion = {**released.COGVIDEOX_5B_I2V, "num_layers": layers}, (5, 16, 60, 90), (25, 1024)
    cuts = []
    for adapter in (True, False):
        step = steps.cogvideox_step(config, latents=latents, motion=motion)
        if not adapter:
            from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0

            step.transformer.set_attn_processor(CogVideoXAttnProcessor2_0())  # type: ignore[operator]
        args = steps.step_args(cogvideox.INPUTS, config, latents, motion)
        cuts.append(fake_partition(step, tuple(args.values()), cogvideox.INPUTS, outputs=OUTPUTS))
    return shares(*cuts)


def _real_svd() -> Shares:
    config, latents, motion = dict(released.SVD_UNET), (16, 4, 72, 128), (25, 1024)
    cuts = []
    for adapter in (True, False):
        step = steps.svd_step(config, latents=latents, motion=motion)
        if not adapter:
            for _, attention in svd.spatial_attentions(step.unet):
                attention.set_processor(svd.SharedCrossAttention(step.conditions, None))
        args = steps.step_args(svd.INPUTS, config, latents, motion)
        cuts.append(fake_partition(step, tuple(args.values()), svd.INPUTS, outputs=OUTPUTS))
    return shares(*cuts)


def _real_dynamicrafter() -> Shares:
    cuts = []
    for adapters in (True, False):
        step = released.dynamicrafter_step(released.DYNAMICRAFTER, (25, 1024), adapters=adapters)
        args = released.crafter_args(step, released.CRAFTER_LATENTS)
        cuts.append(fake_partition(step, tuple(args.values()), step.changes, outputs=OUTPUTS))
    return shares(*cuts)
