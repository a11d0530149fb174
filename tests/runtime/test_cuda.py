"""`CudaDevice` against the names and signatures of cuda-bindings, and its errors, on a machine without a GPU."""

from __future__ import annotations

import ctypes
import importlib
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from runtime.cuda import CudaDevice, Pieces
from runtime.errors import CapacityError, EngineError

real = pytest.importorskip("cuda.bindings.runtime")
real_driver = pytest.importorskip("cuda.bindings.driver")
OK = real.cudaError_t.cudaSuccess
_MEMORY = ctypes.create_string_buffer(4096)
RESULTS: dict[str, tuple[Any, ...]] = {
    "cudaDriverGetVersion": (13010,),
    "cudaGetDeviceCount": (1,),
    "cudaDeviceGetAttribute": (8,),
    "cudaGetDeviceProperties": (SimpleNamespace(name=b"Test GPU\0\0"),),
    "cudaMemGetInfo": (3_000_000_000, 8_000_000_000),
    "cudaMalloc": (4096,),
    "cudaHostAlloc": (ctypes.addressof(_MEMORY),),
    "cudaStreamCreateWithFlags": (5,),
    "cudaStreamEndCapture": (6,),
    "cudaGraphInstantiate": (7,),
    "cuModuleLoadData": (8,),
    "cuModuleGetFunction": (9,),
}


class FakeRuntime(ModuleType):
    """The functions of cuda-bindings, which only count and keep their arguments; other names are the real ones."""

    def __init__(self, module: Any = real, ok: Any = OK) -> None:
        super().__init__(module.__name__)
        self._module, self._ok = module, ok
        self.failing: dict[str, Any] = {}
        self.on_call: Any = None  # of what is launched, while its arguments are there
        self.calls: list[str] = []
        self.arguments: dict[str, tuple[Any, ...]] = {}

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)  # AttributeError: the binding has no such name
        if not callable(found) or isinstance(found, type) or name == "cudaGetErrorString":
            return found
        signature = found.__doc__.splitlines()[0]
        inside = signature[signature.index("(") + 1 : signature.rindex(")")]
        num_expected = len(inside.split(",")) if inside.strip() else 0

        def call(*args: Any) -> tuple[Any, ...]:
            assert len(args) == num_expected, signature
            self.calls.append(name)
            self.arguments[name] = args
            if self.on_call is not None and name == "cuLaunchKernelEx":
                self.on_call(*args)
            return (self.failing.get(name, self._ok), *RESULTS.get(name, ()))

        return call


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeRuntime:
    fake = FakeRuntime()
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", fake)
    return fake


@pytest.fixture
def driver(cuda: FakeRuntime, monkeypatch: pytest.MonkeyPatch) -> FakeRuntime:
    fake = FakeRuntime(real_driver, real_driver.CUresult.CUDA_SUCCESS)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", fake)
    return fake


def test_every_call_has_the_arguments_that_the_binding_takes(cuda: FakeRuntime) -> None:
    device = CudaDevice()
    assert (device.name, device.compute_capability, device.driver_version) == ("Test GPU", "8.8", "13.1")
    assert device.memory_info() == (3_000_000_000, 8_000_000_000)
    address, stream, array = device.alloc(4096), device.new_stream(), device.pinned(4096)
    assert (address, stream, array.dtype, array.shape) == (4096, 5, np.uint8, (4096,))
    device.begin_capture(stream)
    device.to_device(address, array, stream)
    device.to_host(array, address, stream)
    device.fill(address, 0, 8, stream)
    device.copy_pieces(Pieces(address, 64), Pieces(address + 32, 64), 32, 4, stream)
    graph = device.end_capture(stream)
    device.launch(graph, stream)
    device.synchronize(stream)
    device.free_graph(graph)
    device.free_stream(stream)
    device.free_pinned(array)
    device.free(address)
    assert cuda.calls.count("cudaMemcpyAsync") == 2
    assert cuda.arguments["cudaMemcpy2DAsync"] == (
        *(address, 64, address + 32, 64, 32, 4),
        *(real.cudaMemcpyKind.cudaMemcpyDeviceToDevice, stream),
    )
    for freed in ("cudaFree", "cudaFreeHost", "cudaStreamDestroy", "cudaGraphDestroy", "cudaGraphExecDestroy"):
        assert cuda.calls.count(freed) == 1


def test_the_binding_takes_integers_as_handles() -> None:
    if real.cudaDriverGetVersion()[1]:
        pytest.skip("a driver would follow handles that are none")
    for name, *args in (
        ("cudaStreamDestroy", 5),
        ("cudaStreamSynchronize", 5),
        ("cudaGraphLaunch", 7, 5),
        ("cudaGraphDestroy", 7),
        ("cudaGraphExecDestroy", 7),
    ):
        (code,) = getattr(real, name)(*args)
        assert code == real.cudaError_t.cudaErrorInsufficientDriver, name
    with pytest.raises(TypeError):
        real.cudaGraphLaunch("7", 5)


def test_out_of_memory_says_how_much_there_is(cuda: FakeRuntime) -> None:
    device = CudaDevice()
    cuda.failing["cudaMalloc"] = real.cudaError_t.cudaErrorMemoryAllocation
    with pytest.raises(CapacityError, match=r"cudaMalloc of 5.00 GB failed .*; 3.00 of 8.00 GB are free") as caught:
        device.alloc(5_000_000_000)
    assert "--max-context, --max-batch" in str(caught.value.remedy)


