"""Does a prompt find clips that move as it says? By vectors, by words, by both, by agreement; and what follows for the video.

    .venv-dev/bin/python benchmarks/retrieval/bench_retrieval.py                   # all that is reported
    .venv-dev/bin/python benchmarks/retrieval/bench_retrieval.py --split tune      # what weights are chosen by: no rows
    .venv-dev/bin/python benchmarks/retrieval/bench_retrieval.py --plot            # the tables of docs/memory.md from the rows

Memories: the demo's two, and one of 1,152 everyday captions that a grammar makes (prompts.py). *right at 1*: the first clip
moves as asked; *right of 4*: the share of the first four. End-point errors are of the demo's 8 steps against the target, as
demo/evaluate.py takes them. Intervals are 95 % bootstraps over prompts or targets. A third of the captions swapped: captions
and vectors of a third of the clips, drawn at random, are exchanged among them. Captions by motion: those that
`motionrt memory add --describe` proposes for the same clips, and no others.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from motionrt.benchmarks import harness
from motionrt.benchmarks.harness import ROOT, demo_module
from motionrt.benchmarks.report import retrieval
from motionrt.benchmarks.report.rows import Report
from motionrt.benchmarks.report.searches import into_docs
from motionrt.benchmarks.retrieval import prompts
from motionrt.benchmarks.retrieval.prompts import Prompt
from motionrt.runtime.bundle.manifest import Part
from motionrt.runtime.indexing.describe import caption_of, facts_of
from motionrt.runtime.indexing.encoders import cut
from motionrt.runtime.media.flow import dense_flow
from motionrt.runtime.memory.file import memory_spec
from motionrt.runtime.memory.memory import Clip, MotionMemory, Reference
from motionrt.runtime.memory.search import POOL, Search
from motionrt.runtime.memory.words import Asked
from motionrt.runtime.pipeline import MotionPipeline

DEMO = ROOT / "demo"
QUESTION = "bench_retrieval"
K = 4
Scores = NDArray[np.float64]
Answer = Callable[[MotionMemory, Prompt], list[Reference]]


class Asking:
    """The ways to search that are compared, for prompts whose vectors are computed once."""

    def __init__(self, pipeline: MotionPipeline) -> None:
        self.pipeline = pipeline
        self._vectors: dict[str, NDArray[np.float32]] = {}
        self.ways: dict[str, Answer] = {
            "vectors": lambda memory, prompt: self.search(memory, prompt, Search(words=0, agreement=0)),
            "words": self.by_words,
            "reciprocal rank": self.by_rank,
            "both": lambda memory, prompt: self.search(memory, prompt, Search(agreement=0)),
            "both, agreement": lambda memory, prompt: self.search(memory, prompt, Search()),
        }

    def vector(self, text: str) -> NDArray[np.float32]:
        if text not in self._vectors:
            self._vectors[text] = self.pipeline.embed(text)
        return self._vectors[text]

    def search(self, memory: MotionMemory, prompt: Prompt, search: Search, count: int = K) -> list[Reference]:
        return memory.search(self.vector(prompt.text), count, search, prompt.text)

    def by_words(self, memory: MotionMemory, prompt: Prompt, count: int = K) -> list[Reference]:
        """By the words' share alone, of all clips."""
        clips = memory.get(memory.ids().tolist())
        with memory._view() as view:
            asked = Asked(prompt.text, memory._words_of(view).vocabulary)
        shares = asked.shares([clip.caption for clip in clips])
        return [clips[at] for at in np.argsort(-shares, kind="stable")[:count]]

    def by_rank(self, memory: MotionMemory, prompt: Prompt) -> list[Reference]:
        """Both lists fused by reciprocal rank (Cormack, Clarke and Buettcher, SIGIR 2009, with its constant of 60)."""
        vectors = self.search(memory, prompt, Search(words=0, agreement=0), min(POOL, len(memory)))
        lists = (vectors, self.by_words(memory, prompt, POOL))
        scores: dict[int, float] = {}
        known = {}
        for found in lists:
            for rank, clip in enumerate(found, 1):
                scores[clip.id] = scores.get(clip.id, 0.0) + 1 / (60 + rank)
                known[clip.id] = clip
        return [known[number] for number in sorted(scores, key=lambda number: (-scores[number], number))[:K]]


def right(found: Sequence[Reference], prompt: Prompt) -> tuple[float, float]:
    """Whether the first clip is of the motion that was asked for, and the share of all."""
    moves = [moves_as(clip) == prompt.right for clip in found]
    return float(moves[0]), float(np.mean(moves))


def moves_as(clip: Reference) -> str:
    """The motion of a clip, by the name of its file: `clips/007_slide_left.mp4`, or the name itself."""
    return Path(clip.source).stem.lstrip("0123456789_")


