"""The KV cache in device memory.

Shapes: B batch, K kv heads, T capacity, H head dim.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.cache_rows import CacheRows
from runtime.contract import FloatArray, past_names, present_names
from runtime.cuda import CudaDevice, Pieces
from runtime.device_buffers import DeviceBuffer, Staging

_ITEM_BYTES = 2


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
        dtype: As given.
        past_names: The graph's names of the buffers as inputs.
        graphs: The recorded decode steps by their batch, of the sequences from slot 0 on; they hold the addresses, so
            they go with the cache.

    Raises:
        CapacityError: The GPU is out of memory.
    """

    def __init__(
        self, device: CudaDevice, staging: Staging, num_layers: int, shape_BKTH: tuple[int, int, int, int], dtype: str
    ) -> None:
        self._device = device
        self._staging = staging
        self.dtype = dtype
        self.shape_BKTH = shape_BKTH
        self.batch, self.capacity = shape_BKTH[0], shape_BKTH[2]
        buffer_bytes = _ITEM_BYTES * math.prod(shape_BKTH)
        self.past_names = past_names(num_layers)
        self._present_names = present_names(num_layers)
        self.num_bytes = len(self.past_names) * buffer_bytes
        self.graphs: dict[int, int] = {}
        self._addresses: list[int] = []
        self._aside = DeviceBuffer(device)
        self.close = weakref.finalize(self, _free, device, self._addresses, self.graphs, self._aside)
        self.close.atexit = False  # the driver frees what a process leaves
        try:
            for _ in self.past_names:
                self._addresses.append(device.alloc(buffer_bytes))
            if self.batch > 1:
                # Taken here, so that no swap fails for want of it: one slot's keys of one layer.
                self._aside.reserve(buffer_bytes // self.batch)
        except BaseException:  # Ctrl-C too
            self.close()
            raise
        for address in self._addresses:
            # Attention multiplies the rows that it must not see by 0, which gives NaN if one of them is.
            device.fill(address, 0, buffer_bytes, staging.stream)
        device.synchronize(staging.stream)  # it may be dropped unused

    def bindings(self, slot: int = 0) -> dict[str, int]:
        """Return the device address of every past and present, from the rows of a slot on."""
        addresses = [self._slot(address, slot).address for address in self._addresses]
        pasts, presents = (zip(names, addresses, strict=True) for names in (self.past_names, self._present_names))
        return {**dict(pasts), **dict(presents)}

    def copy_rows(self, source: int, target: int, num_rows: int) -> None:
        """Copy the first rows of one slot to another."""
        if source != target:
            piece_bytes = self._row_bytes(num_rows)
            for address in self._addresses:
                self._copy(self._slot(address, target), self._slot(address, source), piece_bytes)
            self._device.synchronize(self._staging.stream)

    def swap_rows(self, slot: int, other: int, num_rows: int) -> None:
        """Exchange the first rows of two slots."""
        piece_bytes = self._row_bytes(num_rows)
        if slot == other:
            return
        aside = Pieces(self._aside.address, piece_bytes)
        # One layer's keys or values after the other, through the same memory: on one stream they wait for each other.
        for address in self._addresses:
            first, second = self._slot(address, slot), self._slot(address, other)
            self._copy(aside, first, piece_bytes)
            self._copy(first, second, piece_bytes)
            self._copy(second, aside, piece_bytes)
        self._device.synchronize(self._staging.stream)

    def move_rows(self, slot: int, source: int, target: int, num_rows: int) -> None:
        """Move rows of a slot down; see `runtime.sliding_window.SlidingCache`."""
        # Copies must not overlap, so no piece is longer than the way that it goes.
        step = source - target
        assert step > 0 and self._row_bytes(source + num_rows) >= 0
        for start in range(0, num_rows, step):
            piece_bytes = self._row_bytes(min(step, num_rows - start))
            for address in self._addresses:
                rows = self._slot(address, slot)
                to, origin = (
                    rows._replace(address=rows.address + self._row_bytes(first + start)) for first in (target, source)
                )
                self._copy(to, origin, piece_bytes)
        self._device.synchronize(self._staging.stream)

    def read_keys(self, slot: int, start: int, num_rows: int) -> FloatArray:
        """Return keys of rows, float32 [layers, K, R, H]."""
        if not num_rows:
            return np.zeros((len(self._addresses) // 2, self.shape_BKTH[1], 0, self.shape_BKTH[3]), np.float32)
        bits = self._rows(slot, start, num_rows).read()[::2]
        return from_bfloat16(bits) if self.dtype == "bfloat16" else bits.view(np.float16).astype(np.float32)

    def write_keys(self, slot: int, start: int, keys_LKRH: FloatArray) -> None:
        """Write keys of rows from `start` on, rounded to the cache's type."""
        if not keys_LKRH.size:
            return
        rows = self._rows(slot, start, keys_LKRH.shape[2])
        bits = rows.read()
        bits[::2] = to_bits(rounded_to_bfloat16(keys_LKRH) if self.dtype == "bfloat16" else keys_LKRH, self.dtype)
        rows.write(bits)

    def _rows(self, slot: int, start: int, num_rows: int) -> CacheRows:
        return CacheRows(self._device, self._staging, self, slot, start, start + num_rows)

    def read_rows(self, slot: int, start: int, stop: int) -> list[NDArray[Any]]:
        """Return copies of rows of a slot; see `runtime.moved_rows.MovableCache`."""
        rows_NKRH = CacheRows(self._device, self._staging, self, slot, start, stop).read()
        return list(rows_NKRH if self.dtype == "bfloat16" else rows_NKRH.view(np.float16))

    def write_rows(self, slot: int, start: int, rows_NKRH: Sequence[NDArray[Any]]) -> None:
        """Write rows of a slot; see `runtime.moved_rows.MovableCache`."""
        rows = np.stack(rows_NKRH).view(np.uint16)
        CacheRows(self._device, self._staging, self, slot, start, start + rows.shape[2]).write(rows)

    def free_graphs(self) -> None:
        """Free the recorded decode steps; the cache may be recorded for again."""
        _free_graphs(self._device, self.graphs)

    def layer(self, index: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return copies of one layer's keys and values, [B, K, T, H], as float32."""
        return self._read(self._addresses[2 * index]), self._read(self._addresses[2 * index + 1])

    def _slot(self, address: int, slot: int) -> Pieces:
        """Return where the rows of a slot lie in the buffer at an address: in one piece for each head."""
        assert 0 <= slot < self.batch, "a slot that the cache does not have"
        head_bytes = _ITEM_BYTES * math.prod(self.shape_BKTH[2:])
        return Pieces(address + slot * self.shape_BKTH[1] * head_bytes, head_bytes)

    def _row_bytes(self, num_rows: int) -> int:
        assert 0 <= num_rows <= self.capacity, "more rows than a slot has"
        return num_rows * self.shape_BKTH[3] * _ITEM_BYTES

    def _copy(self, target: Pieces, source: Pieces, piece_bytes: int) -> None:
        if piece_bytes:
            self._device.copy_pieces(target, source, piece_bytes, self.shape_BKTH[1], self._staging.stream)

    def _read(self, address: int) -> NDArray[np.float32]:
        if self.dtype == "float16":
            half = self._staging.download(address, self.shape_BKTH, np.float16)
            return np.asarray(half, np.float32)
        return from_bfloat16(self._staging.download(address, self.shape_BKTH, np.uint16))


def from_bfloat16(values: NDArray[Any]) -> NDArray[np.float32]:
    """Return numbers of 16 bits as float32, whose upper half a bfloat16 is; numpy has no such type."""
    return (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def rounded_to_bfloat16(values: FloatArray) -> FloatArray:
    """Return the nearest numbers that a bfloat16 holds, ties to even, as float32."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    return (bits + (0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(np.float32)


def to_bits(values: FloatArray, dtype: str) -> NDArray[np.uint16]:
    """Return numbers as the 16 bits that a cache of this type holds; a bfloat16 is cut off, not rounded."""
    if dtype == "bfloat16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(np.float16).view(np.uint16)


def _free(device: CudaDevice, addresses: list[int], graphs: dict[int, int], buffer: DeviceBuffer) -> None:
    _free_graphs(device, graphs)
    for address in addresses:
        device.free(address)
    buffer.close()


def _free_graphs(device: CudaDevice, graphs: dict[int, int]) -> None:
    while graphs:
        device.free_graph(graphs.popitem()[1])
