"""The loop over rows: what a step is given and what is carried, against the same recurrence in float64; no graph and no
backend."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from numpy.typing import NDArray

from motionrt.runtime.bundle.manifest import Collect, Dim, GraphSpec, Loop, Port, Slice
from motionrt.runtime.errors import InputError
from motionrt.runtime.loop import Call, Row, dynamic_guidance, ramp, run_loop, windows

SHAPE = (2, 3, 4, 5)
BATCH = Dim("batch", 1, 1, 4)
COLUMNS = ("graph", "guidance", "time", "p0", "p1", "c0", "c1", "c2", "c3")
LOOP = Loop(
    graphs=("step",), columns=COLUMNS, schedules={"any": (5,)}, default=("any", 5), tables=("schedule",), noise="c3",
    feeds={"guidance": ("guidance",), "time": ("time",), "coefficients": COLUMNS[3:]},
    carry={"next": "latents", "x0": "previous"}, start={"latents": "noise", "previous": "zeros"}, gives={"latents": "result"},
)  # fmt: skip
Outputs = dict[str, Any]


def port(name: str, *dims: int, dtype: str = "float32", first: Dim = BATCH) -> Port:
    return Port(name, dtype, (first, *(Dim("", size, size, size) for size in dims)))


def spec(name: str, inputs: tuple[Port, ...], outputs: tuple[Port, ...] = ()) -> GraphSpec:
    return GraphSpec(name, f"{name}.onnx", "0" * 64, inputs, outputs)


FRAMES = [port(name, *SHAPE) for name in ("latents", "previous", "noise", "field")]
GRAPHS = {
    "step": spec("step", (*FRAMES, port("row", 3, 4, 5), port("coefficients", 6), port("guidance"))),
    "schedule": spec("schedule", (port("time", dtype="int64", first=Dim("T", 1, 4, 50)),), (port("row", 3, 4, 5),)),
}


def rows(steps: int, seed: int = 0, noisy: bool = True) -> NDArray[np.float32]:
    table = 0.5 * np.random.default_rng(seed).standard_normal((steps, len(COLUMNS)))
    table[:, 0], table[:, 1], table[:, 2] = 0, 2, 10 * np.arange(steps)
    table[:, -1] *= noisy
    return table.astype(np.float32)


def draw(step: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    return np.random.default_rng(100 + step).standard_normal(shape).astype(np.float32)


def table_of(time: NDArray[Any]) -> NDArray[np.float32]:
    return np.sin(time[:, None] + np.arange(60)).reshape(-1, 3, 4, 5).astype(np.float32)


def run(
    table: NDArray[np.float32], values: Mapping[str, Any], *, loop: Loop = LOOP, graphs: Mapping[str, GraphSpec] = GRAPHS,
    on_call: Callable[[Call], object] = lambda call: None,
) -> Outputs:  # fmt: skip
    """Drive the loop with a network whose output is `field * x + row`; its update is the solver's."""
    calls = run_loop("video", loop, graphs, table, values, draw)
    call = next(calls)
    while True:
        on_call(call)
        if call.graph == "schedule":
            outputs: Outputs = {"row": table_of(call.inputs["time"])}
        else:
            given = {name: np.asarray(value) for name, value in call.inputs.items()}
            assert {name: value.dtype for name, value in given.items()} == {p.name: p.dtype for p in graphs[call.graph].inputs}
            assert all(given[p.name].shape == p.shape for p in graphs[call.graph].inputs)
            p0, p1, c0, c1, c2, c3 = given["coefficients"][0]
            x = given["latents"]
            x0 = p0 * x + p1 * given["guidance"][0] * (given["field"] * x + given["row"][:, None])
            outputs = {"next": c0 * x + c1 * x0 + c2 * given["previous"] + c3 * given["noise"], "x0": x0}
        try:
            call = calls.send(outputs)
        except StopIteration as end:
            return dict(end.value)


def values(seed: int = 1) -> dict[str, Any]:
    return {"field": np.random.default_rng(seed).standard_normal((1, *SHAPE)).astype(np.float32), "other": None}


def test_loop_follows_the_recurrence() -> None:
    table, given = rows(5), values()
    x, previous = draw(0, (1, *SHAPE)).astype(np.float64), np.zeros((1, *SHAPE))
    for t, (p0, p1, c0, c1, c2, c3) in enumerate(table[:, 3:].astype(np.float64)):
        x0 = p0 * x + p1 * 2.0 * (given["field"] * x + table_of(np.array([10 * t]))[:, None])
        x, previous = c0 * x + c1 * x0 + c2 * previous + c3 * draw(t + 1, x.shape), x0
    got = run(table, given)
    assert list(got) == ["result"] and got["result"].dtype == np.float32
    np.testing.assert_allclose(got["result"], x, rtol=1e-4, atol=1e-5)


