"""What Triton gives its Python models (`triton_python_backend_utils`), as far as ours uses it, and a request of Triton."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1


@dataclass
class Tensor:
    given: str
    array: Any

    def name(self) -> str:
        return self.given

    def as_numpy(self) -> Any:
        return self.array


@dataclass
class TritonError:
    INVALID_ARG = "invalid argument"
    INTERNAL = "internal"
    CANCELLED = "cancelled"
    message: str
    code: str


@dataclass
class InferenceResponse:
    tensors: list[Tensor] = field(default_factory=list)
    error: TritonError | None = None

    def read(self) -> dict[str, Any]:
        return {tensor.given: tensor.array for tensor in self.tensors}


class Logger:
    @staticmethod
    def log_info(message: str) -> None:
        pass


class Request:
    """Its own sender, too: `sent` is every answer with its flags. `wanted`: how many answers until it is cancelled."""

    def __init__(self, given: dict[str, Any], wanted: float = np.inf) -> None:
        self.tensors, self.wanted = [Tensor(name, value) for name, value in given.items()], wanted
        self.sent: list[tuple[InferenceResponse, int]] = []

    def inputs(self) -> list[Tensor]:
        return self.tensors

    def get_response_sender(self) -> Request:
        return self

    def send(self, response: InferenceResponse, flags: int = 0) -> None:
        assert not self.sent or not self.sent[-1][1], "something came after the final answer"
        self.sent.append((response, flags))

    def is_cancelled(self) -> bool:
        return len(self.sent) >= self.wanted
