from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from motionrt.runtime.errors import InputError
from motionrt.runtime.noise import MAX_SEED, noise


def test_noise_is_fixed_for_ever() -> None:
    """Bits of Philox are promised by NumPy, the rest is ours: these numbers may never change."""
    expected = [0.15853384, 2.9828794, -1.925692]
    np.testing.assert_allclose(noise(0, 0, 0, (3,)), expected, rtol=1e-6)


def test_noise_is_standard_normal() -> None:
    sample = noise(7, 0, 3, (200_000,)).astype(np.float64)
    assert abs(sample.mean()) < 0.01
    assert abs(sample.std() - 1) < 0.01
    assert abs((sample**4).mean() - 3) < 0.1
    assert abs(np.corrcoef(sample[::2], sample[1::2])[0, 1]) < 0.01


def test_noise_draws_are_independent() -> None:
    draws = np.stack([noise(seed, stream, step, (20_000,)) for seed in (0, 1) for stream in (0, 1) for step in (0, 1)])
    assert np.abs(np.corrcoef(draws) - np.eye(8)).max() < 0.03


@given(
    seed=st.integers(0, MAX_SEED), index=st.integers(0, 60), shape=st.lists(st.integers(0, 5), max_size=5).map(tuple)
)
def test_noise_is_a_function_of_its_arguments(seed: int, index: int, shape: tuple[int, ...]) -> None:
    first = noise(seed, index % 3, index, shape)
    assert first.dtype == np.float32 and first.shape == shape and np.isfinite(first).all()
    noise(seed ^ 1, index % 3, index + 1, (17,))
    np.testing.assert_array_equal(first, noise(seed, index % 3, index, shape))
    longer = noise(seed, index % 3, index, (first.size + 3,))
    np.testing.assert_array_equal(longer[: first.size], first.reshape(-1))


@pytest.mark.parametrize("seed", [-1, MAX_SEED + 1, 1.5, "1", True, None], ids=repr)
def test_noise_refuses_a_seed(seed: object) -> None:
    with pytest.raises(InputError, match="seed is"):
        noise(seed, 0, 0, (2,))  # type: ignore[arg-type]


def test_noise_refuses_negative_numbers() -> None:
    for stream, step in ((-1, 0), (0, -1)):
        with pytest.raises(InputError, match="both must be 0 or more"):
            noise(0, stream, step, (2,))
