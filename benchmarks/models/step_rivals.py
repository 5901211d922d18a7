"""The step in PyTorch behind the same call as ours: eager, and `torch.compile` at its best on a CPU; and in OpenVINO.

Rivals get what helps them: inference mode, weights frozen into the compiled code (`freezing`, so that they are packed once),
max-autotune (Inductor's own GEMM templates against the library's), no copies on the way in or out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import nn

Arrays = dict[str, NDArray[Any]]


def torch_step(
    module: nn.Module, inputs: Sequence[str], outputs: Sequence[str], *, threads: int, mode: str | None = None
) -> Callable[[Mapping[str, Any]], Arrays]:
    """`module` as named arrays in and out on `threads` threads: eager, or compiled in `mode` at its first call."""
    import torch

    torch.set_num_threads(threads)
    call: Callable[..., Any] = module
    mode_of_grad: Any = torch.inference_mode
    if mode is not None:
        import torch._inductor.config as inductor

        inductor.freezing = True
        call = torch.compile(module, mode=mode, dynamic=False)
        mode_of_grad = torch.no_grad  # what freezing is made for

    def run(arrays: Mapping[str, Any]) -> Arrays:
        tensors = {name: torch.from_numpy(np.asarray(arrays[name])) for name in inputs}
        with mode_of_grad():
            results = call(**tensors)
        return {name: value.numpy() for name, value in zip(outputs, results, strict=True)}

    return run


def compiled_step(
    module: nn.Module, inputs: Sequence[str], outputs: Sequence[str], *, threads: int, example: Mapping[str, Any], mode: str
) -> Callable[[Mapping[str, Any]], Arrays] | None:
    """`torch_step` compiled, with its first call done; None, and a word why, where it cannot be compiled here."""
    from time import perf_counter

    start = perf_counter()
    step = torch_step(module, inputs, outputs, threads=threads, mode=mode)
    try:
        step(example)
    except Exception as error:  # no C++ compiler, or one that refuses: the other candidates are still worth timing
        lines = str(error).strip().splitlines() or [""]
        print(f"compiled: not run: {type(error).__name__}: {lines[0][:200]}")
        return None
    print(f"compiled in {perf_counter() - start:.0f} s ({mode}, freezing)", flush=True)
    return step


def openvino_step(path: Path, threads: int, precision: str) -> Callable[[Mapping[str, Any]], Arrays]:
    """The ONNX graph `path` in OpenVINO as its backend compiles it, in "float32" or "bfloat16", with no cache."""
    from motionrt.runtime.backends.openvino.backend import OpenVinoBackend, OpenVinoExecutor
    from motionrt.runtime.backends.openvino.graph import read_source

    source = read_source(path, path.stem)
    return OpenVinoExecutor(OpenVinoBackend(threads, precision=precision).compile(source, precision), source).execute
