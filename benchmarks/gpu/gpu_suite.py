"""Everything that needs a GPU, in one command of about ten minutes: the most valuable first, and nothing lost when time is up.

    .venv-dev/bin/python benchmarks/gpu/gpu_suite.py                            # all stages, 600 s
    .venv-dev/bin/python benchmarks/gpu/gpu_suite.py --stages ceilings kernels --seconds 200
    .venv-dev/bin/python benchmarks/gpu/gpu_suite.py --optional                 # also the optional stages, last in STAGES
    .venv-dev/bin/python benchmarks/gpu/gpu_suite.py --engines                  # TensorRT engines only; --precision fp8: 8 bits
    .venv-dev/bin/python benchmarks/gpu/gpu_suite.py --toy                      # every stage on the CPU at toy size, as CI does

Each stage is a process of its own with a budget of seconds: it is ended when they are spent, so neither a compiler that takes
too long nor a crash keeps the next one from running. Every row is appended to --results as soon as it is measured; at the end
all rows of the run are printed as JSON lines, between two marks, to be copied from a terminal if nothing else comes back.

On a machine with Python 3.12, PyTorch 2.11, Triton 3.6 and transformers 5.17 that reaches no registry, bring four wheels
(43 MB): `diffusers`, `usearch`, `av` and `msgspec` in the versions of requirements/; docs/running-engines.md has the commands.
What a stage needs and does not find is said ("not run: ...") and the suite goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from motionrt.benchmarks import harness

BEGIN, END = "===== rows, one JSON object a line =====", "===== end of rows ====="


@dataclass(frozen=True)
class Stage:
    """One process: what it is called, the most seconds that it may take, what it does, what it cannot do without."""

    name: str
    seconds: float
    run: Callable[[argparse.Namespace, bool], None]
    needs: tuple[str, ...] = ("torch",)
    optional: bool = False


def _common(options: argparse.Namespace, rounds: int | None = None) -> list[str]:
    return ["--results", str(options.results), "--rounds", str(rounds or options.rounds), "--warmups", str(options.warmups)]


def ceilings(options: argparse.Namespace, toy: bool) -> None:
    from motionrt.benchmarks.gpu import gpu_ceilings

    gpu_ceilings.main(_common(options), device="cpu" if toy else "cuda", toy=toy)


def kernels(options: argparse.Namespace, toy: bool) -> None:
    """Parity on the chip, then times: rows of gpu_kernel. On the CPU the torch forms against fp64."""
    from motionrt.benchmarks.gpu import gpu_kernel

    gpu_kernel.main([*_common(options), *(["--cpu-check"] if toy else [])])


def augmented_kernel(options: argparse.Namespace, toy: bool) -> None:
    """The same of Motion-I2V's augmented attention; rows of gpu_augmented."""
    from motionrt.benchmarks.gpu import gpu_augmented

    gpu_augmented.main([*_common(options), *(["--cpu-check"] if toy else [])])


def _cogvideox(name: str, stages: list[str], toy_stages: list[str]) -> Callable[[argparse.Namespace, bool], None]:
    """The full-size step by gpu_step.py; rows of gpu_step. It is checked against the released form, which is always there.

    Compiling on the CPU is for tests/benchmarks/gpu/test_gpu_step.py: it takes longer than everything else here.
    """

    def run(options: argparse.Namespace, toy: bool) -> None:
        import torch

        from motionrt.benchmarks.gpu import gpu_step

        arguments = [*_common(options), "--budget", str(_budget(name, options)), "--stages", *(toy_stages if toy else stages)]
        if toy:
            gpu_step.main([*arguments, "--size", "toy"], device="cpu", dtype=torch.float32)
        else:
            gpu_step.main(arguments)

    return run


def svd_step(options: argparse.Namespace, toy: bool) -> None:
    """The same for SVD; rows of gpu_step."""
    import torch

    from motionrt.benchmarks.gpu import gpu_svd

    arguments = [*_common(options), "--budget", str(_budget("svd_step", options))]
    if toy:
        stages = ["--size", "toy", "--stages", "released_eager", "base_eager", "ours_eager"]
        gpu_svd.main([*arguments, *stages], device="cpu", dtype=torch.float32)
    else:
        gpu_svd.main(arguments)


def mid_steps(options: argparse.Namespace, toy: bool) -> None:
    """DynamiCrafter's step and those of Motion-I2V at a middle size; rows of gpu_step."""
    import torch

    from motionrt.benchmarks.gpu import gpu_mid

    arguments = [*_common(options), "--budget", str(_budget("mid_steps", options))]
    if toy:
        stages = ["--size", "toy", "--stages", "released_eager", "ours_eager", "base_eager"]
        gpu_mid.main([*arguments, *stages], device="cpu", dtype=torch.float32)
    else:
        gpu_mid.main(arguments)


