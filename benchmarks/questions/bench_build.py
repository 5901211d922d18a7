"""What does building engines cost, and what becomes of a graph? Every graph of the demo bundle, CogVideoX-5B and SVD.

    .venv-dev/bin/python benchmarks/questions/bench_build.py            # rows; about five minutes on two cores
    .venv-dev/bin/python benchmarks/questions/bench_build.py --table    # the table of docs/engines.md, from the rows

Each graph is converted and built by a process of its own, as `motionrt build` does it. The two big models are there by
structure: random weights, real widths, fewer layers, a small grid of latents; size and time of a build follow weights and
layers. Nothing is run: that needs a GPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from motionrt.benchmarks import harness
from motionrt.export.engines.checks import load_library, scan_operators
from motionrt.export.engines.graph import count_attentions, count_motion_ops, engine_graph, save
from motionrt.export.engines.process import run_builder
from motionrt.export.engines.profiles import profiles_of
from motionrt.runtime.backends.onnx_weights import package_weights
from motionrt.runtime.backends.tensorrt.engine_file import Profile, Span
from motionrt.runtime.bundle.bundle import Bundle
from motionrt.runtime.dtypes import DTYPES

QUESTION = "bench_build"
TARGETS = ("sm_89", "sm_120")
DOCS = harness.ROOT / "docs" / "engines.md"
BEGIN, END = "<!-- table of benchmarks/questions/bench_build.py -->", "<!-- end of the table -->"
MIB = 2**20
MODELS = {
    "demo": "the shipped bundle, whole",
    "cogvideox-5b": "1 of 42 layers at full width (3072), with the Motion-Adapter",
    "svd": "2 of 4 levels at full width (320, 640), 1 of 2 layers each",
}
Graph = tuple[str, ir.Model, tuple[Profile, ...], Mapping[str, Any] | None]


def demo_graphs() -> Iterator[Graph]:
    """The graphs of the shipped bundle."""
    bundle = Bundle.open(harness.ROOT / "demo" / "bundle")
    for name, spec in bundle.graphs.items():
        path = bundle.graph_path(name)
        external = package_weights(spec, path, bundle.path) if spec.weights is not None else None
        yield name, ir.load(path), profiles_of(spec), external


def cogvideox_graphs() -> Iterator[Graph]:
    """Schedule, request and step of one layer, for latents of 3 frames of 16x24."""
    import torch

    from motionrt.benchmarks.models import full_step

    size = replace(full_step.FULL, name="one layer", layers=1, frames=3, height=16, width=24)
    cut = full_step.cut(size, torch.float32)
    yield from _programs(cut, full_step.feed(size, torch.float32))


def svd_graphs() -> Iterator[Graph]:
    """Schedule, request and step of two levels without adapters, for latents of 5 frames of 16x16."""
    from motionrt.benchmarks.models.mid_models import svd_model
    from motionrt.benchmarks.models.released import SVD_UNET

    levels = {
        "block_out_channels": (320, 640), "num_attention_heads": (5, 10), "layers_per_block": 1,
        "down_block_types": SVD_UNET["down_block_types"][-2:], "up_block_types": SVD_UNET["up_block_types"][:2],
    }  # fmt: skip
    model = svd_model("svd, 2 levels", {**SVD_UNET, **levels}, (5, 4, 16, 16), (25, 1024))
    yield from _programs(model.cut(adapter=False), model.feed())


SOURCES = {"demo": demo_graphs, "cogvideox-5b": cogvideox_graphs, "svd": svd_graphs}


def _programs(cut: Any, feed: dict[str, Any]) -> Iterator[Graph]:
    """The programs of a partition as ONNX, each exported when it is its turn."""
    import torch

    for name, program in cut.programs.items():
        for node in program.module.graph.nodes:  # views were traced over memory that a rewrite may have laid out anew
            if node.target in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
                node.target = torch.ops.aten.reshape.default
        program.module.recompile()
        if name != "step":
            with torch.no_grad():
                feed.update(zip(program.outputs, program.module(*(feed[n] for n in program.inputs)), strict=True))
        yield name, _onnx(program, feed), (_static(program.inputs, feed),), None


def _onnx(program: Any, feed: Mapping[str, Any]) -> ir.Model:
    """One program as ONNX at the sizes of `feed`, with our functions in it, as the exporter of bundles makes it."""
    import torch

    from motionrt.export.onnx.from_torch import OPSET
    from motionrt.export.onnx.functions import JOINS, add_functions, translations

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(program.module, tuple(feed[n] for n in program.inputs), strict=False)
        exported = exported.run_decompositions(JOINS)
        made = torch.onnx.export(
            exported, input_names=list(program.inputs), opset_version=OPSET, dynamo=True, verbose=False, optimize=True,
            custom_translation_table=translations(),
        )
    assert made is not None
    proto = made.model_proto
    add_functions(proto)
    return ir.from_proto(proto)


def _static(names: Sequence[str], feed: Mapping[str, Any]) -> Profile:
    return {name: Span(*(tuple(feed[name].shape),) * 3) for name in names}


def measure(model: str, name: str, graph: Graph, dtype: str) -> dict[str, Any]:
    """Convert and build one graph; the row."""
    _, onnx_model, profiles, external = graph
    start = time.perf_counter()
    ours = count_motion_ops(onnx_model)
    engine_graph(onnx_model, profiles, dtype, external)
    attentions, operators = count_attentions(onnx_model), scan_operators(onnx_model, name)
    place = Path(tempfile.mkdtemp(prefix="bench_build_"))
    try:
        save(onnx_model, place / "graph.onnx")
        del onnx_model, graph
        gc.collect()
        converted = time.perf_counter() - start
        onnx_bytes = sum(file.stat().st_size for file in place.glob("graph.*"))
        job = {
            "flavor": "rtx",
            "targets": TARGETS,
            "dtype": dtype,
            "profiles": [{key: asdict(span) for key, span in profile.items()} for profile in profiles],
            "operators": operators,
            "onnx": "graph.onnx",
            "once": name != "step",
            "full": dtype == "float32",
            "dtypes": {kind.tensorrt: kind.name for kind in DTYPES.values() if kind.tensorrt},
        }
        result = run_builder(name, job, place)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    if result["attentions"] != attentions:
        raise SystemExit(f"{model} {name}: {attentions} attentions, of which {result['attentions']} became IAttention")
    return {
        "what": "build",
        "model": model,
        "reduced": MODELS[model],
        "graph": name,
        "dtype": dtype,
        "flavor": "rtx",
        "library": result["library"],
        "targets": list(TARGETS),
        "profiles": len(profiles),
        "onnx_mib": round(onnx_bytes / MIB, 1),
        "convert_seconds": round(converted, 1),
        "build_seconds": result["build_seconds"],
        "engine_mib": round(result["engine_bytes"] / MIB, 1),
        "peak_rss_mib": result["peak_rss_mib"],
        "network_layers": result["network_layers"],
        "engine_layers": result["figures"].get("layers"),
        "scratch_mib": round(result["figures"].get("device_bytes", 0) / MIB, 1),
        "attentions": attentions,
        "decomposed": result["decomposed"],
        "motion_ops": ours,
    }


def latest(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The last row of each graph, in the order of `MODELS` and of their first rows."""
    found: dict[tuple[str, str, str], Mapping[str, Any]] = {}
    for row in rows:
        found[row["model"], row["graph"], row["dtype"]] = row
    return sorted(found.values(), key=lambda row: list(MODELS).index(row["model"]))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as the Markdown of docs/engines.md."""
    lines = [
        "| graph | dtype | ONNX, MiB | build, s | engine, MiB | peak memory, MiB | layers: network -> engine | attention |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in latest(rows):
        fused = [f"{row['attentions'] - row['decomposed']} fused"] if row["attentions"] else []
        fused += [f"{row['decomposed']} taken apart"] if row["decomposed"] else []
        fused += [f"{row['motion_ops']} motion, as its body"] if row["motion_ops"] else []
        lines.append(
            f"| {row['model']} {row['graph']} | {row['dtype']} | {row['onnx_mib']:.1f} | {row['build_seconds']:.1f} | "
            f"{row['engine_mib']:.1f} | {row['peak_rss_mib']:.0f} | {row['network_layers']} -> {row['engine_layers']} | "
            f"{', '.join(fused) or 'none'} |"
        )
    last = latest(rows)[-1]
    models = "; ".join(f"{name}: {MODELS[name]}" for name in MODELS if any(row["model"] == name for row in rows))
    lines += [
        "",
        f"One engine for {' and '.join(last['targets'])}, TensorRT-RTX {last['library']}, {last['cores']} cores "
        f"({last['processor']}). {models}.",
    ]
    return "\n".join(lines)


def read_rows() -> list[dict[str, Any]]:
    """Every row of this question."""
    path = harness.RESULTS / f"{QUESTION}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_table() -> None:
    """Put the table between its marks in docs/engines.md."""
    before, _, rest = DOCS.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCS.write_text(f"{before}{BEGIN}\n{table(read_rows())}\n{END}{after}", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", choices=tuple(SOURCES), help="this model, in this process; all, one process each, if not given"
    )
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float16")
    parser.add_argument("--table", action="store_true", help="write the table of docs/engines.md from the rows there are")
    options = parser.parse_args(arguments)
    if options.table:
        write_table()
        return
    if options.only is None:
        for name in SOURCES:
            subprocess.run([sys.executable, __file__, "--only", name, "--dtype", options.dtype], check=True)
        return
    load_library("rtx")
    for graph in SOURCES[options.only]():
        row = measure(options.only, graph[0], graph, options.dtype)
        harness.append_row(QUESTION, row)
        print(f"{options.only} {graph[0]}: {row['build_seconds']} s, {row['engine_mib']} MiB, {row['peak_rss_mib']} MiB peak")


if __name__ == "__main__":
    main()
