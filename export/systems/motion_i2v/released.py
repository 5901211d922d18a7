"""The system of Motion-I2V's released files.

export_system(motion_i2v_system(MotionI2VSources(models=Path("Motion-I2V/models"))), out)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from motionrt.export.checkpoints.files import CheckpointError
from motionrt.export.checkpoints.motion_i2v_files import MotionI2VSources, open_motion_i2v
from motionrt.export.compiler.weightless import meta
from motionrt.export.systems.decoding import decoding
from motionrt.export.systems.motion_i2v.fields import DecodeFields, Mean, Sparse
from motionrt.export.systems.motion_i2v.networks import FlowUNet, Trajectories, VideoUNet
from motionrt.export.systems.motion_i2v.retrieved import Keep, Retrieval, with_memory
from motionrt.export.systems.motion_i2v.rows import GUIDANCE, schedules
from motionrt.export.systems.motion_i2v.system import MOTION, VIDEO, Parts, motion_system
from motionrt.export.systems.motionclone.frames import DecodeFrames, EncodeImage
from motionrt.export.systems.motionclone.rows import noise_schedule
from motionrt.export.systems.system import Array, Graph, Network, System

DECODED = 4  # pictures or fields that a decoder sees at once, at most


def motion_i2v_system(
    sources: MotionI2VSources,
    *,
    frames: int = 16,
    height: int = 320,
    width: int = 512,
    say: Callable[[str], None] = lambda text: None,
) -> System:
    """The system of the files that `sources` names: every file is opened and every key checked, and nothing is written.

    `CheckpointError` names what does not fit; `say` is told what takes its time.
    """
    say("files")
    files = open_motion_i2v(sources)
    vaes: list[Any] = [files.vae.module, files.flow_vae.module]
    scale, other = (2 ** (len(vae.config.block_out_channels) - 1) for vae in vaes)
    if scale != other:
        raise CheckpointError(
            f"the autoencoder of pictures makes them {scale} times smaller, that of fields {other} times; they must agree. "
            "Give the files of one release."
        )
    grid = scale * 2 ** (len(files.stage2_config["block_out_channels"]) - 1)
    most = min((files.stage2_config["motion_max_seq_length"] + 1) // 2, files.stage1_config["motion_max_seq_length"] + 1)
    if not 2 <= frames <= most or min(height, width) < grid or height % grid or width % grid:
        raise CheckpointError(
            f"frames is {frames} and the size {height}x{width}; allowed: 2 to {most} frames, of which all but one take two "
            f"positions of the motion modules, and multiples of {grid} pixels."
        )
    alphas, prediction = noise_schedule(files.scheduler)
    with meta():
        stage1, drawn = FlowUNet(files.stage1_config), Trajectories(files.drawn_config)
        stage2 = VideoUNet(files.stage2_config, sources.form)
    latents = (frames, files.stage2_config["in_channels"], height // scale, width // scale)

    def network(which: Network, module: nn.Module, place: str = "") -> Network:
        """`module`, which has an autoencoder of `which` at `place`."""
        weights = {f"{place}{name}": lazy for name, lazy in (which.weights or {}).items()}
        return sources.keeping(replace(which, module=module.eval(), weights=weights, reports=()))

    def chunks(count: int) -> tuple[int, list[tuple[int, int]]]:
        """How many are decoded at once, of `count`, and all of these."""
        size = max(n for n in range(1, DECODED + 1) if count % n == 0)
        return size, [(size, size)] * (count // size)

    pictures, parts = chunks(frames)
    decode = Graph(network(files.vae, DecodeFrames(vaes[0])), {"latents": Array((1, pictures, *latents[1:]))}, ("video",))
    moved, pieces = chunks(frames - 1)
    decode_field = Graph(
        network(files.flow_vae, DecodeFields(DecodeFrames(vaes[1])), "decode."),
        {"motion_latents": Array((1, moved, *latents[1:]))},
        ("field",),
    )
    rows = schedules(alphas, prediction, to_the_end=sources.form == "own")
    made = Parts(
        name="motion-i2v",
        stage1=stage1,
        stage2=stage2,
        drawn=drawn,
        sparse=network(files.flow_vae, Sparse(Mean(vaes[1])), "encode."),
        text=sources.keeping(files.text),
        text_size=(files.tokenizer.max_length, files.stage2_config["cross_attention_dim"]),
        vocabulary=files.text.module.model.config.vocab_size,  # type: ignore[union-attr, arg-type]
        tokenizer=files.tokenizer,
        encode=network(files.vae, EncodeImage(vaes[0])),
        fields=decoding(
            {"decode_field": decode_field}, pieces, (frames - 1, *latents[1:]), scale, name="fields", channels=2
        ),
        decoding=decoding({"decode": decode}, parts, latents, scale),
        latents=latents,
        scale=scale,
        schedules={MOTION: rows[0], VIDEO: rows[1]},
        guidance=(GUIDANCE, GUIDANCE),
        weights={
            name: sources.kept(weights)
            for name, weights in (("stage1", files.stage1), ("stage2", files.stage2), ("drawn", files.drawn))
        },
        provenance={"dtype": sources.dtype},
        reports=files.reports,
    )
    keep = network(files.flow_vae, Keep(EncodeImage(vaes[1])), "encode.")
    return with_memory(motion_system(made), made, Retrieval(sources.sentence_encoder(), keep, alphas))
