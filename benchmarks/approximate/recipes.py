"""Ways to be faster than the exact loop: what a step computes in, and which steps are left out.

    quick = Recipe("openvino", "bfloat16", budget=50)
    quick.opened(bundle, memory, threads=1)          # a pipeline that computes so
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from motionrt.runtime.pipeline import MotionPipeline
from motionrt.runtime.schedules import pattern


@dataclass(frozen=True)
class Recipe:
    """`backend`, `precision`: as of `RunOptions`; None is exact: ONNX Runtime in float32. `budget`: dB that steps are left out
    for, by `motionrt schedule calibrate`; None: every step runs the network."""

    backend: str | None = None
    precision: str | None = None
    budget: float | None = None

    @property
    def name(self) -> str:
        """What it is called in rows and tables."""
        if self.backend is None and self.budget is None:
            return "exact"
        numerics = "float32" if self.backend is None else f"{self.backend} {self.precision}"
        return numerics if self.budget is None else f"{numerics}, steps left out for {self.budget:g} dB"

    @property
    def numerics(self) -> dict[str, Any]:
        """Options of a pipeline that computes so."""
        return {} if self.backend is None else {"backend": self.backend, "precision": self.precision}

    def opened(self, bundle: Path, memory: Path | None, threads: int) -> MotionPipeline:
        """A pipeline that computes in this recipe's numerics."""
        return MotionPipeline.from_bundle(bundle, memory, threads=threads, **self.numerics)


def told_of(runs: Sequence[bool]) -> dict[str, Any]:
    """What a row says of which steps run the network."""
    return {"network_runs": sum(runs), "pattern": pattern(runs)}


NUMERICS = ((None, None), ("onnxruntime", "int8"), ("openvino", "bfloat16"), ("openvino", "int8"))
RECIPES = tuple(Recipe(backend, precision, budget) for backend, precision in NUMERICS for budget in (None, 50.0, 40.0))
