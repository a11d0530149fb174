"""A `runtime.cuda.CudaDevice` in host memory that checks its user and runs nothing before it must.

Addresses are real addresses of separate allocations, so that numpy can read them. What is enqueued waits in its stream
until that is synchronised: a missing synchronisation shows as wrong data. Fresh memory holds NaN.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from helpers.host_kernels import HostKernel
from runtime.cuda import Pieces
from runtime.errors import CapacityError, EngineError

_ALIGNMENT = 256
_FRESH, _FREED, _STALE = 0xFF, 0xDD, 0xCD
_HANDLES = itertools.count(1000)
_DEVICE_OF_STREAM: weakref.WeakValueDictionary[int, HostDevice] = weakref.WeakValueDictionary()


class HostCudaError(AssertionError):
    """The user of the device broke a rule of CUDA."""


@dataclass(eq=False)
class Allocation:
    memory: np.ndarray
    num_bytes: int
    is_pinned: bool
    is_alive: bool = True

    @property
    def address(self) -> int:
        return int(self.memory.ctypes.data)


@dataclass
class Work:
    """Something enqueued, and the allocations it uses; `holds` says whether a graph of it may still be launched."""

    name: str
    run: Callable[[], None]
    uses: Sequence[Allocation]
    writes_host: np.ndarray | None = None
    holds: Callable[[], bool] = lambda: True
    is_kernel: bool = False
    module: int | None = None


@dataclass
class StreamState:
    queue: list[Work] = field(default_factory=list)
    recording: list[Work] | None = None


class HostDevice:
    def __init__(
        self, *, compute_capability: str = "8.9", total_bytes: int = 1 << 34, driver_version: str = "13.0"
    ) -> None:
        self.name = "host memory"
        self.compute_capability = compute_capability
        self.driver_version = driver_version
        self.total_bytes = total_bytes
        self.max_shared_bytes = 99 << 10 if compute_capability in ("8.6", "8.9", "12.0") else 163 << 10
        self.events: list[str] = []
        self._allocations: list[Allocation] = []
        self._streams: dict[int, StreamState] = {}
        self._graphs: dict[int, list[Work]] = {}
        self._modules: dict[int, HostKernel] = {}
        self._kernels: dict[int, tuple[int, int]] = {}

    # memory

    def memory_info(self) -> tuple[int, int]:
        used = sum(each.num_bytes for each in self._allocations if each.is_alive and not each.is_pinned)
        return self.total_bytes - used, self.total_bytes

    def alloc(self, num_bytes: int) -> int:
        self._refuse_while_recording("alloc")
        if num_bytes > self.memory_info()[0]:
            raise CapacityError(f"the GPU is out of memory: {num_bytes} bytes", remedy="--max-context")
        return self._allocate(num_bytes, is_pinned=False).address

    def free(self, address: int) -> None:
        self._release(address, is_pinned=False)

    def pinned(self, num_bytes: int) -> np.ndarray:
        self._refuse_while_recording("pinned")
        return self._allocate(num_bytes, is_pinned=True).memory

    def free_pinned(self, array: np.ndarray) -> None:
        self._release(array.ctypes.data, is_pinned=True)

    # streams

    def new_stream(self) -> int:
        stream = next(_HANDLES)
        self._streams[stream] = StreamState()
        _DEVICE_OF_STREAM[stream] = self
        return stream

    def free_stream(self, stream: int) -> None:
        if self._stream(stream).queue:
            raise HostCudaError("a stream was destroyed before its work was waited for")
        del self._streams[stream]

    def synchronize(self, stream: int) -> None:
        self._refuse_while_recording("synchronize")
        self.events.append("synchronize")
        state = self._stream(stream)
        queue, state.queue = state.queue, []
        for work in queue:
            self._check_alive(work)
            work.run()

    def to_device(self, address: int, array: np.ndarray, stream: int) -> None:
        target, source = self._range(address, array.nbytes), self._pinned_range(array)
        self.enqueue(stream, Work("to_device", lambda: _move(target[1], source[1]), (target[0], source[0])))

    def to_host(self, array: np.ndarray, address: int, stream: int) -> None:
        target, source = self._pinned_range(array), self._range(address, array.nbytes)
        work = Work("to_host", lambda: _move(target[1], source[1]), (target[0], source[0]), writes_host=target[1])
        self.enqueue(stream, work)

    def fill(self, address: int, byte: int, num_bytes: int, stream: int) -> None:
        allocation, view = self._range(address, num_bytes)
        self.enqueue(stream, Work("fill", lambda: view.fill(byte), (allocation,)))

    def copy_pieces(self, target: Pieces, source: Pieces, piece_bytes: int, num_pieces: int, stream: int) -> None:
        if min(target.step_bytes, source.step_bytes) < piece_bytes or piece_bytes < 1 or num_pieces < 1:
            raise HostCudaError(f"{num_pieces} pieces of {piece_bytes} bytes, {source.step_bytes} bytes apart")
        (to, written), (origin, read) = (
            self._range(each.address, (num_pieces - 1) * each.step_bytes + piece_bytes) for each in (target, source)
        )
        writes, reads = (
            [view[i * each.step_bytes :][:piece_bytes] for i in range(num_pieces)]
            for view, each in ((written, target), (read, source))
        )
        if any(np.shares_memory(write, each) for write in writes for each in reads):
            raise HostCudaError("a copy of pieces that overlap")

        def move() -> None:
            for write, each in zip(writes, reads, strict=True):
                _move(write, each)

        self.enqueue(stream, Work("copy_pieces", move, (to, origin)))

    def enqueue(self, stream: int, work: Work) -> None:
        state = self._stream(stream)
        self._check_alive(work)
        if state.recording is not None:
            state.recording.append(work)
        else:
            self._start(state, work)

    # graphs

    def begin_capture(self, stream: int) -> None:
        self._refuse_while_recording("begin_capture")
        self.events.append("begin_capture")
        self._stream(stream).recording = []

    def end_capture(self, stream: int) -> int:
        state = self._stream(stream)
        if state.recording is None:
            raise HostCudaError("end_capture without begin_capture")
        self.events.append("end_capture")
        graph = next(_HANDLES)
        self._graphs[graph], state.recording = state.recording, None
        return graph

    def launch(self, graph: int, stream: int) -> None:
        if graph not in self._graphs:
            raise HostCudaError("launch of a graph that was destroyed")
        self.events.append("launch")
        for work in self._graphs[graph]:
            self._check_alive(work)
            if not work.holds():
                raise HostCudaError(f"{work.name}: launch of a graph whose context has moved to other shapes")
            self._start(self._stream(stream), work)

    def free_graph(self, graph: int) -> None:
        if self._graphs.pop(graph, None) is None:
            raise HostCudaError("a graph was destroyed twice")

    # kernels

    def load_module(self, code: bytes) -> int:
        self._refuse_while_recording("load_module")
        kernel = HostKernel.of(code)
        if kernel.compute_capability != self.compute_capability:
            raise EngineError("the machine code is for another GPU", remedy="--compute-capability")
        module = next(_HANDLES)
        self._modules[module] = kernel
        return module

    def unload_module(self, module: int) -> None:
        if any(work.module == module for graph in self._graphs.values() for work in graph):
            raise HostCudaError("a module was unloaded before the graphs that launch its kernels")
        if self._modules.pop(module, None) is None:
            raise HostCudaError("a module was unloaded twice")

    def kernel(self, module: int, entry: str, shared_bytes: int) -> int:
        if shared_bytes > self.max_shared_bytes or self._modules[module].function != entry:
            raise HostCudaError(f"no {entry} of {shared_bytes} bytes of shared memory")
        kernel = next(_HANDLES)
        self._kernels[kernel] = module, shared_bytes
        return kernel

    def launch_kernel(
        self,
        kernel: int,
        grid: tuple[int, int, int],
        num_threads: int,
        shared_bytes: int,
        arguments: Sequence[Any],
        stream: int,
        *,
        is_dependent: bool = False,
    ) -> None:
        module, most_shared = self._kernels[kernel]
        if module not in self._modules:
            raise HostCudaError("launch of a kernel whose module was unloaded")
        if shared_bytes > most_shared or num_threads % 32 or min(grid) < 1:
            raise HostCudaError(f"a launch of {grid} blocks of {num_threads} threads, {shared_bytes} bytes")
        state = self._stream(stream)
        before = state.queue if state.recording is None else state.recording
        if is_dependent and not (before and before[-1].is_kernel):
            raise HostCudaError("a dependent launch behind something that is no kernel")
        function = self._modules[module]
        values = function.values(arguments)
        pointers = [value for kind, value in zip(function.types.values(), values, strict=True) if kind[0] == "*"]
        uses = [self.allocation_at(value) for value in pointers if value]
        work = Work(function.function, lambda: function.run(grid, values), uses, is_kernel=True, module=module)
        self.enqueue(stream, work)

    # for tests and for tests/helpers/host_tensorrt.py

    @property
    def is_recording(self) -> bool:
        return any(state.recording is not None for state in self._streams.values())

    def allocation_at(self, address: int) -> Allocation:
        """Return the living device memory that an address lies in."""
        return self._range(address, 0)[0]

    def view(self, address: int, shape: Sequence[int], dtype: Any) -> np.ndarray:
        """Return device memory as an array."""
        dtype = np.dtype(dtype)
        num_bytes = int(np.prod(shape)) * dtype.itemsize
        return self._range(address, num_bytes)[1].view(dtype).reshape(shape)

    def leaks(self) -> list[str]:
        """Say what was not freed."""
        kinds = [("pinned" if each.is_pinned else "device") for each in self._allocations if each.is_alive]
        rest = {"stream": self._streams, "graph": self._graphs, "module": self._modules}
        return [*kinds, *(name for name, handles in rest.items() for _ in handles)]

    def take_events(self) -> list[str]:
        events, self.events = self.events, []
        return events

    # inside

    def _allocate(self, num_bytes: int, *, is_pinned: bool) -> Allocation:
        if num_bytes < 1:
            raise HostCudaError(f"an allocation of {num_bytes} bytes")
        raw = np.full(num_bytes + _ALIGNMENT, _FRESH, np.uint8)
        start = -raw.ctypes.data % _ALIGNMENT
        allocation = Allocation(raw[start : start + num_bytes], num_bytes, is_pinned)
        self._allocations.append(allocation)
        return allocation

    def _release(self, address: int, *, is_pinned: bool) -> None:
        for each in self._allocations:
            if each.address == address and each.is_pinned == is_pinned:
                if not each.is_alive:
                    raise HostCudaError("memory was freed twice")
                if any(each is used for graph in self._graphs.values() for work in graph for used in work.uses):
                    raise HostCudaError("memory was freed before the graphs that use it")
                each.is_alive = False
                each.memory.fill(_FREED)
                return
        raise HostCudaError(f"{address:#x} was never allocated")

    def _range(self, address: int, num_bytes: int, *, is_pinned: bool = False) -> tuple[Allocation, np.ndarray]:
        for each in self._allocations:
            start = address - each.address
            if each.is_pinned == is_pinned and 0 <= start < each.num_bytes:
                if not each.is_alive:
                    raise HostCudaError("memory is used after it was freed")
                if start + num_bytes > each.num_bytes:
                    raise HostCudaError(f"{num_bytes} bytes at offset {start} of {each.num_bytes}")
                return each, each.memory[start : start + num_bytes]
        raise HostCudaError(f"{address:#x} is no {'pinned' if is_pinned else 'device'} memory")

    def _pinned_range(self, array: np.ndarray) -> tuple[Allocation, np.ndarray]:
        if not array.flags.c_contiguous:
            raise HostCudaError("a copy of an array that is not contiguous")
        return self._range(array.ctypes.data, array.nbytes, is_pinned=True)

    def _stream(self, stream: int) -> StreamState:
        if stream not in self._streams:
            raise HostCudaError("work on a stream that was destroyed")
        return self._streams[stream]

    def _start(self, state: StreamState, work: Work) -> None:
        if work.writes_host is not None:
            work.writes_host.fill(_STALE)
        self.events.append(work.name)
        state.queue.append(work)

    def _check_alive(self, work: Work) -> None:
        if not all(each.is_alive for each in work.uses):
            raise HostCudaError(f"{work.name} uses memory that was freed")

    def _refuse_while_recording(self, name: str) -> None:
        if self.is_recording:
            raise HostCudaError(f"{name} while a graph is recorded")


def device_of_stream(stream: int) -> HostDevice:
    with contextlib.suppress(KeyError):
        return _DEVICE_OF_STREAM[stream]
    raise HostCudaError(f"{stream} is no stream")


def _move(target: np.ndarray, source: np.ndarray) -> None:
    target[:] = source
