"""Motion-I2V's demo: the true fields of its world, what is drawn on pictures, how it is measured, and what it trains with."""

from __future__ import annotations

import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import domain
import fields
import judge
import numpy as np
import pytest
import world
from by_path import load_by_path

from motionrt.runtime.media.drawn import Kept, drags

PLACE = Path(__file__).resolve().parents[2] / "demo"
WHOLE = tuple((3.0 * i, float(-(i % 4))) for i in range(16))  # px: a path of whole pixels, so that nothing is between them


def spec(seed: int, **changes: object) -> domain.Spec:
    drawn = domain.sample_spec(np.random.default_rng(seed), path=np.array(WHOLE), start=(12.5, 30.5), jitter=False)
    return replace(drawn, **changes)


@pytest.mark.parametrize("shape", domain.SHAPES)
def test_every_pixel_of_the_sprite_goes_where_the_true_field_says(shape: str) -> None:
    clip = spec(1, shape=shape)
    frames, mask = domain.render(clip)
    field = fields.true_field(clip)
    assert field.shape == (15, 2, 64, 64) and field.dtype == np.float32
    y, x = np.nonzero(mask[0] == 1)
    for target in range(1, 16):
        right, down = field[target - 1, :, y, x].T.astype(int)
        inside = (x + right < 64) & (y + down < 64)
        arrived = frames[target, (y + down)[inside], (x + right)[inside]].astype(int)
        assert np.abs(arrived - frames[0, y[inside], x[inside]]).max() <= 1  # of 255: light is rounded


def test_the_background_stays_and_a_still_clip_has_no_field() -> None:
    clip = spec(2)
    assert not fields.true_field(clip)[:, :, domain.render(clip, frames=1)[1][0] == 0].any()
    assert not fields.true_field(replace(clip, path=((0.0, 0.0),) * 16)).any()


def test_fields_as_shares_of_the_picture_come_back_and_saturate_at_its_size() -> None:
    field = np.zeros((1, 2, 32, 64), np.float32)
    field[0, :, 3, 5] = 16, -8
    unit = fields.as_unit(field)
    assert unit[0, :, 3, 5].tolist() == [0.625, 0.375] and (unit[:, :, 4] == 0.5).all()
    np.testing.assert_array_equal(fields.as_pixels(unit), field)
    assert fields.as_pixels(unit + 2).max(axis=(0, 2, 3)).tolist() == [64.0, 32.0]


@pytest.mark.parametrize(("stride", "last"), [(8, 15), (4, 7.5), (2, 3.75)])
def test_a_smaller_stride_shows_the_beginning_of_a_path(stride: int, last: float) -> None:
    path = np.stack([np.arange(16.0), -2 * np.arange(16.0)], axis=1)
    assert fields.slowed(path, stride)[-1].tolist() == [last, -2 * last]


def test_training_sees_no_held_out_pair_and_no_unseen_path() -> None:
    rng = np.random.default_rng(0)
    clips = [fields.training_clip(rng, 0.5) for _ in range(300)]
    assert not {(clip.colour, clip.shape) for clip, _ in clips} & set(world.HELD_PAIRS)
    assert not {clip.family for clip, _ in clips} & set(domain.UNSEEN)
    assert {stride for _, stride in clips} == set(range(2, 9))


@pytest.mark.parametrize("count", [1, 4])
def test_drags_are_what_the_runtime_makes_of_them_and_none_is_widened_or_lost(count: int) -> None:
    kept = Kept.of(64, 64, 64, 64)
    for scene in judge.scenes("report", 12):
        tracks = judge.drawn(scene, count)
        field, mask = fields.known(tracks)
        flow, said, notes = drags("drag", [t.tolist() for t in tracks], kept, 15, fields.UNIT, fields.CELL)
        np.testing.assert_allclose(field, flow[0], atol=1e-4)
        assert (mask == (said[0, 0] > 0)).all() and mask[::8, ::8].sum() >= count and not notes
        ways = np.unique(field[:, :, mask].transpose(2, 0, 1), axis=0)
        assert len(ways) == min(count, 2)  # the sprite's, and a pin's


def test_controls_say_what_the_field_says_wherever_they_say_that_it_is_known() -> None:
    rng, kinds = np.random.default_rng(5), set()
    for seed in range(60):
        clip = domain.sample_spec(np.random.default_rng(seed), frames=16)
        true, cover = fields.true_field(clip), fields.covered(clip)
        known, mask = fields.a_control(true, cover, rng)
        assert not known[:, :, ~mask].any()
        said = mask & (np.abs(known - true).max(axis=(0, 1)) > 1e-5)
        assert said.sum() <= 7 * 64 and not (said & cover & (np.abs(known).max(axis=(0, 1)) == 0)).sum() > 64
        kinds.add((bool(mask.any()), bool(mask[0, 0])))
    assert len(kinds) >= 3


