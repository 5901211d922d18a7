"""A bundle with every graph of the contract and trivial maths, made in milliseconds: for tests of the runtime."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

FRAMES, SIZE, FPS = 3, 16, 8
LATENTS, TOKENS, EMBEDDING, TEXT = (2, 4, 4, 4), (2, 4), 8, (6, 4)
WORDS = "[PAD] [UNK] a the red blue star circle ball moves to left right up down in and very".split()
STEPS = {"ddim": list(range(1, 11)), "dpm": list(range(2, 11))}

B, K, T, L = ({"name": name, "min": 1, "opt": opt, "max": top} for name, opt, top in (
    ("batch", 1, 2), ("K", 4, 8), ("T", 4, 50), ("L", 8, 16)
))  # fmt: skip
_TYPES = {"float32": "float", "int64": "int64"}

_REQUEST = """
    mean_text = ReduceMean<keepdims=0>(text, axis1)
    negative_context = ReduceMean<keepdims=0>(negative_text, axis1)
    mean_motion = ReduceMean<keepdims=0>(motion, axis1)
    scale = Unsqueeze(motion_scale, axis1)
    scaled = Mul(mean_motion, scale)
    context = Add(mean_text, scaled)
"""
_SCHEDULE = """
    float_steps = Cast<to=1>(timestep)
    column = Unsqueeze(float_steps, axis1)
    table = MatMul(column, w_time)
    modulation = Cos(table)
"""
_STEP = """
    difference = Sub(context, negative_context)
    guidance2 = Unsqueeze(guidance, axis1)
    weighted = Mul(guidance2, difference)
    guided = Add(negative_context, weighted)
    guided5 = Unsqueeze(guided, axes134)
    modulation5 = Reshape(modulation, shape_modulation)
    scaled_latents = Mul(latents, modulation5)
    v0 = Add(scaled_latents, guided5)
    v = Add(v0, image_latents)
    spread = Unsqueeze(coefficients, axes234)
    p0, p1, c0, c1, c2, c3 = Split<axis=1, num_outputs=6>(spread)
    a0 = Mul(p0, latents)
    a1 = Mul(p1, v)
    x0 = Add(a0, a1)
    b0 = Mul(c0, latents)
    b1 = Mul(c1, x0)
    b2 = Mul(c2, previous_x0)
    b3 = Mul(c3, noise)
    b01 = Add(b0, b1)
    b23 = Add(b2, b3)
    next_latents = Add(b01, b23)
"""


def port(name: str, dims: list[Any], dtype: str = "float32") -> dict[str, Any]:
    return {"name": name, "dtype": dtype, "dims": dims}


_VIDEO, _TOKENS = [FRAMES, 3, SIZE, SIZE], list(TOKENS)
_LATENTS = [B, *LATENTS]
_LOOP = [
    *(port(name, _LATENTS) for name in ("latents", "previous_x0", "noise")),
    port("coefficients", [B, 6]),
    port("guidance", [B]),
]
_INPUTS = [
    port("text", [B, *TEXT]),
    port("negative_text", [B, *TEXT]),
    port("motion", [B, *_TOKENS]),
    port("image_latents", _LATENTS),
    port("motion_scale", [B]),
]
_CONTEXT = [port("context", [B, 4]), port("negative_context", [B, 4])]
_NEXT = [port("next_latents", _LATENTS), port("x0", _LATENTS)]

# name: inputs, outputs, body
GRAPHS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]], str]] = {
    "text_query": (
        [port("input_ids", [B, L], "int64"), port("attention_mask", [B, L], "int64")],
        [port("embedding", [B, EMBEDDING])],
        """
    vectors = Gather(w_query, input_ids)
    mask = Cast<to=1>(attention_mask)
    mask3 = Unsqueeze(mask, axis2)
    masked = Mul(vectors, mask3)
    total = ReduceSum<keepdims=0>(masked, axis1)
    embedding = LpNormalization<axis=-1, p=2>(total)
