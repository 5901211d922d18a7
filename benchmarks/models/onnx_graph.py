"""An ONNX graph as a function of named arrays, for benchmarks in which several sessions take turns. No PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]
Graph = Callable[[Mapping[str, NDArray[Any]]], Arrays]


@functools.cache
def _one_arena() -> None:
    """A place for the values of all sessions of this process that ask for it."""
    import onnxruntime

    kind = onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR
    info = onnxruntime.OrtMemoryInfo("Cpu", kind, 0, onnxruntime.OrtMemType.DEFAULT)
    same_as_requested = {"arena_extend_strategy": 1}
    onnxruntime.create_and_register_allocator(info, onnxruntime.OrtArenaCfg(same_as_requested))


def open_session(path: Path, threads: int, profile: Path | None = None, shared: bool = False) -> Any:
    """An ONNX Runtime session on the CPU. Its threads do not spin between calls: several sessions take turns on the same cores.

    profile: how the name of the profiler's file begins, where there is to be one. shared: values lie where those of other such
    sessions lie in their turns, or each session would keep as much as its graph needs.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.inter_op_num_threads = 1
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if shared:
        _one_arena()
        options.add_session_config_entry("session.use_env_allocators", "1")
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def open_graph(path: Path, threads: int, shared: bool = False) -> Graph:
    """The graph in a session of its own, as a function; `shared` as of `open_session`."""
    session = open_session(path, threads, shared=shared)
    names = [output.name for output in session.get_outputs()]

    def run(inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        return dict(zip(names, session.run(names, dict(inputs)), strict=True))

    return run
