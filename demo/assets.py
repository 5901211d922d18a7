"""Stages around the training: `data` renders the pool; `pack`, `clips` and `memories` make what is shipped. See train.py."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import domain
import model as demo
import numpy as np
from recipe import log, make_memory
from training import HERE, WORK, tokenizer, work

GROUP = 6  # clips of one free path
NAMED, FREE = 80, 800  # clips per seen family; free paths
HELD = 24  # clips per unseen family, for checks only
MEMORIES = (("memory", "clips", domain.SEEN), ("memory_unseen", "clips_unseen", domain.UNSEEN))


def stage_data() -> None:
    """Render the pool. The last file written is pool.json: without it the stage starts again."""
    rng = np.random.default_rng(1)
    specs = [domain.sample_spec(rng, name) for name in domain.SEEN for _ in range(NAMED)]
    specs += [domain.sample_spec(rng, name) for name in domain.UNSEEN for _ in range(HELD)]
    group = [list(domain.FAMILIES).index(spec.family) for spec in specs]
    for index in range(FREE):
        path = domain.free_path(rng)
        specs += [domain.sample_spec(rng, path=path) for _ in range(GROUP)]
        group += [len(domain.FAMILIES) + index] * GROUP
    trained = [spec for spec in specs if spec.family not in domain.UNSEEN]
    if any(domain.crosses(np.asarray(spec.path)) or domain.jumps(np.asarray(spec.path)) for spec in trained):
        raise SystemExit("a training path crosses itself or jumps: unseen kinds would not be unseen. See domain.free_path.")
    frames = np.lib.format.open_memmap(WORK / "frames.npy", "w+", np.uint8, (len(specs), 17, 64, 64, 3))
    masks = np.lib.format.open_memmap(WORK / "masks.npy", "w+", np.uint8, (len(specs), 17, 16, 16))
    covers = np.lib.format.open_memmap(WORK / "covers.npy", "w+", np.uint8, (len(specs), 64, 64))
    for index, spec in enumerate(specs):
        frames[index], mask = domain.render(spec)
        masks[index] = np.round(mask.reshape(17, 16, 4, 16, 4).mean(axis=(2, 4)) * 255)
        covers[index] = np.round(mask[0] * 255)
        if index % 1000 == 0:
            log("rendered", index, "of", len(specs))
    np.save(WORK / "centres.npy", np.stack([spec.centres for spec in specs]).astype(np.float32))
    info = {
        "group": group,
        "family": [spec.family for spec in specs],
        "colour": [list(domain.COLOURS).index(spec.colour) for spec in specs],
        "shape": [domain.SHAPES.index(spec.shape) for spec in specs],
        "background": [spec.background for spec in specs],
    }
    partial = WORK / "pool.partial"
    partial.write_text(json.dumps(info))
    os.replace(partial, WORK / "pool.json")


def stage_pack() -> None:
    """All parts into demo/checkpoint.safetensors (float16) and demo/tokenizer.json; work/ keeps a float32 copy."""
    net = demo.build()
    for part in demo.PARTS:
        work.restore(getattr(net, part), "refined" if part == "autoencoder" else part)
    net.eval().refresh_uncond()
    demo.save(net, HERE / "checkpoint.safetensors")
    for part in ("motion_encoder", "motion_proj", "appearance_encoder", "appearance_proj"):  # as the memories know them
        getattr(net, part).half().float()
    demo.save(net, WORK / "checkpoint_float32.safetensors", half=False)
    tokenizer().save(str(HERE / "tokenizer.json"))
    log("wrote", HERE / "checkpoint.safetensors", (HERE / "checkpoint.safetensors").stat().st_size, "bytes")


def write_mp4(path: Path, frames: np.ndarray) -> None:
    """uint8 [F, H, W, 3] -> h264, crf 12."""
    import av

    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=domain.FPS, options={"crf": "12", "preset": "slow"})
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        container.mux(stream.encode())


PROMPTS = (
    ("star_slides_left", "red_star", "slide_left"), ("star_circles", "red_star", "circle_clockwise"),
    ("star_bounces", "red_star", "bounce"),
    ("star_zigzags_left", "red_star", "zigzag_left"), ("square_slides_up", "blue_square", "slide_up"),
    ("square_hops", "blue_square", "hop_right"),
    ("circle_waves", "yellow_circle", "wave_right"), ("circle_turns", "yellow_circle", "turn_left_up"),
    ("triangle_drifts", "green_triangle", "diagonal_down_right"), ("diamond_swings", "purple_diamond", "swing"),
)  # fmt: skip


def stage_clips() -> None:
    """The clips of both memories with captions, the stills and the prompts."""
    from PIL import Image

    for _, folder, families in MEMORIES:
        shutil.rmtree(HERE / folder, ignore_errors=True)
        (HERE / folder).mkdir()
        captions = {}  # of the motion alone, as the release embeds `motion_caption`: retrieval must not follow colours
        for number, spec in enumerate(domain.reference_specs(families)):
            name = f"{number:03d}_{spec.family}.mp4"
            write_mp4(HERE / folder / name, domain.render(spec)[0])
            captions[name] = domain.FAMILIES[spec.family].phrase
        (HERE / folder / "captions.json").write_text(json.dumps(captions, indent=1) + "\n")
        log("wrote", len(captions), "clips to", folder)
    (HERE / "inputs").mkdir(exist_ok=True)
    for name, spec in domain.input_specs():
        Image.fromarray(domain.render(spec, 256, frames=1)[0][0]).save(HERE / "inputs" / f"{name}.png", optimize=True)
    rows = []
    for name, image, family in PROMPTS:
        prompt = f"a {image.replace('_', ' ')} {domain.FAMILIES[family].phrase}"
        rows.append({"name": name, "image": f"{image}.png", "prompt": prompt})
    (HERE / "prompts.json").write_text(json.dumps(rows, indent=1) + "\n")


def stage_memories() -> None:
    """demo/memory and demo/memory_unseen, from demo/bundle and the clips; sources are relative to demo/."""
    for name, folder, _ in MEMORIES:
        make_memory(HERE, name, folder)
