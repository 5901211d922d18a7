"""What the sources of every export of a published model share: the dtype of their weights, and what texts are searched with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from motionrt.export.checkpoints.files import CheckpointError, Lazy
from motionrt.export.checkpoints.text_query import SentenceEncoder, packaged_encoder, sentence_encoder
from motionrt.export.onnx.stored import stored_as
from motionrt.export.systems.system import Network
from motionrt.runtime.dtypes import WEIGHTS

AS_STORED = "checkpoint"  # weights are kept in the dtype of their file


class Keeping:
    """`dtype`: what weights are kept in, "checkpoint" (as they are) or one of `WEIGHTS`, which may lose digits; graphs compute
    in what a backend is asked for. `text_query`: folder of a sentence-transformers model to search with; None for the packaged
    one.
    """

    dtype: str
    text_query: Path | None

    def kept(self, weights: Mapping[str, Lazy]) -> dict[str, Lazy]:
        """`weights` in the dtype that they are kept in."""
        return stored_as(weights, None if self.dtype == AS_STORED else getattr(torch, self.dtype))

    def keeping(self, network: Network) -> Network:
        """`network` with its weights in the dtype that they are kept in; those in a package stay as they are."""
        if network.weights is None or network.package is not None:
            return network
        return replace(network, weights=self.kept(network.weights))

    def sentence_encoder(self) -> SentenceEncoder:
        """What captions and prompts are searched with."""
        if self.text_query is None:
            return packaged_encoder()
        found = sentence_encoder(self.text_query)
        return replace(found, network=self.keeping(found.network))

    def check(self, **choices: tuple[str, ...]) -> None:
        """`CheckpointError` unless `dtype` is allowed, and each of `choices` (name -> what is allowed)."""
        for name, allowed in {"dtype": (AS_STORED, *WEIGHTS), **choices}.items():
            value = getattr(self, name)
            if value not in allowed:
                raise CheckpointError(f"{name} is {value!r}; allowed: {', '.join(allowed)}.")
