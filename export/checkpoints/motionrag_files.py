"""MotionRAG's released files (arXiv 2509.26391): which there are, what their keys are called, what may be absent.

    files = open_motionrag(folder, {"transformer.transformer_blocks.0.attn1": 3072, ...}, overlay=True, sos=SosToken(seed=42))
    files.adapter["transformer.transformer_blocks.0.attn1.processor.to_q_ip.0.weight"].read()

| file | holds |
| --- | --- |
| `Motion-Adapter` | the adapters' projections, and the motion Resampler they were trained with (`action_proj_model.`) |
| `motion_proj` | the motion Resampler alone |
| `motion_transformer` | CAMA (`transformer.`), the appearance Resampler (`condition_proj.`); `sos_token` is usually not saved |
| `17_frames` (CogVideoX) | query, key and value projections of every block, retuned for 17 frames |

Each is a `.ckpt` (bare dict, or Lightning's with `state_dict`), which is mapped and not loaded, or a `.safetensors` of the same
tensors. Heads are 64 wide in all of them, so every other size is read off the tensors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from motionrt.export.checkpoints.files import CheckpointError, InMemory, KeyReport, Lazy, check_keys, open_any
from motionrt.export.systems.motionrag import Cama, Resampler

HEAD = 64
FILES = ("Motion-Adapter", "motion_proj", "motion_transformer", "17_frames")
# What follows an attention's path in the name of an adapter's projection: of queries, keys and values.
DIFFUSERS = (".processor.to_q_ip.0.weight", ".processor.to_k_ip.0.weight", ".processor.to_v_ip.0.weight")
DYNAMICRAFTER = (".to_q_a.weight", ".to_k_a.weight", ".to_v_a.weight")
_PROJECTOR = ("action_proj_model.", "condition_transformer.vision_proj.", "vision_proj.", "")
_TRANSFORMER = ("condition_transformer.", "")


@dataclass(frozen=True)
class SosToken:
    """Where CAMA's first block comes from when the checkpoint has none: a seeded draw, or a safetensors file.

    The release neither trains nor saves `sos_token`; at inference it is a random draw, N(0, 1) / sqrt(D), that depends on
    the order of construction (quirk A14.2). Every block attends to it, so the choice is explicit and recorded.
    """

    seed: int | None = None
    file: Path | None = None

    @classmethod
    def parse(cls, text: str) -> SosToken:
        """`seed:42`, or the path of a safetensors file that has the tensor `sos_token`."""
        if text.startswith("seed:"):
            number = text.removeprefix("seed:")
            if not (number.isdecimal() and int(number) < 2**63):
                raise CheckpointError(f"--sos-token is {text!r}; allowed is seed:NUMBER or a file.")
            return cls(seed=int(number))
        return cls(file=Path(text))

    def read(self, shape: Sequence[int]) -> tuple[Lazy, str]:
        """The token of `shape` [1, M, D], float32 if drawn, and where it came from."""
        if self.file is not None:
            tensors = open_any(self.file)
            found, _ = check_keys(tensors, {"sos_token": shape}, what="sos_token", file=self.file)
            return found["sos_token"], f"file {self.file.name}"
        assert self.seed is not None
        draw = torch.Generator().manual_seed(self.seed)
        return InMemory(torch.randn(*shape, generator=draw) / shape[-1] ** 0.5), f"seed {self.seed}"


@dataclass(frozen=True)
class ResamplerSize:
    """Arguments of `Resampler`, read off a checkpoint."""

    dim: int
    depth: int
    heads: int
    num_queries: int
    embedding_dim: int
    output_dim: int
    ff_mult: int

    def build(self) -> Resampler:
        return Resampler(
            self.dim, self.depth, HEAD, self.heads, self.num_queries, self.embedding_dim, self.output_dim, self.ff_mult
        )


@dataclass(frozen=True)
class CamaSize:
    """Arguments of `Cama`, read off a checkpoint."""

    num_queries: int
    dim: int
    layers: int
    heads: int
    ff_dim: int

    def build(self) -> Cama:
        return Cama(self.num_queries, self.dim, self.layers, self.heads, self.ff_dim)


@dataclass(frozen=True)
class MotionRAG:
    """All parts of a release, lazily: keys are those of the modules that take them; `adapter` and `overlay` (17 frames)
    keep the released ones, with their `transformer.` or `unet.` in front. What CAMA's file holds is empty, and has no sizes,
    where it was not opened."""

    adapter: Mapping[str, Lazy]
    overlay: Mapping[str, Lazy]
    motion_proj: Mapping[str, Lazy]
    motion_size: ResamplerSize
    appearance_proj: Mapping[str, Lazy]
    appearance_size: ResamplerSize | None
    cama: Mapping[str, Lazy]
    cama_size: CamaSize | None
    sos: Mapping[str, Any]
    reports: tuple[KeyReport, ...]

    @property
    def tokens(self) -> tuple[int, int]:
        """M, D: motion tokens of a clip, and their width."""
        return self.motion_size.num_queries, self.motion_size.output_dim


def adapter_shapes(
    blocks: Mapping[str, int], motion_width: int, names: tuple[str, str, str] = DIFFUSERS
) -> dict[str, tuple[int, ...]]:
    """Released adapter keys and shapes: `blocks` is attention's path (`transformer.….attn1`) -> its width."""
    return {
        f"{path}{name}": (width, columns)
        for path, width in blocks.items()
        for name, columns in zip(names, (width, motion_width, motion_width), strict=True)
    }


