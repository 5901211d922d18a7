"""The committed rows of benchmarks/models/partition_report.py hold the counts that specs and docs state, the newest of each."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
RESULTS = ROOT / "benchmarks" / "results"


def newest(question: str, model: str, frames: int) -> dict[str, Any]:
    lines = (RESULTS / f"{question}.jsonl").read_text(encoding="utf-8").splitlines()
    rows: list[dict[str, Any]] = [row for row in map(json.loads, lines) if (row["model"], row["frames"]) == (model, frames)]
    return rows[-1]


@pytest.mark.parametrize("frames", [17, 49])
def test_cogvideox_counts_what_sees_only_the_timestep_and_the_state_of_a_token_set(frames: int) -> None:
    row = newest("partition_report", "cogvideox-5b-i2v", frames)
    sizes = row["classes"]
    block, ends = 2 * (512 * 18432 + 18432), (3072 * 512 + 512) + (512 * 512 + 512) + (512 * 6144 + 6144)
    assert sizes["schedule"]["parameters"] == 42 * block + ends == 799_259_648  # 799.26 M
    assert sizes["model"]["parameters"] == 6_231_082_560 and sizes["dead"]["parameters"] == 0
    assert sizes["request"]["parameters"] == 42 * (3072 * 3072 + 2 * 3072 * 1024) + 4096 * 3072 + 3072
    assert sum(sizes[kind]["parameters"] for kind in ("step", "request", "schedule", "constant")) == 6_231_082_560
    assert row["rules"]["reassociate"] == 42  # every adapter is folded
    # the request's state: two token sets of 42 x (A [3072, 48 x 25], V [25, 3072]) in bfloat16, the projected texts, the
    # still's latents in float32, once for both halves of the guided batch
    latents = ((frames - 1) // 4 + 1) * 16 * 60 * 90
    folded = row["hoisted_bytes"]["request"] - 2 * 226 * 3072 * 2 - 4 * latents
    assert folded == 2 * 42 * (3072 * 48 * 25 + 25 * 3072) * 2 and round(folded / 2 / 1e6) == 316


def test_svd_counts_its_time_path_frame_positions_and_cross_attentions() -> None:
    row = newest("partition_report", "svd", 16)
    sizes = row["classes"]
    # 56.32 M of the time path (of which fps, bucket and noise level are constants) and 99.19 M of frame positions
    assert sizes["schedule"]["parameters"] + sizes["constant"]["parameters"] == 155_510_118
    assert round(sizes["schedule"]["parameters"] / 1e6, 2) == 53.70
    assert sizes["model"]["parameters"] == 1_562_572_522
    assert row["rules"]["softmax_of_one"] == 32  # all attn2, adapters included
    assert sizes["dead"]["parameters"] == 50_389_760  # their queries and keys
    assert row["hoisted_bytes"]["schedule"] == 2 * 40_320


@pytest.mark.parametrize(("model", "frames"), [("cogvideox-5b-i2v", 17), ("cogvideox-5b-i2v", 49), ("svd", 16)])
def test_memory_plans_are_of_the_same_models(model: str, frames: int) -> None:
    row, counted = newest("memory_plan", model, frames), newest("partition_report", model, frames)
    plan = row["plan"]
    graphs = {graph["name"]: graph for graph in plan["graphs"]}
    assert not plan["unrecorded"] and all(graph["activations"] > 0 for graph in graphs.values())
    for name in ("step", "request", "schedule"):  # tables and folded constants come on top of the parameters
        assert 1 <= graphs[name]["weights"] / counted["classes"][name]["bytes"] < 1.1
    hoisted = counted["hoisted_bytes"]  # as traced: most of it in bfloat16; ports are float32
    assert hoisted["request"] < plan["request_state"] <= 2 * hoisted["request"]
    assert hoisted["schedule"] < plan["schedule_rows"] / plan["steps"] <= 2 * hoisted["schedule"]
    sizes = [(math.prod(json.loads(port.partition(" ")[2])), count) for port, count in row["state"].items()]
    assert all(port.startswith("float32 ") for port in row["state"])
    assert plan["request_state"] == sum(4 * size * count for size, count in sizes)
    assert [line.split(":")[0] for line in row["lines"]] == ["8 GB", "16 GB", "24 GB", "80 GB"]