""",
    ),
    "text": (
        [port("input_ids", [B, TEXT[0]], "int64")],
        [port("text", [B, *TEXT])],
        "text = Gather(w_text, input_ids)",
    ),
    "motion": (
        [port("video", [K, *_VIDEO])],
        [port("motion", [K, *_TOKENS])],
        """
    brightness = ReduceMean<keepdims=0>(video, axes234)
    flat = MatMul(brightness, w_motion)
    motion = Reshape(flat, shape_tokens)
""",
    ),
    "appearance": (
        [port("image", [K, 3, SIZE, SIZE])],
        [port("appearance", [K, *_TOKENS])],
        """
    colour = ReduceMean<keepdims=0>(image, axes23)
    flat = MatMul(colour, w_appearance)
    appearance = Reshape(flat, shape_tokens)
""",
    ),
    "cama": (
        [
            port("reference_motion", [B, K, *_TOKENS]),
            port("reference_appearance", [B, K, *_TOKENS]),
            port("appearance", [B, *_TOKENS]),
        ],
        [port("motion", [B, *_TOKENS])],
        """
    mean_motion = ReduceMean<keepdims=0>(reference_motion, axis1)
    mean_appearance = ReduceMean<keepdims=0>(reference_appearance, axis1)
    change = Sub(appearance, mean_appearance)
    motion = Add(mean_motion, change)
""",
    ),
    "encode": (
        [port("image", [B, 3, SIZE, SIZE])],
        [port("image_latents", _LATENTS)],
        """
    pooled = AveragePool<kernel_shape=[4,4], strides=[4,4]>(image)
    still = Conv(pooled, w_encode)
    still5 = Unsqueeze(still, axis1)
    image_latents = Concat<axis=1>(still5, still5)
""",
    ),
    "schedule": ([port("timestep", [T], "int64")], [port("modulation", [T, 4])], _SCHEDULE),
    "request": ([_INPUTS[0], _INPUTS[1], _INPUTS[2], _INPUTS[4]], _CONTEXT, _REQUEST),
    "step": ([*_LOOP, port("modulation", [B, 4]), *_CONTEXT, _INPUTS[3]], _NEXT, _STEP),
    "step_plain": (
        [*_LOOP, port("timestep", [B], "int64"), *_INPUTS],
        _NEXT,
        _SCHEDULE + _REQUEST + _STEP,
    ),
    "decode": (
        [port("latents", _LATENTS)],
        [port("video", [B, *_VIDEO])],
        """
    flat = Flatten(latents)
    values = MatMul(flat, w_decode)
    bounded = Tanh(values)
    small = Reshape(bounded, shape_video)
    video = Expand(small, shape_full)
