"""MotionClone's demo: what its training may see, how it is measured, and the shipped checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import domain
import numpy as np
import pytest
from by_path import load_by_path

PLACE = Path(__file__).resolve().parents[2] / "demo" / "motionclone"
world = load_by_path(PLACE / "world.py")
evaluate = load_by_path(PLACE / "evaluate.py")


def test_training_never_draws_a_held_out_pair_or_an_unseen_kind_of_path() -> None:
    rng = np.random.default_rng(0)
    clips = [world.training_clip(rng) for _ in range(400)]
    assert not {(clip.colour, clip.shape) for clip in clips} & set(world.HELD_PAIRS)
    assert not {clip.family for clip in clips} & set(domain.UNSEEN)
    assert {len(clip.path) for clip in clips} == {16}


def test_painted_objects_have_no_colour_that_is_held_out_with_their_shape_or_two_that_differ() -> None:
    rng = np.random.default_rng(0)
    spec = world.training_clip(rng)
    whole, halves = set(), 0
    for shape in domain.SHAPES:
        for _ in range(100):
            colours = np.unique(world.a_paint(rng, replace(spec, shape=shape)).reshape(-1, 3), axis=0)
            if len(colours) == 1:
                whole.add((world.named(colours[0]), shape))
                continue
            halves += 1
            assert len(colours) == 2 and len({world.named(colour) for colour in colours}) == 2
            assert np.linalg.norm(colours[0] - colours[1]) > world.APART
    assert not whole & set(world.HELD_PAIRS) and len(whole) == 48 - len(world.HELD_PAIRS)
    assert 200 < halves < 400


def test_targets_ask_for_objects_and_paths_that_training_leaves_out() -> None:
    wanted = evaluate.targets("report", 40)
    assert {(target.colour, target.shape) for target in wanted} == set(world.HELD_PAIRS)
    assert all(t.colour != t.reference.colour and t.shape != t.reference.shape for t in wanted)
    assert {t.reference.family for t in wanted} == {"free", *domain.UNSEEN}
    assert wanted == evaluate.targets("report", 40)
    assert {t.seed for t in wanted}.isdisjoint({t.seed for t in evaluate.targets("choose", 40)})


def test_references_share_a_path_and_nothing_else() -> None:
    target = evaluate.targets("choose", 3)[2]
    clips = target.references(3)
    tracked = [domain.track(clip) for clip in clips]
    assert all(np.abs(path - target.reference.centres).max() < 1.0 for path in tracked)
    assert all((clip != clips[0]).mean() > 0.5 for clip in clips[1:])


@pytest.mark.parametrize(("shift", "align"), [(0.0, 0.0), (3.0, 0.0)])
def test_a_clip_that_does_as_asked_has_full_marks(shift: float, align: float) -> None:
    for target in evaluate.targets("report", 6):
        clip = replace(target.reference, colour=target.colour, shape=target.shape)
        x, y = clip.start
        moved = replace(clip, start=(x + (shift if x < 32 else -shift), y))
        measured = dict(zip(evaluate.METRICS, evaluate.measure(domain.render(moved)[0], target), strict=True))
        assert measured["abs"] == pytest.approx(shift, abs=0.8)
        assert measured["align"] == pytest.approx(align, abs=0.3)
        assert measured["near"] == measured["colour"] == measured["shape"] == 1.0


def test_another_object_or_path_has_none() -> None:
    first, second = evaluate.targets("report", 2)
    measured = dict(zip(evaluate.METRICS, evaluate.measure(domain.render(second.reference)[0], first), strict=True))
    assert measured["colour"] == measured["shape"] == 0.0 and measured["abs"] > 4.0
    wandering = np.linspace(0, 20, 16)[:, None] * [1.0, 0.0]
    assert evaluate.path_error(wandering)[1:] == [pytest.approx(80 / 15), 0.0]


def test_the_figures_of_two_targets_are_their_means_between_bounds() -> None:
    figures = evaluate.summary("guided", np.array([[1.0, 1.0, 1.0, 1.0, 0.5], [3.0, 2.0, 1.0, 0.0, 1.0]]))
    assert figures["abs"] == [2.0, 1.0, 3.0] and figures["near"] == [1.0, 1.0, 1.0] and figures["align_median"] == 1.5
    assert "| guided |  | 2.00 [1.00, 3.00] | 1.50" in evaluate.table([figures])


@pytest.mark.slow
def test_the_checkpoint_is_small_and_its_autoencoder_keeps_objects_that_it_never_saw() -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    path = PLACE / "checkpoint.safetensors"
    assert path.stat().st_size < 12e6
    model = load_by_path(PLACE / "model.py").load(path)
    shapes = []
    for target in evaluate.targets("report", 24):
        clip = replace(target.reference, colour=target.colour, shape=target.shape)
        frames = torch.from_numpy(domain.render(clip)[0]).permute(0, 3, 1, 2) / 127.5 - 1
        latents = model.vae.encode(frames)
        assert latents.shape == (16, 4, 8, 8) and 0.5 < float(latents.std()) < 1.5
        made = ((model.vae.decode(latents[None])[0] + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        measured = dict(zip(evaluate.METRICS, evaluate.measure(made, target), strict=True))
        assert measured["abs"] < 1.0 and measured["colour"] == 1.0
        shapes.append(measured["shape"])
    assert np.mean(shapes) > 0.9


def test_a_checkpoint_without_a_part_is_refused(tmp_path: Path) -> None:
    save = pytest.importorskip("safetensors.torch")
    pytest.importorskip("diffusers")
    state = save.load_file(PLACE / "checkpoint.safetensors")
    save.save_file({k: v for k, v in state.items() if not k.startswith("vae.")}, tmp_path / "part.safetensors")
    with pytest.raises(ValueError, match=r"missing .*vae.patch.weight.*Pack it again"):
        load_by_path(PLACE / "model.py").load(tmp_path / "part.safetensors")
