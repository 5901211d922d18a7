"""Motion that is found in a memory, as Motion-I2V can use it: its field, a start for stage 1, or hints for the ControlNet.

    export_system(with_memory(motion_system(parts), parts, Retrieval(query, Network(Keep(encode)), alphas)), out)

A clip's field is kept as the latents that stage 1 would have made of it. How the field of one picture is put on another: where
it moves in the clip's first picture, and the region of the other picture that may move (what the brush leaves, else what
differs most from its background) are laid over each other by their centres and spreads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from msgspec import structs
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from motionrt.export.checkpoints.text_query import SentenceEncoder
from motionrt.export.onnx.from_torch import Range
from motionrt.export.systems.motion_i2v.fields import ENCODED, picture_of
from motionrt.export.systems.motion_i2v.system import FPS, MOTION, Parts
from motionrt.export.systems.motionclone.system import LEAST_CHANGE, ONE_CLIP, PENDING
from motionrt.export.systems.system import Array, Graph, Network, System, lengths
from motionrt.runtime.bundle.manifest import ChoiceInput, ClipSize, MemorySpec, Node, Part, Way

LATE = "late"  # the schedule of the fields' loop that begins with what was found
BEGIN = 600  # its largest timestep, of 1000: where the layout of a field is there, and its details are not
INPUT = "retrieval"
_MOVES, _STANDS_OUT = 0.4, 0.5  # shares of the furthest way, and of the largest difference from the background
_CAMERA = 0.5  # a share of the picture: where more than that moves, all of it does
_LEAST = 1.0  # pixels: what goes less far stands still


@dataclass(frozen=True)
class Retrieval:
    """What a memory of fields takes. `query`: finds clips by their captions; `keep`: a `Keep`; `alphas`: share of signal by
    timestep; `clips` of the memory, encoded at once; `begin`: the largest timestep where stage 1 begins with what was found."""

    query: SentenceEncoder
    keep: Network
    alphas: NDArray[Any]
    clips: Range = ONE_CLIP
    begin: int = BEGIN


def with_memory(system: System, parts: Parts, retrieval: Retrieval) -> System:
    """`system`, which was made of `parts`, with a memory of fields and the input `retrieval`. ValueError where no step of the
    default schedule lies at or below `begin`."""
    frames, channels, height, width = parts.latents
    size, fields, default = (height * parts.scale, width * parts.scale), frames - 1, system.loops[MOTION].default
    rows = system.schedules[MOTION][default[0]][default[1]]
    rows = rows[rows[:, system.loops[MOTION].columns.index("timestep")] <= retrieval.begin]
    if not len(rows):
        raise ValueError(f"begin is {retrieval.begin}; the last timestep of {default[1]} steps of '{default[0]}' is larger")
    signal = float(retrieval.alphas[int(rows[0, system.loops[MOTION].columns.index("timestep")])])
    kept = (fields, channels, height, width)
    latents, field, mask = Array((1, *kept)), Array((1, fields, 2, *size)), Array((1, 1, *size))
    drawn = parts.drawn is not None
    graphs = {
        **system.graphs,
        "text_query": retrieval.query.graph(),
        "keep": Graph(retrieval.keep, {"field": Array(("batch", *field.dims[1:]))}, ("motion",), {"batch": retrieval.clips}),
        "nearest": Graph(Network(Nearest().eval()), {"reference_motion": Array((1, 1, *kept))}, ("found",)),
        "place": Graph(
            Network(Placed(*size).eval()), {"field": field, "image": Array((1, 3, *size)), "brush": mask}, ("placed", "region")
        ),
        "late": Graph(Network(Late(signal).eval()), {"latents": latents, "noise": latents}, ("late",)),
    }
    nodes: list[str | Node] = [
        "nearest",
        Node(parts.fields.name, {"motion_latents": "found"}, {"field": "found_field"}),
        Node("place", {"field": "found_field"}),
        Node("keep", {"field": "placed"}, {"motion": "placed_latents"}),
        Node("late", {"latents": "placed_latents"}),
    ]
    if drawn:
        sizes = {"placed": field, "region": mask, "flow": field, "mask": mask}
        graphs["hints"] = Graph(Network(Hinted(parts.scale).eval()), sizes, ("found_flow", "found_mask"))
        nodes.append(Node("hints", {"flow": "drag.flow", "mask": "drag.mask"}))
    schedules = {**system.schedules[MOTION], LATE: {len(rows): rows}}
    loop = structs.replace(system.loops[MOTION], schedules=lengths(schedules))
    memory = MemorySpec(
        text="prompt",
        query="text_query",
        tokenizer="text_query",
        default=1,
        max=1,
        clip=ClipSize(frames, *size, float(FPS)),
        record=(Part("motion", "float16", kept),),
        fingerprint=PENDING,
        graphs=("keep",),
        least_change=LEAST_CHANGE,
        calibration=retrieval.query.calibration,
    )
    return replace(
        system,
        inputs={**system.inputs, INPUT: choice(drawn, len(rows))},
        graphs=graphs,
        plan=(*nodes, *system.plan),
        loops={**system.loops, MOTION: loop},
        schedules={**system.schedules, MOTION: schedules},
        memory=memory,
        tokenizers={**system.tokenizers, "text_query": retrieval.query.tokenizer},
    )


class Keep(nn.Module):
    """Fields to what a memory keeps of them. `encode`: pictures of fields `[N, 2, H, W]` to latents `[N, 4, h, w]`, in the
    scale of stage 1."""

    def __init__(self, encode: nn.Module) -> None:
        super().__init__()
        self.encode = encode

    def forward(self, field: Tensor) -> Tensor:
        """`[K, n, 2, H, W]` in pixels -> `[K, n, 4, h, w]`."""
        parts = picture_of(field).split(ENCODED, 1)
        return torch.cat([self.encode(part.flatten(0, 1)).unflatten(0, (-1, part.shape[1])) for part in parts], 1)


class Nearest(nn.Module):
    """The best of the references."""

    def forward(self, reference_motion: Tensor) -> Tensor:
        """`[1, K, n, 4, h, w]` -> `[1, n, 4, h, w]`."""
        return reference_motion[:, 0]


class Late(nn.Module):
    """What stage 1 begins with at a later step: sqrt(a) z + sqrt(1 - a) noise; `signal`: a."""

    def __init__(self, signal: float) -> None:
        super().__init__()
        self.signal = signal

    def forward(self, latents: Tensor, noise: Tensor) -> Tensor:
        """`[1, n, 4, h, w]` each; the same."""
        return self.signal**0.5 * latents + (1 - self.signal) ** 0.5 * noise


class Placed(nn.Module):
    """A field put where a picture has something that may move; a camera's, by which most of the picture moves, stays as it is.

    What stands out of the picture is found by its colours alone, against a background that changes evenly: a plane is fitted to
    each channel. Paint the brush where that is not enough.
    """

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.places: Tensor
        self.axes: Tensor
        self.inverse: Tensor
        y, x = ((2 * torch.arange(size) + 1) / size - 1 for size in (height, width))
        places = torch.stack(torch.meshgrid(x, y, indexing="xy"))
        axes = torch.cat([torch.ones(1, height * width), places.flatten(1)])
        for name, value in (("places", places[None]), ("axes", axes), ("inverse", torch.linalg.pinv(axes))):
            self.register_buffer(name, value, persistent=False)

    def forward(self, field: Tensor, image: Tensor, brush: Tensor) -> tuple[Tensor, Tensor]:
        """`field [1, n, 2, H, W]` in pixels, `image [1, 3, H, W]`, `brush [1, 1, H, W]` (1: held) -> the field on the image, 0
        outside of the region that moves; and that region `[1, 1, H, W]`."""
        way = field.square().sum(2).sqrt().amax(1, keepdim=True)
        moves = (way > (_MOVES * _most(way)).clamp(min=_LEAST)).float()
        colours = image.flatten(2)
        away = (colours - colours @ self.inverse @ self.axes).square().sum(1, keepdim=True).sqrt().unflatten(2, image.shape[2:])
        stands_out = (away > _STANDS_OUT * _most(away)).float()
        region = torch.where(_most(brush) > 0, 1 - brush, stands_out)
        (here, size), (there, other) = self.centre(region), self.centre(moves)
        grid = there + (self.places - here) * (other / size).clamp(0.5, 2.0)
        moving = torch.cat([(field * moves[:, None]).flatten(1, 2), moves], 1)
        laid = functional.grid_sample(moving, grid.permute(0, 2, 3, 1), align_corners=False)
        share = moves.mean((2, 3), keepdim=True)
        mean = moving.mean((2, 3), keepdim=True) / share.clamp(min=1e-6)
        placed = region[:, None] * (laid + (1 - laid[:, -1:]) * mean)[:, :-1].unflatten(1, field.shape[1:3])
        camera = share > _CAMERA
        return torch.where(camera[:, None], field, placed), torch.where(camera, torch.ones_like(region), region)

    def centre(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The centre and the spread `[1, 2, 1, 1]` (x, y) of `weight [1, 1, H, W]`, where the picture goes from -1 to 1."""
        total = weight.mean((2, 3), keepdim=True).clamp(min=1e-6)
        centre = (self.places * weight).mean((2, 3), keepdim=True) / total
        spread = ((self.places - centre).square() * weight).mean((2, 3), keepdim=True) / total
        return centre, spread.sqrt().clamp(min=1e-3)