@pytest.mark.parametrize("code", ["cudaErrorNoDevice", "cudaErrorInsufficientDriver"])
def test_no_gpu_is_said(cuda: FakeRuntime, code: str) -> None:
    cuda.failing["cudaGetDeviceCount"] = getattr(real.cudaError_t, code)
    with pytest.raises(EngineError, match=f"none can be used here .*{code}"):
        CudaDevice()


def test_no_driver_is_said(cuda: FakeRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RESULTS, "cudaDriverGetVersion", (0,))
    with pytest.raises(EngineError, match="no NVIDIA driver is loaded"):
        CudaDevice()


def test_a_missing_binding_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(importlib, "import_module", missing)
    for extra in ("tensorrt", "cuda"):
        with pytest.raises(EngineError, match="cuda-bindings, which is not installed") as caught:
            CudaDevice(extra)
        assert f"`{extra}`" in str(caught.value.remedy)


def test_a_failure_inside_a_graph_or_a_kernel_is_an_engine_error(cuda: FakeRuntime) -> None:
    device = CudaDevice()
    cuda.failing["cudaStreamSynchronize"] = real.cudaError_t.cudaErrorIllegalAddress
    with pytest.raises(EngineError, match="cudaStreamSynchronize: cudaErrorIllegalAddress"):
        device.synchronize(5)


def test_a_graph_that_cannot_be_made_leaves_no_recording_behind(cuda: FakeRuntime) -> None:
    device = CudaDevice()
    cuda.failing["cudaGraphInstantiate"] = real.cudaError_t.cudaErrorInvalidValue
    with pytest.raises(EngineError, match="cudaGraphInstantiate"):
        device.end_capture(5)
    assert cuda.calls[-1] == "cudaGraphDestroy"


# Kernels


def test_kernels_are_loaded_and_launched_by_the_driver(cuda: FakeRuntime, driver: FakeRuntime) -> None:
    device = CudaDevice()
    assert device.max_shared_bytes == 8
    module = device.load_module(b"cubin")
    assert cuda.calls[-1] == "cudaSetDevice", "the driver works in the context of the thread"
    assert driver.arguments["cuModuleLoadData"] == (b"cubin",)
    assert device.kernel(module, "product", 48 << 10) == 9
    assert "cuFuncSetAttribute" not in driver.calls
    kernel = device.kernel(module, "product", 100_000)
    assert driver.arguments["cuModuleGetFunction"] == (8, b"product")
    attribute = real_driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    assert driver.arguments["cuFuncSetAttribute"] == (9, attribute, 100_000)
    values = [ctypes.c_void_p(4096), ctypes.c_int32(-7), ctypes.c_float(0.5), ctypes.c_void_p(None)]
    for is_dependent in (False, True):
        seen: list[Any] = []
        driver.on_call = lambda config, _, address, __, seen=seen: seen.extend(
            [ctypes.c_int32.from_address((ctypes.c_void_p * 4).from_address(address)[1]).value, config.numAttrs]
        )
        device.launch_kernel(kernel, (3, 2, 1), 128, 100_000, values, 5, is_dependent=is_dependent)
        assert seen == [-7, int(is_dependent)]
    config, function, _, extra = driver.arguments["cuLaunchKernelEx"]
    assert (function, extra) == (9, 0)
    assert (config.gridDimX, config.gridDimY, config.gridDimZ) == (3, 2, 1)
    assert (config.blockDimX, config.blockDimY, config.blockDimZ) == (128, 1, 1)
    assert (config.sharedMemBytes, int(config.hStream)) == (100_000, 5)
    (found,) = config.attrs
    assert found.id == real_driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    assert found.value.programmaticStreamSerializationAllowed == 1
    device.unload_module(module)
    assert driver.arguments["cuModuleUnload"] == (8,)


@pytest.mark.parametrize(
    ("code", "error", "message", "remedy"),
    [
        (
            "CUDA_ERROR_NO_BINARY_FOR_GPU",
            EngineError,
            "another GPU than Test GPU of .* 8.8",
            "--compute-capability 8.8",
        ),
        ("CUDA_ERROR_INVALID_IMAGE", EngineError, "of CUDA 13.1, does not read", "a newer driver"),
        ("CUDA_ERROR_UNSUPPORTED_PTX_VERSION", EngineError, "of CUDA 13.1, does not read", "a newer driver"),
        ("CUDA_ERROR_OUT_OF_MEMORY", CapacityError, "out of memory: cuModuleLoadData failed", "--max-context"),
        ("CUDA_ERROR_UNKNOWN", EngineError, "CUDA failed: cuModuleLoadData: CUDA_ERROR_UNKNOWN", "restart the program"),
    ],
)
def test_why_code_does_not_load_is_said(
    cuda: FakeRuntime, driver: FakeRuntime, code: str, error: type[Exception], message: str, remedy: str
) -> None:
    device = CudaDevice()
    driver.failing["cuModuleLoadData"] = getattr(real_driver.CUresult, code)
    with pytest.raises(error, match=message) as caught:
        device.load_module(b"cubin")
    assert remedy in str(getattr(caught.value, "remedy", None))


def test_no_memory_for_a_recorded_graph_is_a_capacity_error(cuda: FakeRuntime) -> None:
    device = CudaDevice()
    cuda.failing["cudaGraphInstantiate"] = real.cudaError_t.cudaErrorMemoryAllocation
    with pytest.raises(CapacityError, match="cudaGraphInstantiate failed"):
        device.end_capture(5)
