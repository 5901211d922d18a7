"""Programs of a partition without weights, streamed: each is what the module was cut into, at sizes that were not traced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")

from torch import Tensor, nn  # noqa: E402

from motionrt.export.checkpoints.files import InMemory  # noqa: E402
from motionrt.export.compiler.weightless import fake_partition, meta  # noqa: E402
from motionrt.export.onnx.from_torch import Range  # noqa: E402
from motionrt.export.onnx.streamed import stream_program  # noqa: E402
from motionrt.export.systems.rows import paired, repeated  # noqa: E402

INPUTS = {"x": "step", "timestep": "schedule", "hint": "request"}
RANGES = {"batch": Range(1, 1, 4), "steps": Range(1, 8, 1000)}


class Controlled(nn.Module):
    """A table of the schedule, a branch of request and schedule, and a sum with the latents, for both halves of guidance."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.hint = nn.Linear(4, 32), nn.Conv2d(3, 32, 3, padding=1)
        self.mix, self.into = nn.Conv2d(32, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor, timestep: Tensor, hint: Tensor) -> Tensor:
        time = self.time((timestep[:, None].float() * torch.arange(1, 5) / 1000).sin())
        hidden = torch.relu(repeated(self.hint(hint), 2) + repeated(time, 2)[:, :, None, None])
        return self.into(paired(x[:, None], -x[:, None])[:, 0] + self.mix(hidden)).unflatten(0, (-1, 2)).sum(1)


def test_streamed_programs_of_every_class_equal_the_module(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Controlled().eval()
    state = {name: value.detach() for name, value in module.named_parameters()}
    with meta():
        empty = Controlled()
    shapes = {"x": (1, 4, 6, 6), "timestep": (1,), "hint": (1, 3, 6, 6)}
    kinds = {"timestep": torch.int64}
    args = tuple(torch.empty(shape, dtype=kinds.get(name), device="meta") for name, shape in shapes.items())
    cut = fake_partition(empty, args, INPUTS, outputs=("y",))
    assert list(cut.programs) == ["schedule", "request", "timeline", "step"]

    def find(name: str) -> InMemory | None:
        return InMemory(state[name]) if name in state else None

    ports, sessions = {}, {}
    for kind in cut.programs:
        entry = stream_program(tmp_path / f"{kind}.onnx", cut, kind, find, RANGES)
        ports[kind] = {port["name"]: port["dims"] for port in entry["inputs"]}
        sessions[kind] = onnxruntime.InferenceSession(str(tmp_path / f"{kind}.onnx"), providers=["CPUExecutionProvider"])
    (table,) = cut.programs["timeline"].outputs
    assert ports["schedule"]["timestep"] == [{"name": "steps", "min": 1, "opt": 8, "max": 1000}]
    assert ports["step"][table][0] == {"name": "2*batch", "min": 2, "opt": 2, "max": 8}
    assert all(isinstance(dims[0], dict) for dims in ports["step"].values())
    from_request = [dims[0] for name, dims in ports["timeline"].items() if name in cut.request.outputs]
    assert from_request and all(isinstance(rows, int) for rows in from_request), "one request, all its timesteps"

    timesteps = np.array([900, 500, 20])
    x, hint = (np.random.default_rng(0).standard_normal((1, *shapes[name][1:])).astype(np.float32) for name in ("x", "hint"))
    known: dict[str, Any] = {"timestep": timesteps, "hint": hint}
    for kind in ("schedule", "request", "timeline"):
        feed = {name: known[name] for name in ports[kind]}
        known |= dict(zip(cut.programs[kind].outputs, sessions[kind].run(None, feed), strict=True))
    for t, timestep in enumerate(timesteps):
        rows = {table: known[table][2 * t : 2 * t + 2], "x": x}
        (got,) = sessions["step"].run(None, {name: rows[name] for name in ports["step"]})
        with torch.no_grad():
            want = module(torch.from_numpy(x), torch.tensor([timestep]), torch.from_numpy(hint)).numpy()
        np.testing.assert_allclose(got, want, atol=1e-5)


class Modulated(nn.Module):
    """Many tables of the timestep, each for both rows of a request: what 42 blocks of a transformer read."""

    def __init__(self, tables: int) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Linear(1, 3) for _ in range(tables))

    def forward(self, latents: Tensor, timestep: Tensor) -> Tensor:
        x = paired(latents[:, None], 1 - latents[:, None])[:, 0]
        for table in self.tables:
            x = x * repeated(table(timestep[:, None]).unsqueeze(1), 2)
        return x.unflatten(0, (-1, 2)).sum(1)


@pytest.mark.slow
def test_sizes_of_many_parts_stay_in_the_graph(tmp_path: Path) -> None:
    """Shapes depend on them: the checker refuses a graph whose split has its sizes in another file."""
    module, tables = Modulated(130).eval(), 130  # 130 sizes are more bytes than small weights
    inputs = {"latents": torch.randn(2, 4, 3), "timestep": torch.rand(2)}
    weights = {name: InMemory(value.detach()) for name, value in module.named_parameters()}
    with meta():
        empty = Modulated(tables)
    cut = fake_partition(empty, tuple(inputs.values()), {"latents": "step", "timestep": "schedule"}, outputs=("out",), batch=4)
    sizes = {"batch": Range(1, 1, 4), "steps": Range(1, 2, 50)}
    made: dict[str, Any] = {name: value.numpy() for name, value in inputs.items()}
    for kind in ("schedule", "step"):
        path = tmp_path / f"{kind}.onnx"
        stream_program(path, cut, kind, weights.get, sizes)
        program = cut.programs[kind]
        results = onnxruntime.InferenceSession(path).run(list(program.outputs), {name: made[name] for name in program.inputs})
        made |= dict(zip(program.outputs, results, strict=True))
    np.testing.assert_allclose(made["out"], module(**inputs).detach().numpy(), rtol=1e-4, atol=1e-5)
