"""A Motion-I2V bundle from released files on ONNX Runtime against the same steps in plain torch; what leaves its loops."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")

import onnx  # noqa: E402
from by_path import load_by_path  # noqa: E402
from torch import Tensor  # noqa: E402

from motionrt.export.checkpoints.files import CheckpointError  # noqa: E402
from motionrt.export.checkpoints.motion_i2v_files import MotionI2VSources, open_motion_i2v  # noqa: E402
from motionrt.export.exporter import export_system  # noqa: E402
from motionrt.export.systems.motion_i2v.augmented import Tables  # noqa: E402
from motionrt.export.systems.motion_i2v.fields import DecodeFields, Held, Mean, Sparse  # noqa: E402
from motionrt.export.systems.motion_i2v.released import motion_i2v_system  # noqa: E402
from motionrt.export.systems.motion_i2v.rows import rows, schedules  # noqa: E402
from motionrt.export.systems.motion_i2v.step import DrawnStep, FlowStep, VideoStep  # noqa: E402
from motionrt.export.systems.motion_i2v.system import MOTION, VIDEO, motion_system  # noqa: E402
from motionrt.export.systems.motionclone.frames import DecodeFrames, EncodeImage  # noqa: E402
from motionrt.export.systems.motionclone.rows import noise_schedule  # noqa: E402
from motionrt.export.systems.motionclone.system import tokenized  # noqa: E402
from motionrt.runtime.job import noise_stream  # noqa: E402
from motionrt.runtime.media.drawn import Kept, drags  # noqa: E402
from motionrt.runtime.noise import noise  # noqa: E402
from motionrt.runtime.pipeline import MotionPipeline  # noqa: E402

models = load_by_path(Path(__file__).resolve().parents[4] / "tests/helpers/motion_i2v_models.py")
shared = load_by_path(Path(__file__).resolve().parents[4] / "tests/helpers/shared_graphs.py")
FRAMES, SIZE, STEPS, SEED, PROMPT, GUIDANCE, STRENGTH = 4, 16, 3, 3, "a blue drift", 2.0, 1.5
FIELDS, LATENTS = FRAMES - 1, (1, FRAMES - 1, 4, SIZE // 2, SIZE // 2)
DRAG, UNIT = [(5, 6), (9, 10)], 8
pytestmark = pytest.mark.timeout(1200)  # three steps are traced
GIVEN: dict[str, Any] = {"prompt": PROMPT, "strength": STRENGTH}


class Plain:
    """A video made of the networks in memory, step by step. `start`: the noise of either loop."""

    def __init__(self, made: Any, start: dict[str, Tensor]) -> None:
        self.made, self.start = made, start
        files = open_motion_i2v(MotionI2VSources(made.models))
        text = files.text.loaded()
        self.text, self.negative = (text(tokenized(files.tokenizer, words)) for words in (PROMPT, ""))
        self.rows = torch.from_numpy(rows(STEPS, *noise_schedule(files.scheduler), GUIDANCE))

    @torch.no_grad()
    def video(
        self, image: Tensor, flow: Tensor | None, mask: Tensor, brush: Tensor, field: Tensor | None = None
    ) -> tuple[Any, Tensor]:
        """Frames `[F, H, W, 3]` as whole numbers, and the field; `flow`: what is drawn; `field`: given whole."""
        made, encode = self.made, EncodeImage(self.made.vae)
        reference, seen = encode(image), encode((image + 1) / 2)
        strides = STRENGTH * 8.0 * torch.arange(1, FRAMES)[None]
        guidance = (torch.tensor([GUIDANCE]), self.negative)
        latents = self.start[MOTION]
        for row in self.rows if field is None else ():
            numbers = (row[None, 3:5], made.stage1.times(row[1:2], strides), seen, self.text)
            if flow is None:
                latents = FlowStep(made.stage1)(latents, *numbers, *guidance)
            else:
                hint = Sparse(Mean(made.flow_vae))(flow, mask)
                own = (made.drawn.times(row[1:2], strides), hint)
                latents = DrawnStep(made.stage1, made.drawn)(latents, *numbers, *own, *guidance)
        found = DecodeFields(DecodeFrames(made.flow_vae))(latents) if field is None else field
        tables, latents = Tables(made.stage2.grids(*LATENTS[3:]))(Held()(found, brush)), self.start["start"]
        for row in self.rows:
            conditions = (reference, brush, self.text, self.start["start"], *tables, *guidance)
            latents = VideoStep(made.stage2)(latents, row[None, 3:], row[1:2], *conditions)
        frames = DecodeFrames(made.vae)(torch.cat([reference[:, None], latents], 1))[0]
        return ((frames.clamp(-1, 1) + 1) * 127.5).permute(0, 2, 3, 1).numpy(), found


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Released files, and the bundle that was exported from them with three steps."""
    folder = tmp_path_factory.mktemp("motion_i2v")
    made = models.released_files(folder)
    system = motion_i2v_system(MotionI2VSources(made.models), frames=FRAMES, height=SIZE, width=SIZE)
    base = json.loads((made.models / "stage2/StableDiffusion/scheduler/scheduler_config.json").read_text())
    tables = schedules(*noise_schedule(base), GUIDANCE, (STEPS,))
    loops = {
        name: msgspec.structs.replace(
            system.loops[name], schedules={**system.loops[name].schedules, "ddim": (STEPS,)}, default=("ddim", STEPS)
        )
        for name in (MOTION, VIDEO)
    }
    short = {**system.schedules, MOTION: {**system.schedules[MOTION], **tables[0]}, VIDEO: tables[1]}
    with shared.shared_graphs(shared.store(tmp_path_factory)):
        export_system(replace(system, loops={**system.loops, **loops}, schedules=short), folder / "bundle", programs=False)
    image = np.random.default_rng(1).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    return SimpleNamespace(folder=folder, made=made, system=system, image=image)