def _request(part: str, rounds: int | None = None) -> Callable[[argparse.Namespace, bool], None]:
    def run(options: argparse.Namespace, toy: bool) -> None:
        import torch

        from motionrt.benchmarks.gpu import gpu_request

        arguments = [*_common(options, None if toy else rounds), "--parts", part]
        if toy:
            gpu_request.main([*arguments, "--steps", "2"], device="cpu", dtype=torch.float32, toy=True)
        else:
            gpu_request.main(arguments)

    return run


def torch_programs(options: argparse.Namespace, toy: bool) -> None:
    """The demo's torch program of the step in float32, float16 and bfloat16; rows of gpu_demo."""
    from motionrt.benchmarks.gpu import gpu_demo

    gpu_demo.programs(_common(options), device="cpu" if toy else "cuda")


def onnxruntime(options: argparse.Namespace, toy: bool) -> None:
    """The same graph in ONNX Runtime's CUDA provider; rows of gpu_demo."""
    from motionrt.benchmarks.gpu import gpu_demo

    gpu_demo.onnxruntime_step(_common(options), device="cpu" if toy else "cuda")


def guided_step(options: argparse.Namespace, toy: bool) -> None:
    """MotionClone's guided step beside the plain one: torch programs, then engines in float16; rows of gpu_guided."""
    from motionrt.benchmarks.gpu import gpu_guided

    how: dict[str, Any] = {"device": "cpu", "precisions": ("float32",)} if toy else {}  # a CPU takes seconds for a float16 step
    if gpu_guided.main(_common(options), **how):
        raise SystemExit(1)


def branches(options: argparse.Namespace, toy: bool) -> None:
    """CogVideoX's step, both branches of guidance in one call, in two, and on two GPUs where there are two; rows of
    bench_branches."""
    import torch

    from motionrt.benchmarks.guided import bench_branches

    if toy:
        return bench_branches.main([*_common(options), "--size", "toy"])
    second = f"cuda:{min(1, torch.cuda.device_count() - 1)}"
    return bench_branches.main([*_common(options), "--size", "full", "--dtype", "bfloat16", "--devices", "cuda:0", second])


def tensorrt(options: argparse.Namespace, toy: bool) -> None:
    """Engines of the demo, by gpu_engines; without PyTorch. On a GPU that the library has no target for it says so."""
    if _engines(options):
        raise SystemExit(1)


def _engines(options: argparse.Namespace) -> int:
    from motionrt.benchmarks.gpu import gpu_engines

    eight = ["--precision", options.precision] if options.precision else []
    return gpu_engines.main([*_common(options), "--flavor", options.flavor, "--dtype", options.dtype, *eight])


# First what the goals are about; what takes minutes to compile comes later.
STEP, STEP_TOY = ["released_eager", "ours_graph", "base_eager", "base_compiled"], ["released_eager", "ours_eager"]
MORE = ["released_eager", "ours_eager", "ours_compiled", "released_compiled", "released_tuned", "base_tuned"]
MORE_TOY = ["base_eager"]
STEP_NEEDS = ("torch", "diffusers", "networkx", "triton")

STAGES = (
    Stage("ceilings", 40, ceilings),
    Stage("kernels", 120, kernels, ("torch", "triton")),
    Stage("augmented_kernel", 90, augmented_kernel, ("torch", "triton")),
    Stage("cogvideox_step", 240, _cogvideox("cogvideox_step", STEP, STEP_TOY), STEP_NEEDS),
    Stage("svd_step", 180, svd_step, STEP_NEEDS),
    Stage("conditioning", 60, _request("conditioning"), ("torch", "transformers", "diffusers")),
    Stage("decode", 60, _request("decode", 5), ("torch", "transformers", "diffusers")),
    Stage("request", 150, _request("request", 3), ("torch", "transformers", "diffusers", "networkx")),
    Stage("torch_programs", 60, torch_programs, ("torch", "onnxruntime", "usearch")),
    Stage("mid_steps", 180, mid_steps, ("torch", "diffusers", "networkx")),
    Stage("branches", 90, branches, ("torch", "diffusers")),
    Stage("guided_step", 120, guided_step, ("torch", "onnxruntime", "usearch", "av")),
    Stage(
        "cogvideox_more", 400, _cogvideox("cogvideox_more", MORE, MORE_TOY), ("torch", "diffusers", "networkx"), optional=True
    ),
    Stage("onnxruntime", 60, onnxruntime, ("onnxruntime", "usearch"), optional=True),
    Stage("tensorrt", 300, tensorrt, ("onnxruntime", "usearch", "av"), optional=True),
)


