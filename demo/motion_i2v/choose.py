"""Measure a checkpoint in PyTorch, to choose settings by: `python demo/motion_i2v/choose.py --scenes 16 --rows true predicted`.

What is published comes from the exported bundle; what is measured is in judge.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE.parent / "motionclone"), str(HERE.parent)]  # in this order: both have a model.py

import domain  # noqa: E402
import judge  # noqa: E402
import model as demo  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from fields import STRIDE, Floats, Known, as_pixels, as_unit, known, true_field  # noqa: E402
from judge import Scene  # noqa: E402
from looks import SEEDS, Frames  # noqa: E402
from networks import TARGETS, MotionI2V, load, matrices, quick  # noqa: E402
from numpy.typing import NDArray  # noqa: E402
from predict_stage import hinted  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from training import ids, pixels, tokenizer  # noqa: E402

from motionrt.export.systems.motion_i2v.rows import rows  # noqa: E402
from motionrt.export.systems.motionclone.rows import noise_schedule  # noqa: E402

Brushes = NDArray[np.bool_] | None


class Sampler:
    """A checkpoint's two loops, batched over pictures, in bfloat16."""

    def __init__(self, model: MotionI2V) -> None:
        self.model, self.words = model, tokenizer()
        self.alphas, self.prediction = noise_schedule(demo.SCHEDULER)

    def texts(self, encoder: nn.Module, prompts: Sequence[str], guidance: float) -> list[Tensor]:
        """What a stage reads of prompts, `[B, 12, 64]`; of none, too, where that is asked for."""
        asked = [list(prompts)] if guidance == 1 else [list(prompts), [""] * len(prompts)]
        return [encoder(ids(self.words, each)).last_hidden_state for each in asked]

    @torch.no_grad()
    def image(self, pictures: Frames) -> Tensor:
        """uint8 `[B, 64, 64, 3]` -> latents `[B, 4, 8, 8]`."""
        latents: Tensor = self.model.vae.encode(pixels(pictures))
        return latents

    def flow(self, fields: Floats) -> Tensor:
        """Fields `[B, 15, 2, 64, 64]` px -> latents `[B, 15, 4, 8, 8]`."""
        with torch.no_grad():
            return self.model.flow.encode(torch.from_numpy(as_unit(fields)).flatten(0, 1)).unflatten(0, (-1, TARGETS))

    def unflow(self, latents: Tensor) -> Floats:
        """The reverse of `flow`."""
        with torch.no_grad():
            units = self.model.flow.decode(latents.flatten(0, 1)).unflatten(0, (-1, TARGETS))
        return as_pixels(units.numpy())

    @torch.no_grad()
    def fields(
        self, image: Tensor, prompts: Sequence[str], start: Tensor, steps: int = 12, guidance: float = 1.5,
        drawn: Sequence[Known] = (), stride: float = STRIDE, begin: tuple[Tensor, float] | None = None,
    ) -> Floats:  # fmt: skip
        """Stage 1: `[B, 15, 2, 64, 64]` px from latents `[B, 4, 8, 8]` and noise `[B, 15, 4, 8, 8]`.

        drawn: a control for each; begin: flow latents to begin from, and the share of the steps that is left for them.
        """
        model, table = self.model, torch.from_numpy(rows(steps, self.alphas, self.prediction, guidance))
        texts = self.texts(model.motion_text, prompts, guidance)
        hint = None
        if drawn:
            mask = torch.from_numpy(np.stack([mask for _, mask in drawn]))
            hint = hinted(self.flow(np.stack([field for field, _ in drawn])), mask)
        strides = (stride * torch.arange(1, demo.FRAMES)).expand(len(image), -1)
        x = start
        if begin is not None:
            table = table[round(steps * (1 - begin[1])) :]
            a = float(self.alphas[int(table[0, 1])])
            x = a**0.5 * begin[0] + (1 - a) ** 0.5 * start
        for _, t, _, p, q, *_ in table:
            given, outs = (image, x, t.expand(len(x)), strides), []
            for text in texts:
                with quick(), torch.autocast("cpu", dtype=torch.bfloat16):
                    extra: Sequence[Tensor] = () if hint is None else model.control(*given, text, hint)
                    outs.append(model.predict(*given, text, extra).float())
            x = p * x + q * combined(outs, guidance)
        return self.unflow(x)

    @torch.no_grad()
    def clips(
        self, image: Tensor, prompts: Sequence[str], fields: Floats, start: Tensor, steps: int = 12, guidance: float = 1.0,
        brush: NDArray[np.bool_] | None = None,
    ) -> Frames:  # fmt: skip
        """Stage 2: frames uint8 `[B, 16, 64, 64, 3]` along fields px, from noise `[B, 15, 4, 8, 8]`.

        brush: `[B, 64, 64]`, where nothing may move: fields are 0 there, and frame 0 is put back after every step.
        """
        model, given = self.model, torch.from_numpy(fields)
        texts = self.texts(model.text_encoder, prompts, guidance)
        held = torch.zeros(len(image), 1, 1, 8, 8)
        if brush is not None:
            given = given * ~torch.from_numpy(brush)[:, None, None]
            held = torch.from_numpy(brush).float()[:, None, None, ::8, ::8]
        warps, x = matrices(given, model.render.grids(8, 8)), start
        for _, t, _, p, q, signal, spread, hold in torch.from_numpy(rows(steps, self.alphas, self.prediction, to_the_end=True)):
            with quick(), torch.autocast("cpu", dtype=torch.bfloat16):
                outs = [model.render(image, x, t.expand(len(x)), text, warps).float() for text in texts]
            x = p * x + q * combined(outs, guidance)
            kept = held * hold
            x = kept * (signal * image[:, None] + spread * start) + (1 - kept) * x
        return self.decode(torch.cat([image[:, None], x], dim=1))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Frames:
        """`[B, F, 4, 8, 8]` -> frames uint8 `[B, F, 64, 64, 3]`."""
        frames = torch.cat([self.model.vae.decode(part) for part in latents.split(4)])
        return ((frames.movedim(-3, -1) + 1) * 127.5).round().byte().numpy()


