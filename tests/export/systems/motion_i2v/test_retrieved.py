"""Motion that a memory finds for Motion-I2V: put where a picture has something, hinted at, or begun with; all in one bundle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")

from by_path import load_by_path  # noqa: E402
from torch import Tensor  # noqa: E402

from motionrt.export.checkpoints.text_query import packaged_encoder  # noqa: E402
from motionrt.export.exporter import export_system  # noqa: E402
from motionrt.export.systems.motion_i2v.retrieved import Hinted, Keep, Late, Placed, Retrieval, with_memory  # noqa: E402
from motionrt.export.systems.motion_i2v.step import DrawnStep, FlowStep  # noqa: E402
from motionrt.export.systems.motion_i2v.system import MOTION, motion_system  # noqa: E402
from motionrt.export.systems.motionclone.frames import EncodeImage  # noqa: E402
from motionrt.export.systems.motionclone.rows import noise_schedule  # noqa: E402
from motionrt.export.systems.system import Network  # noqa: E402
from motionrt.runtime.job import noise_stream  # noqa: E402
from motionrt.runtime.media.video import write_video  # noqa: E402
from motionrt.runtime.noise import noise  # noqa: E402
from motionrt.runtime.pipeline import MotionPipeline  # noqa: E402

shared = load_by_path(Path(__file__).resolve().parents[4] / "tests/helpers/shared_graphs.py")
HEIGHT, WIDTH, FIELDS = 24, 32, 3
BOX, OTHER = np.s_[4:10, 3:11], np.s_[12:18, 18:26]  # in the clip, in the image


def clip_field(box: Any = BOX) -> Tensor:
    """Displacements `[1, n, 2, H, W]`: what is in the box goes to the right and up."""
    field = torch.zeros(1, FIELDS, 2, HEIGHT, WIDTH)
    for target in range(FIELDS):
        field[0, target, 0][box], field[0, target, 1][box] = 3.0 * (target + 1), -1.0 * (target + 1)
    return field


def picture(box: Any = OTHER) -> Tensor:
    """A box on a slope of grey, `[1, 3, H, W]`."""
    image = torch.linspace(-0.6, 0.4, WIDTH).expand(1, 3, HEIGHT, WIDTH).clone()
    image[(0, 0, *box)], image[(0, 2, *box)] = 0.9, -0.9
    return image


NOTHING = torch.zeros(1, 1, HEIGHT, WIDTH)


def test_a_field_is_put_on_what_stands_out_or_is_painted() -> None:
    place, field = Placed(HEIGHT, WIDTH), clip_field()
    placed, region = place(field, picture(), NOTHING)
    torch.testing.assert_close(placed, clip_field(OTHER), atol=1e-4, rtol=0)
    assert (region[0, 0] > 0).sum() == 48 and region[(0, 0, *OTHER)].all()
    # A larger region than the clip's moves as a whole, and so does one of another shape.
    large = np.s_[6:20, 8:24]
    placed, _ = place(field, picture(large), NOTHING)
    torch.testing.assert_close(placed, clip_field(large), atol=1e-4, rtol=0)
    brush = torch.ones_like(NOTHING)
    brush[(0, 0, *BOX)] = 0
    torch.testing.assert_close(place(field, picture(), brush)[0], field, atol=1e-4, rtol=0)
    # A camera's field is not cut, and of one that is still nothing comes.
    camera = torch.full_like(field, 2.0)
    placed, region = place(camera, picture(), NOTHING)
    assert torch.equal(placed, camera) and region.all()
    assert not place(0.1 * torch.rand_like(field), picture(), NOTHING)[0].any()


def test_hints_are_whole_cells_beside_what_is_drawn() -> None:
    placed, region = Placed(HEIGHT, WIDTH)(clip_field(), picture(), NOTHING)
    flow, mask = torch.zeros_like(placed), NOTHING.clone()
    flow[..., 16:24, 16:20], mask[..., 16:24, 16:20] = 7, 1
    known, seen = Hinted(4)(placed, region, flow, mask)
    cells = torch.zeros_like(seen)
    cells[..., 12:16, 16:28] = 1  # the upper row of cells is covered, of which both ends by a half, and the lower one by a half
    cells[..., 16:20, 20:24] = 1
    assert torch.equal(seen, torch.maximum(cells, mask))
    assert torch.equal(known, torch.where(mask[:, None] > 0, flow, placed * cells[:, None]))
    small = torch.zeros_like(region)
    small[..., 5, 6] = 1  # less than half of any cell: the best one
    assert torch.nonzero(Hinted(4)(placed, small, flow, NOTHING)[1][0, 0, ::4, ::4]).tolist() == [[1, 1]]
    assert not Hinted(4)(placed, NOTHING, flow, NOTHING)[1].any()


@pytest.mark.slow
@pytest.mark.timeout(1200)  # tracing takes minutes where the cores are shared
def test_the_bundle_finds_a_clip_and_uses_its_field(
    run: Callable[..., Any], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    models = load_by_path(Path(__file__).resolve().parents[4] / "tests/helpers/motion_i2v_models.py")
    size, count, prompt, seed = models.SIZE, models.FRAMES - 1, "w3 w5", 2
    parts = models.small_parts()
    alphas, _ = noise_schedule(models.config("scheduler"))
    keep = Keep(EncodeImage(models.small_vae(2, 2))).eval()
    system = with_memory(motion_system(parts), parts, Retrieval(packaged_encoder(), Network(keep), alphas))
    bundle, clips, memory = tmp_path / "bundle", tmp_path / "clips", tmp_path / "memory"
    with shared.shared_graphs(shared.store(tmp_path_factory)):
        export_system(system, bundle, programs=False)
    clips.mkdir()
    rng = np.random.default_rng(1)
    fields = rng.normal(size=(2, count, 2, size, size)).astype(np.float32)
    assert run("memory", "create", memory, "--bundle", bundle)[0] == 0
    for name, caption, field in zip("ab", ("w3 w5", "w9"), fields, strict=True):
        write_video(clips / f"{name}.mp4", rng.integers(0, 256, (count + 1, size, size, 3), np.uint8), 8)
        field[:, :, 4:10, 4:12] += 5
        np.save(clips / f"{name}.npy", field)
        assert run("memory", "add", memory, clips / f"{name}.mp4", "--bundle", bundle, "--caption", caption)[0] == 0
    image = rng.integers(0, 256, (size, size, 3), np.uint8)
    made = {}
    with MotionPipeline.from_bundle(bundle, memory, threads=1) as pipeline:
        ids = torch.from_numpy(np.stack([pipeline.bundle.tokenize("text", words, models.TOKENS)["input_ids"][0]
                                         for words in (prompt, "")]))  # fmt: skip
        ways = ("none", "direct", "placed", "start", "hints")
        calls = {}
        for way in ways:
            job = pipeline.start(pipeline.request(image, prompt, seed=seed, retrieval=way))
            calls[way] = [call.graph for call in job]
            made[way] = pipeline.result(job)
        streams = {name: noise_stream(pipeline.bundle.manifest, name) for name in (MOTION, "late")}
        far = pipeline(image, prompt, seed=seed, retrieval="start", where={"dataset": "none"}, minimum_score=0.0)
    # The same in torch.
    with torch.no_grad():
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 127.5 - 1
        nothing = torch.zeros(1, 1, size, size)
        decode = parts.fields.graphs["decode_field"].network.module
        decoded = lambda z: torch.cat([decode(z[:, i : i + 1]) for i in range(count)], 1)  # noqa: E731
        text, negative = parts.text.module(ids).split(1)
        rows = torch.from_numpy(parts.schedules[MOTION]["ddim"][models.STEPS])
        strides = 8.0 * torch.arange(1, count + 1)[None]
        seen = parts.encode.module((pixels + 1) / 2)

        def loop(latents: Tensor, rows: Tensor, hint: Tensor | None = None) -> Tensor:
            """What the rows make of latents, by the ControlNet where there is a hint."""
            for row in rows:
                numbers = (row[None, 3:5], parts.stage1.times(row[1:2], strides), seen, text)
                guidance = (row[2:3], negative)
                if hint is None:
                    latents = FlowStep(parts.stage1)(latents, *numbers, *guidance)
                else:
                    times = parts.drawn.times(row[1:2], strides)
                    latents = DrawnStep(parts.stage1, parts.drawn)(latents, *numbers, times, hint, *guidance)
            return decoded(latents)

        shape = (1, count, *parts.latents[1:])
        start = {name: torch.from_numpy(noise(seed, stream, 0, shape)) for name, stream in streams.items()}
        found = keep(torch.from_numpy(fields[:1])).half().float()
        placed, region = Placed(size, size)(decoded(found), pixels, nothing)
        latents, late = keep(placed), rows[rows[:, 1] <= 600]
        assert len(late) == 2
        hint = parts.sparse.module(*Hinted(parts.scale)(placed, region, torch.zeros_like(placed), nothing))
        wanted = {
            "none": loop(start[MOTION], rows),
            "direct": decoded(found),
            "placed": decoded(latents),
            "start": loop(Late(float(alphas[int(late[0, 1])]))(latents, start["late"]), late),
            "hints": loop(start[MOTION], rows, hint),
        }
    for way in ways:
        assert [reference.caption for reference in made[way].references] == ([] if way == "none" else [prompt])
        assert np.abs(made[way].field[1:] - wanted[way][0].numpy()).max() <= 1e-3 * size, way
        assert way == "none" or np.abs(made[way].field - made["none"].field).max() > 0.1, way
    steps = {way: [name for name in calls[way] if name in ("step_plain", "step_drawn")] for way in ways}
    assert steps == {
        "none": ["step_plain"] * 3, "direct": [], "placed": [], "start": ["step_plain"] * 2, "hints": ["step_drawn"] * 3,
    }  # fmt: skip
    assert "retrieval is none instead" in far.fallback
    np.testing.assert_array_equal(far.frames, made["none"].frames)