""",
    ),
}


def constants() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    floats = {
        "w_query": (len(WORDS), EMBEDDING),
        "w_text": (len(WORDS), TEXT[1]),
        "w_motion": (FRAMES, TOKENS[0] * TOKENS[1]),
        "w_appearance": (3, TOKENS[0] * TOKENS[1]),
        "w_encode": (4, 3, 1, 1),
        "w_time": (1, 4),
        "w_decode": (int(np.prod(LATENTS)), FRAMES * 3),
    }
    integers = {
        "axis1": [1],
        "axis2": [2],
        "axes23": [2, 3],
        "axes234": [2, 3, 4],
        "axes134": [1, 3, 4],
        "shape_tokens": [-1, *TOKENS],
        "shape_modulation": [-1, 1, 4, 1, 1],
        "shape_video": [-1, FRAMES, 3, 1, 1],
        "shape_full": [1, *_VIDEO],
    }
    values = {name: (0.3 * rng.standard_normal(shape)).astype(np.float32) for name, shape in floats.items()}
    return values | {name: np.array(value, np.int64) for name, value in integers.items()}


def onnx_graph(name: str, external: tuple[str, ...] = ()) -> bytes:
    """Graph `name`; see `parsed` for `external`."""
    return parsed(name, *GRAPHS[name], constants(), external)


def parsed(
    name: str, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]], body: str, values: Mapping[str, Any],
    external: tuple[str, ...] = (),
) -> bytes:  # fmt: skip
    """A graph whose nodes are the text `body`, with those of `values` that it reads as initializers; the ones named in
    `external` are declared external, without their data."""

    def declare(ports: list[dict[str, Any]]) -> str:
        parts = []
        for item in ports:
            dims = ",".join(d["name"] if isinstance(d, dict) else str(d) for d in item["dims"])
            parts.append(f"{_TYPES[item['dtype']]}[{dims}] {item['name']}")
        return ", ".join(parts)

    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 20]> {name} ({declare(inputs)}) => ({declare(outputs)}) {{ {body} }}'
    )
    used = {operand for node in model.graph.node for operand in node.input}
    for key, value in values.items():
        if key not in used:
            continue
        tensor = numpy_helper.from_array(np.asarray(value), key)
        if key in external:
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
            for field, text in (("location", "model.safetensors"), ("offset", "0"), ("length", str(np.asarray(value).nbytes))):
                entry = tensor.external_data.add()
                entry.key, entry.value = field, text
        model.graph.initializer.append(tensor)
    data: bytes = model.SerializeToString()
    return data


COLUMNS = ["graph", "timestep", "guidance", "p0", "p1", "c0", "c1", "c2", "c3"]


def rows(solver: str, steps: int, guidance: float = 2.0) -> np.ndarray:
    """Rows of the loop `video`, float32 [T, 9]."""
    level = np.linspace(1, 0, steps + 1, dtype=np.float32)
    now, then = level[:-1], level[1:]
    noisy = 0.1 * then if solver == "dpm" else 0 * then
    one = np.ones_like(now)
    time = np.linspace(999, 1, steps).astype(np.int64)
    columns = [0 * one, time, guidance * one, one, -0.5 * now, then, 1 - then, noisy, noisy]
    return np.stack(columns, axis=1).astype(np.float32)


def tables() -> dict[str, np.ndarray]:
    return {f"video/{solver}/{steps}": rows(solver, steps) for solver, counts in STEPS.items() for steps in counts}


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def write_tokenizer(path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_truncation(4)  # what a checkpoint's own file may ask for; the runtime must not cut texts
    tokenizer.save(str(path))


def system() -> dict[str, Any]:
    """MotionRAG's system around these graphs: what bundle.json says besides its files."""
    return {
        "format": 2,
        "name": "fake",
        "motionrt": "0.1.0",
        "inputs": {
            "image": {"kind": "image", "height": SIZE, "width": SIZE, "gives": {"image": [-1, 1]}, "help": "The still."},
            "prompt": {"kind": "text", "tokenizer": "text", "help": "What moves, and how."},
            "negative_prompt": {"kind": "text", "tokenizer": "text", "default": "", "help": "What to keep away from."},
            "motion_scale": {"kind": "number", "default": 1.0, "help": "Strength of the retrieved motion."},
            "guidance": {"kind": "column", "loop": "video", "column": "guidance", "default": 2.0, "help": "Guidance scale."},
        },
        "memory": {
            "text": "prompt",
            "query": "text_query",
            "tokenizer": "text_query",
            "default": 3,
            "max": 8,
            "clip": {"frames": FRAMES, "height": SIZE, "width": SIZE, "fps": FPS},
            "graphs": ["motion", "appearance"],
            "record": [{"name": name, "dtype": "float16", "dims": list(TOKENS)} for name in ("motion", "appearance")],
            "absent": {"motion": "zeros", "motion_scale": 0},
            "fingerprint": digest(b"fake"),
        },
        "plan": [
            {"graph": "text", "reads": {"input_ids": "prompt.input_ids"}},
            {"graph": "text", "reads": {"input_ids": "negative_prompt.input_ids"}, "writes": {"text": "negative_text"}},
            "appearance",
            "cama",
            "encode",
            "request",
            "video",
            "decode",
        ],
        "loops": {
            "video": {
                "graphs": ["step"],
                "columns": COLUMNS,
                "schedules": STEPS,
                "default": ["ddim", 4],
                "feeds": {"timestep": ["timestep"], "guidance": ["guidance"], "coefficients": COLUMNS[3:]},
                "carry": {"next_latents": "latents", "x0": "previous_x0"},
                "start": {"latents": "noise", "previous_x0": "zeros"},
                "tables": ["schedule"],
                "noise": "c3",
                "gives": {"latents": "latents"},
                "plain": "step_plain",
            }
        },
        "output": {"value": "video", "frames": FRAMES, "height": SIZE, "width": SIZE, "fps": FPS},
    }


