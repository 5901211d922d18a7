"""Every kind of file that is damaged, and how many of each in a long run."""

from __future__ import annotations

from motionrt.benchmarks.reliability import bundles, media, memories

KINDS = {**bundles.KINDS, **memories.KINDS, **media.KINDS}
_TRIES = {
    "memory.sqlite": 1000, "memory.sqlite with an index": 1000, "bundle.json": 600, "index": 400, "index.json": 400,
    "weights": 150, "torch programs": 100, "stamps of a bundle": 100,  # which take seconds each
}  # fmt: skip


def plan(part: float = 1.0) -> dict[str, int]:
    """Tries of each kind; `part` of those of the long run, and at least one."""
    tries = {kind: _TRIES.get(kind, 200 if kind.startswith(("still", "video", "animation")) else 300) for kind in KINDS}
    return {kind: max(1, round(part * count)) for kind, count in tries.items()}
