"""A MotionClone bundle from released files on ONNX Runtime against the same steps in plain torch; what an export refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")

from by_path import load_by_path  # noqa: E402
from diffusers import SparseControlNetModel  # noqa: E402
from PIL import Image  # noqa: E402

from motionrt.export.checkpoints.animatediff_files import MotionCloneSources, open_animatediff  # noqa: E402
from motionrt.export.checkpoints.files import CheckpointError  # noqa: E402
from motionrt.export.compiler.partition import any_rows, partition  # noqa: E402
from motionrt.export.exporter import export_system  # noqa: E402
from motionrt.export.systems.motionclone.frames import DecodeFrames  # noqa: E402
from motionrt.export.systems.motionclone.rows import COLUMNS, Recipe, noise_schedule, rows  # noqa: E402
from motionrt.export.systems.motionclone.step import CHANGES, Extract, GuidedStep, PlainStep  # noqa: E402
from motionrt.export.systems.motionclone.system import VIDEO, motionclone_system, tokenized  # noqa: E402
from motionrt.export.systems.motionclone.unet import TappedUNet, motion_unet, prepared  # noqa: E402
from motionrt.runtime.job import noise_stream  # noqa: E402
from motionrt.runtime.media.video import read_clip, write_video  # noqa: E402
from motionrt.runtime.noise import noise  # noqa: E402
from motionrt.runtime.pipeline import MotionPipeline  # noqa: E402

HELPERS = Path(__file__).resolve().parents[4] / "tests/helpers"
Run = Callable[..., tuple[int, str, str]]
models, tiny = load_by_path(HELPERS / "animatediff_models.py"), load_by_path(HELPERS / "tiny_models.py")
shared = load_by_path(HELPERS / "shared_graphs.py")
FRAMES, SIZE, SEED, PROMPT = 4, 16, 3, "a blue drift"
STRONG = 100.0  # a motion scale at which random weights show that they are guided
TABLE = rows(Recipe(3, 2, 0.3, 2000, 1, 1), noise_schedule(models.SCHEDULER)[0])


def loaded(module: Any, weights: Any) -> Any:
    left = module.load_state_dict({name: lazy.read() for name, lazy in weights.items()}, strict=False)
    assert not left.unexpected_keys and all(name.endswith("pos_embed.pe") for name in left.missing_keys)
    return module.eval().requires_grad_(False)


class Plain:
    """The parts of released files in memory, and a video made of them step by step. SparseCtrl is diffusers' own pass."""

    def __init__(self, sources: MotionCloneSources) -> None:
        self.files = open_animatediff(sources)
        self.unet = TappedUNet(loaded(motion_unet(self.files.unet_config), self.files.unet))
        self.vae: Any = replace(self.files.vae, module=DecodeFrames(self.files.vae.module)).loaded().vae
        self.text = self.files.text.loaded()
        self.scale = self.vae.config.scaling_factor
        control = self.files.sparsectrl
        self.sparse = prepared(loaded(SparseControlNetModel(**control.config), control.weights))

    def encoded(self, pictures: Any) -> Any:
        return self.vae.encode(pictures).latent_dist.mean * self.scale

    def residuals(self, picture: Any, text: Any, time: Any) -> list[Any]:
        """Of one text, `[1, F, c, h, w]` each; `picture [1, 3, H, W]` in [-1, 1]."""
        given = (picture + 1) / 2
        condition = torch.zeros(1, given.shape[1], FRAMES, *given.shape[2:])
        condition[:, :, 0], mask = given, torch.zeros(1, 1, FRAMES, *given.shape[2:])
        mask[:, :, 0] = 1
        zeros = torch.zeros(1, 4, FRAMES, SIZE // 2, SIZE // 2)
        down, middle = self.sparse(zeros, time, text, condition, 1.0, conditioning_mask=mask, return_dict=False)
        return [value.unflatten(0, (1, FRAMES)) for value in (*down, middle)]

    @torch.no_grad()
    def video(self, clip: Any, image: Any, start: Any, scale: float) -> tuple[Any, list[float]]:
        """Frames `[F, H, W, 3]` as whole numbers, and the energies of the guided steps; scale 0: plain steps alone."""
        text, negative = (self.text(tokenized(self.files.tokenizer, words)) for words in (PROMPT, ""))
        level = float(noise_schedule(models.SCHEDULER)[0][400])
        extract = Extract(self.unet, negative, 400, level, 1.0)
        added = [value[:, None] for value in self.residuals(clip[:1], negative, torch.tensor([400.0]))]
        reference = self.encoded(clip).half().float()
        motion = extract(reference[None, None], torch.ones(1, 1), start, *added)
        latents, energies = start, []
        for row in torch.from_numpy(TABLE):
            named = dict(zip(COLUMNS, row[:, None], strict=True))
            time = named["timestep"]
            both = (self.residuals(image, words, time) for words in (negative, text))
            given = [torch.stack(pair, 1) for pair in zip(*both, strict=True)]
            inputs = (latents, row[None, 5:], named["guidance"], time, text, negative)
            if named["graph"] or not scale:
                latents = PlainStep(self.unet)(*inputs, *given)
            else:
                latents, energy = GuidedStep(self.unet)(*inputs, named["weight"], torch.tensor([scale]), *motion, *given)
                energies.append(float(energy))
        frames = self.vae.decode(latents[0] / self.scale).sample
        return ((frames.clamp(-1, 1) + 1) * 127.5).permute(0, 2, 3, 1).numpy(), energies


def described(folder: Path, mode: str) -> tuple[MotionCloneSources, Any]:
    """Released files (`text`: without SparseCtrl), and their system. With SparseCtrl there is a domain adapter, as in
    docs/models.md: the steps are the same then, and traced once."""
    files = models.small_animatediff(folder, mode)
    more = {} if mode == "text" else {"sparsectrl": files.sparsectrl, "domain_adapter": files.adapter}
    sources = MotionCloneSources(files.base, files.motion, **more)
    return sources, motionclone_system(sources, frames=FRAMES, height=SIZE, width=SIZE)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Released files, the bundle that was exported of them with three steps, a clip, a sketch. docs/models.md's test exports
    the other two: without SparseCtrl, and of the rgb file."""
    folder = tmp_path_factory.mktemp("sketch")
    sources, system = described(folder, "sketch")
    loop = msgspec.structs.replace(system.loops[VIDEO], schedules={"short": (3,)}, default=("short", 3))
    schedules = {**system.schedules, VIDEO: {"short": {3: TABLE}}}
    with shared.shared_graphs(shared.store(tmp_path_factory)):
        short = replace(system, loops={**system.loops, VIDEO: loop}, schedules=schedules)
        export_system(short, folder / "bundle", programs=False)
    draw = np.random.default_rng(1)
    course = draw.integers(0, 256, (2, FRAMES, 4, 4, 3), np.uint8).repeat(4, 2).repeat(4, 3)
    write_video(folder / "clip.mp4", np.ascontiguousarray(course[0]), 8)
    Image.fromarray(course[1, 0]).save(folder / "image.png")
    return SimpleNamespace(folder=folder, sources=sources, image=course[1, 0])


@pytest.mark.slow
def test_bundle_gives_the_video_of_the_same_steps_in_torch(world: Any) -> None:
    plain = Plain(world.sources)
    clip = torch.from_numpy(read_clip(world.folder / "clip.mp4", FRAMES, SIZE, SIZE, 8))
    image = torch.tensor(world.image).permute(2, 0, 1)[None].float() / 127.5 - 1
    with MotionPipeline.from_bundle(world.folder / "bundle", threads=1) as pipeline:
        start = noise(SEED, noise_stream(pipeline.bundle.manifest, "start"), 0, (1, FRAMES, 4, SIZE // 2, SIZE // 2))
        videos = {}
        for scale in (STRONG, 0.0):
            given = {"image": world.folder / "image.png", **({"references": [world.folder / "clip.mp4"]} if scale else {})}
            found = pipeline(prompt=PROMPT, seed=SEED, motion_scale=scale, **given).frames
            wanted, energies = plain.video(clip, image, torch.from_numpy(start), scale)
            assert len(energies) == 2 * (scale > 0) and all(energy > 0 for energy in energies)
            assert np.abs(found - wanted).max() <= 0.75  # grey levels, of which rounding is 0.5
            videos[scale] = found.astype(int)
    assert np.abs(videos[STRONG] - videos[0.0]).max() > 4  # the clip guides
    assert np.std(videos[STRONG]) > 10


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["text", "rgb", "sketch"])
def test_system_says_what_it_takes_and_by_which_schedules(mode: str, tmp_path: Path) -> None:
    _, system = described(tmp_path, mode)
    own = {"text": (), "rgb": ("image",), "sketch": ("sketch",)}[mode]
    names = [name for each in (*own, "camera", "object") for name in (each, f"{each}_short")]
    assert list(system.schedules[VIDEO]) == names
    default = {"text": ("camera", 100), "rgb": ("image", 100), "sketch": ("sketch", 200)}
    assert system.loops[VIDEO].default == default[mode]
    assert ("image" in system.inputs) == (mode != "text")
    assert system.loops[VIDEO].windows == ({} if mode == "text" else {"sparse": 2})
    assert [part.name for part in system.memory.record] == ["latents", *(["first"] if mode == "sketch" else [])]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("form", ["representation", "semantic"])
def test_released_files_by_the_commands_of_the_docs(
    form: str, tmp_path: Path, run: Run, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Without SparseCtrl: export, inspect, doctor, a memory of two clips, videos of one that the prompt found, and of both."""
    files, bundle, memory = models.small_animatediff(tmp_path), tmp_path / "bundle", tmp_path / "memory"
    given = ("--base", files.base, "--motion", files.motion, "--frames", FRAMES, "--height", SIZE, "--width", SIZE)
    with shared.shared_graphs(shared.store(tmp_path_factory)):
        own = ("--semantic",) if form == "semantic" else ("--record", form)
        status, said, wrong = run("export", "motionclone", *given, *own, "-o", bundle, "--without-torch")
    assert status == 0 and "exported. Look at it with" in said, wrong
    status, said, _ = run("inspect", bundle)
    assert status == 0 and ("approximation fixed noise in represent: error" in said) == (form == "representation")
    status, said, _ = run("doctor", bundle)
    assert status == 0 and "step_guided" in said
    draw = np.random.default_rng(1)
    assert run("memory", "create", memory, "-b", bundle)[0] == 0
    for name in ("drift", "blue"):
        course = draw.integers(0, 256, (FRAMES, 4, 4, 3), np.uint8).repeat(4, 1).repeat(4, 2)
        write_video(tmp_path / f"{name}.mp4", course, 8)
        status, said, _ = run("memory", "add", memory, tmp_path / f"{name}.mp4", "-b", bundle, "--caption", f"a {name} clip")
        assert status == 0 and "1 added" in said
    ask = ("generate", "-b", bundle, "-p", PROMPT, "--solver", "camera_short", "--steps", 20, "--seed", 3, "-o")
    ways: dict[str, tuple[object, ...]] = {
        "found": ("-m", memory, "-k", 1), "both": ("-m", memory, "-k", 2), "plain": ("--motion-scale", 0),
    }  # fmt: skip
    semantic = ("--semantic", 500, "--object-token", 3, "--clip-prompt", "a blue", "--clip-token", 2)
    if form == "semantic":
        ways[form] = (*ways["both"], *semantic)
    for options in (("--composition", 1), *(() if form == "semantic" else (semantic,))):
        assert run(*ask, tmp_path / "other.png", *ways["both"], *options)[0] == 2
    videos = []
    for name, way in ways.items():
        status, said, wrong = run(*ask, tmp_path / f"{name}.png", *way)
        assert status == 0, wrong
        videos.append((tmp_path / f"{name}.png").read_bytes())
    assert len(set(videos)) == len(ways)


@pytest.mark.slow
def test_tables_of_many_steps_hold_what_each_step_alone_reads() -> None:
    """A step is traced for one timestep: both rows of guidance of a step must stay beside each other where there are more."""
    config = {
        "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": models.WIDTH,
        "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"), "num_attention_heads": 4,
        "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"), "motion_num_attention_heads": 4,
        "use_motion_mid_block": False,
    }  # fmt: skip
    step = PlainStep(TappedUNet(tiny.randomise(motion_unet(config), 4))).eval()
    latents, text = torch.zeros(1, 2, 4, 4, 4), torch.zeros(1, models.TOKENS, models.WIDTH)
    args = (latents, torch.zeros(1, 7), torch.zeros(1), torch.zeros(1), text, text)
    program = partition(step, args, CHANGES, outputs=("next_latents",)).schedule
    any_rows(program.module)
    times = torch.tensor([999.0, 400.0, 3.0])
    with torch.no_grad():
        together, alone = program.module(times), [program.module(time[None]) for time in times]
    for table, *each in zip(together, *alone, strict=True):
        torch.testing.assert_close(table, torch.cat(each))


