"""The performance gate: what can be counted instead of timed, held against `baseline.json`. No times, no GPU.

    .venv-dev/bin/python benchmarks/counts.py                       # count, compare; exit status 1 where anything differs
    .venv-dev/bin/python benchmarks/counts.py --accept "why"        # the counts of this tree become the baseline

Parts: `demo bundle` (the committed files: nodes by op and bytes of weights of each graph, bytes of the bundle), `demo step`
(the compiler pass over the demo's checkpoint, anew), `cogvideox tiny`, `svd tiny` and `dynamicrafter tiny` (the released
structures at small widths, without weights) and `kernels` (registers, spills, shared memory as compiled for each GPU).

Every count is better when it is lower. A higher one fails and must be accepted with a reason, which the baseline keeps. A
lower one fails too: were it not recorded, the next change could take it back without anybody seeing it. The counts of a
part depend on the libraries that `baseline.json` names with it: the locked versions are the ones that CI has.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from motionrt.export.compiler.partition import Partition

ROOT = Path(__file__).resolve().parent.parent
BASELINE = ROOT / "benchmarks" / "baseline.json"
ACCEPT = '.venv-dev/bin/python benchmarks/counts.py --accept "why"'
# What the counts of each part change with, besides this repository. The demo's graphs are committed files.
DEPENDS = {
    "demo bundle": (),
    "demo step": ("torch", "diffusers"),
    "cogvideox tiny": ("torch", "diffusers"),
    "svd tiny": ("torch", "diffusers"),
    "dynamicrafter tiny": ("torch",),
    "kernels": ("triton",),
}
# What is compiled here, for which targets, and how kernels/aot.py is asked for it; as tests/kernels/test_aot.py compiles them:
# both layouts of the cross attention for CogVideoX-5B, and the augmented attention of Motion-I2V's largest grid.
KERNELS = {"padded": (80, 86, 89, 90, 100, 120), "packed": (80, 90, 100, 120), "augmented": (80, 86, 89, 90, 100, 120)}
ASKED = {
    **{layout: ("--shapes", "3072x48x25x64", "--layouts", layout) for layout in ("padded", "packed")},
    "augmented": ("--kernel", "motion_augmented_attention", "--shapes", "8x40x16x6"),
}

COGVIDEOX: dict[str, Any] = {
    "num_attention_heads": 1, "attention_head_dim": 64, "in_channels": 8, "out_channels": 4, "num_layers": 2,
    "time_embed_dim": 16, "text_embed_dim": 24, "max_text_seq_length": 5, "sample_width": 8, "sample_height": 6,
    "sample_frames": 9, "patch_size": 2, "temporal_compression_ratio": 4, "use_rotary_positional_embeddings": True,
    "use_learned_positional_embeddings": True,
}  # fmt: skip
UNET: dict[str, Any] = {
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
    "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    "layers_per_block": 1, "num_attention_heads": (2, 4), "cross_attention_dim": 24, "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 24,
}  # fmt: skip
MOTION = (3, 20)

Counts = dict[str, int]  # "graph/what": how many


def bundle_counts(folder: Path = ROOT / "demo" / "bundle") -> Counts:
    """The committed bundle: of each graph, nodes by op, bytes of its weights; bytes of all its files."""
    import onnx

    from motionrt.runtime.bundle.bundle import Bundle

    bundle = Bundle.open(folder)
    manifest = bundle.manifest
    files = {"bundle.json", manifest.tables.file, *(entry.file for entry in manifest.tokenizers.values())}
    for spec in bundle.graphs.values():
        files |= {part.file for part in (spec, spec.program, spec.data) if part is not None}
    counts: Counts = {"bytes of the bundle": sum((folder / file).stat().st_size for file in files)}
    for name, spec in bundle.graphs.items():
        model = onnx.load(folder / spec.file, load_external_data=False)
        ops = Counter(node.op_type for node in model.graph.node)
        for function in model.functions:
            ops.update(f"{node.op_type} in {function.name}" for node in function.node)
        counts |= {f"{name}/nodes/{op}": number for op, number in sorted(ops.items())}
        counts[f"{name}/nodes"] = sum(ops.values())
        counts[f"{name}/weight bytes"] = sum(map(_tensor_bytes, model.graph.initializer))
    for kind, size in manifest.partition["classes"].items():
        counts[f"{kind} as exported/flops"] = size["flops"]
    return counts


def _tensor_bytes(tensor: Any) -> int:
    """Bytes of an ONNX tensor's values, wherever they are stored."""
    import onnx
    from numpy import prod

    return int(prod(tensor.dims)) * int(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def demo_counts() -> Counts:
    """The compiler pass over the step of the demo's checkpoint: what an export of it would give now."""

    from motionrt.benchmarks import harness

    build = harness.demo_module("export")
    return partition_counts(build.partition_step(build.step_module(ROOT / "demo" / "checkpoint.safetensors")))


def tiny_partition(model: str, unconditional: Tensor | None = None) -> Partition:
    """The pass over a released structure at small widths, with motion: `model` is one of `PARTS`. `unconditional [1, M, D]`:
    motion tokens of the pass without conditions; zeros if not given, and always of DynamiCrafter."""
    from motionrt.benchmarks.models import released
    from motionrt.export.compiler.weightless import fake_partition
    from motionrt.export.systems import cogvideox_step as cogvideox
    from motionrt.export.systems import svd_step as svd
    from motionrt.export.systems.dynamicrafter.unet import Size
    from motionrt.export.systems.steps import OUTPUTS, cogvideox_step, step_args, svd_step

    step: Any
    if model == "dynamicrafter tiny":
        size, tokens = Size(channels=32, widths=(1, 2), blocks=1, attended=1, head=32, context=24), (5, 9)
        step = released.dynamicrafter_step(size, MOTION, tokens)
        feed = released.crafter_args(step, (3, 4, 8, 16))
        return fake_partition(step, tuple(feed.values()), step.changes, outputs=OUTPUTS)
    if model == "svd tiny":
        config, inputs, latents = UNET, svd.INPUTS, (3, 4, 8, 16)
        step = svd_step(config, latents=latents, motion=MOTION, unconditional=unconditional)
    else:
        config, inputs, latents = COGVIDEOX, cogvideox.INPUTS, (3, 4, 6, 8)
        step = cogvideox_step(config, latents=latents, motion=MOTION, unconditional=unconditional)
    args = step_args(inputs, config, latents, MOTION)
    return fake_partition(step, tuple(args.values()), inputs, outputs=OUTPUTS)


def partition_counts(cut: Partition) -> Counts:
    """Of each program: FLOPs, bytes of weights, nodes by op; the bytes that cross into the step."""
    counts: Counts = {}
    for name, program in cut.programs.items():
        size = cut.classes[name]
        ops = Counter(str(node.target) for node in program.module.graph.nodes if node.op == "call_function")
        counts |= {f"{name}/nodes/{op}": number for op, number in sorted(ops.items())}
        counts |= {f"{name}/nodes": size.nodes, f"{name}/flops": size.flops, f"{name}/weight bytes": size.weight_bytes}
    for kind in cut.programs.keys() - {"step"}:
        counts[f"{kind}/bytes into the step"] = sum(h.bytes for h in cut.hoisted if h.kind == kind)
    return counts


def kernel_counts(reports: Iterable[Mapping[str, Any]] | None = None) -> Counts:
    """Registers and spilled bytes per thread, shared bytes per program; `reports` of kernels/aot.py, or compiled here."""
    return {
        f"{report['name']}/{what}": int(report[key])
        for report in (compiled() if reports is None else reports)
        for what, key in (("registers", "registers"), ("spilled bytes", "spills"), ("shared bytes", "shared"))
    }


def compiled() -> list[dict[str, Any]]:
    """Reports of kernels/aot.py for all of `KERNELS`, each in a process of its own: Triton may abort one."""
    found = []
    for kernel, targets in KERNELS.items():
        command = [sys.executable, str(ROOT / "kernels" / "aot.py"), "--json", *ASKED[kernel]]
        with tempfile.TemporaryDirectory() as cache:
            done = subprocess.run(
                [*command, "--targets", ",".join(map(str, targets))],
                env={**os.environ, "TRITON_CACHE_DIR": cache}, capture_output=True, text=True,
            )  # fmt: skip
        lines = done.stdout.splitlines()
        if len(lines) != len(targets):  # exit status 1 with all lines is a kernel with faults: that is for the counts to say
            raise RuntimeError(f"kernels/aot.py compiled {len(lines)} of {len(targets)} {kernel} kernels: {done.stderr[-500:]}")
        found += [json.loads(line) for line in lines]
    return found


PARTS: dict[str, Callable[[], Counts]] = {
    "demo bundle": bundle_counts,
    "demo step": demo_counts,
    "cogvideox tiny": lambda: partition_counts(tiny_partition("cogvideox tiny")),
    "svd tiny": lambda: partition_counts(tiny_partition("svd tiny")),
    "dynamicrafter tiny": lambda: partition_counts(tiny_partition("dynamicrafter tiny")),
    "kernels": kernel_counts,
}


def versions(part: str) -> dict[str, str]:
    """The installed versions of the libraries that the counts of `part` depend on."""
    return {library: metadata.version(library) for library in DEPENDS[part]}


def compare(part: str, now: Counts, baseline: Mapping[str, Any]) -> list[str]:
    """What differs from the baseline, worse first, each with by how much; empty where nothing does."""
    entry = baseline["parts"].get(part)
    if entry is None:
        return [f"{part}: not in the baseline"]
    changed = changes(now, entry["counts"])
    lines = [
        f"{'WORSE ' if new > old else 'better'} {part}: {name}: {old:,} -> {new:,}"
        + (f" ({new / old - 1:+.2%})" if old else "")
        for name, (old, new) in sorted(changed.items(), key=lambda item: (item[1][1] < item[1][0], item[0]))
    ]
    if lines and entry["versions"] != versions(part):
        lines.append(f"note   {part}: counted then with {entry['versions']}, now with {versions(part)}; counts depend on them")
    return lines


def changes(now: Counts, before: Mapping[str, int]) -> dict[str, list[int]]:
    """[before, now] of every count that differs; what is not there counts as none."""
    names = now.keys() | before.keys()
    return {name: [before.get(name, 0), now.get(name, 0)] for name in names if before.get(name, 0) != now.get(name, 0)}


def accepted(baseline: Mapping[str, Any], found: Mapping[str, Counts], reason: str) -> dict[str, Any]:
    """The baseline with the counts of `found` in it, and the reason with what it changed at the end of its history."""
    if not reason.strip():
        raise ValueError("the reason is empty; say why the counts may change, for whoever reads the baseline later")
    parts = dict(baseline.get("parts", {}))
    changed: dict[str, list[int]] = {}
    for part, now in found.items():
        if part in parts:  # a new part changes nothing
            changed |= {f"{part}: {name}": pair for name, pair in sorted(changes(now, parts[part]["counts"]).items())}
        parts[part] = {"versions": versions(part), "counts": dict(sorted(now.items()))}
    date = datetime.now(UTC).date().isoformat()
    history = [*baseline.get("reasons", []), {"date": date, "reason": reason, "changed": changed}]
    return {"parts": {part: parts[part] for part in PARTS if part in parts}, "reasons": history}


def main(arguments: list[str] | None = None) -> int:
    """Count, compare, print; 1 where a count differs. With --accept, write the baseline instead."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accept", metavar="REASON", help="make these counts the baseline and keep the reason")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--baseline", type=Path, default=BASELINE)
    options = parser.parse_args(arguments)
    baseline = json.loads(options.baseline.read_text(encoding="utf-8")) if options.baseline.exists() else {"parts": {}}
    found, differing = {}, []
    for part in options.parts:
        found[part] = PARTS[part]()
        lines = compare(part, found[part], baseline)
        differing += lines
        print(f"{part}: {len(found[part])} counts, {'as the baseline' if not lines else 'not as the baseline'}", flush=True)
    print("\n".join(differing))
    if options.accept is not None:
        text = json.dumps(accepted(baseline, found, options.accept), indent=1) + "\n"
        partial = options.baseline.with_suffix(".partial")
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, options.baseline)
        print(f"{options.baseline.name} written: {options.accept}")
    elif differing:
        print(f"accept them, with the reason: {ACCEPT}")
    return int(bool(differing) and options.accept is None)


if __name__ == "__main__":
    sys.exit(main())
