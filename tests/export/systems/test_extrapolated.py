"""The step that does without its network: the graph that is exported against the formula, for one request and for several."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
import torch

from motionrt.export.exporter import Writer, silent
from motionrt.export.onnx.from_torch import Range
from motionrt.export.systems.extrapolated import KEPT, NAME, Extrapolated, extrapolated_step
from motionrt.export.systems.system import Array


@pytest.mark.parametrize("batch", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_graph_gives_the_update_of_the_weighted_sum(tmp_path: Path, batch: int) -> None:
    import onnxruntime

    writer = Writer(tmp_path, False, silent)
    frames = Array(("batch", 3, 2, 5, 4))
    inputs = dict.fromkeys(("latents", "previous_x0", "noise"), frames) | {"coefficients": Array(("batch", 6))}
    report = writer.cut(extrapolated_step(inputs, {"batch": Range(1, 1, 4)}))
    assert report["hoisted"] == [] and list(writer.graphs) == [NAME] and "data" not in writer.graphs[NAME]
    session = onnxruntime.InferenceSession(tmp_path / "graphs" / f"{NAME}.onnx")
    draw = np.random.default_rng(0)
    given = {port.name: draw.standard_normal([batch, *port.shape[1:]]).astype(np.float32) for port in session.get_inputs()}
    double = {name: value.astype(np.float64) for name, value in given.items()}
    column = lambda name, index: double[name][:, index, None, None, None, None]  # noqa: E731
    v = sum(column("kept", index) * double[name] for index, name in enumerate(KEPT))
    p0, p1, c0, c1, c2, c3 = (column("coefficients", index) for index in range(6))
    x0 = p0 * double["latents"] + p1 * v
    want = {"x0": x0, "next_latents": c0 * double["latents"] + c1 * x0 + c2 * double["previous_x0"] + c3 * double["noise"]}
    for name, got in zip(("next_latents", "x0"), session.run(["next_latents", "x0"], given), strict=True):
        np.testing.assert_allclose(got, want[name], rtol=1e-5, atol=1e-5)
    plain = Extrapolated()(*(torch.from_numpy(given[name]) for name in given))
    np.testing.assert_allclose(plain[1], want["x0"], rtol=1e-5, atol=1e-5)
