"""A system of words and clips, guided by a reference in its first steps: tests/helpers/guided.py. What it needs of the
runtime: scores as a value, plain steps where there is no reference, tables in windows, references that are files."""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from motionrt.runtime.bundle.bundle import Bundle
from motionrt.runtime.bundle.footprint import graph_sizes, plan_memory, roles
from motionrt.runtime.bundle.manifest import parse_manifest
from motionrt.runtime.errors import BundleError, InputError, MediaError, MemoryStoreError
from motionrt.runtime.job import Job, noise_stream
from motionrt.runtime.media.video import read_clip, write_video
from motionrt.runtime.memory.memory import Clip, MotionMemory
from motionrt.runtime.noise import noise
from motionrt.runtime.pipeline import MotionPipeline
from motionrt.runtime.scheduler import Scheduler

PROMPT = "a red ball moves right"
CLIPS = np.random.default_rng(0).standard_normal((2, 3, 3)).astype(np.float16)


class Guided:
    """A pipeline of the bundle and a memory of two clips, and what it ran: graphs, and the sizes of their first inputs."""

    def __init__(self, bundle: Path, folder: Path, guided: ModuleType, fake: ModuleType, watching: ModuleType) -> None:
        self.ran: list[tuple[str, int]] = []
        self.guided, self.fake, self.folder = guided, fake, folder
        self.on_run: Callable[[str, Mapping[str, Any], dict[str, Any]], object] = lambda name, inputs, outputs: None
        self.bundle, self.backend = Bundle.open(bundle), watching.Watching(self._run)
        spec = self.bundle.manifest.memory
        assert spec is not None
        self.memory = MotionMemory.create(folder / "memory", embedding=8, record=spec.record, fingerprint=spec.fingerprint)
        self.pipeline = MotionPipeline(self.bundle, self.backend, self.memory)
        for place, caption in enumerate((PROMPT, "a blue ball moves left")):
            vector, record = self.pipeline.embed(caption), {"latents": CLIPS[place]}
            self.memory.add([Clip(caption, "s", place, 1, 8, "0", vector, record)])
        self.ran.clear()

    def _run(self, name: str, inputs: Mapping[str, Any], run: Callable[..., dict[str, Any]]) -> dict[str, Any]:
        self.ran.append((name, len(next(iter(inputs.values())))))
        outputs = run(inputs)
        self.on_run(name, inputs, outputs)
        return outputs

    def start(self, **options: Any) -> Job:
        return self.pipeline.start(self.pipeline.request(PROMPT, **options))

    def wanted(self, seed: int, *arguments: Any, **options: Any) -> NDArray[np.float64]:
        stream, words = noise_stream(self.bundle.manifest, "start"), self.bundle.tokenize("text", PROMPT, 6)["input_ids"][0]
        frames: NDArray[np.float64] = self.guided.frames(
            self.fake, words.tolist(), noise(seed, stream, 0, (3, 3)), *arguments, **options
        )
        return frames


@pytest.fixture
def toy(
    guided_bundle: Path, tmp_path: Path, guided: ModuleType, fake: ModuleType, watching: ModuleType
) -> Iterator[Guided]:
    made = Guided(guided_bundle, tmp_path, guided, fake, watching)
    with made.memory:
        yield made


def close(frames: NDArray[np.uint8] | None, wanted: NDArray[np.float64]) -> bool:
    """Whether every pixel of the frames is what was wanted of its frame and colour, rounded."""
    assert frames is not None
    return bool(np.abs(frames - wanted[:, None, None, :]).max() <= 1)


