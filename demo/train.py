"""Train the demo from nothing: `PYTHONPATH=src python demo/train.py all`, or one stage at a time.

    data         render the training clips                                   1 min
    autoencoder  video <-> latents: look of frame 0, motion field of the rest
    motion       VideoMAE and its Resampler: a clip's motion tokens
    appearance   DINOv2 and its Resampler: a still's appearance tokens
    text         the T5 encoder of prompts
    cama         motion tokens for a still, from reference clips
    denoiser     the CogVideoX transformer with its Motion-Adapters
    refine       the decoder again, on latents as the denoiser makes them
    pack         demo/checkpoint.safetensors
    clips        the clips of both memories, the stills, the prompts
    export       demo/bundle
    memories     demo/memory and demo/memory_unseen

In this order, but `autoencoder` does not depend on motion -> appearance -> text -> cama: the two may run side by side.
About 2 hours of two CPU cores in all. Everything is seeded by stage and step. A killed stage goes on from the last full
minute when it is started again; `all` skips finished stages; `--again` forgets a stage's work first. Work files are in
demo/work, which is not kept. Then `python demo/evaluate.py --keep` measures what came out.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import assets
import encoders
import generator
import torch
from training import HERE, WORK, log


def export() -> None:
    """The bundle of the packed checkpoint."""
    from export import export_demo

    export_demo(HERE / "checkpoint.safetensors", HERE / "bundle")


TRAINED: dict[str, tuple[Callable[[int], None], int, tuple[str, ...]]] = {  # stage, steps, what it goes on from
    "autoencoder": (generator.stage_autoencoder, 3200, ("autoencoder.state.pt",)),
    "motion": (encoders.stage_motion, 1300, ("motion_dense.state.pt", "motion_resampler.state.pt")),
    "appearance": (encoders.stage_appearance, 1500, ("appearance.state.pt",)),
    "text": (encoders.stage_text, 700, ("text.state.pt",)),
    "cama": (encoders.stage_cama, 2500, ("cama.state.pt",)),
    "denoiser": (generator.stage_denoiser, 6000, ("denoiser.state.pt",)),
    "refine": (generator.stage_refine, 800, ("refine.state.pt", "generated.pt")),
}
MADE: dict[str, Callable[[], None]] = {
    "data": assets.stage_data, "pack": assets.stage_pack, "clips": assets.stage_clips,
    "export": export, "memories": assets.stage_memories,
}  # fmt: skip
ORDER = ("data", *TRAINED, "pack", "clips", "export", "memories")


def run(stage: str, steps: int | None, skip_done: bool) -> None:
    """Run one stage; what it was run with goes to work/<stage>.done when it has finished."""
    done = WORK / f"{stage}.done"
    count = steps or (TRAINED[stage][1] if stage in TRAINED else 0)
    if skip_done and done.exists() and done.read_text() == str(count):
        log(stage, "is done")
        return
    log(stage, "starts")
    if stage in TRAINED:
        TRAINED[stage][0](count)
    else:
        MADE[stage]()
    done.write_text(str(count))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=[*ORDER, "all"])
    parser.add_argument("--steps", type=int, help="training steps of the stage instead of its default")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch (default 2; 1 for stages side by side)")
    parser.add_argument("--again", action="store_true", help="forget what the stage has trained, and start it anew")
    options = parser.parse_args(arguments)
    if options.stage == "all" and (options.steps or options.again):
        parser.error("--steps and --again are for one stage; to train everything anew delete demo/work")
    if options.steps is not None and (options.steps < 1 or options.stage not in TRAINED):
        parser.error("--steps is a positive number, for a stage that trains")
    torch.set_num_threads(options.threads)
    WORK.mkdir(exist_ok=True)
    if options.again and options.stage in TRAINED:
        for state in TRAINED[options.stage][2]:
            (WORK / state).unlink(missing_ok=True)
    for stage in ORDER if options.stage == "all" else (options.stage,):
        run(stage, options.steps, skip_done=options.stage == "all")


if __name__ == "__main__":
    main()
