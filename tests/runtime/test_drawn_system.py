"""What is drawn on a picture, all the way: through the pipeline, the command and the server, in a system of tests/helpers."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from motionrt.runtime.bundle.bundle import Bundle
from motionrt.runtime.bundle.manifest import parse_manifest
from motionrt.runtime.cli.picture import picture
from motionrt.runtime.errors import BundleError, InputError
from motionrt.runtime.media.fields import field_view
from motionrt.runtime.pipeline import MotionPipeline

SIZE = 32
DRAG = [[(16, 16), (22, 13)]]


@pytest.fixture(scope="module")
def still() -> NDArray[np.uint8]:
    return np.random.default_rng(1).integers(0, 256, (SIZE, SIZE, 3), np.uint8)


@pytest.fixture(scope="module")
def pipeline(drawn_bundle: Path) -> MotionPipeline:
    return MotionPipeline.from_bundle(drawn_bundle, threads=1)


def test_a_drag_moves_what_it_holds_and_the_brush_keeps_the_rest(pipeline: MotionPipeline, still: NDArray[np.uint8]) -> None:
    made = pipeline(still, drag=DRAG)
    assert made.frames.shape == (4, SIZE, SIZE, 3) and made.notes == ()
    assert made.field is not None and made.field.shape == (4, 2, SIZE, SIZE) and made.field.dtype == np.float32
    np.testing.assert_array_equal(made.field[0], 0)
    np.testing.assert_array_equal(made.field[3, :, 16, 16], [6, -3])
    # From place (18, 14) on the last picture shows what was 6 to the left and 3 below: the square moves, the rest does not.
    np.testing.assert_array_equal(made.frames[0], still)
    np.testing.assert_array_equal(pipeline(still, drag=np.array(DRAG)).frames, made.frames)
    assert np.abs(made.frames[3, 14, 18] - still[17, 12].astype(int)).max() <= 1
    outside = np.ones((SIZE, SIZE), bool)
    outside[12:20, 12:20] = False
    np.testing.assert_array_equal(made.frames[3][outside], still[outside])
    # What is painted may move, and nothing else, however strongly all is pushed.
    brush = np.zeros((SIZE, SIZE), np.uint8)
    brush[8:24, 8:] = 255
    pushed = pipeline(still, drag=DRAG, brush=brush, strength=5)
    assert pushed.field is not None
    np.testing.assert_array_equal(pushed.field[3, 0] != 0, brush > 0)
    np.testing.assert_array_equal(pushed.field[3, :, 16, 16], [6, -3])
    np.testing.assert_array_equal(pushed.field[3, :, 9, 30], [5, 0])


def test_where_nothing_is_drawn_the_plain_step_runs_and_no_hint(pipeline: MotionPipeline, still: NDArray[np.uint8]) -> None:
    ran = {}
    for name, inputs in {"drag": {"drag": DRAG}, "brush": {"brush": still}, "none": {"drag": []}}.items():
        job = pipeline.start(pipeline.request(still, **inputs))
        planned = job.calls()
        ran[name] = [call.graph for call in job]
        assert {graph: ran[name].count(graph) for graph in ran[name]} == planned
    assert ran["drag"] == ran["brush"] == ["hint", "step_drawn", "step_drawn", "held", "warp", "paint", "paint"]
    assert ran["none"] == ["step_free", "step_free", "held", "warp", "paint", "paint"]
    free = pipeline(still, strength=3)
    assert free.field is not None and (free.field[1:, 0] == 3).all()


def test_a_field_that_is_given_stands_in_for_what_makes_it(pipeline: MotionPipeline, still: NDArray[np.uint8]) -> None:
    made = pipeline(still, drag=DRAG, strength=2)
    assert made.field is not None
    job = pipeline.start(pipeline.request(still, field=made.field, seed=9))
    assert [call.graph for call in job] == ["held", "warp", "paint", "paint"]
    np.testing.assert_array_equal(pipeline.result(job).frames, made.frames)


def test_what_was_changed_is_told_and_what_cannot_be_kept_refused(pipeline: MotionPipeline, still: NDArray[np.uint8]) -> None:
    assert pipeline(still, drag=["30,30"]).notes == (
        "drag 1 lies between the cells of 8 pixels; its square was widened to its cell.",
    )
    with pytest.raises(InputError, match=r"drag 1 begins at \(31, 4\), outside of what is kept of the picture: x from 4"):
        pipeline(np.zeros((20, 28, 3), np.uint8), drag=["31,4"])
    with pytest.raises(InputError, match="brush is '.*'; nothing is fetched"):
        pipeline(still, brush="https://example.org/brush.png")


def edited(bundle: Path, change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    raw: dict[str, Any] = copy.deepcopy(json.loads((bundle / "bundle.json").read_text()))
    change(raw)
    return raw


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m["inputs"]["field"].update(image="prompt"), "input 'field' is drawn on 'prompt', which is no image input"),
        (lambda m: m["inputs"]["drag"].update(mask="field"), "input 'drag' is bounded by 'field', which is no mask"),
        (lambda m: m["output"].update(field="nothing"), "nothing gives `nothing`, which is a motion field"),
        (lambda m: m["loops"]["flow"].update(gives={"f": "other"}), "'held' of the plan reads `field`, which nothing"),
        (
            lambda m: m["loops"]["flow"]["without"]["step_drawn"].update(inputs=["strength"]),
            "loop 'flow' runs 'step_free' in place of 'step_drawn' without strength; both must be graphs of it",
        ),
        (lambda m: m["loops"]["flow"]["without"]["step_drawn"].update(runs="warp"), "loop 'flow' runs 'warp' in place of"),
        (
            lambda m: m["inputs"]["drag"].update(frames=4),
            r"input 'drag' gives `drag.flow` of \[4, 2, 32, 32\] a request, and a graph reads it as flow: float32 \[1, 3, 2,",
        ),
        (lambda m: m["output"].update(frames=5), r"motion field that is shown, moved: float32 \[1, 3, 2, 32, 32\], is not"),
    ],
    ids=["image", "mask", "output", "field", "inputs", "runs", "frames", "shown"],
)
def test_a_bundle_that_does_not_fit_together_is_refused(
    drawn_bundle: Path, change: Callable[[dict[str, Any]], object], says: str
) -> None:
    with pytest.raises(BundleError, match=says):
        parse_manifest(edited(drawn_bundle, change))


def test_what_may_be_drawn_is_shown(drawn_bundle: Path) -> None:
    lines = "\n".join(picture(Bundle.open(drawn_bundle)))
    assert "drags on `image`, or none, inside what `brush` lets move. From where" in lines
    assert "what may move, painted on `image`" in lines and "a motion field of 3 frames over `image`" in lines
    assert "without drag and brush: step_free in place of step_drawn" in lines
    assert lines.startswith("drawn: 4 pictures of 32x32 at 4 a second; `moved` is shown as their motion field")


Run = Callable[..., tuple[int, str, str]]


def test_the_command_draws_shows_and_keeps_the_field(
    run: Run, drawn_bundle: Path, pipeline: MotionPipeline, still: NDArray[np.uint8], tmp_path: Path
) -> None:
    image, brush, field, out = (tmp_path / name for name in ("still.png", "brush.png", "field.npy", "made.png"))
    Image.fromarray(still).save(image)
    painted = np.zeros((SIZE, SIZE), bool)
    painted[:, 8:] = True
    Image.fromarray(painted).save(brush)
    command = ("generate", "-b", drawn_bundle, "-i", image, "--brush", brush)
    drags = ("--drag", "16,16 22,13", "--drag", "30,30")
    status, said, _ = run(*command, *drags, "--show-field", "--save-field", field, "-o", out)
    assert status == 0 and "drag 2 lies between the cells of 8 pixels" in said
    made = pipeline(still, drag=[*DRAG, [(30, 30)]], brush=painted)
    np.testing.assert_array_equal(np.asarray(Image.open(out))[:SIZE, :SIZE], made.frames[0])
    assert made.field is not None
    np.testing.assert_array_equal(np.load(field), made.field)
    view = np.asarray(Image.open(tmp_path / "made-field.png"))
    np.testing.assert_array_equal(view[:256, :512], field_view(made.frames, made.field)[0])
    # What was kept goes in again.
    again = tmp_path / "again.png"
    assert run(*command, "--field", field, "-o", again)[0] == 0
    np.testing.assert_array_equal(np.asarray(Image.open(again)), np.asarray(Image.open(out)))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--drag", "1,2 x"), "drag 1 has the point ['x']"),
        (("--drag", "1,2 3,4", "--brush", "nothing.png"), "there is no brush file"),
        (("--field", "nothing.npy"), "there is no field file"),
        (("--save-field", "."), "cannot write .: it is a folder"),
    ],
    ids=["point", "brush", "field", "place"],
)
def test_the_command_refuses_with_one_line(
    run: Run, drawn_bundle: Path, still: NDArray[np.uint8], tmp_path: Path, options: tuple[str, ...], says: str
) -> None:
    Image.fromarray(still).save(tmp_path / "still.png")
    out = tmp_path / "out.mp4"
    status, _, err = run("generate", "-b", drawn_bundle, "-i", tmp_path / "still.png", "-o", out, *options)
    assert status == 2 and says in err and err.count("\n") == 1 and not out.exists()


def test_a_bundle_without_a_field_shows_none(run: Run, fake_bundle: Path, still: NDArray[np.uint8], tmp_path: Path) -> None:
    Image.fromarray(still).save(tmp_path / "still.png")
    command = ("generate", "-b", fake_bundle, "-i", tmp_path / "still.png", "-p", "a", "--motion-scale", "0")
    status, _, err = run(*command, "-o", tmp_path / "out.mp4", "--show-field")
    assert status == 2 and "bundle 'fake' shows no motion field; leave --show-field" in err


def test_help_shows_how_something_is_drawn(run: Run, drawn_bundle: Path) -> None:
    _, out, _ = run("generate", "-b", drawn_bundle, "--help")
    words = " ".join(out.split())
    assert '--drag "X,Y X,Y ..." From where to where something moves. Pixels of the image; again for more.' in words
    assert "--brush FILE What may move, in white." in words and "--field FILE" in words
