"""Runs the Triton kernel under Triton's interpreter, on the CPU, and prints one JSON line per case. A script, not a test:

    TRITON_INTERPRET=1 python tests/helpers/kernel_cases.py

The interpreter must be chosen before a kernel is decorated, hence a process of its own; tests/kernels/test_interpreter.py reads
the lines. fp32 and fp16 only: in bf16 the interpreter is silently wrong. Given a device ("cuda") the same cases run there as
compiled code, bf16 included; tests/kernels/test_gpu.py does that.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from motionrt.kernels.motion_cross_attention import reference
from motionrt.kernels.motion_cross_attention_triton import launch


@dataclass(frozen=True)
class Case:
    """One call of a launcher: sizes, layouts in memory, and how sharp the logits are."""

    name: str
    length: int = 17
    tokens: int = 25
    width: int = 32
    heads: int = 3
    inner: int = 0  # 0: N*d
    batch: int = 2
    shared: tuple[bool, bool] = (False, False)  # A, V of batch 1
    residual: bool = True
    scale: float = 0.8
    logits: float = 1.0
    hidden: str = "plain"
    folded: str = "k-major"
    layout: str | None = "padded"
    dtype: str = "float32"


def _both(case: Case) -> list[Case]:
    return [replace(case, name=f"{case.name}, {layout}", layout=layout) for layout in ("padded", "packed")]


def cases() -> list[Case]:
    """Odd sizes, memory layouts, extreme values; every one in both layouts where the layout matters."""
    found: list[Case] = []
    for tokens in (1, 25, 40, 64):
        for length in (1, 17):
            found += _both(Case(f"L{length} M{tokens}", length=length, tokens=tokens))
    found += _both(Case("video: L6976", length=226 + 6750, heads=2, batch=1))
    for width in (32, 40, 64, 80, 128, 160):
        found += _both(Case(f"d{width}", width=width, heads=2))
    found += _both(Case("N48", heads=48, width=16, batch=1, length=70))
    found += _both(Case("heads beyond one tile", heads=11, width=16, length=130))
    found += _both(Case("N*d != D", inner=56, residual=False))
    found += _both(Case("D not a multiple of any block", inner=37, residual=False))
    found += _both(Case("no residual", residual=False))
    found += _both(Case("A and V of batch 1", shared=(True, True), batch=3))
    found += [Case("A of batch 1", shared=(True, False)), Case("V of batch 1", shared=(False, True))]
    found += _both(Case("scale 0", scale=0.0))
    found += _both(Case("one-hot logits", logits=3e3))
    found += _both(Case("extreme logits", logits=1e30))
    found += [Case("equal logits", logits=0.0)]
    for hidden in ("sliced rows", "batch inside", "repeated batch"):
        found.append(Case(f"hidden: {hidden}", hidden=hidden))
    found += [Case("folded: as the formula has it", folded="plain"), Case("folded: strided", folded="strided")]
    found += _both(Case("fp16", dtype="float16", width=64)) + _both(Case("fp16 sharp", dtype="float16", logits=30.0))
    found += [Case("fp16 M1", dtype="float16", tokens=1), Case("fp16 L1 M64", dtype="float16", tokens=64, length=1)]
    return found


def tensors(case: Case, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(h, A, V, scale) of a case, in the memory layouts that it asks for; everything around a slice is NaN."""
    random = torch.Generator().manual_seed(0)
    dtype = getattr(torch, case.dtype)
    inner = case.inner or case.heads * case.width

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    h = normal(case.batch, case.length, inner).to(dtype).to(device)
    if case.hidden == "sliced rows":
        wide = torch.full((case.batch, case.length + 3, inner + 8), float("nan"), dtype=dtype, device=device)
        wide[:, 1:-2, 8:] = h
        h = wide[:, 1:-2, 8:]
    elif case.hidden == "batch inside":
        h = h.transpose(0, 1).contiguous().transpose(0, 1)
    elif case.hidden == "repeated batch":
        h = h[:1].expand_as(h)
    a = normal(1 if case.shared[0] else case.batch, case.heads * case.tokens, inner) * (case.logits / inner**0.5)
    a = a.to(dtype).to(device)
    if case.folded == "k-major":
        a = a.transpose(1, 2)
    elif case.folded == "plain":
        a = a.transpose(1, 2).contiguous()
    else:
        wide = torch.full((*a.shape[:2], inner + 8), float("nan"), dtype=dtype, device=device)
        wide[..., :inner] = a
        a = wide[..., :inner].transpose(1, 2)
    v = normal(1 if case.shared[1] else case.batch, case.heads, case.tokens, case.width).to(dtype).to(device)
    return h, a, v, torch.tensor(case.scale, dtype=torch.float32, device=device)


@contextmanager
def poisoned() -> Iterator[None]:
    """New tensors begin as NaN: what the kernel does not write is seen."""
    torch.use_deterministic_algorithms(True)  # what fills them, as a side effect
    try:
        assert torch.empty(1).new_empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def run(case: Case, device: str) -> dict[str, Any]:
    """Errors of the kernel and of plain torch in the same dtype, both against fp64, as the tolerance law wants them."""
    h, a, v, scale = tensors(case, device)
    truth = reference(h.double(), a.double(), v.double(), scale.double(), case.residual)
    plain = reference(h, a, v, scale.to(h.dtype), case.residual)
    before = h.clone()
    with poisoned():
        got = launch(h, a, v, scale, case.residual, layout=case.layout)
    assert torch.equal(before, h)
    return {
        "name": case.name,
        "error": float((got.double() - truth).abs().max()),
        "torch": float((plain.double() - truth).abs().max()),
        "unchanged": bool(case.scale == 0.0 and torch.equal(got, before)),
    }


def main(cases: Callable[[], Iterable[Any]], run: Callable[[Any, str], dict[str, Any]]) -> None:
    """`run` every one of `cases` whose name contains the argument."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.set_num_threads(1)
    for case in cases():
        if options.only in case.name:
            print(json.dumps(run(case, options.device)), flush=True)


if __name__ == "__main__":
    main(cases, run)
