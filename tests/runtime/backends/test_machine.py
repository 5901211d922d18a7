"""How many cores a process may use, and what becomes of more threads than that."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from motionrt.runtime.backends import machine, onnxruntime
from motionrt.runtime.backends.machine import check_threads, usable_cores
from motionrt.runtime.backends.onnxruntime import OnnxRuntimeBackend
from motionrt.runtime.errors import BackendWarning, InputError

Run = Callable[..., tuple[int, str, str]]
V2, V1 = "0::/pod/box\n", "4:memory:/other\n3:cpuacct,cpu:/pod/box\n0::/\n"
PERIOD = {"cpu/cpu.cfs_period_us": "100000"}


@pytest.mark.parametrize(
    "groups, files, cores",
    [
        (V2, {"cpu.max": "max 100000"}, 8),
        (V2, {"cpu.max": "200000 100000"}, 2),  # in a container its own group is what it sees as the top
        (V2, {"pod/box/cpu.max": "150000 100000"}, 2),  # rounded up
        (V2, {"pod/box/cpu.max": "max 100000", "pod/cpu.max": "300000 100000"}, 3),  # of a group above
        (V2, {"pod/box/cpu.max": "1000 100000"}, 1),
        (V2, {"pod/box/cpu.max": "6400000 100000"}, 8),  # a quota does not make cores
        (V2, {"pod/box/cpu.max": "of another kernel"}, 8),
        (V2, {"pod/box/cpu.max": "1000 0"}, 8),
        (V1, {"cpu/cpu.cfs_quota_us": "-1", **PERIOD}, 8),
        (V1, {"cpu/cpu.cfs_quota_us": "250000", **PERIOD}, 3),
        (V1, {"cpu/pod/box/cpu.cfs_quota_us": "50000", "cpu/pod/box/cpu.cfs_period_us": "50000"}, 1),
        (V1, {"memory/cpu.cfs_quota_us": "1000"}, 8),
        (None, {}, 8),
    ],
)
def test_usable_cores_are_those_that_a_quota_pays_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: str | None, files: dict[str, str], cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    (tmp_path / "proc/self").mkdir(parents=True)
    if groups is not None:
        (tmp_path / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        file = tmp_path / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")
    assert usable_cores(tmp_path) == cores


def test_usable_cores_are_those_of_the_affinity(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3}, raising=False)
    assert usable_cores(tmp_path) == 1
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    assert usable_cores(tmp_path) == 5


@pytest.mark.parametrize("asked, machine_has, taken", [(None, 4, None), (None, 64, 4), (1, 64, 1), (4, 4, 4)])
def test_threads_that_there_are_cores_for_are_taken(
    monkeypatch: pytest.MonkeyPatch, asked: int | None, machine_has: int, taken: int | None
) -> None:
    """A library sees the host's cores: left to itself it would take a thread for each."""
    monkeypatch.setattr(machine, "usable_cores", lambda: 4)
    monkeypatch.setattr(os, "cpu_count", lambda: machine_has)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_threads(asked) == taken


@pytest.mark.parametrize("asked", [5, 512, 10**5000], ids=["5", "512", "huge"])
def test_more_threads_than_cores_are_cut_with_a_word(monkeypatch: pytest.MonkeyPatch, asked: int) -> None:
    monkeypatch.setattr(machine, "usable_cores", lambda: 4)
    with pytest.warns(BackendWarning, match="threads is .*, and this process may use 4 of the .* cores: as many are taken"):
        assert OnnxRuntimeBackend(asked).threads == 4


@pytest.mark.parametrize("asked", [0, -1, 2.0, True, "2"], ids=repr)
def test_threads_that_are_no_number_are_refused(asked: Any) -> None:
    with pytest.raises(InputError, match="threads is"):
        check_threads(asked)


def test_a_command_says_in_one_line_that_threads_are_cut(
    run: Run, fake_bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(machine, "usable_cores", lambda: 1)
    assert onnxruntime.check_threads is check_threads
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, category, *more, **named: print(  # what Python does; pytest records instead
            warnings.formatwarning(message, category, *more), end="", file=sys.stderr
        )
        status, _, err = run("bench", fake_bundle, "-n", 1, "--threads", 512)
    assert status == 0 and err == (
        "motionrt: threads is 512, and this process may use 1 of the machine's cores: as many are taken.\n"
    )
