"""`motionrt bench`: what a bundle costs here. The measuring is in `measure`, the tables in `report`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from motionrt.runtime.backends.open import RunOptions
from motionrt.runtime.cli.common import BundleArgument, Solver, Steps, open_pipeline, with_run_options
from motionrt.runtime.errors import MotionRTError


@with_run_options
def bench(
    bundle: BundleArgument,
    memory: Annotated[
        list[str] | None,
        typer.Option("--memory", "-m", help="Memory to search in; again: searched together, `directory=0.5` for a weight."),
    ] = None,
    repeat: Annotated[int, typer.Option("--repeat", "-n", min=1, help="Requests, and rounds of the comparison.")] = 20,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write every measured second here.")] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="What is searched for, and read by the model.")] = None,
    image: Annotated[Path | None, typer.Option("--image", "-i", help="A still to read; else one is made.")] = None,
    steps: Steps = None,
    solver: Solver = None,
    *,
    run_options: RunOptions,
) -> None:
    """Time every stage of a request, and the rewritten step against the plain one.

    \b
    Examples:
      motionrt bench demo/bundle --memory demo/memory --repeat 50
      motionrt bench demo/bundle --threads 1 --json bench.json
      motionrt bench my-bundle -m my-memory --prompt "waves roll in" --image sea.jpg
      motionrt bench my-bundle --backend torch --device cuda --allow-onnxruntime
    """
    from motionrt.runtime.cli import measure
    from motionrt.runtime.cli import show as report
    from motionrt.runtime.files import replacing

    plan = measure.Plan(prompt or measure.PROMPT, image, steps, solver)
    with open_pipeline(bundle, memory or [], run_options) as pipeline, report.progress() as bars:
        task = bars.add_task("requests", total=repeat + measure.WARMUPS)
        rows = measure.bench_stages(pipeline, repeat, plan, lambda: bars.advance(task))
        task = bars.add_task("steps", total=repeat)
        comparison, notes = measure.compare_steps(pipeline, repeat, plan, lambda: bars.advance(task))
        environment = measure.environment(pipeline, run_options.threads)
        solved = pipeline.bundle.solver(solver, steps)
        counted = report.counted(pipeline.bundle.manifest.get("partition") or {})
    console = report.console()
    notes += [counted] if counted else []
    console.print(f"{environment['bundle']}: {environment['backend']}, {environment['processor']}", markup=False)
    for item in report.bench_tables(rows, comparison, notes):
        console.print(item, markup=not isinstance(item, str))
    if json_path is not None:
        document = {
            **environment,
            "solver": solved.name,
            "steps": solved.steps,
            "repeat": repeat,
            "seconds": {row.what: row.seconds for row in rows},
            "percentiles_ms": {row.what: row.percentiles() for row in rows if row.seconds},
            "not_run": {row.what: row.why for row in rows if row.why},
            "step_seconds": comparison.seconds,
            "step_ratios": {name: comparison.ratio(name) for name in comparison.seconds if name != "step"},
            "step_differences": comparison.differences,
            "notes": notes,
        }
        with replacing(json_path, MotionRTError) as temporary:
            temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