def everyday(folder: Path, asking: Asking) -> MotionMemory:
    """A memory of everyday captions: vectors and words, no videos."""
    memory = MotionMemory.create(folder, embedding=384, record=[Part("none", "float16", (1,))], fingerprint="", on_demand=True)
    memory.add(
        Clip(text, name, 0.0, 2.0, 8.0, f"{number}", asking.vector(text))
        for number, (text, name) in enumerate(prompts.everyday_captions())
    )
    return memory


def swapped(memory: MotionMemory, folder: Path, asking: Asking, share: float) -> MotionMemory:
    """A memory of the same clips, where `share` of them have each other's captions."""
    clips = memory.get(memory.ids().tolist())
    some = np.random.default_rng(7).choice(len(clips), round(share * len(clips)), replace=False)
    captions = [clip.caption for clip in clips]
    for at, other in zip(some, np.roll(some, 1), strict=True):
        captions[at] = clips[other].caption
    return captioned(memory, folder, asking, captions)


def by_motion(memory: MotionMemory, folder: Path, asking: Asking) -> MotionMemory:
    """A memory of the same clips with the captions that are proposed for how they move, and no others."""
    spec, captions = memory_spec(asking.pipeline.bundle), []
    for clip in memory.get(memory.ids().tolist()):
        decoded = cut(spec, DEMO / clip.source, clip.start, None)
        captions.append(caption_of(facts_of(dense_flow(decoded.video), decoded.fps)))
    return captioned(memory, folder, asking, captions)


def captioned(memory: MotionMemory, folder: Path, asking: Asking, captions: Sequence[str]) -> MotionMemory:
    """A memory of the same clips under other captions."""
    clips, layout = memory.get(memory.ids().tolist()), memory.layout
    made = MotionMemory.create(folder, embedding=layout.embedding, record=layout.record, fingerprint=layout.fingerprint)
    made.add(
        Clip(text, clip.source, clip.start, clip.duration, clip.fps, clip.source_sha256, asking.vector(text), clip.record)
        for clip, text in zip(clips, captions, strict=True)
    )
    return made


def interval(values: Scores) -> list[float]:
    return [float(value) for value in demo_module("figures").interval(values)]


