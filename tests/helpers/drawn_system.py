"""A system that moves a picture as is drawn on it, in one file: two loops, drags, a brush, a field that may be given, and one
that is shown. Nothing in runtime/ knows it. Load it by path: the tests are not a package.

    hint:   what is known of the field, and where
    drawn:  f' = f + pull (aim - f)          aim: the hint where there is one, `strength` pixels to the right elsewhere
    free:   the same with `strength` pixels alone, where nothing is drawn
    held:   m = f (1 - brush)
    paint:  v' = v + pull (picture(p - m(p)) - v)

With a memory that keeps the clips' fields, and `retrieval`: `direct` takes the field of the clip that is found, `start` begins
with it and some noise and takes the last step alone, and `hints` draws it where it is not 0.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

TARGETS, SIZE, UNIT, CELL = 3, 32, 4, 8
_BODIES = {
    "hint": """
    target = Identity(flow)
    known = Unsqueeze(mask, axis1)""",
    "step_drawn": """
    spread = Unsqueeze(pull, axes234)
    right = Mul(strength, to_the_right)
    free = Sub(one, known)
    elsewhere = Mul(free, right)
    aim = Add(target, elsewhere)
    away = Sub(aim, f)
    part = Mul(spread, away)
    next_f = Add(f, part)""",
    "step_free": """
    spread = Unsqueeze(pull, axes234)
    right = Mul(strength, to_the_right)
    away = Sub(right, f)
    part = Mul(spread, away)
    next_f = Add(f, part)""",
    "held": """
    still = Unsqueeze(brush, axis1)
    free = Sub(one, still)
    moved = Mul(field, free)""",
    "warp": """
    fields = Squeeze(moved, axis0)
    last = Transpose<perm=[0,2,3,1]>(fields)
    shift = Mul(last, pixels)
    grid = Sub(places, shift)
    images = Expand(image, shape_images)
    frames = GridSample<padding_mode="border">(images, grid)
    whole = Concat<axis=0>(image, frames)
    aim = Unsqueeze(whole, axis0)""",
    "keep": """
    motion = Identity(field)""",
    "found": """
    found = Gather<axis=1>(reference_motion, nearest)""",
    "late": """
    part = Mul(noise, some)
    late = Add(found, part)""",
    "drawn": """
    size = Abs(found)
    furthest = ReduceMax<keepdims=0>(size, axis1)
    there = ReduceMax<keepdims=1>(furthest, axis1)
    far = Greater(there, some)
    moving = Cast<to=1>(far)
    drawn_mask = Max(moving, mask)
    mask5 = Unsqueeze(mask, axis1)
    rest = Sub(one, mask5)
    theirs = Mul(rest, found)
    drawn_flow = Add(flow, theirs)""",
    "paint": """
    spread = Unsqueeze(pull, axes234)
    away = Sub(aim, v)
    part = Mul(spread, away)
    next_v = Add(v, part)""",
}


def _constants() -> dict[str, Any]:
    place = (2 * np.arange(SIZE) + 1) / SIZE - 1
    grid = np.stack(np.meshgrid(place, place), axis=-1)[None]
    return {
        "axis0": np.array([0]), "axis1": np.array([1]), "axes234": np.array([2, 3, 4]), "one": np.float32(1),
        "to_the_right": np.float32([1, 0]).reshape(1, 1, 2, 1, 1), "pixels": np.float32(2 / SIZE),
        "nearest": np.array(0), "some": np.float32(0.25),
        "places": grid.astype(np.float32), "shape_images": np.array([TARGETS, 3, SIZE, SIZE]),
    }  # fmt: skip


def write_bundle(fake: ModuleType, path: Path, recalls: bool = False) -> Path:
    """The bundle `path`; fake: tests/helpers/fake_bundle.py; recalls: with a memory."""
    plane, fields, video = [1, 1, SIZE, SIZE], [1, TARGETS, 2, SIZE, SIZE], [1, TARGETS + 1, 3, SIZE, SIZE]
    sizes = {
        **dict.fromkeys("f next_f flow target field moved".split(), fields), "mask": plane, "brush": plane,
        "known": [1, 1, 1, SIZE, SIZE],
        **dict.fromkeys("found late noise drawn_flow motion".split(), fields), "drawn_mask": plane,
        "reference_motion": [1, fake.K, *fields[1:]], "pull": [1, 1], "strength": [1],
        "image": [1, 3, SIZE, SIZE], "v": video, "next_v": video, "aim": video,
    }  # fmt: skip
    reads = {
        "hint": ("flow mask", "target known"), "step_drawn": ("f pull target known strength", "next_f"),
        "step_free": ("f pull strength", "next_f"),
        "held": ("field brush", "moved"), "warp": ("moved image", "aim"), "paint": ("v pull aim", "next_v"),
    }  # fmt: skip
    if recalls:
        reads |= {
            "keep": ("field", "motion"), "found": ("reference_motion", "found"), "late": ("found noise", "late"),
            "drawn": ("found flow mask", "drawn_flow drawn_mask"),
        }  # fmt: skip
    graphs = {}
    for name, (ins, outs) in reads.items():
        first = {"name": "clips", "min": 1, "opt": 4, "max": 8} if name == "keep" else 1
        inputs, outputs = ([fake.port(one, [first, *sizes[one][1:]]) for one in names.split()] for names in (ins, outs))
        graphs[name] = (inputs, outputs, fake.parsed(name, inputs, outputs, _BODIES[name], _constants()))
    columns = ["graph", "pull"]
    manifest = {
        "format": 2, "name": "drawn", "motionrt": "0.1.0",
        "inputs": {
            "image": {"kind": "image", "height": SIZE, "width": SIZE, "gives": {"image": [-1, 1]}},
            "prompt": {"kind": "text", "default": ""},
            "drag": {
                "kind": "tracks", "image": "image", "frames": TARGETS, "unit": UNIT, "cell": CELL, "mask": "brush",
                "help": "From where to where something moves.",
            },
            "brush": {"kind": "mask", "image": "image", "help": "What may move, in white."},
            "field": {"kind": "field", "image": "image", "frames": TARGETS},
            "strength": {"kind": "number", "default": 0.0, "min": -9, "max": 9},
        },
        "plan": [{"graph": "hint", "reads": {"flow": "drag.flow", "mask": "drag.mask"}}, "flow", "held", "warp", "video"],
        "loops": {
            "flow": {
                "graphs": ["step_drawn", "step_free"], "columns": columns, "feeds": {"pull": ["pull"]},
                "schedules": {"even": [2]}, "default": ["even", 2], "start": {"f": "noise"}, "carry": {"next_f": "f"},
                "gives": {"f": "field"}, "without": {"step_drawn": {"runs": "step_free", "inputs": ["drag", "brush"]}},
            },
            "video": {
                "graphs": ["paint"], "columns": columns, "feeds": {"pull": ["pull"]}, "schedules": {"even": [2]},
                "default": ["even", 2], "start": {"v": "noise"}, "carry": {"next_v": "v"}, "gives": {"v": "video"},
            },
        },
        "output": {
            "value": "video", "frames": TARGETS + 1, "height": SIZE, "width": SIZE, "fps": 4, "field": "moved",
        },
    }  # fmt: skip
    rows = np.float32([[0, 0.5], [0, 1]])
    tables = {"flow/even/2": rows, "video/even/2": rows}
    if recalls:
        _recall(fake, manifest)
        graphs["text_query"] = (*fake.GRAPHS["text_query"][:2], fake.onnx_graph("text_query"))
        tables["flow/late/1"] = np.float32([[0, 0.5]])
    result: Path = fake.write_files(path, manifest, graphs, tables)
    return result


def _recall(fake: ModuleType, manifest: dict[str, Any]) -> None:
    """Give the system a memory of fields, and ways to use what is found there."""
    manifest["memory"] = {
        "text": "prompt", "query": "text_query", "tokenizer": "text_query", "default": 1, "max": 2,
        "clip": {"frames": TARGETS + 1, "height": SIZE, "width": SIZE, "fps": 4}, "graphs": ["keep"],
        "record": [{"name": "motion", "dtype": "float16", "dims": [TARGETS, 2, SIZE, SIZE]}],
        "fingerprint": fake.digest(b"drawn"),
    }  # fmt: skip
    manifest["loops"]["flow"]["schedules"]["late"] = [1]
    drawn = {"graph": "drawn", "reads": {"flow": "drag.flow", "mask": "drag.mask"}}
    manifest["plan"] = ["found", "late", drawn, *manifest["plan"]]
    manifest["inputs"]["retrieval"] = {
        "kind": "choice", "default": "none", "absent": "none", "help": "What a clip that is found is for.",
        "options": {
            "none": {},
            "direct": {"reads": {"moved": {"field": "found"}}},
            "start": {"reads": {"field": {"f": "late"}}, "schedules": {"flow": ["late", 1]}},
            "hints": {"reads": {"known": {"flow": "drawn_flow", "mask": "drawn_mask"}}, "drawn": ["drag"]},
        },
    }  # fmt: skip
