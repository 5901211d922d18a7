"""The networks around a denoiser, each with its preprocessing inside: T5, CLIP, VideoMAE, DINOv2, and MotionRAG's Resamplers.

Each is built with `meta`, so it costs no memory, and typed in float32, whatever its weights are stored in. Pictures come in as
the runtime reads them: RGB in [-1, 1], at the size of the bundle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from motionrt.export.checkpoints.files import CheckpointError, Component, KeyReport, Lazy, check_keys, open_component
from motionrt.export.checkpoints.motionrag_files import MotionRAG
from motionrt.export.compiler.weightless import meta
from motionrt.export.systems.motionrag import Resampler
from motionrt.export.systems.system import Network

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
ENCODED = 224  # pixels that VideoMAE and DINOv2 see

# What this version of the library calls a weight -> what the released file calls it.
_RENAMED = (
    (".attention.q_proj.", ".attention.attention.query."),
    (".attention.k_proj.", ".attention.attention.key."),
    (".attention.v_proj.", ".attention.attention.value."),
    (".attention.o_proj.", ".attention.output.dense."),
    (".attention.attention.query.bias", ".attention.attention.q_bias"),
    (".attention.attention.value.bias", ".attention.attention.v_bias"),
    (".attentions.0.to_q.", ".attentions.0.query."),  # of diffusers: the image autoencoder of Stable Diffusion 1.5
    (".attentions.0.to_k.", ".attentions.0.key."),
    (".attentions.0.to_v.", ".attentions.0.value."),
    (".attentions.0.to_out.0.", ".attentions.0.proj_attn."),
)


def weights_of(
    module: nn.Module,
    component: Component,
    what: str,
    prefix: str,
    *,
    inside: str = "",
    aliases: Mapping[str, str] | None = None,
    unused: Callable[[str], str | None] = lambda key: None,
    added: str = "",
) -> tuple[dict[str, Lazy], KeyReport]:
    """The weights of `module`, with `prefix` before their names, from a component whose keys have `inside` in front.

    `unused(key)`: why a key may be there and is not read, or None. Weights with `added` in their names come from elsewhere.
    Every other key must fit: `CheckpointError`.
    """
    state = {name: tuple(value.shape) for name, value in module.state_dict().items() if not (added and added in name)}
    tensors = {key.removeprefix(inside): lazy for key, lazy in component.tensors.items()}
    names = {}
    for name in state:
        renamed = (name.replace(ours, theirs) for ours, theirs in _RENAMED if ours in name and name not in tensors)
        names[name] = next((key for key in renamed if key in tensors), name)
    wanted = {names[name]: shape for name, shape in state.items()}
    ignored = {key: why for key in tensors if key not in wanted and (why := unused(key)) is not None}
    found, report = check_keys(tensors, wanted, what=what, file=component.folder, aliases=aliases, ignored=ignored)
    return {f"{prefix}{name}": found[key] for name, key in names.items()}, report



class Text(nn.Module):
    """T5 or CLIP's text encoder, padding attended as diffusers does: ids `[B, L]` int64 -> `[B, L, D]` float32."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids).last_hidden_state


def text_encoder(base: Path) -> Network:
    """`text_encoder` of a CogVideoX folder.

    T5 v1.1 leaves the range of float16 in the second projection of every feed-forward, and in the residual stream from there
    on: `wide` names those weights, and whoever computes in float16 keeps both in float32, as transformers does.
    """
    from transformers import T5Config, T5EncoderModel

    component = open_component(base, "text_encoder", "T5EncoderModel")
    with meta():
        model = T5EncoderModel(T5Config(**component.config))
    tied = {"encoder.embed_tokens.weight": "shared.weight", "shared.weight": "encoder.embed_tokens.weight"}
    weights, report = weights_of(model, component, "text_encoder", "model.", aliases=tied)
    return Network(Text(model.eval()), weights, (report,), ("*.wo.weight",))


