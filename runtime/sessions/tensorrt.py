"""Run an engine of TensorRT or TensorRT-RTX plans; the KV cache lives on the device and is updated in place.

A decode step of text, of the sequences from slot 0 on, is recorded once per cache and batch size as a CUDA graph
(inputs to the device, decoder, largest logits to the host) and launched from then on. Everything else is enqueued call
by call.

Shapes: see runtime/session.py.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.contract import (
    DECODER_DTYPES,
    VISION_DTYPES,
    DecoderInputs,
    FloatArray,
    IntArray,
    VisionInputs,
    past_names,
    present_names,
)
from runtime.cuda import CudaDevice
from runtime.decode_step import StepBuffers, padded_batch
from runtime.device_arrays import DeviceEmbeds, EmbedsMemory
from runtime.device_buffers import DeviceBuffer, Staging, aligned
from runtime.device_cache import DeviceKVCache
from runtime.errors import CapacityError, EngineError, Qwen3VLError, UsageError
from runtime.manifest import Manifest
from runtime.memory import cache_bytes
from runtime.profiles import Profile, Shape, choose, largest_bytes, read_profiles
from runtime.session import KVCache, SessionOptions, TopLogits, top_logits
from runtime.tensorrt_plan import Library, Plan, share_memory

# Python shows warnings on stderr if the program sets up no logging of its own.
_LOGGER = logging.getLogger(__name__)
# Types of the inputs and outputs, as TensorRT names them.
_TYPES = {np.float32: "FLOAT", np.int64: "INT64"}
VISION_TENSORS = {name: _TYPES[dtype] for name, dtype in VISION_DTYPES.items()} | {"visual_embeds": "FLOAT"}
DECODER_TENSORS = {
    **{name: _TYPES[dtype] for name, dtype in DECODER_DTYPES.items()},
    **{"logits": "FLOAT", "top_logits": "FLOAT", "top_ids": "INT64"},
}
CACHE_TYPES = {"float16": "HALF", "bfloat16": "BF16"}
_ITEM_BYTES = {"FLOAT": 4, "INT64": 8}
_FLOAT_BYTES = 4


class TensorRtSession:
    """The two plans of an engine on one GPU and one stream; every call returns when its work is done.

    Everything but caches, which free themselves, is freed with the last reference, or by `close`.

    Args:
        folder: The engine.
        manifest: Its manifest.
        device: The GPU.
        cuda_graphs: Record decode steps.

    Attributes:
        decode_recorded: Whether decode steps run as a CUDA graph; none before there was an opportunity.
        max_segments: Most segments of one call of `vision`.

    Raises:
        EngineError: The engine is not for this library or this GPU, or is damaged.
        CapacityError: The GPU is out of memory.
    """

    def __init__(self, folder: Path, manifest: Manifest, device: CudaDevice, *, cuda_graphs: bool = True) -> None:
        self.decode_recorded: bool | None = None if cuda_graphs else False
        self._records = cuda_graphs
        self._device = device
        self._config = manifest.model
        capabilities = manifest.capabilities
        self._cache_dtype = str(capabilities["cache_dtype"])
        self._capacity = int(capabilities["capacity"])
        self._max_batch = int(capabilities["max_batch"])
        self._num_top = int(capabilities["top_k"])
        self._num_calls = 0
        text = self._config.text
        names = past_names(text.num_layers) + present_names(text.num_layers)
        caches = dict.fromkeys(names, CACHE_TYPES[self._cache_dtype])
        library = Library(manifest, device)
        with ExitStack() as stack:
            self._stream = device.new_stream()
            stack.callback(device.free_stream, self._stream)
            self._staging = Staging(device, self._stream)
            stack.callback(self._staging.close)
            self._embeds = EmbedsMemory(device, self._staging)
            stack.callback(self._embeds.close)
            self._buffers: dict[str, DeviceBuffer] = {}
            stack.callback(_close_all, self._buffers)
            plans: dict[str, Plan] = {}
            for graph, tensors in (("vision", VISION_TENSORS), ("decoder", DECODER_TENSORS | caches)):
                name = f"{graph}.plan"
                profiles = read_profiles(capabilities, graph)
                plans[graph] = library.open_plan(folder / name, manifest.files[name].num_bytes, tensors, profiles)
                stack.callback(plans[graph].close)
            self._vision, self._decoder = plans["vision"], plans["decoder"]
            self._check_in_place(folder / "decoder.plan")
            self.max_segments = min(profile.max["pixel_values"][0] for profile in self._vision.profiles)
            # What a decode step is recorded with never moves: made once, for the largest batch.
            self._io = StepBuffers(device, self._staging, self._config, self._max_batch, self._num_top)
            stack.callback(self._io.close)
            if capabilities.get("weight_streaming"):
                # All weights of the decoder are read for each token, those of the vision tower for each image.
                # Such a plan of TensorRT-RTX takes no workspace, and then it may not be able to record.
                share_memory((self._decoder, self._vision), device, self._later_bytes(manifest), self._max_batch)
            else:
                # One for all, since runs follow each other on one stream. TensorRT-RTX records with no other.
                num_bytes = max(plan.workspace_bytes for plan in plans.values())
                workspace = self._buffer("workspace", num_bytes)
                for plan in plans.values():
                    plan.use_workspace(workspace, num_bytes)
            # What was recorded goes first, also for caches that somebody holds.
            self._caches: weakref.WeakSet[DeviceKVCache] = weakref.WeakSet()
            stack.callback(_free_graphs, self._caches)
            self.close = weakref.finalize(self, stack.pop_all().close)
            self.close.atexit = False  # the driver frees what a process leaves

    @property
    def free_bytes(self) -> int:
        """Bytes that new caches may take, less what larger prompts than before will take for inputs and logits."""
        self._embeds.collect()
        return self._device.memory_info()[0]

    def vision(self, inputs: VisionInputs) -> DeviceEmbeds:
        """Run the vision tower; see `runtime.session.Session.vision`. The embeddings stay on the device.

        Raises:
            CapacityError: The image has more patches than the engine was built for.
        """
        arrays = inputs.arrays()
        shapes = _shapes_of(arrays)
        profile = choose(self._vision.profiles, shapes)
        num_segments, num_patches, _ = inputs.pixel_values.shape
        rows = [num_patches // self._config.vision.patches_per_token] * num_segments
        embeds = self._embeds.new(self._config.num_visual_levels, rows, self._config.text.hidden_size)
        self._run(self._vision, profile, arrays, {}, shapes, {"visual_embeds": self._embeds.reserve(embeds)})
        self._embeds.fill(embeds)
        self._device.synchronize(self._stream)
        return embeds

    def new_cache(self, capacity: int, batch: int = 1) -> DeviceKVCache:
        """Allocate a cache of zeros; its capacity is that of the engine, which is at least the one asked for.

        Raises:
            CapacityError: The engine was built for less, or the GPU is out of memory.
        """
        if capacity > self._capacity or batch > self._max_batch:
            raise CapacityError(
                f"this engine was built for {self._capacity} tokens and {self._max_batch} sequences, "
                f"asked for {capacity} and {batch}",
                remedy="build the engine again with a larger --max-context or --max-batch: qwen3vl-export ...",
            )
        self._embeds.collect()
        text = self._config.text
        shape = (batch, text.num_kv_heads, self._capacity, text.head_dim)
        cache = DeviceKVCache(self._device, self._staging, text.num_layers, shape, self._cache_dtype)
        self._caches.add(cache)
        return cache

    def decode_batch(self, num_sequences: int, num_slots: int) -> int:
        """Return the next batch size that is recorded; see `runtime.session.Session.decode_batch`."""
        return num_sequences if self.decode_recorded is False else padded_batch(num_sequences, num_slots)

    def prefill(self, inputs: DecoderInputs, cache: KVCache, slot: int = 0) -> FloatArray:
        """Run the decoder; see `runtime.session.Session.prefill`."""
        return self.decode(inputs, cache, slot)

    def decode(self, inputs: DecoderInputs, cache: KVCache, slot: int = 0) -> FloatArray:
        """Run the decoder; see `runtime.session.Session.decode`."""
        addresses, _, _ = self._decode(inputs, cache, slot)
        shape = (inputs.logits_positions.shape[1], self._config.text.vocab_size)
        return np.stack([self._download(address, shape) for address in addresses])

    def decode_top(self, inputs: DecoderInputs, cache: KVCache, slot: int = 0) -> list[list[TopLogits]]:
        """Run the decoder; see `runtime.session.TopLogitsSession.decode_top`."""
        addresses, ids_BLk, values_BLk = self._decode(inputs, cache, slot)
        call, size = self._num_calls, self._config.text.vocab_size

        def fetch(b: int, i: int) -> FloatArray:
            assert call == self._num_calls, "the logits of an earlier call are gone"
            return self._download(addresses[b] + i * size * _FLOAT_BYTES, (size,))

        return top_logits(ids_BLk, values_BLk, size, fetch)

    def _download(self, address: int, shape: Shape) -> FloatArray:
        return np.asarray(self._staging.download(address, shape, np.float32), np.float32)

    def _decode(self, inputs: DecoderInputs, cache: KVCache, slot: int) -> tuple[list[int], IntArray, FloatArray]:
        """Run the decoder: the device address of each sequence's logits, and the largest of them, [B, L, k]."""
        assert isinstance(cache, DeviceKVCache)
        batch, num_new = inputs.input_ids.shape
        assert slot + batch <= cache.batch, "slots that the cache does not have"
        assert inputs.num_cache_rows <= cache.capacity, "past_lengths + S exceeds the cache"
        assert batch == 1 or num_new == 1 or not inputs.past_lengths.any(), "a chunk with a past is one sequence"
        self._num_calls += 1
        if num_new == 1 == inputs.logits_positions.shape[1] and (inputs.visual_rows < 0).all():
            return self._step(inputs, cache, slot)
        # Sequence by sequence: one fills the GPU, and the lengths of several would not fit one shape. That the prefill
        # profile takes a batch only keeps the plan small (engines/tensorrt/profiles.py).
        stride = aligned(inputs.logits_positions.shape[1] * self._config.text.vocab_size * _FLOAT_BYTES)
        logits = self._buffer("logits", batch * stride)
        addresses = [logits + b * stride for b in range(batch)]
        tops = [self._chunk(inputs.row(b), address, cache, slot + b) for b, address in enumerate(addresses)]
        return addresses, np.concatenate([ids for ids, _ in tops]), np.concatenate([values for _, values in tops])

    def _chunk(
        self, inputs: DecoderInputs, logits: int, cache: DeviceKVCache, slot: int
    ) -> tuple[IntArray, FloatArray]:
        """Run new tokens of one sequence; the logits go to the address `logits`."""
        inputs = inputs.with_used_rows()  # so that a chunk uploads, or joins, its own embeddings alone
        arrays, embeds = inputs.host_arrays(), inputs.visual_embeds
        shapes = _shapes_of(arrays) | dict.fromkeys(cache.past_names, (1, *cache.shape_BKTH[1:]))
        shapes["visual_embeds"] = embeds.shape
        profile = choose(self._decoder.profiles, shapes)
        top = (*inputs.logits_positions.shape, self._num_top)
        outputs = {"top_ids": top, "top_logits": top}
        bound = cache.bindings(slot) | {"logits": logits}
        if isinstance(embeds, DeviceEmbeds):
            self._embeds.collect()
            bound["visual_embeds"] = self._embeds.contiguous(embeds, 0, embeds.shape[1])
        addresses = self._run(self._decoder, profile, arrays, outputs, shapes, bound)
        ids = np.asarray(self._staging.download(addresses["top_ids"], top, np.int64), np.int64)
        return ids, self._download(addresses["top_logits"], top)

    def _run(
        self,
        plan: Plan,
        profile: Profile,
        arrays: Mapping[str, NDArray[Any]],
        outputs: Mapping[str, Shape],
        shapes: Mapping[str, Shape],
        bound: Mapping[str, int],
    ) -> dict[str, int]:
        """Upload the inputs and enqueue a run; return the addresses of all tensors, `bound` among them."""
        addresses = dict(bound)
        for name, array in arrays.items():
            addresses[name] = self._buffer(name, array.nbytes)
            self._staging.upload(addresses[name], array)
        for name, shape in outputs.items():
            addresses[name] = self._buffer(name, math.prod(shape) * (8 if name == "top_ids" else _FLOAT_BYTES))
        plan.enqueue(profile, shapes, addresses, self._stream)
        return addresses

    def _step(self, inputs: DecoderInputs, cache: DeviceKVCache, slot: int) -> tuple[list[int], IntArray, FloatArray]:
        """Run a decode step of text, as a CUDA graph where there is or can be one; returns what `_decode` does."""
        self._io.write(inputs)
        batch = len(inputs.input_ids)
        shapes = self._io.shapes(batch) | dict.fromkeys(cache.past_names, (batch, *cache.shape_BKTH[1:]))
        profile = choose(self._decoder.profiles, shapes)
        addresses = self._io.addresses | cache.bindings(slot)
        is_recorded = slot == 0 and batch == self.decode_batch(batch, cache.batch)
        # TensorRT sets up lazily what a new shape needs, which must not happen while a graph is recorded.
        is_set_up = is_recorded and batch not in cache.graphs and self._decoder.has_run(profile, shapes)
        if is_set_up and self._records and self._can_record(profile, shapes):
            cache.graphs[batch] = self._capture(profile, shapes, addresses)
        if is_recorded and batch in cache.graphs:
            self._device.launch(cache.graphs[batch], self._stream)
        else:
            self._enqueue_step(profile, shapes, addresses)
        self._device.synchronize(self._stream)
        return [self._io.logits_address(b) for b in range(batch)], *self._io.tops(batch)

    def _can_record(self, profile: Profile, shapes: Mapping[str, Shape]) -> bool:
        is_possible = self._decoder.can_be_captured(profile, shapes, self._stream)
        if not is_possible and self.decode_recorded is None:
            _LOGGER.warning("note: this library cannot record the decode step as a CUDA graph; tokens take longer")
        self.decode_recorded = is_possible
        return is_possible

    def _capture(self, profile: Profile, shapes: Mapping[str, Shape], addresses: Mapping[str, int]) -> int:
        try:
            self._device.begin_capture(self._stream)
            self._enqueue_step(profile, shapes, addresses)
            return self._device.end_capture(self._stream)
        except BaseException as error:  # Ctrl-C too, which may come anywhere
            # The stream must leave its recording, whatever that says of it.
            with suppress(Qwen3VLError):
                self._device.free_graph(self._device.end_capture(self._stream))
            if isinstance(error, EngineError):
                raise EngineError(
                    f"{error.message}, while the decode step was recorded as a CUDA graph",
                    remedy="open the engine with cuda_graphs=False (qwen3vl bench --no-cuda-graphs), and report it",
                ) from error
            raise

    def _enqueue_step(self, profile: Profile, shapes: Mapping[str, Shape], addresses: Mapping[str, int]) -> None:
        self._io.enqueue_upload()
        self._decoder.enqueue(profile, shapes, addresses, self._stream)
        self._io.enqueue_download()

    def _later_bytes(self, manifest: Manifest) -> int:
        """Return the device memory of what is not allocated yet but for contexts: largest cache, inputs and outputs."""
        cache = self._max_batch * cache_bytes(self._config, manifest.capabilities, self._capacity)
        inputs = sum(
            largest_bytes(plan.profiles, name, _ITEM_BYTES[kind])
            for plan, tensors in ((self._vision, VISION_TENSORS), (self._decoder, DECODER_TENSORS))
            for name, kind in tensors.items()
        )
        most_logits = max(profile.max["logits_positions"][1] for profile in self._decoder.profiles)
        logits = self._max_batch * most_logits * self._config.text.vocab_size * _FLOAT_BYTES
        return cache + inputs + logits

    def _buffer(self, name: str, num_bytes: int) -> int:
        return self._buffers.setdefault(name, DeviceBuffer(self._device)).reserve(num_bytes)

    def _check_in_place(self, path: Path) -> None:
        """Raise unless the plan updates the cache in place, since past and present are bound to one address."""
        num_layers = self._config.text.num_layers
        for past, present in zip(past_names(num_layers), present_names(num_layers), strict=True):
            if not self._decoder.is_in_place(present, past):
                raise EngineError(
                    f"{path}: {present} is not written into the memory of {past}",
                    remedy="build the engine again, with a library that updates the cache in place: qwen3vl-export ...",
                )


def open_session(folder: Path, manifest: Manifest, options: SessionOptions) -> TensorRtSession:
    """Open an engine folder on the GPU; see `runtime.session.open_session`.

    Raises:
        UsageError: Threads, which are of no use to an engine on a GPU.
    """
    if options.threads is not None:
        raise UsageError(f"threads = {options.threads}: this engine runs on the GPU", remedy="leave threads out")
    return TensorRtSession(folder, manifest, CudaDevice(), cuda_graphs=options.cuda_graphs)


def _free_graphs(caches: Iterable[DeviceKVCache]) -> None:
    for cache in caches:
        cache.free_graphs()


def _close_all(buffers: Mapping[str, DeviceBuffer]) -> None:
    for buffer in buffers.values():
        buffer.close()


def _shapes_of(arrays: Mapping[str, NDArray[Any]]) -> dict[str, Shape]:
    return {name: array.shape for name, array in arrays.items()}