def ask(asking: Asking, memory: MotionMemory, asked: Sequence[Prompt], ways: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Per way: [mean, low, high] of right at 1 and right of 4; and how often it is said that clips stayed behind."""
    found: dict[str, dict[str, Any]] = {}
    for way in ways:
        answers = [asking.ways[way](memory, prompt) for prompt in asked]
        scores = np.array([right(answer, prompt) for answer, prompt in zip(answers, asked, strict=True)])
        found[way] = {"n": len(asked), "right_at_1": interval(scores[:, 0]), "right_of_4": interval(scores[:, 1])}
        if way == "both, agreement":
            found[way]["noted"] = float(np.mean([any(clip.unlike for clip in answer) for answer in answers]))
    return found


def judged(asking: Asking, memory: MotionMemory, asked: Sequence[Prompt], count: int) -> Scores:
    """Of the best `count` clips for each prompt: cosine, words, probability (NaN: not known), and whether it is right [N,4]."""
    return np.array([
        (clip.score, clip.words, clip.probability, moves_as(clip) == prompt.right)
        for prompt in asked for clip in asking.search(memory, prompt, Search(), count)
    ])  # fmt: skip


def fit(parts: Sequence[Scores]) -> Scores:
    """(a, b, c) of `MemorySpec.calibration` for judged clips, each part of the same weight: logistic regression by Newton."""
    weights = np.concatenate([np.full(len(part), 1 / len(part) / len(parts)) for part in parts])
    every = np.concatenate(parts)
    rows, right, found = np.insert(every[:, :2], 0, 1, axis=1), every[:, 3], np.zeros(3)
    for _ in range(50):
        chance = 1 / (1 + np.exp(-rows @ found))
        slope = rows.T @ (weights * (right - chance)) - 1e-5 * found
        found += np.linalg.solve((rows * (weights * chance * (1 - chance))[:, None]).T @ rows + 1e-5 * np.eye(3), slope)
    return found


def bins(found: Scores) -> list[list[float]]:
    """[from, to, how many, mean probability, share that is right] of judged clips."""
    edges, made = np.linspace(0, 1, 6), list[list[float]]()
    for low, high in zip(edges, edges[1:], strict=False):
        some = found[(found[:, 2] >= low) & (found[:, 2] < high + (high == 1))]
        if len(some):
            made.append([round(float(x), 3) for x in (low, high, len(some), some[:, 2].mean(), some[:, 3].mean())])
    return made


def errors(asking: Asking, memory: MotionMemory, split: Any, count: int, say: Callable[[Any], str], search: Search) -> Scores:
    """End-point errors [count] px of the demo's targets, whose prompts `say` makes."""
    evaluate, domain = demo_module("evaluate"), demo_module("domain")
    found = []
    for index, spec in enumerate(evaluate.targets(split, count)):
        truth, text = domain.render(spec)[0], say(spec)
        references = memory.search(asking.vector(text), K, search, text)
        frames = asking.pipeline(truth[0], text, seed=index, references=references).frames
        found.append(evaluate.measure(frames, truth, spec)[0])
    return np.array(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", choices=("report", "tune"), default="report")
    parser.add_argument("--targets", type=int, default=100, help="clips per end-point error; 0: none")
    parser.add_argument("--plot", action="store_true", help="write the tables of the rows that there are, and measure nothing")
    parser.add_argument("--results", type=Path, default=harness.RESULTS)
    options = parser.parse_args()
    if options.plot:
        tables = "\n".join(retrieval.found(Report(options.results)))
        return into_docs("retrieval", "benchmarks/retrieval/bench_retrieval.py --plot", tables, ROOT / "docs" / "memory.md")
    domain, evaluate = demo_module("domain"), demo_module("evaluate")
    report = options.split == "report"

    def told(memory: str, asked: str, found: dict[str, dict[str, Any]]) -> None:
        for way, figures in found.items():
            said = "  ".join(f"{name} {figures[name][0]:.3f}" for name in ("right_at_1", "right_of_4"))
            print(f"{memory:32} {asked:16} {way:18} {said}  n {figures['n']}", flush=True)
            if report:
                row = {"memory": memory, "prompts": asked, "way": way, **figures}
                harness.append_row(QUESTION, row, folder=options.results)

    with (
        MotionPipeline.from_bundle(DEMO / "bundle", threads=1) as pipeline, tempfile.TemporaryDirectory() as temporary,
        MotionMemory.open(DEMO / "memory", readonly=True) as seen,
        MotionMemory.open(DEMO / "memory_unseen", readonly=True) as unseen,
    ):  # fmt: skip
        asking, folder = Asking(pipeline), Path(temporary)
        ways = list(asking.ways)
        for name, memory, families in (("demo, seen", seen, domain.SEEN), ("demo, unseen kinds", unseen, domain.UNSEEN)):
            for kind in prompts.kinds() if report else ["captions", "tune"]:
                told(name, kind, ask(asking, memory, prompts.of_demo(families, kind), ways))
            if report:
                every = [prompt for kind in prompts.kinds() for prompt in prompts.of_demo(families, kind)]
                row = {"memory": name, "prompts": "all kinds", "n": len(every), "bins": bins(judged(asking, memory, every, 1))}
                harness.append_row(QUESTION, row, folder=options.results)
            with swapped(memory, folder / f"swapped {name}", asking, 1 / 3) as mixed:
                for kind in ("captions", "paraphrases" if report else "tune"):
                    found = ask(asking, mixed, prompts.of_demo(families, kind), ["vectors", "both", "both, agreement"])
                    told(f"{name}, a third swapped", kind, found)
            if report:
                with by_motion(memory, folder / f"by motion {name}", asking) as proposed:
                    for kind in ("captions", "paraphrases"):
                        found = ask(asking, proposed, prompts.of_demo(families, kind), ["vectors", "both, agreement"])
                        told(f"{name}, captions by motion", kind, found)
        with everyday(folder / "everyday", asking) as memory:
            asked = prompts.everyday_prompts(options.split)
            told("everyday", options.split, ask(asking, memory, asked, ways[:-1]))
            if not report:
                tune = {families: prompts.of_demo(families, "tune") for families in (domain.SEEN, domain.UNSEEN)}
                parts = [judged(asking, one, tune[families], K) for one in (seen, unseen) for families in tune]
                print("calibration", fit([*parts, judged(asking, memory, asked, K)]).round(2).tolist())
        if not report or not options.targets:
            return
        for split, memory, families in ((evaluate.SPLITS[0], seen, domain.SEEN), (evaluate.SPLITS[1], unseen, domain.UNSEEN)):
            first = prompts.first_of(families, "synonyms")

            def synonym(spec: Any, first: dict[str, str] = first) -> str:
                return f"a {spec.colour} {spec.shape} {first[spec.family]}"

            say: dict[str, Callable[[Any], str]] = {
                "captions": domain.caption,
                "paraphrases": lambda spec: domain.caption(spec, paraphrase=True),
                "synonyms": synonym,
            }
            with MotionMemory.open(folder / f"swapped demo, {split.name}", readonly=True) as mixed:
                for where, opened in ((f"demo, {split.name}", memory), (f"demo, {split.name}, a third swapped", mixed)):
                    for kind in say if opened is memory else ["captions"]:
                        for way, search in (("vectors", Search(words=0, agreement=0)), ("both, agreement", Search())):
                            values = errors(asking, opened, split, options.targets, say[kind], search)
                            row = {"memory": where, "prompts": kind, "way": way, "n": len(values), "epe_px": interval(values)}
                            print(row, flush=True)
                            harness.append_row(QUESTION, row, folder=options.results)


if __name__ == "__main__":
    main()
