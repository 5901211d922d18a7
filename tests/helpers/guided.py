"""A system of words and clips in one file, with no picture to begin with: a reference guides the first steps, by a graph of
their own, and plain steps end the video. Nothing in runtime/ knows it. Load it by path: the tests are not a package.

    guided:  x' = x - rate x + weight scale (target - x) + push     push: a table, made two rows at a time
    plain:   x' = x - rate x + words

`target` is the mean of the references' latents by their scores, and a tenth of the noise that the loop starts with.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

FRAMES, SIZE, STEPS, GUIDED, WINDOW = 3, 16, 5, 3, 2
Array = NDArray[Any]
TIMES, RATE, WEIGHT = (0.9, 0.7, 0.5, 0.3, 0.1), 0.25, 0.5
ROWS = np.array([[t >= GUIDED, TIMES[t], RATE, WEIGHT, 1] for t in range(STEPS)], np.float32)
_BODIES = {
    "clip": "latents = ReduceMean<keepdims=0>(video, axes34)",
    "start": "start = Identity(noise)",
    "extract": """
    total = ReduceSum<keepdims=1>(reference_scores, axis1)
    shares = Div(reference_scores, total)
    shares4 = Unsqueeze(shares, axes23)
    each = Mul(reference_latents, shares4)
    mean = ReduceSum<keepdims=0>(each, axis1)
    little = Mul(start, tenth)
    targets = Add(mean, little)""",
    "timeline": """
    words = ReduceMean<keepdims=0>(text, axes12)
    wave = Sin(time)
    line = Mul(wave, words)
    line3 = Unsqueeze(line, axes12)
    push = Expand(line3, shape_latents)""",
    "step_guided": """
    r, w, s = Split<axis=1, num_outputs=3>(numbers)
    rate = Unsqueeze(r, axis2)
    strength = Mul(w, s)
    strength3 = Unsqueeze(strength, axis2)
    less = Mul(rate, x)
    kept = Sub(x, less)
    away = Sub(targets, x)
    pull = Mul(strength3, away)
    pulled = Add(kept, pull)
    next_x = Add(pulled, push)""",
    "step_plain": """
    r, w, s = Split<axis=1, num_outputs=3>(numbers)
    rate = Unsqueeze(r, axis2)
    less = Mul(rate, x)
    kept = Sub(x, less)
    words = ReduceMean<keepdims=1>(text, axes12)
    next_x = Add(kept, words)""",
    "decode": """
    bounded = Tanh(x)
    flat = Unsqueeze(bounded, axes34)
    video = Expand(flat, shape_video)""",
}
_VALUES = {
    "axis1": np.array([1]), "axis2": np.array([2]), "axes12": np.array([1, 2]), "axes23": np.array([2, 3]),
    "axes34": np.array([3, 4]), "tenth": np.float32(0.1), "shape_latents": np.array([1, FRAMES, 3]),
    "shape_video": np.array([1, FRAMES, 3, SIZE, SIZE]),
}  # fmt: skip


def _graphs(fake: ModuleType) -> dict[str, tuple[list[Any], list[Any], bytes]]:
    batch, some, steps = ({"name": name, "min": 1, "opt": 1, "max": 4} for name in ("batch", "K", "steps"))
    x, text = [batch, FRAMES, 3], fake.port("text", [batch, *fake.TEXT])
    ports = {
        "clip": ([fake.port("video", [some, FRAMES, 3, SIZE, SIZE])], [fake.port("latents", [some, FRAMES, 3])]),
        "start": ([fake.port("noise", x)], [fake.port("start", x)]),
        "extract": (
            [fake.port("reference_latents", [batch, some, FRAMES, 3]), fake.port("reference_scores", [batch, some]),
             fake.port("start", x)],
            [fake.port("targets", x)],
        ),
        "timeline": ([fake.port("time", [steps]), fake.port("text", [1, *fake.TEXT])], [fake.port("push", [steps, FRAMES, 3])]),
        "step_guided": (
            [fake.port("x", x), fake.port("numbers", [batch, 3]), fake.port("targets", x), fake.port("push", x)],
            [fake.port("next_x", x)],
        ),
        "step_plain": ([fake.port("x", x), fake.port("numbers", [batch, 3]), text], [fake.port("next_x", x)]),
        "decode": ([fake.port("x", x)], [fake.port("video", [batch, FRAMES, 3, SIZE, SIZE])]),
    }  # fmt: skip
    made = {name: (*ports[name], fake.parsed(name, *ports[name], _BODIES[name], _VALUES)) for name in ports}
    return made | {name: (*fake.GRAPHS[name][:2], fake.onnx_graph(name)) for name in ("text", "text_query")}


def manifest(fake: ModuleType) -> dict[str, Any]:
    """bundle.json, without its files."""
    return {
        "format": 2, "name": "guided", "motionrt": "0.1.0",
        "inputs": {
            "prompt": {"kind": "text", "tokenizer": "text"},
            "motion_scale": {"kind": "column", "loop": "video", "column": "scale", "default": 1.0},
        },
        "memory": {
            "text": "prompt", "query": "text_query", "tokenizer": "text_query", "default": 2, "max": 4,
            "clip": {"frames": FRAMES, "height": SIZE, "width": SIZE, "fps": 8}, "graphs": ["clip"],
            "record": [{"name": "latents", "dtype": "float16", "dims": [FRAMES, 3]}], "fingerprint": fake.digest(b"guided"),
            "absent": {"motion_scale": 0}, "least_seconds": 0.25, "least_change": 4,
        },
        "plan": [{"graph": "text", "reads": {"input_ids": "prompt.input_ids"}}, "start", "extract", "video", "decode"],
        "loops": {"video": {
            "graphs": ["step_guided", "step_plain"], "columns": ["graph", "time", "rate", "weight", "scale"],
            "schedules": {"even": [STEPS]}, "default": ["even", STEPS],
            "feeds": {"time": ["time"], "numbers": ["rate", "weight", "scale"]}, "carry": {"next_x": "x"},
            "start": {"x": "start"}, "gives": {"x": "x"}, "tables": ["timeline"], "windows": {"timeline": WINDOW},
            "absent": {"step_guided": "step_plain"},
        }},
        "output": {"value": "video", "frames": FRAMES, "height": SIZE, "width": SIZE, "fps": 8},
    }  # fmt: skip


def write_bundle(fake: ModuleType, path: Path) -> Path:
    """Write the bundle `path`."""
    written: Path = fake.write_files(path, manifest(fake), _graphs(fake), {f"video/even/{STEPS}": ROWS})
    return written


def frames(
    fake: ModuleType, ids: Sequence[int], start: Array, latents: Array | None, scores: Sequence[float] = (), scale: Any = 1
) -> Array:
    """What comes of it, in float64: [F, 3] values of the frames, uint8. No `latents` [K, F, 3]: plain steps alone.

    ids: the tokens of the prompt, padded; start: the noise [F, 3]; scale: a number, or one for each step.
    """
    words, x = fake.constants()["w_text"][list(ids)].astype(np.float64).mean(), start.astype(np.float64)
    scales = np.broadcast_to(np.asarray(scale, float), (STEPS,))
    shares = np.asarray(scores, float) / np.sum(scores)
    for t in range(STEPS):
        if latents is not None and t < GUIDED:
            target = np.tensordot(shares, latents.astype(np.float64), 1) + 0.1 * start
            x = x - RATE * x + WEIGHT * scales[t] * (target - x) + np.sin(TIMES[t]) * words
        else:
            x = x - RATE * x + words
    return np.rint((np.tanh(x) + 1) * 127.5)
