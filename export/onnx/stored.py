"""A graph's weights beside it, in the dtype of their checkpoint: the graph is typed in float32 and widens them as it loads.

`graph.onnx` holds nodes and sizes, `graph.safetensors` the weights: ONNX external data that any safetensors reader opens
too. Where a weight is stored in another dtype than the graph reads, one Cast stands between them; every runtime folds it
when it loads the graph, and an engine's builder takes the weight at the precision that it builds for. Widening is exact.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from motionrt.export.checkpoints.files import CheckpointError, Lazy
from motionrt.export.checkpoints.safetensors_file import Entry, Written, read_header, write_file
from motionrt.runtime.dtypes import DTYPES

INLINE = 1024  # bytes: smaller tensors stay in the graph
INLINE_SIZES = 1 << 16  # the same of whole numbers, which may be sizes (of the parts of a split): shapes depend on them


@dataclass(frozen=True)
class Computed:
    """A tensor that is made when its turn comes, of known dtype and shape."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor] = field(repr=False)


@dataclass(frozen=True)
class Narrowed:
    """A weight that is kept in a narrower dtype than its checkpoint's; `CheckpointError` where it does not fit there."""

    source: Lazy
    dtype: torch.dtype
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.source.shape)

    def read(self) -> Tensor:
        value = self.source.read()
        narrow = value.to(self.dtype)
        if not torch.isfinite(narrow).all():
            kind = str(self.dtype).removeprefix("torch.")
            raise CheckpointError(
                f"weight `{self.name}` has the value {float(value.abs().max()):.3g}, which {kind} cannot hold. Export with "
                "--dtype bfloat16, or leave the weights as they are (--dtype checkpoint)."
            )
        return narrow


def stored_as(weights: Mapping[str, Lazy], dtype: torch.dtype | None) -> dict[str, Lazy]:
    """`weights` with all floats in `dtype`; None leaves each as its checkpoint has it."""
    return {
        name: lazy
        if dtype is None or lazy.dtype == dtype or not lazy.dtype.is_floating_point
        else Narrowed(lazy, dtype, name)
        for name, lazy in weights.items()
    }


def store(
    model: ir.Model, path: Path, weights: Mapping[str, Lazy], extra: Mapping[str, Lazy], shared: Path | None = None
) -> Written | None:
    """Write the values of `model`'s initializers `weights` beside the graph file `path`, and point the graph at them.

    `extra`: tensors that the file holds for others than the graph (the torch program of the same graph). None where there
    is nothing to write: no file is made. `shared`: a file of another graph in the same folder that has these weights
    already: it is pointed at, and what it does not have (tables of this graph's own sizes) is kept inside the graph. In place;
    `model` is then ready to be serialised.
    """
    graph, casts, written = model.graph, [], None
    if shared is not None:
        data, there = shared, read_header(shared)[0]
        places = {name: there[known] for name, known in names_in(shared, weights).items()}
        for name in weights.keys() - places.keys():
            graph.initializers[name].const_value = ir.tensor(weights[name].read().float().numpy(), name=name)
    else:
        entries = [Entry(name, lazy.dtype, tuple(lazy.shape), lazy.read) for name, lazy in {**extra, **weights}.items()]
        if not entries:
            return None
        path.parent.mkdir(parents=True, exist_ok=True)
        data = path.with_suffix(".safetensors")
        written = write_file(data, entries)
        places = {name: written.tensors[name] for name in weights}
    for name, place in places.items():
        kind, value = ir.DataType(ONNX[place.dtype]), graph.initializers[name]
        outside = ir.ExternalTensor(
            data.name, place.offset, place.size, kind, shape=ir.Shape(place.shape), name=name, base_dir=path.parent
        )
        if kind == value.dtype:
            value.const_value = outside
            continue
        held = ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape(place.shape), const_value=outside)
        cast = ir.node("Cast", [held], {"to": int(value.dtype or ir.DataType.FLOAT)}, name=f"{name}.widened")
        (wide,) = cast.outputs
        wide.name, wide.type, wide.shape = f"{name}.widened", value.type, value.shape
        ir.convenience.replace_all_uses_with(value, wide, replace_graph_outputs=True)
        del graph.initializers[name]
        graph.register_initializer(held)
        casts.append(cast)
    if casts:
        if len(graph):
            graph.insert_before(graph[0], casts)
        else:
            graph.extend(casts)
    return written


def names_in(shared: Path, weights: Mapping[str, Lazy]) -> dict[str, str]:
    """Those of `weights` that the safetensors file `shared` holds too, in dtype, shape and every value: their names there."""
    there = _contents(shared)
    found = {name: there.get(_content(lazy)) for name, lazy in weights.items()}
    return {name: known for name, known in found.items() if known is not None}


@lru_cache(maxsize=2)
def _contents(path: Path) -> dict[tuple[Any, ...], str]:
    """What a file holds, by content; it is not written to again."""
    return {_content(stored): name for name, stored in read_header(path)[0].items()}


def _content(lazy: Lazy) -> tuple[Any, ...]:
    with torch._subclasses.fake_tensor.unset_fake_temporarily():  # a trace without weights may be under way
        value = lazy.read().contiguous()
        raw = value.view(-1).view(torch.uint8).numpy().data if value.numel() else b""
    return value.dtype, tuple(value.shape), hashlib.blake2b(raw, digest_size=16).digest()


ONNX = {getattr(torch, name): dtype.onnx for name, dtype in DTYPES.items()}


def narrowest(value: Tensor) -> Tensor:
    """`value` as float16 where that loses nothing, else as it is: checkpoints that were rounded once are stored so."""
    if value.dtype != torch.float32:
        return value
    half = value.half()
    return half if torch.equal(half.float(), value) else value
