"""A MotionPipeline with the call of a diffusers pipeline, for code that was written for one. Nothing of diffusers is imported.

    pipe = DiffusersPipeline.from_pretrained("demo/bundle", memory="demo/memory")
    frames = pipe(image=still, prompt="a red star bounces", num_inference_steps=8, guidance_scale=2.0, generator=1).frames[0]

What diffusers calls by another name than a bundle does has its name here; what has no counterpart is refused, never ignored.
Anything else (motion_scale, references, where, solver ...) is what `MotionPipeline` takes.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from motionrt.runtime.arguments import whole
from motionrt.runtime.errors import Cancelled, InputError, shown
from motionrt.runtime.job import Job
from motionrt.runtime.noise import MAX_SEED, check_seed
from motionrt.runtime.pipeline import MotionPipeline, Result

_SCHEDULE = "a bundle's steps were chosen when it was exported; choose among them with num_inference_steps and solver"
_NOISE = "noise is drawn from the seed, so that a request can be repeated; give generator"
_TEXT = "a bundle encodes its own text; give prompt and negative_prompt"
_OURS = {"seed": "generator", "steps": "num_inference_steps", "guidance": "guidance_scale"}
# What diffusers' pipelines from an image take and no bundle does: why not, and what to do.
REFUSED = {
    "timesteps": _SCHEDULE, "sigmas": _SCHEDULE, "eta": f"{_SCHEDULE}, some of which draw noise in each step",
    "latents": _NOISE, "prompt_embeds": _TEXT, "negative_prompt_embeds": _TEXT, "max_sequence_length": _TEXT,
    "use_dynamic_cfg": "guidance of each step is a number; give guidance_scale a list of them, one for each step",
    "min_guidance_scale": "give guidance_scale a list of numbers, one for each step",
    "max_guidance_scale": "give guidance_scale a list of numbers, one for each step",
    "attention_kwargs": "the graphs of a bundle are fixed when it is exported",
    "decode_chunk_size": "how much is decoded at once was chosen when the bundle was exported",
    "fps": "the bundle was exported for one rate", "motion_bucket_id": "the bundle was exported without it",
    "noise_aug_strength": "the bundle was exported without it",
}  # fmt: skip


@dataclass(frozen=True)
class Output:
    """`frames`: one video for each prompt and seed, prompts first: lists of Pillow images, or float32 `[N, F, H, W, 3]` in
    [0, 1]. `results`: the same as `Result`s, which also say seed, fps, references and times."""

    frames: list[list[Image.Image]] | NDArray[np.float32]
    results: list[Result]


class DiffusersPipeline:
    """See the module. `pipeline` is the `MotionPipeline` that does the work, and stays its owner's."""

    def __init__(self, pipeline: MotionPipeline) -> None:
        self.pipeline = pipeline
        self._interrupt = False  # diffusers' way for a callback to stop

    @classmethod
    def from_pretrained(cls, path: str | Path, memory: str | Path | None = None, **options: Any) -> DiffusersPipeline:
        """`MotionPipeline.from_bundle` with the same arguments, and what it raises: no name of a hub, nothing is fetched."""
        return cls(MotionPipeline.from_bundle(path, memory, **options))

    def __call__(
        self,
        image: Any = None,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        num_videos_per_prompt: int = 1,
        generator: Any = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, float, dict[str, Any]], object] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = (),
        **named: Any,
    ) -> Output | tuple[Any]:
        """Videos of an image and a prompt, or of lists of them, one after the other.

        None is what the bundle says. `height`, `width`, `num_frames`: only those that the bundle makes. `generator`: a seed, a
        NumPy Generator, which gives the next one, anything with `initial_seed()` (torch's), or a list, one for each video;
        None: a new seed each time. The second video of a prompt has the next seed. `output_type`: "pil" or "np".
        `callback_on_step_end(pipe, step, timestep, {})` is called after each step; stopping is `pipe._interrupt = True` there,
        and raises `Cancelled`. With `return_dict=False` the frames in a tuple.

        Raises `InputError` for what cannot be had, before anything is run, and what `MotionPipeline` raises.
        """
        declared, output = self.pipeline.bundle.manifest.inputs, self.pipeline.bundle.manifest.output
        for name, value in named.items():
            if name in REFUSED and name not in declared:
                raise InputError(f"{name} is {shown(value)}; nothing here takes it: {REFUSED[name]}. Leave it out.")
        for name, theirs in _OURS.items():
            if name in named:
                raise InputError(f"{name} is {shown(named[name])}; here it is called {theirs}, as in diffusers.")
        for name, asked, made in (
            ("height", height, output.height), ("width", width, output.width), ("num_frames", num_frames, output.frames),
        ):  # fmt: skip
            if asked is not None and asked != made:
                raise InputError(f"{name} is {shown(asked)}; bundle '{self.pipeline.bundle.name}' makes {made}. Leave it out.")
        if output_type not in ("pil", "np"):
            raise InputError(f"output_type is {shown(output_type)}; allowed are 'pil' and 'np' (torch.from_numpy takes that).")
        if callback_on_step_end_tensor_inputs:
            got = f"callback_on_step_end_tensor_inputs is {shown(callback_on_step_end_tensor_inputs)}"
            raise InputError(f"{got}; tensors stay where they are computed. Leave it out.")
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise InputError(f"callback_on_step_end is {shown(callback_on_step_end)}; it must be a function.")
        whole("num_videos_per_prompt", num_videos_per_prompt, 1)
        given = {
            "image": image, "prompt": prompt, "negative_prompt": negative_prompt, "guidance": guidance_scale,
            "steps": num_inference_steps,
        }  # fmt: skip
        given = {name: value for name, value in given.items() if value is not None}
        if "guidance" in given and "guidance" not in declared:
            raise InputError(f"guidance_scale is given; bundle '{self.pipeline.bundle.name}' takes {', '.join(declared)}.")
        every = list(_each(given))
        seeds = _seeds(generator, len(every), num_videos_per_prompt)
        requests = [self.pipeline.request(**one, **named, seed=of[0]) for one, of in zip(every, seeds, strict=True)]
        jobs = [self.pipeline.start(request) for request in requests]
        self._interrupt = False
        forks = (fork for job, of in zip(jobs, seeds, strict=True) for fork in _forks(job, of))
        results = [self._result(job, callback_on_step_end) for job in forks]
        frames: Any
        if output_type == "np":
            frames = np.stack([result.frames for result in results]).astype(np.float32) / np.float32(255)
        else:
            frames = [[Image.fromarray(frame) for frame in result.frames] for result in results]
        return Output(frames, results) if return_dict else (frames,)

    def _result(self, job: Job, callback: Callable[[Any, int, float, dict[str, Any]], object] | None) -> Result:
        loops = self.pipeline.bundle.manifest.loops
        for call in job:
            if callback is None or not call.loop or not self.pipeline.bundle.in_loop(call.graph):
                continue
            row = job.schedules[call.loop].rows[call.step - 1]
            columns = loops[call.loop].columns
            callback(self, call.step - 1, float(row[columns.index("timestep")]) if "timestep" in columns else np.nan, {})
            if self._interrupt:
                job.close()
                raise Cancelled(f"stopped by the callback after step {call.step} of {call.steps}.")
        return self.pipeline.result(job)


