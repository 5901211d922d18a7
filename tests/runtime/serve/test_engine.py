"""What a worker does, without its process: turns between keys, seeds that share, progress that is true, a stop at a step."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from motionrt.runtime.backends.onnxruntime import OnnxRuntimeBackend
from motionrt.runtime.bundle.bundle import Bundle
from motionrt.runtime.errors import InputError
from motionrt.runtime.indexing.clips import ClipEncoders, index_clips
from motionrt.runtime.memory.memory import MotionMemory
from motionrt.runtime.pipeline import MotionPipeline
from motionrt.runtime.serve.messages import Ask, Ended, FromWorker, Opening, Order, Progress, Run
from motionrt.runtime.serve.work.engine import Engine
from motionrt.runtime.serve.work.order import read_order


class Told:
    """An engine of the fake bundle, and what it said."""

    def __init__(self, bundle: Path, memory: Path, folder: Path, still: Path, **opening: Any) -> None:
        self.said: list[FromWorker] = []
        self.folder, self.still = folder, still
        options = {"run_options": {"threads": 1}, "self_test": False, **opening}
        options = {"memories": {"clips": str(memory)}, **options}
        self.engine = Engine(Opening(bundles={"fake": str(bundle)}, **options), self.said.append)

    def order(self, **fields: Any) -> Order:
        return Order(model="fake", fields={"prompt": "a red ball", **fields}, files={"image": str(self.still)})

    def add(self, name: str, key: str = "k", priority: int = 1, **fields: Any) -> None:
        place = self.folder / name
        place.mkdir()
        run = Run(job=name, order=self.order(**fields), folder=str(place), key=key, priority=priority)
        if (running := self.engine.prepare(run)) is not None:
            self.engine.enter(running)

    def work(self, until: Callable[[], bool] = lambda: False) -> None:
        """Turns until nothing is left, and written."""
        end = time.monotonic() + 20
        while (self.engine.busy or self.engine._running) and not until():
            assert time.monotonic() < end, self.said[-3:]
            self.engine.turn()

    def ended(self, name: str) -> Ended:
        (one,) = [item for item in self.said if isinstance(item, Ended) and item.job == name]
        return one

    def made(self, name: str) -> bool:
        """Whether its last frame is there: it is written beside what others compute."""
        return any(isinstance(item, Progress) and item.job == name and item.stage == "encoding" for item in self.said)

    def step(self, name: str) -> int:
        return sum(len(job.step_seconds) for job in self.engine._running[name].jobs)

    def steps(self, name: str) -> list[int]:
        return [item.step for item in self.said if isinstance(item, Progress) and item.job == name]


@pytest.fixture
def opened(fake_bundle: Path, fake_memory: Path, tmp_path: Path, picture: Path) -> Iterator[Callable[..., Told]]:
    engines: list[Engine] = []

    def make(**opening: Any) -> Told:
        told = Told(fake_bundle, fake_memory, tmp_path, picture, **opening)
        engines.append(told.engine)
        return told

    yield make
    for engine in engines:
        engine.__exit__()


def digests(bundle: Path, memory: Path, still: Path, *seeds: int, **options: Any) -> list[str]:
    with MotionMemory.open(memory, readonly=True) as clips, MotionPipeline.from_bundle(bundle, clips, threads=1) as pipeline:
        made = (pipeline(str(still), "a red ball", seed=seed, **options).frames for seed in seeds)
        return [hashlib.sha256(frames.tobytes()).hexdigest() for frames in made]


def _asked(told: Told) -> Any:
    return read_order(told.engine.models["fake"].pipeline.bundle, told.order(steps=5), ["clips"])


@pytest.mark.parametrize("batch", [1, 4])
def test_every_seed_gives_the_frames_of_the_pipeline(
    opened: Callable[..., Told], fake_bundle: Path, fake_memory: Path, picture: Path, batch: int
) -> None:
    told = opened(batch=batch)
    told.add("one", seed=3, n=3, steps=4)
    told.work()
    ended = told.ended("one")
    assert ended.outcome == "completed", ended.error
    assert ended.result["frames_sha256"] == digests(fake_bundle, fake_memory, picture, 3, 4, 5, steps=4)
    assert ended.result["seeds"] == [3, 4, 5] and len(ended.result["step_seconds"]) == 12 and ended.result["references"]
    assert {file.kind for file in ended.files} >= {f"video-{i}" for i in range(3)}
    for file in ended.files:
        data = (told.folder / "one" / file.name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (file.size, file.sha256)


def test_progress_never_goes_back_and_counts_every_step(opened: Callable[..., Told]) -> None:
    told = opened()
    told.add("one", n=2, steps=5)
    told.work()
    said = [item for item in told.said if isinstance(item, Progress)]
    stages = ["starting", "retrieving", "conditioning", "denoising", "decoding", "encoding"]
    order = [stages.index(item.stage) for item in said]
    assert order == sorted(order) and {"conditioning", "denoising", "encoding"} <= {item.stage for item in said}
    for values in ([item.step for item in said], [item.done for item in said], [item.used for item in said]):
        assert values == sorted(values)
    assert said[-1].step == said[-1].steps == 10 and all(0 <= item.done < 1 for item in said)
    assert isinstance(told.said[-1], Ended)


def test_a_short_job_of_another_key_does_not_wait_for_long_ones(opened: Callable[..., Told]) -> None:
    told, long = opened(), [f"long-{i}" for i in range(4)]
    for name in long:
        told.add(name, "a", steps=10, n=8)
    told.work(lambda: told.step("long-0") >= 5)
    told.add("short", "b", steps=2)
    told.work(lambda: told.made("short"))
    assert sum(told.step(name) for name in long) < 160  # of 320: it had its share of the time
    told.work()
    assert {told.ended(name).outcome for name in ("short", *long)} == {"completed"}


def test_priority_goes_first(opened: Callable[..., Told]) -> None:
    told = opened()
    told.add("low", "a", 0, steps=10)
    told.work(lambda: told.step("low") >= 3)
    told.add("high", "a", 2, steps=10)
    told.work(lambda: told.made("high"))
    assert told.step("low") == 3
    told.work()
    assert told.ended("high").outcome == told.ended("low").outcome == "completed"


def test_a_stop_is_said_at_once_and_no_step_is_run_behind_it(opened: Callable[..., Told]) -> None:
    told = opened()
    told.add("one", steps=10, n=8)
    told.add("other", "b", steps=5)
    told.work(lambda: told.step("one") >= 4)
    told.engine.cancel("one")
    assert told.ended("one").outcome == "cancelled"
    there = len(told.steps("one"))
    told.work()
    assert len(told.steps("one")) == there and told.ended("other").outcome == "completed"
    assert not told.engine._owner and not told.engine._running and not [*(told.folder / "one").iterdir()]
    told.engine.cancel("two")  # it comes before its order was read
    told.add("two", steps=5)
    assert told.ended("two").outcome == "cancelled" and not told.engine.busy


def test_a_fault_of_one_job_is_its_own(opened: Callable[..., Told], caplog: pytest.LogCaptureFixture) -> None:
    told = opened()
    told.add("bad", "a", steps=4)
    told.add("good", "b", steps=4)
    scheduler = told.engine.models["fake"].scheduler
    run, bad = scheduler.pipeline.run, told.engine._running["bad"].jobs[0]

    def failing(call: Any, placed: Any) -> Any:
        if placed is bad.placed and call.graph == "step":
            raise RuntimeError("a secret of the machine")
        return run(call, placed)

    scheduler.pipeline.run = failing  # type: ignore[method-assign]
    told.work()
    assert told.ended("good").outcome == "completed"
    error = told.ended("bad").error
    assert error is not None and error["code"] == "internal_error" and "secret" not in error["message"]
    assert "a secret of the machine" in caplog.text


def test_a_clip_by_hand_whose_file_is_gone_ends_its_job_alone(
    opened: Callable[..., Told], fake_bundle: Path, fake_clips: dict[str, Path], tmp_path: Path
) -> None:
    bundle, path = Bundle.open(fake_bundle), tmp_path / "gone.mp4"
    caption, clip = next(iter(fake_clips.items()))
    shutil.copyfile(clip, path)
    with MotionMemory.for_bundle(tmp_path / "on_demand", bundle, on_demand=True) as memory:
        index_clips(memory, ClipEncoders.from_bundle(bundle, OnnxRuntimeBackend(1)), [(path, caption, None)])
        (number,) = memory.ids().tolist()
    path.unlink()
    told = opened(memories={"clips": str(tmp_path / "on_demand")})
    told.add("one", references=[number])  # what it needs first is that file
    error = told.ended("one").error
    assert error is not None and "gone.mp4" in error["message"] and not told.engine.busy and not told.engine._owner


def test_a_job_of_a_bundle_that_is_not_served_any_more_ends(opened: Callable[..., Told], tmp_path: Path) -> None:
    told = opened()
    told.engine.prepare(Run(job="one", order=Order(model="before", fields={}), folder=str(tmp_path)))
    error = told.ended("one").error
    assert error is not None and "before" in error["message"] and "fake" in error["message"]


def test_the_digest_of_a_job_is_of_the_memory_that_it_searched(
    opened: Callable[..., Told], fake_memory: Path, tmp_path: Path
) -> None:
    path = shutil.copytree(fake_memory, tmp_path / "changing")
    told = opened(memories={"clips": str(path)})
    told.add("one", steps=2)
    with MotionMemory.open(path) as memory:  # while the job waits for its turn
        memory.remove(memory.ids()[:1])
        searched = memory.digest()
    told.work(lambda: told.step("one") >= 1)
    with MotionMemory.open(path) as memory:
        memory.remove(memory.ids()[:1])
    told.work()
    assert told.ended("one").result["memory_digest"] == searched


def test_a_picture_that_is_none_ends_its_job_and_names_the_field(opened: Callable[..., Told], tmp_path: Path) -> None:
    told = opened()
    told.still = tmp_path / "no.png"
    told.still.write_bytes(b"not a picture")
    told.add("one")
    error = told.ended("one").error
    assert error is not None and error["code"] == "invalid_media" and str(tmp_path) not in error["message"]
    assert "image" in error["message"]


def test_a_check_says_what_it_will_take_and_runs_nothing(opened: Callable[..., Told]) -> None:
    told = opened()
    run: list[Any] = []
    told.engine.models["fake"].pipeline.run = lambda call, placed: run.append(call)  # type: ignore[method-assign,assignment]
    about = told.engine.check(told.order(steps="7", n="2", seed="1"))
    assert about["steps"] == 14 and about["seeds"] == [1, 2] and about["fields"]["steps"] == 7 and not run
    with pytest.raises(InputError, match="steps"):
        told.engine.check(told.order(steps=0))
    with pytest.raises(InputError, match="nothing"):
        told.engine.check(told.order(nothing=1))
    for name in ("where", "references"):
        with pytest.raises(InputError, match=f"^{name} is"):
            told.engine.check(told.order(**{name: "[" * 60000}))
    with pytest.raises(InputError, match="output is"):
        told.engine.check(told.order(output=["mp4"]))
    with pytest.raises(InputError, match="seconds is 'nan'"):
        told.engine.check(told.order(seconds="nan"))


def test_questions_are_answered_as_the_memory_does(opened: Callable[..., Told], fake_memory: Path) -> None:
    told = opened()
    found = told.engine.answer(Ask(1, "search", {"memory": "clips", "fields": {"text": "a red ball moves right", "k": 2}}))
    with MotionMemory.open(fake_memory, readonly=True) as memory:
        wanted = memory.search(told.engine.models["fake"].pipeline.embed("a red ball moves right"), 2)
    assert [(one["id"], one["caption"]) for one in found] == [(one.id, one.caption) for one in wanted]
    assert all("/" not in one["source"] for one in found)
    assert told.engine.answer(Ask(2, "stats", {"memory": "clips"}))["clips"] == 4


def test_a_memory_of_no_bundle_is_refused(fake_bundle: Path, tmp_path: Path) -> None:
    from fake_memory import filled

    other = filled(tmp_path / "other", 2)
    with pytest.raises(InputError, match="the memory 'other' was made for none of the bundles fake"):
        Engine(Opening(bundles={"fake": str(fake_bundle)}, memories={"other": str(other)}), lambda message: None)


def test_a_generation_is_tried_before_the_first_is_asked_for(opened: Callable[..., Told]) -> None:
    """So what a job takes is known: milliseconds, and not the second of each call that is assumed before."""
    tried, untried = (opened(self_test=tried) for tried in (True, False))
    calls = sum(tried.engine._start(tried.engine.models["fake"], _asked(tried)).calls().values())
    assert untried.engine.check(untried.order(steps=5))["expected"] == calls
    assert 0 < tried.engine.check(tried.order(steps=5))["expected"] < calls / 10


def test_pictures_of_all_sizes_are_fitted(opened: Callable[..., Told], tmp_path: Path) -> None:
    told = opened()
    for name, size in (("tiny", (1, 1)), ("wide", (300, 7))):
        told.still = tmp_path / f"{name}.webp"
        Image.fromarray(np.full((size[1], size[0], 3), 99, np.uint8)).save(told.still)
        told.add(name, steps=1)
    told.work()
    assert {told.ended(name).outcome for name in ("tiny", "wide")} == {"completed"}


def test_a_bundle_of_words_alone_takes_no_picture(
    guided_bundle: Path, guided_memory: Path, tmp_path: Path, picture: Path
) -> None:
    """What it declares is what is taken; without a clip its plain graphs run, as counted before."""
    said: list[FromWorker] = []
    options: dict[str, Any] = {"bundles": {"words": str(guided_bundle)}, "memories": {"clips": str(guided_memory)}}
    with Engine(Opening(run_options={"threads": 1}, self_test=True, **options), said.append) as engine:
        about = engine.describe()["words"]
        assert {name: spec["kind"] for name, spec in about["inputs"].items()} == {"prompt": "text", "motion_scale": "column"}
        assert about["motion_off"] == {"motion_scale": 0} and about["memories"] == ["clips"]
        for place, field in ((str(picture), "input_reference"), (str(picture), "image")):
            order = Order(model="words", fields={"prompt": "a red ball"}, files={field: place})
            with pytest.raises(InputError, match=f"^{field}.* leave it out"):
                engine.check(order)
        none = {"references": "1", "minimum_score": "1", "where": '{"dataset": "none"}'}
        for name, fields in (("on", {"motion_scale": "[1, 0.5, 1, 0, 0]"}), ("off", {"motion_scale": "0"}), ("none", none)):
            (tmp_path / name).mkdir()
            order = Order(model="words", fields={"prompt": "a red ball", "seed": "3", "n": "2", **fields}, files={})
            running = engine.prepare(Run(job=name, order=order, folder=str(tmp_path / name), key="k", priority=1))
            assert running is not None, said[-1]
            engine.enter(running)
            end = time.monotonic() + 20
            while name in engine._running and time.monotonic() < end:
                engine.turn()
            assert running.done == running.calls
    on, off, nothing = (one for one in said if isinstance(one, Ended))
    assert on.outcome == off.outcome == "completed" and on.result and off.result
    assert on.result["references"] and not off.result["references"]
    assert nothing.result and nothing.result["fallback"] and nothing.result["frames_sha256"] == off.result["frames_sha256"]
    first = next(one for one in said if isinstance(one, Progress) and one.stage == "decoding")
    assert first.step == first.steps == 10  # a table that is made between two steps is none of it
