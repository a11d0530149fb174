"""The host implementation of CUDA catches each fault that it is there to catch."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from helpers.host_cuda import HostCudaError, HostDevice, Work
from runtime.cuda import Pieces


class Bench:
    """A device with a stream, 1024 bytes of each memory, and a graph that copies from one to the other."""

    def __init__(self) -> None:
        self.device = HostDevice()
        self.stream = self.device.new_stream()
        self.address = self.device.alloc(1024)
        self.pinned = self.device.pinned(1024)
        self.device.begin_capture(self.stream)
        self.device.to_device(self.address, self.pinned, self.stream)
        self.graph = self.device.end_capture(self.stream)

    def free_then(self, action: Callable[[], object]) -> None:
        self.device.free(self.address)
        action()

    def recording(self, action: Callable[[], object]) -> None:
        self.device.begin_capture(self.stream)
        action()

    def copy(self, to: int, to_step: int, origin: int, origin_step: int) -> None:
        """Copy four pieces of 16 bytes between offsets in the device's memory."""
        target, source = Pieces(self.address + to, to_step), Pieces(self.address + origin, origin_step)
        self.device.copy_pieces(target, source, 16, 4, self.stream)

    def enqueue_then_free(self) -> None:
        self.device.fill(self.address, 0, 8, self.stream)
        self.device.free(self.address)
        self.device.synchronize(self.stream)

    def launch_freed(self) -> None:
        self.device.free_graph(self.graph)
        self.device.launch(self.graph, self.stream)

    def launch_moved(self) -> None:
        self.device.begin_capture(self.stream)
        self.device.enqueue(self.stream, Work("run", lambda: None, (), holds=lambda: False))
        self.device.launch(self.device.end_capture(self.stream), self.stream)


FAULTS: dict[str, tuple[str, Callable[[Bench], object]]] = {
    "double free": ("freed twice", lambda b: b.free_then(lambda: b.device.free(b.address))),
    "free of nothing": ("never allocated", lambda b: b.device.free(b.address + 1)),
    "pinned memory freed as device memory": ("never allocated", lambda b: b.device.free(b.pinned.ctypes.data)),
    "copy past the end": ("1024 bytes at offset 8", lambda b: b.device.to_host(b.pinned, b.address + 8, b.stream)),
    "fill past the end": ("at offset 0 of 1024", lambda b: b.device.fill(b.address, 0, 1025, b.stream)),
    "pieces past the end": ("at offset 960 of 1024", lambda b: b.copy(960, 17, 0, 16)),
    "pieces from past the end": ("at offset 512 of 1024", lambda b: b.copy(0, 16, 512, 166)),
    "pieces closer than their size": ("16 bytes, 15 bytes apart", lambda b: b.copy(0, 16, 512, 15)),
    "pieces that overlap": ("overlap", lambda b: b.copy(0, 64, 8, 64)),
    "pieces in host memory": ("no device", lambda b: b.copy(0, 16, b.pinned.ctypes.data - b.address, 16)),
    "copy from unpinned memory": ("no pinned", lambda b: b.device.to_device(b.address, np.zeros(8), b.stream)),
    "unpinned memory while recording": (
        "no pinned",
        lambda b: b.recording(lambda: b.device.to_device(b.address, np.zeros(8), b.stream)),
    ),
    "copy of every other byte": ("not contiguous", lambda b: b.device.to_device(b.address, b.pinned[::2], b.stream)),
    "host address as device address": ("no device", lambda b: b.device.fill(b.pinned.ctypes.data, 0, 8, b.stream)),
    "use after free": ("after it was freed", lambda b: b.free_then(lambda: b.device.fill(b.address, 0, 8, b.stream))),
    "free before the work is done": ("memory that was freed", lambda b: b.enqueue_then_free()),
    "allocation while recording": ("alloc while", lambda b: b.recording(lambda: b.device.alloc(8))),
    "pinned allocation while recording": ("pinned while", lambda b: b.recording(lambda: b.device.pinned(8))),
    "waiting while recording": ("synchronize while", lambda b: b.recording(lambda: b.device.synchronize(b.stream))),
    "recording while recording": (
        "begin_capture while",
        lambda b: b.recording(lambda: b.device.begin_capture(b.stream)),
    ),
    "end of no recording": ("without begin_capture", lambda b: b.device.end_capture(b.stream)),
    "launch of a destroyed graph": ("destroyed", lambda b: b.launch_freed()),
    "launch of a graph whose memory is gone": (
        "memory that was freed",
        lambda b: b.free_then(lambda: b.device.launch(b.graph, b.stream)),
    ),
    "launch of a graph whose context has moved": ("other shapes", lambda b: b.launch_moved()),
    "unknown stream": ("destroyed", lambda b: b.device.synchronize(7)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught(fault: str) -> None:
    message, commit = FAULTS[fault]
    with pytest.raises(HostCudaError, match=message):
        commit(Bench())


def test_nothing_runs_before_it_is_waited_for() -> None:
    bench = Bench()
    device, stream = bench.device, bench.stream
    bench.pinned[:] = 1
    device.to_device(bench.address, bench.pinned, stream)
    bench.pinned[:] = 2  # too early: the copy has not run
    target = device.pinned(1024)
    target[:] = 3
    device.to_host(target, bench.address, stream)
    assert set(target.tolist()) == {0xCD}, "what is on its way holds neither old nor new values"
    device.synchronize(stream)
    assert set(target.tolist()) == {2}


def test_pieces_between_each_other_are_copied_once_they_are_waited_for() -> None:
    bench = Bench()
    device, memory = bench.device, bench.device.view(bench.address, (8, 4, 32), np.uint8)
    memory[:] = np.arange(8)[:, None, None]
    bench.copy(16, 64, 512, 32)  # what lies between the pieces of the target keeps its values
    assert np.array_equal(memory[:, 0, 0], np.arange(8))
    before = memory.reshape(-1).copy()
    device.synchronize(bench.stream)
    expected = before.copy()
    for i in range(4):
        expected[16 + 64 * i :][:16] = before[512 + 32 * i :][:16]
    assert np.array_equal(memory.reshape(-1), expected)
    assert not np.array_equal(before, expected)


def test_what_is_not_freed_is_listed() -> None:
    bench = Bench()
    assert sorted(bench.device.leaks()) == ["device", "graph", "pinned", "stream"]
    bench.device.free_graph(bench.graph)
    bench.device.free(bench.address)
    bench.device.free_pinned(bench.pinned)
    bench.device.free_stream(bench.stream)
    assert bench.device.leaks() == []


def test_fresh_memory_is_nan() -> None:
    device = HostDevice()
    assert np.isnan(device.view(device.alloc(64), (16,), np.float32)).all()
    assert np.isnan(device.view(device.alloc(64), (32,), np.float16)).all()
