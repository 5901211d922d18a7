"""Every published model in every dtype of its files, with the defaults of every command, on every backend that can run here.

A cell of the matrix is a model (small widths, released layout) whose files are stored in one dtype. It is exported, given a
memory and generated from by the commands a user types. What it gives is compared with diffusers' own pipeline in that dtype,
both against diffusers in float64: our error may be at most twice theirs. The table in docs/models.md is what this file's own
run shows: MOTIONRT_WRITE_MATRIX=1 runs all cells and writes it; otherwise cells are `CELLS`, and the last test holds their rows
to it.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")

from by_path import load_by_path  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors import safe_open  # noqa: E402

from motionrt.export.checkpoints.motionrag_files import DYNAMICRAFTER  # noqa: E402
from motionrt.export.systems import svd_step as svd  # noqa: E402
from motionrt.runtime.backends.onnx_form import form_folder  # noqa: E402
from motionrt.runtime.backends.open import RunOptions, open_backend  # noqa: E402
from motionrt.runtime.bundle.bundle import Bundle  # noqa: E402
from motionrt.runtime.dtypes import DTYPES  # noqa: E402
from motionrt.runtime.inputs import convert  # noqa: E402
from motionrt.runtime.job import noise_stream  # noqa: E402
from motionrt.runtime.media.video import read_clip, write_video  # noqa: E402
from motionrt.runtime.memory.memory import MotionMemory  # noqa: E402
from motionrt.runtime.noise import noise  # noqa: E402
from motionrt.runtime.pipeline import MotionPipeline, Result  # noqa: E402

pytestmark = pytest.mark.timeout(1200)
ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "models.md"
models = load_by_path(Path(__file__).resolve().parents[1] / "tests/helpers/tiny_models.py")
shared = load_by_path(Path(__file__).resolve().parents[1] / "tests/helpers/shared_graphs.py")
plainly = load_by_path(Path(__file__).resolve().parents[1] / "tests/helpers/diffusers_reference.py")
crafted = load_by_path(Path(__file__).resolve().parents[1] / "tests/helpers/dynamicrafter_models.py")
crafter = load_by_path(Path(__file__).resolve().parents[1] / "tests/helpers/dynamicrafter_reference.py")
KINDS = ("bfloat16", "float16", "float32")
CRAFTER = "dynamicrafter-1024"
RELEASED = {"cogvideox-5b-i2v": "bfloat16", "svd": "float16", CRAFTER: "float32"}
SIZES = {"cogvideox-5b-i2v": (17, 16, 32), "svd": (9, 16, 32), CRAFTER: (8, 16, 32)}  # frames, height, width
PROMPT, SEED, STEPS, CLIPS = "w5 w9 w30", 11, 4, 3
COLUMNS = (
    "export, `memory add`, `generate`", "ONNX Runtime, CPU", "torch, CPU, float32", "torch, CPU, in the files' dtype",
    "ONNX Runtime, float16 form", "ONNX Runtime, bfloat16 form", "TensorRT-RTX, float16", "TensorRT-RTX, bfloat16",
)  # fmt: skip
NO_GPU, NO_KERNELS = "built; not run: no GPU", "written; not run: no GPU"
WRITES = bool(os.environ.get("MOTIONRT_WRITE_MATRIX"))
ALL = [(model, kind) for model in SIZES for kind in KINDS]
# Each model in the dtype that it was released in, which is every dtype once: a cell takes minutes.
CELLS = [(model, kind) for model, kind in ALL if WRITES or kind == RELEASED[model]]
TABLE: dict[tuple[str, str], dict[str, str]] = {}
Run = Callable[..., tuple[int, str, str]]


@dataclass
class Cell:
    """One model with files of one dtype: its folder, modules and files in float32, and what diffusers gives by dtype."""

    model: str
    kind: str
    folder: Path
    parts: dict[str, Any]
    files: dict[str, Any]
    config: dict[str, Any]
    still: NDArray[np.uint8]
    videos: dict[str, tuple[NDArray[Any], NDArray[Any]]] = field(default_factory=dict)

    @property
    def bundle(self) -> Path:
        return self.folder / "bundle"

    @property
    def memory(self) -> Path:
        return self.folder / "memory"

    def shows(self, column: str, what: str = "yes") -> None:
        """Note what a test of this cell has shown."""
        TABLE.setdefault((self.model, self.kind), {})[column] = what

    def plain(self, result: Result, dtype: str) -> tuple[NDArray[Any], NDArray[Any]]:
        """(latents, frames [T, H, W, 3] of 0 to 255) of diffusers' pipeline in `dtype`, from the references of `result`."""
        if dtype not in self.videos:
            self.videos[dtype] = self._plain(result, getattr(torch, dtype))
        return self.videos[dtype]

    def _plain(self, result: Result, dtype: Any) -> tuple[NDArray[Any], NDArray[Any]]:
        manifest = Bundle.open(self.bundle).manifest

        def draw(name: str, step: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
            return noise(SEED, noise_stream(manifest, name), step, shape)

        frames, height, width = SIZES[self.model]
        image = torch.from_numpy(self.still).permute(2, 0, 1)[None].float() / 127.5 - 1
        grey = torch.zeros(1, frames, 3, height, width)
        unconditional = plainly.motion_tokens(self.parts, self.files, grey, dtype)
        looks = plainly.appearance_tokens(self.parts, self.files, image, dtype)
        motion, appearance = (
            torch.from_numpy(np.stack([r.record[name] for r in result.references]).astype(np.float32)).to(dtype)
            for name in ("motion", "appearance")
        )
        motion = plainly.predicted_motion(self.files, motion, appearance, looks)
        if self.model == "svd":
            latents, video = plainly.svd_video(
                self.config, models.EULER, self.parts, self.files, still=self.still, motion=motion,
                unconditional=unconditional, frames=frames, steps=STEPS, draw=draw, dtype=dtype,
            )  # fmt: skip
        elif self.model == CRAFTER:
            bundle = Bundle.open(self.bundle)
            ids, empty = (
                torch.from_numpy(bundle.tokenize("text", text, crafted.LENGTH)["input_ids"]) for text in (PROMPT, "")
            )
            latents, video = crafter.plain_video(
                self.parts["crafter"], self.files, "1024", image=image, ids=ids, empty=empty, frames=frames, asked=STEPS,
                spacing="uniform", guidance=3.0, rescale=0.0, fs=15, draw=draw, motion=motion, unconditional=unconditional,
                dtype=dtype,
            )  # fmt: skip
        else:
            bundle = Bundle.open(self.bundle)
            given = [convert(bundle, name, text) for name, text in (("prompt", PROMPT), ("negative_prompt", ""))]
            ids = [torch.from_numpy(next(value for key, value in one.items() if key.endswith("input_ids"))) for one in given]
            latents, video, _ = plainly.cogvideox_video(
                self.folder / "base", self.config, models.SCHEDULER, self.parts, self.files, image=image, ids=ids,
                motion=motion, unconditional=unconditional, frames=frames, steps=STEPS, draw=draw, dtype=dtype,
            )  # fmt: skip
        return latents.double().numpy(), video.permute(0, 2, 3, 1).double().numpy() * 255


@pytest.fixture(scope="module")
def cell(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Cell]:
    """Files, bundle and memory of a model in a dtype, made once by the commands of docs/models.md and no options of dtype."""
    made: dict[tuple[str, str], Cell] = {}

    def get(model: str, kind: str) -> Cell:
        if (model, kind) not in made:
            made[model, kind] = _written(tmp_path_factory.mktemp(f"{model}-{kind}"), model, kind)
        return made[model, kind]

    return get


def _written(folder: Path, model: str, kind: str) -> Cell:
    dtype, (frames, height, width) = getattr(torch, kind), SIZES[model]
    if model == "svd":
        config = models.UNET
        parts = models.write_svd(folder / "base", config, dtype)
        blocks = {f"unet.{path}": a.to_q.in_features for path, a in svd.spatial_attentions(parts["unet"])}
    elif model == CRAFTER:
        config, blocks = {}, crafted.blocks()
        parts = {"crafter": crafted.write(folder / "base", "1024", dtype)}
    else:
        config = models.cogvideox_config(2)
        parts = models.write_cogvideox(folder / "base", config, dtype)
        blocks = {f"transformer.transformer_blocks.{i}.attn1": 64 for i in range(2)}
    named = {"names": DYNAMICRAFTER} if model == CRAFTER else {}
    overlay = model == "cogvideox-5b-i2v"
    files = models.release.rounded(models.release.motionrag_states(blocks, overlay=overlay, **named), dtype)
    models.release.save(folder / "rag", files)
    parts |= models.write_encoders(folder, dtype)
    draw = np.random.default_rng(3)
    still = draw.integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(still).save(folder / "still.png")
    (folder / "clips").mkdir()
    for index in range(CLIPS):
        ramp = np.linspace(20 * index, 200, 3 * frames).astype(np.uint8)[:, None, None, None]
        pictures = np.broadcast_to(ramp, (3 * frames, height, width, 3)) + draw.integers(0, 40, (1, height, width, 3), np.uint8)
        write_video(folder / "clips" / f"{index}.mp4", np.ascontiguousarray(pictures.astype(np.uint8)), 24)
        (folder / "clips" / f"{index}.txt").write_text(f"clip number {index} moves")
    return Cell(model, kind, folder, parts, models.release.rounded(files, torch.float32), config, still)


def from_files_to_a_video(made: Cell, run: Run, graphs: Path) -> None:
    """Every command with its defaults, from released files to a video; `graphs`: see shared_graphs.py."""
    model, kind, at = made.model, made.kind, made.folder
    size: tuple[Any, ...] = ()
    if model != "cogvideox-5b-i2v":  # the default takes minutes a video
        size = tuple(part for name, value in zip(("frames", "height", "width"), SIZES[model], strict=True)
                     for part in (f"--{name}", value))  # fmt: skip
    if model == CRAFTER:
        size += ("--tokenizer", at / "base" / "tokenizer")
    with shared.shared_graphs(graphs):
        status, out, err = run(
            "export", model, "--base", at / "base", "--motionrag", at / "rag", "--videomae", at / "videomae", "--dinov2",
            at / "dinov2", "--sos-token", f"seed:{plainly.SOS_SEED}", "-o", made.bundle, *size,
        )  # fmt: skip
    assert status == 0, err
    bundle = Bundle.open(made.bundle)
    assert {port.dtype for spec in bundle.graphs.values() for port in (*spec.inputs, *spec.outputs)} <= {"float32", "int64"}
    # DynamiCrafter's `fs` is of the request: what reads it and the timestep is made for all steps once a request
    programs = {"schedule", "request", "step", "step_extrapolated"} | ({"timeline"} if model == CRAFTER else set())
    assert set(bundle.programs) == programs
    for name in ("motion", "cama", "step", "decode"):  # weights as they came; only what was computed from them is float32
        with safe_open(made.bundle / "graphs" / f"{name}.safetensors", framework="pt") as file:
            sizes: dict[str, int] = {}
            for key in file.keys():
                part = file.get_slice(key)
                sizes[part.get_dtype()] = sizes.get(part.get_dtype(), 0) + int(np.prod(part.get_shape()))
        own = DTYPES[kind].safetensors
        assert set(sizes) <= {own, "F32"} and sizes[own] > 0.5 * sum(sizes.values()), (name, sizes)
    for command in (
        ("doctor", made.bundle), ("verify", made.bundle), ("memory", "create", made.memory, "--bundle", made.bundle),
        ("memory", "add", made.memory, at / "clips", "--bundle", made.bundle),
        ("memory", "search", made.memory, "clip number 1", "--bundle", made.bundle),
        ("generate", "-b", made.bundle, "-m", made.memory, "-i", at / "still.png", "-p", PROMPT, "-o", at / "video.mp4"),
    ):
        status, out, err = run(*command)
        assert status == 0, (command, err)
    frames, height, width = SIZES[model]
    video = read_clip(at / "video.mp4", frames, height, width, bundle.manifest.output.fps)
    assert video.shape == (frames, 3, height, width)
    with MotionMemory.open(made.memory, readonly=True) as memory:
        assert len(memory) == CLIPS
    made.shows(COLUMNS[0])


def generated(made: Cell, options: RunOptions) -> tuple[Result, NDArray[Any]]:
    """A request's result with all clips of the memory as references, and its last latents."""
    with MotionPipeline.from_bundle(made.bundle, made.memory, backend=open_backend(options)) as pipeline:
        asked = {"seed": SEED, "steps": STEPS, "guidance": 3.0, "references": CLIPS}  # all, however likely
        job = pipeline.start(pipeline.request(made.still, PROMPT, **asked))
        job.keep = True
        result = pipeline.result(job)
    return result, np.asarray(job.values["latents"])


def hold_to_the_law(made: Cell, options: RunOptions, yardstick: str) -> None:
    """Latents and frames of ours are no further from diffusers in float64 than twice diffusers in `yardstick`."""
    result, latents = generated(made, options)
    assert len(result.references) == CLIPS and result.fallback is None
    exact, plain = made.plain(result, "float64"), made.plain(result, yardstick)
    scale = float(np.abs(exact[0]).max())
    ours, theirs = (float(np.sqrt(np.mean((value - exact[0]) ** 2))) / scale for value in (latents, plain[0]))
    print(f"{made.model} {made.kind} {options.backend} {options.precision}: latents {ours:.2e}, diffusers {theirs:.2e}")
    assert ours <= 2 * theirs + 1e-6, (ours, theirs)
    pixels = [float(np.sqrt(np.mean((value - exact[1]) ** 2))) for value in (result.frames.astype(np.float64), plain[1])]
    assert pixels[0] <= 2 * pixels[1] + 0.5, pixels  # a rounding to whole numbers is 0.29


def as_near_as_diffusers(made: Cell) -> None:
    """What runs here without a build, held to the law."""
    for column, options in (
        (COLUMNS[1], RunOptions(threads=1)),
        (COLUMNS[2], RunOptions("torch", threads=1)),
        (COLUMNS[3], RunOptions("torch", threads=1, precision=made.kind)),
    ):
        hold_to_the_law(made, options, made.kind)
        made.shows(column)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "kind"), CELLS)
