"""Some rows of one slot of a KV cache on the device, of all layers: read to the host and written back.

Shapes: N layers' keys and values, K kv heads, R rows, H head dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.cuda import CudaDevice, Pieces
from runtime.device_buffers import DeviceBuffer, Staging

_ITEM_BYTES = 2
Rows = NDArray[np.uint16]


class BoundCache(Protocol):
    """What is to be known of a cache on the device (`runtime.device_cache.DeviceKVCache`)."""

    capacity: int
    shape_BKTH: tuple[int, int, int, int]
    past_names: list[str]

    def bindings(self, slot: int = 0) -> Mapping[str, int]:
        """Return the device address of every past and present, from the rows of a slot on."""


class CacheRows:
    """Rows start … stop - 1 of a slot; each call returns when it is done.

    Args:
        device: Where.
        staging: Its stream orders the copies.
        cache: The cache.
        slot: Slot of the rows.
        start: First row.
        stop: Behind the last one.
    """

    def __init__(
        self, device: CudaDevice, staging: Staging, cache: BoundCache, slot: int, start: int, stop: int
    ) -> None:
        assert 0 <= start < stop <= cache.capacity, "rows that the cache does not have"
        self._device, self._staging = device, staging
        bound = cache.bindings(slot)
        _, num_heads, capacity, head_dim = cache.shape_BKTH
        row_bytes = head_dim * _ITEM_BYTES
        self._places = [Pieces(bound[name] + start * row_bytes, capacity * row_bytes) for name in cache.past_names]
        self._piece_bytes = (stop - start) * row_bytes
        self._shape = len(self._places), num_heads, stop - start, head_dim

    def read(self) -> Rows:
        """Return the bits of the rows, [N, K, R, H]."""
        return self._through(None)

    def write(self, rows_NKRH: Rows) -> None:
        """Write the bits of the rows."""
        self._through(rows_NKRH)

    def _through(self, rows: Rows | None) -> Rows:
        """Copy by way of memory in which the rows lie side by side."""
        _, num_heads, _, _ = self._shape
        buffer = DeviceBuffer(self._device)
        try:
            layer_bytes = num_heads * self._piece_bytes
            address = buffer.reserve(len(self._places) * layer_bytes)
            if rows is not None:
                self._staging.upload(address, rows)
            for i, place in enumerate(self._places):
                side: Any = Pieces(address + i * layer_bytes, self._piece_bytes)
                target, source = (side, place) if rows is None else (place, side)
                self._device.copy_pieces(target, source, self._piece_bytes, num_heads, self._staging.stream)
            if rows is None:
                return np.asarray(self._staging.download(address, self._shape, np.uint16), np.uint16)
            self._device.synchronize(self._staging.stream)
            return rows
        finally:
            buffer.close()
