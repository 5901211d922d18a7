"""SparseCtrl (Guo et al. 2023, arXiv 2311.16933): a video that begins with an image, or with a sketch of its first frame.

It is a copy of the UNet's encoder that never sees the noisy latents: what it adds to the skips depends on the image, the text
and the timestep. So its residuals are a table of the loop (`sparse`), made a few steps at a time, with rows of both branches of
guidance. The motion of a reference is extracted with residuals too, whose image is the reference's own first frame: they are a
graph of the request (`reference_residuals`), which shares the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from motionrt.export.checkpoints.files import Lazy
from motionrt.export.onnx.from_torch import Range
from motionrt.export.systems.motionclone.unet import context
from motionrt.export.systems.system import Array, Graph, Network
from motionrt.runtime.bundle.manifest import ImageInput, Part

WINDOW = 2  # steps whose residuals are made at once: 0.43 GB for each at full size in float16
TABLE, OF_REFERENCES, IMAGE, FIRST = "sparse", "reference_residuals", "encode_image", "first"  # graphs


def residuals(
    net: Any, condition: Tensor, text: Tensor, timestep: Tensor, frames: int, places: tuple[int, ...]
) -> list[Tensor]:
    """What the prepared SparseCtrl `net` adds where the frames `places` have a condition and the others have none: one tensor
    for every skip, and the middle's, `[R F, c, h, w]`.

    `condition [1 or R, n, c, H, W]`: of the `n` places, latents, or pictures in [0, 1]; `text [R, L, D]`; `timestep [R]`.
    """
    rows = text.shape[0]
    times = net.time_embedding(net.time_proj(timestep).to(net.conv_in.weight.dtype))
    times = times[:, None].expand(-1, frames, -1).flatten(0, 1)
    shown = torch.cat([condition, torch.ones_like(condition[:, :, :1])], 2)  # with the mask of what is there
    there = net.controlnet_cond_embedding(shown.flatten(0, 1)).unflatten(0, shown.shape[:2])
    empty = net.controlnet_cond_embedding(torch.zeros_like(shown[:1, 0]))[:, None].expand(shown.shape[0], -1, -1, -1, -1)
    order = [places.index(frame) if frame in places else len(places) for frame in range(frames)]
    embedded = torch.cat([there, empty], 1)[:, order]
    # where the UNet has noisy latents there are zeros here: of its first convolution only the bias is left
    hidden = (embedded + net.conv_in.bias[:, None, None]).expand(rows, *embedded.shape[1:]).flatten(0, 1)
    skips = [hidden]
    for block in net.down_blocks:
        hidden, made = block(hidden_states=hidden, temb=times, num_frames=frames, **context(block, text))
        skips += made
    hidden = net.mid_block(hidden, times, encoder_hidden_states=text)
    added = [head(skip) for head, skip in zip(net.controlnet_down_blocks, skips, strict=True)]
    return [*added, net.controlnet_mid_block(hidden)]


class Sparse(nn.Module):
    """Residuals of many steps."""

    def __init__(self, net: Any, frames: int, places: tuple[int, ...] = (0,)) -> None:
        super().__init__()
        self.net, self.frames, self.places = net, frames, places

    def forward(self, condition: Tensor, text: Tensor, negative_text: Tensor, timestep: Tensor) -> tuple[Tensor, ...]:
        """`condition [n, c, H, W]`, texts `[1, L, D]`, `timestep [T]` -> `[T, 2, F, c, h, w]` each: without the prompt, and
        with it."""
        both = torch.cat([negative_text, text])[None].expand(timestep.shape[0], -1, -1, -1).flatten(0, 1)
        found = residuals(self.net, condition[None], both, timestep[:, None].expand(-1, 2).flatten(), self.frames, self.places)
        return tuple(value.unflatten(0, (-1, 2, self.frames)) for value in found)


class OfReferences(nn.Module):
    """Residuals of references at the timestep that their motion is extracted at, without a prompt."""

    def __init__(
        self, net: Any, frames: int, null_text: Tensor, timestep: int, sketch: bool, places: tuple[int, ...] = (0,)
    ) -> None:
        super().__init__()
        self.net, self.frames, self.sketch, self.places = net, frames, sketch, places
        self.null_text: Tensor
        self.timestep: Tensor
        self.register_buffer("null_text", null_text, persistent=False)
        self.register_buffer("timestep", torch.tensor([float(timestep)]), persistent=False)

    def forward(self, reference: Tensor) -> tuple[Tensor, ...]:
        """Latents `[1, K, F, c, h, w]`, or first frames uint8 `[1, K, 3, H, W]` -> `[1, K, F, c, h, w]` each."""
        if self.sketch:
            condition = reference[0][:, None].float() / 255
        else:
            condition = torch.stack([reference[0, :, place] for place in self.places], 1)
        rows = condition.shape[0]
        text, time = self.null_text.expand(rows, -1, -1), self.timestep.expand(rows)
        found = residuals(self.net, condition, text, time, self.frames, self.places)
        return tuple(value.unflatten(0, (1, -1, self.frames)) for value in found)


class First(nn.Module):
    """The first frame of clips, as it is."""

    def forward(self, pixels: Tensor) -> Tensor:
        """uint8 `[K, F, H, W, 3]` -> `[K, 3, H, W]`."""
        return pixels[:, 0].permute(0, 3, 1, 2).contiguous()


@dataclass(frozen=True)
class Control:
    """SparseCtrl in a system. `net`: as `prepared` gives it; `weights`: by its names, where it has none; `encode`: an image
    `[1, 3, H, W]` in [-1, 1] to latents. Without `encode` it reads pictures of sketches."""

    net: Any
    weights: Mapping[str, Lazy] | None = None
    encode: Network | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """What its residuals are called."""
        return (*(f"residual_{i}" for i in range(len(self.net.controlnet_down_blocks))), "residual_middle")

    @property
    def record(self) -> str:
        """What it reads of a reference."""
        return "reference_latents" if self.encode is not None else "reference_first"

    def network(self, module: nn.Module) -> Network:
        """Of a module that has it as `net`."""
        weights = None if self.weights is None else {f"net.{name}": lazy for name, lazy in self.weights.items()}
        return Network(module.eval(), weights)

    def shapes(self, latents: tuple[int, int, int, int]) -> dict[str, tuple[int, ...]]:
        """Frames, channels, height and width of the residuals for `latents` F, C, h, w, by name."""
        config, (frames, _, height, width) = self.net.config, latents
        widths, depth = config["block_out_channels"], config["layers_per_block"]
        found = [(widths[0], 1)]
        for level, channels in enumerate(widths):
            found += [(channels, 2**level)] * depth
            found += [(channels, 2 ** (level + 1))] * (level < len(widths) - 1)
        found.append((widths[-1], 2 ** (len(widths) - 1)))
        return {
            name: (frames, channels, height // by, width // by) for name, (channels, by) in zip(self.names, found, strict=True)
        }

    def graphs(
        self, latents: tuple[int, int, int, int], size: tuple[int, int], text: Array, null_text: Tensor, timestep: int,
        clips: Range, counts: Mapping[str, Range],
    ) -> dict[str, Graph]:  # fmt: skip
        """What a system with it has more: `size` of its pictures, `clips` that are encoded at once, `counts` of a
        request's references."""
        frames, picture = latents[0], (3, *size)
        sketch = self.encode is None
        of_references = OfReferences(self.net, frames, null_text, timestep, sketch)
        read = Array((1, "references", *picture), torch.uint8, 256) if sketch else Array((1, "references", *latents))
        condition = Array((1, *(picture if sketch else latents[1:])))
        found = {
            TABLE: Graph(
                self.network(Sparse(self.net, frames)),
                {"condition": condition, "text": text, "negative_text": text, "timestep": Array(("window",))},
                self.names, {"window": Range(1, WINDOW, WINDOW)},
            ),
            OF_REFERENCES: Graph(
                self.network(of_references), {self.record: read}, tuple(f"reference_{name}" for name in self.names),
                counts, weights_of=TABLE,
            ),
        }  # fmt: skip
        if self.encode is None:
            pixels = Array(("batch", frames, *size, 3), torch.uint8, 256)
            return {**found, FIRST: Graph(Network(First().eval()), {"pixels": pixels}, ("first",), {"batch": clips})}
        shared = None if self.encode.weights is None else "encode"
        return {**found, IMAGE: Graph(self.encode, {"image": Array((1, *picture))}, ("condition",), weights_of=shared)}

    def image(self, size: tuple[int, int]) -> ImageInput:
        """The input that it reads."""
        if self.encode is None:
            return ImageInput(*size, {"condition": (0.0, 1.0)}, "A sketch of the picture that the video begins with.")
        return ImageInput(*size, {"image": (-1.0, 1.0)}, "The picture that the video begins with.")

    def parts(self, size: tuple[int, int]) -> tuple[Part, ...]:
        """What the record of a clip has more."""
        return (Part("first", "uint8", (3, *size)),) if self.encode is None else ()
