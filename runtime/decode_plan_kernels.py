"""A decode plan on the device: its kernels, the memory that they share, and the launches of a step."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.cuda import CudaDevice
from runtime.decode_plan import CAPACITY, NULL, GpuPlan, Kernel, PlannedLaunch, Source

_VALUES: Mapping[str, Any] = {
    **{f"i{bits}": getattr(ctypes, f"c_int{bits}") for bits in (8, 16, 32, 64)},
    **{f"u{bits}": getattr(ctypes, f"c_uint{bits}") for bits in (8, 16, 32, 64)},
    "fp32": ctypes.c_float,
    "fp64": ctypes.c_double,
}
# Behind its own parameters, code of Triton takes two for scratch memory, which these kernels have none of.
_HIDDEN = (ctypes.c_void_p(None), ctypes.c_void_p(None))


class PlanKernels:
    """The kernels of a plan for one kind of GPU, loaded; `close` frees them and their memory.

    Args:
        device: Where.
        stream: The launches run on it.
        gpu: The plan for this GPU.
        code: Its file of machine code.
        buffers: Memory that the kernels share: bytes, and whether it begins as zeros; by name.
        weights: Device address of each weight, by name.
        constants: Numbers that the kernels take, by name.

    Raises:
        EngineError: The driver refuses the code.
        CapacityError: The GPU is out of memory; nothing stays taken.
    """

    def __init__(
        self,
        device: CudaDevice,
        stream: int,
        gpu: GpuPlan,
        code: bytes,
        buffers: Mapping[str, tuple[int, bool]],
        weights: Mapping[str, int],
        constants: Mapping[str, NDArray[Any]],
    ) -> None:
        self._device, self._stream, self._gpu = device, stream, gpu
        self._addresses = {NULL: 0, **{f"weight:{name}": address for name, address in weights.items()}}
        self._kernels: dict[int, int] = {}
        modules: dict[tuple[int, int], int] = {}
        with ExitStack() as stack:
            for name, (num_bytes, is_zeroed) in buffers.items():
                address = self._addresses[f"buffer:{name}"] = device.alloc(num_bytes)
                stack.callback(device.free, address)
                if is_zeroed:
                    device.fill(address, 0, num_bytes, stream)
            device.synchronize(stream)
            for name, values in constants.items():
                address = self._addresses[f"constant:{name}"] = device.alloc(values.nbytes)
                stack.callback(device.free, address)
                _upload(device, address, values, stream)
            for index, kernel in gpu.kernels.items():
                place = kernel.offset, kernel.num_bytes
                if place not in modules:
                    modules[place] = device.load_module(code[kernel.offset : kernel.offset + kernel.num_bytes])
                    stack.callback(device.unload_module, modules[place])
                self._kernels[index] = device.kernel(modules[place], kernel.entry, kernel.shared_bytes)
            self._taken = stack.pop_all()

    def close(self) -> None:
        """Unload the kernels and free their memory; none of them may be at work."""
        self._taken.close()

    def enqueue(self, batch: int, form: str, addresses: Mapping[str, int], capacity: int) -> None:
        """Enqueue all launches of a step.

        Args:
            batch: One of the plan's.
            form: `fast` or `invariant`.
            addresses: Of what steps read and write, `step:NAME`, and of the cache, `key:LAYER` and `value:LAYER`.
            capacity: Rows of a slot of the cache.

        Raises:
            EngineError: A launch was refused.
        """
        known = {**self._addresses, **addresses}
        for i, launch in enumerate(self._gpu.steps[batch, form]):
            kernel = self._gpu.kernels[launch.kernel]
            self._device.launch_kernel(
                self._kernels[launch.kernel],
                launch.grid,
                kernel.num_threads,
                kernel.shared_bytes,
                [*_arguments(kernel, launch, known, capacity), *_HIDDEN],
                self._stream,
                is_dependent=self._gpu.is_dependent and i > 0,
            )


def _upload(device: CudaDevice, address: int, values: NDArray[Any], stream: int) -> None:
    pinned = device.pinned(values.nbytes)
    try:
        pinned[:] = values.view(np.uint8)
        device.to_device(address, pinned, stream)
        device.synchronize(stream)
    finally:
        device.free_pinned(pinned)


def _arguments(kernel: Kernel, launch: PlannedLaunch, addresses: Mapping[str, int], capacity: int) -> list[Any]:
    def value(kind: str, source: Source) -> Any:
        if kind.startswith("*"):
            return ctypes.c_void_p(addresses[str(source)])
        return _VALUES[kind](capacity if source == CAPACITY else source)

    return [value(kind, source) for kind, source in zip(kernel.types, launch.sources, strict=True)]
