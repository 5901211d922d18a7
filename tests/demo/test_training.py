"""The training recipe's promises that need no trained weights: a killed stage goes on as if it had never stopped."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from by_path import load_by_path
from torch import Tensor, nn

DEMO = Path(__file__).resolve().parents[2] / "demo"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Load a file of demo/; its siblings are importable only meanwhile."""

    def loaded(file: str) -> ModuleType:
        monkeypatch.syspath_prepend(str(DEMO))
        siblings = {path.stem for path in DEMO.glob("*.py")} - set(sys.modules)
        module = load_by_path(DEMO / file)
        for name in siblings & set(sys.modules):
            monkeypatch.delitem(sys.modules, name)
        return module

    return loaded


@pytest.fixture
def training(load: Callable[[str], ModuleType], tmp_path: Path) -> Any:
    """What both recipes train with, and its work folder in `tmp_path`."""
    return load("recipe.py").Work(tmp_path)


def run(training: Any, steps: int, stop: int | None = None, average: float = 0.0) -> Tensor:
    """Train a line to a random target; `stop` breaks off after that many steps, as a kill would."""
    torch.manual_seed(0)
    net = nn.Linear(4, 4)
    for step in training.training("toy", net, [{"params": net.parameters(), "lr": 0.05}], steps, average=average):
        if step.number == stop:
            break
        x = torch.randn(8, 4) * float(step.rng.uniform(0.5, 1))
        step.advance((net(x) - x.flip(1)).square().mean())
    return net.weight.detach().clone()


@pytest.mark.parametrize("average", [0.0, 0.9])
def test_a_killed_stage_goes_on_bit_for_bit(
    average: float, training: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = run(training, 60, average=average)
    (tmp_path / "toy.state.pt").unlink()
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)  # a state after every step
    broken = run(training, 60, 23, average)
    assert not torch.equal(broken, whole)
    assert torch.equal(run(training, 60, average=average), whole)
    assert torch.equal(run(training, 60, average=average), whole)  # finished: nothing left to do
    assert not list(tmp_path.glob("*.partial"))


def test_missing_and_foreign_work_files_are_named(training: Any) -> None:
    with pytest.raises(SystemExit, match=r"lost\.safetensors is missing"):
        training.restore(nn.Linear(2, 2), "lost")
    training.keep(nn.Linear(2, 3), "part")
    with pytest.raises(SystemExit, match="does not fit"):
        training.restore(nn.Sequential(nn.Linear(2, 3)), "part")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["all", "--steps", "3"], "are for one stage"),
        (["pack", "--steps", "3"], "for a stage that trains"),
        (["nonsense"], "invalid choice"),
    ],
)
def test_bad_arguments_are_refused(
    arguments: list[str], message: str, load: Callable[[str], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        load("train.py").main(arguments)
    assert message in capsys.readouterr().err