def write_files(path: Path, manifest: dict[str, Any], graphs: dict[str, Any], rows: dict[str, np.ndarray]) -> Path:
    """Write the bundle `path`: `graphs`: name -> (inputs, outputs, the ONNX file's bytes); `rows` of its loops."""
    (path / "graphs").mkdir(parents=True)
    (path / "tokenizers").mkdir()
    entries = {}
    for name, (inputs, outputs, data) in graphs.items():
        (path / "graphs" / f"{name}.onnx").write_bytes(data)
        entries[name] = {"file": f"graphs/{name}.onnx", "sha256": digest(data), "inputs": inputs, "outputs": outputs}
    save_file(rows, path / "tables.safetensors")
    tokenizers = {}
    for name, length in (("text", TEXT[0]), ("text_query", 16)):
        file = path / "tokenizers" / f"{name}.json"
        write_tokenizer(file)
        sha256 = digest(file.read_bytes())
        tokenizers[name] = {"file": f"tokenizers/{name}.json", "sha256": sha256, "max_length": length, "pad_id": 0}
    manifest |= {
        "graphs": entries,
        "tokenizers": tokenizers,
        "tables": {"file": "tables.safetensors", "sha256": digest((path / "tables.safetensors").read_bytes())},
    }
    (path / "bundle.json").write_text(json.dumps(manifest))
    return path


def write_bundle(path: Path) -> Path:
    """Write the fake bundle into the directory `path` and return it."""
    count = {"nodes": 3, "parameters": 40, "weight_bytes": 160, "flops": 1000}
    manifest = system() | {
        "partition": {
            "classes": dict.fromkeys(("constant", "schedule", "request", "step"), count),
            "hoisted": [{"name": "modulation", "class": "schedule", "shape": [4], "bytes": 16}],
            "rules": [{"rule": "softmax-of-one", "where": "block [0]", "flops_before": 2000, "flops_after": 10}],
            "original": {**count, "flops": 4000},
        },
        "provenance": {"by": "tests/helpers/fake_bundle.py"},
    }
    graphs = {name: (inputs, outputs, onnx_graph(name)) for name, (inputs, outputs, _) in GRAPHS.items()}
    return write_files(path, manifest, graphs, tables())


def move_weights(path: Path, name: str, key: str, value: np.ndarray, package: Path | None = None) -> Path:
    """Give graph `name` of the bundle `path` its initializer `key` from a file with `value`, as `bundle.json` then declares.

    The file lies beside the graph, or is the only one of the Python package in the folder `package`. Returns the file.
    """
    manifest = json.loads((path / "bundle.json").read_text())
    file = path / f"graphs/{name}.safetensors" if package is None else package / "model.safetensors"
    save_file({key: value}, file)
    graph = onnx.load_from_string(onnx_graph(name))
    (tensor,) = (tensor for tensor in graph.graph.initializer if tensor.name == key)
    where = {"location": file.name, "offset": file.stat().st_size - value.nbytes, "length": value.nbytes}
    onnx.external_data_helper.set_external_data(tensor, **where)
    tensor.ClearField("raw_data")
    (path / "graphs" / f"{name}.onnx").write_bytes(graph.SerializeToString())
    sha256, entry = digest(file.read_bytes()), manifest["graphs"][name]
    entry["sha256"] = digest(graph.SerializeToString())
    if package is None:
        entry["data"] = {"file": f"graphs/{name}.safetensors", "sha256": sha256}
    else:
        (package / "__init__.py").touch()
        entry["weights"] = {"package": package.name, "file": file.name, "sha256": sha256}
    (path / "bundle.json").write_text(json.dumps(manifest))
    return file