def _each(given: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The inputs of each prompt: lists of images and texts are one for each, anything else is for all."""
    lists = {name: value for name, value in given.items() if name != "guidance" and isinstance(value, list | tuple)}
    sizes = {name: len(value) for name, value in lists.items()}
    if len({*sizes.values()}) > 1 or 0 in sizes.values():
        raise InputError(f"lists of {sizes} are given; they must be equally long, one of each for each video.")
    for place in range(max(sizes.values(), default=1)):
        yield {name: value[place] if name in lists else value for name, value in given.items()}


def _seeds(generator: Any, prompts: int, videos: int) -> list[list[int]]:
    """The seeds of each prompt's videos."""
    if isinstance(generator, list | tuple):
        if len(generator) != prompts * videos:
            count = prompts * videos
            raise InputError(f"generator is a list of {len(generator)}; {count} videos are asked for. Give one for each.")
        seeds = [_seed(one) for one in generator]
        return [seeds[place * videos : (place + 1) * videos] for place in range(prompts)]
    first = _seed(generator)
    return [[(first + place * videos + video) % (MAX_SEED + 1) for video in range(videos)] for place in range(prompts)]


def _seed(generator: Any) -> int:
    if generator is None:
        return secrets.randbits(32)
    if isinstance(generator, np.random.Generator):
        return int(generator.integers(2**32))
    if callable(initial := getattr(generator, "initial_seed", None)):
        return check_seed(initial() % (MAX_SEED + 1))  # torch's may be negative
    return check_seed(generator)


def _forks(job: Job, seeds: Sequence[int]) -> Iterator[Job]:
    """A job for each seed, `job` for the first: what no seed changes is computed once."""
    while len(seeds) > 1 and job.call is not None and not job.seeded:
        next(job)
    yield from [job, *(job.fork(seed) for seed in seeds[1:])]
