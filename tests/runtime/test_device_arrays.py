"""Memory of visual embeddings on a device: splitting, joining, and when it is freed."""

from __future__ import annotations

import gc
import threading

import numpy as np
import pytest

from helpers.host_cuda import HostDevice
from runtime.contract import join_embeds, on_host, rows_around, split_embeds
from runtime.device_arrays import DeviceArray, DeviceEmbeds, EmbedsMemory
from runtime.device_buffers import InputBuffer, Staging
from runtime.errors import CapacityError, UsageError

LEVELS, HIDDEN = 3, 8


class Bench:
    """Memory on a host device, and embeddings in it whose values are known."""

    def __init__(self) -> None:
        self.device = HostDevice()
        self.staging = Staging(self.device, self.device.new_stream(), num_bytes=4096)
        self.memory = EmbedsMemory(self.device, self.staging)

    def embeds(self, *rows_of_parts: int, seed: int = 0) -> tuple[DeviceEmbeds, np.ndarray]:
        """Return embeddings as a vision tower writes them, and the same on the host."""
        made = self.memory.new(LEVELS, rows_of_parts, HIDDEN)
        values = np.random.default_rng(seed).normal(size=made.shape).astype(np.float32)
        self.staging.upload(self.memory.reserve(made), values)
        self.memory.fill(made)
        return made, values

    def rows(self, embeds: DeviceEmbeds, first: int, stop: int) -> np.ndarray:
        """Return what a graph reads of these rows."""
        address = self.memory.contiguous(embeds, first, stop)
        return self.device.view(address, (LEVELS, stop - first, HIDDEN), np.float32).copy()

    def close(self) -> list[str]:
        self.memory.close()
        self.staging.close()
        self.device.free_stream(self.staging.stream)
        gc.collect()
        return self.device.leaks()


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.mark.parametrize("parts", [(7,), (4, 4), (3, 5, 1, 6)])
def test_segments_are_split_and_joined_on_the_device(bench: Bench, parts: tuple[int, ...]) -> None:
    embeds, values = bench.embeds(*parts)
    assert (embeds.shape, embeds.nbytes, embeds.dtype) == (values.shape, values.nbytes, values.dtype)
    bench.device.take_events()
    for first in range(embeds.shape[1]):
        for stop in range(first + 1, embeds.shape[1] + 1):
            assert np.array_equal(bench.rows(embeds, first, stop), values[:, first:stop])
    begin = 0
    for part, num_rows in zip(split_embeds(embeds, len(parts)), parts, strict=True):
        assert isinstance(part, DeviceEmbeds)
        assert np.array_equal(bench.rows(part, 0, num_rows), values[:, begin : begin + num_rows])
        begin += num_rows
    assert "to_host" not in bench.device.take_events(), "all of that is done on the device"
    assert np.array_equal(on_host(embeds), values)


def test_joined_embeddings_of_several_calls_follow_each_other(bench: Bench) -> None:
    (one, first), (two, second) = bench.embeds(5, seed=1), bench.embeds(3, 3, seed=2)
    joined = join_embeds([one, two])
    assert isinstance(joined, DeviceEmbeds)
    expected = np.concatenate([first, second], axis=1)
    assert np.array_equal(bench.rows(joined, 2, 9), expected[:, 2:9])
    around, begin = rows_around(joined, 6, 8)
    assert (begin, around.shape[1]) == (5, 3), "whole segments, and those alone that hold the rows"
    assert np.array_equal(on_host(around), second[:, :3])
    with pytest.raises(AssertionError, match="on the host and on a device"):
        join_embeds([one, second])


def test_one_segment_is_read_in_place(bench: Bench) -> None:
    embeds, _ = bench.embeds(6)
    bench.device.take_events()
    assert bench.memory.contiguous(embeds, 0, 6) == embeds.parts[0].address
    assert bench.device.take_events() == []


def test_a_wrong_offset_of_the_second_segment_is_caught(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    embeds, values = bench.embeds(4, 4)
    at = DeviceArray.at
    second = embeds.parts[1]
    monkeypatch.setattr(DeviceArray, "at", lambda part, first: at(part, max(0, first - (part is second))))
    assert np.array_equal(bench.rows(embeds, 1, 4), values[:, 1:4])
    assert not np.array_equal(bench.rows(embeds, 5, 7), values[:, 5:7])


def test_memory_that_comes_back_is_freed_by_the_session_and_not_by_who_drops_it(bench: Bench) -> None:
    free = bench.device.memory_info()[0]
    held = [bench.embeds(6)[0]]
    size = free - bench.device.memory_info()[0]
    assert size == held[0].nbytes
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    assert bench.device.memory_info()[0] == free - size, "a step may be recorded at that time"
    bench.memory.collect()
    assert bench.device.memory_info()[0] == free


def test_memory_that_came_back_serves_embeddings_of_its_size(bench: Bench) -> None:
    address = bench.embeds(6)[0].parts[0].address
    again, _ = bench.embeds(6)
    assert again.parts[0].address == address
    free = bench.device.memory_info()[0]
    del again
    other, _ = bench.embeds(5)
    assert bench.device.memory_info()[0] == free + LEVELS * HIDDEN * 4, "what fits nothing was freed before"
    assert other.shape[1] == 5


def test_too_little_memory_leaves_nothing_behind(bench: Bench) -> None:
    free = bench.device.memory_info()[0]
    bench.device.total_bytes -= free - 5 * LEVELS * HIDDEN * 4
    with pytest.raises(CapacityError):
        bench.memory.new(LEVELS, [2, 2, 2], HIDDEN)
    assert bench.memory.new(LEVELS, [5], HIDDEN).shape[1] == 5


def test_everything_is_freed(bench: Bench) -> None:
    held, _ = bench.embeds(2, 3)
    dropped, _ = bench.embeds(4)
    del dropped
    assert bench.rows(held, 1, 4).shape[1] == 3
    assert bench.close() == ["device", "device"], "what somebody holds"
    with pytest.raises(UsageError, match="was closed"):
        held.numpy()
    del held
    gc.collect()
    assert bench.device.leaks() == []


def test_numpy_does_not_copy_it_unasked(bench: Bench) -> None:
    with pytest.raises(TypeError, match="device memory"):
        np.asarray(bench.embeds(2)[0])


def test_inputs_go_up_together_and_are_waited_for_where_pinned_memory_is_full(bench: Bench) -> None:
    inputs = InputBuffer(bench.device, bench.staging)
    arrays = {"few": np.arange(5), "many": np.arange(3000, dtype=np.float32), "bytes": np.arange(7, dtype=np.uint8)}
    for _ in range(2):
        bench.device.take_events()
        addresses = inputs.upload(arrays)
        for name, array in arrays.items():
            assert np.array_equal(bench.device.view(addresses[name], array.shape, array.dtype), array)
    # 12,047 bytes through 4096: twice full, and the end.
    assert bench.device.take_events().count("synchronize") == 3
    inputs.upload({"few": arrays["few"], "bytes": arrays["bytes"]})
    assert bench.device.take_events() == ["to_device", "to_device", "synchronize"]
    inputs.close()