def clip_text_encoder(base: Path) -> Network:
    """`text_encoder` of a Stable Diffusion 1.5 folder."""
    from transformers import CLIPTextConfig, CLIPTextModel

    component = open_component(base, "text_encoder", "CLIPTextModel")
    with meta():
        model = CLIPTextModel(CLIPTextConfig(**component.config))
    inside = "text_model." if any(key.startswith("text_model.") for key in component.tensors) else ""
    weights, report = weights_of(
        model, component, "text_encoder", "model.", inside=inside,
        unused=lambda key: "a range, made anew" if key.endswith("position_ids") else None,
    )  # fmt: skip
    return Network(Text(model.eval()), weights, (report,))


def resize_matrices(height: int, width: int, short: int, size: int, mode: str) -> tuple[Tensor, Tensor]:
    """Resizing the short side of `[H, W]` to `short` with antialias, then the centre `[size, size]`: (rows `[size, H]`,
    columns `[size, W]`) so that the result is rows x columns^T. Resizing is linear and separable, so this is exact.
    """

    def axis(length: int, target: int) -> Tensor:
        picture = torch.eye(length, dtype=torch.float64)[None, None]
        matrix = F.interpolate(picture, size=(target, length), mode=mode, antialias=True, align_corners=False)[0, 0]
        start = int(round((target - size) / 2.0))
        return matrix[start : start + size].float()

    if height <= width:
        return axis(height, short), axis(width, int(short * width / height))
    return axis(height, int(short * height / width)), axis(width, short)


class Preprocess(nn.Module):
    """[-1, 1] pictures `[..., 3, H, W]` -> normalised `[..., 3, 224, 224]`: the release's resize and centre crop."""

    def __init__(self, height: int, width: int, short: int, mode: str, size: int = ENCODED) -> None:
        super().__init__()
        self.rows: Tensor
        self.columns: Tensor
        self.mean: Tensor
        self.std: Tensor
        rows, columns = resize_matrices(height, width, short, size, mode)
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("columns", columns.T.contiguous(), persistent=False)
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(STD)[:, None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.rows @ ((x + 1) / 2) @ self.columns - self.mean) / self.std


