"""benchmarks/harness.py: no times without parity, fair turns, honest intervals, rows that are only appended."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from motionrt.benchmarks import harness

PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "harness.py"



def test_clock_waits_on_both_sides_of_each_timed_call() -> None:
    calls: list[str] = []
    seconds = harness.clock(lambda: calls.append("call"), rounds=2, warmups=1, wait=lambda: calls.append("wait"))
    assert calls == ["call", *["wait", "call", "wait"] * 2]
    assert seconds.shape == (2,) and (seconds >= 0).all()


def constant(value: float, calls: list[str] | None = None, name: str = "") -> Any:
    def call() -> dict[str, np.ndarray]:
        if calls is not None:
            calls.append(name)
        return {"y": np.full((2, 3), value, np.float32)}

    return call


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (lambda: {"y": np.full((2, 3), 1.01, np.float32)}, "differs from plain by 0.01"),
        (lambda: {"y": np.full((2, 3), np.nan, np.float32)}, "not finite"),
        (lambda: {"y": np.full((2, 3), np.inf, np.float32)}, "not finite"),
        (lambda: {"y": np.ones((3, 2), np.float32)}, r"is \(3, 2\)"),
        (lambda: {"z": np.ones((2, 3), np.float32)}, r"\['z'\]"),
    ],
    ids=["value", "nan", "inf", "shape", "name"],
)
def test_compare_times_nothing_without_parity(other: Any, said: str) -> None:
    calls: list[str] = []
    with pytest.raises(harness.ParityError, match=said):
        harness.compare({"plain": constant(1.0, calls), "other": other}, reference="plain", tolerance=1e-3)
    assert len(calls) == 1, "only the parity call may have run"


def test_compare_takes_turns_after_warming_up() -> None:
    calls: list[str] = []
    candidates = {name: constant(1.0, calls, name) for name in "abc"}
    result = harness.compare(candidates, reference="a", tolerance=0.0, warmups=2, rounds=20)
    timed = calls[3 * (1 + 2) :]
    rounds = [tuple(timed[i : i + 3]) for i in range(0, len(timed), 3)]
    assert len(rounds) == 20 and all(sorted(each) == ["a", "b", "c"] for each in rounds)
    assert len(set(rounds)) > 1, "the order must change, or one candidate always follows the same neighbour"
    assert all(len(seconds) == 20 and (seconds > 0).all() for seconds in result.seconds.values())


def test_compare_keeps_the_parity_outputs_of_a_candidate_that_reuses_its_buffer() -> None:
    buffer = np.zeros(4, np.float32)

    def fill(value: float) -> Any:
        def call() -> dict[str, np.ndarray]:
            buffer[:] = value
            return {"y": buffer}

        return call

    with pytest.raises(harness.ParityError):
        harness.compare({"one": fill(1.0), "two": fill(2.0)}, reference="one", tolerance=0.5)


@pytest.mark.parametrize("arguments", [{"reference": "x"}, {"rounds": 0}, {"warmups": -1}], ids=str)
def test_compare_refuses_arguments_that_give_no_result(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        harness.compare({"a": constant(1.0)}, **{"reference": "a", "tolerance": 0.0, **arguments})


def comparison(**seconds: Any) -> Any:
    arrays = {name: np.asarray(value, np.float64) for name, value in seconds.items()}
    return harness.Comparison("a", 0.0, 1, dict.fromkeys(arrays, 0.0), arrays)


def test_ratio_is_exact_for_paired_times_under_shared_noise() -> None:
    noise = np.random.default_rng(3).uniform(1, 5, 40)
    ratio = comparison(a=2 * noise, b=noise).ratio("a", "b")
    assert ratio.as_row() == pytest.approx([2.0, 2.0, 2.0])
    assert str(ratio) == "2.00x [2.00, 2.00]"


def test_a_ratio_of_fewer_than_ten_rounds_has_no_interval() -> None:
    for rounds, said in ((9, "2.00x"), (10, "2.00x [2.00, 2.00]")):
        assert str(comparison(a=2 * np.ones(rounds), b=np.ones(rounds)).ratio("a", "b")) == said
    assert comparison(a=2 * np.ones(9), b=np.ones(9)).ratio("a", "b").as_row() == 2.0


@given(st.lists(st.tuples(st.floats(1e-6, 1e3), st.floats(1e-6, 1e3)), min_size=10, max_size=16))
def test_ratio_interval_is_ordered_and_turns_over_with_its_arguments(pairs: list[tuple[float, float]]) -> None:
    above, below = zip(*pairs, strict=True)
    result = comparison(a=above, b=below)
    there, back = result.ratio("a", "b", resamples=50), result.ratio("b", "a", resamples=50)
    low, high = there.interval
    assert 0 < low <= high
    assert there.value * back.value == pytest.approx(1.0)


def test_summary_is_in_milliseconds() -> None:
    got = harness.summary(np.arange(1, 102) / 1000)
    assert got == pytest.approx({"n": 101, "p50_ms": 51.0, "p95_ms": 96.0, "p99_ms": 100.0})
    assert harness.times(got) == "p50 51.00 ms, p95 96.00 ms, p99 100.00 ms, n 101"
    with pytest.raises(ValueError, match="no times"):
        harness.summary(np.empty(0))


def test_summary_of_fewer_than_a_hundred_has_no_p99() -> None:
    got = harness.summary(np.arange(1, 100) / 1000)
    assert got == pytest.approx({"n": 99, "p50_ms": 50.0, "p95_ms": 94.1})
    assert harness.times(got) == "p50 50.00 ms, p95 94.10 ms, n 99"


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        ({"n": 99, "p99_ms": 1.0}, "has p99_ms from n = 99"),
        ({"n": 9, "over_base": [1.1, 1.0, 1.2]}, "has over_base from n = 9"),
        ({"n": 9, "of_the_step": (0.1, 0.0, 0.2), "p99_ms": 1.0}, "has of_the_step, p99_ms from n = 9"),
        ({"n": 100, "p99_ms": 1.0, "over_base": [1.1, 1.0, 1.2]}, None),
        ({"n": 3, "p99_ms": None, "over_base": 1.1, "shape": [1, 2, 3], "over": "abc"}, None),
    ],
    ids=["p99", "interval", "both", "enough", "few"],
)
def test_append_row_refuses_figures_that_n_does_not_allow(figures: dict[str, Any], said: str | None, tmp_path: Path) -> None:
    if said is None:
        harness.append_row("q", figures, folder=tmp_path)
        return
    with pytest.raises(ValueError, match=said):
        harness.append_row("q", figures, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_append_row_appends_lines_that_read_back(tmp_path: Path) -> None:
    result = harness.compare({"a": constant(1.0)}, reference="a", tolerance=0.0, warmups=0, rounds=2)
    for note in ("first", "second"):
        path = harness.append_row("q", {**result.row("a"), "note": note}, folder=tmp_path / "results")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["note"] for row in rows] == ["first", "second"]
    assert rows[0]["run"] == rows[1]["run"]
    wanted = set("command date commit processor cores versions question n p50_ms p95_ms error".split())
    assert wanted <= rows[0].keys()
    assert rows[0]["versions"]["numpy"] == np.__version__


@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float32(1), {1}], ids=["nan", "inf", "numpy", "set"])
def test_append_row_refuses_what_is_not_plain_json_and_writes_nothing(value: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="plain JSON"):
        harness.append_row("q", {"value": value}, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_machine_names_no_path_or_host() -> None:
    import platform

    text = json.dumps(harness.machine())
    assert str(PATH.parent.parent) not in text
    assert platform.node() == "" or f'"{platform.node()}"' not in text


ROOT = PATH.parent.parent
COMMANDS = {
    "script": (["benchmarks/bench_x.py", "--model", "cogvideox-mid"], "benchmarks/bench_x.py --model cogvideox-mid"),
    "absolute": ([str(PATH), "--results", str(ROOT / "out")], "benchmarks/harness.py --results out"),
    "outside": (["benchmarks/x.py", "--folder", "/tmp/secret/place"], "benchmarks/x.py --folder FOLDER"),
    "outside, equals": (["benchmarks/x.py", "--folder=/tmp/secret"], "benchmarks/x.py --folder=FOLDER"),
    "inside, equals": (["benchmarks/x.py", f"--folder={ROOT}/out"], "benchmarks/x.py --folder=out"),
    "above": (["benchmarks/x.py", "../secret"], "benchmarks/x.py FOLDER"),
    "home": (["benchmarks/x.py", "~/secret"], "benchmarks/x.py FOLDER"),
    "in a note": (["benchmarks/x.py", "--note", "as in /tmp/secret, 1/2"], "benchmarks/x.py --note 'as in FOLDER, 1/2'"),
    "long note": (["benchmarks/x.py", "n" * 5000], f"benchmarks/x.py {'n' * 5000}"),
    "spaces": (["benchmarks/x.py", "/tmp/my secret/x"], "benchmarks/x.py FOLDER"),
    "parent": (["benchmarks/x.py", ".."], "benchmarks/x.py FOLDER"),
    "no path": (["benchmarks/x.py", "--rounds", "3", "", "a/b"], "benchmarks/x.py --rounds 3 '' a/b"),
}  # fmt: skip


@pytest.mark.parametrize(("argv", "wanted"), COMMANDS.values(), ids=list(COMMANDS))
def test_the_command_of_a_row_is_for_the_root_and_names_nothing_outside(
    argv: list[str], wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert harness.command(argv) == f".venv-dev/bin/python {wanted}"


def test_the_command_of_a_row_does_not_depend_on_the_working_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT / "benchmarks")
    assert harness.command(["bench_x.py", "results", "../docs"]) == (
        ".venv-dev/bin/python benchmarks/bench_x.py benchmarks/results docs"
    )


def test_the_command_of_a_row_is_that_of_this_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", [str(Path(sys.executable).parent / "motionrt"), "bench", str(tmp_path)])
    row = json.loads(harness.append_row("q", {}, folder=tmp_path).read_text())
    assert row["command"] == ".venv-dev/bin/motionrt bench FOLDER"