@pytest.mark.slow
def test_bundle_gives_the_field_and_the_video_of_the_same_steps_in_torch(world: Any) -> None:
    image = torch.from_numpy(world.image).permute(2, 0, 1)[None].float() / 127.5 - 1
    nothing = torch.zeros(1, 1, SIZE, SIZE)
    still = nothing.clone()
    still[..., SIZE // 2 :] = 1  # the right half
    painted = ((1 - still[0, 0]) * 255).byte().numpy()
    given = torch.rand(1, FIELDS, 2, SIZE, SIZE, generator=torch.Generator().manual_seed(4)) * 8 - 4
    flow, mask, _ = drags("drag", [DRAG], Kept.of(SIZE, SIZE, SIZE, SIZE), FIELDS, UNIT, 2, None)
    videos = {}
    with MotionPipeline.from_bundle(world.folder / "bundle", threads=1) as pipeline:
        manifest = pipeline.bundle.manifest
        start = {name: torch.from_numpy(noise(SEED, noise_stream(manifest, name), 0, LATENTS)) for name in (MOTION, "start")}
        plain = Plain(world.made, start)
        for name, options, wanted in (
            ("plain", {}, (None, nothing, nothing)),
            ("brush", {"brush": painted}, (torch.zeros(1, FIELDS, 2, SIZE, SIZE), still, still)),
            ("field", {"field": given[0].numpy()}, (None, nothing, nothing, given)),
            ("drag", {"drag": [DRAG]}, (torch.from_numpy(flow), torch.from_numpy(mask), nothing)),
        ):
            found = pipeline(image=world.image, seed=SEED, **GIVEN, **options)
            frames, field = plain.video(image, *wanted)
            assert np.abs(found.frames - frames).max() <= 0.75, name  # grey levels, of which rounding is 0.5
            assert found.field is not None and np.abs(found.field[1:] - field[0].numpy()).max() <= 1e-3 * SIZE, name
            videos[name] = found.frames.astype(int)
    for name in ("brush", "field", "drag"):
        assert np.abs(videos[name] - videos["plain"]).max() >= 3  # it is heeded: random weights follow a field by 4 grey levels
    assert np.std(videos["plain"]) > 10


@pytest.mark.slow
def test_what_never_changes_leaves_the_loops(world: Any) -> None:
    """Steps warp by tables and read no field; frame 0 and the image come projected; times are rows."""
    partition = json.loads((world.folder / "bundle/bundle.json").read_text())["partition"]
    reads = {}
    for name in ("drawn", "plain", "video"):
        graph = onnx.load(world.folder / f"bundle/graphs/step_{name}.onnx", load_external_data=False).graph
        reads[name] = {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in graph.input}
        kinds = {node.op_type for node in graph.node}
        assert any(kind.startswith("motion_augmented_attention_") for kind in kinds) == (name == "video")
        assert not kinds & {"TopK", "CumSum", "ScatterElements", "ScatterND", "GatherND"}, name
    assert not {"moves", "brush", "reference", "text", "negative_text", "timestep"} & reads["video"].keys()
    assert not {"image_latents", "hint", "text", "negative_text", "strides"} & (reads["drawn"].keys() | reads["plain"].keys())
    hoisted = [(tensor["class"], tuple(tensor["shape"])) for tensor in partition["2"]["hoisted"]]
    width, places = 8, (SIZE // 2) ** 2
    # Of frame 0 in the first attention: query, key and value. They are moved in the op, which every one of the steps has.
    assert hoisted.count(("request", (2, places, 1, width))) == 3
    assert {"start", "weights_of_grid_0", "beyond_of_grid_1"} <= reads["video"].keys()  # which another seed changes


@pytest.mark.slow
def test_bundle_says_what_it_takes(world: Any) -> None:
    system = world.system
    assert list(system.inputs) == [
        "image", "prompt", "negative_prompt", "drag", "brush", "field", "strength", "motion_guidance", "guidance",
        "retrieval",
    ]  # fmt: skip
    assert system.loops[MOTION].default == system.loops[VIDEO].default == ("ddim", 25)
    assert set(system.loops[MOTION].without) == {"step_drawn"} and system.output.field == "field"


def test_the_released_form_runs_the_controlnet_always_and_a_loop_may_have_one_branch() -> None:
    released = motion_system(models.small_parts("released"))
    assert not released.loops[MOTION].without
    one = motion_system(models.small_parts(guidance=(None, None)))
    assert not {"negative_prompt", "guidance", "motion_guidance"} & one.inputs.keys()
    assert all("negative_text" not in step.inputs and "guidance" not in step.inputs for step in one.steps)


@pytest.mark.slow
@pytest.mark.parametrize(("frames", "height", "width"), [(17, 16, 16), (1, 16, 16), (4, 18, 16), (4, 16, 0)])
def test_sizes_that_the_model_does_not_have_are_refused(frames: int, height: int, width: int, world: Any) -> None:
    with pytest.raises(CheckpointError, match=f"frames is {frames} and the size {height}x{width}; allowed: 2 to 16 frames"):
        motion_i2v_system(MotionI2VSources(world.made.models), frames=frames, height=height, width=width)