class ClipPixels(nn.Module):
    """[-1, 1] pictures `[B, 3, H, W]` -> as CLIP sees them `[B, 3, side, side]`: resized by `rows [side, H]` and
    `columns [side, W]`, then normalised."""

    def __init__(self, rows: Tensor, columns: Tensor) -> None:
        super().__init__()
        self.rows: Tensor
        self.columns: Tensor
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("columns", columns.T.contiguous(), persistent=False)
        self.register_buffer("mean", torch.tensor(CLIP_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(CLIP_STD)[:, None, None], persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        return ((self.rows @ image @ self.columns + 1) / 2 - self.mean) / self.std


class MotionTokens(nn.Module):
    """VideoMAE and the motion Resampler: clips `[n, F, 3, H, W]` in [-1, 1] -> motion tokens `[n, M, D]` float32."""

    def __init__(self, encoder: Any, proj: nn.Module, picks: list[int], preprocess: Preprocess) -> None:
        super().__init__()
        self.encoder, self.proj, self.picks, self.preprocess = encoder, proj, picks, preprocess

    def forward(self, video: Tensor) -> Tensor:
        pixels = self.preprocess(torch.stack([video[:, i] for i in self.picks], dim=1))
        tokens: Tensor = self.proj(self.encoder(pixel_values=pixels).last_hidden_state)
        return tokens


def picked(frames: int, wanted: int) -> list[int]:
    """Which of F frames VideoMAE sees: round(linspace(0, F - 1, wanted)), half to even as torch rounds."""
    return [int(i) for i in torch.linspace(0, frames - 1, wanted).round()]


def motion_encoder(folder: Path, files: MotionRAG, frames: int, size: tuple[int, int]) -> Network:
    """VideoMAE from its folder (pretrained or finetuned) and MotionRAG's Resampler, for clips of `frames` pictures of `size`.

    There is no final norm where the config pools by the mean: the Resampler reads the raw output of the last block.
    """
    from transformers import VideoMAEConfig, VideoMAEModel

    component = open_component(folder, "", None)
    if component.config.get("model_type") != "videomae":
        raise CheckpointError(f"{folder} holds a {component.config.get('model_type')} model; a videomae model is expected.")
    config = VideoMAEConfig(**component.config)
    with meta():
        encoder, proj = VideoMAEModel(config), files.motion_size.build()
    table = encoder.embeddings.__dict__.pop("position_embeddings")  # a plain attribute: a trace would lose its values
    encoder.embeddings.register_buffer("position_embeddings", table.float(), persistent=False)
    inside = "videomae." if any(key.startswith("videomae.") for key in component.tensors) else ""

    def unused(key: str) -> str | None:
        return "the classifier is not used" if key.startswith(("classifier.", "fc_norm.")) else None

    weights, report = weights_of(encoder, component, "VideoMAE", "encoder.", inside=inside, unused=unused)
    preprocess = Preprocess(*size, config.image_size, "bilinear", config.image_size)
    module = MotionTokens(encoder, proj, picked(frames, config.num_frames), preprocess).eval()
    return Network(module, weights | {f"proj.{name}": lazy for name, lazy in files.motion_proj.items()}, (report,))


def feature_encoder(motion: Network) -> tuple[Network, tuple[int, int]]:
    """VideoMAE alone, of a network by `motion_encoder`: clips -> features `[n, L, E]`, which the Resampler reads; and L, E."""
    module = motion.module
    assert isinstance(module, MotionTokens)
    tokens, width = module.encoder.embeddings.position_embeddings.shape[1:]
    weights = {name: lazy for name, lazy in (motion.weights or {}).items() if not name.startswith("proj.")}
    alone = MotionTokens(module.encoder, nn.Identity(), module.picks, module.preprocess).eval()
    return replace(motion, module=alone, weights=weights), (tokens, width)


class AppearanceTokens(nn.Module):
    """DINOv2 and the appearance Resampler: stills `[n, 3, H, W]` in [-1, 1] -> appearance tokens `[n, M, D]` float32."""

    def __init__(self, encoder: Any, proj: Resampler, preprocess: Preprocess) -> None:
        super().__init__()
        self.encoder, self.proj, self.preprocess = encoder, proj, preprocess

    def forward(self, image: Tensor) -> Tensor:
        tokens: Tensor = self.proj(self.encoder(pixel_values=self.preprocess(image)).last_hidden_state)
        return tokens


@dataclass(frozen=True)
class Interpolated:
    """DINOv2's positions for the grid that it sees, interpolated as transformers does on every call."""

    source: Lazy
    patches: int

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return (1, 1 + self.patches**2, self.source.shape[-1])

    def read(self) -> Tensor:
        table = self.source.read()
        side = round((table.shape[1] - 1) ** 0.5)
        if side == self.patches:
            return table
        grid = table[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2).float()
        grid = F.interpolate(grid, size=(self.patches, self.patches), mode="bicubic", align_corners=False)
        return torch.cat([table[:, :1], grid.permute(0, 2, 3, 1).reshape(1, self.patches**2, -1).to(table.dtype)], dim=1)


def appearance_encoder(folder: Path, files: MotionRAG, size: tuple[int, int], short: int = 256, crop: int = 224) -> Network:
    """DINOv2 from its folder and MotionRAG's Resampler, for stills of `size`; `short` side and `crop` of what DINOv2 sees."""
    from transformers import Dinov2Config, Dinov2Model

    assert files.appearance_size is not None  # nobody asks for it without CAMA
    component = open_component(folder, "", "Dinov2Model")
    config = Dinov2Config(**component.config)
    with meta():
        stored = Dinov2Model(config)
    weights, report = weights_of(stored, component, "DINOv2", "encoder.")
    config.image_size = crop
    with meta():
        encoder, proj = Dinov2Model(config), files.appearance_size.build()
    name = "encoder.embeddings.position_embeddings"
    weights[name] = Interpolated(weights[name], crop // config.patch_size)
    module = AppearanceTokens(encoder, proj, Preprocess(*size, short, "bicubic", crop)).eval()
    return Network(module, weights | {f"proj.{key}": lazy for key, lazy in files.appearance_proj.items()}, (report,))
