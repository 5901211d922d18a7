"""The motion of K retrieved clips as one set of tokens, without CAMA: the fusions of MotionRAG's release.

    fusion = Fusion("mean", (1568, 768), resampler)
    fusion(torch.zeros(1, 4, 1568, 768))              # [1, 25, 1024]

What is fused are the motion encoder's features of each clip, n of width E, and one Resampler reads the result: there are M
motion tokens (of width D) whatever K is, with `concat` too. B batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from motionrt.export.systems.motionrag import Resampler
from motionrt.runtime.bundle.manifest import SCORES, reference_name

RULES = ("mean", "concat", "top1", "weight")


def weights_of_scores(scores: Tensor) -> Tensor:
    """`[B, K]` cosines of the clips with the query -> their weights `[B, K]`, which are 0 or more and sum to 1.

    w_k = (1 - d_k) / sum(1 - d), with the cosine distance d = 1 - cosine held in [0, 1]: a clip weighs in proportion to its
    cosine, and one that points elsewhere (a cosine of 0 or less) nothing. Where all do, they weigh the same.
    """
    near = scores.clamp(min=0)
    total = near.sum(dim=1, keepdim=True)
    alike = torch.full_like(near, 1.0) / near.shape[1]
    return torch.where(total > 0, near / torch.where(total > 0, total, 1.0), alike)


def fused(rule: str, features: Tensor, scores: Tensor | None = None) -> Tensor:
    """`features [B, K, n, E]`, most similar clip first -> `[B, n, E]`, or `[B, K n, E]` by `concat`.

    mean: sum_k f_k / K; concat: one behind the other; top1: f_1; weight: sum_k w_k f_k, w of the `scores [B, K]`.
    """
    if rule == "concat":
        return features.flatten(1, 2)
    if rule == "top1":
        return features[:, 0]
    if rule == "weight":
        assert scores is not None
        return (weights_of_scores(scores)[:, :, None, None] * features).sum(dim=1)
    return features.mean(dim=1)


class Fusion(nn.Module):
    """`fused` features through the Resampler. With `top1` that is the one clip's own tokens, and these are what is kept of a
    clip: `proj` is None."""

    def __init__(self, rule: str, clip: tuple[int, int], proj: Resampler | None = None) -> None:
        """`clip`: sizes n, E of what is kept of one, or M, D without `proj`. ValueError for a rule that there is not."""
        super().__init__()
        if rule not in RULES:
            raise ValueError(f"fusion is {rule!r}; allowed: {', '.join(RULES)}.")
        self.rule, self.clip, self.proj = rule, clip, proj

    @property
    def part(self) -> str:
        """What is kept of a clip: the part of the record, and the graph that makes it."""
        return "motion" if self.proj is None else "features"

    @property
    def reads(self) -> dict[str, tuple[int, ...]]:
        """The arguments of `forward`, with their sizes behind B and K."""
        return {reference_name(self.part): self.clip, **({SCORES: ()} if self.rule == "weight" else {})}

    def forward(self, kept: Tensor, scores: Tensor | None = None) -> Tensor:
        """`kept [B, K, *clip]`, most similar first, `scores [B, K]` of `weight` -> motion tokens `[B, M, D]`."""
        one = fused(self.rule, kept, scores)
        return one if self.proj is None else self.proj(one)