def test_scores_weigh_the_references(toy: Guided) -> None:
    job = toy.start(seed=3)
    expected = job.calls()
    result = toy.pipeline.result(job)
    first, second = result.references
    assert first.score == pytest.approx(1) and second.score < 0.9
    assert close(result.frames, toy.wanted(3, CLIPS, [first.score, second.score]))
    assert not close(result.frames, toy.wanted(3, CLIPS, [1, 1]))
    assert expected == {name: sum(one == name for one, _ in toy.ran) for name, _ in toy.ran}
    by_id = toy.pipeline(PROMPT, seed=3, references=[1, 2])  # of no search, so that none has a score
    assert close(by_id.frames, toy.wanted(3, CLIPS, [1, 1]))
    scaled = toy.pipeline(PROMPT, seed=3, references=[1, 2], motion_scale=[0.5, 0, 1, 0, 0])
    assert close(scaled.frames, toy.wanted(3, CLIPS, [1, 1], scale=[0.5, 0, 1, 0, 0]))


def test_tables_are_made_in_windows_of_steps_that_read_them(toy: Guided) -> None:
    """Five steps, of which three are guided: two rows, then one, and none for the steps that read no table."""
    made: list[weakref.ref[Any]] = []

    def watch(name: str, inputs: Mapping[str, Any], outputs: dict[str, Any]) -> None:
        if name == "timeline":
            assert not [table for table in made if table() is not None]  # the window before is let go of by now
            made.append(weakref.ref(outputs["push"]))

    toy.on_run = watch
    job = toy.start(seed=1)
    for _ in job:  # which holds the call before
        pass
    order = [(name, size) for name, size in toy.ran if name.startswith(("timeline", "step"))]
    guided, plain = ("step_guided", 1), ("step_plain", 1)
    assert order == [("timeline", 2), guided, guided, ("timeline", 1), guided, plain, plain]


