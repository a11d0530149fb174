"""The KV cache of the session of ONNX Runtime on CUDA, and the decode steps that are bound to its memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.contract import DECODER_DTYPES, FloatArray
from runtime.decode_step import StepBuffers
from runtime.device_cache import DeviceKVCache
from runtime.installation import from_extra
from runtime.ort_device import OpenedGraph

with from_extra("cuda"):
    import onnxruntime as ort

LOGITS, TOP_LOGITS, TOP_IDS = "logits", "top_logits", "top_ids"
UNCAPTURED = -1
"""The graph id of runs that are not recorded."""
_OUTPUT_DTYPES = {LOGITS: np.float32, TOP_LOGITS: np.float32, TOP_IDS: np.int64}
# Element types of a cache as ONNX numbers them (TensorProto.DataType): numpy has no bfloat16.
_ONNX_TYPES = {"float16": 10, "bfloat16": 16}


class CacheBuffers:
    """A cache's memory, and the steps that were bound to it.

    Attributes:
        cache: Keys and values.
        io: What all steps read and write.
        steps: The steps by their batch.
    """

    def __init__(self, cache: DeviceKVCache, io: StepBuffers) -> None:
        self.cache, self.io = cache, io
        self.steps: dict[int, Step] = {}

    def forget_steps(self) -> None:
        """Free what was recorded, and what else holds the decoder and its kernels; the rows stay."""
        self.steps.clear()
        self.cache.free_graphs()


class OrtDeviceCache:
    """A KV cache on the device; its buffers go back to the session when nobody holds it any more."""

    def __init__(self, buffers: CacheBuffers, give_back: Callable[[CacheBuffers], None]) -> None:
        self.buffers = buffers
        self.dtype = buffers.cache.dtype
        self.batch, self.capacity = buffers.cache.batch, buffers.cache.capacity
        weakref.finalize(self, give_back, buffers).atexit = False

    @property
    def num_bytes(self) -> int:
        """Bytes of all buffers."""
        return self.buffers.cache.num_bytes

    def layer(self, index: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return copies of one layer's keys and values, [B, K, T, H], as float32."""
        return self.buffers.cache.layer(index)

    def copy_rows(self, source: int, target: int, num_rows: int) -> None:
        """Copy the first rows of one slot to another."""
        self.buffers.cache.copy_rows(source, target, num_rows)

    def swap_rows(self, slot: int, other: int, num_rows: int) -> None:
        """Exchange the first rows of two slots."""
        self.buffers.cache.swap_rows(slot, other, num_rows)

    def move_rows(self, slot: int, source: int, target: int, num_rows: int) -> None:
        """Move rows of a slot down; see `runtime.sliding_window.SlidingCache`."""
        self.buffers.cache.move_rows(slot, source, target, num_rows)

    def read_keys(self, slot: int, start: int, num_rows: int) -> FloatArray:
        """Return keys of rows, float32 [layers, K, R, H]."""
        return self.buffers.cache.read_keys(slot, start, num_rows)

    def write_keys(self, slot: int, start: int, keys_LKRH: FloatArray) -> None:
        """Write keys of rows from `start` on, rounded to the cache's type."""
        self.buffers.cache.write_keys(slot, start, keys_LKRH)

    def read_rows(self, slot: int, start: int, stop: int) -> list[NDArray[Any]]:
        """Return copies of rows of a slot; see `runtime.moved_rows.MovableCache`."""
        return self.buffers.cache.read_rows(slot, start, stop)

    def write_rows(self, slot: int, start: int, rows_NKRH: Sequence[NDArray[Any]]) -> None:
        """Write rows of a slot; see `runtime.moved_rows.MovableCache`."""
        self.buffers.cache.write_rows(slot, start, rows_NKRH)


class Step:
    """One new token of each sequence from a slot on, in buffers that never move: what a CUDA graph replays.

    Args:
        decoder: The decoder, which must not be closed before this is dropped.
        buffers: Cache, inputs and outputs.
        batch: Sequences.
        graph_id: Of the CUDA graph that the provider records and replays, or `UNCAPTURED`.
        device: ONNX Runtime's name of the memory.
        slot: That of the first sequence.
    """

    def __init__(
        self,
        decoder: OpenedGraph,
        buffers: CacheBuffers,
        batch: int,
        graph_id: int,
        device: str,
        slot: int = 0,
    ) -> None:
        io, addresses = buffers.io, buffers.io.addresses
        self._decoder = decoder
        self._binding = decoder.session.io_binding()
        for name, shape in io.shapes(batch).items():
            self._binding.bind_input(name, device, 0, DECODER_DTYPES[name], shape, addresses[name])
        for name, shape in io.output_shapes(batch).items():
            self._binding.bind_output(name, device, 0, _OUTPUT_DTYPES[name], shape, addresses[name])
        bind_cache(self._binding, buffers.cache, device, slot, batch)
        self.graph_id = graph_id
        self._options = run_options(graph_id)

    def run(self) -> None:
        """Run on the inputs that are on the device."""
        self._decoder.session.run_with_iobinding(self._binding, self._options)


def bind_cache(binding: ort.IOBinding, cache: DeviceKVCache, device: str, slot: int, batch: int) -> None:
    """Bind past and present of slots slot … slot + batch - 1 to the same memory."""
    shape = [batch, *cache.shape_BKTH[1:]]
    element = _ONNX_TYPES[cache.dtype]
    pasts = set(cache.past_names)
    for name, address in cache.bindings(slot).items():
        bind = binding.bind_input if name in pasts else binding.bind_output
        bind(name, device, 0, element, shape, address)


def run_options(graph_id: int) -> ort.RunOptions:
    """Return the options of a run that is recorded as a CUDA graph, or of one that is not: `UNCAPTURED`."""
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(graph_id))
    return options