class Hinted(nn.Module):
    """What was found, beside what is drawn: known in the cells that it covers by half or more, or most."""

    def __init__(self, cell: int) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, placed: Tensor, region: Tensor, flow: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """`placed [1, n, 2, H, W]` in `region [1, 1, H, W]`; `flow`, `mask` of drags, of the same sizes -> both together."""
        share = functional.avg_pool2d(region, self.cell)
        cells = ((share >= _most(share).clamp(max=0.5)) & (share > 0)).float()
        known = cells[..., :, None, :, None].expand(-1, -1, -1, self.cell, -1, self.cell).flatten(2, 3).flatten(3)
        return flow + placed * (known * (1 - mask))[:, None], torch.maximum(known, mask)


def _most(plane: Tensor) -> Tensor:
    """The largest value of `[1, 1, H, W]`, `[1, 1, 1, 1]`."""
    return plane.amax((2, 3), keepdim=True)


def choice(drawn: bool, steps: int) -> ChoiceInput:
    """How a request says what a clip is for. drawn: whether there is a ControlNet; steps: of the schedule `LATE`."""
    ways = {
        "none": Way(),
        "direct": Way(reads={"field": {"motion_latents": "found"}}),
        "placed": Way(reads={"field": {"motion_latents": "placed_latents"}}),
        "start": Way(reads={"motion_latents": {"latents": "late"}}, schedules={MOTION: (LATE, steps)}),
    }
    if drawn:
        ways["hints"] = Way(reads={"hint": {"flow": "found_flow", "mask": "found_mask"}}, drawn=("drag",))
    text = (
        "What the motion of a clip of the memory is for: the field, as it is (direct) or put on what stands out of the image or"
        f" is painted (placed), or what the search for one begins with (start){', or is hinted at (hints)' if drawn else ''}."
    )
    return ChoiceInput(ways, "none", "none", text)