def test_a_step_is_fed_its_row_and_what_stays_is_said() -> None:
    seen: list[Call] = []
    run(rows(4), values(), on_call=seen.append)
    first, *steps = seen
    assert first.graph == "schedule" and first.key is not None
    assert first.inputs["time"].tolist() == [0, 10, 20, 30]
    assert [(call.loop, call.step, call.steps) for call in steps] == [("video", t, 4) for t in (1, 2, 3, 4)]
    for t, call in enumerate(steps):
        assert call.fixed == {"field"} and call.key is None
        assert isinstance(call.inputs["row"], Row) and call.inputs["row"].index == t
        assert call.inputs["row"].table is steps[0].inputs["row"].table  # placed once, for all steps
    assert not np.asarray(steps[0].inputs["previous"]).any()


def test_noise_is_drawn_only_where_the_row_wants_it() -> None:
    seen: list[Call] = []
    table = rows(3)
    table[1, -1] = 0
    run(table, values(), on_call=seen.append)
    noises = [call.inputs["noise"] for call in seen[1:]]
    np.testing.assert_array_equal(noises[0], draw(1, (1, *SHAPE)))
    np.testing.assert_array_equal(noises[2], draw(3, (1, *SHAPE)))
    assert not noises[1].any()


def test_a_column_says_which_graph_runs() -> None:
    table, seen = rows(4), list[str]()
    table[:, 0] = [0, 1, 1, 0]
    graphs = {**GRAPHS, "plain": replace(GRAPHS["step"], name="plain")}
    both = replace(LOOP, graphs=("step", "plain"))
    run(table, values(), loop=both, graphs=graphs, on_call=lambda call: seen.append(call.graph))
    assert seen == ["schedule", "step", "plain", "plain", "step"]


def test_tables_have_no_rows_for_steps_that_are_extrapolated() -> None:
    table, seen = rows(5), list[Call]()
    table[:, 0] = [0, 0, 1, 1, 0]
    skip = spec("skip", (*FRAMES[:3], port("coefficients", 6), port("field", *SHAPE), port("guidance"), port("before", *SHAPE)))
    loop = replace(LOOP, graphs=("step", "skip"), extrapolates="skip", history={"latents": ("before",)})
    graphs = {**GRAPHS, "skip": skip}
    calls = run_loop("video", loop, graphs, table, values(), draw)
    call, before = next(calls), list[Any]()
    while True:
        seen.append(call)
        made: Outputs = {"row": table_of(call.inputs["time"])} if call.graph == "schedule" else {
            "next": np.asarray(call.inputs["latents"]) + 1, "x0": np.asarray(call.inputs["latents"])
        }  # fmt: skip
        if call.graph == "skip":
            before.append(call.inputs["before"])
        try:
            call = calls.send(made)
        except StopIteration:
            break
    assert [call.graph for call in seen] == ["schedule", "step", "step", "skip", "skip", "step"]
    assert seen[0].inputs["time"].tolist() == [0, 10, 40]
    every = [np.asarray(call.inputs["row"])[0] for call in seen if call.graph == "step"]
    np.testing.assert_array_equal(np.stack(every), table_of(np.array([0, 10, 40])))
    assert before[0] is before[1] is seen[2].inputs["latents"]  # of the last step that ran the network


def test_a_loop_may_start_from_a_value_and_is_asked_for_whole_rows() -> None:
    table, start = rows(1), draw(7, (1, *SHAPE))
    seen: list[Call] = []
    loop = replace(LOOP, start={"latents": "before", "previous": "zeros"})
    run(table, {**values(), "before": start}, loop=loop, on_call=seen.append)
    assert seen[1].inputs["latents"] is start
    for wrong in (table[:, :-1], table[:0], table[0]):
        with pytest.raises(InputError, match=r"the rows of loop 'video' are .*; they must be \[T, 9\] with T of 1 or more"):
            run(wrong, values())


def fixed(size: int) -> Dim:
    return Dim("", size, size, size)


def test_parts_are_cut_out_run_and_put_together() -> None:
    """Two chunks along time, the second with what the first left; two tiles along a picture's rows, blended."""
    latents = np.arange(1 * 5 * 1 * 6 * 2, dtype=np.float32).reshape(1, 5, 1, 6, 2)
    columns = ("graph", "frame", "top", "before", "after")
    loop = Loop(
        graphs=("decode", "decode_next"), columns=columns, schedules={"parts": (4,)}, default=("parts", 4),
        carry={"next_cache.a": "cache.a"}, slices={"latents": Slice("latents", {1: "frame", 3: "top"})},
        collect={"video": Collect("video", (5, 1, 6, 2), {1: "frame", 3: "top"}, {3: ("before", "after")})},
    )  # fmt: skip
    long, short = (Port("latents", "float32", (BATCH, *map(fixed, (count, 1, 4, 2)))) for count in (3, 2))
    first = GraphSpec("decode", "a", "0" * 64, (long,), ())
    cache = Port("cache.a", "float32", (BATCH, fixed(1)))
    second = GraphSpec("decode_next", "b", "0" * 64, (short, cache), ())
    table = np.array([[0, 0, 0, 0, 2], [1, 3, 0, 0, 2], [0, 0, 2, 2, 0], [1, 3, 2, 2, 0]], np.float32)
    calls = run_loop("pictures", loop, {"decode": first, "decode_next": second}, table, {"latents": latents}, draw)
    call, left = next(calls), list[float]()
    while True:
        left.append(float(call.inputs["cache.a"][0, 0]) if "cache.a" in call.inputs else -1.0)
        part = call.inputs["latents"]
        try:
            call = calls.send({"video": part * 2, "next_cache.a": np.full((1, 1), call.step, np.float32)})
        except StopIteration as end:
            video = end.value["video"]
            break
    assert left == [-1, 1, -1, 3]
    np.testing.assert_allclose(video, latents * 2, rtol=1e-6)  # blending equal parts changes nothing


