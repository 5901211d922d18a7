"""The fake bundle (fake_bundle.py) with guidance in parts: a call of `step_branch` for each branch, and `step` after both."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

_BRANCH = """
    context5 = Unsqueeze(context, axes134)
    modulation5 = Reshape(modulation, shape_modulation)
    scaled_latents = Mul(latents, modulation5)
    v0 = Add(scaled_latents, context5)
    output = Add(v0, image_latents)
"""
_GUIDED = """
    guidance5 = Unsqueeze(guidance, axes1234)
    difference = Sub(conditioned, without)
    weighted = Mul(guidance5, difference)
    v = Add(without, weighted)
"""
_ALONE = """
    v = Identity(conditioned)
"""


def write_bundle(fake: ModuleType, path: Path) -> Path:
    """Write it into the directory `path` and return it."""
    manifest = fake.system()
    manifest["name"] = "split"
    loop: dict[str, Any] = manifest["loops"]["video"]
    del loop["plain"]
    conditioned = {"graph": "step_branch", "writes": {"output": "conditioned"}}
    without = {"graph": "step_branch", "reads": {"context": "negative_context"}, "writes": {"output": "without"}}
    loop |= {
        "graphs": ["step", "step_conditional"],
        "ahead": {"step": [without, conditioned], "step_conditional": [conditioned]},
        "where": {"step": {"runs": "step_conditional", "column": "guidance", "value": 1}},
    }
    solver = fake._STEP[fake._STEP.index("spread =") :]
    values = fake.constants() | {"axes1234": fake.np.array([1, 2, 3, 4])}
    latents = fake._LOOP[0]
    one = [*fake._LOOP[:4], {**latents, "name": "conditioned"}]
    ports = {
        "step_branch": (
            [latents, fake.port("modulation", [fake.B, 4]), fake._CONTEXT[0], fake._INPUTS[3]],
            [{**latents, "name": "output"}], _BRANCH,
        ),
        "step": ([*one, fake._LOOP[4], {**latents, "name": "without"}], fake._NEXT, _GUIDED + solver),
        "step_conditional": (one, fake._NEXT, _ALONE + solver),
    }  # fmt: skip
    others = [name for name in fake.GRAPHS if name not in ("step", "step_plain")]
    graphs = {name: (*fake.GRAPHS[name][:2], fake.onnx_graph(name)) for name in others}
    for name, (inputs, outputs, body) in ports.items():
        graphs[name] = inputs, outputs, fake.parsed(name, inputs, outputs, body, values)
    written: Path = fake.write_files(path, manifest, graphs, fake.tables())
    return written
