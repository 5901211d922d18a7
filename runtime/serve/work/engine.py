"""What a worker does, without its pipe: bundles and memories open, jobs taking turns, questions answered.

Everything here is called from one thread but `check` and `preview`, which touch no graph, and the writing of finished videos,
which has a thread of its own so that no step waits for it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from motionrt.runtime.backends.auto import backend_for
from motionrt.runtime.backends.open import RunOptions
from motionrt.runtime.bundle.bundle import Bundle
from motionrt.runtime.bundle.manifest import ChoiceInput, ImageInput, Manifest, TextInput
from motionrt.runtime.errors import BackendError, InputError, MediaError, MemoryStoreError, MotionRTError, UnknownClip
from motionrt.runtime.files import sha256_of
from motionrt.runtime.job import Job, Request
from motionrt.runtime.memory.memory import MotionMemory, Reference
from motionrt.runtime.memory.search import PROBABLE, WORTH
from motionrt.runtime.pipeline import MotionPipeline
from motionrt.runtime.scheduler import Scheduler
from motionrt.runtime.serve.jobs.fair import Fair
from motionrt.runtime.serve.messages import Ask, Ended, FromWorker, Opening, Order, Progress, Run
from motionrt.runtime.serve.work.order import OUTPUTS, Asked, read_order, read_search
from motionrt.runtime.serve.work.timing import Timing
from motionrt.runtime.serve.work.written import animated, sha256_of_frames, write_all, write_preview

_log = logging.getLogger(__name__)
PAYS = 1.1  # how many times as long jobs must take alone for a batch of them to be run
_STAGES = ("starting", "retrieving", "conditioning", "denoising", "decoding", "encoding")
_QUIET = 0.04  # seconds between two reports of one job's steps
_SHARE = 0.05  # of a job's time that looks at it may take


@dataclass(eq=False)
class _Model:
    """A bundle that is served."""

    pipeline: MotionPipeline
    scheduler: Scheduler
    memories: list[str]
    digest: str
    timing: Timing = field(default_factory=Timing)


@dataclass(eq=False)
class Running:
    """An order on its way: a job for each seed, once they differ."""

    run: Run
    model: _Model
    asked: Asked
    jobs: list[Job]
    calls: dict[str, int]
    memory_digest: str | None
    begun: float = field(default_factory=time.monotonic)
    used: float = 0.0
    done: dict[str, int] = field(default_factory=dict)
    steps: int = 0
    step: int = 0
    stage: str = "starting"
    told: float = 0.0
    look: float = 0.0  # when the next one is due
    seen: int = 0
    fraction: float = 0.0
    batch: int = 1
    writing: bool = False
    cancelled: bool = False

    @property
    def share(self) -> str:
        return self.run.key

    @property
    def priority(self) -> int:
        return self.run.priority


class Engine:
    """See the module. `tell` is called with what the server is to know, from any thread."""

    def __init__(self, opening: Opening, tell: Callable[[FromWorker], None]) -> None:
        """Raises what `MotionPipeline.from_bundle` and `MotionMemory.open` raise; InputError for a memory of no bundle."""
        self._tell, self._fair, self._lock = tell, Fair(), threading.Lock()
        self._every = opening.preview
        self._running: dict[str, Running] = {}
        self._owner: dict[int, Running] = {}  # by the id of a job
        self._early: set[str] = set()  # cancelled before they were entered
        self._writer = ThreadPoolExecutor(1, "motionrt-write")
        self.memories = {name: MotionMemory.open(path, readonly=True) for name, path in opening.memories.items()}
        self.models: dict[str, _Model] = {}
        options, lost = RunOptions(**opening.run_options), set(self.memories)
        for name, path in opening.bundles.items():
            bundle = Bundle.open(path)
            pipeline = MotionPipeline.from_bundle(path, backend=backend_for(bundle, options), low_memory=opening.low_memory)
            spec = bundle.manifest.memory
            suited = [] if spec is None else [m for m, memory in self.memories.items() if fits(memory, spec.fingerprint)]
            lost -= {*suited}
            scheduler = Scheduler(pipeline, opening.batch, inexact=opening.inexact, gain=0 if opening.inexact else PAYS)
            self.models[name] = _Model(pipeline, scheduler, suited, sha256_of(bundle.path / "bundle.json"))
        if lost:
            raise InputError(f"the memory '{min(lost)}' was made for none of the bundles {', '.join(self.models)}.")
        for name in opening.bundles if opening.self_test else ():
            self._test(name)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self._writer.shutdown(cancel_futures=True)
        for memory in self.memories.values():
            memory.close()

    def describe(self) -> dict[str, dict[str, Any]]:
        """What each bundle takes and gives, for those who ask over HTTP."""
        return {name: _described(model) for name, model in self.models.items()}

    def _test(self, name: str) -> None:
        """A generation, so that the first request finds everything loaded, and its times known."""
        model = self.models[name]
        manifest, pipeline = model.pipeline.bundle.manifest, model.pipeline
        inputs: dict[str, Any] = {}
        for key, spec in manifest.inputs.items():
            if isinstance(spec, ImageInput) and spec.default is None:
                inputs[key] = np.zeros((spec.height, spec.width, 3), np.uint8)
            elif isinstance(spec, TextInput) and spec.default is None:
                inputs[key] = "motion"
        memory = next((self.memories[one] for one in model.memories if len(self.memories[one])), None)
        if memory is None and manifest.memory is not None:
            inputs |= manifest.off
        try:
            for seed in range(2):  # the second one takes what later ones take
                job = Job(pipeline.bundle, memory, Request(inputs, seed), pipeline.run)
                while (call := job.call) is not None:
                    start = time.perf_counter()
                    next(job)
                    model.timing.measured(call.graph, time.perf_counter() - start)
        except InputError as error:  # it needs what nobody has given
            _log.warning("%s is not tried out before the first request: %s", name, error)

    # --- questions ----------------------------------------------------------------------------------------------------

    def check(self, order: Order) -> dict[str, Any]:
        """What is taken of an order, and the seconds that it is expected to take; nothing is run. Raises `MotionRTError`."""
        model = self.models[order.model]
        asked = read_order(model.pipeline.bundle, order, model.memories)
        job = self._start(model, asked)
        output, calls = model.pipeline.bundle.manifest.output, job.calls(len(asked.seeds))
        return {
            "fields": asked.fields, "seeds": asked.seeds, "expected": model.timing.expected(calls),
            "steps": _steps(model.pipeline.bundle, calls), "size": f"{output.width}x{output.height}",
            "seconds": output.frames / output.fps,
        }  # fmt: skip

    def answer(self, ask: Ask) -> Any:
        """What comes of a question that reads a memory; raises `MotionRTError`."""
        about = ask.about
        if ask.what == "check":
            order = Order(model=about["model"], fields=about["fields"], files=about["files"])
            try:
                return self.check(order)
            except MediaError as error:  # say which field, not where its file lies
                raise MediaError(_by_field(str(error), order)) from None
        memory = self.memories[about["memory"]]
        if ask.what == "stats":
            return {**dataclasses.asdict(memory.stats()), "digest": memory.digest()}
        pipeline = self._model_of(about["memory"]).pipeline
        if ask.what == "preview":
            (reference,) = memory.get([about["id"]])
            return write_preview(pipeline.bundle, memory.path, reference, Path(about["folder"]))
        text, count, search = read_search(about["fields"])
        wanted = min(count, len(memory))
        found = memory.search(pipeline.embed(text), wanted, search, text) if wanted else []
        return [told(reference, about["memory"]) for reference in found]

    def field(self, ask: Ask, message: str) -> str | None:
        """The field at fault, which is what a refusal's first word names; None where it names none."""
        word, model = message.split()[0], self.models.get(ask.about.get("model", ""))
        inputs = {} if model is None else model.pipeline.bundle.manifest.inputs
        return word if word in ask.about.get("fields", ()) or word in inputs else None

    def _model_of(self, memory: str) -> _Model:
        return next(model for model in self.models.values() if memory in model.memories)

    def _start(self, model: _Model, asked: Asked) -> Job:
        memory = None if asked.memory is None else self.memories[asked.memory]
        return Job(model.pipeline.bundle, memory, asked.request, model.pipeline.run)

    # --- jobs ---------------------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether there is a call to run."""
        return any(not running.writing for running in [*self._running.values()])

    def prepare(self, run: Run) -> Running | None:
        """Read an order, its pictures too, for `enter`; what is wrong with it ends it (`Ended`). Any thread may call it."""
        try:
            model = self.models.get(run.order.model)
            if model is None:  # a job of the store, from before the server was started with others
                raise InputError(f"model is '{run.order.model}', which is not served now; there is {', '.join(self.models)}.")
            asked = read_order(model.pipeline.bundle, run.order, model.memories)
            job = self._start(model, asked)
            digest = None if asked.memory is None else self.memories[asked.memory].digest()
            calls = job.calls(len(asked.seeds))
        except Exception as error:
            why = failure(error)
            why["message"] = _by_field(why["message"], run.order)
            self._tell(Ended(job=run.job, outcome="failed", error=why))
            return None
        return Running(run, model, asked, [job], calls, digest, steps=_steps(model.pipeline.bundle, calls))

    def enter(self, running: Running) -> None:
        """Let a job take its turns from now on."""
        if running.run.job in self._early:
            self._early.discard(running.run.job)
            self._tell(Ended(job=running.run.job, outcome="cancelled"))
            return
        self._running[running.run.job] = running
        self._begin(running)

    def _begin(self, running: Running) -> None:
        self._add(running, running.jobs[0])
        self._went_on(running)  # to its first call: that may fail already, or be one that the seed changes

    def _add(self, running: Running, job: Job) -> None:
        self._owner[id(job)] = running
        running.model.scheduler.add(job)

    def cancel(self, name: str) -> None:
        """Stop a job now, between two calls; one that is being written is stopped when it is."""
        running = self._running.get(name)
        if running is None:  # it ended meanwhile, and has said so; or it is being read
            self._early.add(name)
            return
        with self._lock:
            running.cancelled = True
            if running.writing:
                return
        self._leave(running)
        self._tell(Ended(job=name, outcome="cancelled", used=running.used))

    def _leave(self, running: Running) -> None:
        self._running.pop(running.run.job, None)
        for job in running.jobs:
            running.model.scheduler.abort(job)
            self._owner.pop(id(job), None)

    def turn(self) -> None:
        """Run one call of the job whose turn it is."""
        running = self._fair.first(one for one in [*self._running.values()] if not one.writing)
        if running is None:
            return
        first = min(
            (job for job in running.jobs if job.frames is None), key=lambda job: len(job.step_seconds)
        )  # seeds side by side
        before = running.model.scheduler.waiting(first)
        self._report(running)
        start = time.perf_counter()
        went = running.model.scheduler.turn(first)
        seconds = (time.perf_counter() - start) / max(1, len(went))
        touched = list({id(owner): owner for job in went if (owner := self._owner.get(id(job))) is not None}.values())
        for owner in touched:
            owner.used += seconds
            self._fair.charge(owner.share, seconds)
            if before is not None:
                owner.model.timing.measured(before.graph, seconds)
                owner.done[before.graph] = owner.done.get(before.graph, 0) + sum(
                    self._owner.get(id(job)) is owner for job in went
                )
                owner.batch = max(owner.batch, len(went))
        for owner in [running] if not touched else touched:
            self._went_on(owner)

    def _went_on(self, running: Running) -> None:
        for job in running.jobs:
            running.model.scheduler.waiting(job)  # on to its next call
        failed = next((job for job in running.jobs if job.failure is not None), None)
        if failed is not None and failed.failure is not None:
            self._leave(running)
            self._tell(Ended(job=running.run.job, outcome="failed", error=failure(failed.failure), used=running.used))
            return
        first = running.jobs[0]
        if len(running.jobs) < len(running.asked.seeds) and first.seeded:  # its call is the first that is not for all seeds
            for seed in running.asked.seeds[1:]:
                running.jobs.append(first.fork(seed))
                self._add(running, running.jobs[-1])
        if all(job.frames is not None for job in running.jobs):
            running.writing = True
            self._report(running, force=True)
            for job in running.jobs:
                self._owner.pop(id(job), None)
            self._writer.submit(self._write, running)
            return
        self._report(running)

    def _report(self, running: Running, force: bool = False) -> None:
        """Say where a job is; of steps no more often than anyone can look."""
        jobs, model = running.jobs, running.model
        behind = min(jobs, key=lambda job: len(job.step_seconds))
        stage = "encoding" if running.writing else _stage(model.pipeline.bundle, behind)
        stage = max(stage, running.stage, key=_STAGES.index)  # of several seeds, some are ahead
        step, now = sum(len(job.step_seconds) for job in jobs), time.monotonic()
        changed = stage != running.stage
        if not force and not changed and now - running.told < _QUIET:
            return
        first = running.stage in ("starting", "retrieving") and changed
        if running.stage == "retrieving" and changed and running.asked.memory is not None:
            with contextlib.suppress(MemoryStoreError):  # it was searched just now: whatever this is ends no job
                running.memory_digest = self.memories[running.asked.memory].digest()  # it may have changed since `prepare`
        if first and jobs[0].fallback is not None:  # other graphs run then than were counted
            running.calls = Counter(running.done) + Counter(jobs[0].calls(len(running.asked.seeds)))
        running.stage, running.step, running.told = stage, step, now
        left = model.timing.expected({graph: count - running.done.get(graph, 0) for graph, count in running.calls.items()})
        done = running.used / (running.used + left) if running.used + left else 0.0
        running.fraction = max(running.fraction, min(done, 0.99))
        references = [told(one, running.asked.memory or "") for one in jobs[0].references] if first else None
        self._tell(Progress(
            job=running.run.job, stage=stage, step=step, steps=running.steps, done=running.fraction, left=left,
            used=running.used, references=references or None, preview=self._look(running),
        ))  # fmt: skip

    def _look(self, running: Running) -> bytes | None:
        """What the video of a job's first seed will be, where its bundle can show it, a step was run since the last look, and
        that is long enough ago. No fault of it ends a job."""
        job, start, last = running.jobs[0], time.monotonic(), running.stage == "decoding"
        step, output = len(job.step_seconds), running.model.pipeline.bundle.manifest.output
        if not self._every or step == running.seen or not last and start < running.look:
            return None
        running.seen, shown = step, None
        try:
            if (pictures := job.preview()) is not None:
                shown = animated(pictures, output.frames / output.fps)
        except Exception:
            _log.exception("a preview could not be made")
            running.look = float("inf")  # nor will the next
        else:
            end = time.monotonic()
            running.look = end + max(self._every, (end - start) / _SHARE)
        return shown

    def _write(self, running: Running) -> None:
        """Write what a job gave, and say that it is over; in the writer's thread."""
        start, run, asked = time.perf_counter(), running.run, running.asked
        pipeline, name = running.model.pipeline, run.job
        try:
            results = [pipeline.result(job) for job in running.jobs]
            files = write_all(Path(run.folder), results, asked.output)
            seconds: dict[str, float] = {}
            for result in results:
                for graph, value in result.seconds.items():
                    seconds[graph] = seconds.get(graph, 0.0) + value
            first, (frames, height, width, _) = results[0], results[0].frames.shape
            told_ = {
                "seeds": asked.seeds, "references": [told(one, asked.memory or "") for one in first.references],
                "fallback": first.fallback, "notes": list(first.notes),
                "approximations": list(first.approximations), "field": first.field is not None,
                "seconds": {k: round(v, 6) for k, v in seconds.items()},
                "step_seconds": [round(value, 6) for result in results for value in result.step_seconds],
                "backend": first.backend, "bundle_digest": running.model.digest, "memory_digest": running.memory_digest,
                "frames_sha256": [sha256_of_frames(result.frames) for result in results],
                "frames": frames, "width": width, "height": height, "fps": first.fps,
                "batch": {"size": running.batch, "exact": not running.model.scheduler.inexact or running.batch == 1},
            }  # fmt: skip
            told_["seconds"]["write"] = round(time.perf_counter() - start, 6)
            ended = Ended(job=name, outcome="completed", result=told_, files=files, used=running.used)
        except Exception as error:
            ended = Ended(job=name, outcome="failed", error=failure(error), used=running.used)
        self._over(running, ended)

    def _over(self, running: Running, ended: Ended) -> None:
        """Say that a job is over that was no more between two calls."""
        with self._lock:
            if running.cancelled:
                ended = Ended(job=ended.job, outcome="cancelled", used=running.used)
            self._running.pop(ended.job, None)
        self._tell(ended)


