"""A cheap look at a video while it is made: the map is found again, the demo's shows where things will be, no frame changes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from motionrt.runtime.bundle.bundle import Bundle
from motionrt.runtime.bundle.manifest import Preview
from motionrt.runtime.calibrate import decibels, requests_of, some_clips
from motionrt.runtime.errors import BundleError, InputError
from motionrt.runtime.job import to_preview
from motionrt.runtime.memory.memory import MotionMemory
from motionrt.runtime.pipeline import MotionPipeline, Request
from motionrt.runtime.preview import averaged, fit, keep, linear_map, previewed

DEMO = Path(__file__).parents[2] / "demo"
FITTED = 24  # requests that the demo's preview was fitted to, made of clips as here


def test_a_linear_map_is_found_again() -> None:
    random = np.random.default_rng(2)
    factors, bias = random.uniform(-30, 30, (5, 3)), np.array([120.0, 90.0, 60.0])
    latents = random.standard_normal((3, 4, 5, 6, 7)).astype(np.float32)
    colours = np.einsum("nfchw,cr->nfhwr", latents, factors) + bias
    found = linear_map("x0", list(zip(latents, colours, strict=True)))
    np.testing.assert_allclose(found.factors, factors, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(found.bias, bias, rtol=1e-4)
    strided = latents[:1].transpose(0, 1, 2, 4, 3)  # as wide as it was high
    got = to_preview(found, strided)
    want = np.clip(np.rint(colours[0]), 0, 255).transpose(0, 2, 1, 3)
    assert got.dtype == np.uint8 and got.shape == (4, 7, 6, 3) and np.abs(got - want).max() <= 1


def test_what_is_not_finite_is_a_picture_all_the_same() -> None:
    look = Preview("x0", ((1.0, 1.0, 1.0),), (0.0, 0.0, 0.0))
    values = np.array([np.nan, np.inf, -np.inf, 300, -5, 7], np.float32).reshape(1, 1, 1, 2, 3)
    np.testing.assert_array_equal(to_preview(look, values)[0, ..., 0], [[127, 255, 0], [255, 0, 7]])


@pytest.mark.parametrize(("height", "width"), [(4, 6), (3, 5), (1, 1)])
def test_areas_are_averaged_also_where_sizes_do_not_divide(height: int, width: int) -> None:
    frames = np.random.default_rng(3).integers(0, 256, (9, 12, 18, 3), np.uint8)
    got = averaged(frames, 3, height, width)
    fine = frames[[0, 4, 8]].repeat(height, 1).repeat(width, 2).astype(float)  # each pixel as height x width of them
    want = fine.reshape(3, height, 12, width, 18, 3).mean((2, 4))
    np.testing.assert_allclose(got, want)


# --- the demo's bundle ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipeline() -> Iterator[MotionPipeline]:
    with MotionPipeline.from_bundle(DEMO / "bundle", DEMO / "memory", threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def requests(pipeline: MotionPipeline) -> list[Request]:
    """Requests that the demo's preview was not fitted to."""
    assert isinstance(pipeline.memory, MotionMemory)
    made = lambda count: requests_of(pipeline.bundle, pipeline.memory, some_clips(pipeline.memory, count))  # type: ignore[arg-type]  # noqa: E731
    fitted = {source for request in made(FITTED) for source in request.search.exclude_source}
    return [request for request in made(41) if not fitted & {*request.search.exclude_source}][:24]


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DEMO / "bundle", tmp_path / "bundle", ignore=shutil.ignore_patterns("programs")))


def shown(pipeline: MotionPipeline, request: Request) -> tuple[list[NDArray[np.uint8]], NDArray[np.uint8]]:
    """The preview after every step, and the frames made as small."""
    job, seen = pipeline.start(request), list[NDArray[np.uint8]]()
    assert job.preview() is None
    for call in job:
        if call.loop and (one := job.preview()) is not None:
            seen.append(one)
    assert job.preview() is None and job.frames is not None
    count, height, width, _ = seen[-1].shape
    return seen, np.rint(averaged(job.frames, count, height, width)).astype(np.uint8)


