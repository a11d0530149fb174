"""The KV cache in device memory.

Shapes: B batch, K kv heads, T capacity, H head dim.
"""

from __future__ import annotations

import math
import weakref
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.contract import past_names, present_names
from runtime.cuda import CudaDevice
from runtime.device_buffers import Staging
from runtime.errors import CapacityError


class DeviceKVCache:
    """Zeros at first; each layer has one buffer for its keys and one for its values, bound as past and as present.

    The memory is freed with the last reference, or by `close`.

    Args:
        device: Where.
        staging: Reads it back; everything runs on its stream.
        num_layers: Layers.
        shape_BKTH: Shape of a buffer.
        dtype: `float16` or `bfloat16`.

    Attributes:
        past_names: The graph's names of the buffers as inputs.
        graphs: The recorded decode step, once there is one; it holds the addresses, so it goes with the cache.

    Raises:
        CapacityError: The GPU is out of memory.
    """

    def __init__(
        self, device: CudaDevice, staging: Staging, num_layers: int, shape_BKTH: tuple[int, int, int, int], dtype: str
    ) -> None:
        self._staging = staging
        self._dtype = dtype
        self.shape_BKTH = shape_BKTH
        self.batch, self.capacity = shape_BKTH[0], shape_BKTH[2]
        buffer_bytes = 2 * math.prod(shape_BKTH)
        self.past_names = past_names(num_layers)
        self._present_names = present_names(num_layers)
        self.num_bytes = len(self.past_names) * buffer_bytes
        self.graphs: list[int] = []
        self._addresses: list[int] = []
        self.close = weakref.finalize(self, _free, device, self._addresses, self.graphs)
        self.close.atexit = False  # the driver frees what a process leaves
        try:
            for _ in self.past_names:
                self._addresses.append(device.alloc(buffer_bytes))
        except CapacityError:
            self.close()
            raise
        for address in self._addresses:
            # Attention multiplies the rows that it must not see by 0, which gives NaN if one of them is.
            device.fill(address, 0, buffer_bytes, staging.stream)
        device.synchronize(staging.stream)  # it may be dropped unused

    def bindings(self, sequence: int = 0) -> dict[str, int]:
        """Return the device address of every past and present, from the rows of a sequence on."""
        offset = sequence * 2 * math.prod(self.shape_BKTH[1:])
        addresses = [address + offset for address in self._addresses]
        pasts, presents = (zip(names, addresses, strict=True) for names in (self.past_names, self._present_names))
        return {**dict(pasts), **dict(presents)}

    def layer(self, index: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return copies of one layer's keys and values, [B, K, T, H], as float32."""
        return self._read(self._addresses[2 * index]), self._read(self._addresses[2 * index + 1])

    def _read(self, address: int) -> NDArray[np.float32]:
        if self._dtype == "float16":
            half = self._staging.download(address, self.shape_BKTH, np.float16)
            return np.asarray(half, np.float32)
        return from_bfloat16(self._staging.download(address, self.shape_BKTH, np.uint16))


def from_bfloat16(values: NDArray[Any]) -> NDArray[np.float32]:
    """Return numbers of 16 bits as float32, whose upper half a bfloat16 is; numpy has no such type."""
    return (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _free(device: CudaDevice, addresses: list[int], graphs: list[int]) -> None:
    for graph in graphs:
        device.free_graph(graph)
    for address in addresses:
        device.free(address)
