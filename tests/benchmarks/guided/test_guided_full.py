"""MotionClone's guided step at its published size, counted: what it costs, and that it fits."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")

from motionrt.benchmarks.guided.guided_full import counted


@pytest.mark.slow
def test_guided_step_of_the_published_size_fits_and_costs_what_its_parts_do() -> None:
    found = counted()
    assert found.weights + found.live <= 12e9, "the release takes 14 GB and more"
    assert found.live < 0.5 * (found.live + found.kept), "probabilities are not kept"
    assert found.head == pytest.approx(found.other, rel=1e-3)
    assert 9.5e12 < found.head < 10.1e12, "9.51 to the last guided query and key, and what ends their block"
    assert 35.0e12 < found.head + found.other + found.tail < 35.4e12, "two forward passes"
    assert 10.2e12 < found.gradient < 10.7e12, "the gradient in the inputs alone, with attention's probabilities again"
    assert found.nodes < 12_000