@pytest.mark.parametrize("size, overlap", [(4, 0), (4, 1), (6, 3)])
def test_ramps_of_neighbours_add_to_one(size: int, overlap: int) -> None:
    falling, rising = ramp(size, 0, overlap), ramp(size, overlap, 0)
    assert (falling[: size - overlap] == 1).all() and (rising[overlap:] == 1).all()
    np.testing.assert_allclose(falling[size - overlap :] + rising[:overlap], 1)


def test_dynamic_guidance_is_that_of_diffusers() -> None:
    """`use_dynamic_cfg` of diffusers' CogVideoX pipelines, at its own timesteps."""
    timesteps = [999, 959, 519, 39]
    want = [1 + 3.0 * ((1 - math.cos(math.pi * ((4 - t) / 4) ** 5.0)) / 2) for t in timesteps]
    assert dynamic_guidance(3.0, timesteps) == want


def test_tables_come_in_windows_of_the_steps_that_read_them() -> None:
    """Steps 1-3 and 5-6 of 6 read `far`, which is made of the rows of another table, and of a value that stays."""
    table, given, seen = rows(6), values(), list[Call]()
    table[:, 0] = [0, 0, 0, 1, 0, 0]
    steps, rest = Dim("T", 1, 2, 50), (port("field", *SHAPE), port("row", 3, 4, 5, first=Dim("T", 1, 2, 50)))
    graphs = {
        "schedule": GRAPHS["schedule"],
        "window": spec("window", rest, (port("far", 2, first=steps),)),
        "step": spec("step", (FRAMES[0], port("far", 2))), "plain": spec("plain", (FRAMES[0],)),
    }  # fmt: skip
    loop = replace(
        LOOP, graphs=("step", "plain"), tables=("schedule", "window"), windows={"window": 2}, carry={"next": "latents"},
        start={"latents": "noise"}, noise=None,
    )  # fmt: skip
    calls = run_loop("video", loop, graphs, table, given, draw)
    call, read = next(calls), list[Any]()
    while True:
        seen.append(call)
        outputs: Outputs = {"next": draw(0, (1, *SHAPE))}
        if call.graph == "schedule":
            outputs = {"row": table_of(call.inputs["time"])}
        elif call.graph == "window":
            assert call.key is None and call.fixed == {"field"} and call.inputs["field"] is given["field"]
            outputs = {"far": np.asarray(call.inputs["row"])[:, 0, 0, :2]}
            assert call.inputs["row"].shape == np.asarray(call.inputs["row"]).shape
        elif call.graph == "step":
            read.append(np.asarray(call.inputs["far"]))
        try:
            call = calls.send(outputs)
        except StopIteration:
            break
    order = ["schedule", "window", "step", "step", "window", "step", "plain", "window", "step", "step"]
    assert [call.graph for call in seen] == order
    assert [len(np.asarray(call.inputs["row"])) for call in seen if call.graph == "window"] == [2, 1, 2]
    every = table_of(np.array([0, 10, 20, 40, 50]))[:, 0, 0, :2]  # of the steps that read it
    np.testing.assert_array_equal(np.concatenate(read), every)
    spans = {"schedule": [range(6)], "window": [range(2), range(2, 3), range(4, 6)]}
    assert windows(loop, graphs, [call.graph for call in seen if call.loop]) == spans
    table[:, 0] = 1  # nothing reads them: they are not made
    assert next(run_loop("video", loop, graphs, table, {}, draw)).graph == "plain"


def test_a_table_is_known_by_the_numbers_that_it_is_made_of() -> None:
    """A request may change a column: its table must not be that of another."""
    table, keys = rows(3), list[Any]()
    for column, value in (("time", 0), ("guidance", 9), ("time", 7)):
        table[1, COLUMNS.index(column)] = value
        keys.append(next(run_loop("video", LOOP, GRAPHS, table, values(), draw)).key)
    assert keys[0] == keys[1] != keys[2] and hash(keys[0]) == hash(keys[1])
