"""kernels/aot.py compiles what is shipped for every target, without a GPU: no spills, shared memory that the target has."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
pytest.importorskip("torch")
from motionrt.kernels.tiles import SHARED_LIMIT  # it needs torch

# All six for the released model's layout; one of each tensor-core generation for the other, to keep within a minute or so.
# benchmarks/counts.py names them too, for the fixture and for the gate. DynamiCrafter's widths differ in the number of steps
# over D, which is no constant of the kernel.
SHIPPED = {"padded": tuple(SHARED_LIMIT), "packed": (80, 90, 100, 120)}
PTX = {80: "8.0", 86: "8.0", 89: "8.0", 90: "8.0", 100: "8.6", 120: "8.7"}  # CUDA 12.0 drivers; the first to know 100, 120


@pytest.mark.slow
@pytest.mark.timeout(600)  # a minute of work for one processor; CI machines are shared
@pytest.mark.parametrize(
    ("layout", "target"),
    [(layout, target) for layout, targets in SHIPPED.items() for target in targets],
    ids=lambda value: f"sm{value}" if isinstance(value, int) else value,
)
def test_shipped_kernel_spills_nothing_and_fits(compiled_kernels: Any, layout: str, target: int) -> None:
    reports, folder = compiled_kernels[layout]
    (report,) = [r for r in reports if r["target"] == target]
    assert report["spills"] == 0
    assert 0 < report["shared"] <= SHARED_LIMIT[target]
    assert report["registers"] <= 255
    assert report["ptx_version"] == PTX[target]
    ptx = (folder / f"{report['name']}.ptx").read_text()
    assert f".entry {report['entry']}" in ptx and "call.uni" not in ptx  # the recursion is inlined
    assert ("wgmma" in ptx) == (target == 90) and ("tcgen05.mma" in ptx) == (target == 100)  # tensor cores of the target
    assert (folder / f"{report['name']}.cubin").read_bytes()[:4] == b"\x7fELF"
    assert json.loads((folder / f"{report['name']}.json").read_text())["registers"] == report["registers"]
    assert not list(folder.glob("*.partial"))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("target", SHARED_LIMIT, ids=lambda target: f"sm{target}")
def test_augmented_kernel_spills_nothing_and_fits(compiled_kernels: Any, target: int) -> None:
    reports, folder = compiled_kernels["augmented"]
    (report,) = [r for r in reports if r["target"] == target]
    assert report["name"].startswith("motion_augmented_attention_own_bf16_N8_d40_F16_L6")
    assert report["spills"] == 0 and report["registers"] <= 255
    assert 0 < report["shared"] <= SHARED_LIMIT[target]
    assert report["ptx_version"] == PTX[target]
    ptx = (folder / f"{report['name']}.ptx").read_text()
    assert f".entry {report['entry']}" in ptx and "call.uni" not in ptx
    assert "mma.sync" in ptx  # tensor cores: a warp has 16 x 16 scores, which no newer instruction takes
    assert (folder / f"{report['name']}.cubin").read_bytes()[:4] == b"\x7fELF"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--targets", "75"), "--targets has 75; allowed: 80, 86"),
        (("--dtypes", "fp8"), "--dtypes has fp8; allowed: fp16"),
        (("--layouts", "dense"), "--layouts has dense; allowed: padded, packed"),
    ],
    ids=["target", "dtype", "layout"],
)
def test_main_refuses_what_it_does_not_know(capsys: pytest.CaptureFixture[str], arguments: tuple[str, str], said: str) -> None:
    from motionrt.kernels.aot import main

    with pytest.raises(SystemExit, match="2"):
        main(list(arguments))
    assert said in capsys.readouterr().err


def test_report_finds_fault_with_spills_and_shared_memory() -> None:
    from motionrt.kernels.artefacts import Report

    good = Report("name", 89, 200, SHARED_LIMIT[89], 0, 8, "8.0", "kernel")
    assert not good.faults
    assert "8 bytes of registers spilled" in dataclasses.replace(good, spills=8).faults[0]
    assert "sm_86 has 101376" in dataclasses.replace(good, target=86, shared=101377).faults[0]


@pytest.mark.slow
@pytest.mark.parametrize(("inner", "wide"), [(64, True), (37, False)])
def test_loads_are_only_as_wide_as_the_sizes_are_aligned(inner: int, wide: bool) -> None:
    """Rows of 37 16-bit numbers begin anywhere: a copy of 16 bytes at once would end the program on a GPU."""
    from motionrt.kernels.aot import Shape, compile_kernel

    _, compiled = compile_kernel(80, "bf16", Shape(inner, 2, 5, 32, residual=inner == 64))
    assert ("cp.async.cg" in compiled.asm["ptx"]) == wide
