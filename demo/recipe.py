"""What the recipes of both systems share: the loop that survives a kill, the work files, and the command line of stages.

work = Work(HERE / "work")
for step in work.training("denoiser", net, [{"params": net.parameters(), "lr": 1e-3}], 6000):
    step.advance(loss(net, step.rng))
work.keep(net, "denoiser")
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


def log(*parts: Any) -> None:
    print(time.strftime("[%H:%M:%S]"), *parts, flush=True)


def make_memory(folder: Path, name: str, clips: str) -> None:
    """Memory `name` from `bundle` and the videos of `clips` with their captions.json, all in `folder`.

    Sources are relative to `folder`, so that the memory may be moved with it.
    """
    from motionrt.runtime.backends.onnxruntime import OnnxRuntimeBackend
    from motionrt.runtime.bundle.bundle import Bundle
    from motionrt.runtime.indexing.clips import ClipEncoders, index_clips
    from motionrt.runtime.memory.memory import MotionMemory

    os.chdir(folder)
    shutil.rmtree(name, ignore_errors=True)
    bundle = Bundle.open("bundle")
    captions = json.loads(Path(clips, "captions.json").read_text(encoding="utf-8"))
    with MotionMemory.for_bundle(name, bundle) as memory:
        encoders = ClipEncoders.from_bundle(bundle, OnnxRuntimeBackend(threads=1))
        made = index_clips(memory, encoders, [(Path(clips, file), text, None) for file, text in sorted(captions.items())])
        if made.failed:
            raise SystemExit(f"{made.failed[0][0].video}: {made.failed[0][1]}")
        log(name, "has", len(memory), "clips")


@dataclass
class Step:
    """One training step: its own random generator (torch's global one is seeded too), and what to do with the loss."""

    number: int
    rng: np.random.Generator
    advance: Callable[[Tensor], None]


@dataclass(frozen=True)
class Trained:
    """A stage that trains: `run(steps)`, how many steps if not told, and the files of the work folder that it goes on from."""

    run: Callable[[int], None]
    steps: int
    files: tuple[str, ...]


class Work:
    """The work files of a recipe, in `folder`, which is not kept."""

    SAVE_SECONDS = 60.0

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def training(
        self, name: str, modules: nn.Module, groups: list[dict[str, Any]], steps: int, decay: float = 0.01,
        average: float = 0.0,
    ) -> Iterator[Step]:  # fmt: skip
        """Yield `steps` AdamW steps; the rate of each group warms up over 50 steps and falls as a cosine to 2 %.

        Every minute, modules and optimiser go to NAME.state.pt; a later call goes on from there. Randomness depends on the
        stage and the step alone, so a run that was killed and resumed draws what an undisturbed one would. With `average`,
        the modules hold in the end the exponential mean of their weights.
        """
        optimiser = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.98), weight_decay=decay)
        base = [group["lr"] for group in groups]
        everything = [p for group in optimiser.param_groups for p in group["params"]]
        shadow = deepcopy(modules) if average else None
        state, first, mean = self.folder / f"{name}.state.pt", 0, 0.0
        if state.exists():
            kept = torch.load(state, weights_only=True)
            modules.load_state_dict(kept["modules"])
            optimiser.load_state_dict(kept["optimiser"])
            first, mean = kept["step"], kept["mean"]
            if shadow is not None:
                shadow.load_state_dict(kept["shadow"])
            log(name, "goes on at step", first)
        saved = start = time.monotonic()
        seed = int.from_bytes(name.encode()[:7], "big")
        for step in range(first, steps):
            rate = min(1.0, (step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
            for group, value in zip(optimiser.param_groups, base, strict=True):
                group["lr"] = value * rate

            def advance(loss: Tensor) -> None:
                nonlocal mean
                optimiser.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                nn.utils.clip_grad_norm_(everything, 1.0)
                optimiser.step()
                mean = 0.98 * mean + 0.02 * float(loss.detach())

            torch.manual_seed(hash((seed, step)))  # integers hash alike in every process
            yield Step(step, np.random.default_rng([seed, step]), advance)
            done = step + 1
            if shadow is not None:
                _follow(shadow, modules, 1 - min(average, done / (done + 9)))
            if done % 100 == 0 or done == steps:
                speed = (time.monotonic() - start) / (done - first)
                log(f"{name} step {done} of {steps}, {speed:.3f} s each, loss {mean / (1 - 0.98**done):.4f}")
            if time.monotonic() - saved > self.SAVE_SECONDS or done == steps:
                partial = state.with_suffix(".partial")
                kept = {"modules": modules.state_dict(), "optimiser": optimiser.state_dict(), "step": done, "mean": mean}
                if shadow is not None:
                    kept["shadow"] = shadow.state_dict()
                torch.save(kept, partial)
                os.replace(partial, state)
                saved = time.monotonic()
        if shadow is not None:
            modules.load_state_dict(shadow.state_dict())

    def keep(self, module: nn.Module, name: str) -> None:
        """Write a finished part to NAME.safetensors."""
        path = self.folder / f"{name}.safetensors"
        partial = path.with_suffix(".partial")
        save_file({k: v.contiguous().clone() for k, v in module.state_dict().items()}, partial)
        os.replace(partial, path)

    def keep_data(self, value: Any, name: str) -> None:
        """Write a tensor, or a dict of such, to NAME.pt."""
        partial = self.folder / f"{name}.partial"
        torch.save(value, partial)
        os.replace(partial, self.folder / f"{name}.pt")

    def restore(self, module: nn.Module, name: str) -> None:
        """Read a part that an earlier stage finished."""
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            raise SystemExit(f"{path.name} is missing: run the stage that makes it first (see `train.py --help`).")
        missing, unknown = module.load_state_dict(load_file(path), strict=False)
        if unknown or missing:
            raise SystemExit(
                f"work file {path.name} does not fit the model: missing {missing}, unknown {unknown}; "
                "delete it and its .state.pt and train the stage again."
            )

    def main(
        self, arguments: list[str] | None, about: str | None, trained: Mapping[str, Trained],
        made: Mapping[str, Callable[[], None]], order: Sequence[str], threads: int,
    ) -> None:  # fmt: skip
        """The command line of a recipe: one stage, or `all` in `order`. What a stage was run with goes to STAGE.done."""
        parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("stage", choices=[*order, *sorted((set(trained) | set(made)) - set(order)), "all"])
        parser.add_argument("--steps", type=int, help="training steps of the stage instead of its default")
        parser.add_argument("--threads", type=int, default=threads, help=f"of PyTorch (default {threads})")
        parser.add_argument("--again", action="store_true", help="forget what the stage has trained, and start it anew")
        options = parser.parse_args(arguments)
        if options.stage == "all" and (options.steps or options.again):
            parser.error(f"--steps and --again are for one stage; to train everything anew delete {self.folder}")
        if options.steps is not None and (options.steps < 1 or options.stage not in trained):
            parser.error("--steps is a positive number, for a stage that trains")
        torch.set_num_threads(options.threads)
        self.folder.mkdir(exist_ok=True)
        if options.again and options.stage in trained:
            for file in trained[options.stage].files:
                (self.folder / file).unlink(missing_ok=True)
        for stage in order if options.stage == "all" else (options.stage,):
            done = self.folder / f"{stage}.done"
            count = options.steps or (trained[stage].steps if stage in trained else 0)
            if options.stage == "all" and done.exists() and done.read_text() == str(count):
                log(stage, "is done")
                continue
            log(stage, "starts")
            if stage in trained:
                trained[stage].run(count)
            else:
                made[stage]()
            done.write_text(str(count))


def noised(net: Any, raw: Tensor, spread: float) -> Tensor:
    """Latents `[N, C, h, w]` of an autoencoder in training, of what its encoder gives: standardised as batch norm does, which
    `net.mean` and `net.std` follow, and with noise of `spread`."""
    mean, std = raw.mean(dim=(0, 2, 3), keepdim=True), raw.std(dim=(0, 2, 3), keepdim=True) + 1e-4
    net.mean.lerp_(mean.detach(), 0.02)
    net.std.lerp_(std.detach(), 0.02)
    latents = (raw - mean) / std
    return latents + torch.randn_like(latents) * spread


@torch.no_grad()
def _follow(shadow: nn.Module, modules: nn.Module, share: float) -> None:
    """Move the weights of `shadow` by `share` towards those of `modules`."""
    for old, new in zip(shadow.state_dict().values(), modules.state_dict().values(), strict=True):
        old.lerp_(new, share) if old.is_floating_point() else old.copy_(new)