def places(pictures: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Where something is in each of [F, h, w, 3]: the centre (y, x) [F, 2] of what differs from the picture's usual colour, in
    pixels, over 3 x 3 of them."""
    colours = pictures.astype(np.float64)
    far = np.linalg.norm(colours - np.median(colours, (1, 2), keepdims=True), axis=-1)
    height, width = far.shape[1:]
    wide = np.pad(far, ((0, 0), (1, 1), (1, 1)), mode="edge")
    weight = sum(wide[:, y : y + height, x : x + width] for y in range(3) for x in range(3)) ** 4
    weight /= weight.sum((1, 2), keepdims=True)
    rows, columns = np.mgrid[:height, :width]
    return np.stack([(weight * rows).sum((1, 2)), (weight * columns).sum((1, 2))], -1)


def test_the_demos_preview_shows_where_things_move(pipeline: MotionPipeline, requests: list[Request]) -> None:
    """Its latents hold colours in the first picture alone, and motion in those behind it: what is seen there is where
    something is. Nearer than in the still, which does not move, and than the middle, which needs no look."""
    last, half, still, middle = list[float](), list[float](), list[float](), list[float]()
    first = list[float]()
    for request in requests:
        seen, frames = shown(pipeline, request)
        assert len(seen) == 8 and all(one.dtype == np.uint8 and one.shape == (5, 8, 8, 3) for one in seen)
        first.append(decibels(seen[-1][:1], frames[:1]))
        there = places(frames)
        if np.linalg.norm(there - there[:1], axis=1).max() < 2:
            continue  # it hardly moves
        far = lambda some, there=there: float(np.linalg.norm(some - there, axis=1)[1:].mean())  # noqa: E731
        last.append(far(places(seen[-1])))
        half.append(far(places(seen[3])))
        still.append(far(there[:1]))
        middle.append(far(np.full((1, 2), 3.5)))
    assert len(last) >= 8 and np.mean(first) > 18
    for seen_at in (last, half):  # 1.0 of 8 pixels; the still 1.5, the middle 1.4
        assert np.mean(seen_at) < 0.8 * np.mean(still) and np.mean(seen_at) < 0.85 * np.mean(middle)


def test_no_frame_changes_and_one_seed_does_not_see_another(
    pipeline: MotionPipeline, requests: list[Request], copied: Path
) -> None:
    raw = json.loads((copied / "bundle.json").read_text())
    raw.pop("seal")
    del raw["loops"]["video"]["preview"]
    (copied / "bundle.json").write_text(json.dumps(raw))
    with MotionPipeline.from_bundle(copied, DEMO / "memory", threads=1) as plain:
        job = plain.start(requests[0])
        looked = [job.preview() for _ in job]
        assert looked and not any(one is not None for one in looked)
        want = plain.result(job).frames
    job = pipeline.start(requests[0])
    while not job.seeded:
        next(job)
    other = job.fork(9)
    for call in job:
        job.preview()
        assert other.preview() is None, call
    np.testing.assert_array_equal(pipeline.result(job).frames, want)
    closed = pipeline.start(requests[0])
    while closed.preview() is None:
        next(closed)
    closed.close()
    assert closed.preview() is None


def test_a_preview_is_fitted_judged_and_kept(pipeline: MotionPipeline, requests: list[Request], copied: Path) -> None:
    said = list[str]()
    found = fit(pipeline, requests[:3], say=said.append)
    assert said == [f"request {number} of 3" for number in (1, 2, 3)] and found.loop == "video"
    assert found.preview.value == "x0" and len(found.preview.factors) == 16 and min(found.decibels) > 10
    assert found.preview.quality["requests"] == 3 and found.preview.quality["db_lowest"] == round(min(found.decibels), 2)
    others = fit(pipeline, requests[:2])  # what the third is judged by
    job = pipeline.start(requests[2])
    pipeline.bundle, before = with_preview(pipeline.bundle, others.preview), pipeline.bundle
    try:
        seen, frames = shown(pipeline, requests[2])
    finally:
        pipeline.bundle = before
        job.close()
    assert decibels(seen[-1], frames) == pytest.approx(found.decibels[2], abs=1e-6)
    keep(copied, found)
    bundle, was = Bundle.open(copied), Bundle.open(DEMO / "bundle")
    assert bundle.manifest.loops["video"].preview == found.preview and bundle.manifest.seal != was.manifest.seal
    assert with_preview(bundle, None).manifest.loops == with_preview(was, None).manifest.loops
    assert [bundle.manifest.graphs, bundle.manifest.memory] == [was.manifest.graphs, was.manifest.memory]
    changed = [path.name for path in copied.rglob("*.*") if path.is_file() and path.read_bytes() != (
        DEMO / "bundle" / path.relative_to(copied)
    ).read_bytes()]  # fmt: skip
    assert {*changed} - {".stamps.json"} == {"bundle.json"}  # which says what was checked


def with_preview(bundle: Bundle, look: Preview | None) -> Bundle:
    loops = {name: msgspec.structs.replace(loop, preview=look) for name, loop in bundle.manifest.loops.items()}
    return replace(bundle, manifest=msgspec.structs.replace(bundle.manifest, loops=loops))


def test_what_cannot_be_fitted_is_refused(pipeline: MotionPipeline, requests: list[Request], guided_bundle: Path) -> None:
    for count, said in ((0, "0 requests are given"), (1, "1 request is given")):
        with pytest.raises(InputError, match=f"{said} to fit a preview to; give 2 or more"):
            fit(pipeline, requests[:count])
    with pytest.raises(InputError, match=r"no step of bundle 'guided' gives latents as \[1, F, C, h, w\]"):
        previewed(Bundle.open(guided_bundle))
    assert previewed(Bundle.open(DEMO / "motionclone" / "bundle")) == ("video", "next_latents")  # its steps give no x0


@pytest.mark.parametrize(("change", "said"), [
    ({"value": "x1"}, "previews `x1`"),
    ({"factors": [[0, 0, 0]] * 15}, "a step must give it as [1, F, 15, h, w]"),
    ({"bias": [0, 0]}, "preview"),
    ({"more": 1}, "more"),
], ids=["no output", "other channels", "two colours", "unknown key"])  # fmt: skip
def test_a_manifest_with_a_preview_of_nothing_is_refused(copied: Path, change: dict[str, object], said: str) -> None:
    raw = json.loads((copied / "bundle.json").read_text())
    raw.pop("seal")
    raw["loops"]["video"]["preview"] |= change
    (copied / "bundle.json").write_text(json.dumps(raw))
    with pytest.raises(BundleError) as refused:
        Bundle.open(copied)
    assert said in str(refused.value)


@pytest.mark.slow
def test_the_command_makes_the_demos_preview(copied: Path) -> None:
    def command(*arguments: object) -> str:
        line = [sys.executable, "-P", "-m", "motionrt", *map(str, arguments)]
        done = subprocess.run(line, capture_output=True, text=True, cwd=DEMO.parent, env={**os.environ, "COLUMNS": "120"})
        assert done.returncode == 0, done.stderr
        return done.stdout

    want = Bundle.open(copied).manifest.loops["video"].preview
    before = (copied / "bundle.json").read_bytes()
    asked = ("preview", "calibrate", copied, "-m", "demo/memory")
    out = command(*asked, "--clips", FITTED, "--dry-run")
    assert f"of {FITTED} requests" in out and "left as it is" in out and (copied / "bundle.json").read_bytes() == before
    out = command(*asked, "--clips", FITTED)
    got = Bundle.open(copied).manifest.loops["video"].preview
    assert f"kept in {copied}" in out and got is not None and want is not None
    np.testing.assert_allclose(got.factors, want.factors, rtol=1e-2, atol=0.05)  # of another machine, perhaps
    for name in ("db_mean", "db_lowest"):
        assert got.quality[name] == pytest.approx(want.quality[name], abs=0.1)
    file = copied.parent / "requests.json"
    still = str(DEMO / "inputs" / "red_star.png")
    file.write_text(json.dumps([{"image": still, "prompt": "a red star turns", "seed": seed} for seed in range(2)]))
    assert "of 2 requests" in command("preview", "calibrate", copied, "-m", "demo/memory", "--requests", file)
    assert "preview of `x0` in loop video: db_lowest" in command("inspect", copied)
