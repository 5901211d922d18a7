"""Is a bundle the released pipeline? Small models of the released classes, every block, against diffusers with plain adapters.

    .venv-dev/bin/python benchmarks/parity_models.py cogvideox --width 256 --frames 17
    .venv-dev/bin/python benchmarks/parity_models.py svd --width 64 --frames 16

The tests do the same at their smallest width. Random weights are written in the released files' layout, exported, and run from
the still to the frames on both sides with the same noise. One row: the latents' largest and relative error, and the frames'
PSNR; it is an error, and no row, where latents differ by more than the tests allow.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import harness
from motionrt.export.systems import svd_step as svd
from motionrt.export.systems.cogvideox import export_cogvideox
from motionrt.export.systems.svd import export_svd
from motionrt.runtime.by_path import load_by_path
from motionrt.runtime.memory.rows import Reference
from motionrt.runtime.pipeline import MotionPipeline

TESTS = harness.ROOT / "tests"
TOLERANCE, SEED, REFERENCES = 2e-4, 3, 3


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("cogvideox", "svd"))
    parser.add_argument("--width", type=int, default=256, help="of the network: a multiple of 64; SVD's at its first level")
    parser.add_argument("--blocks", type=int, default=42, help="of CogVideoX; SVD always has all")
    parser.add_argument("--frames", type=int, default=17, help="17 or 49 for CogVideoX")
    parser.add_argument("--grid", type=int, nargs=2, default=(8, 16), help="latent height and width")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--results", type=Path, default=harness.RESULTS)
    options = parser.parse_args(arguments)
    if options.width < 64 or options.width % 64 or any(side % 8 for side in options.grid):
        parser.error("--width must be a multiple of 64, and both numbers of --grid multiples of 8")
    return options


def written(options: argparse.Namespace, models: Any, folder: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """(config, modules, MotionRAG's files) of the model, and its folders."""
    if options.model == "cogvideox":
        config = models.cogvideox_config(options.blocks, options.width // 64, tuple(options.grid))
        parts = models.write_cogvideox(folder / "base", config)
        blocks = {f"transformer.transformer_blocks.{i}.attn1": options.width for i in range(options.blocks)}
    else:
        config = models.unet_config(options.width)
        parts = models.write_svd(folder / "base", config)
        blocks = {f"unet.{path}": a.to_q.in_features for path, a in svd.spatial_attentions(parts["unet"])}
    files = models.release.motionrag_states(blocks, overlay=options.model == "cogvideox")
    models.release.save(folder / "rag", files)
    return config, {**parts, **models.write_encoders(folder)}, files


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    models, plainly = (load_by_path(TESTS / name) for name in ("tiny_models.py", "diffusers_reference.py"))
    with tempfile.TemporaryDirectory() as temporary, models.shared_graphs(Path(temporary) / "graphs"):
        folder = Path(temporary)
        config, parts, files = written(options, models, folder)
        sources = models.sources(folder, plainly.SOS_SEED, (options.steps,))
        begin = time.perf_counter()
        scale = 4 if options.model == "cogvideox" else 2  # pixels of a latent: of the small VAEs
        size = (options.grid[0] * scale, options.grid[1] * scale)
        if options.model == "cogvideox":
            export_cogvideox(sources, folder / "bundle", frames=options.frames)
        else:
            export_svd(sources, folder / "bundle", frames=options.frames, height=size[0], width=size[1])
        exported = time.perf_counter() - begin

        draw = np.random.default_rng(SEED)
        still = draw.integers(0, 256, (*size, 3), np.uint8)
        image = torch.from_numpy(still).permute(2, 0, 1)[None].float() / 127.5 - 1
        clips = torch.from_numpy(draw.integers(0, 256, (REFERENCES, options.frames, 3, *size), np.uint8)).float() / 127.5 - 1
        motion = plainly.motion_tokens(parts, files, torch.cat([clips, torch.zeros_like(clips[:1])]))
        looks = plainly.appearance_tokens(parts, files, torch.cat([clips[:, 0], image]))
        given: dict[str, Any] = {
            "motion": plainly.predicted_motion(files, motion[:-1], looks[:-1], looks[-1:]), "unconditional": motion[-1:],
            "frames": options.frames, "steps": options.steps, "seed": SEED,
        }  # fmt: skip
        with MotionPipeline.from_bundle(folder / "bundle", threads=1) as pipeline:
            ours = pipeline.graph("motion")({"video": clips.numpy()})["motion"]
            theirs = pipeline.graph("appearance")({"image": clips[:, 0].numpy()})["appearance"]
            references = [Reference(i, 1.0, "", "", 0.0, 1.0, ours[i], theirs[i]) for i in range(REFERENCES)]
            seen: list[Any] = []
            step = pipeline.graph("step")

            def kept(inputs: Any) -> Any:
                seen[:] = [step(inputs)]
                return seen[0]

            pipeline._graphs["step"] = kept
            result = pipeline(still, "w5 w9", negative_prompt="w7", seed=SEED, steps=options.steps, references=references)
            if options.model == "cogvideox":
                ids = [torch.from_numpy(pipeline.bundle.tokenize("text", text)["input_ids"]) for text in ("w5 w9", "w7")]
                latents, want, _ = plainly.cogvideox_video(
                    folder / "base", config, models.SCHEDULER, parts, files, image=image, ids=ids, **given
                )
            else:
                latents, want = plainly.svd_video(config, models.EULER, parts, files, still=still, **given)
    error = float(np.abs(seen[0]["next_latents"] - latents.numpy()).max())
    relative = error / float(latents.abs().max())
    if not relative <= TOLERANCE:
        raise harness.ParityError(f"latents differ by {relative:.1e} of the largest; allowed is {TOLERANCE:.0e}")
    pictures = want.permute(0, 2, 3, 1).numpy() * 255
    apart = result.frames.astype(np.float64) - pictures
    psnr = float(10 * np.log10(255**2 / np.square(apart).mean()))
    parameters = sum(p.numel() for p in parts["transformer" if options.model == "cogvideox" else "unet"].parameters())
    row = {
        "model": options.model, "width": options.width, "blocks": options.blocks if options.model == "cogvideox" else 16,
        "parameters": parameters, "frames": options.frames, "latents": list(latents.shape), "steps": options.steps,
        "solver": "dpm" if options.model == "cogvideox" else "euler", "guidance": 3.0, "dtype": "float32",
        "backend": "onnxruntime cpu against diffusers", "latent_max_abs_error": error, "latent_relative_error": relative,
        "latent_max_abs": float(latents.abs().max()), "allowed": TOLERANCE, "frame_psnr_db": psnr,
        "frame_max_abs_error": float(np.abs(apart).max()), "export_s": exported,
    }  # fmt: skip
    harness.append_row("parity_models", row, folder=options.results)
    print(f"{options.model} width {options.width}: latents {relative:.1e} of the largest, frames {psnr:.1f} dB")


if __name__ == "__main__":
    main()
