"""MotionPipeline: what a bundle declares in, frames out. The plan is walked by a job (job.py); here its calls meet the
graphs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from motionrt.runtime.arguments import instance, whole
from motionrt.runtime.backends.auto import Choice, choose
from motionrt.runtime.backends.machine import usable_cores
from motionrt.runtime.backends.open import RunOptions, open_backend
from motionrt.runtime.backends.seam import Backend, Checked
from motionrt.runtime.bundle.bundle import Bundle
from motionrt.runtime.errors import BatchError, Cancelled, InputError, MemoryStoreError, MotionRTError, shown
from motionrt.runtime.files import here
from motionrt.runtime.job import Job, Placed, Request, Result
from motionrt.runtime.loop import Call, Row
from motionrt.runtime.media.limits import LIMITS, Limits, check_limits
from motionrt.runtime.memory.search import Search

if TYPE_CHECKING:
    from motionrt.runtime.memory.memory import MotionMemory
    from motionrt.runtime.memory.set import MemorySet

__all__ = ["Job", "MotionPipeline", "Request", "Result"]
_KEPT = 8  # results that do not depend on a request (tables of a schedule): of a large model they are hundreds of megabytes


class MotionPipeline:
    """Answers requests with one bundle, one backend and (unless references are given by hand) one motion memory.

    Not safe to call from several threads at once; many jobs of one thread may take turns (scheduler.py).
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        memory: MotionMemory | MemorySet | None = None,
        *,
        low_memory: bool = False,
        limits: Limits = LIMITS,
    ) -> None:
        check_limits(limits)
        self._limits, self._folder = limits, here()
        self.bundle, self.backend, self.memory, self.low_memory = bundle, backend, memory, low_memory
        self._graphs: dict[str, Checked] = {}
        self._beside: Sequence[Backend] = getattr(backend, "beside", ())
        self._elsewhere: dict[tuple[int, str], Checked] = {}  # by the place of their backend in these, counted from 1
        if self._beside and not any(loop.ahead for loop in bundle.manifest.loops.values()):
            raise InputError(
                f"{len(self._beside) + 1} devices are given for one request, and a step of bundle '{bundle.name}' is one call. "
                "Export it with --split-guidance, or name one device."
            )
        self._kept: dict[Hashable, dict[str, Any]] = {}
        self._owns_memory = False
        self.choice: str | None = None  # why this backend, where it was left to "auto"
        if memory is not None:
            if bundle.manifest.memory is None:
                raise InputError(f"bundle '{bundle.name}' finds nothing in a motion memory; open the pipeline without one.")
            memory.check(bundle.manifest.memory.fingerprint)

    @classmethod
    def from_bundle(
        cls,
        path: str | Path,
        memory: str | Path | MotionMemory | MemorySet | None = None,
        *,
        backend: Backend | Choice | str | None = None,
        threads: int | None = None,
        device: str | None = None,
        precision: str | None = None,
        low_memory: bool = False,
        limits: Limits = LIMITS,
    ) -> MotionPipeline:
        """Open the bundle directory `path` and the motion memory (a directory, opened read-only, or an open memory or set).

        `backend`: an open one, what `choose` chose, or a name: one of `BACKENDS`, the first if not given (with
        `threads`, `device` and `precision` as in `RunOptions`), or "auto": the fastest that runs here, and `Result.choice`
        says why. Graphs are loaded when they are first needed, and kept; with `low_memory` each makes room for the next: a
        request takes no more than the largest graph needs, and longer by the time that loading takes. `limits`: how much is
        decoded of a picture or clip. Raises `BundleError`, `MemoryStoreError` (missing, damaged, made for another bundle),
        `BackendError`, `InputError`.
        """
        for given, value in (("threads", threads), ("device", device), ("precision", precision)):
            if value is not None and backend is not None and not isinstance(backend, str):
                what = "the default backend or one by name"
                raise InputError(f"{given} is for {what}; give it to the backend that you pass instead.")
        bundle = Bundle.open(path)
        if not isinstance(backend, str | None) and not hasattr(backend, "load") and not isinstance(backend, Choice):
            raise InputError(f"backend is {shown(backend)}; it must be a name, an open backend or a choice.")
        if memory is not None and not isinstance(memory, str | Path) and not hasattr(memory, "check"):
            raise InputError(f"memory is {shown(memory)}; it must be a directory, or an open motion memory or set.")
        if backend == "auto":
            backend = choose(bundle, device=device, threads=threads, precision=precision)
        elif backend is None or isinstance(backend, str):
            backend = open_backend(RunOptions(backend or RunOptions.backend, device, threads, precision=precision))
        choice = backend if isinstance(backend, Choice) else None
        runs = backend.backend if isinstance(backend, Choice) else backend
        opened = _open_memory(memory) if isinstance(memory, str | Path) else memory
        try:
            pipeline = cls(bundle, runs, opened, low_memory=low_memory, limits=limits)
        except BaseException:
            if opened is not None and opened is not memory:
                opened.close()
            raise
        pipeline._owns_memory = opened is not memory
        if choice is not None:
            pipeline.choice, pipeline._graphs = choice.why, {} if low_memory else dict(choice.graphs)
        return pipeline

    def close(self) -> None:
        """Close the memory if this pipeline opened it."""
        if self._owns_memory and self.memory is not None:
            self.memory.close()

    def __enter__(self) -> MotionPipeline:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # --- requests -----------------------------------------------------------------------------------------------------

    def __call__(self, *inputs: Any, callback: Callable[[int, int], object] | None = None, **named: Any) -> Result:
        """Answer one request: `pipeline(image, prompt, seed=1, references=4)`.

        inputs, named: what the bundle declares, in its order or by name (`pipeline.bundle.manifest.inputs`, `motionrt
        inspect`); the fields of `Request` (seed, solver, steps, references, given) and of `Search` (where, minimum_score,
        distinct, ...); another name is refused. callback(step, steps) is called after each denoising step; returning False
        stops with `Cancelled`. Same seed, bundle and memory: the same frames. Raises `InputError`, `MediaError`,
        `MemoryStoreError`, `BackendError`.
        """
        if callback is not None and not callable(callback):
            raise InputError(f"callback is {shown(callback)}; it must be a function of a step and the number of steps.")
        job = self.start(self.request(*inputs, **named))
        for call in job:
            counts = callback is not None and call.loop and self.bundle.in_loop(call.graph)
            if counts and callback is not None and _stops(callback(call.step - 1, call.steps)):
                job.close()
                raise Cancelled(f"stopped by the callback after step {call.step} of {call.steps}.")
        return self.result(job)

    def request(self, *inputs: Any, **named: Any) -> Request:
        """The arguments of a call as a value; `InputError` for a name that is none."""
        declared = list(self.bundle.manifest.inputs)
        if len(inputs) > len(declared):
            raise InputError(f"{len(inputs)} inputs are given; bundle '{self.bundle.name}' takes {', '.join(declared)}.")
        given = dict(zip(declared, inputs, strict=False))
        if twice := sorted(given.keys() & named.keys()):
            raise InputError(f"{twice[0]} is given twice: by its place and by its name.")
        given |= {name: named.pop(name) for name in declared if name in named}
        search = {option.name: named.pop(option.name) for option in fields(Search) if option.name in named}
        known = [option.name for option in fields(Request) if option.name not in ("inputs", "search")]
        if unknown := sorted(named.keys() - {*known, "search"}):
            options = ", ".join([*declared, *known, *(option.name for option in fields(Search))])
            raise InputError(f"{unknown[0]!r} is nothing that bundle '{self.bundle.name}' takes; it takes {options}.")
        if search:
            named["search"] = Search(**search)
        return Request(given, **named)

    def start(self, request: Request) -> Job:
        """The job of `request`: everything is checked, nothing has been run. See `Job`."""
        if not isinstance(request, Request):
            raise InputError(f"the request is a {type(request).__name__}; allowed is what pipeline.request(...) makes.")
        return Job(self.bundle, self.memory, request, self.run, limits=self._limits, folder=self._folder)

    def result(self, job: Job) -> Result:
        """What a job gave; it is run to its end where it is not there yet."""
        instance("the job", job, Job, "what pipeline.start(...) gives")
        if job.failure is not None:
            raise job.failure
        for _ in job:
            pass
        if job.frames is None:
            raise Cancelled("the job was stopped before it was done.")
        return Result(
            job.frames, job.references, job.seconds, job.step_seconds, job.seed, self.bundle.manifest.output.fps, job.fallback,
            self.backend.label, self.choice, job.field, tuple(job.notes), tuple(job.approximations),
        )  # fmt: skip

    def batch(
        self, requests: Sequence[Request], on_result: Callable[[int, Result], object] | None = None
    ) -> list[Result]:
        """Answer several requests, one after the other.

        All are checked before the first is run; then one that fails does not stop the others. `BatchError` if any was refused
        or failed: its `results` and `errors` hold what came of each. on_result(place, result) is called as soon as a result is
        there, for whoever wants to keep it whatever happens next (Ctrl-C, a power cut).
        """
        if not isinstance(requests, Sequence):
            raise InputError(f"requests is {shown(requests)}; it must be a list of what pipeline.request(...) makes.")
        if on_result is not None and not callable(on_result):
            raise InputError(f"on_result is {shown(on_result)}; it must be a function of a place and a result.")
        jobs: list[Job] = []
        results: list[Result | None] = [None] * len(requests)
        errors: dict[int, Exception] = {}
        for place, request in enumerate(requests):
            try:
                jobs.append(self.start(request))
            except MotionRTError as error:
                errors[place] = error
        _raise_all("refused, and none was run", results, errors)
        for place, job in enumerate(jobs):
            try:
                result = results[place] = self.result(job)
            except Exception as error:  # whatever it is, it must not take the others' results with it
                errors[place] = error
            else:
                if on_result is not None:
                    on_result(place, result)
        _raise_all("without a result", results, errors)
        return [result for result in results if result is not None]

    def run(self, call: Call, placed: Placed) -> Mapping[str, Any]:
        """Run one call. What is the same in all steps of a loop is put on the graph's device once: `placed` is what was put, by
        graph and port, and is kept by whoever makes the calls."""
        if call.key is not None and call.key in self._kept:
            return self._kept[call.key]
        made = self._ahead(call, placed) if call.ahead else {}
        graph = self.graph(call.graph)
        if not call.loop:  # a table that is made anew, window by window: the one before makes room
            anew = {port.name for port in graph.spec.outputs}
            for place in [place for place in placed if place[1] in anew]:
                del placed[place]
        outputs = graph.run({**_placed(graph, call, placed, call.graph), **made})
        if call.key is not None:
            while len(self._kept) >= _KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[call.key] = outputs
        return outputs

    def _ahead(self, call: Call, placed: Placed) -> dict[str, Any]:
        """What the calls ahead of `call` give it: one after the other, or shared out among the devices, which work at the same
        time."""
        count = min(len(self._beside) + 1, len(call.ahead))
        loaded = [self._on(place % count, one.graph) for place, (one, _) in enumerate(call.ahead)]  # by one thread

        def run(device: int) -> dict[str, Any]:
            given = dict[str, Any]()
            for place in range(device, len(loaded), count):
                (one, names), graph = call.ahead[place], loaded[place]
                made = graph.run(_placed(graph, one, placed, f"{one.graph} {place}"))
                given |= {names.get(port, port): value for port, value in made.items()}
            return given

        if count == 1:
            return run(0)
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(count - 1, "motionrt-beside") as pool:
            others = [pool.submit(run, device) for device in range(1, count)]
            given = run(0)
            return given | {port: value for other in others for port, value in other.result().items()}

    def _on(self, device: int, name: str) -> Checked:
        """Graph `name` on a device, loaded once: the first, or one beside it."""
        if device == 0:
            return self.graph(name)
        if (device, name) not in self._elsewhere:
            self._elsewhere[device, name] = self._beside[device - 1].load(self.bundle, name)
        return self._elsewhere[device, name]

    # --- graphs -------------------------------------------------------------------------------------------------------

    def graph(self, name: str) -> Checked:
        """Graph `name` of the bundle, loaded once; with `low_memory` in the place of the one before it, but for those that
        it takes turns with in a step. Raises `BundleError` for a name that is none, and `BackendError`."""
        self.bundle.graph(name)
        if name not in self._graphs:
            if self.low_memory:
                every = [call for loop in self.bundle.manifest.loops.values() for call in map(loop.calls, loop.ahead)]
                turns = {one.graph for calls in every if name in {one.graph for one in calls} for one in calls}
                self._graphs = {other: graph for other, graph in self._graphs.items() if other in turns}
            self._graphs[name] = self.backend.load(self.bundle, name)
        return self._graphs[name]

    def served(self) -> list[str]:
        """The graphs that a request of this pipeline may run, those with the largest files first."""
        manifest, names = self.bundle.manifest, set[str]()
        if self.memory is not None and manifest.memory is not None:
            names.add(manifest.memory.query)
        for node in manifest.nodes:
            loop = manifest.loops.get(node.graph)
            names |= {node.graph} if loop is None else {*loop.run, *loop.tables}
        return sorted(names, key=lambda name: -(self.bundle.path / self.bundle.graph(name).file).stat().st_size)

    def load(self, workers: int | None = None) -> None:
        """Load every graph that a request runs; with `low_memory` none, because they would not stay.

        workers: graphs that are loaded at once; as many as there are cores if not given. Only a backend that says so
        (`parallel_load`) loads more than one, and only graphs that hold their own weights: what it takes for a moment to
        load those beside a graph, gigabytes each, must not add up.
        """
        workers = usable_cores() if workers is None else whole("workers", workers, 1)
        if self.low_memory:
            return
        names = self.served()
        small = [name for name in names if name not in self._graphs and self.bundle.graph(name).data is None]
        if workers > 1 and len(small) > 1 and self.backend.parallel_load:
            from concurrent.futures import ThreadPoolExecutor

            with ThreadPoolExecutor(workers, "motionrt-load") as pool:
                loaded = pool.map(lambda name: self.backend.load(self.bundle, name), small)
                self._graphs.update(zip(small, loaded, strict=True))
        for name in names:
            self.graph(name)
        ahead = {node.graph for loop in self.bundle.manifest.loops.values() for nodes in loop.ahead.values() for node in nodes}
        for device in range(1, len(self._beside) + 1):
            for name in sorted(ahead):
                self._on(device, name)

    def warm(self) -> None:
        """Load what a request needs, so that the first is as fast as the next: graphs, tokenizers, the memory's index.

        With `low_memory` nothing, because it would not stay.
        """
        if self.low_memory:
            return
        self.load()
        for name in self.bundle.manifest.tokenizers:
            self.bundle.tokenizer(name)
        if self.memory is not None:
            with contextlib.suppress(MemoryStoreError):  # an empty memory: the request will say so
                self.memory.search(self.embed("motion"), 1)

    def embed(self, text: str) -> NDArray[np.float32]:
        """A text as a search vector, float32 [E], of length 1; `InputError` where the bundle searches nothing."""
        spec = self.bundle.manifest.memory
        if spec is None:
            raise InputError(f"bundle '{self.bundle.name}' finds nothing in a motion memory.")
        graph = self.graph(spec.query)
        tokens = self.bundle.tokenize(spec.tokenizer, text)
        (found,) = graph({port.name: tokens[port.name] for port in graph.spec.inputs}).values()
        vector: NDArray[np.float32] = found[0]
        return vector


