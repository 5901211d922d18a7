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

from collections.abc import Callable

import assets
import encoders
import generator
from recipe import Trained
from training import HERE, work


def export() -> None:
    """The bundle of the packed checkpoint."""
    from export import export_demo

    export_demo(HERE / "checkpoint.safetensors", HERE / "bundle")


TRAINED = {
    "autoencoder": Trained(generator.stage_autoencoder, 3200, ("autoencoder.state.pt",)),
    "motion": Trained(encoders.stage_motion, 1300, ("motion_dense.state.pt", "motion_resampler.state.pt")),
    "appearance": Trained(encoders.stage_appearance, 1500, ("appearance.state.pt",)),
    "text": Trained(encoders.stage_text, 700, ("text.state.pt",)),
    "cama": Trained(encoders.stage_cama, 2500, ("cama.state.pt",)),
    "denoiser": Trained(generator.stage_denoiser, 6000, ("denoiser.state.pt",)),
    "refine": Trained(generator.stage_refine, 800, ("refine.state.pt", "generated.pt")),
}
MADE: dict[str, Callable[[], None]] = {
    "data": assets.stage_data, "pack": assets.stage_pack, "clips": assets.stage_clips,
    "export": export, "memories": assets.stage_memories,
}  # fmt: skip
ORDER = ("data", *TRAINED, "pack", "clips", "export", "memories")


def main(arguments: list[str] | None = None) -> None:
    work.main(arguments, __doc__, TRAINED, MADE, ORDER, threads=2)


if __name__ == "__main__":
    main()
