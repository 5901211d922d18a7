"""Train MotionClone's demo from nothing: `PYTHONPATH=src python demo/motionclone/train.py all`, or one stage at a time.

    autoencoder  frames <-> latents
    latents      the training clips, encoded
    images       UNet and text encoder on single frames, motion modules passed by
    objects      the same, looking mostly at the objects
    video        the same on clips
    longer       the same again
    painted      the autoencoder again, on objects of any colour
    refine       the decoder again, on latents as the UNet makes them
    pack         checkpoint.safetensors and tokenizer.json
    clips        the clips of the memory, the prompts
    export       bundle
    memory       memory

Everything is seeded by stage and step. A killed stage goes on from the last full minute when it is started again; `all`
skips finished stages; `--again` forgets a stage's work first. Work files are in demo/motionclone/work, not kept. `unpack`
makes those of the stages before `painted` from the shipped checkpoint.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # demo/domain.py
import assets
import stages
from recipe import Trained
from training import HERE, work

TRAINED = {
    "autoencoder": Trained(stages.stage_autoencoder, 3600, ("autoencoder.state.pt",)),
    "images": Trained(stages.stage_images, 1900, ("images.state.pt",)),
    "objects": Trained(stages.stage_objects, 1000, ("objects.state.pt",)),
    "video": Trained(stages.stage_video, 800, ("video.state.pt",)),
    "longer": Trained(stages.stage_longer, 700, ("longer.state.pt",)),
    "painted": Trained(stages.stage_painted, 4000, ("painted.state.pt",)),
    "refine": Trained(stages.stage_refine, 900, ("refine.state.pt", "made_again.pt")),
}


def export() -> None:
    """The bundle of the packed checkpoint."""
    from export import demo_system

    from motionrt.export.exporter import export_system

    export_system(demo_system(HERE / "checkpoint.safetensors"), HERE / "bundle")


MADE: dict[str, Callable[[], None]] = {
    "latents": stages.stage_latents, "pack": stages.stage_pack, "clips": assets.stage_clips, "export": export,
    "memory": assets.stage_memory, "unpack": stages.stage_unpack,
}  # fmt: skip
ORDER = (
    "autoencoder", "latents", "images", "objects", "video", "longer", "painted", "refine",
    "pack", "clips", "export", "memory",
)  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    work.main(arguments, __doc__, TRAINED, MADE, ORDER, threads=1)


if __name__ == "__main__":
    main()