def combined(outs: Sequence[Tensor], guidance: float) -> Tensor:
    """With the prompt, or with it and without it in turn."""
    return outs[0] if len(outs) == 1 else outs[1] + guidance * (outs[0] - outs[1])


class Maker:
    """A checkpoint and the settings of both loops."""

    def __init__(self, net: Sampler, options: argparse.Namespace) -> None:
        self.net, self.options = net, options

    def image(self, scenes: Sequence[Scene]) -> torch.Tensor:
        return self.net.image(np.stack([scene.picture for scene in scenes]))

    def field(
        self, scenes: Sequence[Scene], prompts: Sequence[str], drawn: Sequence[Known] = (), begin: Floats | None = None
    ) -> Floats:
        how = self.options
        begun = None if begin is None else (self.net.flow(begin), how.share)
        return self.net.fields(
            self.image(scenes), prompts, noise(scenes, 0), how.flow_steps, how.flow_guidance, drawn, begin=begun
        )

    def clips(self, scenes: Sequence[Scene], fields: Floats, brush: Brushes = None) -> Frames:
        how, prompts = self.options, [scene.plain for scene in scenes]
        return self.net.clips(
            self.image(scenes), prompts, fields, noise(scenes, 1), how.video_steps, how.video_guidance, brush
        )


def noise(scenes: Sequence[Scene], stage: int) -> torch.Tensor:
    shape = (TARGETS, *demo.LATENTS[1:])
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(2 * s.seed + stage)) for s in scenes])


def true(make: Maker, scenes: Sequence[Scene]) -> Floats:
    return np.stack([true_field(scene.spec) for scene in scenes])


def coded(make: Maker, scenes: Sequence[Scene]) -> Floats:
    return make.net.unflow(make.net.flow(true(make, scenes)))


def predicted(make: Maker, scenes: Sequence[Scene]) -> Floats:
    return make.field(scenes, [scene.prompt for scene in scenes])


def dragged(count: int) -> Callable[[Maker, Sequence[Scene]], Floats]:
    def fields(make: Maker, scenes: Sequence[Scene]) -> Floats:
        return make.field(scenes, [scene.plain for scene in scenes], [known(judge.drawn(scene, count)) for scene in scenes])

    return fields


