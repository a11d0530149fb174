"""Device memory that grows, and pinned host memory on the way to it and back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import DTypeLike, NDArray

from runtime.cuda import CudaDevice

# TensorRT asks for it of every tensor's address.
_ALIGNMENT = 256
# Pinned memory is taken from the whole machine, so large arrays pass through a small buffer piece by piece.
_STAGING_BYTES = 8 << 20
# One piece is copied by the host while the one before is on the bus; smaller ones would cost more calls.
_PIECE_BYTES = 1 << 20

Shape = tuple[int, ...]


def aligned(num_bytes: int) -> int:
    """Round up, so that another tensor may lie after so many bytes."""
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


class DeviceBuffer:
    """Device memory that is replaced by a larger one when more is asked for; its contents are then lost."""

    def __init__(self, device: CudaDevice) -> None:
        self._device = device
        self._num_bytes = 0
        self.address = 0

    def reserve(self, num_bytes: int) -> int:
        """Return an address with room for so many bytes; nothing enqueued may use the one before any more.

        Raises:
            CapacityError: The device has not so much left; the buffer is then empty.
        """
        if num_bytes > self._num_bytes:
            self.close()
            self.address = self._device.alloc(num_bytes)
            self._num_bytes = num_bytes
        return self.address

    def close(self) -> None:
        """Free the memory."""
        if self._num_bytes:
            self._device.free(self.address)
        self._num_bytes = self.address = 0


class Staging:
    """Copies between device memory and ordinary arrays of any size; each returns when it is done.

    Args:
        device: Where.
        stream: The copies wait for what is enqueued on it.
        num_bytes: Size of the pinned memory.
    """

    def __init__(self, device: CudaDevice, stream: int, num_bytes: int = _STAGING_BYTES) -> None:
        self._device = device
        self.stream = stream
        self._pinned = device.pinned(num_bytes)

    def upload(self, address: int, array: NDArray[np.generic]) -> None:
        """Copy an array to device memory."""
        self.upload_all([(address, array)])

    def upload_all(self, arrays: Iterable[tuple[int, NDArray[np.generic]]]) -> None:
        """Copy arrays to device memory, each to its address.

        A piece is on its way while the next is written into pinned memory; it is waited for only where that is full,
        and at the end.
        """
        filled = 0
        for address, array in arrays:
            source = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            start = 0
            while start < source.nbytes:
                if filled == self._pinned.nbytes:
                    self._device.synchronize(self.stream)
                    filled = 0
                num_bytes = min(source.nbytes - start, self._pinned.nbytes - filled, _PIECE_BYTES)
                piece = self._pinned[filled : filled + num_bytes]
                piece[:] = source[start : start + num_bytes]
                self._device.to_device(address + start, piece, self.stream)
                filled, start = filled + num_bytes, start + num_bytes
        self._device.synchronize(self.stream)

    def download(self, address: int, shape: Shape, dtype: DTypeLike) -> NDArray[np.generic]:
        """Return a copy of device memory, once all that is enqueued has run."""
        result: NDArray[np.generic] = np.empty(shape, dtype)
        target = result.reshape(-1).view(np.uint8)
        for start, stop in self._pieces(target.nbytes):
            piece = self._pinned[: stop - start]
            self._device.to_host(piece, address + start, self.stream)
            self._device.synchronize(self.stream)
            target[start:stop] = piece
        return result

    def close(self) -> None:
        """Free the pinned memory."""
        self._device.free_pinned(self._pinned)

    def _pieces(self, num_bytes: int) -> list[tuple[int, int]]:
        step = self._pinned.nbytes
        return [(start, min(start + step, num_bytes)) for start in range(0, num_bytes, step)]


class InputBuffer:
    """Device memory for the inputs of one call at a time, side by side.

    Args:
        device: Where.
        staging: Copies them.
    """

    def __init__(self, device: CudaDevice, staging: Staging) -> None:
        self._staging, self._buffer = staging, DeviceBuffer(device)

    def upload(self, arrays: Mapping[str, NDArray[np.generic]]) -> dict[str, int]:
        """Copy arrays to the device and return their addresses, which hold until the next call.

        Raises:
            CapacityError: The device is out of memory.
        """
        offsets: dict[str, int] = {}
        num_bytes = 0
        for name, array in arrays.items():
            offsets[name] = num_bytes
            num_bytes += aligned(array.nbytes)
        start = self._buffer.reserve(num_bytes)
        addresses = {name: start + offset for name, offset in offsets.items()}
        self._staging.upload_all((addresses[name], array) for name, array in arrays.items())
        return addresses

    def close(self) -> None:
        """Free the memory."""
        self._buffer.close()


class Block:
    """Small tensors side by side, at the same offsets in pinned and in device memory: one copy moves all of them.

    Args:
        device: Where.
        tensors: Largest shape and dtype of each tensor, by name.
    """

    def __init__(self, device: CudaDevice, tensors: Mapping[str, tuple[Shape, DTypeLike]]) -> None:
        self._device = device
        self._dtypes = {name: np.dtype(dtype) for name, (_, dtype) in tensors.items()}
        self._offsets: dict[str, int] = {}
        num_bytes = 0
        for name, (shape, _) in tensors.items():
            self._offsets[name] = num_bytes
            size = math.prod(shape) * self._dtypes[name].itemsize
            num_bytes += aligned(size)
        self._address = device.alloc(num_bytes)
        try:
            self._pinned = device.pinned(num_bytes)
        except BaseException:  # Ctrl-C too
            device.free(self._address)
            raise

    def array(self, name: str, shape: Shape) -> NDArray[np.generic]:
        """Return a tensor's pinned memory as an array of this shape, which lies at the start of its place."""
        start, dtype = self._offsets[name], self._dtypes[name]
        return self._pinned[start : start + math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)

    def addresses(self) -> dict[str, int]:
        """Return the device address of every tensor."""
        return {name: self._address + offset for name, offset in self._offsets.items()}

    def enqueue_upload(self, stream: int) -> None:
        """Enqueue the copy to the device."""
        self._device.to_device(self._address, self._pinned, stream)

    def enqueue_fill(self, byte: int, stream: int) -> None:
        """Enqueue the setting of each byte on the device."""
        self._device.fill(self._address, byte, self._pinned.nbytes, stream)

    def enqueue_download(self, stream: int) -> None:
        """Enqueue the copy from the device."""
        self._device.to_host(self._pinned, self._address, stream)

    def close(self) -> None:
        """Free both memories."""
        self._device.free(self._address)
        self._device.free_pinned(self._pinned)