def test_a_scene_made_as_asked_has_full_marks_and_another_has_none() -> None:
    scenes = judge.scenes("report", 4)
    assert {(scene.spec.colour, scene.spec.shape) for scene in scenes} <= set(world.HELD_PAIRS)
    for scene in scenes:
        frames = domain.render(scene.spec)[0]
        path, field, colour, shape = judge.measure(frames, scene, fields.true_field(scene.spec))
        assert path < 0.6 and field == 0 and colour == shape == 1
        still = np.repeat(frames[:1], 16, axis=0)
        assert judge.measure(still, scene)[0] == pytest.approx(np.linalg.norm(scene.spec.path, axis=1)[1:].mean(), abs=3)
        assert judge.leak(frames, still, judge.stays(scene)) == 0 < judge.leak(255 - frames, still, judge.stays(scene))


def test_the_same_split_has_the_same_scenes_and_another_has_others() -> None:
    assert judge.scenes("choose", 8) == judge.scenes("choose", 8)
    assert {s.spec for s in judge.scenes("choose", 8)}.isdisjoint({s.spec for s in judge.scenes("report", 8)})


def test_a_retrieved_field_lies_on_the_object_and_its_middle_is_a_hint() -> None:
    scene = judge.Scene(spec(3, shape="circle", start=(30.5, 40.5)), 1)
    other = fields.true_field(spec(4, shape="circle", start=(20.5, 22.5), radius=scene.spec.radius))
    moved = judge.aligned(other, scene)
    assert judge.field_error(moved, scene) < 1.0 < judge.field_error(other, scene)
    (track,) = judge.hint(other, scene)
    assert track[0].tolist() == [30, 40] and (track[-1] - track[0]).tolist() == pytest.approx([45.0, -3.0])


@pytest.fixture(scope="module")
def networks() -> ModuleType:
    pytest.importorskip("diffusers")
    kept = sys.modules.get("model")
    sys.modules["model"] = load_by_path(PLACE / "motionclone" / "model.py")
    try:
        return load_by_path(PLACE / "motion_i2v" / "networks.py")
    finally:
        sys.modules.pop("model")
        if kept is not None:
            sys.modules["model"] = kept


def test_quick_training_computes_what_the_exported_networks_do(networks: ModuleType) -> None:
    import torch

    from motionrt.export.systems.motion_i2v.augmented import fields_of

    torch.manual_seed(0)
    net = networks.VideoUNet({**networks.RENDER, "block_out_channels": (16, 32)})
    latents, text, t = torch.randn(2, 15, 4, 8, 8), torch.randn(2, 12, 64), torch.tensor([40, 900])
    moves, grids = 6 * torch.randn(2, 15, 2, 64, 64), net.grids(8, 8)
    with torch.no_grad():
        wanted = net(latents[:, 0], latents, t, text, fields_of(moves, grids))
        with networks.quick():
            found = net(latents[:, 0], latents, t, text, networks.matrices(moves, grids))
        again = net(latents[:, 0], latents, t, text, fields_of(moves, grids))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert torch.equal(again, wanted)  # nothing is left replaced


def test_a_widened_network_reads_its_half_of_both_texts(networks: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    torch.manual_seed(1)
    narrow = networks.FlowUNet(networks.PREDICT)
    latents, text, other = torch.randn(1, 15, 4, 8, 8), torch.randn(1, 12, 64), torch.randn(1, 12, 64)
    given = torch.randn(1, 4, 8, 8), latents, torch.tensor([300]), 8.0 * torch.arange(1, 16)[None]
    monkeypatch.setitem(sys.modules, "model", sys.modules["motionrt_by_path_model"])
    monkeypatch.setitem(sys.modules, "networks", networks)
    monkeypatch.setitem(sys.modules, "training", load_by_path(PLACE / "motionclone" / "training.py"))
    export = load_by_path(PLACE / "motion_i2v" / "export.py")
    with torch.no_grad():
        wanted = narrow(*given, text)
        for place, both in ((0, (text, other)), (1, (other, text))):
            found = export.widened(deepcopy(narrow), place)(*given, torch.cat(both, -1))
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_the_checkpoint_keeps_fields_and_follows_true_ones(networks: ModuleType) -> None:
    import torch

    model = networks.load(PLACE / "motion_i2v" / "checkpoint.safetensors")
    errors = []
    for scene in judge.scenes("report", 6):
        unit = torch.from_numpy(fields.as_unit(fields.true_field(scene.spec)))
        errors.append(judge.field_error(fields.as_pixels(model.flow.decode(model.flow.encode(unit)).numpy()), scene))
    assert np.mean(errors) < 2.0  # px: half of that is where the sprite ends
    still = model.flow.decode(model.flow.encode(torch.full((1, 2, 64, 64), 0.5))).numpy()
    assert np.abs(fields.as_pixels(still)).mean() < 0.5
