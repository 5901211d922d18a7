"""MotionPipeline: one still image and a prompt in, frames out. The way of a request, stage by stage."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from motionrt.runtime.backends.auto import Choice, choose
from motionrt.runtime.backends.onnxruntime import Array, Backend, Graph, call, fetch
from motionrt.runtime.backends.open import RunOptions, open_backend
from motionrt.runtime.bundle.bundle import Bundle, Solver
from motionrt.runtime.decode import decode_video, to_frames
from motionrt.runtime.errors import Cancelled, InputError, MemoryStoreError
from motionrt.runtime.loop import sample
from motionrt.runtime.media.video import read_image
from motionrt.runtime.noise import check_seed, noise
from motionrt.runtime.references import choose_references
from motionrt.runtime.request import STAGES, Prepared, Request, Result, check_guidance, check_number

if TYPE_CHECKING:
    from PIL import Image

    from motionrt.runtime.memory.memory import MotionMemory, Reference
    from motionrt.runtime.memory.search import Where
    from motionrt.runtime.memory.set import MemorySet

__all__ = ["STAGES", "MotionPipeline", "Prepared", "Request", "Result"]
_CACHED_SCHEDULES, _CACHED_ON_DEVICE = 8, 2  # a large model's tables are hundreds of megabytes
# Slowest first: text_query brings the largest weights where the rest is small, the step where it is not.
_LOADED = ("text_query", "step", "text", "decode", "decode_next", "appearance", "cama", "encode", "schedule", "request")
_ENCODER_DRAW = 1 << 40  # the index of the encoder's noise: behind that of any step


class MotionPipeline:
    """Answers requests with one bundle, one backend and (unless references are given by hand) one motion memory.

    Not safe to call from several threads at once; open one pipeline for each.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        memory: MotionMemory | MemorySet | None = None,
        *,
        low_memory: bool = False,
    ) -> None:
        self.bundle = bundle
        self.low_memory = low_memory
        self.memory = memory
        self.backend = backend
        self._graphs: dict[str, Graph] = {}
        self._schedules: dict[tuple[str, int], dict[str, Any]] = {}
        self._owns_memory = False
        self.choice: str | None = None  # why this backend, where it was left to "auto"
        if memory is not None:
            memory.check(bundle.digests)

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
    ) -> MotionPipeline:
        """Open the bundle directory `path` and the motion memory (a directory, opened read-only, or an open memory or set).

        `backend`: an open one, what `choose` chose, or a name: one of `backends.BACKENDS`, the first if not given (with
        `threads`, `device` and `precision` as in `RunOptions`), or "auto": the fastest that runs here, and `Result.choice`
        says why. Graphs are loaded when they are first needed, and kept; with `low_memory` each makes room for the next: a
        request takes no more than the largest graph needs, and longer by the time that loading takes. Raises `BundleError`,
        `MemoryStoreError` (missing, damaged, made for another bundle), `BackendError`, `InputError`.
        """
        for given, value in (("threads", threads), ("device", device), ("precision", precision)):
            if value is not None and backend is not None and not isinstance(backend, str):
                what = "the default backend or one by name"
                raise InputError(f"{given} is for {what}; give it to the backend that you pass instead.")
        bundle = Bundle.open(path)
        if backend == "auto":
            backend = choose(bundle, device=device, threads=threads, precision=precision)
        elif backend is None or isinstance(backend, str):
            backend = open_backend(RunOptions(backend or RunOptions.backend, device, threads, precision=precision))
        choice = backend if isinstance(backend, Choice) else None
        runs = backend.backend if isinstance(backend, Choice) else backend
        if not isinstance(memory, str | Path):
            return cls(bundle, runs, memory, low_memory=low_memory)._chosen(choice)
        from motionrt.runtime.memory.memory import MotionMemory

        opened = MotionMemory.open(Path(memory), readonly=True)
        try:
            pipeline = cls(bundle, runs, opened, low_memory=low_memory)
        except BaseException:
            opened.close()
            raise
        pipeline._owns_memory = True
        return pipeline._chosen(choice)

    def _chosen(self, choice: Choice | None) -> MotionPipeline:
        if choice is not None:
            self.choice, self._graphs = choice.why, {} if self.low_memory else dict(choice.graphs)
        return self

    def close(self) -> None:
        """Close the memory if this pipeline opened it."""
        if self._owns_memory and self.memory is not None:
            self.memory.close()

    def __enter__(self) -> MotionPipeline:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def graph(self, name: str) -> Graph:
        """Graph `name` of the bundle, loaded once; with `low_memory` in the place of the one before it."""
        if name not in self._graphs:
            if self.low_memory:
                self._graphs.clear()
            self._graphs[name] = self.backend.load(self.bundle, name)
        return self._graphs[name]

    def load(self, workers: int | None = None) -> None:
        """Load every graph that a request runs; with `low_memory` none, because they would not stay.

        workers: graphs that are loaded at once; as many as there are cores if not given. Only a backend that says so
        (`parallel_load`) loads more than one, and only graphs that hold their own weights: what it takes for a moment to
        load those beside a graph, gigabytes each, must not add up.
        """
        if self.low_memory:
            return
        names = [name for name in _LOADED if name in self.bundle.graphs and (name != "text_query" or self.memory is not None)]
        small = [name for name in names if name not in self._graphs and self.bundle.graph(name).data is None]
        workers = workers or os.cpu_count() or 1
        if workers > 1 and len(small) > 1 and getattr(self.backend, "parallel_load", False):
            from concurrent.futures import ThreadPoolExecutor

            with ThreadPoolExecutor(workers, "motionrt-load") as pool:
                loaded = pool.map(lambda name: self.backend.load(self.bundle, name), small)
                self._graphs.update(zip(small, loaded, strict=True))
        for name in names:
            self.graph(name)

    def warm(self) -> None:
        """Load what a request needs, so that the first is as fast as the next: graphs, tokenizers, the memory's index.

        With `low_memory` nothing, because it would not stay.
        """
        if self.low_memory:
            return
        self.load()
        for name in ("text", "text_query"):
            if name in self._graphs:
                self.bundle.tokenizer(name)
        if self.memory is not None:
            with contextlib.suppress(MemoryStoreError):  # an empty memory: the request will say so
                self.memory.search(self.embed("motion"), 1)

    def __call__(
        self,
        image: str | os.PathLike[str] | Image.Image | NDArray[np.uint8],
        prompt: str,
        *,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | Sequence[float] | None = None,
        motion_scale: float = 1.0,
        references: int | Sequence[Reference | int] | None = None,
        negative_prompt: str = "",
        solver: str | None = None,
        minimum_score: float | None = None,
        where: Where | None = None,
        diversity: float | None = None,
        distinct: float | None = None,
        callback: Callable[[int, int], object] | None = None,
    ) -> Result:
        """Generate a video from a still `image` (file, Pillow image or uint8 array) and a `prompt`.

        steps, guidance, solver: None takes the bundle's default; guidance may also be one number for each step, such as
        `sampler.dynamic_guidance` gives. motion_scale: strength of the retrieved motion; 0 is
        exactly the base model, and then nothing is retrieved. references: how many clips to retrieve, or the clips
        themselves (`Reference`, or ids of clips in the memory), most similar first. minimum_score, where, diversity,
        distinct: which clips may be retrieved, as in `MotionMemory.search`; if none passes, the video is that of
        motion_scale=0, and `Result.fallback` says so. callback(step, steps) is called
        after each step; returning False stops with `Cancelled`. Same seed, bundle and memory: the same frames.
        Raises `InputError`, `MediaError`, `MemoryStoreError`, `BackendError`.
        """
        request = Request(
            image, prompt, seed, steps, guidance, motion_scale, references, negative_prompt, solver,
            minimum_score, where, diversity, distinct,
        )  # fmt: skip
        return self._run(request, callback)

    def batch(self, requests: Sequence[Request]) -> list[Result]:
        """Answer several requests, in turn; each result is what the request would get alone."""
        for request in requests:
            self._check(request)
        return [self._run(request, None) for request in requests]

    def _check(self, request: Request) -> None:
        """Refuse before any work what can be told without it."""
        check_seed(request.seed)
        check_number("motion_scale", request.motion_scale)
        rows = self.bundle.solver(request.solver, request.steps)
        if request.guidance is not None:
            check_guidance(request.guidance, rows.steps)

    def _run(self, request: Request, callback: Callable[[int, int], object] | None) -> Result:
        self._check(request)
        return self.generate(
            self.prepare(request),
            seed=request.seed,
            steps=request.steps,
            guidance=request.guidance,
            solver=request.solver,
            callback=callback,
        )

    def generate(
        self,
        prepared: Prepared,
        *,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | Sequence[float] | None = None,
        solver: str | None = None,
        callback: Callable[[int, int], object] | None = None,
    ) -> Result:
        """The loop and the decoder, on what `prepare` or `condition` gave; arguments as in `__call__`.

        What was prepared can be generated from again, with another seed or schedule; `seconds` includes preparing.
        """
        seed = check_seed(seed)
        rows = self.bundle.solver(solver, steps)
        guidance = self.bundle.guidance if guidance is None else guidance
        check_guidance(guidance, rows.steps)
        seconds = dict(prepared.seconds)
        start = time.perf_counter()
        tables = self.schedule(rows)
        seconds["schedule"] += time.perf_counter() - start
        step, shape = self.graph("step"), (1, *self.bundle.model.latents)
        step_seconds: list[float] = []
        last = time.perf_counter()

        def on_step(index: int, steps: int) -> None:
            nonlocal last
            now = time.perf_counter()
            step_seconds.append(now - last)
            if callback is not None and callback(index, steps) is False:
                raise Cancelled(f"stopped by the callback after step {index + 1} of {steps}.")
            last = time.perf_counter()  # the caller's own work is not the step's

        latents = sample(
            step,
            latents=noise(seed, 0, shape),
            state=self.select("step", prepared.state),
            tables=tables,
            coefficients=rows.coefficients,
            guidance=np.asarray(guidance, np.float32),
            noise=lambda index: noise(seed, index + 1, shape),
            on_step=on_step,
            fetch=not getattr(step, "resident", False),
        )
        del step  # with `low_memory` the decoder takes its place
        seconds["step"] += sum(step_seconds)
        start = time.perf_counter()
        frames = to_frames(decode_video(self._call, self.bundle, latents))
        seconds["decode"] += time.perf_counter() - start
        return Result(
            frames, prepared.references, seconds, step_seconds, seed, self.bundle.model.fps, prepared.fallback,
            getattr(self.backend, "label", type(self.backend).__name__), self.choice,
        )  # fmt: skip

    def prepare(self, request: Request) -> Prepared:
        """Everything of a request that the loop does not change: text, retrieval, CAMA, image, request graph."""
        check_number("motion_scale", request.motion_scale)
        height, width = self.bundle.model.height, self.bundle.model.width
        prepared = Prepared({}, {}, [])
        with prepared.stage("encode"):
            image = read_image(request.image, height, width)[None]
        text = {}
        if "text" in self.bundle.graphs:  # SVD reads no text: its prompt is for the search alone
            with prepared.stage("text"):
                text = {"text": self._text(request.prompt), "negative_text": self._text(request.negative_prompt)}
        motion: Any = np.zeros((1, *self.bundle.model.motion_tokens), np.float32)
        if request.motion_scale != 0:
            prepared.references = choose_references(request, prepared, self.bundle.model, self.memory, self.embed)
            if not prepared.references:
                prepared.fallback = "no motion: no clip of the motion memory passes" + "".join(
                    f", {name} {value}" for name in ("minimum_score", "where") if (value := getattr(request, name)) is not None
                ).lstrip(",")
        if prepared.references:
            with prepared.stage("appearance"):
                seen = (image + 1) / 2 if self.bundle.target_range == "released" else image
                appearance = self._call("appearance", {"image": seen})["appearance"]
            with prepared.stage("cama"):
                stacked = {
                    "reference_motion": np.stack([r.motion for r in prepared.references])[None],
                    "reference_appearance": np.stack([r.appearance for r in prepared.references])[None],
                }
                tokens = {name: value.astype(np.float32, copy=False) for name, value in stacked.items()}
                motion = self._call("cama", {**tokens, "appearance": appearance})["motion"]
        with prepared.stage("encode"):
            arrays = {"image": image}
            for port in self.bundle.graph("encode").inputs:
                if port.name == "noise":
                    arrays["noise"] = noise(request.seed, _ENCODER_DRAW, [dim.opt for dim in port.dims])
            encoded = self._call("encode", arrays)
        prepared.inputs = {
            **text,
            "motion": motion,
            **encoded,
            "motion_scale": np.asarray([request.motion_scale if prepared.references else 0], np.float32),
        }
        return self.condition(prepared)

    def condition(self, prepared: Prepared) -> Prepared:
        """Compute the state from `prepared.inputs`; call it again after changing one of them (such as `motion`)."""
        prepared.state = dict(prepared.inputs)
        if "request" in self.bundle.graphs:  # a step that hoists nothing has no request graph
            with prepared.stage("request"):
                prepared.state |= self._call("request", self.select("request", prepared.inputs))
        return prepared

    def text(self, prompt: str) -> Array:
        """The prompt as text tokens, float32 [1, Lt, Dt]; `InputError` if it is longer than the tokenizer takes."""
        text: Array = fetch(self._text(prompt))
        return text

    def _text(self, prompt: str) -> Any:
        return self._call("text", self.select("text", self.bundle.tokenize("text", prompt)))["text"]

    def _call(self, name: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Graph `name`; results stay on its device where they may, and `fetch` brings one to the host."""
        return call(self.graph(name), inputs)

    def embed(self, prompt: str) -> NDArray[np.float32]:
        """The prompt as a search vector, float32 [E], of length 1."""
        inputs = self.select("text_query", self.bundle.tokenize("text_query", prompt))
        embedding: NDArray[np.float32] = self.graph("text_query")(inputs)["embedding"][0]
        return embedding

    def schedule(self, solver: Solver) -> dict[str, Any]:
        """The schedule tables [T, ...] of `solver`, all timesteps in one batch; kept for the next request."""
        key = (solver.name, solver.steps)
        if key not in self._schedules:
            tables: dict[str, Any] = {}
            if "schedule" in self.bundle.graphs:
                tables = self._call("schedule", {"timestep": solver.timesteps})
            on_device = any(getattr(table, "resident", False) for table in tables.values())
            while len(self._schedules) >= (_CACHED_ON_DEVICE if on_device else _CACHED_SCHEDULES):
                del self._schedules[next(iter(self._schedules))]
            self._schedules[key] = tables
        return self._schedules[key]

    def select(self, graph: str, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """Those of `arrays` that `graph` declares as inputs."""
        return {port.name: arrays[port.name] for port in self.bundle.graph(graph).inputs if port.name in arrays}
