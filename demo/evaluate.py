"""How good the shipped demo is: `python demo/evaluate.py` (about 15 minutes; `--targets 12` for a look).

Renders targets that no training saw, generates each through the bundle (no PyTorch) with different sources of motion,
and measures against the target:

    EPE    px, tracked end-point error: mean distance over frames 1.. between the sprite's centre and the target's
    PSNR   dB, of the still's object through the clip: aligned on the tracked centre, inside the object (identity kept)
    SSIM   of the box around the object, aligned likewise
    size, turn   mean deviation of the sprite's size (%) and rotation (degrees) from frame 0; every target keeps both

Intervals are 95 % percentile bootstraps over targets. `--keep` writes benchmarks/results/demo_quality.json, docs/demo.png
and the table of the README between its `quality` marks.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import domain
import numpy as np
from figures import ROOT, interval, into_readme
from numpy.typing import NDArray
from run import write_sheet

from motionrt.runtime.cli import show as report
from motionrt.runtime.memory.memory import MotionMemory, Reference
from motionrt.runtime.pipeline import MotionPipeline

HERE = Path(__file__).resolve().parent
RESULT = ROOT / "benchmarks" / "results" / "demo_quality.json"

METRICS = ("epe_px", "psnr_db", "ssim", "size_percent", "turn_degrees")
Frames = NDArray[np.uint8]


@dataclass(frozen=True)
class Split:
    """A set of targets: which families, in whose words the prompt is, and the memory that is asked."""

    name: str
    families: tuple[str, ...]
    memory: str
    paraphrase: bool = False


SPLITS = (
    Split("seen", domain.SEEN, "memory"),
    Split("unseen kinds", domain.UNSEEN, "memory_unseen"),
    Split("seen, paraphrased", domain.SEEN, "memory", paraphrase=True),
    Split("unseen kinds, paraphrased", domain.UNSEEN, "memory_unseen", paraphrase=True),
)


@dataclass(frozen=True)
class Job:
    """A row of the result: a split, where the motion comes from, and what was changed against the shipped files."""

    split: Split
    row: str
    bundle: Path
    change: str = ""
    memories: Path = HERE
    solver: tuple[str, int] | None = None


ROWS = (
    "target itself", "frozen still", "text only", "motion_scale 0", "random references", "top-1 copied",
    "CAMA K=1", "CAMA K=2", "CAMA K=4", "CAMA K=8", "ground-truth tokens",
)  # fmt: skip
SHORT = ("text only", "motion_scale 0", "random references", "top-1 copied", "CAMA K=4")  # of the paraphrased splits
SOLVERS = {"16 steps": ("ddim", 16), "4 steps": ("ddim", 4), "2 steps": ("ddim", 2), "DPM, 8 steps": ("dpm", 8)}


def targets(split: Split, count: int) -> list[Any]:
    """`count` clips (domain.Spec), the families in turn; the same ones at each call, and none of the memory's."""
    rng = np.random.default_rng([2026, SPLITS.index(split) % 2])  # paraphrases ask for the same clips
    return [domain.sample_spec(rng, split.families[i % len(split.families)]) for i in range(count)]