def test_commands_with_their_defaults_go_from_released_files_to_a_video(
    model: str, kind: str, cell: Callable[[str, str], Cell], run: Run, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from_files_to_a_video(cell(model, kind), run, shared.store(tmp_path_factory))


@pytest.mark.slow
@pytest.mark.parametrize(("model", "kind"), CELLS)
def test_onnxruntime_and_torch_give_what_diffusers_gives(model: str, kind: str, cell: Callable[[str, str], Cell]) -> None:
    as_near_as_diffusers(cell(model, kind))


@pytest.mark.slow
@pytest.mark.parametrize(("model", "kind"), CELLS)
def test_tokens_of_the_memory_are_those_of_the_plain_encoders(model: str, kind: str, cell: Callable[[str, str], Cell]) -> None:
    made = cell(model, kind)
    frames, height, width = SIZES[model]
    with MotionPipeline.from_bundle(made.bundle, made.memory, threads=1) as pipeline:
        found = pipeline(made.still, PROMPT, steps=2, references=CLIPS).references
        rate = pipeline.bundle.manifest.output.fps
    clips = [read_clip(made.folder / "clips" / f"{r.caption.split()[2]}.mp4", frames, height, width, rate) for r in found]
    video = torch.from_numpy(np.stack(clips))
    for name, tokens, given in (
        ("motion", plainly.motion_tokens, video), ("appearance", plainly.appearance_tokens, video[:, 0])
    ):  # fmt: skip
        stored = np.stack([r.record[name] for r in found]).astype(np.float64)
        exact, plain = (tokens(made.parts, made.files, given, getattr(torch, d)).double().numpy() for d in ("float64", kind))
        ours, theirs = (float(np.abs(value - exact).max()) for value in (stored, plain))
        half = float(np.abs(exact).max()) * DTYPES["float16"].epsilon  # the memory keeps float16
        assert ours <= 2 * theirs + half, (name, ours, theirs, half)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "kind"), CELLS)