def overlay_shapes(blocks: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of `17_frames`: to_q, to_k, to_v of every attention in `blocks`."""
    return {
        f"{path}.{name}.{kind}": (width, width) if kind == "weight" else (width,)
        for path, width in blocks.items()
        for name in ("to_q", "to_k", "to_v")
        for kind in ("weight", "bias")
    }


def file_of(folder: Path, stem: str) -> Path | None:
    """`stem`.safetensors or `stem`.ckpt in `folder`; None where there is neither."""
    for suffix in (".safetensors", ".ckpt"):
        if (folder / f"{stem}{suffix}").is_file():
            return folder / f"{stem}{suffix}"
    return None


def open_motionrag(
    folder: Path, blocks: Mapping[str, int], *, overlay: bool, sos: SosToken | None = None, cama: bool = True,
    names: tuple[str, str, str] = DIFFUSERS, queries: int | None = None,
) -> MotionRAG:  # fmt: skip
    """Open and check the files of one base model; `CheckpointError` for what is missing, foreign or damaged.

    `blocks`, `names`: attentions that have adapters, as in `adapter_shapes`; `overlay`: whether `17_frames` is of the model.
    `cama`: whether `motion_transformer` is opened, which nothing but CAMA reads. `queries`: seed of the adapters' query
    projections, where the file of DynamiCrafter's has none.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder. Give the folder with MotionRAG's files.")
    adapter_file, adapter = _open(folder, "Motion-Adapter")
    first = next(iter(blocks))
    keys = adapter.get(f"{first}{names[1]}")
    motion_width = keys.shape[-1] if keys is not None and len(keys.shape) == 2 else 1024
    inside = {key: lazy for key, lazy in adapter.items() if key.startswith(_PROJECTOR[0])}
    only = {key: lazy for key, lazy in adapter.items() if key not in inside}
    reports = []
    wanted = adapter_shapes(blocks, motion_width, names)
    if names == DYNAMICRAFTER and only and not any(key.endswith(names[0]) for key in only):
        only |= _drawn_queries(blocks, queries, adapter_file)
    adapters, report = check_keys(only, wanted, what="Motion-Adapter", file=adapter_file)
    reports.append(report)

    projector_file = file_of(folder, "motion_proj")
    if projector_file is None and not inside:
        raise CheckpointError(f"{folder} has no motion_proj.ckpt, and {adapter_file.name} has no action_proj_model. keys.")
    source = open_any(projector_file) if projector_file is not None else inside
    motion_proj, motion_size, report = open_resampler(source, _PROJECTOR, "motion_proj", projector_file or adapter_file)
    reports.append(report)
    if projector_file is not None and inside:
        # the release saves it twice; one is checked, and used, so the other must at least be as long
        again, _, report = open_resampler(inside, _PROJECTOR, "action_proj_model of Motion-Adapter", adapter_file)
        shapes = {name: lazy.shape for name, lazy in motion_proj.items()}
        check_keys(again, shapes, what="action_proj_model of Motion-Adapter", file=adapter_file)
        note = "the Resampler of motion_proj is used"
        reports.append(KeyReport(report.what, report.file, report.dtype, (), ignored=dict.fromkeys(inside, note)))

    retuned: dict[str, Lazy] = {}
    if overlay:
        overlay_file, opened = _open(folder, "17_frames")
        retuned, report = check_keys(opened, overlay_shapes(blocks), what="17_frames", file=overlay_file)
        reports.append(report)

    widths = {"motion_proj": motion_size.output_dim}
    release = MotionRAG(adapters, retuned, motion_proj, motion_size, {}, None, {}, None, {}, tuple(reports))
    if cama:
        release = _with_cama(release, folder, sos)
        assert release.appearance_size is not None and release.cama_size is not None
        widths |= {"condition_proj": release.appearance_size.output_dim, "transformer": release.cama_size.dim}
    widths["Motion-Adapter"] = motion_width
    if len(set(widths.values())) > 1:
        raise CheckpointError(
            f"the files in {folder} do not belong together: token widths are "
            f"{', '.join(f'{name} {width}' for name, width in widths.items())}."
        )
    return release


def _with_cama(release: MotionRAG, folder: Path, sos: SosToken | None) -> MotionRAG:
    """`release` with what `motion_transformer` holds."""
    file, transformer = _open(folder, "motion_transformer")
    prefix = _prefix(transformer, _TRANSFORMER, "transformer.layers.", file)
    transformer = {key.removeprefix(prefix): lazy for key, lazy in transformer.items()}
    proj = {key: lazy for key, lazy in transformer.items() if key.startswith("condition_proj.")}
    found, size, proj_report = open_resampler(proj, ("condition_proj.",), "condition_proj of motion_transformer", file)
    rest = {key: lazy for key, lazy in transformer.items() if key not in proj}
    vision = [key for key in rest if key.startswith("vision_proj.")]
    cama, cama_size, record, report = _cama(rest, release.motion_size, vision, file, sos)
    reports = (*release.reports, proj_report, report)
    return replace(
        release, appearance_proj=found, appearance_size=size, cama=cama, cama_size=cama_size, sos=record, reports=reports
    )


def _drawn_queries(blocks: Mapping[str, int], seed: int | None, file: Path) -> dict[str, Lazy]:
    """Query projections as the release draws them where its file has none: uniform within 1 / sqrt(C)."""
    if seed is None:
        raise CheckpointError(
            f"{file} has no `{next(iter(blocks))}{DYNAMICRAFTER[0]}`, nor any other: the training saves keys and values, and "
            "queries are drawn at random. Choose: --adapter-queries seed:42 draws them from that seed; the bundle records it."
        )
    draw = torch.Generator().manual_seed(seed)
    drawn = {path: (2 * torch.rand(width, width, generator=draw) - 1) / width**0.5 for path, width in blocks.items()}
    return {f"{path}{DYNAMICRAFTER[0]}": InMemory(value) for path, value in drawn.items()}


def _open(folder: Path, stem: str) -> tuple[Path, Mapping[str, Lazy]]:
    path = file_of(folder, stem)
    if path is None:
        there = sorted(p.name for p in folder.iterdir() if p.suffix in (".ckpt", ".safetensors"))
        raise CheckpointError(
            f"{folder} has no {stem}.ckpt; it has {', '.join(there) or 'no checkpoint'}. "
            "Give MotionRAG's folder of this base model."
        )
    return path, open_any(path)


def _prefix(tensors: Mapping[str, Lazy], prefixes: Sequence[str], mark: str, file: Path) -> str:
    """Which of `prefixes` the keys carry: the one with which a key begins `prefix + mark`."""
    for prefix in prefixes:
        if any(key.startswith(prefix + mark) for key in tensors):
            return prefix
    raise CheckpointError(
        f"{file} has no key `{mark}…` (nor with {', '.join(filter(None, prefixes))} in front); it begins with "
        f"`{next(iter(tensors), 'nothing')}`. Check that it is the file of this part."
    )


def open_resampler(
    tensors: Mapping[str, Lazy], prefixes: Sequence[str], what: str, file: Path
) -> tuple[dict[str, Lazy], ResamplerSize, KeyReport]:
    """The weights of a Resampler by its names, of a file that has one of `prefixes` before them, its size, and the report."""
    prefix = _prefix(tensors, prefixes, "latents", file)
    bare = {key.removeprefix(prefix) if key.startswith(prefix) else f"{key} (another prefix)": v for key, v in tensors.items()}

    def size(key: str, rank: int, axis: int, default: int) -> int:
        shape = bare[key].shape if key in bare else ()
        return shape[axis] if len(shape) == rank else default

    dim = size("proj_out.weight", 2, 1, 1024)
    numbers = [key.split(".")[1] for key in bare if key.startswith("layers.")]
    read = ResamplerSize(
        dim=dim,
        depth=max((int(n) + 1 for n in numbers if n.isdecimal()), default=4),
        heads=max(1, size("layers.0.0.to_q.weight", 2, 0, 768) // HEAD),
        num_queries=size("latents", 3, 1, 25),
        embedding_dim=size("proj_in.weight", 2, 1, 768),
        output_dim=size("proj_out.weight", 2, 0, 1024),
        ff_mult=max(1, size("layers.0.1.1.weight", 2, 0, 4 * dim) // dim),
    )
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in read.build().state_dict().items()}
    found, report = check_keys(bare, shapes, what=what, file=file)
    return found, read, report


def _cama(
    tensors: Mapping[str, Lazy], motion: ResamplerSize, vision: Sequence[str], file: Path, choice: SosToken | None
) -> tuple[dict[str, Lazy], CamaSize, dict[str, Any], KeyReport]:
    linear = tensors.get("transformer.layers.0.linear1.weight")
    ff_dim, dim = linear.shape if linear is not None and len(linear.shape) == 2 else (4096, 1024)
    numbers = [key.split(".")[2] for key in tensors if key.startswith("transformer.layers.")]
    layers = max((int(number) + 1 for number in numbers if number.isdecimal()), default=4)
    size = CamaSize(motion.num_queries, dim, layers, max(1, dim // HEAD), ff_dim)
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in size.build().state_dict().items()}
    token_shape = shapes.pop("sos_token")
    saved = tensors.get("sos_token")
    ignored = dict.fromkeys(vision, "the Resampler of motion_proj is used")
    if saved is not None and choice is not None:
        ignored["sos_token"] = "another one was chosen"
    elif saved is not None:
        shapes["sos_token"] = token_shape
    elif choice is None:
        raise CheckpointError(
            f"{file} has no `sos_token` {list(token_shape)}: the release does not save it, and draws it at random. Choose "
            "one: --sos-token seed:42 draws it from that seed, --sos-token FILE reads it; the bundle records which."
        )
    found, report = check_keys(tensors, shapes, what="motion_transformer", file=file, ignored=ignored)
    source = "checkpoint"
    if choice is not None:
        found["sos_token"], source = choice.read(token_shape)
    value = found["sos_token"].read().float().contiguous()
    return found, size, {"source": source, "sha256": hashlib.sha256(value.numpy().tobytes()).hexdigest()}, report