class Lab:
    """A pipeline and the sources of motion that the product does not offer."""

    def __init__(self, bundle: Path, memory: Path, solver: tuple[str, int] | None = None) -> None:
        self.pipeline = MotionPipeline.from_bundle(bundle, memory, threads=1)
        self.solver = solver
        assert isinstance(self.pipeline.memory, MotionMemory)
        self.memory: MotionMemory = self.pipeline.memory
        self.clips = self.memory.get(range(1, len(self.memory) + 1))

    def tokens_of(self, video: NDArray[np.float32]) -> NDArray[np.float32]:
        """A clip [F, 3, H, W] in [-1, 1] -> its motion tokens [1, M, D]."""
        tokens: NDArray[np.float32] = self.pipeline.graph("motion")({"video": video[None]})["motion"]
        return tokens

    def search(self, prompt: str, count: int) -> list[Reference]:
        return self.memory.search(self.pipeline.embed(prompt), count, text=prompt)

    def strangers(self, family: str, rng: np.random.Generator) -> list[Reference]:
        """4 clips of the memory that move in another way."""
        away = [clip for clip in self.clips if family not in clip.source]
        return [away[i] for i in rng.choice(len(away), 4, replace=False)]

    def options(self, row: str, spec: Any, prompt: str, truth: Frames, seed: int) -> dict[str, Any]:
        """What a request says about its motion in one row of the table."""
        if row.startswith("CAMA K="):
            return {"references": int(row.removeprefix("CAMA K="))}
        if row == "random references":
            return {"references": self.strangers(spec.family, np.random.default_rng([7, seed]))}
        if row == "motion_scale 0":
            return {"motion_scale": 0}
        video = truth.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
        if row == "ground-truth tokens":
            motion = self.tokens_of(video)
        elif row == "text only":  # what the denoiser was trained to read as "no motion is given"
            motion = self.tokens_of(np.zeros_like(video))
        elif row == "top-1 copied":
            motion = self.search(prompt, 1)[0].record["motion"][None].astype(np.float32)
        else:
            raise ValueError(f"row is {row!r}; known are {', '.join(ROWS)}.")
        return {"given": {"motion": motion}}

    def generate(self, row: str, spec: Any, prompt: str, truth: Frames, seed: int) -> Frames:
        """Frames uint8 [F, H, W, 3] of a row for one target."""
        if row == "target itself":
            return truth
        if row == "frozen still":
            return np.repeat(truth[:1], len(truth), axis=0)
        solver, steps = self.solver or (None, None)
        options = self.options(row, spec, prompt, truth, seed)
        return self.pipeline(truth[0], prompt, seed=seed, solver=solver, steps=steps, **options).frames


def measure(frames: Frames, truth: Frames, spec: Any) -> list[float]:
    """METRICS of one generated clip."""
    from skimage.metrics import structural_similarity

    centres = domain.track(frames)
    centres = centres + (spec.centres[0] - domain.track(truth)[0])  # from the centre of colour to the sprite's own
    epe = float(np.linalg.norm(centres - spec.centres, axis=1)[1:].mean())
    moved = replace(spec, start=(0.0, 0.0), path=tuple((float(x), float(y)) for x, y in centres))
    wanted, cover = domain.render(moved)
    inside, later = cover > 0.5, slice(1, None)
    square = (frames.astype(np.float64) - wanted)[later][inside[later]] ** 2
    psnr = float(10 * np.log10(255**2 / max(square.mean(), 0.05))) if square.size else 0.0
    reach, likeness = int(np.ceil(spec.radius)) + 3, []
    for index in range(1, len(frames)):
        x, y = (int(np.clip(round(v), reach, domain.SIZE - reach)) for v in centres[index])
        box = np.s_[index, y - reach : y + reach, x - reach : x + reach]
        likeness.append(structural_similarity(frames[box], wanted[box], channel_axis=-1, data_range=255))
    size, turn = domain.size_and_turn(frames, spec.shape)
    return [epe, psnr, float(np.mean(likeness)), 100 * float(np.abs(size - 1).mean()), float(np.abs(turn).mean())]


def run_part(job: tuple[Job, int, Sequence[int]]) -> list[list[float]]:
    """METRICS for some targets of a split in one row: `[len(indices), 5]`. Runs in a process of its own."""
    what, count, indices = job
    split, key = what.split, (what.bundle, what.memories / what.split.memory, what.solver)
    if key not in _labs:
        _labs[key] = Lab(*key)
    specs, out = targets(split, count), []
    for index in indices:
        spec = specs[index]
        truth = domain.render(spec)[0]
        prompt = domain.caption(spec, paraphrase=split.paraphrase)
        out.append(measure(_labs[key].generate(what.row, spec, prompt, truth, index), truth, spec))
    return out


_labs: dict[Any, Lab] = {}


def evaluate(
    jobs: Sequence[Job], count: int, workers: int, progress: Callable[[], object] = lambda: None
) -> list[NDArray[np.float64]]:
    """METRICS `[count, 5]` for each job."""
    parts = np.array_split(np.arange(count), max(workers, 1))
    flat = [(job, count, part.tolist()) for job in jobs for part in parts]
    with ProcessPoolExecutor(workers) as pool:
        done = []
        for result in pool.map(run_part, flat):
            done.append(result)
            progress()
    step = len(parts)
    return [np.array(sum(done[i : i + step], [])) for i in range(0, len(done), step)]


