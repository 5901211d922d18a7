"""Stage 2 of Motion-I2V as the release computes its warp, beside ours: the same weights and requests, to be measured.

    form = FORMS["released"]
    module, values = form.step(MID), form.feed(MID)

| form | frame 0 reaches the others | keys and values |
| --- | --- | --- |
| released | in every attention, by a splat: rows times weights are added up where they fall | of all 2 F - 1 frames |
| gathered | in every attention, by the tables of a request | the same |
| ours | keys and values of frame 0, by the tables of a request | of F frames |

Two more are counted and not timed: `unfused`, ours as the standard operators that its one node stands for, and `plain`,
attention that frame 0 does not reach by any field.

`released` is given what helps it: fields are resized once for a grid, and no copies of frame 0 are made before the splat. It is
the `own` form of the network, in which each branch of guidance moves its own frame 0, as are the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar, cast
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from motionrt.export.compiler.weightless import meta
from motionrt.export.systems.motion_i2v import augmented
from motionrt.export.systems.motion_i2v.augmented import Tables, Warp
from motionrt.export.systems.motion_i2v.networks import VideoUNet
from motionrt.export.systems.motion_i2v.rows import COLUMNS
from motionrt.export.systems.motion_i2v.stencil import EPSILON, entries, resized
from motionrt.export.systems.motion_i2v.step import GUIDED, VIDEO_CHANGES, VideoStep, branches, held, updated
from motionrt.export.systems.motionrag import merge_heads, split_heads

OUTPUTS = ("next_latents",)
Values = dict[str, Tensor]
Net = TypeVar("Net", bound=nn.Module)


@dataclass(frozen=True)
class Size:
    """A stage 2 and its request: `latents` F, C, h, w of the video, of which a latent is `scale` pixels wide; `text`: tokens
    and width; `real`: the published model that it stands for, with as many blocks and heads; None for a toy."""

    name: str
    config: Mapping[str, Any] = field(repr=False)
    latents: tuple[int, int, int, int]
    text: tuple[int, int]
    scale: int = 8
    real: str | None = None

    @property
    def shape(self) -> dict[str, int]:
        """Sizes, as rows name them: both branches of guidance, frames, rows and columns, width of the first level."""
        frames, _, height, width = self.latents
        return {"B": 2, "F": frames, "H": height, "W": width, "D": self.config["block_out_channels"][0]}


def _config(widths: tuple[int, ...], text: int, heads: int, layers: int = 2) -> Mapping[str, Any]:
    """Stable Diffusion 1.5's UNet with motion modules, in which all levels but the last attend to the text."""
    return MappingProxyType({
        "in_channels": 4, "block_out_channels": widths, "layers_per_block": layers, "cross_attention_dim": text,
        "num_attention_heads": heads, "motion_num_attention_heads": heads, "motion_max_seq_length": 32,
        "down_block_types": (*("CrossAttnDownBlockMotion",) * (len(widths) - 1), "DownBlockMotion"),
        "up_block_types": ("UpBlockMotion", *("CrossAttnUpBlockMotion",) * (len(widths) - 1)),
    })  # fmt: skip


FULL = Size("motion-i2v", _config((320, 640, 1280, 1280), 768, 8), (16, 4, 40, 64), (77, 768), real="motion-i2v")
MID = Size("motion-i2v-mid", _config((64, 128, 256, 256), 208, 8), (16, 4, 16, 24), (77, 208), real="motion-i2v")
TOY = Size("motion-i2v-toy", _config((32, 32), 16, 2, 1), (4, 4, 8, 8), (5, 16))
SIZES: Mapping[str, Size] = {size.name: size for size in (MID, TOY, FULL)}


# --- the release's way ------------------------------------------------------------------------------------------------


class Splats(NamedTuple):
    """A field on one grid, in the place of a `Stencil`: `flow [B, n, 2, h, w]` in pixels of the grid; `beyond`: as many numbers
    as targets, which is what a network knows the grid by."""

    flow: Tensor
    beyond: Tensor


