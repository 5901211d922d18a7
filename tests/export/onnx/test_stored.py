"""Weights beside a graph in their own dtype: what is written, that it is widened exactly, and what does not fit is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")

import onnx  # noqa: E402
import onnxruntime  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch import nn  # noqa: E402

from motionrt.export.checkpoints.files import CheckpointError, InMemory  # noqa: E402
from motionrt.export.compiler.weightless import meta  # noqa: E402
from motionrt.export.onnx.from_torch import Example, Range  # noqa: E402
from motionrt.export.onnx.stored import stored_as  # noqa: E402
from motionrt.export.onnx.streamed import stream_module  # noqa: E402

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Two(nn.Module):
    """A matrix that is used twice, an embedding, and a table of the module's own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.linear = nn.Embedding(40, 32), nn.Linear(32, 32, bias=False)
        self.register_buffer("table", torch.linspace(-3, 3, 512).reshape(16, 32), persistent=False)

    def forward(self, ids: Any) -> Any:
        x = self.embed(ids)
        return self.linear(x) @ self.linear.weight + self.table.sum(0)


def written(tmp_path: Path, dtype: Any) -> tuple[Path, dict[str, Any]]:
    draw = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=draw).to(dtype) for name, shape in
             (("embed.weight", (40, 32)), ("linear.weight", (32, 32)))}  # fmt: skip
    with meta():
        module = Two()
    examples = [Example({"n": n}, {"ids": torch.empty(n, 5, dtype=torch.int64, device="meta")}) for n in (2, 3)]
    path = tmp_path / "graphs" / "g.onnx"
    entry = stream_module(path, module, examples, ("y",), {k: InMemory(v) for k, v in state.items()}.get, {"n": Range(1, 2, 9)})
    assert entry["outputs"][0]["dtype"] == "float32"
    return path, state


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_graph_gives_what_its_module_gives_with_the_widened_weights(dtype: Any, tmp_path: Path) -> None:
    path, state = written(tmp_path, dtype)
    stored = load_file(path.with_suffix(".safetensors"))
    assert {name: value.dtype for name, value in stored.items()} == {
        "embed.weight": dtype, "linear.weight": dtype, "table": torch.float32
    }  # fmt: skip
    for name, value in state.items():
        assert torch.equal(stored[name], value), name
    onnx.checker.check_model(str(path), full_check=True)
    casts = [node for node in onnx.load(path, load_external_data=False).graph.node if node.op_type == "Cast"]
    assert len(casts) == (0 if dtype == torch.float32 else 2), "one for each weight, however often it is read"
    module = Two()
    module.load_state_dict({name: value.float() for name, value in state.items()})
    ids = torch.arange(15).reshape(3, 5)
    (got,) = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"ids": ids.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(got, module(ids).numpy(), atol=2e-5)


def test_what_a_narrower_dtype_cannot_hold_is_refused_by_name() -> None:
    weights = {"big": InMemory(torch.tensor([1.0, -7e4])), "ids": InMemory(torch.tensor([7])), "small": InMemory(torch.ones(2))}
    kept = stored_as(weights, None)
    assert all(kept[name] is weights[name] for name in weights)
    narrow = stored_as(weights, torch.float16)
    assert narrow["ids"] is weights["ids"] and narrow["small"].read().dtype == torch.float16
    assert narrow["big"].dtype == torch.float16 and narrow["big"].shape == (2,)
    with pytest.raises(CheckpointError, match=r"weight `big` has the value 7e\+04, which float16 cannot.*--dtype bfloat16"):
        narrow["big"].read()
    assert stored_as(weights, torch.bfloat16)["big"].read().dtype == torch.bfloat16
