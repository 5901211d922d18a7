"""The memory plan of a bundle: arithmetic on declared sizes, checked by hand; what `doctor` says of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from motionrt.runtime.bundle.bundle import Bundle
from motionrt.runtime.bundle.footprint import GIB, RESERVE, GraphSize, Roles, graph_sizes, plan_memory, roles, stored_bytes
from motionrt.runtime.errors import BundleError

Run = Callable[..., tuple[int, str, str]]
STATE, ROW, LATENTS = ("folded", "bfloat16", (2, 64, 10)), ("table", "bfloat16", (1, 1, 8)), ("latents", "float32", (1, 5))
TEXT = GraphSize("text", {"bfloat16": 12 * GIB}, (("ids", "int64", (1, 6)),), (("text", "float32", (1, 6, 4)),), GIB)
REQUEST = GraphSize("request", {"bfloat16": GIB}, (("text", "float32", (1, 6, 4)),), (STATE,), 100)
SCHEDULE = GraphSize("schedule", {"bfloat16": GIB}, (("timestep", "int64", (25,)),), (("table", "bfloat16", (25, 1, 8)),), 100)
STEP = GraphSize("step", {"bfloat16": 9 * GIB, "other": 16}, (LATENTS, STATE, ROW), (("next", "float32", (1, 5)),), 2 * GIB)
DECODE = GraphSize("decode", {"float32": GIB}, (LATENTS,), (("video", "float32", (1, 100)),), 3 * GIB)
ROLES = Roles(
    {"text": "before", "request": "before", "schedule": "before", "step": "loop", "decode": "after"}, frozenset({"folded"}),
    frozenset({"table"}),
)  # fmt: skip
MOTION = GraphSize("motion", {"float32": 50 * GIB}, (), (), 0)
ALL = tuple(replace(graph, typed="bfloat16") for graph in (TEXT, REQUEST, SCHEDULE, STEP, DECODE, MOTION))


def test_plan_adds_up_weights_state_rows_and_the_busiest_activations() -> None:
    plan = plan_memory(ALL, ROLES, steps=25, dtype="bfloat16")
    assert plan.request_state == 2 * 64 * 10 * 2 and plan.schedule_rows == 25 * 8 * 2
    between = plan.request_state + plan.schedule_rows
    by_name = {graph.name: graph for graph in plan.graphs}
    assert list(by_name) == ["text", "request", "schedule", "step", "decode"]  # reference clips are indexed, not requested
    assert by_name["step"].ports == 4 * 10 and by_name["request"].ports == 96 and by_name["decode"].ports == 4 * 105
    assert plan.loop == 9 * GIB + 16 + 2 * GIB + 40 + between
    assert plan.largest == 13 * GIB + 8 * 6 + 96
    assert plan.resident == (12 + 1 + 1 + 9) * GIB + GIB // 2 + 16 + between + 3 * GIB + 420
    assert [fit.verdict for fit in plan.fits] == [
        "does not fit (step)", "fits with request modules dropped before the loop, one graph at a time",
        "fits with request modules dropped before the loop, one graph at a time", "fits, all graphs resident",
    ]  # fmt: skip
    assert plan.fits[0].spare == 8 * GIB - RESERVE - plan.loop and "GiB short" in str(plan.fits[0])
    assert plan.fits[3].spare == 80 * GIB - RESERVE - plan.resident and str(plan.fits[3]).endswith("GiB to spare")
    assert plan.unrecorded == ()


def test_plan_in_another_dtype_converts_weights_and_activations() -> None:
    plan = plan_memory(ALL, ROLES, steps=25, dtype="float32")
    half = plan_memory(ALL, ROLES, steps=25, dtype="float16")
    step = next(graph for graph in plan.graphs if graph.name == "step")
    assert step.weights == 18 * GIB + 16 and step.activations == 4 * GIB and step.ports == 40
    assert plan.request_state == half.request_state == 2 * 64 * 10 * 2  # as its ports are declared
    decode = next(graph for graph in half.graphs if graph.name == "decode")
    assert decode.weights == GIB // 2 and decode.activations == 3 * GIB
    with pytest.raises(ValueError, match="dtype is 'int8'; allowed: float32, float16, bfloat16"):
        plan_memory(ALL, ROLES, steps=25, dtype="int8")
    with pytest.raises(ValueError, match="no graph is run in a loop; got text"):
        plan_memory([TEXT], ROLES, steps=25)


def test_a_request_module_that_fits_nowhere_goes_to_the_host_and_what_is_not_recorded_is_said() -> None:
    plan = plan_memory((replace(ALL[0], weights={"bfloat16": 30 * GIB}), ALL[3], ALL[4]), ROLES, steps=2, dtype="bfloat16")
    assert plan.fits[1].verdict == "fits with text on the host and request modules dropped"
    assert plan.fits[1].spare == 16 * GIB - RESERVE - plan.loop
    assert plan_memory([replace(STEP, activations=None)], ROLES, steps=2).unrecorded == ("step",)


def test_sizes_of_a_bundle_are_those_of_its_files(fake_bundle: Path, edit_bundle: Any, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    sizes = {size.name: size for size in graph_sizes(Bundle.open(fake_bundle))}
    assert sizes["step"].weights == {"float32": (fake_bundle / "graphs" / "step.onnx").stat().st_size}
    assert sizes["step"].activations is None
    path = edit_bundle(lambda m: m["graphs"]["step"].update(activations=1234))
    step = next(size for size in graph_sizes(Bundle.open(path)) if size.name == "step")
    plan = plan_memory([step], roles(Bundle.open(path).manifest), steps=1)
    assert step.activations == plan.graphs[0].activations == 1234
    save_file({"a": np.zeros((3, 5), np.float16), "b": np.zeros(7, np.float32), "c": np.zeros(2, np.int64)}, tmp_path / "w")
    assert stored_bytes(tmp_path / "w") == {"float16": 30, "float32": 28, "other": 16}
    (tmp_path / "w").write_bytes(b"\1")
    with pytest.raises(BundleError, match="the weights .* cannot be read"):
        stored_bytes(tmp_path / "w")


def test_roles_are_read_off_the_plan(fake_bundle: Path) -> None:
    found = roles(Bundle.open(fake_bundle).manifest)
    before = ("text_query", "text", "appearance", "cama", "encode", "request", "schedule")  # not `motion`: that indexes clips
    assert found.when == dict.fromkeys(before, "before") | {"step": "loop", "decode": "after"}
    assert found.state == {"context", "negative_context", "image_latents"} and found.rows == {"modulation"}


def test_doctor_prints_and_returns_the_plan(run: Run, fake_bundle: Path) -> None:
    status, out, _ = run("doctor", fake_bundle, "--json")
    memory = json.loads(out)["bundle"]["memory"]
    assert status == 0 and list(memory) == ["float32", "float16", "bfloat16"]
    assert memory["float32"]["resident"] > memory["float16"]["resident"] == memory["bfloat16"]["resident"]
    stored = memory["float32"]
    assert stored["unrecorded"] and stored["lines"][0].startswith("8 GB: fits, all graphs resident, 7.")
    status, out, _ = run("doctor", fake_bundle)
    text = " ".join(out.split())
    assert status == 0 and "memory plan of one request, float32" in text and "8 GB: fits, all graphs resident, 7." in text
    assert "are not recorded" in text


def test_state_of_folded_cogvideox_at_full_size_is_316_mb_for_a_token_set() -> None:
    tokens, width, layers = 25, 3072, 42
    folded = [(f"folded_{i}", "bfloat16", (2, width, 48 * tokens)) for i in range(layers)]
    values = [(f"values_{i}", "bfloat16", (2, 48, tokens, 64)) for i in range(layers)]
    made = (*folded, *values)
    request = GraphSize("request", {"bfloat16": 1_346_377_728}, (("motion", "float32", (1, 25, 1024)),), made, 0)
    step = GraphSize("step", {"bfloat16": 9_517_268_096}, (LATENTS, *made), (LATENTS,), 0)
    state = frozenset(name for name, *_ in made)
    own = Roles({"request": "before", "step": "loop"}, state, frozenset())
    plan = plan_memory([request, step], own, steps=25, dtype="bfloat16")
    assert plan.request_state == 2 * 316_108_800  # specs/motionrag.md B2: 7.53 MB per layer and token set, 316 MB in all
