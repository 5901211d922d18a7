"""`motionrt replay`: the same frames again, bit for bit, and a plain word where they are not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from motionrt.runtime.serve.client import Client

DEMO = Path(__file__).resolve().parents[3] / "demo"
PLACES = ("-b", DEMO / "bundle", "-m", DEMO / "memory", "--threads", 1)
Run = Callable[..., tuple[int, str, str]]
Write = Callable[..., Path]


@pytest.fixture(scope="module")
def records(served: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Records of jobs: one seed with everything left open, several seeds with everything said, no motion."""
    client = Client(served.url)
    odd = np.random.default_rng(0).integers(0, 256, (50, 31, 3), np.uint8)
    asked: dict[str, dict[str, Any]] = {
        "plain": {},
        "several": {
            "seed": 11, "n": 3, "steps": 5, "solver": "dpm", "motion_scale": 0.4, "guidance": 1.5, "references": 2,
            "negative_prompt": "a blue square", "minimum_score": -1.0, "diversity": 0.3, "output": "gif",
        },
        "by id": {"references": [4, 2], "steps": 3},
        "off": {"motion_scale": 0, "steps": 3},
    }  # fmt: skip
    found = {}
    for name, fields in asked.items():
        still = tmp_path_factory.mktemp("still") / "odd.webp"
        Image.fromarray(odd).save(still, lossless=True)
        job = client.wait(client.create("a red star bounces", still, **fields)["id"])
        found[name] = client.record(job["id"])
    return found


@pytest.fixture
def write(tmp_path: Path, records: dict[str, dict[str, Any]]) -> Write:
    """A record as a file, with changes."""

    def written(name: str, **changes: Any) -> Path:
        path = tmp_path / "record.json"
        path.write_text(json.dumps(records[name] | changes))
        return path

    return written


@pytest.mark.parametrize(("name", "seeds"), [("plain", 1), ("several", 3), ("by id", 1), ("off", 1)])
def test_a_record_gives_the_same_frames_again(run: Run, write: Write, tmp_path: Path, name: str, seeds: int) -> None:
    status, printed, err = run("replay", write(name), *PLACES, "-o", tmp_path / "v.gif")
    assert status == 0, err
    assert "17 frames of 64x64, bit for bit" in printed and len(printed.splitlines()) == 1
    assert ("seeds 11, 12, 13" in printed) == (name == "several")
    made = sorted(path.name for path in tmp_path.glob("*.gif"))
    assert made == (["v.gif"] if seeds == 1 else [f"v-{index}.gif" for index in range(seeds)])


def test_frames_that_differ_are_told_with_their_seed(run: Run, write: Write, records: dict[str, Any]) -> None:
    digests = records["several"]["frames_sha256"]
    status, printed, err = run("replay", write("several", frames_sha256=[digests[0], digests[2], digests[2]]), *PLACES)
    assert (status, printed) == (1, "") and "other frames for seed 12 of 3: bundle and memory are the same" in err
    other = {"frames_sha256": ["0" * 64], "backend": "tensorrt", "batch": {"exact": False}}
    status, _, err = run("replay", write("plain", **other), *PLACES)
    assert status == 1 and "the job ran on tensorrt" in err and "rounds differently" in err


def test_another_memory_is_told_before_the_work_and_taken_only_anyway(
    run: Run, write: Write, records: dict[str, Any], tmp_path: Path
) -> None:
    """Its clips are searched for: those of the record are not in it any more."""
    other = tmp_path / "memory"
    shutil.copytree(DEMO / "memory", other)
    assert run("memory", "remove", other, *records["plain"]["references"])[0] == 0
    record = write("plain")
    status, _, err = run("replay", record, "-b", DEMO / "bundle", "-m", other, "--threads", 1)
    assert status == 2 and "the memory is another one, or has changed" in err and "--anyway" in err
    status, _, err = run("replay", record, "-b", DEMO / "bundle", "-m", other, "--threads", 1, "--anyway")
    assert status == 1 and "the memory is another one" in err
    status, _, err = run("replay", record, "-b", DEMO / "bundle", "--threads", 1)
    assert status == 2 and "had a motion memory, and none is given" in err
    status, _, err = run("replay", write("off"), "-b", DEMO / "bundle", "--threads", 1, "--anyway")
    assert status == 0, err  # it used no clip


def test_another_bundle_is_told(run: Run, write: Write) -> None:
    status, _, err = run("replay", write("plain", bundle_digest="0" * 64), *PLACES)
    assert status == 2 and "the bundle is another one" in err
    assert run("replay", write("plain", bundle_digest="0" * 64), *PLACES, "--anyway")[0] == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"motionrt_record": 2}, "is no record of a job"), ({"fields": []}, "is no record"),
        ({"files": {"image": "data:x"}}, "image"),
        ({"files": {"image": "data:a;base64,%"}}, "is no data URL"), ({"frames_sha256": []}, "it is damaged"),
    ],
)  # fmt: skip
def test_a_damaged_record_is_refused(run: Run, write: Write, change: dict[str, Any], words: str) -> None:
    status, _, err = run("replay", write("plain", **change), *PLACES)
    assert status == 2 and words in err and len(err.splitlines()) == 1
