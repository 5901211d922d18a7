"""Exports a published model at its real size, from files of the real shapes that hold zeros: memory and time, no weights.

    .venv-dev/bin/python benchmarks/models/export_full.py cogvideox-5b-i2v FOLDER --frames 17
    .venv-dev/bin/python benchmarks/models/export_full.py svd FOLDER
    .venv-dev/bin/python benchmarks/models/export_full.py dynamicrafter-1024 FOLDER
    .venv-dev/bin/python benchmarks/models/export_full.py motionclone FOLDER      # without SparseCtrl
    .venv-dev/bin/python benchmarks/models/export_full.py motion-i2v FOLDER

FOLDER is made, and removed at the end unless `--keep`. The files are sparse: reading, hashing and moving their bytes costs what
real ones would; the disk does not. The bundle is then opened as the runtime opens it, every graph passes the ONNX checker and
strict shape inference, and the partition counts what it must (`EXPECTED`), or no row is appended to results/export_full.jsonl.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, process_time
from typing import Any
from unittest import mock

import onnx
import torch

from motionrt.benchmarks import harness
from motionrt.benchmarks.models.anonymous_memory import AnonymousMemory
from motionrt.benchmarks.models.sparse_models import (
    RELEASED,
    Sizes,
    write_cogvideox,
    write_dynamicrafter,
    write_motion_i2v,
    write_motionclone,
    write_svd,
)
from motionrt.export.checkpoints.animatediff_files import MotionCloneSources
from motionrt.export.checkpoints.motion_i2v_files import MotionI2VSources
from motionrt.export.checkpoints.motionrag_files import SosToken
from motionrt.export.exporter import export_system
from motionrt.export.onnx import streamed as onnx_streamed
from motionrt.export.onnx.torch_programs import FOLDER as PROGRAMS
from motionrt.export.onnx.torch_programs import write_program
from motionrt.export.systems.cogvideox import cogvideox_system
from motionrt.export.systems.dynamicrafter.system import DynamiCrafterSources, dynamicrafter_system
from motionrt.export.systems.motion_i2v.released import motion_i2v_system
from motionrt.export.systems.motionclone.system import motionclone_system
from motionrt.export.systems.motionrag_system import Sources
from motionrt.export.systems.svd import svd_system
from motionrt.export.systems.system import System
from motionrt.runtime.bundle.bundle import Bundle
from motionrt.runtime.dtypes import WEIGHTS

QUESTION = "export_full"
LIMIT = 6e9  # bytes beyond the page cache
MEASURED = (
    "RssAnon + RssShmem of the exporting process, sampled every 20 ms from outside; ru_maxrss counts mapped files too, and is "
    "an upper bound"
)


@dataclass(frozen=True)
class Expected:
    """What the partition must count: parameters that see only the timestep or the weights, all of them, and attentions in the
    step; `others`: the first two of each further step that is cut, where they are looked at."""

    out_of_the_loop: int
    model: int
    motion_attentions: int
    others: tuple[tuple[int, int], ...] | None = None


# CogVideoX: 84 AdaLN linears, time MLP, norm_out.linear; 5570.5 M of the model and 660.6 M of the adapters.
# MotionClone: 27.88 M of time in its guided step; the 19.17 M that make keys and values of the text are of the request.
# SVD: 56.32 M of time and id embeddings, 99.19 M of frame positions; all 32 attn2, adapters included, have left the step.
# Motion-I2V: the step of stage 1 with its ControlNet, 1,314.8 + 566.7 M, then without, and stage 2's, 1,312.7 M. What times and
# strides make in stage 1 is a graph of its own; 27.88 M of time leave stage 2.
# DynamiCrafter: the time MLP; 25.82 M more make tables of timestep and fs once a request; 16 folded adapters are in the step.
EXPECTED = {
    "cogvideox-5b-i2v": Expected(799_259_648, 6_231_082_560, 42),
    "svd": Expected(155_510_118, 1_562_572_522, 0),
    "dynamicrafter-1024": Expected(2_050_560, 1_476_804_420, 16),
    "motionclone": Expected(27_875_520, 1_276_658_564, 0),
    "motion-i2v": Expected(0, 1_835_147_396, 0, ((0, 1_284_866_244), (27_875_520, 1_312_730_244))),
}


@dataclass(frozen=True)
class Request:
    """What is exported. `size`: height, width of SVD's and MotionClone's videos; CogVideoX has its own."""

    model: str
    frames: int
    dtype: str = "checkpoint"
    steps: tuple[int, ...] = (25, 50)
    size: tuple[int, int] = (576, 1024)


def inspect(bundle: Path) -> dict[str, dict[str, Any]]:
    """Every graph of a bundle after the ONNX checker and strict shape inference, which raise what they find.

    Of each: nodes by kind of op (ours by name), bytes of weights, and of how many inner values type and shape are known.
    """
    found = {}
    opened = Bundle.open(bundle)
    for name in opened.graphs:
        path = opened.graph_path(name)
        inferred = _inferred_without_weights(path) if opened.graph(name).weights is not None else _inferred(path)
        graph = inferred.graph
        outputs = {o for node in graph.node for o in node.output if o} - {value.name for value in graph.output}
        typed = {value.name for value in graph.value_info if value.type.tensor_type.HasField("shape")}
        data = path.with_suffix(".safetensors")
        found[name] = {
            "nodes": len(graph.node),
            "motion_attentions": sum(node.op_type.startswith("motion_cross_attention") for node in graph.node),
            "weights": len(graph.initializer),
            "weights_bytes": data.stat().st_size if data.exists() else 0,
            "inner_values": len(outputs),
            "inner_values_inferred": len(outputs & typed),
        }
    return found


def _inferred(path: Path) -> onnx.ModelProto:
    """The graph with the types of inner values, once checker and shape inference have passed; its weights stay on disk."""
    onnx.checker.check_model(str(path), full_check=False)
    inferred = path.with_suffix(".inferred")
    try:
        onnx.shape_inference.infer_shapes_path(str(path), str(inferred), check_type=True, strict_mode=True)
        return onnx.load(inferred, load_external_data=False)
    finally:
        inferred.unlink(missing_ok=True)


def _inferred_without_weights(path: Path) -> onnx.ModelProto:
    """As `_inferred`, for a graph whose weights stay in a package: the checker looks for files, so they become inputs."""
    model = onnx.load(path, load_external_data=False)
    outside = [tensor for tensor in model.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
    for tensor in outside:
        model.graph.initializer.remove(tensor)
        model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    onnx.checker.check_model(model, full_check=False)
    return onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)


WRITERS: Mapping[str, Callable[[Path, Sizes], None]] = {
    "cogvideox-5b-i2v": write_cogvideox, "svd": write_svd, "dynamicrafter-1024": write_dynamicrafter,
    "motionclone": lambda root, sizes: write_motionclone(root),
    "motion-i2v": lambda root, sizes: write_motion_i2v(root),
}  # fmt: skip
FRAMES = {"cogvideox-5b-i2v": 17, "svd": 16, "dynamicrafter-1024": 16, "motionclone": 16, "motion-i2v": 16}
SIZES = {"svd": (576, 1024), "dynamicrafter-1024": (576, 1024), "motionclone": (512, 512), "motion-i2v": (320, 512)}


def open_system(root: Path, request: Request, say: Callable[[str], None]) -> System:
    """The system of what a writer left in `root`."""
    height, width = request.size
    if request.model == "motionclone":
        files = MotionCloneSources(root / "base", root / "motion.safetensors", dtype=request.dtype)
        return motionclone_system(files, frames=request.frames, height=height, width=width, say=say)
    if request.model == "motion-i2v":
        release = MotionI2VSources(root / "models", dtype=request.dtype)
        return motion_i2v_system(release, frames=request.frames, height=height, width=width, say=say)
    if request.model == "dynamicrafter-1024":
        crafter = DynamiCrafterSources(
            root / "base", root / "tokenizer", "1024", root / "rag", root / "videomae", root / "dinov2", request.dtype,
            SosToken(seed=42), steps=request.steps,
        )  # fmt: skip
        return dynamicrafter_system(crafter, frames=request.frames, height=height, width=width, say=say)
    sources = Sources(
        root / "base", root / "rag", root / "videomae", root / "dinov2", request.dtype, SosToken(seed=42),
        steps=request.steps,
    )  # fmt: skip
    if request.model == "svd":
        return svd_system(sources, frames=request.frames, height=height, width=width, say=say)
    return cogvideox_system(sources, frames=request.frames, say=say)


def export(root: Path, request: Request, *, limit: float = LIMIT) -> dict[str, Any]:
    """Export what a writer left in `root` to `root/bundle` and look at it; the row. MemoryError if `limit` was not kept."""
    bundle, stages = root / "bundle", list[dict[str, Any]]()
    program_seconds = 0.0

    def timed(path: Path, *arguments: Any) -> dict[str, Any]:
        nonlocal program_seconds
        begun = perf_counter()
        entry = write_program(path, *arguments)
        program_seconds += perf_counter() - begun
        return entry

    with AnonymousMemory() as memory, mock.patch.object(onnx_streamed, "write_program", timed):
        start, used, begun = perf_counter(), process_time(), perf_counter()

        def end(name: str | None) -> None:
            nonlocal begun
            now = perf_counter()
            if stages:
                stages[-1] |= {"seconds": round(now - begun, 1), "peak_mb": round(memory.peak() / 1e6)}
                print("{stage:24} {seconds:8.1f} s {peak_mb:6} MB".format(**stages[-1]), flush=True)
            begun = now
            if name is not None:
                stages.append({"stage": name})

        end("open and check files")
        export_system(open_system(root, request, end), bundle, say=end)
        seconds, cpu_seconds = perf_counter() - start, process_time() - used
        end("inspect")
        graphs = inspect(bundle)
        end(None)
    most = max(stage["peak_mb"] for stage in stages)
    manifest = json.loads((bundle / "bundle.json").read_text())
    if most * 1e6 > limit:
        raise MemoryError(f"the export took {most} MB beyond the page cache; allowed are {limit / 1e6:.0f}")
    parts = manifest["partition"]
    classes = [part["weights"] for part in ([parts] if "weights" in parts else parts.values())]  # of each step, in turn
    files = [path for path in bundle.rglob("*") if path.is_file()]
    kinds = (".safetensors", ".bin", ".ckpt")
    read = [path for path in root.rglob("*") if path.suffix in kinds and bundle not in path.parents and not path.is_symlink()]
    return {
        "model": request.model,
        "frames": request.frames,
        "dtype": request.dtype,
        "weights_read_bytes": sum(path.stat().st_size for path in read),
        "bundle_bytes": sum(f.stat().st_size for f in files),
        "bundle_bytes_on_disk": sum(f.stat().st_blocks * 512 for f in files),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "peak_anonymous_mb": most,
        "ru_maxrss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6),
        "memory_is": MEASURED,
        "threads": 1,
        "program_seconds": round(program_seconds, 1),
        "program_bytes": {path.stem: path.stat().st_size for path in sorted((bundle / PROGRAMS).glob("*.pt2"))},
        "stages": stages,
        "graphs": graphs,
        "classes": classes[0],
        "other_classes": classes[1:],
        "memory": manifest["provenance"]["memory"],
        "checked": "ONNX checker and strict shape inference passed for every graph; weights were zeros",
    }


def check_counts(row: Mapping[str, Any], expected: Expected) -> None:
    """ValueError unless the manifest's classes and the step graph are what `expected` says."""

    def counted(classes: Mapping[str, Any]) -> tuple[int, int]:
        return sum(classes[kind]["parameters"] for kind in ("schedule", "constant")), classes["model"]["parameters"]

    attentions = sum(graph["motion_attentions"] for name, graph in row["graphs"].items() if name.startswith("step"))
    others = None if expected.others is None else tuple(map(counted, row["other_classes"]))
    got = Expected(*counted(row["classes"]), attentions, others)
    if got != expected:
        raise ValueError(f"the partition counts {got}; {expected} is expected")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=list(EXPECTED))
    parser.add_argument("work", type=Path, help="folder for the files and the bundle; must not be there yet")
    parser.add_argument("--frames", type=int, help="17 or 49 for CogVideoX, 16 for the others")
    parser.add_argument("--dtype", default="checkpoint", choices=["checkpoint", *WEIGHTS], help="what weights are kept in")
    parser.add_argument("--keep", action="store_true", help="leave the files and the bundle there")
    arguments = parser.parse_args()
    root: Path = arguments.work
    if root.exists():
        parser.error(f"{root} is there already; give a folder that this may make, and remove")
    torch.set_num_threads(1)
    root.mkdir(parents=True)
    frames, size = arguments.frames or FRAMES[arguments.model], SIZES.get(arguments.model, Request.size)
    try:
        WRITERS[arguments.model](root, RELEASED)
        row = export(root, Request(arguments.model, frames, arguments.dtype, size=size))
        check_counts(row, EXPECTED[arguments.model])
    finally:
        if not arguments.keep:
            shutil.rmtree(root, ignore_errors=True)
    took = f"{row['seconds']} s ({row['cpu_seconds']} of the processor), {row['peak_anonymous_mb']} MB"
    print(f"{took}, a bundle of {row['bundle_bytes'] / 1e9:.1f} GB")
    print(harness.append_row(QUESTION, row))


if __name__ == "__main__":
    main()
