"""What does it cost to make a request's motion tokens: reference videos encoded when it is asked, or tokens of the memory?

    .venv-dev/bin/python benchmarks/questions/bench_conditioning.py
    .venv-dev/bin/python benchmarks/questions/bench_conditioning.py --model full-encoders --folder /tmp/encoders --rounds 3

`memory`: search, read the K clips' stored tokens, encode the still, CAMA. `release`: search, decode K videos, encode motion
and appearance of each, encode the still, CAMA. `release_whole` also encodes what the release encodes and needs not: the
still as a video, and the all-grey clip, in every request. All run the same graphs in ONNX Runtime on the same search, from
prompt and pixels to motion tokens. Stored tokens must be what encoding gives, to the rounding of storage, before any time.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from motionrt.benchmarks import harness
from motionrt.benchmarks.pipeline import DEMO, open_pipeline, read_requests
from motionrt.runtime.media.video import decode_clip, read_image
from motionrt.runtime.memory.file import memory_spec
from motionrt.runtime.memory.memory import MotionMemory, Reference
from motionrt.runtime.pipeline import MotionPipeline

K = (1, 2, 4, 8, 9, 16)
TOLERANCE = 5e-3  # of motion tokens, whose rows have unit variance: what is left of the stored tokens' rounding behind CAMA
SLACK = 2e-5  # of a token, relative to the largest: sums in another order, as clips were indexed in batches

Floats = NDArray[np.float32]
Tokens = tuple[Floats, Floats]  # motion and appearance, each [K, M, D]


@dataclass
class Conditioning:
    """One pipeline and its requests; every way answers request after request, in the same order.

    `clips`: the folder that relative sources are in; `chunk`: clips through an encoder at once. `seconds` is by way and
    stage, a list over calls of (seconds, CPU seconds of all threads). `fresh`: tokens of clips that were encoded to check.
    """

    pipeline: MotionPipeline
    requests: Sequence[tuple[str, Floats]]
    clips: Path
    chunk: int
    seconds: dict[str, dict[str, list[tuple[float, float]]]] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    fresh: dict[int, Tokens] = field(default_factory=dict)

    def graph(self, name: str, **inputs: Floats) -> Floats:
        (result,) = self.pipeline.graph(name)(inputs).values()
        return result

    def search(self, prompt: str, k: int) -> list[Reference]:
        """The K clips whose captions are nearest, with their tokens."""
        assert self.pipeline.memory is not None
        return self.pipeline.memory.search(self.pipeline.embed(prompt), k, text=prompt)

    def decode(self, reference: Reference) -> Floats:
        """The reference's frames [F, 3, H, W] as they were indexed."""
        size, end = memory_spec(self.pipeline.bundle).clip, reference.metadata.get("end_sec")
        path = self.clips / reference.source
        limit = None if end is None else float(end)
        return decode_clip(path, size.frames, size.height, size.width, size.fps, reference.start, limit).video

    def encode(self, name: str, port: str, items: Sequence[Floats]) -> Floats:
        """Tokens [n, M, D] of clips or stills, `chunk` at once."""
        parts = [np.stack(items[at : at + self.chunk]) for at in range(0, len(items), self.chunk)]
        return np.concatenate([self.graph(name, **{port: part}) for part in parts])

    def cama(self, motion: Floats, appearance: Floats, still: Floats) -> Floats:
        return self.graph("cama", reference_motion=motion[None], reference_appearance=appearance[None], appearance=still)

    def run(self, way: str, k: int) -> dict[str, Floats]:
        """Motion tokens [1, M, D] of the way's next request, from prompt and still."""
        number = self.calls.get(way, 0)
        self.calls[way] = number + 1
        prompt, still = self.requests[number % len(self.requests)]
        clock = Clock(self.seconds.setdefault(way, {}))
        references = self.search(prompt, k)
        clock("search")
        if way == "memory":
            motion, appearance = stored(references)
            target = self.graph("appearance", image=still[None])
            clock("appearance")
        else:
            videos = [self.decode(reference) for reference in references]
            clock("decode")
            grey = np.zeros_like(videos[0])
            more = [np.broadcast_to(still, grey.shape), grey] if way == "release_whole" else []
            motion = self.encode("motion", "video", [*videos, *more])[:k]
            clock("motion")
            every = self.encode("appearance", "image", [*(video[0] for video in videos), still])
            appearance, target = every[:k], every[k:]
            clock("appearance")
        result = {"motion": self.cama(motion, appearance, target)}
        clock("cama")
        return result

    def encoded(self, references: Sequence[Reference]) -> Tokens:
        """Tokens of the references' videos, each encoded once, by itself."""
        for reference in references:
            if reference.id not in self.fresh:
                video = self.decode(reference)[None]
                tokens = self.graph("motion", video=video), self.graph("appearance", image=video[:, 0])
                self.fresh[reference.id] = tokens
        motion, appearance = zip(*(self.fresh[reference.id] for reference in references), strict=True)
        return np.concatenate(motion), np.concatenate(appearance)

    def check(self, k: int) -> dict[str, Any]:
        """Every request's stored tokens against fresh ones; ParityError above the rounding of storage."""
        worst, same, values, exact = 0.0, 0, 0, True
        for prompt, still in self.requests:
            references = self.search(prompt, k)
            fresh, kept = self.encoded(references), stored(references)
            rounded = tuple(value.astype(np.float16).astype(np.float32) for value in fresh)
            for name, ours, theirs, nearest in zip(("motion", "appearance"), kept, fresh, rounded, strict=True):
                allowed = half_ulp(theirs, kind(self.pipeline)) + SLACK * np.abs(theirs).max()
                gap = np.abs(ours - theirs)
                if not (gap <= allowed).all():
                    raise harness.ParityError(
                        f"stored {name} tokens of {[r.id for r in references]} differ from fresh ones by {gap.max():.3g}, more "
                        "than storage rounds. Are the videos those that were indexed, and with this bundle?"
                    )
                worst, same, values = max(worst, float(gap.max())), same + int((ours == nearest).sum()), values + ours.size
            target = self.graph("appearance", image=still[None])
            exact &= np.array_equal(self.cama(*kept, target), self.cama(rounded[0], rounded[1], target))
        return {
            "stored_as": kind(self.pipeline), "max_abs_difference": worst, "equal_after_rounding": same / values,
            "motion_bit_for_bit": exact, "requests": len(self.requests),
        }  # fmt: skip


