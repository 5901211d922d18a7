"""What is shipped beside the checkpoint: the memory's clips with their captions, the pictures and prompts. See train.py."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import domain
import model as demo
import numpy as np
from fields import true_field
from PIL import Image
from recipe import log, make_memory
from world import FRAMES, allowed

HERE = Path(__file__).resolve().parent
PER_FAMILY = 2  # clips of each family in the memory
PROMPTS = (  # no stage of the training saw these objects, nor the last two motions
    ("star_circles", "red star", "circle_clockwise"), ("square_slides", "blue square", "slide_left"),
    ("circle_bounces", "yellow circle", "bounce"), ("diamond_turns", "purple diamond", "turn_right_down"),
    ("cross_hops", "orange cross", "hop_right"), ("triangle_rises", "green triangle", "slide_up"),
    ("square_loops", "cyan square", "loop_up"), ("circle_eight", "pink circle", "figure_eight"),
)  # fmt: skip


def clips() -> dict[str, domain.Spec]:
    """The memory's, by file name."""
    rng, found = np.random.default_rng(43), {}
    for number, name in enumerate(name for name in domain.FAMILIES for _ in range(PER_FAMILY)):
        found[f"{number:03d}_{name}.mp4"] = allowed(rng, domain.sample_spec(rng, name, frames=FRAMES))
    return found


def stage_clips() -> None:
    """clips/NUMBER_FAMILY.mp4 of 16 frames, captions.json of the motion alone; inputs/NAME.png and prompts.json."""
    from motionrt.runtime.media.video import write_video

    for name in ("clips", "inputs"):
        shutil.rmtree(HERE / name, ignore_errors=True)
        (HERE / name).mkdir()
    for file, spec in clips().items():
        write_video(HERE / "clips" / file, domain.render(spec)[0], demo.FPS)
    captions = {file: domain.FAMILIES[spec.family].phrase for file, spec in clips().items()}
    (HERE / "clips" / "captions.json").write_text(json.dumps(captions, indent=1) + "\n")
    rng, rows = np.random.default_rng(45), []
    for name, thing, family in PROMPTS:
        colour, shape = thing.split()
        spec = replace(domain.sample_spec(rng, family, frames=FRAMES), colour=colour, shape=shape)
        Image.fromarray(domain.render(spec, frames=1)[0][0]).save(HERE / "inputs" / f"{name}.png", optimize=True)
        rows.append({"name": name, "image": f"{name}.png", "prompt": domain.caption(spec)})
    (HERE / "prompts.json").write_text(json.dumps(rows, indent=1) + "\n")
    log("wrote", len(captions), "clips and", len(rows), "prompts")


def stage_memory() -> None:
    """memory, from bundle and clips, with the clips' true fields; sources are relative to this folder."""
    os.chdir(HERE)
    fields = {Path("clips", file).with_suffix(".npy"): true_field(spec) for file, spec in clips().items()}
    try:
        for path, field in fields.items():
            np.save(path, field)
        make_memory(HERE, "memory", "clips")
    finally:
        for path in fields:
            path.unlink(missing_ok=True)