def splatted(table: Splats, features: Tensor) -> Tensor:
    """As `stencil.warped`, by an averaging splat: `[B, P, D]` -> `[B, P, n, D]`. What falls on one place is added up there, in
    the dtype of the field."""
    batch, frames = table.flow.shape[:2]
    places, width = features.shape[1:]
    targets, _, weights = entries(table.flow)
    known = F.pad(features, (0, 1), value=1.0)[:, None]  # the sum of weights beside
    moved = (known * weights.view(4, batch, frames, places, 1)).flatten(0, 3)
    room = moved.new_zeros(batch * places * frames + 1, width + 1)
    sums = room.index_put((targets,), moved, accumulate=True)[:-1]
    found = sums[:, :-1] / (sums[:, -1:] + EPSILON)
    return found.to(features.dtype).view(batch, places, frames, width)


def projected_after(attn: Any, hidden: Tensor, positions: Tensor, warp: Warp, first: Tensor | None = None) -> Tensor:
    """As `augmented.attended`, and as the release: frame 0 is moved, and keys and values are those of all frames in turn,
    moved ones before their own, positions added."""
    zero = hidden[:, :, 0]
    pairs = torch.stack([warp(zero), hidden[:, :, 1:]], 3).flatten(2, 3)
    tokens = torch.cat([zero[:, :, None], pairs], 2) + positions[:, : 2 * warp.frames - 1]
    query, key, value = (
        split_heads(project(x).flatten(0, 1), attn.heads)
        for project, x in ((attn.to_q, tokens[:, :, ::2]), (attn.to_k, tokens), (attn.to_v, tokens))
    )
    found = merge_heads(F.scaled_dot_product_attention(query, key, value))
    return attn.to_out[0](found).view(hidden.shape)  # type: ignore[no-any-return]


@contextmanager
def as_released(*, splat: bool) -> Iterator[None]:
    """Augmented attention as the release computes it, by a splat or by the tables, in the block."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(augmented, "attended", projected_after))
        if splat:
            stack.enter_context(mock.patch.object(augmented, "warped", splatted))
        yield


def unaugmented(attn: Any, hidden: Tensor, positions: Tensor, warp: Warp, first: Tensor | None = None) -> Tensor:
    """As `augmented.attended`, but that F frames are all the keys there are."""
    placed = (hidden + positions[:, : 2 * warp.frames - 1 : 2]).flatten(0, 1)
    query, key, value = (split_heads(project(placed), attn.heads) for project in (attn.to_q, attn.to_k, attn.to_v))
    found = merge_heads(F.scaled_dot_product_attention(query, key, value))
    return attn.to_out[0](found).view(hidden.shape)  # type: ignore[no-any-return]


# The forms that attend otherwise than our module does, each as what makes it so in a block.
FORMS_OF_ATTENTION: Mapping[str, Callable[[], AbstractContextManager[None]]] = {
    "released": partial(as_released, splat=True),
    "gathered": partial(as_released, splat=False),
    "plain": lambda: cast(AbstractContextManager[None], mock.patch.object(augmented, "attended", unaugmented)),
}


class Gathered(VideoStep):
    """`VideoStep` with another attention: the form `gathered` or `plain`."""

    def __init__(self, net: VideoUNet, form: str = "gathered") -> None:
        super().__init__(net)
        self.form = form

    def forward(self, *given: Tensor) -> Tensor:
        """As of `VideoStep`."""
        with FORMS_OF_ATTENTION[self.form]():
            return super().forward(*given)


class Released(VideoStep):
    """`VideoStep` with the form `released`."""

    def forward(  # type: ignore[override]
        self, latents: Tensor, coefficients: Tensor, timestep: Tensor, reference: Tensor, brush: Tensor, text: Tensor,
        start: Tensor, moves: Tensor, guidance: Tensor, negative_text: Tensor,
    ) -> Tensor:  # fmt: skip
        """As of `VideoStep`, but for `moves [B, n, 2, H, W]`: fields in pixels, in the place of their tables."""
        flows = [resized(moves, grid) for grid in self.net.grids(*latents.shape[-2:])]
        with as_released(splat=True):
            fields: Any = [Splats(flow, flow[:, :, 0].flatten()) for flow in flows]
            output = self.net(reference, latents, timestep, branches(text, negative_text), fields)
        return held(updated(latents, output, coefficients, guidance), coefficients, reference, brush, start)


# --- what is measured -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """A way to compute the step: its module, and what a request has of its fields."""

    module: Callable[[VideoUNet], VideoStep]
    fields: Callable[[Size, Tensor], Values]

    def step(self, size: Size) -> VideoStep:
        """The step with random weights, the same for all forms."""
        return self.module(network(size)).eval()

    def weightless(self, size: Size, dtype: torch.dtype = torch.float32) -> VideoStep:
        """The step with parameters on the meta device."""
        with meta(dtype):
            return self.module(VideoUNet(size.config)).eval()

    def feed(self, size: Size, moves: Tensor | None = None) -> Values:
        """Inputs of one request by name, in the order of `changes`; `moves`: other fields than `turning`."""
        values = request(size)
        both = {name: values.pop(name) for name in GUIDED}
        return {**values, **self.fields(size, turning(size) if moves is None else moves), **both}

    def still(self, size: Size) -> Values:
        """`feed` where nothing moves."""
        return self.feed(size, torch.zeros_like(turning(size)))

    def changes(self, size: Size) -> dict[str, str]:
        """What each input changes with. Fields are the step's, as in a bundle: nothing is made of them before the loop."""
        names = self.fields(size, turning(size))
        return {**VIDEO_CHANGES, **dict.fromkeys(names, "step"), **GUIDED}


