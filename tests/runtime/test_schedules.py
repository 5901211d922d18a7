"""Steps without the network: exact where v is a straight line, refused where they cannot be, kept in a bundle by name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray
from skimage.metrics import structural_similarity

from motionrt.runtime.bundle.bundle import Bundle
from motionrt.runtime.bundle.manifest import Dim, GraphSpec, Loop, Port
from motionrt.runtime.calibrate import (
    EQUAL,
    Found,
    calibrate,
    decibels,
    keep,
    remove,
    requests_in,
    requests_of,
    similarity,
    some_clips,
)
from motionrt.runtime.errors import BundleError, InputError
from motionrt.runtime.loop import run_loop
from motionrt.runtime.memory.memory import MotionMemory
from motionrt.runtime.pipeline import MotionPipeline, Request
from motionrt.runtime.schedules import extrapolated, pattern, patterns

REPOSITORY = Path(__file__).parents[2]
DEMO, MEMORY = REPOSITORY / "demo" / "bundle", REPOSITORY / "demo" / "memory"
COEFFICIENTS, KEPT = ("p0", "p1", "c0", "c1", "c2", "c3"), ("k0", "k1", "k2", "k3")
LOOP = Loop(
    graphs=("step", "skip"), columns=("graph", *COEFFICIENTS, *KEPT), schedules={"any": (9,)}, default=("any", 9),
    feeds={"coefficients": COEFFICIENTS, "kept": KEPT}, carry={"next": "x", "x0": "previous"},
    start={"x": "noise", "previous": "zeros"}, gives={"x": "result"}, extrapolates="skip",
    history={"x": ("last_x", "earlier_x"), "x0": ("last_x0", "earlier_x0")},
)  # fmt: skip


def port(name: str, *dims: int) -> Port:
    return Port(name, "float32", (Dim("batch", 1, 1, 4), *(Dim("", size, size, size) for size in dims)))


STEP = (port("x", 5), port("previous", 5), port("coefficients", 6))
HISTORY = [port(name, 5) for name in ("last_x0", "last_x", "earlier_x0", "earlier_x")]
GRAPHS = {
    "step": GraphSpec("step", "step.onnx", "0" * 64, STEP, (port("next", 5), port("x0", 5))),
    "skip": GraphSpec("skip", "skip.onnx", "0" * 64, (*STEP, port("kept", 4), *HISTORY), (port("next", 5), port("x0", 5))),
}


def rows(steps: int) -> NDArray[np.float32]:
    """A solver's rows: p0^2 + p1^2 = 1, as of v-prediction, and any update."""
    angle = np.linspace(1.4, 0.3, steps)
    update = np.random.default_rng(3).uniform(-0.5, 0.5, (steps, 4))
    table = np.column_stack([np.zeros(steps), np.cos(angle), -np.sin(angle), update, np.zeros((steps, 4))])
    return table.astype(np.float32)


def run(table: NDArray[np.float32], v: NDArray[np.float64]) -> tuple[NDArray[np.float32], list[str]]:
    """The loop over a network whose v of step t is `v[t]`; what it gives, and the graphs that ran."""
    draw = lambda step, shape: np.full(shape, 0.5, np.float32)  # noqa: E731
    calls, ran = run_loop("video", LOOP, GRAPHS, table, {}, draw), list[str]()
    call = next(calls)
    while True:
        ran.append(call.graph)
        given = {name: np.asarray(value)[0] for name, value in call.inputs.items()}
        p0, p1, c0, c1, c2, _ = given["coefficients"]
        output = v[call.step - 1]
        if call.graph == "skip":
            k = given["kept"]
            output = k[0] * given["last_x0"] + k[1] * given["last_x"] + k[2] * given["earlier_x0"] + k[3] * given["earlier_x"]
        x0 = (p0 * given["x"] + p1 * output).astype(np.float32)
        made = {"next": (c0 * given["x"] + c1 * x0 + c2 * given["previous"])[None].astype(np.float32), "x0": x0[None]}
        try:
            call = calls.send(made)
        except StopIteration as end:
            return end.value["result"], ran


@pytest.mark.parametrize("runs", list(patterns(9))[::7], ids=pattern)
def test_steps_that_are_left_out_are_exact_where_v_is_a_straight_line(runs: tuple[bool, ...]) -> None:
    slope, start = np.random.default_rng(1).standard_normal((2, 5))
    line = start + slope * np.arange(9)[:, None]
    want, _ = run(rows(9), line)
    wrong = np.where(np.array(runs)[:, None], line, np.nan)  # what is left out is not asked for
    got, ran = run(extrapolated(LOOP, rows(9), runs), wrong)
    assert ran == ["step" if one else "skip" for one in runs]
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4)


def test_a_curve_is_met_the_better_the_less_is_left_out() -> None:
    curve = np.sin(np.arange(9) / 4)[:, None] * np.ones(5)
    want, _ = run(rows(9), curve)
    far = [np.abs(run(extrapolated(LOOP, rows(9), runs), curve)[0] - want).max() for runs in (
        (True, True, False, False, False, False, False, False, False),
        (True, True, False, True, False, True, False, True, False),
        (True,) * 8 + (False,),
    )]  # fmt: skip
    assert far[0] > far[1] > far[2] > 0


