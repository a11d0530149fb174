"""What a `runtime.cuda.CudaDevice` promises, held against a GPU where there is one, and the host implementation."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from helpers.host_cuda import HostDevice
from runtime.cuda import CudaDevice, Pieces
from runtime.device_buffers import Block, DeviceBuffer, Staging
from runtime.errors import CapacityError, EngineError


@pytest.fixture(params=["host", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[CudaDevice]:
    if request.param == "host":
        host = HostDevice()
        yield host
        assert host.leaks() == []
        return
    try:
        cuda = CudaDevice()
    except EngineError as error:
        pytest.skip(str(error.message))
    yield cuda


@pytest.fixture
def stream(device: CudaDevice) -> Iterator[int]:
    stream = device.new_stream()
    yield stream
    device.synchronize(stream)
    device.free_stream(stream)


def pinned(device: CudaDevice, values: np.ndarray) -> np.ndarray:
    array = device.pinned(values.nbytes)
    array.view(values.dtype)[:] = values
    return array


def test_a_device_says_what_it_is(device: CudaDevice) -> None:
    major, minor = map(int, device.compute_capability.split("."))
    assert (5, 0) <= (major, minor) < (20, 0)
    assert float(device.driver_version) >= 12
    assert device.name
    free, total = device.memory_info()
    assert 0 < free <= total


def test_memory_goes_to_the_device_and_back(device: CudaDevice, stream: int) -> None:
    values = np.arange(1000, dtype=np.float32)
    source, target = pinned(device, values), device.pinned(values.nbytes)
    address = device.alloc(values.nbytes)
    assert address % 256 == source.ctypes.data % 256 == 0
    device.to_device(address, source, stream)
    device.fill(address, 0, 400, stream)
    device.to_host(target, address, stream)
    device.synchronize(stream)
    assert np.array_equal(target.view(np.float32), np.where(values < 100, 0, values))
    for array in (source, target):
        device.free_pinned(array)
    device.free(address)


def test_pieces_are_copied_and_nothing_between_them(device: CudaDevice, stream: int) -> None:
    values = np.arange(1000, dtype=np.int32)
    source, target = pinned(device, values), device.pinned(values.nbytes)
    address = device.alloc(values.nbytes)
    device.to_device(address, source, stream)
    # Three pieces of five numbers, from places 100, 120, 140 to 500, 530, 560, and on in the same stream to 0, 5, 10.
    device.copy_pieces(Pieces(address + 2000, 120), Pieces(address + 400, 80), 20, 3, stream)
    device.copy_pieces(Pieces(address, 20), Pieces(address + 2000, 120), 20, 3, stream)
    device.to_host(target, address, stream)
    device.synchronize(stream)
    for i in range(3):
        values[500 + 30 * i :][:5] = values[5 * i :][:5] = 100 + 20 * i + np.arange(5)
    assert np.array_equal(target.view(np.int32), values)
    for array in (source, target):
        device.free_pinned(array)
    device.free(address)


def test_a_graph_is_recorded_without_running_and_reads_what_is_there_when_launched(
    device: CudaDevice, stream: int
) -> None:
    source, target = pinned(device, np.full(64, 7, np.int64)), pinned(device, np.zeros(64, np.int64))
    address = device.alloc(source.nbytes)
    device.begin_capture(stream)
    device.to_device(address, source, stream)
    device.fill(address + 8, 0, 8, stream)
    device.to_host(target, address, stream)
    graph = device.end_capture(stream)
    device.synchronize(stream)
    assert not target.any(), "recording must not run anything"
    for value in (7, -5):
        source.view(np.int64)[:] = value
        device.launch(graph, stream)
        device.synchronize(stream)
        assert target.view(np.int64).tolist() == [value, 0] + [value] * 62
    device.free_graph(graph)
    device.free(address)
    for array in (source, target):
        device.free_pinned(array)


def test_too_much_memory_is_a_capacity_error_and_the_device_goes_on(device: CudaDevice, stream: int) -> None:
    total = device.memory_info()[1]
    with pytest.raises(CapacityError, match="the GPU is out of memory"):
        device.alloc(2 * total)
    address = device.alloc(256)
    device.fill(address, 1, 256, stream)
    device.synchronize(stream)
    device.free(address)


@pytest.mark.parametrize("staging_bytes", [64, 1000, 4096])
def test_staging_moves_arrays_of_any_size_in_pieces(device: CudaDevice, stream: int, staging_bytes: int) -> None:
    staging, buffer = Staging(device, stream, staging_bytes), DeviceBuffer(device)
    values = np.random.default_rng(0).normal(size=(3, 5, 50)).astype(np.float32)
    part = values[:, 1:4]  # not contiguous
    address = buffer.reserve(part.nbytes)
    staging.upload(address, part)
    assert np.array_equal(staging.download(address, part.shape, np.float32), part)
    buffer.close()
    staging.close()


def test_a_buffer_grows_and_never_shrinks(device: CudaDevice) -> None:
    buffer = DeviceBuffer(device)
    address = buffer.reserve(1000)
    assert buffer.reserve(10) == buffer.reserve(1000) == address
    with pytest.raises(CapacityError):
        buffer.reserve(2 * device.memory_info()[1])
    assert buffer.reserve(2000) % 256 == 0
    buffer.close()
    buffer.close()


def test_a_block_moves_its_tensors_together(device: CudaDevice, stream: int) -> None:
    there = Block(device, {"ids": ((4, 3), np.int64), "values": ((4, 3), np.float32)})
    assert all(address % 256 == 0 for address in there.addresses().values())
    assert there.addresses()["values"] - there.addresses()["ids"] == 256  # 96 bytes, rounded up
    there.array("ids", (2, 3))[:] = [[1, 2, 3], [4, 5, 6]]
    there.array("values", (2, 3))[:] = 0.5
    there.enqueue_upload(stream)
    device.synchronize(stream)
    there.array("ids", (4, 3))[:] = 0
    there.array("values", (4, 3))[:] = 0
    there.enqueue_download(stream)
    device.synchronize(stream)
    assert there.array("ids", (6,)).tolist() == [1, 2, 3, 4, 5, 6]
    assert there.array("values", (2, 3)).tolist() == [[0.5] * 3] * 2
    there.close()