def test_forms_for_onnxruntime_on_a_gpu_are_written_and_float16_runs_here(
    model: str, kind: str, cell: Callable[[str, str], Cell], run: Run
) -> None:
    import onnx

    made = cell(model, kind)
    for dtype in ("float16", "bfloat16"):
        status, _, err = run("build", made.bundle, "--flavor", "onnxruntime", "--dtype", dtype)
        assert status == 0, err
        for name in Bundle.open(made.bundle).graphs:
            path = form_folder(made.bundle, dtype) / f"{name}.onnx"
            onnx.checker.check_model(str(path), full_check=True)
    hold_to_the_law(made, RunOptions(threads=1, precision="float16"), "float16")
    made.shows(COLUMNS[4], "yes, on the CPU")
    made.shows(COLUMNS[5], NO_KERNELS)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "kind"), CELLS)
def test_tensorrt_rtx_builds_every_graph(model: str, kind: str, cell: Callable[[str, str], Cell], run: Run) -> None:
    pytest.importorskip("tensorrt_rtx")
    made = cell(model, kind)
    for column, dtype in ((COLUMNS[6], "float16"), (COLUMNS[7], "bfloat16")):
        status, out, err = run("build", made.bundle, "--target", "sm_89,sm_120", "--dtype", dtype)
        assert status == 0, err
        engines = made.bundle / "engines" / f"rtx-sm_89+sm_120-{dtype}"
        assert {path.stem for path in engines.glob("*.json")} == set(Bundle.open(made.bundle).graphs)
        made.shows(column, NO_GPU)
        shutil.rmtree(engines)