# --- what an export refuses -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("frames", "height", "width"), [(33, 16, 16), (1, 16, 16), (4, 18, 16), (4, 16, 0)])
def test_sizes_that_the_model_does_not_have_are_refused_before_any_work(
    frames: int, height: int, width: int, tmp_path: Path
) -> None:
    files = models.small_animatediff(tmp_path)
    said: list[str] = []
    with pytest.raises(CheckpointError, match=f"frames is {frames} and the size {height}x{width}; allowed: 2 to 32 frames, .*"
                       "multiples of 4 pixels"):  # fmt: skip
        motionclone_system(
            MotionCloneSources(files.base, files.motion), frames=frames, height=height, width=width, say=said.append
        )
    assert not said


@pytest.mark.slow
def test_sparsectrl_of_another_unet_is_refused(tmp_path: Path) -> None:
    files = models.small_animatediff(tmp_path)
    other = SparseControlNetModel(
        block_out_channels=(8, 24), layers_per_block=1, norm_num_groups=4, cross_attention_dim=models.WIDTH,
        attention_head_dim=4, motion_num_attention_heads=4, down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
    )  # fmt: skip
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"other: block_out_channels is .*24.*, and the UNet's is .*16.* must be equal"):
        motionclone_system(
            MotionCloneSources(files.base, files.motion, sparsectrl=tmp_path / "other"), frames=4, height=16, width=16
        )