def test_a_picture_and_a_plan_of_memory_say_what_runs_when(
    guided_bundle: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    status, said, _ = run("inspect", guided_bundle)
    assert status == 0 and re.search(r"2 rows at a time ──▶ +timeline +──▶ push", said)
    assert "MEMORY" in said and "reference_latents, reference_scores" in said
    assert "without a clip: motion_scale = 0.0, step_plain in place of step_guided" in said
    bundle = Bundle.open(guided_bundle)
    rows = [plan_memory(graph_sizes(bundle), roles(bundle.manifest), steps=steps).schedule_rows for steps in (1, 2, 5)]
    assert rows == [36, 72, 72]  # of 3 x 3 numbers; no more than two are there at once


def test_without_a_reference_the_plain_graphs_run(toy: Guided) -> None:
    wanted = toy.wanted(2, None)
    for options in ({"motion_scale": 0}, {"motion_scale": [0] * 5}, {"references": 1, "minimum_score": 1, "where": {"a": "b"}}):
        toy.ran.clear()
        job = toy.start(seed=2, **options)
        expected = job.calls()
        result = toy.pipeline.result(job)
        assert close(result.frames, wanted) and not result.references
        ran = [name for name, _ in toy.ran if name != "text_query"]
        assert ran == ["text", "start", *["step_plain"] * 5, "decode"]
        if "motion_scale" in options:
            assert result.fallback is None and expected == {name: ran.count(name) for name in ran}
        else:
            assert result.fallback is not None
    alone = MotionPipeline(toy.bundle, toy.backend)
    assert close(alone(PROMPT, seed=2, motion_scale=0).frames, wanted)
    with pytest.raises(InputError, match="no motion memory.* For none at all use motion_scale=0"):
        alone(PROMPT)


def test_seeds_go_on_in_lock_step_behind_a_graph_that_draws(toy: Guided) -> None:
    """What starts the loop is a value of a graph: seeds part there, and share its batches."""
    for options in ({}, {"references": 1, "minimum_score": 1, "where": {"a": "b"}}):
        alone = {seed: toy.pipeline(PROMPT, seed=seed, **options).frames for seed in (5, 6)}
        assert not np.array_equal(alone[5], alone[6])
        toy.ran.clear()
        first = toy.start(seed=5, **options)
        while not first.seeded:
            next(first)
        assert first.call is not None and first.call.graph == "start" and ("text", 1) in toy.ran
        jobs, scheduler = [first, first.fork(6)], Scheduler(toy.pipeline, batch=2, inexact=True)
        for job in jobs:
            scheduler.add(job)
        scheduler.run()
        for seed, job in zip((5, 6), jobs, strict=True):
            np.testing.assert_allclose(toy.pipeline.result(job).frames.astype(int), alone[seed].astype(int), atol=1)
        assert toy.ran.count(("text", 1)) == 1 and {("start", 2), ("step_plain", 2), ("decode", 2)} <= set(toy.ran)
        assert (("extract", 2) in toy.ran and ("step_guided", 2) in toy.ran) == (not options)


def moving(path: Path, frames: int, change: int, size: tuple[int, int] = (32, 32)) -> Path:
    """A video that gets brighter by `change` levels a frame, at 8 a second."""
    course = (60 + change * np.arange(frames)).astype(np.uint8)
    write_video(path, np.ascontiguousarray(np.broadcast_to(course[:, None, None, None], (frames, *size, 3))), 8)
    return path


def test_a_reference_may_be_a_file(
    toy: Guided, run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [moving(toy.folder / "up.mp4", 9, 12, (48, 20)), moving(toy.folder / "down.mp4", 3, -10)]
    latents = np.stack([read_clip(file, 3, 16, 16, 8) for file in files]).mean(axis=(3, 4))
    alone = MotionPipeline(toy.bundle, toy.backend)
    job = alone.start(alone.request(PROMPT, seed=4, references=[files[0], str(files[1])]))
    expected = job.calls()
    assert not toy.ran  # nothing was run to check it
    result = alone.result(job)
    assert close(result.frames, toy.wanted(4, latents.astype(np.float16), [1, 1]))
    assert expected == {name: sum(one == name for one, _ in toy.ran) for name, _ in toy.ran} and expected["clip"] == 2
    assert [found.source for found in result.references] == [str(file) for file in files]
    beside = alone(PROMPT, seed=4, references=[*result.references])  # their records are there now
    np.testing.assert_array_equal(beside.frames, result.frames)

    monkeypatch.chdir(toy.folder)
    out, command = toy.folder / "out.webp", ["generate", "-b", toy.bundle.path, "-p", PROMPT, "--seed", 4, "-o"]
    status, said, wrong = run(*command, out, "--reference", "up.mp4", "--reference", "down.mp4")
    assert (status, wrong) == (0, "") and "up.mp4" in said and "nan" not in said
    written = read_clip(out, 3, 16, 16, 8).mean(axis=(2, 3)) * 127.5 + 127.5
    assert np.abs(written - result.frames.mean(axis=(1, 2))).max() < 8  # a webp is not exact
    status, _, wrong = run(*command, out, "--reference", "up.mp4", "-k", 1)
    assert status == 2 and "leave one of them out" in wrong


def test_what_is_wrong_with_a_clip_is_one_sentence(toy: Guided, run: Callable[..., tuple[int, str, str]]) -> None:
    """Of a reference before any graph runs, and of a clip that a memory is to be given, which goes on with the others."""
    text = toy.folder / "text.mp4"
    text.write_text("no video")
    bad = {
        moving(toy.folder / "still.mp4", 3, 0): "still.mp4 shows one picture from 0 to 0.375 s, which is no motion",
        moving(toy.folder / "slow.mp4", 4, 3): r"slow.mp4 hardly moves .*: from picture to picture \d.* of 255 levels; a clip",
        moving(toy.folder / "short.mp4", 1, 0): "short.mp4 is too short: it has 0.125 s .* a clip takes 0.25 s or more",
        text: "text.mp4",
        toy.folder / "gone.mp4": "gone.mp4",
    }
    alone = MotionPipeline(toy.bundle, toy.backend)
    for path, sentence in bad.items():
        with pytest.raises(MediaError, match=sentence):
            alone.start(alone.request(PROMPT, references=[path]))
    assert not toy.ran
    memory, good = toy.folder / "filled", moving(toy.folder / "good.mp4", 3, 20)
    assert run("memory", "create", memory, "-b", toy.bundle.path)[0] == 0
    status, said, wrong = run("memory", "add", memory, good, *list(bad)[:3], "-b", toy.bundle.path, "--caption", PROMPT)
    assert status == 2 and "1 added" in said and "3 of 4 clips could not be added" in wrong
    for sentence in list(bad.values())[:3]:
        assert re.search(sentence, wrong)


def test_what_does_not_belong_to_the_system_is_one_sentence(
    toy: Guided, fake_memory: Path, still: NDArray[np.uint8], run: Callable[..., tuple[int, str, str]]
) -> None:
    with pytest.raises(MemoryStoreError, match="was made by other encoders"):
        MotionPipeline.from_bundle(toy.bundle.path, fake_memory)
    with pytest.raises(InputError, match="'image' is nothing that bundle 'guided' takes; it takes prompt, motion_scale"):
        toy.pipeline(PROMPT, image=still)
    status, _, wrong = run("generate", "-b", toy.bundle.path, "-p", PROMPT, "-i", "star.png", "-o", toy.folder / "out.mp4")
    assert status == 2 and wrong.count("\n") == 1
    assert "No such option: -i. The inputs of bundle 'guided' are --prompt, --motion-scale" in wrong
    for references in ([True], [None], "clip.mp4", [b"clip.mp4"]):
        with pytest.raises(InputError, match="references"):
            toy.start(references=references)


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda m: m["loops"]["video"]["absent"].update(step_guided="decode"), "runs 'decode' in place of 'step_guided'"),
        (lambda m: m["loops"]["video"]["absent"].update(step_plain="step_guided"), "both must be graphs of it"),
        (lambda m: m["loops"]["video"]["windows"].update(text=2), "asks 'text' for rows in windows"),
        (lambda m: m["loops"]["video"].update(absent={}), "'extract' of the plan reads a reference also where there is none"),
        (lambda m: m["memory"]["record"][0].update(name="scores"), "`reference_scores` are the scores of the search"),
        (lambda m: m["memory"].update(least_change=300), "300"),
    ],
)
def test_a_bundle_that_cannot_do_without_is_refused(
    guided_bundle: Path, change: Callable[[dict[str, Any]], object], sentence: str
) -> None:
    raw = json.loads((guided_bundle / "bundle.json").read_text())
    parse_manifest(raw)
    change(raw)
    with pytest.raises(BundleError, match=re.escape(sentence)):
        parse_manifest(raw)


