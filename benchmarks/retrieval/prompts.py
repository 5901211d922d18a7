"""What bench_retrieval asks: prompts of several kinds whose right answer is known, and captions of a larger memory.

phrases.json has, for each kind of motion of the demo, other words for it; everyday.json has for 48 motions of everyday videos
phrases of captions and of prompts, and subjects, scenes and styles that a rule puts together. `tune` is for choosing weights
(whoever wrote it knew how the search works); all else was written without knowing it, and is what is reported.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from motionrt.benchmarks.harness import demo_module

HERE = Path(__file__).resolve().parent


class Prompt(NamedTuple):
    """A prompt, and the name of the motion that it asks for."""

    text: str
    right: str


def _read(name: str) -> dict[str, Any]:
    return dict(json.loads((HERE / name).read_text(encoding="utf-8")))


def kinds() -> list[str]:
    """The kinds of prompts that are reported for the demo's memories, in their order."""
    phrases = next(iter(_read("phrases.json").values()))
    return ["captions", "paraphrases", "typing errors", *(kind for kind in phrases if kind != "tune")]


def of_demo(families: Sequence[str], kind: str, each: int = 3) -> list[Prompt]:
    """Prompts of a kind for motions of the demo: every phrase with `each` subjects, always the same ones."""
    domain, phrases = demo_module("domain"), _read("phrases.json")
    rng = np.random.default_rng([22, len(kind)])
    subjects = [f"a {colour} {shape}" for colour in domain.COLOURS for shape in domain.SHAPES]
    found = []
    for family in families:
        named = domain.FAMILIES[family]
        given = {"captions": [named.phrase], "paraphrases": [named.paraphrase]}
        given["typing errors"] = given["captions"] + given["paraphrases"]
        for phrase in given.get(kind) or phrases[family][kind]:
            for subject in rng.choice(subjects, each, replace=False):
                text = f"{subject} {phrase}"
                found.append(Prompt(mistyped(text, rng) if kind == "typing errors" else text, family))
    return found


def first_of(families: Sequence[str], kind: str) -> dict[str, str]:
    """The first phrase of a kind for each family."""
    phrases = _read("phrases.json")
    return {family: phrases[family][kind][0] for family in families}


def mistyped(text: str, rng: np.random.Generator) -> str:
    """A text with two slips in words of five letters and more: letters swapped, lost, doubled, or a neighbour's struck."""
    rows = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
    words = text.split(" ")
    long = [at for at, word in enumerate(words) if len(word) > 4]
    for at in rng.choice(long, min(2, len(long)), replace=False):
        word = words[at]
        place, slip = int(rng.integers(1, len(word) - 1)), rng.integers(4)
        row = next((row for row in rows if word[place] in row), word[place])
        near = row[min(row.index(word[place]) + 1, len(row) - 1)]
        first, second = word[place], word[place + 1]
        slipped = (second + first, second, first * 2 + second, near + second)[slip]
        words[at] = word[:place] + slipped + word[place + 2 :]
    return " ".join(words)


def everyday_captions() -> list[Prompt]:
    """Captions of a memory: each motion of everyday.json in four wordings with six subjects, half of them in some scene."""
    return list(_composed("memory", 0))


def everyday_prompts(split: str) -> list[Prompt]:
    """Prompts for them, in the words of `split`, "tune" or "report": with a subject, and often a scene or a style."""
    return list(_composed(split, 1))


def _composed(words: str, prompts: int) -> Iterator[Prompt]:
    every = _read("everyday.json")
    scenes, styles, rng = every.pop("_scenes"), every.pop("_styles"), np.random.default_rng([23, prompts])
    for name, motion in every.items():
        for phrase in motion[words]:
            subjects = [rng.choice(motion["subjects"])] if prompts else motion["subjects"]
            for subject in subjects:
                style = rng.choice(styles) if prompts and rng.random() < 0.3 else ""
                scene = f" {rng.choice(scenes)}" if rng.random() < 0.5 else ""
                yield Prompt(f"{style}{phrase.replace('{s}', subject)}{scene}", name)
