"""The run half against the real TensorRT-RTX, as far as it goes without a GPU: its classes, its log, its refusal."""

from __future__ import annotations

import inspect
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
pytest.importorskip("onnx_ir")

from by_path import load_by_path  # noqa: E402

from motionrt.export.engines.build import Options, build_engines  # noqa: E402
from motionrt.runtime.backends.machine import find_gpus  # noqa: E402
from motionrt.runtime.backends.tensorrt.backend import TensorRTBackend  # noqa: E402
from motionrt.runtime.backends.tensorrt.device_memory import Cuda  # noqa: E402
from motionrt.runtime.backends.tensorrt.library import installed, load_module, make_log  # noqa: E402
from motionrt.runtime.bundle.bundle import Bundle  # noqa: E402
from motionrt.runtime.errors import EngineError  # noqa: E402


@pytest.fixture(scope="module")
def fakes() -> ModuleType:
    return load_by_path(Path(__file__).resolve().parents[3] / "tests/helpers/fake_engine.py")


def public(kind: type) -> set[str]:
    return {name for name, value in vars(kind).items() if inspect.isfunction(value) and not name.startswith("_")}


def test_the_fake_has_no_call_that_the_real_one_lacks(fakes: ModuleType) -> None:
    """What the tests of the run half prove holds for the real library only if its classes have these names."""
    for ours, real in ((fakes.FakeEngine, trt.ICudaEngine), (fakes.FakeContext, trt.IExecutionContext)):
        assert public(ours) and not {name for name in public(ours) if not hasattr(real, name)}
    for name in (
        "create_runtime_cache",
        "set_runtime_cache",
        "set_execution_context_allocation_strategy",
        "cuda_graph_strategy",
    ):
        assert hasattr(trt.IRuntimeConfig, name)
    assert public(fakes.FakeCache) == {"deserialize", "serialize"} and hasattr(trt.IRuntimeCache, "serialize")
    assert hasattr(trt.ICudaEngine, "num_io_tensors")
    assert trt.ExecutionContextAllocationStrategy.USER_MANAGED and trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    assert trt.TensorIOMode.INPUT and {"FLOAT", "HALF", "BF16", "INT64", "UINT8"} <= set(trt.DataType.__members__)


def test_the_real_driver_has_every_call_of_the_fake_one(fakes: ModuleType) -> None:
    driver = pytest.importorskip("cuda.bindings.driver")
    assert not {name for name in vars(fakes.FakeDriver) if name.startswith("cu") and not hasattr(driver, name)} - {"current"}
    assert driver.CUstream_flags.CU_STREAM_NON_BLOCKING and driver.CUresult.CUDA_SUCCESS is not None
    assert driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
    assert driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR


def test_the_real_logger_takes_ours() -> None:
    log = make_log(trt)
    log.log(trt.ILogger.ERROR, "one\ntwo")
    log.log(trt.ILogger.VERBOSE, "not this")
    assert log.text() == "one two"
    assert installed()[-1] == "rtx" and load_module("rtx") is trt


def test_a_real_engine_without_a_gpu_gives_one_clear_error(fakes: ModuleType, fake_bundle: Path, tmp_path: Path) -> None:
    if not isinstance(find_gpus(), str):
        pytest.skip("there is a GPU")
    path = Path(shutil.copytree(fake_bundle, tmp_path / "bundle"))
    (built,) = build_engines(path, Options(("sm_89",), graphs=("request",)))
    libraries: dict[str, Any] = {"rtx": trt}
    backend = TensorRTBackend(cuda=Cuda(0, fakes.FakeDriver()), libraries=libraries)
    assert backend.find(Bundle.open(path), "request") == built.file, "its sidecar is that of this machine"
    message = "engine 'request' .* is refused by TensorRT-RTX .*CUDA.*Rebuild: `motionrt build"
    with pytest.raises(EngineError, match=message) as caught:
        backend.load(Bundle.open(path), "request")
    assert "\n" not in str(caught.value)
    other = TensorRTBackend(cuda=Cuda(0, fakes.FakeDriver((12, 0))), libraries=libraries)
    with pytest.raises(EngineError, match="built for sm_89; this machine is sm_120.*--target sm_120"):
        other.load(Bundle.open(path), "request")
