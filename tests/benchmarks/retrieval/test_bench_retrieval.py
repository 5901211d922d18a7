"""The benchmark of retrieval: its prompts, its judgement, its fit and its tables."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from motionrt.benchmarks.report import retrieval
from motionrt.benchmarks.report.rows import Report
from motionrt.benchmarks.retrieval import bench_retrieval, prompts
from motionrt.benchmarks.retrieval.prompts import Prompt
from motionrt.runtime.memory.memory import Reference


def test_every_motion_has_prompts_of_every_kind() -> None:
    from domain import SEEN, UNSEEN

    for kind in [*prompts.kinds(), "tune"]:
        asked = prompts.of_demo((*SEEN, *UNSEEN), kind)
        assert {prompt.right for prompt in asked} == {*SEEN, *UNSEEN} and asked == prompts.of_demo((*SEEN, *UNSEEN), kind)
    every = {split: {prompt.text for prompt in prompts.everyday_prompts(split)} for split in ("tune", "report")}
    assert len(prompts.everyday_captions()) == 1152 and not every["tune"] & every["report"]


def test_no_phrase_is_in_two_splits() -> None:
    phrases = prompts._read("phrases.json")
    texts = [(kind == "tune", text) for kinds in phrases.values() for kind, texts in kinds.items() for text in texts]
    split = {tuned: {text for other, text in texts if other == tuned} for tuned in (True, False)}
    assert all(split.values()) and not split[True] & split[False]


def test_slips_are_small() -> None:
    rng = np.random.default_rng(0)
    for text in ("a red star slides straight to the left", "circles around counterclockwise"):
        slipped = [prompts.mistyped(text, rng) for _ in range(20)]
        assert all(abs(len(one) - len(text)) <= 2 and len(one.split()) == len(text.split()) for one in slipped)
        assert sum(one != text for one in slipped) > 15


def test_a_clip_is_right_by_its_file() -> None:
    found = [Reference(n, 0.5, "", f"clips/00{n}_{name}.mp4", 0, 2, {}) for n, name in enumerate(("bob", "bob", "slide_left"))]
    assert bench_retrieval.right(found, Prompt("", "bob")) == (1.0, pytest.approx(2 / 3))
    assert bench_retrieval.moves_as(Reference(1, 0.5, "", "camera_pans_left", 0, 2, {})) == "camera_pans_left"


def test_fit_finds_what_made_the_answers() -> None:
    rng, truth = np.random.default_rng(1), np.array([-3.0, 5.0, 2.0])
    parts = []
    for _ in range(3):
        values = rng.uniform(0, 1, (4000, 2))
        right = rng.random(4000) < 1 / (1 + np.exp(-(truth[0] + values @ truth[1:])))
        parts.append(np.column_stack([values, np.full(4000, np.nan), right]))
    assert np.abs(bench_retrieval.fit(parts) - truth).max() < 0.3


def test_bins_hold_every_clip_once() -> None:
    found = np.array([[0, 0, 0.1, 0], [0, 0, 0.2, 1], [0, 0, 0.95, 1], [0, 0, 1.0, 1]])
    assert bench_retrieval.bins(found) == [[0.0, 0.2, 1, 0.1, 0.0], [0.2, 0.4, 1, 0.2, 1.0], [0.8, 1.0, 2, 0.975, 1.0]]


def test_tables_are_of_the_newest_clean_run(tmp_path: Path) -> None:
    same = {"commit": "abc", "date": "2026-11-29", "processor": "x", "command": "c", "memory": "demo", "prompts": "captions"}
    rows = [
        {**same, "run": "1", "way": "both", "right_at_1": [0.1] * 3, "right_of_4": [0.2] * 3, "n": 3},
        {**same, "run": "2", "way": "both", "right_at_1": [0.9] * 3, "right_of_4": [0.8] * 3, "n": 3},
        {**same, "run": "2", "way": "vectors", "epe_px": [2.5, 2.0, 3.0], "n": 12},
        {**same, "run": "2", "prompts": "all kinds", "n": 4, "bins": [[0.8, 1.0, 4, 0.9, 0.75]]},
    ]
    (tmp_path / "bench_retrieval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = "\n".join(retrieval.found(Report(tmp_path)))
    assert "| demo | captions | - | - | - | 80% (90%) | - | - | 3 |" in text
    assert "2.50 [2.00, 3.00]" in text and "| 80% to 100% | 90% | 75% | 4 |" in text and "20%" not in text.split("80% to")[0]
