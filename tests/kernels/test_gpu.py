"""The kernel as compiled code on a GPU: the interpreter's cases, bf16, released sizes, torch.compile and CUDA graphs."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from by_path import load_by_path

from motionrt.kernels.motion_augmented_attention import motion_augmented_attention
from motionrt.kernels.motion_cross_attention import motion_cross_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SCRIPT = Path(__file__).resolve().parents[2] / "tests/helpers/kernel_cases.py"
AUGMENTED = SCRIPT.with_name("augmented_cases.py")


def load() -> Any:
    """The cases, by path: the tests are not a package."""
    pytest.importorskip("triton")
    return load_by_path(SCRIPT)


def all_cases() -> list[Any]:
    """The interpreter's cases, every fp16 one in bf16 too, and the sizes that are released."""
    if importlib.util.find_spec("triton") is None:
        return []
    module = load()
    found = module.cases()
    found += [dataclasses.replace(c, dtype="bfloat16", name=f"bf16: {c.name}") for c in found if c.dtype == "float16"]
    for layout in ("padded", "packed"):
        for dtype in ("float16", "bfloat16"):
            big = {"heads": 48, "width": 64, "dtype": dtype, "layout": layout}
            found.append(module.Case(f"{dtype} cogvideox L6976, {layout}", length=6976, **big))
            found.append(module.Case(f"{dtype} cogvideox L17776, {layout}", length=17776, batch=1, **big))
            for heads in (5, 10, 20):
                name = f"{dtype} dynamicrafter N{heads}, {layout}"
                found.append(module.Case(name, length=2304, heads=heads, width=64, dtype=dtype, layout=layout))
    return found


def augmented_cases() -> list[Any]:
    """The interpreter's cases of the augmented attention, and Motion-I2V's four grids at 320 x 512."""
    if importlib.util.find_spec("triton") is None:
        return []
    module = load_by_path(AUGMENTED)
    found = module.cases()
    for grid, width in (((40, 64), 40), ((20, 32), 80), ((10, 16), 160), ((5, 8), 160)):
        for dtype, field in (("float16", "zoom out"), ("bfloat16", "random"), ("float32", "random")):
            sizes = {"grid": grid, "width": width, "frames": 16, "heads": 8, "branches": 2}
            found.append(module.Case(f"{dtype} motion-i2v {grid}, {field}", field=field, dtype=dtype, **sizes))
    return found


@pytest.fixture(autouse=True)
def exact_torch() -> Any:
    """fp32 without TF32: what the kernels are compared with."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("case", all_cases(), ids=lambda case: re.sub(r"\W+", "-", case.name))
def test_launch_obeys_the_tolerance_law(case: Any) -> None:
    line = load().run(case, "cuda")
    assert line["error"] <= 2 * line["torch"] + 1e-6, line
    assert line["unchanged"] == ("scale 0" in case.name)


def call(length: int = 300, dtype: Any = torch.bfloat16) -> tuple[Any, ...]:
    random = torch.Generator().manual_seed(0)
    sizes = ((2, length, 256), (2, 4 * 25, 256), (2, 4, 25, 64))
    hidden, rows, values = (torch.randn(size, generator=random).to("cuda", dtype) for size in sizes)
    return hidden, rows.transpose(1, 2) / 16, values, torch.tensor(0.5, device="cuda", dtype=dtype)


def test_motion_cross_attention_is_a_lawful_op_on_cuda() -> None:
    torch.library.opcheck(motion_cross_attention, (*call(), True), test_utils=("test_schema", "test_faketensor"))


def test_motion_cross_attention_under_torch_compile_equals_eager() -> None:
    arguments = call()

    def step(*tensors: Any) -> Any:
        return motion_cross_attention(*tensors, True) * 2

    compiled = torch.compile(step, fullgraph=True)
    assert torch.equal(compiled(*arguments), step(*arguments))


def test_motion_cross_attention_in_a_cuda_graph_follows_its_inputs() -> None:
    """Captured once, replayed with other h, A, V and scale in the same buffers."""
    buffers = call()
    motion_cross_attention(*buffers, True)  # compiles: never inside a capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = motion_cross_attention(*buffers, True)
    for factor in (1.0, -0.5):
        for buffer in buffers:
            buffer.mul_(factor)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, motion_cross_attention(*buffers, True))


def test_folded_of_another_layout_gives_the_same() -> None:
    hidden, folded, values, scale = call()
    want = motion_cross_attention(hidden, folded, values, scale, True)
    assert torch.equal(motion_cross_attention(hidden, folded.contiguous(), values, scale, True), want)


def test_ops_refuse_a_mix_of_devices_and_fp64() -> None:
    hidden, folded, values, scale = call()
    with pytest.raises(ValueError, match=r"`scale` is on cpu; allowed: cuda:0, where `hidden` is"):
        motion_cross_attention(hidden, folded, values, scale.cpu(), True)
    with pytest.raises(ValueError, match=r"`hidden` is torch.float64; allowed: float16, bfloat16, float32"):
        motion_cross_attention(*(x.double() for x in (hidden, folded, values, scale)), True)


@pytest.mark.parametrize("case", augmented_cases(), ids=lambda case: re.sub(r"\W+", "-", case.name))
def test_augmented_launch_obeys_the_tolerance_law(case: Any) -> None:
    pytest.importorskip("triton")
    line = load_by_path(AUGMENTED).run(case, "cuda")
    assert line["error"] <= 2 * line["torch"] + 1e-6, line


def augmented_call() -> tuple[Any, ...]:
    pytest.importorskip("triton")
    module = load_by_path(AUGMENTED)
    case = module.Case("a call", field="one point", frames=16, heads=8, width=40, branches=2, dtype="bfloat16")
    return (*module.tensors(case, "cuda"), False)


def test_motion_augmented_attention_is_a_lawful_op_on_cuda() -> None:
    torch.library.opcheck(motion_augmented_attention, augmented_call(), test_utils=("test_schema", "test_faketensor"))


def test_motion_augmented_attention_in_a_cuda_graph_follows_its_inputs() -> None:
    """Captured once, replayed with other rows in the same buffers; the table as well may change under it."""
    buffers = augmented_call()
    motion_augmented_attention(*buffers)  # compiles: never inside a capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = motion_augmented_attention(*buffers)
    for factor in (1.0, -0.5):
        for buffer in (*buffers[:6], buffers[7]):
            buffer.mul_(factor)
        buffers[9].fill_(buffers[6].shape[0] - buffers[9].shape[0] - 1)  # no target has chunks now
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, motion_augmented_attention(*buffers))
