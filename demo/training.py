"""What every training stage shares: the rendered clips, the loop that survives a kill, and the work files."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import domain
import model as demo
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
WORK = HERE / "work"
SAVE_SECONDS = 60.0


def log(*parts: Any) -> None:
    print(time.strftime("[%H:%M:%S]"), *parts, flush=True)


class Pool:
    """The rendered clips (stage `data`): frames, coverage, centres, and which clips share a motion."""

    def __init__(self) -> None:
        self.frames = np.load(WORK / "frames.npy", mmap_mode="r")  # uint8 [N, 17, 64, 64, 3]
        self.masks = np.load(WORK / "masks.npy", mmap_mode="r")  # uint8 [N, 17, 16, 16], 255 = covered
        self.covers = np.load(WORK / "covers.npy", mmap_mode="r")  # uint8 [N, 64, 64]: of frame 0
        self.centres = torch.from_numpy(np.load(WORK / "centres.npy"))  # float32 [N, 17, 2] px
        info = json.loads((WORK / "pool.json").read_text())
        self.group = np.asarray(info["group"])  # clips with the same number share a motion
        self.family: list[str] = info["family"]
        self.colour = torch.tensor(info["colour"])
        self.shape = torch.tensor(info["shape"])
        self.background: list[int] = info["background"]
        unseen = np.asarray([name in domain.UNSEEN for name in self.family])
        self.held = np.flatnonzero(unseen)
        train = np.flatnonzero(~unseen)
        # Every 40th training clip is left out as a check; whole free groups would be wasteful.
        self.check, self.train = train[::40], np.delete(train, np.s_[::40])

    def video(self, index: np.ndarray) -> Tensor:
        """float32 `[B, 17, 3, 64, 64]` in [-1, 1]."""
        return torch.from_numpy(self.frames[index]).permute(0, 1, 4, 2, 3).float() / 127.5 - 1

    def mask(self, index: np.ndarray) -> Tensor:
        """float32 `[B, 17, 16, 16]` in [0, 1]."""
        return torch.from_numpy(self.masks[index]).float() / 255


@dataclass
class Step:
    """One training step: its own random generator (torch's global one is seeded too), and what to do with the loss."""

    number: int
    rng: np.random.Generator
    advance: Callable[[Tensor], None]


def training(name: str, modules: nn.Module, groups: list[dict[str, Any]], steps: int, decay: float = 0.01) -> Iterator[Step]:
    """Yield `steps` AdamW steps; the rate of each group warms up over 50 steps and falls as a cosine to 2 %.

    Every minute, modules and optimiser go to work/<name>.state.pt; a later call goes on from there. Randomness depends
    on the stage and the step alone, so a run that was killed and resumed draws what an undisturbed one would.
    """
    optimiser = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.98), weight_decay=decay)
    base = [group["lr"] for group in groups]
    everything = [p for group in optimiser.param_groups for p in group["params"]]
    state, first, mean = WORK / f"{name}.state.pt", 0, 0.0
    if state.exists():
        kept = torch.load(state, weights_only=True)
        modules.load_state_dict(kept["modules"])
        optimiser.load_state_dict(kept["optimiser"])
        first, mean = kept["step"], kept["mean"]
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
        if done % 100 == 0 or done == steps:
            speed = (time.monotonic() - start) / (done - first)
            log(f"{name} step {done} of {steps}, {speed:.3f} s each, loss {mean / (1 - 0.98**done):.4f}")
        if time.monotonic() - saved > SAVE_SECONDS or done == steps:
            partial = state.with_suffix(".partial")
            kept = {"modules": modules.state_dict(), "optimiser": optimiser.state_dict(), "step": done, "mean": mean}
            torch.save(kept, partial)
            os.replace(partial, state)
            saved = time.monotonic()


def keep(module: nn.Module, name: str) -> None:
    """Write a finished part to work/<name>.safetensors."""
    path = WORK / f"{name}.safetensors"
    partial = path.with_suffix(".partial")
    save_file({k: v.contiguous().clone() for k, v in module.state_dict().items()}, partial)
    os.replace(partial, path)


def keep_tensor(value: Tensor, name: str) -> None:
    """Write a cached tensor to work/<name>.pt."""
    partial = WORK / f"{name}.partial"
    torch.save(value, partial)
    os.replace(partial, WORK / f"{name}.pt")


def restore(module: nn.Module, name: str) -> None:
    """Read a part that an earlier stage finished."""
    path = WORK / f"{name}.safetensors"
    if not path.exists():
        raise SystemExit(f"{path.name} is missing: run the stage that makes it first (see `python demo/train.py --help`).")
    missing, unknown = module.load_state_dict(load_file(path), strict=False)
    if unknown or missing:
        raise SystemExit(
            f"work file {path.name} does not fit the model: missing {missing}, unknown {unknown}; "
            "delete it and its .state.pt and train the stage again."
        )


def tokenizer() -> Any:
    """The word-level tokenizer of the domain: [PAD] = 0, [UNK] = 1, then the words in order."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", *domain.words()])}
    if len(vocabulary) > demo.VOCABULARY:
        raise SystemExit(
            f"the domain has {len(vocabulary)} words; the text encoder holds {demo.VOCABULARY}. "
            "Raise VOCABULARY in demo/model.py."
        )
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


def ids(words: Any, texts: list[str]) -> Tensor:
    """int64 `[B, 12]`, padded with 0."""
    rows = [words.encode(text).ids[: demo.TEXT_TOKENS] for text in texts]
    return torch.tensor([row + [demo.PAD] * (demo.TEXT_TOKENS - len(row)) for row in rows])