def test_a_loop_alone_may_say_that_a_request_needs_no_reference(toy: Guided) -> None:
    """Then nothing in a request says it; a search that finds nothing does."""
    raw = json.loads((toy.bundle.path / "bundle.json").read_text())
    raw["memory"]["absent"] = {}
    bundle = replace(toy.bundle, manifest=parse_manifest(raw))
    pipeline = MotionPipeline(bundle, toy.backend, toy.memory)
    found = pipeline(PROMPT, seed=2, references=1, minimum_score=1, where={"a": "b"})
    assert found.fallback is not None and close(found.frames, toy.wanted(2, None))


def test_bench_has_a_row_for_each_kind_of_step(
    guided_bundle: Path, tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    status, out, _ = run("bench", guided_bundle, "-n", 2, "--json", file := tmp_path / "bench.json")
    assert status == 0 and "│ step_guided " in out and "│ step_plain " in out and "interleaved" not in out
    assert "plain step: not run: loop 'video' has step_guided, step_plain; the stages" in out
    document = json.loads(file.read_text())
    assert {name: len(seconds) for name, seconds in document["seconds"].items() if name.startswith("step")} == {
        "step_guided": 6, "step_plain": 4
    }  # fmt: skip
    assert document["schedules"] == {"video": ["even", 5]} and not document["step_seconds"]
