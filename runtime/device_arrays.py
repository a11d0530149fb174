"""Visual embeddings in device memory: from the vision tower into prefill without a copy on the host.

Nothing is enqueued here that the caller must wait for: each method that copies waits for the stream.

Shapes: D DeepStack levels, V visual rows.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Sequence
from typing import Any, ClassVar, NoReturn

import numpy as np
from numpy.typing import NDArray

from runtime.cuda import CudaDevice, Pieces
from runtime.device_buffers import DeviceBuffer, Staging
from runtime.errors import UsageError

_ITEM_BYTES = 4
Shape = tuple[int, int, int]


class Rows:
    """Where an array [1+D, V, hidden], float32, lies.

    Attributes:
        address: Its device address.
        shape: Its shape.
    """

    def __init__(self, address: int, shape: Shape) -> None:
        self.address, self.shape = address, shape
        self.row_bytes = shape[2] * _ITEM_BYTES

    @property
    def nbytes(self) -> int:
        """Bytes of device memory."""
        return self.shape[0] * self.shape[1] * self.row_bytes

    def at(self, first: int) -> Pieces:
        """Return where the rows from `first` on lie: a piece for each level."""
        return Pieces(self.address + first * self.row_bytes, self.shape[1] * self.row_bytes)


class DeviceArray(Rows):
    """An allocation of its own, which goes back to its memory with the last reference."""

    def __init__(self, memory: EmbedsMemory, address: int, shape: Shape) -> None:
        super().__init__(address, shape)
        self.memory = memory
        weakref.finalize(self, memory.take_back, address, self.nbytes).atexit = False


class DeviceEmbeds:
    """Visual embeddings [1+D, V, hidden], float32, of which each part's rows follow those of the one before.

    It has what callers ask of an array that they only pass on: `shape`, `ndim`, `dtype`, `nbytes`. `numpy` copies it to
    the host, which nothing does by itself.

    Args:
        parts: At least one; a segment each.
    """

    ndim = 3
    dtype: ClassVar[np.dtype[np.float32]] = np.dtype(np.float32)

    def __init__(self, parts: Sequence[DeviceArray]) -> None:
        self.parts = tuple(parts)
        levels, _, hidden = self.parts[0].shape
        assert all((part.shape[0], part.shape[2]) == (levels, hidden) for part in self.parts), "of different models"
        self.shape = (levels, sum(part.shape[1] for part in self.parts), hidden)

    @property
    def nbytes(self) -> int:
        """Bytes of device memory."""
        return sum(part.nbytes for part in self.parts)

    def around(self, first: int, stop: int) -> tuple[DeviceEmbeds, int]:
        """Return the parts that hold rows first … stop - 1, and the row that they begin with."""
        assert 0 <= first < stop <= self.shape[1], "visual rows that are not there"
        ends = list(itertools.accumulate(part.shape[1] for part in self.parts))
        begin = next(i for i, end in enumerate(ends) if first < end)
        end = next(i for i, end in enumerate(ends) if stop <= end) + 1
        return DeviceEmbeds(self.parts[begin:end]), ends[begin] - self.parts[begin].shape[1]

    def numpy(self) -> NDArray[np.float32]:
        """Return a copy on the host; a call of the session that they are of."""
        return np.concatenate([part.memory.download(part) for part in self.parts], axis=1)

    def __array__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse what numpy would do without asking."""
        raise TypeError("visual embeddings in device memory: numpy() copies them to the host")


class EmbedsMemory:
    """Gives and takes back the memory of visual embeddings.

    Python may drop the last reference in any thread and at any time, also while ONNX Runtime records a step, which
    frees of other threads would break (cudaStreamCaptureModeGlobal in its cuda_graph.cc). So what comes back is kept,
    and freed by `collect`, or used again for embeddings of the same size.

    Args:
        device: Where.
        staging: Reads embeddings back; copies run on its stream.
    """

    def __init__(self, device: CudaDevice, staging: Staging) -> None:
        self._device, self._staging = device, staging
        self._returned: list[tuple[int, int]] = []
        self._joined = DeviceBuffer(device)
        self._split = DeviceBuffer(device)
        self._is_closed = False
        self._lock = threading.RLock()  # Python may drop a reference, and so take memory back, while this thread has it

    def new(self, num_levels: int, rows_of_parts: Sequence[int], hidden: int) -> DeviceEmbeds:
        """Return embeddings of undefined contents, each part in memory of its own.

        Raises:
            CapacityError: The GPU is out of memory.
        """
        shapes = [(num_levels, num_rows, hidden) for num_rows in rows_of_parts]
        return DeviceEmbeds([DeviceArray(self, self._allocate(Rows(0, shape).nbytes), shape) for shape in shapes])

    def reserve(self, embeds: DeviceEmbeds) -> int:
        """Return where a graph may write embeddings for `fill`: in place if they have one part."""
        return embeds.parts[0].address if len(embeds.parts) == 1 else self._split.reserve(embeds.nbytes)

    def fill(self, embeds: DeviceEmbeds) -> None:
        """Give each part the rows that were written where `reserve` said."""
        if len(embeds.parts) == 1:
            return
        source, first = Rows(self._split.address, embeds.shape), 0
        for part in embeds.parts:
            self._copy(part.at(0), source.at(first), part, part.shape[1])
            first += part.shape[1]
        self._device.synchronize(self._staging.stream)

    def contiguous(self, embeds: DeviceEmbeds, first: int, stop: int) -> int:
        """Return where rows first … stop - 1 lie as one array, until the next call; in place if they are one part."""
        around, begin = embeds.around(first, stop)
        if around.shape[1] == stop - first and len(around.parts) == 1:
            return around.parts[0].address
        shape = (embeds.shape[0], stop - first, embeds.shape[2])
        target = Rows(self._joined.reserve(Rows(0, shape).nbytes), shape)
        for part in around.parts:
            low, high = max(first, begin), min(stop, begin + part.shape[1])
            self._copy(target.at(low - first), part.at(low - begin), part, high - low)
            begin += part.shape[1]
        self._device.synchronize(self._staging.stream)
        return target.address

    def download(self, part: DeviceArray) -> NDArray[np.float32]:
        """Return a copy on the host.

        Raises:
            UsageError: The session was closed.
        """
        if self._is_closed:
            raise UsageError("the model of these visual embeddings was closed", remedy="encode the images again")
        return np.asarray(self._staging.download(part.address, part.shape, np.float32), np.float32)

    def take_back(self, address: int, num_bytes: int) -> None:
        """Note that nobody uses this memory any more; from any thread."""
        with self._lock:
            if not self._is_closed:
                self._returned.append((address, num_bytes))
                return
        self._device.free(address)

    def collect(self) -> None:
        """Free what was given back."""
        with self._lock:
            returned, self._returned = self._returned, []
        for address, _ in returned:
            self._device.free(address)

    def close(self) -> None:
        """Free everything but embeddings that somebody holds, which then free themselves."""
        with self._lock:
            self._is_closed = True
        self.collect()
        self._joined.close()
        self._split.close()

    def _allocate(self, num_bytes: int) -> int:
        with self._lock:
            for index, (address, returned_bytes) in enumerate(self._returned):
                if returned_bytes == num_bytes:
                    del self._returned[index]
                    return address
        self.collect()
        return self._device.alloc(num_bytes)

    def _copy(self, target: Pieces, source: Pieces, part: Rows, num_rows: int) -> None:
        self._device.copy_pieces(target, source, num_rows * part.row_bytes, part.shape[0], self._staging.stream)