def failure(error: Exception) -> dict[str, str]:
    """Code and message of what ended a job; what is nobody's but ours is logged whole, and said without details."""
    codes = {
        UnknownClip: "unknown_clip",
        InputError: "invalid_request",
        MediaError: "invalid_media",
        MemoryStoreError: "memory_error",
        BackendError: "backend_error",
    }
    cause = error.__cause__ or error
    if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
        return {"code": "storage_full", "message": "there was no room for the video on the server's disk."}
    for kind, code in codes.items():
        if isinstance(error, kind):
            return {"code": code, "message": str(error)}
    if isinstance(error, MemoryError):
        return {"code": "out_of_memory", "message": "there was too little memory for this request."}
    if isinstance(error, MotionRTError):
        return {"code": "failed", "message": str(error)}
    _log.error("a job failed", exc_info=error)
    return {"code": "internal_error", "message": f"a fault of the server ({type(error).__name__}); its log says more."}


def told(reference: Reference, memory: str) -> dict[str, Any]:
    """A retrieved clip for those who ask over HTTP: no folder of this machine in it."""
    return {
        "id": reference.id, "memory": memory, "score": None if np.isnan(reference.score) else round(float(reference.score), 4),
        "caption": reference.caption, "source": Path(reference.source).name, "start": reference.start,
        "duration": reference.duration, "dataset": reference.dataset, "metadata": dict(reference.metadata),
        **{name: round(value, 4) for name in WORTH[1:] if not np.isnan(value := float(getattr(reference, name)))},
    }  # fmt: skip


