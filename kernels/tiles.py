"""Which tile a kernel takes: pinned per GPU architecture and shape class, never tuned at request time.

Everything here is arithmetic on the host: it needs neither Triton nor a GPU. `motionrt.kernels.aot` compiles what these rules
choose and CI refuses spills; benchmarks/gpu/gpu_kernel.py times the alternatives on a GPU: that should change a number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Shared memory that one program may have, in bytes (CUDA C++ programming guide, compute capabilities).
SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
PACKED_COLUMNS = 128
# The packed layout must save this share of the padded one's FLOPs before it pays for its masks: per score column they are
# about 6 more vector operations for each head of a tile, 15 % of the time of D = 3072 tensor-core steps. An estimate.
PACKED_SAVES = 0.15
LAYOUTS = ("padded", "packed")


@dataclass(frozen=True)
class Tile:
    """`heads` heads of `slot` columns each in a tile of `rows` x `columns`; D in steps of `depth`, d in steps of `chunk`."""

    packed: bool
    heads: int
    slot: int
    rows: int
    columns: int
    depth: int
    chunk: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Config:
    """A pinned configuration: `columns` is the most a padded tile may have."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


# The wide tile of a plain GEMM on each architecture: as much data reuse as registers and shared memory hold.
_HALF = {
    80: Config(128, 128, 32, 8, 4),
    86: Config(128, 128, 32, 8, 3),
    89: Config(128, 128, 32, 8, 3),
    90: Config(128, 256, 64, 8, 3),
    100: Config(128, 256, 64, 8, 3),
    120: Config(128, 128, 32, 8, 3),
}
_SINGLE = Config(64, 64, 16, 8, 2)  # fp32 without TF32 runs on the vector units: small tiles, exact results


def power_of_two(number: int) -> int:
    """The smallest power of two that is not below `number` >= 1."""
    return 1 << (number - 1).bit_length()


def config_for(capability: int, dtype: torch.dtype) -> Config:
    """The configuration of the newest known architecture that is not newer than `capability` (90 is sm_90).

    Raises ValueError below sm_80, which lacks bf16 and asynchronous copies.
    """
    known = [target for target in SHARED_LIMIT if target <= capability]
    if not known:
        raise ValueError(f"the tensors are on an sm_{capability} GPU; allowed: sm_80 or newer.")
    return _SINGLE if dtype == torch.float32 else _HALF[max(known)]


def layout_flops(layout: str, inner: int, heads: int, tokens: int, width: int, columns: int = 256) -> int:
    """FLOPs per row of h that a layout spends, padding included: scores over D, then weights times V.

    Padded: every head has a slot of a power of two. Packed: `PACKED_COLUMNS` columns hold as many heads as fit, and each
    head's product with V runs over all of them.
    """
    if layout == "padded":
        per_tile, slot = _padded(heads, tokens, columns)
        slots = -(-heads // per_tile) * per_tile
        return 2 * slots * slot * (inner + width)
    packed = min(PACKED_COLUMNS, columns)
    per_tile = packed // tokens
    tiles = -(-heads // per_tile)
    return 2 * tiles * packed * (inner + per_tile * width)


def choose_layout(inner: int, heads: int, tokens: int, width: int, columns: int = 256) -> str:
    """Packed where it saves more than `PACKED_SAVES` of the FLOPs, else padded."""
    padded, packed = (layout_flops(layout, inner, heads, tokens, width, columns) for layout in LAYOUTS)
    return "packed" if packed < (1 - PACKED_SAVES) * padded else "padded"


def choose_tile(
    capability: int, dtype: torch.dtype, inner: int, heads: int, tokens: int, width: int, layout: str | None = None
) -> Tile:
    """The tile for `heads` heads of `tokens` <= 64 motion tokens and width `width` <= 256, at D = `inner`."""
    if layout not in (None, *LAYOUTS):
        raise ValueError(f"motion_cross_attention: `layout` is {layout!r}; allowed: {', '.join(LAYOUTS)} or None.")
    config = config_for(capability, dtype)
    if layout is None:  # packing's masks crowd the registers that fp32's vector units need
        layout = "padded" if dtype == torch.float32 else choose_layout(inner, heads, tokens, width, config.columns)
    packed = layout == "packed"
    if packed:
        columns = min(PACKED_COLUMNS, config.columns)
        per_tile, slot = columns // tokens, tokens
    else:
        per_tile, slot = _padded(heads, tokens, config.columns)
        columns = per_tile * slot
    # fewer columns leave registers unused: fewer warps then, so that more programs share the processor
    warps = config.warps if columns > 128 or dtype == torch.float32 else min(config.warps, 4 if columns <= 64 else 8)
    return Tile(packed, per_tile, slot, config.rows, columns, config.depth, choose_chunk(width), warps, config.stages)


def choose_chunk(width: int) -> int:
    """Columns of V per product: 64, or 32 where that pads less (d = 80: 96 instead of 128)."""
    return min((64, 32), key=lambda chunk: (-(-width // chunk) * chunk, -chunk))


def _padded(heads: int, tokens: int, columns: int) -> tuple[int, int]:
    """(heads per tile, slot): as many heads as fit while no more than a fifth of all slots are of heads that do not exist."""
    slot = max(16, power_of_two(tokens))
    per_tile = max(1, columns // slot)
    while per_tile > 1 and -(-heads // per_tile) * per_tile > 1.2 * heads:
        per_tile //= 2
    return per_tile, slot


@dataclass(frozen=True)
class Strip:
    """Of motion-augmented attention: all `frames` of one head of one place, its width in steps of `chunk`."""

    frames: int
    chunk: int
    warps: int
    stages: int


def choose_strip(capability: int, dtype: torch.dtype, frames: int, width: int) -> Strip:
    """The strip for `frames` <= 16 frames of width `width` <= 256.

    16 x 16 scores are one warp's work, and what one program waits for is hidden by the others of its processor: so one warp,
    and a chunk that leaves registers. In fp32, without tensor cores, two. Raises ValueError below sm_80.
    """
    config_for(capability, dtype)
    single = dtype == torch.float32
    return Strip(max(16, power_of_two(frames)), 16 if single else 32, 2 if single else 1, 1)
