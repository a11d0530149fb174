"""The KV cache in device memory.

Shapes: B batch, K kv heads, T capacity, H head dim.
"""

from __future__ import annotations

import math
import weakref
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.cuda import Device
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
        self, device: Device, staging: Staging, num_layers: int, shape_BKTH: tuple[int, int, int, int], dtype: str
    ) -> None:
        self._staging = staging
        self._dtype = dtype
        self.shape_BKTH = shape_BKTH
        self.batch, self.capacity = shape_BKTH[0], shape_BKTH[2]
        buffer_bytes = 2 * math.prod(shape_BKTH)
        self._names = cache_names(num_layers)
        self.past_names = [past for past, _ in self._names]
        self.num_bytes = len(self._names) * buffer_bytes
        self.graphs: list[int] = []
        self._addresses: list[int] = []
        self.close = weakref.finalize(self, _free, device, self._addresses, self.graphs)
        self.close.atexit = False  # the driver frees what a process leaves
        try:
            for _ in self._names:
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
        pairs = zip(self._names, self._addresses, strict=True)
        return {name: address + offset for names, address in pairs for name in names}

    def layer(self, index: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return copies of one layer's keys and values, [B, K, T, H], as float32."""
        return self._read(self._addresses[2 * index]), self._read(self._addresses[2 * index + 1])

    def _read(self, address: int) -> NDArray[np.float32]:
        if self._dtype == "float16":
            half = self._staging.download(address, self.shape_BKTH, np.float16)
            return np.asarray(half, np.float32)
        # bfloat16, which numpy lacks, is the upper half of float32.
        upper = np.asarray(self._staging.download(address, self.shape_BKTH, np.uint16), np.uint32)
        return (upper << 16).view(np.float32)


def cache_names(num_layers: int) -> list[tuple[str, str]]:
    """Return the graph's names of the past and the present of every buffer."""
    return [
        (f"past_key_values.{i}.{kind}", f"present_key_values.{i}.{kind}")
        for i in range(num_layers)
        for kind in ("key", "value")
    ]


def _free(device: Device, addresses: list[int], graphs: list[int]) -> None:
    for graph in graphs:
        device.free_graph(graph)
    for address in addresses:
        device.free(address)
