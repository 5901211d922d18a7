"""Motion-I2V as engines are built of it: the demo's stage 2, and the tables that warp, which have no scatter with a sum."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")

from motionrt.export.engines.checks import scan_operators  # noqa: E402
from motionrt.export.engines.graph import engine_graph, save  # noqa: E402
from motionrt.export.engines.process import run_builder  # noqa: E402
from motionrt.export.exporter import Writer  # noqa: E402
from motionrt.export.systems.motion_i2v.augmented import Tables  # noqa: E402
from motionrt.export.systems.system import Array, Graph, Network  # noqa: E402
from motionrt.runtime.backends.tensorrt.engine_file import Span  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
DEMO = Path(__file__).resolve().parents[3] / "demo/motion_i2v/bundle"
FIELDS, SIZE, GRIDS = 2, 8, [(4, 4)]
NO_RTX = "needs TensorRT-RTX: `pip install motionrt[rtx]`"


@pytest.fixture(scope="module")
def warp(tmp_path_factory: pytest.TempPathFactory) -> ir.Model:
    """The graph that makes tables of fields, as an export writes it."""
    tables = Tables(GRIDS)
    writer = Writer(tmp_path_factory.mktemp("warp"), False, lambda text: None)
    moves = {"moves": Array((1, FIELDS, 2, SIZE, SIZE))}
    writer.add("warp", Graph(Network(tables.eval()), moves, tuple(tables.sizes(FIELDS))))
    return ir.load(writer.folder / "graphs" / "warp.onnx")


def test_tables_are_made_without_a_scatter_that_sums(warp: ir.Model) -> None:
    scatters = [node for node in warp.graph.all_nodes() if node.op_type.startswith("Scatter")]
    assert scatters
    for node in scatters:
        reduction = node.attributes.get("reduction")
        assert reduction is None or reduction.as_string() == "none", node.name


def test_tensorrt_rtx_builds_the_tables_where_their_sort_is_small(warp: ir.Model, tmp_path: Path) -> None:
    """It sorts up to 3,840 elements: more than the demo has, and fewer than the release."""
    pytest.importorskip("tensorrt_rtx", reason=NO_RTX, exc_type=ImportError)
    shape = (1, FIELDS, 2, SIZE, SIZE)
    profile = {"moves": Span(shape, shape, shape)}
    model = engine_graph(warp, (profile,), "float16")
    save(model, tmp_path / "graph.onnx")
    job = {
        "flavor": "rtx", "targets": ["sm_89", "sm_120"], "dtype": "float16", "operators": scan_operators(model, "warp"),
        "profiles": [{name: asdict(span) for name, span in profile.items()}], "onnx": "graph.onnx", "once": False,
        "full": False, "dtypes": {},
    }  # fmt: skip
    run_builder("warp", job, tmp_path)
    assert (tmp_path / "engine").stat().st_size > 10_000


def test_tensorrt_rtx_builds_the_demo_s_tables_and_stage_2(tmp_path: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    pytest.importorskip("tensorrt_rtx", reason=NO_RTX, exc_type=ImportError)
    bundle = Path(shutil.copytree(DEMO, tmp_path / "bundle"))
    names = {"warp", "step_video"}  # the other steps take minutes each
    status, _, err = run("build", bundle, "--target", "sm_89", "--dtype", "float16", "--graphs", ",".join(sorted(names)))
    assert status == 0, err
    assert {path.stem for path in (bundle / "engines" / "rtx-sm_89-float16").glob("*.json")} == names