def _grids(size: Size) -> list[tuple[int, int]]:
    _, _, height, width = size.latents
    return [(height >> level, width >> level) for level in range(len(size.config["block_out_channels"]))]


def _tables(size: Size, moves: Tensor) -> Values:
    tables = Tables(_grids(size))
    with torch.no_grad():
        return dict(zip(tables.sizes(size.latents[0] - 1), tables(moves), strict=True))


FORMS: Mapping[str, Form] = {
    "released": Form(Released, lambda size, moves: {"moves": moves}),
    "gathered": Form(Gathered, _tables),
    "ours": Form(partial(VideoStep, fused=True), _tables),
}
COUNTED: Mapping[str, Form] = {
    **FORMS, "unfused": Form(VideoStep, _tables), "plain": Form(partial(Gathered, form="plain"), _tables),
}  # fmt: skip


def network(size: Size, seed: int = 0) -> VideoUNet:
    """Stage 2 with random weights."""
    torch.manual_seed(seed)
    return all_matter(VideoUNet(size.config))


def all_matter(net: Net) -> Net:
    """`net` with weights drawn where a library begins at zero, or faults would not show; in place."""
    with torch.no_grad():
        for value in net.parameters():
            if not bool(value.any()):
                nn.init.normal_(value, std=0.02)
    return net


def turning(size: Size) -> Tensor:
    """Fields in which the picture turns, grows and drifts, further in each frame, `[1, F - 1, 2, H, W]` in pixels: smooth, with
    places where nothing arrives and others where much does."""
    frames, _, height, width = size.latents
    rows, columns = height * size.scale, width * size.scale
    y, x = torch.meshgrid(torch.arange(rows) - rows / 2, torch.arange(columns) - columns / 2, indexing="ij")
    part = torch.arange(1, frames)[:, None, None] / (frames - 1)
    angle, growth, drift = 0.3 * part, 1 - 0.3 * part, columns / 8 * part
    moved_x = growth * (x * angle.cos() - y * angle.sin()) + drift
    moved_y = growth * (x * angle.sin() + y * angle.cos())
    return torch.stack([moved_x - x, moved_y - y], 1)[None]


def request(size: Size, seed: int = 0) -> Values:
    """Random inputs of one request in the middle of its schedule but for its fields, in the order of `VIDEO_CHANGES`."""
    draw = torch.Generator().manual_seed(seed)
    frames, channels, height, width = size.latents
    still, text = (1, channels, height, width), (1, *size.text)
    shapes = {
        "latents": (1, frames - 1, *still[1:]), "coefficients": (1, len(COLUMNS) - 3), "timestep": (1,), "reference": still,
        "brush": (1, 1, height * size.scale, width * size.scale), "text": text, "start": (1, frames - 1, *still[1:]),
        "guidance": (1,), "negative_text": text,
    }  # fmt: skip
    values = {name: torch.randn(shapes[name], generator=draw) for name in (*VIDEO_CHANGES, *GUIDED)}
    brush = torch.zeros(shapes["brush"])
    brush[..., : brush.shape[-1] // 4] = 1  # held: a quarter of the picture
    fixed = {"coefficients": torch.tensor([[0.9, -0.3, 0.7, 0.7, 1.0]]), "timestep": torch.tensor([500.0])}
    return {**values, **fixed, "brush": brush, "guidance": torch.tensor([3.0])}