def _steps(bundle: Bundle, calls: Mapping[str, int]) -> int:
    """How many of these calls are denoising steps."""
    return sum(count for graph, count in calls.items() if bundle.in_loop(graph))


def _by_field(text: str, order: Order) -> str:
    for name, path in order.files.items():
        text = text.replace(path, name)
    return text


def fits(memory: MotionMemory, fingerprint: str) -> bool:
    """Whether a memory was made for a bundle that has this fingerprint."""
    try:
        memory.check(fingerprint)
    except MemoryStoreError:
        return False
    return True


def _stage(bundle: Bundle, job: Job) -> str:
    """The stage of a job by what is run next."""
    call, manifest = job.call, bundle.manifest
    if call is None:
        return "decoding"
    if manifest.memory is not None and call.graph == manifest.memory.query and not job.seeded and not job.references:
        return "retrieving"
    if call.loop and bundle.in_loop(call.graph):
        return "denoising"
    if job.step_seconds and any(call.graph in loop.windows for loop in manifest.loops.values()):
        return "denoising"
    return "decoding" if job.step_seconds else "conditioning"


def _described(model: _Model) -> dict[str, Any]:
    manifest: Manifest = model.pipeline.bundle.manifest
    bundle, output = model.pipeline.bundle, manifest.output
    loops = [name for name, loop in manifest.loops.items() if any(bundle.in_loop(graph) for graph in loop.graphs)]
    inputs = {}
    for name, spec in manifest.inputs.items():
        given: Mapping[str, Any] = {key: getattr(spec, key, None) for key in ("default", "min", "max", "help", "image")}
        kind = type(spec).__name__.removesuffix("Input").lower()
        inputs[name] = {"kind": kind} | {key: value for key, value in given.items() if value is not None}
        if isinstance(spec, ChoiceInput):
            inputs[name]["options"] = list(spec.options)
    memory = manifest.memory
    return {
        "size": f"{output.width}x{output.height}", "width": output.width, "height": output.height, "frames": output.frames,
        "fps": output.fps, "seconds": output.frames / output.fps, "inputs": inputs, "outputs": list(OUTPUTS),
        "loops": {name: {
            "solvers": {solver: [min(steps), max(steps)] for solver, steps in manifest.loops[name].schedules.items()},
            "default": list(manifest.loops[name].default),
        } for name in loops},
        "memories": model.memories,
        "references": memory and {
            "default": memory.default, "max": memory.max, "probable": PROBABLE if manifest.optional else 0.0,
        },
        "motion_off": manifest.off,
        "backend": model.pipeline.backend.label, "bundle_digest": model.digest,
    }  # fmt: skip
