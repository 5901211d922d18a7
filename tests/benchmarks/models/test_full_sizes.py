"""benchmarks/models/full_sizes.py on a small model: what it reads off a partition is what the partition says of itself."""

from __future__ import annotations

import math
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from motionrt.benchmarks.models import full_sizes  # noqa: E402
from motionrt.benchmarks.models.released import COGVIDEOX_5B_I2V  # noqa: E402
from motionrt.export.compiler.weightless import fake_partition, weights_by_class  # noqa: E402
from motionrt.export.systems import cogvideox_step as cogvideox  # noqa: E402
from motionrt.export.systems.steps import OUTPUTS, cogvideox_step, step_args  # noqa: E402
from motionrt.runtime.bundle.footprint import plan_memory  # noqa: E402


@pytest.mark.slow
def test_programs_of_a_partition_have_its_state_rows_and_weights() -> None:
    config = COGVIDEOX_5B_I2V | {
        "num_attention_heads": 2, "num_layers": 1, "time_embed_dim": 8, "text_embed_dim": 16, "max_text_seq_length": 5,
        "sample_width": 8, "sample_height": 6, "sample_frames": 9,
    }  # fmt: skip
    latents, motion, bf16 = (2, 16, 6, 8), (3, 20), torch.bfloat16
    step = cogvideox_step(config, latents=latents, motion=motion, dtype=bf16)
    args = tuple(step_args(cogvideox.INPUTS, config, latents, motion).values())
    cut = fake_partition(step, args, cogvideox.INPUTS, outputs=OUTPUTS)
    sizes = [full_sizes._program(name, program) for name, program in cut.programs.items()]
    plan = plan_memory(sizes, full_sizes.full_roles(cut), steps=7, dtype="bfloat16")
    assert [graph.name for graph in plan.graphs] == ["schedule", "request", "step"]
    hoisted = {kind: sum(4 * math.prod(h.shape) for h in cut.hoisted if h.kind == kind) for kind in ("request", "schedule")}
    assert plan.request_state == hoisted["request"] and plan.schedule_rows == 7 * hoisted["schedule"]
    counted = weights_by_class(cut)
    for size in sizes:
        tables = size.weights["bfloat16"] - counted[size.name].bytes  # the unconditional tokens, and a single number
        assert tables == {"request": 2 * 3 * 20, "step": 2, "schedule": 0}[size.name], size.name
        assert size.activations > 0
    # the busiest place of the step is its feed-forward: both halves of the guidance, 29 tokens, 4 x 128 wide
    assert sizes[-1].activations >= 2 * (5 + 2 * 3 * 4) * 4 * 128 * 2


def test_a_traced_part_counts_the_weights_that_are_read() -> None:
    class Part(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = torch.nn.Linear(8, 4, bias=False), torch.nn.Linear(100, 100)

        def forward(self, x: Any) -> Any:
            return self.used(x)

    size = full_sizes._traced("part", Part, torch.bfloat16, [torch.empty(3, 8)], ("y",))
    assert size.weights == {"bfloat16": 64} and size.outputs == (("y", "float32", (3, 4)),)
    assert size.inputs == (("x", "float32", (3, 8)),) and size.activations == 3 * 4 * 4