@contextmanager
def int8_weights(bundle: Path) -> Iterator[Path]:
    """A copy of `bundle` whose weights of two and more dimensions lie on a symmetric int8 grid per output row."""
    import onnx
    from onnx import numpy_helper

    from motionrt.runtime.files import sealed, sha256_of

    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "bundle"
        shutil.copytree(bundle, copy)
        manifest = json.loads((copy / "bundle.json").read_text(encoding="utf-8"))
        for entry in manifest["graphs"].values():
            if "weights" in entry:  # the text query encoder's own package
                continue
            model = onnx.load(copy / entry["file"])
            for tensor in model.graph.initializer:
                value = numpy_helper.to_array(tensor)
                if value.ndim >= 2 and value.dtype in (np.float16, np.float32) and value.size >= 256:
                    rows = value.astype(np.float32).reshape(len(value), -1)
                    step = np.maximum(np.abs(rows).max(axis=1, keepdims=True) / 127, 1e-12)
                    rounded = (np.rint(rows / step) * step).reshape(value.shape).astype(value.dtype)
                    tensor.CopyFrom(numpy_helper.from_array(rounded, tensor.name))
            onnx.save(model, copy / entry["file"])
            entry["sha256"] = sha256_of(copy / entry["file"])
        (copy / "bundle.json").write_text(json.dumps(sealed(manifest)), encoding="utf-8")
        yield copy


@contextmanager
def int8_tokens(bundle: Path) -> Iterator[Path]:
    """A folder with both memories made anew, with their tokens kept as int8."""
    command = [sys.executable, "-P", "-m", "motionrt", "memory"]
    with tempfile.TemporaryDirectory() as folder:  # in processes of their own: workers fork from one without ONNX Runtime in it
        for name, clips in (("memory", HERE / "clips"), ("memory_unseen", HERE / "clips_unseen")):
            made = [str(Path(folder) / name), "--bundle", str(bundle)]
            subprocess.run([*command, "create", *made, "--tokens", "int8"], check=True)
            captions = ["--captions", str(clips / "captions.json")]
            subprocess.run([*command, "add", *made, str(clips), *captions], check=True)
        yield Path(folder)


def retrieval(bundle: Path, split: Split, count: int) -> float:
    """Share of the 4 retrieved clips that move as the target does."""
    lab = Lab(bundle, HERE / split.memory)
    hits = []
    for spec in targets(split, count):
        found = lab.search(domain.caption(spec, paraphrase=split.paraphrase), 4)
        hits += [spec.family in clip.source for clip in found]
    return float(np.mean(hits))


def novelty() -> tuple[float, float]:
    """px from each unseen family's path to the nearest of 5000 training paths, smallest and mean over families."""
    rng = np.random.default_rng(5)
    training = [domain.named_path(name) for name in domain.SEEN] + [domain.free_path(rng) for _ in range(5000)]
    every = np.stack(training)
    nearest = [
        float(np.linalg.norm(every - domain.named_path(name), axis=2)[:, 1:].mean(axis=1).min()) for name in domain.UNSEEN
    ]
    return min(nearest), float(np.mean(nearest))


def contact_sheet(bundle: Path, path: Path) -> None:
    """Examples of all splits: the best retrieved clip, generated, generated from the text only, and the target."""
    rows = []
    for split, indices in zip(SPLITS, ((0, 8, 17, 20), (0, 1, 2, 3), (10, 15), ()), strict=True):
        lab, specs = Lab(bundle, HERE / split.memory), targets(split, 24)
        for index in indices:
            spec = specs[index]
            truth, prompt = domain.render(spec)[0], domain.caption(spec, paraphrase=split.paraphrase)
            best = lab.search(prompt, 1)[0]
            clip = next(s for s, number in _memory_specs(split) if f"{number:03d}_" in Path(best.source).name)
            videos = [domain.render(clip)[0]]
            videos += [lab.generate(row, spec, prompt, truth, index) for row in ("CAMA K=4", "text only")]
            rows.append((f"{split.name}: {prompt}", [*videos, truth]))
    write_sheet(path, ("best retrieved clip", "generated (CAMA K=4)", "generated from text only", "target"), rows)


def _memory_specs(split: Split) -> list[tuple[Any, int]]:
    specs = list(domain.reference_specs(split.families))
    return [(spec, number) for number, spec in enumerate(specs)]


