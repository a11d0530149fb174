"""The CUDA boundary: everything that the runtime asks of a GPU; tests put a host implementation in its place.

Addresses, streams and graphs are plain integers. Copies are asynchronous: an array given to one must come from
`pinned`, and must be neither written, read nor freed before its stream was synchronised.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from runtime.errors import CapacityError, EngineError
from runtime.installation import how_to_install

Bytes = NDArray[np.uint8]
Grid = tuple[int, int, int]
# A kernel that takes more has to be allowed to first (CUDA C++ Programming Guide, compute capability 7.x).
_PLAIN_SHARED_BYTES = 48 << 10


class Pieces(NamedTuple):
    """Where pieces of memory lie, one after the other: the address of the first, and from each to the next."""

    address: int
    step_bytes: int


class CudaDevice:
    """The GPU that the driver lists first; `CUDA_VISIBLE_DEVICES` decides which that is.

    Args:
        extra: Extra of pyproject.toml that installs the package cuda-bindings beside the engine's library.

    Attributes:
        name: Name of the GPU, such as `NVIDIA H200`.
        compute_capability: SM version of the GPU, such as `9.0`.
        driver_version: The newest CUDA version that the driver knows, such as `13.0`.
        max_shared_bytes: Shared memory that one block of a kernel may take.

    Raises:
        EngineError: Package, driver or GPU is missing.
    """

    def __init__(self, extra: str = "tensorrt") -> None:
        try:
            self._cuda = importlib.import_module("cuda.bindings.runtime")
        except ModuleNotFoundError as error:
            raise EngineError(
                "this engine runs on an NVIDIA GPU and needs the Python package cuda-bindings, which is not installed",
                remedy=how_to_install(extra),
            ) from error
        driver = int(self._call("cudaDriverGetVersion"))
        if driver == 0:
            raise EngineError(
                "this engine runs on an NVIDIA GPU, and no NVIDIA driver is loaded on this machine",
                remedy="install the driver, or export for this machine's CPU: qwen3vl-export ... --target ort-cpu-int4",
            )
        self.driver_version = f"{driver // 1000}.{driver % 1000 // 10}"
        self._call("cudaGetDeviceCount")
        self._call("cudaSetDevice", 0)
        attribute = self._cuda.cudaDeviceAttr
        major, minor = (
            int(self._call("cudaDeviceGetAttribute", getattr(attribute, f"cudaDevAttrComputeCapability{part}"), 0))
            for part in ("Major", "Minor")
        )
        self.compute_capability = f"{major}.{minor}"
        shared = attribute.cudaDevAttrMaxSharedMemoryPerBlockOptin
        self.max_shared_bytes = int(self._call("cudaDeviceGetAttribute", shared, 0))
        self.name = bytes(self._call("cudaGetDeviceProperties", 0).name).split(b"\0")[0].decode()

    def memory_info(self) -> tuple[int, int]:
        """Return free and total bytes of device memory."""
        free, total = self._call("cudaMemGetInfo")
        return int(free), int(total)

    def alloc(self, num_bytes: int) -> int:
        """Return the address of new device memory; its contents are undefined.

        cudaMalloc aligns to 256 bytes (CUDA C++ Programming Guide, device memory accesses).

        Raises:
            CapacityError: The device has not so much left.
        """
        return int(self._call("cudaMalloc", num_bytes, asked_bytes=num_bytes))

    def free(self, address: int) -> None:
        """Free device memory."""
        self._call("cudaFree", address)

    def pinned(self, num_bytes: int) -> Bytes:
        """Return page-locked host memory, which begins with a page; views of it may be given to copies too."""
        address = int(self._call("cudaHostAlloc", num_bytes, self._cuda.cudaHostAllocDefault, asked_bytes=num_bytes))
        return np.ctypeslib.as_array((ctypes.c_uint8 * num_bytes).from_address(address))

    def free_pinned(self, array: Bytes) -> None:
        """Free what `pinned` returned; no view of it may be used any more."""
        self._call("cudaFreeHost", array.ctypes.data)

    def new_stream(self) -> int:
        """Return a new stream: work enqueued on it runs in order.

        It does not wait for the default stream, in which nothing of ours runs.
        """
        return int(self._call("cudaStreamCreateWithFlags", self._cuda.cudaStreamNonBlocking))

    def free_stream(self, stream: int) -> None:
        """Destroy a stream."""
        self._call("cudaStreamDestroy", stream)

    def synchronize(self, stream: int) -> None:
        """Wait until everything enqueued on the stream is done.

        Raises:
            EngineError: Something enqueued has failed.
        """
        self._call("cudaStreamSynchronize", stream)

    def to_device(self, address: int, array: NDArray[Any], stream: int) -> None:
        """Enqueue a copy of a contiguous pinned array to device memory."""
        self._copy(address, _address(array), array.nbytes, "HostToDevice", stream)

    def to_host(self, array: NDArray[Any], address: int, stream: int) -> None:
        """Enqueue a copy of device memory into a contiguous pinned array."""
        self._copy(_address(array), address, array.nbytes, "DeviceToHost", stream)

    def copy_pieces(self, target: Pieces, source: Pieces, piece_bytes: int, num_pieces: int, stream: int) -> None:
        """Enqueue a copy of pieces of device memory to others, which must not overlap them.

        A step is at least `piece_bytes` and less than 2 GiB (CUDA's maxPitch).
        """
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._call("cudaMemcpy2DAsync", *target, *source, piece_bytes, num_pieces, kind, stream)

    def fill(self, address: int, byte: int, num_bytes: int, stream: int) -> None:
        """Enqueue the setting of each byte of device memory."""
        self._call("cudaMemsetAsync", address, byte, num_bytes, stream)

    def begin_capture(self, stream: int) -> None:
        """Record what is enqueued on the stream from here on, and do not run it.

        Relaxed, since Python may collect a cache meanwhile, and freeing its memory would end a stricter recording.
        """
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed
        self._call("cudaStreamBeginCapture", stream, mode)

    def end_capture(self, stream: int) -> int:
        """Return the recorded work as a graph that can be launched."""
        recorded = self._call("cudaStreamEndCapture", stream)
        try:
            return int(self._call("cudaGraphInstantiate", recorded, 0))
        finally:
            self._call("cudaGraphDestroy", recorded)

    def launch(self, graph: int, stream: int) -> None:
        """Enqueue all work of a graph, with the addresses it was recorded with."""
        self._call("cudaGraphLaunch", graph, stream)

    def free_graph(self, graph: int) -> None:
        """Destroy a graph."""
        self._call("cudaGraphExecDestroy", graph)

    def load_module(self, code: bytes) -> int:
        """Return a module of the kernels in a cubin.

        Raises:
            EngineError: It is for another GPU, or the driver cannot read it.
            CapacityError: The GPU is out of memory.
        """
        self._call("cudaSetDevice", 0)  # which makes the context that the driver's functions need this thread's own
        return int(self._drive("cuModuleLoadData", code))

    def unload_module(self, module: int) -> None:
        """Unload a module; none of its kernels may be at work."""
        self._call("cudaSetDevice", 0)  # as in load_module: garbage is collected in any thread
        self._drive("cuModuleUnload", module)

    def kernel(self, module: int, entry: str, shared_bytes: int) -> int:
        """Return a kernel of a module by its name, ready to be launched with so much shared memory.

        Raises:
            EngineError: There is none of that name, or the GPU does not have so much.
        """
        found = int(self._drive("cuModuleGetFunction", module, entry.encode()))
        if shared_bytes > _PLAIN_SHARED_BYTES:
            attribute = self._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            self._drive("cuFuncSetAttribute", found, attribute, shared_bytes)
        return found

    def launch_kernel(
        self,
        kernel: int,
        grid: Grid,
        num_threads: int,
        shared_bytes: int,
        arguments: Sequence[Any],
        stream: int,
        *,
        is_dependent: bool = False,
    ) -> None:
        """Enqueue a kernel. Something of this class must have been enqueued in the calling thread before.

        Args:
            kernel: Of `kernel`.
            grid: Blocks along x, y and z.
            num_threads: Threads of a block.
            shared_bytes: Shared memory of a block.
            arguments: Values of ctypes, all that the kernel takes, in its order.
            stream: Where.
            is_dependent: It may begin before the one before it has ended, and waits for it by itself (programmatic
                dependent launch, from compute capability 9.0 on).

        Raises:
            EngineError, CapacityError: It cannot be launched.
        """
        driver = self._driver
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ = num_threads, 1, 1
        config.sharedMemBytes, config.hStream = shared_bytes, stream
        if is_dependent:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            config.attrs, config.numAttrs = [attribute], 1
        # The driver has copied the values when it returns, while recording too.
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(each) for each in arguments))
        self._drive("cuLaunchKernelEx", config, kernel, ctypes.addressof(pointers), 0)

    @property
    def _driver(self) -> Any:
        return importlib.import_module("cuda.bindings.driver")

    def _drive(self, name: str, *args: Any) -> Any:
        """Call a function of the CUDA driver, which says how it went as those of the runtime do."""
        driver = self._driver
        code, *results = getattr(driver, name)(*args)
        if code != driver.CUresult.CUDA_SUCCESS:
            raise self._driver_error(name, code)
        return results[0] if len(results) == 1 else results

    def _driver_error(self, name: str, code: Any) -> CapacityError | EngineError:
        codes = self._driver.CUresult
        if code == codes.CUDA_ERROR_OUT_OF_MEMORY:
            return self._error(name, self._cuda.cudaError_t.cudaErrorMemoryAllocation, 0)
        if code == codes.CUDA_ERROR_NO_BINARY_FOR_GPU:
            return EngineError(
                f"the machine code is for another GPU than {self.name} of compute capability "
                f"{self.compute_capability} ({name}: {code.name})",
                remedy="build the engine again with qwen3vl-export ... --compute-capability "
                f"{self.compute_capability}, or open it with decode_plan=False",
            )
        if code in (codes.CUDA_ERROR_INVALID_IMAGE, codes.CUDA_ERROR_UNSUPPORTED_PTX_VERSION):
            return EngineError(
                f"the driver, of CUDA {self.driver_version}, does not read the machine code ({name}: {code.name})",
                remedy="install a newer driver, or open the engine with decode_plan=False",
            )
        return self._failure(name, code.name)

    def _copy(self, target: int, source: int, num_bytes: int, kind: str, stream: int) -> None:
        direction = getattr(self._cuda.cudaMemcpyKind, f"cudaMemcpy{kind}")
        self._call("cudaMemcpyAsync", target, source, num_bytes, direction, stream)

    def _call(self, name: str, *args: Any, asked_bytes: int = 0) -> Any:
        """Call a function of the CUDA runtime; every one returns its error code first, then its results."""
        code, *results = getattr(self._cuda, name)(*args)
        if code != self._cuda.cudaError_t.cudaSuccess:
            raise self._error(name, code, asked_bytes)
        return results[0] if len(results) == 1 else results

    def _error(self, name: str, code: Any, asked_bytes: int) -> CapacityError | EngineError:
        errors = self._cuda.cudaError_t
        text = f"{code.name}: {self._cuda.cudaGetErrorString(code)[1].decode()}"
        if code == errors.cudaErrorMemoryAllocation:
            asked = f" of {asked_bytes / 1e9:.2f} GB" if asked_bytes else ""
            _, free, total = self._cuda.cudaMemGetInfo()
            left = f"; {free / 1e9:.2f} of {total / 1e9:.2f} GB are free" if total else ""
            return CapacityError(
                f"the GPU is out of memory: {name}{asked} failed ({text}){left}",
                remedy="end other programs that use the GPU, or build the engine for less: --max-context, --max-batch",
            )
        if code in (errors.cudaErrorNoDevice, errors.cudaErrorInsufficientDriver):
            return EngineError(
                f"this engine runs on an NVIDIA GPU, and none can be used here ({name}: {text})",
                remedy="install a driver for this CUDA version (nvidia-smi shows it), or check CUDA_VISIBLE_DEVICES",
            )
        return self._failure(name, text)

    def _failure(self, name: str, text: str) -> EngineError:
        return EngineError(
            f"CUDA failed: {name}: {text}",
            remedy="restart the program, since the GPU stays in error until then; if it happens again, report it",
        )


def _address(array: NDArray[Any]) -> int:
    assert array.flags.c_contiguous, "copies are of contiguous arrays"
    return int(array.ctypes.data)
