"""What is shipped beside the checkpoint: the memory's clips with their captions, and the prompts. See train.py."""

from __future__ import annotations

import json
import shutil

import domain
import model as demo
import numpy as np
from recipe import log, make_memory
from training import HERE
from world import FRAMES, allowed

PER_FAMILY = 2  # clips of each family in the memory
PROMPTS = (  # what the memory is asked for; no stage of the training saw these objects, nor the last two motions
    ("star_slides_left", "red star", "slide_left"), ("star_circles", "red star", "circle_clockwise"),
    ("square_hops", "blue square", "hop_right"), ("circle_waves", "yellow circle", "wave_right"),
    ("circle_turns", "pink circle", "turn_left_up"), ("triangle_drifts", "green triangle", "diagonal_down_right"),
    ("diamond_swings", "purple diamond", "swing"), ("cross_bounces", "orange cross", "bounce"),
    ("square_loops", "cyan square", "loop_up"), ("triangle_eight", "green triangle", "figure_eight"),
)  # fmt: skip


def stage_clips() -> None:
    """clips/NUMBER_FAMILY.mp4 of 16 frames, captions.json of the motion alone, and prompts.json."""
    from motionrt.runtime.media.video import write_video

    folder = HERE / "clips"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    rng = np.random.default_rng(41)
    captions = {}
    for number, name in enumerate(name for name in domain.FAMILIES for _ in range(PER_FAMILY)):
        spec = allowed(rng, domain.sample_spec(rng, name, frames=FRAMES))
        file = f"{number:03d}_{name}.mp4"
        write_video(folder / file, domain.render(spec)[0], demo.FPS)
        captions[file] = domain.FAMILIES[name].phrase
    (folder / "captions.json").write_text(json.dumps(captions, indent=1) + "\n")
    rows = [{"name": name, "prompt": f"a {thing} {domain.FAMILIES[family].phrase}"} for name, thing, family in PROMPTS]
    (HERE / "prompts.json").write_text(json.dumps(rows, indent=1) + "\n")
    log("wrote", len(captions), "clips and", len(rows), "prompts")


def stage_memory() -> None:
    """memory, from bundle and clips; sources are relative to this folder."""
    make_memory(HERE, "memory", "clips")
