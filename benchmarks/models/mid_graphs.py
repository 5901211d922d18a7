"""ONNX graphs of the models in mid_models.py, made once: exporting 42 blocks takes minutes, and several benchmarks time them.

    graphs = graphs_of(MODELS["cogvideox-mid"], ("released", "folded"), work)
    graphs["folded"].open(threads=1)(graphs["folded"].feed)

A graph is made again when any file that it comes from has changed: its folder is named by their digest.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from motionrt.benchmarks import harness
from motionrt.benchmarks.models.full_step import known_values
from motionrt.benchmarks.models.mid_models import Model, arrays, export, export_step, real_shares
from motionrt.benchmarks.models.onnx_graph import Arrays, Graph, open_graph

WORK = harness.ROOT / "out" / "mid"
FORMS = ("base", "base_ours", "released", "folded")


@dataclass(frozen=True)
class Saved:
    """A graph on disk, what it reads at motion_scale 1 and, where it is `folded`, at 0, and its counted FLOPs."""

    path: Path
    feed: Arrays
    flops: int
    silent: Arrays | None = None

    def open(self, threads: int) -> Graph:
        """The graph in a session of its own."""
        return open_graph(self.path, threads)


def digest(*more: Path) -> str:
    """Of everything that the graphs come from: our sources, the files `more` and the versions of what traces them."""
    found = hashlib.sha256(f"{torch.__version__}".encode())
    for folder in ("export", "kernels"):
        for file in sorted((harness.ROOT / folder).rglob("*.py")):
            found.update(file.read_bytes())
    for name in ("mid_models.py", "full_step.py", "released.py"):
        found.update((Path(__file__).parent / name).read_bytes())
    for file in more:
        found.update(file.read_bytes())
    return found.hexdigest()[:12]


def graphs_of(model: Model, forms: Sequence[str], work: Path = WORK) -> dict[str, Saved]:
    """The graphs of `model` in the given `FORMS`, from `work` or made now.

    base and released: as written, without and with adapters; base_ours and folded: the same after the compiler pass.
    """
    unknown = set(forms) - set(FORMS)
    if unknown:
        raise ValueError(f"forms {sorted(unknown)} are not among {', '.join(FORMS)}")
    folder = work / f"{model.name}-{digest()}"
    folder.mkdir(parents=True, exist_ok=True)
    for adapter, plain, ours in ((True, "released", "folded"), (False, "base", "base_ours")):
        if any(form in forms and not (folder / f"{form}.json").exists() for form in (plain, ours)):
            _make(model, adapter, folder, plain, ours)
    return {form: _read(folder, form) for form in forms}


def _make(model: Model, adapter: bool, folder: Path, plain: str, ours: str) -> None:
    values = model.feed()
    print(f"{model.name}: exporting {plain} and {ours} ...", flush=True)
    cut = model.cut(adapter=adapter)
    _, reads = export_step(folder / f"{ours}.onnx", cut, values)
    _save(folder, ours, arrays(reads), cut.classes["step"].flops)
    if adapter:
        silent = known_values(cut, {**values, "motion_scale": torch.zeros_like(values["motion_scale"])})
        np.savez(folder / "scale_0.npz", **arrays({name: silent[name].contiguous() for name in reads}))  # type: ignore[arg-type]
    export(folder / f"{plain}.onnx", model.step(adapter=adapter), values, model.outputs)
    _save(folder, plain, arrays(values), cut.original.flops)


def _save(folder: Path, form: str, feed: Arrays, flops: int) -> None:
    np.savez(folder / f"{form}.npz", **feed)  # type: ignore[arg-type]
    partial = folder / f"{form}.json.partial"
    partial.write_text(json.dumps({"flops": flops}))
    os.replace(partial, folder / f"{form}.json")  # last: it says that the others are whole


def _read(folder: Path, form: str) -> Saved:
    path = folder / f"{form}.onnx"
    inputs = {entry.name for entry in onnx.load(path).graph.input}

    def feed(name: str) -> Arrays:
        with np.load(folder / f"{name}.npz") as stored:
            return {key: stored[key] for key in stored.files if key in inputs}

    flops = int(json.loads((folder / f"{form}.json").read_text())["flops"])
    return Saved(path, feed(form), flops, feed("scale_0") if form == "folded" else None)


def flop_shares(model: Model, flops: Mapping[str, int], work: Path = WORK) -> dict[str, Any]:
    """What the forms add in FLOPs, in percent of the base step: in this model, and in the real one (None for a toy)."""
    mid = {form: round(100 * (count / flops["base"] - 1), 3) for form, count in flops.items() if form != "base"}
    if model.real is None:
        return {"this_percent": mid, "real_percent": None}
    file = work / f"real-{model.real}-{digest()}.json"
    if not file.exists():
        print(f"{model.real}: counting the FLOPs of the published size ...", flush=True)
        counted = real_shares(model.real)
        partial = file.with_name(file.name + ".partial")
        partial.write_text(json.dumps(vars(counted)))
        os.replace(partial, file)
    real = json.loads(file.read_text())
    names = {"base_ours": "base_ours", "released": "released", "folded": "ours"}
    shown = {form: round(100 * (real[key] / real["base"] - 1), 3) for form, key in names.items()}
    return {"this_percent": mid, "real": model.real, "real_percent": shown}
