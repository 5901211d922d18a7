"""What a caller gives, by the kinds of input that a bundle declares; the pipeline's own tests refuse the rest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from motionrt.runtime.bundle.bundle import Bundle
from motionrt.runtime.errors import InputError
from motionrt.runtime.inputs import column, complete, convert

Edit = Callable[..., Path]


def test_an_image_is_given_in_every_range_that_is_declared(edit_bundle: Edit, still: NDArray[np.uint8]) -> None:
    """CogVideoX as it was released shows DINOv2 the still in [0, 1], and the VAE in [-1, 1]."""
    gives = {"image": [-1, 1], "appearance_image": [0, 1]}
    values = convert(Bundle.open(edit_bundle(lambda m: m["inputs"]["image"].update(gives=gives))), "image", still)
    assert values["image"].shape == (1, 3, 16, 16) and values["image"].dtype == np.float32
    np.testing.assert_array_equal(values["appearance_image"], (values["image"] + 1) / 2)


def test_a_number_has_the_shape_of_the_port_that_reads_it_and_keeps_its_limits(edit_bundle: Edit) -> None:
    bundle = Bundle.open(edit_bundle(lambda m: m["inputs"]["motion_scale"].update(min=0, max=2)))
    np.testing.assert_array_equal(convert(bundle, "motion_scale", np.float16(1.5))["motion_scale"], np.float32([1.5]))
    for wrong in (-0.5, 2.5):
        with pytest.raises(InputError, match=f"motion_scale is {wrong}; allowed is a number from 0.0 to 2.0"):
            convert(bundle, "motion_scale", wrong)


def test_a_text_that_no_graph_reads_is_only_checked(edit_bundle: Edit) -> None:
    """SVD reads no prompt: it is there to search by."""

    def less(manifest: dict[str, Any]) -> None:
        manifest["inputs"]["style"] = {"kind": "text", "default": ""}

    bundle = Bundle.open(edit_bundle(less))
    assert convert(bundle, "style", "any words, however many " * 50) == {}
    with pytest.raises(InputError, match="the style is of type int; it must be a string"):
        convert(bundle, "style", 3)


def test_defaults_stand_in_and_a_column_may_stay_as_it_was_exported(fake_bundle: Path) -> None:
    manifest = Bundle.open(fake_bundle).manifest
    every = complete(manifest, {"image": "a.png", "prompt": "a", "negative_prompt": None})
    assert every == {"image": "a.png", "prompt": "a", "negative_prompt": "", "motion_scale": 1.0}
    with pytest.raises(InputError, match="'imgae' is no input of bundle 'fake'; it takes image, prompt"):
        complete(manifest, {"imgae": "a.png"})


def test_a_column_is_one_number_or_one_for_each_step() -> None:
    assert column("guidance", np.array(3), 4) == 3.0
    np.testing.assert_array_equal(column("guidance", (1, 2, 3), 3), np.float32([1, 2, 3]))
    with pytest.raises(InputError, match="guidance has 2 numbers for 3 steps"):
        column("guidance", [1, 2], 3)