class Clock:
    """Adds the seconds, and CPU seconds, since it was made or last called to a stage."""

    def __init__(self, stages: dict[str, list[tuple[float, float]]]) -> None:
        self.stages, self.last, self.cpu = stages, perf_counter(), process_time()

    def __call__(self, stage: str) -> None:
        now, cpu = perf_counter(), process_time()
        self.stages.setdefault(stage, []).append((now - self.last, cpu - self.cpu))
        self.last, self.cpu = perf_counter(), process_time()


def stored(references: Sequence[Reference]) -> Tokens:
    """The references' tokens as CAMA takes them."""
    return np.stack([r.record["motion"] for r in references]), np.stack([r.record["appearance"] for r in references])


def kind(pipeline: MotionPipeline) -> str:
    """How the memory keeps tokens."""
    assert isinstance(pipeline.memory, MotionMemory)
    return pipeline.memory.stats().tokens


def half_ulp(values: Floats, tokens: str) -> Floats:
    """What rounding to storage may change: half a unit in the last place of float16, or half an int8 step of the row."""
    if tokens == "int8":
        steps: Floats = np.abs(values).max(axis=-1, keepdims=True) / 254 * np.ones_like(values)
        return steps
    spacing: Floats = np.spacing(np.abs(values).astype(np.float16)).astype(np.float32)
    return spacing * np.float32(0.5)


def measure(work: Conditioning, ways: Sequence[str], k: int, warmups: int, rounds: int) -> harness.Comparison:
    """Parity first, then all ways in turns on the same requests."""
    work.calls.clear()
    candidates = {way: (lambda way=way: work.run(way, k)) for way in ways}
    result = harness.compare(candidates, reference="memory", tolerance=TOLERANCE, warmups=warmups, rounds=rounds)
    for stages in work.seconds.values():
        for values in stages.values():
            del values[:-rounds]  # parity and warm-ups are not timed
    return result


def fit(points: Mapping[int, float]) -> dict[str, Any]:
    """Least squares of ms = fixed + per_reference K, and how far the worst point is from it, relative."""
    k, ms = np.array(list(points)), np.array(list(points.values()))
    slope, fixed = (float(value) for value in np.polyfit(k, ms, 1))
    worst = float(np.abs(slope * k + fixed - ms).max() / ms.max())
    return {"fixed_ms": fixed, "per_reference_ms": slope, "residual": worst, "k": k.tolist(), "p50_ms": ms.tolist()}


