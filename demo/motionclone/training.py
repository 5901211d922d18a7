"""What the stages share: pictures and text as tensors, and the work folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import model as demo
import numpy as np
import torch
from recipe import Work
from torch import Tensor

HERE = Path(__file__).resolve().parent
WORK = HERE / "work"
work = Work(WORK)


def pixels(frames: np.ndarray) -> Tensor:
    """uint8 `[..., H, W, 3]` -> float32 `[..., 3, H, W]` in [-1, 1]."""
    return torch.from_numpy(frames).movedim(-1, -3).float() / 127.5 - 1


def tokenizer() -> Any:
    """demo/tokenizer.json with CLIP's beginning and end of text around every prompt."""
    from tokenizers import Tokenizer, processors

    words = Tokenizer.from_file(str(HERE.parent / "tokenizer.json"))
    if words.get_vocab_size() != demo.WORDS:
        raise SystemExit(
            f"demo/tokenizer.json has {words.get_vocab_size()} words; the text encoder was made for {demo.WORDS}. "
            "Set WORDS in demo/motionclone/model.py and train again."
        )
    words.add_special_tokens(["[BOS]", "[EOS]"])
    words.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[("[BOS]", demo.BOS), ("[EOS]", demo.EOS)]
    )
    return words


def ids(words: Any, texts: list[str]) -> Tensor:
    """int64 `[B, 12]`, padded; a longer text is an error."""
    rows = [words.encode(text).ids for text in texts]
    if longest := max((row for row in rows if len(row) > demo.TEXT_TOKENS), key=len, default=None):
        raise ValueError(f"a text has {len(longest)} tokens; the text encoder reads {demo.TEXT_TOKENS}.")
    return torch.tensor([row + [demo.PAD] * (demo.TEXT_TOKENS - len(row)) for row in rows])