def _placed(graph: Checked, call: Call, placed: Placed, where: str) -> dict[str, Any]:
    """The inputs of a call of `graph`, those that many calls read put on its device once; `where` tells them apart in
    `placed`."""
    inputs = dict(call.inputs)
    for port, value in inputs.items():
        if isinstance(value, Row) or port in call.fixed:
            whole = value.table if isinstance(value, Row) else value
            before, there = placed.get((where, port), (None, None))
            if before is not whole:
                there = graph.put(port, whole)
                placed[where, port] = whole, there
            inputs[port] = value.of(there) if isinstance(value, Row) else there
    return inputs


def _stops(answer: object) -> bool:
    """Whether a callback returned False, Python's or NumPy's; None and all else go on."""
    return isinstance(answer, bool | np.bool_) and not answer


def _raise_all(what: str, results: list[Result | None], errors: dict[int, Exception]) -> None:
    """`BatchError` if there are errors."""
    if errors:
        place, error = next(iter(errors.items()))
        count = f"{len(errors)} of {len(results)} requests {'is' if len(errors) == 1 else 'are'} {what}"
        raise BatchError(f"{count}; request {place + 1}: {error}", results, errors) from error


def _open_memory(path: str | Path) -> MotionMemory:
    from motionrt.runtime.memory.memory import MotionMemory

    try:
        return MotionMemory.open(Path(path).absolute(), readonly=True)  # the process may change its folder
    except OSError as error:
        raise MemoryStoreError(f"the motion memory {shown(path)} cannot be opened: {error.strerror or error}.") from None
