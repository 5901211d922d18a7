"""What every training stage shares: the rendered clips, the work folder, and the words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import domain
import model as demo
import numpy as np
import torch
from recipe import Work
from torch import Tensor

HERE = Path(__file__).resolve().parent
WORK = HERE / "work"
work = Work(WORK)


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
