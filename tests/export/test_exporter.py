"""The exporter on a toy system: a bundle that does what its modules do, from memory or streamed, whole or not at all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")

from by_path import load_by_path  # noqa: E402

from motionrt.export.exporter import export_system  # noqa: E402
from motionrt.runtime.bundle.bundle import Bundle  # noqa: E402
from motionrt.runtime.bundle.manifest import Output  # noqa: E402
from motionrt.runtime.errors import BundleError  # noqa: E402

plain_run = load_by_path(Path(__file__).resolve().parents[1] / "helpers" / "plain_run.py")
_toy = load_by_path(Path(__file__).resolve().parents[1] / "helpers" / "toy_system.py")
Picture, Wave, network, toy = _toy.Picture, _toy.Wave, _toy.network, _toy.toy
ROWS, STEPS, WIDTH = _toy.ROWS, _toy.STEPS, _toy.WIDTH


@torch.no_grad()
def expected(scaled: bool, strength: float, draw: Any) -> Any:
    """The video by the modules alone."""
    wave, picture = network(Wave, False).module, network(Picture, False).module
    latents = torch.from_numpy(draw("wave", 0, (1, WIDTH)))
    for row in torch.from_numpy(ROWS["even"][STEPS]):
        latents = wave(latents, row[None, 2:], row[1:2], *([torch.tensor([strength])] if scaled else []))
    return picture(latents).numpy()


@pytest.mark.parametrize(
    "streamed", [pytest.param(False, id="in memory", marks=pytest.mark.slow), pytest.param(True, id="streamed")]
)
@pytest.mark.parametrize(
    "scaled", [pytest.param(True, id="with a request"), pytest.param(False, id="without one", marks=pytest.mark.slow)]
)
def test_a_bundle_does_what_its_modules_do(streamed: bool, scaled: bool, tmp_path: Path) -> None:
    said: list[str] = []
    lines = export_system(toy(streamed, scaled), tmp_path / "bundle", say=said.append)
    bundle = Bundle.open(tmp_path / "bundle")
    manifest = bundle.manifest
    assert said[:2] == ["picture", "partition"] and len(lines) == 0 and not (tmp_path / "bundle" / "keys.json").exists()
    assert manifest.loops["wave"].tables == ("schedule_wave",) and manifest.memory is None
    assert [node.graph for node in manifest.nodes] == [*["request_wave"] * ("request_wave" in bundle.graphs), "wave", "picture"]
    if not scaled:
        assert "request_wave" not in bundle.graphs  # nothing depends on a request: there is no such graph, and no such node
    assert set(bundle.programs) == set(bundle.graphs) - {"picture"}
    draw = plain_run.drawn(1)
    values = plain_run.PlainRun(bundle)({"strength": np.array([0.7], np.float32)}, draw)
    np.testing.assert_allclose(values["video"], expected(scaled, 0.7, draw), atol=1e-5)


@pytest.mark.slow
def test_weights_of_another_graph_are_stored_once(tmp_path: Path) -> None:
    made = toy(streamed=True)
    second = replace(made.graphs["picture"], weights_of="picture")
    system = replace(made, graphs={**made.graphs, "again": second}, plan=("request_wave", "wave", "again"))
    export_system(system, tmp_path / "bundle", programs=False)
    bundle = Bundle.open(tmp_path / "bundle")
    assert bundle.graph("again").data == bundle.graph("picture").data and not bundle.programs
    assert not (tmp_path / "bundle" / "graphs" / "again.safetensors").exists()
    draw = plain_run.drawn(1)
    values = plain_run.PlainRun(bundle)({"strength": np.array([1.0], np.float32)}, draw)
    np.testing.assert_allclose(values["video"], expected(True, 1.0, draw), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"plan": ("request_wave", "picture")}, "reads `latents`, which nothing before it gives"),
        ({"plan": ("wave", "picture", "encode")}, "the plan runs 'encode', which is no graph and no loop"),
        ({"output": Output("pictures", 2, 2, 2, 8.0)}, "nothing gives `pictures`"),
        ({"schedules": {"wave": {"odd": ROWS["even"]}}}, "holds no finite float32"),
    ],
    ids=["no value", "no graph", "no output", "no rows"],
)
def test_a_system_that_does_not_fit_together_leaves_the_old_bundle_as_it_was(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "old").touch()
    with pytest.raises(BundleError, match=message):
        export_system(replace(toy(streamed=True), **change), tmp_path / "bundle", programs=False)
    assert [path.name for path in tmp_path.rglob("*")] == ["bundle", "old"]


def test_a_timestep_that_float32_does_not_hold_is_refused() -> None:
    from motionrt.export.systems.motionrag_system import COLUMNS, solver_table

    rows = solver_table(np.array([999, 2**24]), np.ones((2, 6), np.float32), 3.0)
    assert rows.dtype == np.float32 and rows.shape == (2, len(COLUMNS))
    assert rows[1].tolist() == [0, 2**24, 3, *[1] * 6, *[0] * 4]
    with pytest.raises(ValueError, match="no float32"):
        solver_table(np.array([999, 2**24 + 1]), np.ones((2, 6), np.float32), 3.0)


def test_what_says_nothing_is_left_out_of_the_manifest_and_a_default_that_is_empty_is_not() -> None:
    from motionrt.export.exporter import _sparse
    from motionrt.runtime.bundle.manifest import TextInput

    assert _sparse(TextInput("text", "", "help")) == {"kind": "text", "tokenizer": "text", "default": "", "help": "help"}
    assert "default" not in _sparse(TextInput("text")) and msgspec.to_builtins(TextInput("text"))["default"] is None