def test_patterns_come_once_with_the_cheapest_first_and_two_steps_that_run() -> None:
    every = list(patterns(8))
    assert len(every) == len({*every}) == 2**6 - 1 and all(runs[:2] == (True, True) and not all(runs) for runs in every)
    for steps in (3, 10, 25, 50):
        some = list(patterns(steps))
        assert len(some) == len({*some}) and [sum(runs) for runs in some] == sorted(sum(runs) for runs in some)
        assert all(len(runs) == steps and runs[:2] == (True, True) and not all(runs) for runs in some)
    assert list(patterns(2)) == list(patterns(1)) == []


@pytest.mark.parametrize(
    "runs", [(True, False, True), (True, True), (False, True, True), ()], ids=["one", "short", "first left out", "none"]
)
def test_too_few_steps_that_run_are_refused(runs: tuple[bool, ...]) -> None:
    with pytest.raises(InputError, match="the first 2 run the network"):
        extrapolated(LOOP, rows(3), runs)


def test_rows_that_leave_out_steps_already_and_loops_that_cannot_are_refused() -> None:
    once = extrapolated(LOOP, rows(4), (True, True, False, True))
    with pytest.raises(InputError, match="leave out steps already"):
        extrapolated(LOOP, once, (True, True, False, True))
    with pytest.raises(InputError, match="export the bundle again"):
        extrapolated(msgspec.structs.replace(LOOP, extrapolates=None), rows(3), (True, True, False))


def test_decibels_are_those_of_the_formula() -> None:
    one = np.full((2, 3, 3, 3), 100, np.uint8)
    other = one.copy()
    other[0] = 110
    assert decibels(other, one) == pytest.approx(10 * np.log10(255**2 / 50))
    assert decibels(one, one) == pytest.approx(EQUAL, abs=0.01)


# --- the demo's bundle ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipeline() -> Iterator[MotionPipeline]:
    with MotionPipeline.from_bundle(DEMO, MEMORY, threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def requests(pipeline: MotionPipeline) -> list[Request]:
    assert isinstance(pipeline.memory, MotionMemory)
    return requests_of(pipeline.bundle, pipeline.memory, some_clips(pipeline.memory, 3))


@pytest.fixture(scope="module")
def found(pipeline: MotionPipeline, requests: list[Request]) -> Found:
    return calibrate(pipeline, requests, steps=25, least=40)


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DEMO, tmp_path / "bundle", ignore=shutil.ignore_patterns("programs")))


def test_requests_have_a_clips_own_still_and_words_and_the_motion_of_others(
    pipeline: MotionPipeline, requests: list[Request]
) -> None:
    assert isinstance(pipeline.memory, MotionMemory) and len(requests) == 3
    assert len({str(request.inputs["prompt"]) for request in requests}) == 3
    for request in requests:
        assert request.inputs["image"].shape == (64, 64, 3) and request.search.exclude_source is not None
        result = pipeline.result(pipeline.start(request))
        assert result.references and not {one.source for one in result.references} & {*request.search.exclude_source}


def test_the_budget_holds_and_a_dearer_one_costs_more(pipeline: MotionPipeline, requests: list[Request], found: Found) -> None:
    dearer = calibrate(pipeline, requests, steps=25, least=50)
    assert min(found.decibels) >= 40 and min(dearer.decibels) >= 50 and sum(found.runs) < sum(dearer.runs) < 25
    assert found.quality["network_runs"] == sum(found.runs) <= 9 and found.quality["pattern"] == pattern(found.runs)
    assert "calibrated" not in pipeline.bundle.manifest.loops["video"].schedules  # what was tried is gone
    again = calibrate(pipeline, requests, steps=25, least=40)
    assert again.runs == found.runs and again.decibels == found.decibels
    alike = min(found.similarities)
    assert 0.5 < alike < min(dearer.similarities) < 1 and found.quality["ssim_lowest"] == round(alike, 4)
    strict = calibrate(pipeline, requests, steps=25, least=40, least_ssim=(alike + 1) / 2)
    assert min(strict.similarities) >= (alike + 1) / 2 and sum(found.runs) < sum(strict.runs)
    with pytest.raises(InputError, match="Ask for less"):
        calibrate(pipeline, requests[:1], steps=3, least=61)


@pytest.mark.parametrize("size", [(1, 9, 12, 3), (2, 5, 6, 3), (3, 16, 16, 3)])
def test_similarity_is_that_of_the_paper(size: tuple[int, ...]) -> None:
    random = np.random.default_rng(1)
    exact = random.integers(0, 256, size, np.uint8)
    frames = np.clip(exact + random.normal(0, 20, size), 0, 255).astype(np.uint8)
    window = min(7, size[1] - 1 + size[1] % 2)
    theirs = [structural_similarity(*pair, channel_axis=-1, win_size=window) for pair in zip(frames, exact, strict=True)]
    assert similarity(frames, exact) == pytest.approx(np.mean(theirs), abs=1e-9) and similarity(exact, exact) == 1


