"""Measure a checkpoint in PyTorch, to choose settings by: `python demo/motionclone/choose.py --split choose`.

What is published comes from the exported bundle; see evaluate.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # demo/domain.py
import model as demo
import numpy as np
import torch
from evaluate import ROWS, SEEDS, Frames, Target, evaluate, sheet, table, targets
from sampler import Cloner, Recipe
from training import HERE, pixels

RECIPE = {"steps": 20, "guided": 14, "share": 0.6, "weight": 8000.0, "warm_up": 0, "cool_down": 3}


class Torch:
    """`generate` for `evaluate` from a checkpoint, in PyTorch: to choose settings by."""

    def __init__(self, checkpoint: str, recipe: Mapping[str, float], guidance: float, quick: bool = False) -> None:
        self.cloner = Cloner(demo.load(checkpoint), quick)
        self.recipe, self.guidance = Recipe(**recipe), guidance  # type: ignore[arg-type]

    def __call__(self, row: str, wanted: Sequence[Target], batch: int = 8) -> Frames:
        frames = []
        for first in range(0, len(wanted), batch):
            part = wanted[first : first + batch]
            start = torch.stack([torch.randn(demo.LATENTS, generator=torch.Generator().manual_seed(t.seed)) for t in part])
            motion = None
            if row != "unguided":
                from_whom = part if row == "guided" else [wanted[(first + i + 7) % len(wanted)] for i in range(len(part))]
                clips = [pixels(target.references()[0]) for target in from_whom]
                with torch.no_grad():
                    latents = torch.stack([self.cloner.model.vae.encode(clip) for clip in clips])
                motion = self.cloner.motion(latents, start)
            made = self.cloner.sample([target.prompt for target in part], start, self.recipe, self.guidance, motion)
            frames.append(self.cloner.decode(made))
        return np.concatenate(frames)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=int, default=48)
    parser.add_argument("--split", choices=tuple(SEEDS), default="report")
    parser.add_argument("--checkpoint", default=str(HERE / "checkpoint.safetensors"))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--recipe", type=json.loads, default=RECIPE)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--quick", action="store_true", help="bfloat16")
    parser.add_argument("--sheet", help="a PNG of the first targets")
    options = parser.parse_args()
    torch.set_num_threads(1)
    generate, made = Torch(options.checkpoint, options.recipe, options.guidance, options.quick), {}

    def kept(row: str, wanted: Sequence[Target]) -> Frames:
        made[row] = generate(row, wanted)
        return made[row]

    wanted = targets(options.split, options.targets)
    print(json.dumps(options.recipe), options.guidance)
    print(table(evaluate(kept, wanted, options.rows)), flush=True)
    if options.sheet:
        sheet(options.sheet, wanted, made)


if __name__ == "__main__":
    main()
