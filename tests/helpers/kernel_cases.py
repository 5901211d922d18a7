"""Runs the Triton kernels under Triton's interpreter, on the CPU, and prints one JSON line per case. A script, not a test:

    TRITON_INTERPRET=1 python tests/helpers/kernel_cases.py

The interpreter must be chosen before a kernel is decorated, hence a process of its own; test_kernel_interpreter.py reads the
lines. fp32 and fp16 only: in bf16 the interpreter is silently wrong. Given a device ("cuda") the same cases run there as
compiled code, bf16 included; test_kernel_gpu.py does that.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from motionrt.kernels import motion_cross_attention, plain_cross_attention
from motionrt.kernels.motion_cross_attention_triton import launch, launch_in_place
from motionrt.kernels.plain_cross_attention_triton import launch as launch_plain


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
    in_place: bool = False
    plain: bool = False


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
    for case in (
        Case("in place"),
        Case("in place, sliced rows", hidden="sliced rows"),
        Case("in place, N10", heads=10, width=16),
    ):
        found.append(replace(case, in_place=True))
    found += [Case("in place, fp16 M40 d80", in_place=True, dtype="float16", tokens=40, width=80, length=70)]
    found += [Case(f"plain form, M{tokens}", plain=True, tokens=tokens, length=70) for tokens in (1, 64, 65, 77, 150)]
    found += [Case(f"plain form, d{width}", plain=True, tokens=70, width=width, heads=2) for width in (32, 40, 64, 80, 160)]
    found += [
        Case("plain form, N11", plain=True, heads=11, width=16, length=1),
        Case("plain form, N*d != D, one batch of V", plain=True, inner=37, residual=False, shared=(False, True)),
        Case("plain form, scale 0", plain=True, scale=0.0),
        Case("plain form, one-hot logits", plain=True, logits=3e3, tokens=77),
        Case("plain form, hidden: sliced rows", plain=True, hidden="sliced rows"),
        Case("plain form, fp16", plain=True, dtype="float16", tokens=77, width=64),
    ]
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


def run_plain(case: Case, device: str) -> dict[str, Any]:
    """The same for the unfolded form; its keys are as long as the queries, so that `logits` is what it says."""
    h, _, v, scale = tensors(case, device)
    random = torch.Generator().manual_seed(1)
    inner, inside = h.shape[2], case.heads * case.width
    weight = (torch.randn((inside, inner), generator=random, dtype=torch.float64) / inner**0.5).to(h.dtype).to(device)
    keys = torch.randn((case.batch, *v.shape[1:]), generator=random, dtype=torch.float64).to(h.dtype).to(device)
    factor = case.logits * case.width**-0.5
    call = (h, weight, keys, v, scale)
    truth = plain_cross_attention.reference(*(x.double() for x in call), factor, case.residual)
    torch_form = plain_cross_attention.reference(*call, factor, case.residual)
    got = launch_plain(*call, factor, case.residual)
    return {
        "name": case.name,
        "error": float((got.double() - truth).abs().max()),
        "torch": float((torch_form.double() - truth).abs().max()),
        "unchanged": torch.equal(got, h) if got.shape == h.shape else False,
    }


def run(case: Case, device: str) -> dict[str, Any]:
    """Errors of the kernel and of plain torch in the same dtype, both against fp64, as the tolerance law wants them."""
    if case.plain:
        return run_plain(case, device)
    h, a, v, scale = tensors(case, device)
    reference = motion_cross_attention.reference
    truth = reference(h.double(), a.double(), v.double(), scale.double(), case.residual)
    plain = reference(h, a, v, scale.to(h.dtype), case.residual)
    if case.in_place:
        before = h.clone()
        got = launch_in_place(h, a, v, scale)
        assert got is h and not torch.equal(before, h)
    else:
        before = h.clone()
        out = torch.full_like(truth, float("nan"), dtype=h.dtype)
        got = launch(h, a, v, scale, case.residual, layout=case.layout, out=out)
        assert got is out and torch.equal(before, h)
    return {
        "name": case.name,
        "error": float((got.double() - truth).abs().max()),
        "torch": float((plain.double() - truth).abs().max()),
        "unchanged": bool(case.scale == 0.0 and torch.equal(got, before)),
    }


def main() -> None:
    """Run every case whose name contains the argument."""
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
    sys.exit(main())
