"""One augmented attention of Motion-I2V's stage 2 at the sizes of the release, in the forms of a step: a whole step of that
size is too much for a processor, and 42 of these are what differs in it.

    form = FORMS["released"]
    module, values = form.step(LAYERS["motion-i2v-attention-40x64"]), form.feed(...)

`released` is given its fields on the grid of the layer already. Queries and keys are drawn so that scores have about unit
spread: with the weights of a new layer all keys would weigh the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from motionrt.benchmarks.warp import forms
from motionrt.benchmarks.warp.forms import FULL, TOY, Size, Splats, Values, turning
from motionrt.export.compiler.weightless import meta
from motionrt.export.systems.motion_i2v import augmented
from motionrt.export.systems.motion_i2v.augmented import Tables, Warp, tables_of
from motionrt.export.systems.motion_i2v.stencil import resized

BRANCHES = 2  # of guidance


@dataclass(frozen=True)
class Layer:
    """An attention of `level` in a stage 2 of `size`; `times`: as many of them are in a step."""

    size: Size
    level: int
    times: int

    @property
    def name(self) -> str:
        return f"{self.size.name}-attention-{self.grid[0]}x{self.grid[1]}"

    @property
    def grid(self) -> tuple[int, int]:
        _, _, height, width = self.size.latents
        return height >> self.level, width >> self.level

    @property
    def width(self) -> int:
        return int(self.size.config["block_out_channels"][self.level])

    @property
    def heads(self) -> int:
        return int(self.size.config["motion_num_attention_heads"])

    @property
    def shape(self) -> dict[str, int]:
        """Sizes, as rows name them: branches, frames, rows and columns of the grid, width and heads."""
        height, width = self.grid
        return {"B": BRANCHES, "F": self.size.latents[0], "H": height, "W": width, "D": self.width, "N": self.heads}


# Two attentions in each motion module: one behind each of the 2 layers of a level down and of its 3 up, and in the middle.
LAYERS: Mapping[str, Layer] = {
    layer.name: layer
    for layer in (*(Layer(FULL, level, times) for level, times in enumerate((10, 10, 10, 12))), Layer(TOY, 0, 6))
}


class Attention(nn.Module):
    """`augmented.attended` with weights of its own, in one of `forms.COUNTED`."""

    def __init__(self, layer: Layer, form: str) -> None:
        super().__init__()
        from diffusers.models.attention_processor import Attention as Weights
        from diffusers.models.embeddings import SinusoidalPositionalEmbedding

        self.attn = Weights(layer.width, heads=layer.heads, dim_head=layer.width // layer.heads, bias=False)
        self.pos_embed = SinusoidalPositionalEmbedding(layer.width, layer.size.config["motion_max_seq_length"])
        self.layer, self.form = layer, form

    def forward(self, hidden: Tensor, *fields: Tensor) -> Tensor:
        """`hidden [2, P, F, C]` normed, fields as of `LayerForm.feed` -> the update, the same shape."""
        splat = self.form == "released"
        table = Splats(fields[0], fields[0][:, :, 0].flatten()) if splat else tables_of(fields, [self.layer.grid])[0]
        warp = Warp({hidden.shape[1]: table}, hidden.shape[2], 1, fused=self.form == "ours")  # type: ignore[dict-item]
        with forms.FORMS_OF_ATTENTION.get(self.form, nullcontext)():
            return augmented.attended(self.attn, hidden, self.pos_embed.pe, warp)


@dataclass(frozen=True)
class LayerForm:
    """As `forms.Form`, of a layer."""

    name: str

    def step(self, layer: Layer) -> Attention:
        """The layer with random weights, the same for all forms."""
        torch.manual_seed(0)
        module = Attention(layer, self.name).eval()
        with torch.no_grad():
            for projection in (module.attn.to_q, module.attn.to_k, module.attn.to_v):
                projection.weight.normal_(std=layer.width**-0.5)
        return module

    def weightless(self, layer: Layer, dtype: torch.dtype = torch.float32) -> Attention:
        """The layer with parameters on the meta device."""
        with meta(dtype):
            return Attention(layer, self.name).eval()

    def feed(self, layer: Layer, moves: Tensor | None = None) -> Values:
        """Hidden states, and what a request has of its fields: `flow [1, F - 1, 2, h, w]`, or the tables of the grid."""
        draw = torch.Generator().manual_seed(0)
        frames, places = layer.size.latents[0], layer.grid[0] * layer.grid[1]
        hidden = torch.randn(BRANCHES, places, frames, layer.width, generator=draw)
        moves = turning(layer.size) if moves is None else moves
        if self.name == "released":
            return {"hidden": hidden, "flow": resized(moves, layer.grid)}
        tables = Tables([layer.grid])
        with torch.no_grad():
            return {"hidden": hidden, **dict(zip(tables.sizes(frames - 1), tables(moves), strict=True))}

    def still(self, layer: Layer) -> Values:
        """`feed` where nothing moves."""
        return self.feed(layer, torch.zeros_like(turning(layer.size)))

    def changes(self, layer: Layer) -> dict[str, str]:
        """All is the step's."""
        return dict.fromkeys(self.feed(layer), "step")


FORMS: Mapping[str, LayerForm] = {name: LayerForm(name) for name in forms.FORMS}
COUNTED: Mapping[str, LayerForm] = {name: LayerForm(name) for name in forms.COUNTED}
OUTPUTS = ("update",)
