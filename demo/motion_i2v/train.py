"""Train the demo's Motion-I2V from MotionClone's: `PYTHONPATH=src python demo/motion_i2v/train.py all`, or one stage at a time.

    flow      an autoencoder of displacement fields
    drawn     the training clips: latents of their frames, their paths and captions
    render    stage 2: frames along a field
    fields    the clips' true fields as flow latents
    predict   stage 1: the field, from a picture, words and a stride
    control   stage 1's ControlNet: drags and brushes
    longer    stage 2 again
    predict_on, control_on, control_again, render_on  each of the three once more, the ControlNet twice
    pack      checkpoint.safetensors
    clips     the clips of the memory, the pictures and prompts
    export    bundle
    memory    memory

Everything is seeded by stage and step. A killed stage goes on from the last full minute when it is started again; `all`
skips finished stages; `--again` forgets a stage's work first. Work files are in demo/motion_i2v/work, not kept. `unpack` makes
them anew from the shipped checkpoint, for another round of the last three.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE.parent / "motionclone"), str(HERE.parent)]  # in this order: both have a model.py

import assets  # noqa: E402
import clips  # noqa: E402
import flow_stage  # noqa: E402
import predict_stage  # noqa: E402
import render_stage  # noqa: E402
from recipe import Trained  # noqa: E402

TRAINED = {
    "flow": Trained(flow_stage.stage_flow, 900, ("flow.state.pt",)),
    "render": Trained(render_stage.stage_render, 300, ("render.state.pt",)),
    "longer": Trained(render_stage.stage_longer, 800, ("longer.state.pt",)),
    "predict": Trained(predict_stage.stage_predict, 2000, ("predict.state.pt",)),
    "control": Trained(predict_stage.stage_control, 650, ("control.state.pt",)),
    "predict_on": Trained(predict_stage.stage_predict_on, 2000, ("predict_on.state.pt",)),
    "control_on": Trained(predict_stage.stage_control_on, 4000, ("control_on.state.pt",)),
    "control_again": Trained(predict_stage.stage_control_again, 2000, ("control_again.state.pt",)),
    "render_on": Trained(render_stage.stage_render_on, 500, ("render_on.state.pt",)),
}


def export() -> None:
    """The bundle of the packed checkpoint."""
    from export import demo_system

    from motionrt.export.exporter import export_system

    export_system(demo_system(HERE / "checkpoint.safetensors"), HERE / "bundle")


MADE: dict[str, Callable[[], None]] = {
    "drawn": clips.stage_drawn, "fields": clips.stage_fields, "pack": predict_stage.stage_pack, "clips": assets.stage_clips,
    "export": export, "memory": assets.stage_memory, "unpack": predict_stage.stage_unpack,
}  # fmt: skip
ORDER = (
    "flow", "drawn", "render", "fields", "predict", "control", "longer", "predict_on", "control_on", "control_again",
    "render_on",
    "pack", "clips", "export", "memory",
)  # fmt: skip

if __name__ == "__main__":
    clips.work.main(None, __doc__, TRAINED, MADE, ORDER, threads=1)