@pytest.mark.slow
def test_page_shows_what_this_run_shows() -> None:
    assert set(TABLE) == set(CELLS) and all(set(row) == set(COLUMNS) for row in TABLE.values()), TABLE
    rows = {cell: f"| {' | '.join((*cell, *(TABLE[cell][column] for column in COLUMNS)))} |" for cell in CELLS}
    text = PAGE.read_text(encoding="utf-8")
    marks = re.compile(r"(<!-- matrix: written by tests/test_matrix.py -->\n)(.*?)(<!-- end of matrix -->)", re.S)
    if WRITES:
        head = [f"| model | files in | {' | '.join(COLUMNS)} |", "| --- " * (2 + len(COLUMNS)) + "|"]
        lines = "\n".join([*head, *rows.values()])
        PAGE.write_text(marks.sub(lambda found: f"{found[1]}{lines}\n{found[3]}", text), encoding="utf-8")
        return
    (found,) = marks.finditer(text)
    shown = found[2].splitlines()[2:]
    assert [tuple(line.split(" | ")[:2]) for line in shown] == [(f"| {model}", kind) for model, kind in ALL]
    missing = [row for row in rows.values() if row not in shown]
    assert not missing, f"not on the page: {missing}; run this file with MOTIONRT_WRITE_MATRIX=1, and commit"
