"""The host implementation of CUDA catches each fault that it is there to catch."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np
import pytest

from helpers.host_cuda import HostCudaError, HostDevice, Work
from helpers.host_kernels import host_code
from runtime.cuda import Pieces
from runtime.device_buffers import Staging
from runtime.errors import EngineError

ADD_ONE = host_code("helpers.host_step", "add_one", {"address": "*i64", "count": "i32"}, {})


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

    def kernel(self) -> int:
        """A kernel that adds one to each number at an address."""
        code = host_code("helpers.host_step", "add_one", {"address": "*i64", "count": "i32"}, {})
        return self.device.kernel(self.device.load_module(code), "add_one", 0)

    def add_one(self, address: int, *, is_dependent: bool = False, threads: int = 32, shared_bytes: int = 0) -> None:
        values = [ctypes.c_void_p(address), ctypes.c_int32(4), ctypes.c_void_p(None), ctypes.c_void_p(None)]
        self.device.launch_kernel(
            self.kernel(), (1, 1, 1), threads, shared_bytes, values, self.stream, is_dependent=is_dependent
        )

    def unloaded(self) -> None:
        code = host_code("helpers.host_step", "add_one", {}, {})
        module = self.device.load_module(code)
        kernel = self.device.kernel(module, "add_one", 0)
        self.device.unload_module(module)
        self.device.launch_kernel(kernel, (1, 1, 1), 32, 0, [ctypes.c_void_p(None)] * 2, self.stream)

    def unloaded_while_recorded(self) -> None:
        module = self.device.load_module(host_code("helpers.host_step", "add_one", {}, {}))
        self.device.begin_capture(self.stream)
        kernel = self.device.kernel(module, "add_one", 0)
        self.device.launch_kernel(kernel, (1, 1, 1), 32, 0, [ctypes.c_void_p(None)] * 2, self.stream)
        self.device.end_capture(self.stream)
        self.device.unload_module(module)

    def free_then(self, action: Callable[[], object]) -> None:
        self.device.free_graph(self.graph)
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
        self.device.free_graph(self.graph)
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
    "memory that a graph still uses": ("before the graphs that use it", lambda b: b.device.free(b.address)),
    "module that a graph still uses": ("before the graphs that launch", lambda b: b.unloaded_while_recorded()),
    "launch of a graph whose context has moved": ("other shapes", lambda b: b.launch_moved()),
    "kernel with memory that is none": ("no device", lambda b: b.add_one(b.pinned.ctypes.data)),
    "kernel with memory that was freed": ("was freed", lambda b: b.free_then(lambda: b.add_one(b.address))),
    "kernel that depends on a copy": ("no kernel", lambda b: b.add_one(b.address, is_dependent=True)),
    "kernel of half a warp": ("16 threads", lambda b: b.add_one(b.address, threads=16)),
    "more shared memory than was allowed": ("8 bytes", lambda b: b.add_one(b.address, shared_bytes=8)),
    "kernel of a module that is gone": ("unloaded", lambda b: b.unloaded()),
    "kernel of another name": ("no other", lambda b: b.device.kernel(b.device.load_module(ADD_ONE), "other", 0)),
    "module while recording": ("load_module while", lambda b: b.recording(lambda: b.device.load_module(ADD_ONE))),
    "module unloaded twice": ("unloaded twice", lambda b: b.device.unload_module(7)),
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


def test_kernels_run_in_order_once_they_are_waited_for_and_with_each_launch_of_a_graph() -> None:
    bench = Bench()
    device, numbers = bench.device, bench.device.view(bench.address, (4,), np.int64)
    device.fill(bench.address, 0, 64, bench.stream)
    bench.add_one(bench.address)
    bench.add_one(bench.address, is_dependent=True)
    assert numbers[0] != 2
    device.synchronize(bench.stream)
    assert numbers.tolist() == [2] * 4
    kernel, values = bench.kernel(), [ctypes.c_void_p(bench.address), ctypes.c_int32(4), *[ctypes.c_void_p(None)] * 2]
    device.begin_capture(bench.stream)
    device.launch_kernel(kernel, (1, 1, 1), 32, 0, values, bench.stream)
    graph = device.end_capture(bench.stream)
    assert numbers.tolist() == [2] * 4, "what is recorded does not run"
    for _ in range(3):
        device.launch(graph, bench.stream)
    device.synchronize(bench.stream)
    assert numbers.tolist() == [5] * 4


def test_a_kernel_for_another_gpu_is_refused() -> None:
    with pytest.raises(EngineError, match="another GPU"):
        HostDevice(compute_capability="9.0").load_module(ADD_ONE)


def test_kernels_of_triton_run_in_its_interpreter() -> None:
    pytest.importorskip("triton")
    device = HostDevice()
    stream = device.new_stream()
    staging = Staging(device, stream)
    table = np.arange(5 * 6, dtype=np.float16).reshape(5, 6)
    address, ids, hidden = device.alloc(table.nbytes), device.alloc(24), device.alloc(3 * 12)
    staging.upload(address, table)
    staging.upload(ids, np.array([4, 0, 2]))
    constants = {"K": 6, "KP": 8, "ASM": 0, "PDL": 0}
    types = {"ids": "*i64", "table": "*fp16", "hidden": "*fp16"}
    embed = device.load_module(host_code("helpers.step_kernels", "embed_rows", types, constants))
    types = {"counter": "*i32", "capacity": "i32", "scale": "fp32"}
    count = device.load_module(host_code("helpers.step_kernels", "count_steps", types, {"ASM": 0, "PDL": 0}))
    counter = device.alloc(12)
    device.fill(counter, 0, 12, stream)
    null = ctypes.c_void_p(None)
    device.begin_capture(stream)
    pointers = [ctypes.c_void_p(each) for each in (ids, address, hidden)]
    device.launch_kernel(device.kernel(embed, "embed_rows", 0), (3, 1, 1), 128, 0, [*pointers, null, null], stream)
    values = [ctypes.c_void_p(counter), ctypes.c_int32(512), ctypes.c_float(1.5), null, null]
    device.launch_kernel(device.kernel(count, "count_steps", 0), (1, 1, 1), 128, 0, values, stream, is_dependent=True)
    graph = device.end_capture(stream)
    for _ in range(2):
        device.launch(graph, stream)
    assert np.array_equal(staging.download(hidden, (3, 6), np.float16), table[[4, 0, 2]])
    assert staging.download(counter, (3,), np.int32).tolist() == [2, 512, 768]