def test_a_kept_schedule_is_a_solver_with_its_figures_and_the_others_are_what_they_were(
    copied: Path, pipeline: MotionPipeline, requests: list[Request], found: Found
) -> None:
    keep(copied, found, "quick")
    assert len(list(copied.glob("rows*"))) == 1
    with MotionPipeline.from_bundle(copied, MEMORY, threads=1) as changed:
        exact, quick = (changed.result(changed.start(asked)) for asked in (
            Request(requests[0].inputs, seed=requests[0].seed, search=requests[0].search, solver=solver, steps=25)
            for solver in ("ddim", "quick")
        ))  # fmt: skip
    assert exact.approximations == () and quick.approximations == ("quick",)
    assert decibels(quick.frames, exact.frames) == pytest.approx(found.decibels[0], abs=1e-6)
    before = pipeline.result(pipeline.start(Request(requests[0].inputs, seed=0, search=requests[0].search, steps=25)))
    np.testing.assert_array_equal(exact.frames, before.frames)
    (entry,) = Bundle.open(copied).manifest.approximations
    assert (entry.name, entry.schedules, entry.quality) == ("quick", {"video": "quick"}, found.quality)
    with pytest.raises(InputError, match="none of ddim, dpm, quick"):
        keep(copied, found, "quick")
    with pytest.raises(InputError, match="letters"):
        keep(copied, found, "../quick")
    remove(copied, "quick")
    bundle = Bundle.open(copied)
    assert bundle.manifest == pipeline.bundle.manifest.__class__(**{
        **{name: getattr(pipeline.bundle.manifest, name) for name in pipeline.bundle.manifest.__struct_fields__},
        "tables": bundle.manifest.tables, "seal": bundle.manifest.seal,
    })  # fmt: skip
    assert bundle.manifest.tables.sha256 == pipeline.bundle.manifest.tables.sha256
    with pytest.raises(InputError, match="calibrated schedules of this bundle: none"):
        remove(copied, "quick")


def test_a_bundle_that_cannot_be_written_stays_what_it_was(copied: Path, found: Found) -> None:
    before = (copied / "bundle.json").read_bytes()
    (copied / "rows.new").mkdir()  # what the new rows would be written to
    with pytest.raises(BundleError, match="cannot write"):
        keep(copied, found, "quick")
    assert (copied / "bundle.json").read_bytes() == before
    Bundle.open(copied)


def test_a_manifest_whose_approximation_names_nothing_is_refused(copied: Path) -> None:
    raw = json.loads((copied / "bundle.json").read_text())
    raw.pop("seal")
    for entry, said in (
        ({"name": "x", "graphs": ["nothing"], "quality": {}}, "graph 'nothing'"),
        ({"name": "x", "graphs": [], "quality": {}, "schedules": {"video": "nothing"}}, "schedule 'nothing'"),
    ):
        (copied / "bundle.json").write_text(json.dumps({**raw, "approximations": [entry]}))
        with pytest.raises(BundleError, match=said):
            Bundle.open(copied)


def test_requests_of_a_file_are_read_and_what_is_none_is_refused(pipeline: MotionPipeline, tmp_path: Path) -> None:
    file = tmp_path / "requests.json"
    file.write_text(json.dumps([{"image": "star.png", "prompt": "a star turns", "seed": 4}]))
    (request,) = requests_in(pipeline, file)
    assert request.seed == 4 and request.inputs == {"image": "star.png", "prompt": "a star turns"}
    for text in ("{}", "[1]", "nothing"):
        file.write_text(text)
        with pytest.raises(InputError, match="Give a list of objects"):
            requests_in(pipeline, file)
    with pytest.raises(InputError, match="no requests"):
        calibrate(pipeline, [])
    for least in (0, float("nan")):
        with pytest.raises(InputError, match="0 to 61.14"):
            calibrate(pipeline, [request], least=least)
    with pytest.raises(InputError, match="allowed are 0 .any. to 1"):
        calibrate(pipeline, [request], least_ssim=1.5)


@pytest.mark.slow
def test_commands_of_the_docs_on_the_demo(copied: Path) -> None:
    def command(*arguments: object) -> str:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "motionrt", *map(str, arguments)], capture_output=True, text=True, cwd=REPOSITORY,
            env={**os.environ, "COLUMNS": "120"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    out = command("schedule", "calibrate", copied, "-m", MEMORY, "--steps", 25, "--at-least", 40)
    assert "kept in" in out and "use it with --solver quick" in out
    still, film = DEMO.parent / "inputs" / "red_star.png", copied.parent / "a.mp4"
    asked = ("-i", still, "-p", "a red star moves in a circle", "--solver", "quick")
    out = command("generate", "-b", copied, "-m", MEMORY, *asked, "-o", film)
    assert "not exact: quick" in out and film.exists()
    assert "approximation quick" in command("inspect", copied)
    assert "quick is gone" in command("schedule", "remove", copied, "quick")


def test_every_pattern_of_a_few_steps_is_among_those_tried() -> None:
    want = {(True, True, *rest) for rest in product((False, True), repeat=3)} - {(True,) * 5}
    assert {*patterns(5)} == want