def _budget(name: str, options: argparse.Namespace) -> float:
    """Seconds after which a stage starts nothing more: what is running then may still end before the process is ended."""
    if options.toy:
        return 1e9  # a slow processor must not make a test pass by doing less
    seconds = next(stage.seconds for stage in STAGES if stage.name == name)
    return 0.75 * min(seconds, float(options.seconds))


def missing_gpu() -> str | None:
    """Why nothing can run here, or None."""
    if importlib.util.find_spec("torch") is None:
        return "PyTorch is not installed"
    import torch

    return None if torch.cuda.is_available() else "no CUDA device"


def sizes(folder: Path) -> dict[Path, int]:
    """How long each file of rows is."""
    return {path: path.stat().st_size for path in sorted(folder.glob("*.jsonl"))} if folder.exists() else {}


def appended(folder: Path, before: dict[Path, int]) -> list[str]:
    """The lines that came to the files of `folder` since they were as long as `before` says."""
    lines: list[str] = []
    for path in sizes(folder):
        with path.open("rb") as file:
            file.seek(before.get(path, 0))
            lines += file.read().decode().splitlines()
    return lines


def start(stage: Stage, options: argparse.Namespace, left: float) -> str:
    """Run `stage`, here if --here or --toy says so, else in a process of its own for at most `left` seconds: how it ended."""
    lacking = [package for package in stage.needs if importlib.util.find_spec(package) is None]
    if lacking:
        return f"not run: {', '.join(lacking)} not installed"
    if options.toy or options.here:
        try:
            stage.run(options, options.toy)
        except (Exception, SystemExit) as error:  # one stage's fault is not the next one's
            return f"failed: {type(error).__name__}: {error}"
        return "done"
    passed = ["--results", str(options.results), "--rounds", str(options.rounds), "--warmups", str(options.warmups)]
    passed += ["--flavor", options.flavor, "--dtype", options.dtype, "--seconds", str(left)]
    passed += ["--precision", options.precision] if options.precision else []
    process = subprocess.Popen([sys.executable, "-u", str(Path(__file__).resolve()), "--here", "--stages", stage.name, *passed])
    try:
        code = process.wait(timeout=left)
    except subprocess.TimeoutExpired:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)
        process.kill()
        process.wait()
        return f"ended after its {left:.0f} s; the rows that it had are kept"
    return "done" if code == 0 else f"failed: exit status {code}"


def main(arguments: list[str] | None = None) -> int:
    """Run the stages, say how each ended, print the rows; 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [stage.name for stage in STAGES]
    parser.add_argument("--stages", nargs="+", choices=names, help="these only, in the order of the suite")
    parser.add_argument("--skip", nargs="+", choices=names, default=[])
    parser.add_argument("--optional", action="store_true", help="also the optional stages")
    parser.add_argument("--seconds", type=float, default=600.0, help="for everything")
    harness.add_options(parser, rounds=20, warmups=3)
    parser.add_argument("--toy", action="store_true", help="every stage on the CPU at toy size, in this process")
    parser.add_argument("--here", action="store_true", help="in this process: no stage is ended")
    parser.add_argument("--engines", action="store_true", help="the stage tensorrt and nothing else")
    parser.add_argument("--flavor", default="rtx", help="of the engines: rtx or tensorrt")
    parser.add_argument("--dtype", default="float16", help="of the engines: float16, bfloat16 or float32")
    parser.add_argument("--precision", help="of the engines: int8 or fp8, the steps in turns with --dtype")
    options = parser.parse_args(arguments)
    if options.engines:
        return _engines(options)
    reason = None if options.toy else missing_gpu()
    if reason is not None:
        print(f"not run: {reason}")
        return 0
    if options.here and options.stages:  # a process of its own: the parent prints the summary and the rows
        chosen = [stage for stage in STAGES if stage.name in options.stages]
        ends = [start(stage, options, 0) for stage in chosen]
        print("\n".join(end for end in ends if end != "done"), end="")
        return int(any(end.startswith("failed") for end in ends))
    print(json.dumps(harness.machine()), flush=True)
    began, before, ended = perf_counter(), sizes(options.results), dict[str, str]()
    for stage in STAGES:
        chosen_here = stage.name in options.stages if options.stages else options.toy or options.optional or not stage.optional
        if not chosen_here or stage.name in options.skip:
            continue
        left = min(stage.seconds, options.seconds - (perf_counter() - began))
        print(f"\n== {stage.name}: {left:.0f} s at the most", flush=True)
        then = perf_counter()
        ended[stage.name] = start(stage, options, left) if left > 5 or options.toy else "not run: the time is up"
        print(f"== {stage.name}: {ended[stage.name]} ({perf_counter() - then:.0f} s)", flush=True)
    print()
    for name, how in ended.items():
        print(f"{name:>16}: {how}")
    print("\n".join([BEGIN, *appended(options.results, before), END]), flush=True)
    return int(any(how.startswith("failed") for how in ended.values()))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