def brushed(make: Maker, scenes: Sequence[Scene]) -> Floats:
    still = [np.zeros((TARGETS, 2, domain.SIZE, domain.SIZE), np.float32) for _ in scenes]
    return make.field(scenes, [s.prompt for s in scenes], list(zip(still, map(judge.stays, scenes), strict=True)))


def retrieved(mode: str) -> Callable[[Maker, Sequence[Scene]], Floats]:
    def fields(make: Maker, scenes: Sequence[Scene]) -> Floats:
        found = make.net.unflow(make.net.flow(np.stack([true_field(judge.remembered(scene)) for scene in scenes])))
        moved = np.stack([judge.aligned(field, scene) for field, scene in zip(found, scenes, strict=True)])
        if mode == "direct":
            return moved
        if mode == "start":
            return make.field(scenes, [scene.prompt for scene in scenes], begin=moved)
        drawn = [known(judge.hint(field, scene)) for field, scene in zip(found, scenes, strict=True)]
        return make.field(scenes, [scene.plain for scene in scenes], drawn)

    return fields


def unseen(split: str, count: int) -> list[Scene]:
    return judge.scenes(split, count, domain.UNSEEN)


def seen(split: str, count: int) -> list[Scene]:
    return judge.scenes(split, count, domain.SEEN)


ROWS: Mapping[str, tuple[Callable[[str, int], list[Scene]], Callable[[Maker, Sequence[Scene]], Floats]]] = {
    "true": (judge.scenes, true),
    "coded": (judge.scenes, coded),
    "exchanged": (lambda split, count: judge.exchanged(judge.scenes(split, count)), true),
    "still": (lambda split, count: judge.still(judge.scenes(split, count)), true),
    "predicted": (seen, predicted),
    "brush": (seen, brushed),
    "drag": (judge.scenes, dragged(1)),
    "drags": (judge.scenes, dragged(4)),
    "unseen": (unseen, predicted),
    "direct": (unseen, retrieved("direct")),
    "start": (unseen, retrieved("start")),
    "hints": (unseen, retrieved("hints")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=16)
    parser.add_argument("--split", choices=tuple(SEEDS), default="choose")
    parser.add_argument("--checkpoint", type=Path, default=HERE / "checkpoint.safetensors")
    parser.add_argument("--rows", nargs="+", choices=tuple(ROWS), default=list(ROWS))
    parser.add_argument("--flow-steps", type=int, default=12)
    parser.add_argument("--video-steps", type=int, default=12)
    parser.add_argument("--flow-guidance", type=float, default=1.5)
    parser.add_argument("--video-guidance", type=float, default=1.0)
    parser.add_argument("--share", type=float, default=0.6, help="of the steps that follow a field to begin from")
    parser.add_argument("--fields-only", action="store_true")
    parser.add_argument("--sheet", help="PNGs of the first scenes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    make, table = Maker(Sampler(load(options.checkpoint)), options), []
    for name in options.rows:
        choose, fields_of = ROWS[name]
        wanted, scores, strips, leaks = choose(options.split, options.scenes), [], [], []
        for first in range(0, len(wanted), 8):
            part = wanted[first : first + 8]
            fields = fields_of(make, part)
            if options.fields_only:
                errors = [judge.field_error(*given) for given in zip(fields, part, strict=True)]
                scores += [[np.nan, error, np.nan, np.nan] for error in errors]
                continue
            brush = np.stack([judge.stays(scene) for scene in part]) if name == "brush" else None
            frames = make.clips(part, fields, brush)
            scores += [judge.measure(*given) for given in zip(frames, part, fields, strict=True)]
            strips += [np.concatenate(list(clip[::3]), axis=1) for clip in frames]
            if brush is not None:
                still = make.net.decode(make.image(part)[:, None].expand(-1, demo.FRAMES, -1, -1, -1))
                leaks += [judge.leak(*given) for given in zip(frames, still, brush, strict=True)]
        table.append(judge.summary(name, np.array(scores)))
        print(judge.table([table[-1], judge.still_error(wanted)]), flush=True)
        if leaks:
            print(f"outside the brush: {np.mean(leaks):.2f} grey levels, at most {np.max(leaks):.2f}", flush=True)
        if options.sheet and strips:
            from PIL import Image

            Image.fromarray(np.concatenate(strips[:12])).save(f"{options.sheet}_{name}.png")


if __name__ == "__main__":
    main()