def table(result: Mapping[str, Any]) -> str:
    """The README's table: EPE in px with intervals, and what happened to the object."""
    lines = ["| motion from | EPE seen | EPE unseen kinds | object PSNR | object SSIM |", "| --- | --- | --- | --- | --- |"]
    rows = {(row["split"], row["row"]): row for row in result["rows"]}
    for name in ROWS:
        seen, unseen = rows["seen", name], rows["unseen kinds", name]
        bold = "**" if name == "CAMA K=4" else ""
        cells = [f"{r['epe_px'][0]:.1f} [{r['epe_px'][1]:.1f}, {r['epe_px'][2]:.1f}]" for r in (seen, unseen)]
        both = [(seen[metric][0] + unseen[metric][0]) / 2 for metric in ("psnr_db", "ssim")]
        cells += [f"{both[0]:.1f} dB", f"{both[1]:.2f}"] if name not in ROWS[:2] else ["", ""]
        lines.append(f"| {bold}{name}{bold} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=int, default=200, help="clips per split (default 200)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes of one thread each")
    parser.add_argument("--bundle", type=Path, default=HERE / "bundle")
    parser.add_argument("--fp32", type=Path, help="a bundle of the same training with float32 weights, for its row")
    parser.add_argument("--keep", action="store_true", help="write the JSON, the picture and the README's table")
    options = parser.parse_args()
    if options.targets < 4 or options.jobs < 1:
        parser.error("--targets is at least 4 and --jobs at least 1")
    jobs = [Job(s, row, options.bundle) for s in SPLITS for row in (SHORT if s.paraphrase else ROWS)]
    with int8_weights(options.bundle) as weights, int8_tokens(options.bundle) as tokens:
        for split in SPLITS[:2]:
            shipped = Job(split, "CAMA K=4", options.bundle)
            jobs += [replace(shipped, change=name, solver=solver) for name, solver in SOLVERS.items()]
            jobs.append(replace(shipped, change="int8 weights", bundle=weights))
            jobs.append(replace(shipped, change="int8 tokens in the memory", memories=tokens))
            if options.fp32:
                jobs.append(replace(shipped, change="float32 weights", bundle=options.fp32))
        with report.progress() as bars:
            bar = bars.add_task("evaluating", total=len(jobs) * options.jobs)
            scores = evaluate(jobs, options.targets, options.jobs, lambda: bars.advance(bar))
    rows = []
    for job, score in zip(jobs, scores, strict=True):
        row: dict[str, Any] = {"split": job.split.name, "row": job.row, "change": job.change}
        for metric, values in zip(METRICS, score.T, strict=True):
            row[metric] = interval(values)
        rows.append(row)
    manifest = json.loads((options.bundle / "bundle.json").read_text(encoding="utf-8"))
    smallest, mean = novelty()
    result = {
        "command": "python demo/evaluate.py --keep",
        "checkpoint": manifest["provenance"]["checkpoint"],
        "targets_per_split": options.targets,
        "solver": "DDIM, 8 steps, guidance 2, unless changed",
        "interval": "mean, low, high: 95 % percentile bootstrap over targets",
        "retrieved_of_the_same_family": {s.name: round(retrieval(options.bundle, s, options.targets), 4) for s in SPLITS},
        "unseen_path_to_nearest_training_path_px": {"smallest": round(smallest, 2), "mean": round(mean, 2)},
        "rows": rows,
    }
    lines = []
    for row in rows:
        with_interval = [f"{row[m][0]:.2f} [{row[m][1]:.2f}, {row[m][2]:.2f}]" for m in METRICS[:3]]
        plain = [f"{row[m][0]:.1f}" for m in METRICS[3:]]
        lines.append((row["split"], row["row"], row["change"] or "as shipped", *with_interval, *plain))
    columns = ("split", "motion from", "change", "EPE px", "PSNR dB", "SSIM", "size %", "turn deg")
    report.console().print(report.table(f"{options.targets} targets per split", columns, lines, left=3))
    if options.keep:
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        contact_sheet(options.bundle, ROOT / "docs" / "demo.png")
        into_readme("quality", "demo/evaluate.py", table(result))


if __name__ == "__main__":
    sys.exit(main())