def full_requests(height: int, width: int) -> list[tuple[str, Floats]]:
    """Two requests at full size."""
    from motionrt.benchmarks.models.encoder_bundle import moving_picture

    stills = [moving_picture(100 + number, 1, (height, width))[0] for number in range(2)]
    prompts = ("a kite drifts to the left in the wind", "a dog that runs to the camera")
    return [(prompt, read_image(still, height, width)) for prompt, still in zip(prompts, stills, strict=True)]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("demo", "full-encoders"), default="demo")
    parser.add_argument("--folder", type=Path, help="full-encoders: where its bundle, videos and memory are made, and kept")
    parser.add_argument(
        "--videos", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="full-encoders: of the reference videos, else 480 720"
    )
    parser.add_argument("--bundle", type=Path, default=DEMO / "bundle")
    parser.add_argument("--memory", type=Path, default=DEMO / "memory")
    parser.add_argument("--clips", type=Path, help="folder that the memory's relative sources are in (default: beside it)")
    parser.add_argument("--prompts", type=Path, default=DEMO / "prompts.json")
    parser.add_argument("--k", type=int, nargs="+", default=list(K))
    parser.add_argument("--chunk", type=int, default=1, help="clips through an encoder at once, in the release's way")
    harness.add_options(parser, rounds=30, warmups=2, threads=1)
    options = parser.parse_args(arguments)
    full = options.model == "full-encoders"
    if full and options.folder is None:
        parser.error("--model full-encoders needs --folder, with room for 3 GB")
    if full:
        from motionrt.benchmarks.models.encoder_bundle import prepare

        place = prepare(options.folder, 12, options.threads, lambda text: print(text, flush=True), options.videos)
        options.bundle, options.memory = options.folder / "bundle", place / "memory"
    with open_pipeline(options.bundle, options.memory, threads=options.threads) as pipeline:
        clip = memory_spec(pipeline.bundle).clip
        size = clip.height, clip.width
        listed = [item.inputs for item in read_requests(options.prompts)]
        requests = full_requests(*size) if full else [(item["prompt"], read_image(item["image"], *size)) for item in listed]
        clips = (options.clips or options.memory.parent).absolute()
        work = Conditioning(pipeline, requests, clips, options.chunk)
        report(work, options)


def report(work: Conditioning, options: argparse.Namespace) -> None:
    """Measure every K that CAMA takes, print and append rows."""
    clip = memory_spec(work.pipeline.bundle).clip
    taken = next(p for p in work.pipeline.bundle.graph("cama").inputs if p.name == "reference_motion").dims[1]
    assert isinstance(work.pipeline.memory, MotionMemory)
    name = options.model if options.model != "demo" else work.pipeline.bundle.name
    shared = {
        "model": name, "what": "conditioning", "shape": [clip.frames, 3, clip.height, clip.width], "dtype": "float32",
        "videos": options.videos, "threads": options.threads, "clips": len(work.pipeline.memory), "note": options.note,
    }  # fmt: skip
    points: dict[str, dict[int, float]] = {}
    for k in options.k:
        if not taken.min <= k <= taken.max:
            print(f"K = {k}: not run: CAMA of {name} takes {taken.min} to {taken.max} references")
            continue
        tokens = work.check(k)
        ways = ("memory", "release", "release_whole")
        result = measure(work, ways, k, options.warmups, options.rounds)
        cpu: dict[str, float] = {}
        for way in ways:
            medians = {stage: np.median(times, axis=0) * 1e3 for stage, times in work.seconds[way].items()}
            stages = {stage: float(wall) for stage, (wall, _) in medians.items()}
            cpu[way] = sum(float(used) for _, used in medians.values())
            row = {**result.row(way), **shared, "k": k, "chunk": options.chunk, "stages_ms": stages, "tokens": tokens}
            row["cpu_ms"] = cpu[way]
            ratio = ""
            if way != "memory":
                over = result.ratio(way, "memory")
                row["over_memory"] = over.as_row()
                row["cpu_over_memory"] = cpu[way] / cpu["memory"]
                ratio = f" = {over} of memory, in CPU time {row['cpu_over_memory']:.1f}x"
            harness.append_row("bench_conditioning", row, folder=options.results)
            points.setdefault(way, {})[k] = row["p50_ms"]
            parts = ", ".join(f"{stage} {ms:.1f}" for stage, ms in stages.items())
            print(f"K = {k} {way:>13}: p50 {row['p50_ms']:.1f} ms{ratio} ({parts})", flush=True)
        print(f"K = {k} tokens: {tokens}", flush=True)
    for way, p50 in points.items():
        if len(p50) > 2:
            line = fit(p50)
            row = {**shared, "backend": way, "what": "fit", "axis": "k", **line}
            harness.append_row("bench_conditioning", row, folder=options.results)
            print(f"{way}: {line['fixed_ms']:.2f} ms + {line['per_reference_ms']:.2f} ms x K, residual {line['residual']:.1%}")


if __name__ == "__main__":
    main()
