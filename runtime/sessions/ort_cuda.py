"""Run an engine with ONNX Runtime's CUDA provider: weights, KV cache and logits stay on the device.

A decode step of one token a sequence, of the sequences from slot 0 on, reads and writes fixed buffers, so the provider
captures it once for each batch size as a CUDA graph and replays it; a step then costs one launch. All other calls run
uncaptured. A graph is of the thread that captured it, so another one that calls captures anew. Where the engine has a
decode plan for the GPU, own kernels run such steps instead, from any slot on (`runtime.decode_plan_session`).

An image stays on the device: its pixels go up as grey levels where the engine normalises them, through pinned memory,
and the vision tower writes its embeddings where prefill reads them (`runtime.device_arrays`).

The memory of caches, embeddings and steps is ours, by `runtime.cuda` and not from ONNX Runtime: its arena grows by
powers of two, so it could take up to twice what a cache needs, and it copies neither a part of a buffer nor a new
buffer's zeros without the host. The package cuda-bindings brings that into one context with the provider: both use the
primary one.

ONNX Runtime has a stream of its own; neither waits for the other. Two rules order them: a run waits for its stream
before it returns (CUDAExecutionProvider::OnRunEnd and CUDAGraphManager::Replay, as long as the run option
`disable_synchronize_execution_providers` is not set), and what is enqueued on our stream is waited for before a run
begins or a call returns.

How graphs are opened is in `runtime.ort_device`, what a cache holds in `runtime.ort_cache`.

Shapes: see runtime/session.py.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from runtime.contract import (
    VISION_OUTPUTS,
    DecoderInputs,
    FloatArray,
    LevelInputs,
    VisionInputs,
    VisualEmbeds,
)
from runtime.decode_plan_rehearsal import rehearse
from runtime.decode_plan_session import Opened, open_with_plan
from runtime.decode_step import StepBuffers, padded_batch
from runtime.device_arrays import DeviceEmbeds, EmbedsMemory
from runtime.device_buffers import InputBuffer, Staging
from runtime.device_cache import DeviceKVCache
from runtime.engine_paths import check_paths
from runtime.installation import from_extra
from runtime.manifest import Manifest
from runtime.ort_cache import (
    LOGITS,
    TOP_IDS,
    TOP_LOGITS,
    UNCAPTURED,
    CacheBuffers,
    OrtDeviceCache,
    Step,
    bind_cache,
    run_options,
)
from runtime.ort_device import CUDA, Device, OpenedGraph, check_provider, guarded, open_graph
from runtime.session import VISION, KVCache, SessionOptions, TopLogits, top_logits
from runtime.vision_inputs import takes_grey_levels

with from_extra("cuda"):
    import onnxruntime as ort

# A capacity is rounded up to this, so that the buffers of one answer, and their captured step, serve the next.
_CAPACITY_STEP = 512
_T = TypeVar("_T")


class OrtCudaSession:
    """The two graphs of an engine in ONNX Runtime, on one device.

    Everything but caches, which free themselves, is freed with the last reference, or by `close`.

    Attributes:
        chunk_sizes: Tokens that a chunk of a prompt is filled up to. The first call with another number of tokens takes
            60 to 90 ms longer than later ones (H200, 2B in float16: 6 to 8 ms for 20 to 512 tokens). Beyond those, what
            is filled up is an eighth at most. The last one ends prompts (`runtime.scheduling.plan`).
        decode_recorded: Whether decode steps run as a CUDA graph; none before the first. With the option set, ONNX
            Runtime repeats a run until it has recorded it, or fails.
    """

    chunk_sizes = (
        *(16, 32, 48, 64, 96, 128, 192, 256, 384, 512),
        *(576, 656, 736, 832, 944, 1072, 1216, 1376, 1568, 1792, 2048, 2304),
    )

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        options: SessionOptions | None = None,
        *,
        device: Device = CUDA,
    ) -> None:
        options = options or SessionOptions()
        self._config = manifest.model
        self._takes_levels = takes_grey_levels(manifest.capabilities)
        self._cache_dtype = str(manifest.capabilities["cache_dtype"])
        self._device = device
        self._records_every_batch = options.every_batch
        self.decode_recorded: bool | None = None
        check_provider(folder, device)
        self._memory = device.memory()
        self._idle: dict[tuple[int, ...], list[CacheBuffers]] = {}
        self._buffers: weakref.WeakSet[CacheBuffers] = weakref.WeakSet()
        self._graph_ids = itertools.count(1)
        self._num_calls = 0
        with ExitStack() as stack:
            self._stream = self._memory.new_stream()
            stack.callback(self._memory.free_stream, self._stream)
            self._staging = self._guard(partial(Staging, self._memory, self._stream))
            stack.callback(self._staging.close)
            self._vision = OpenedGraph(None)
            if VISION in options.parts:
                self._vision = open_graph(folder / "vision.onnx", device, device.options, options.threads)
            stack.callback(self._vision.close)
            decoder_options = {**device.options, **device.decoder_options}
            open_decoder = partial(open_graph, folder / "decoder.onnx", device, decoder_options, options.threads)
            opened: Opened = OpenedGraph(None), None, "another engine decodes"
            if options.parts != {VISION}:
                opened = open_with_plan(
                    folder, manifest, options, device, self._memory, self._staging, open_decoder, stack
                )
            self._decoder, self._own, self._plan_problem = opened
            self._inputs = InputBuffer(self._memory, self._staging)
            stack.callback(self._inputs.close)
            self._embeds = EmbedsMemory(self._memory, self._staging)
            stack.callback(self._embeds.close)
            # First what was recorded, also for caches that somebody holds, then the graphs, then what these read.
            stack.callback(self._idle.clear)
            stack.callback(_forget_steps, self._buffers)
            self.close = weakref.finalize(self, stack.pop_all().close)
            self.close.atexit = False  # the driver frees what a process leaves

    @property
    def decode_kernels(self) -> str:
        """Whose kernels run decode steps: `own`, or `onnxruntime`."""
        return "onnxruntime" if self.decode_plan_problem else "own"

    @property
    def decode_plan_problem(self) -> str | None:
        """Why the engine's own kernels do not run decode steps; None if they do."""
        return self._plan_problem if self._own is None else self._own.problem

    @property
    def free_bytes(self) -> int:
        """Bytes that a new cache of another size may take, less what runs will take for their activations."""
        self._embeds.collect()
        idle = sum(buffers.cache.num_bytes for each in self._idle.values() for buffers in each)
        return self._memory.memory_info()[0] + idle

    def vision(self, inputs: VisionInputs) -> DeviceEmbeds:
        """Run the vision tower; see `runtime.session.Session.vision`. The embeddings stay on the device."""
        return self._guard(partial(self._run_vision, inputs))

    def _run_vision(self, inputs: VisionInputs) -> DeviceEmbeds:
        assert isinstance(inputs, LevelInputs) == self._takes_levels, "pixels as `Preparation.for_engine` leaves them"
        num_segments, num_patches, _ = inputs.pixel_values.shape
        rows = [num_patches // self._config.vision.patches_per_token] * num_segments
        embeds = self._embeds.new(self._config.num_visual_levels, rows, self._config.text.hidden_size)
        binding = self._vision.session.io_binding()
        self._bind_uploaded(binding, inputs.arrays())
        (name,), address = VISION_OUTPUTS, self._embeds.reserve(embeds)
        binding.bind_output(name, self._device.name, 0, np.float32, embeds.shape, address)
        self._vision.session.run_with_iobinding(binding)
        self._embeds.fill(embeds)
        return embeds

    def _bind_uploaded(self, binding: ort.IOBinding, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Bind inputs to copies on the device; they hold until the next call."""
        addresses = self._inputs.upload(arrays)
        for name, array in arrays.items():
            binding.bind_input(name, self._device.name, 0, array.dtype.type, array.shape, addresses[name])

    def new_cache(self, capacity: int, batch: int = 1) -> OrtDeviceCache:
        """Return a cache of at least that capacity.

        Buffers of that size which lie idle are used again, as they are: rows beyond a sequence's length are never read.
        A new size frees all that lie idle, so that they never add up.

        Raises:
            CapacityError: The GPU is out of memory.
        """
        self._embeds.collect()
        text = self._config.text
        rounded = -(-capacity // _CAPACITY_STEP) * _CAPACITY_STEP
        shape = (batch, text.num_kv_heads, rounded, text.head_dim)
        idle = self._idle.setdefault(shape, [])
        if idle:
            buffers = idle.pop()
        else:
            self._free_idle()
            buffers = self._guard(partial(self._new_buffers, shape))
        return OrtDeviceCache(buffers, idle.append)

    def _new_buffers(self, shape_BKTH: tuple[int, int, int, int]) -> CacheBuffers:
        num_top = next(output.shape[-1] for output in self._decoder.session.get_outputs() if output.name == TOP_IDS)
        num_layers = self._config.text.num_layers
        cache = DeviceKVCache(self._memory, self._staging, num_layers, shape_BKTH, self._cache_dtype)
        most = max(cache.batch, (self._own and self._own.padded(cache.batch)) or 0)
        try:
            buffers = CacheBuffers(cache, StepBuffers(self._memory, self._staging, self._config, most, num_top))
        except BaseException:  # Ctrl-C too
            cache.close()
            raise
        self._buffers.add(buffers)
        return buffers

    def _free_idle(self) -> None:
        for idle in self._idle.values():
            while idle:
                for step in idle.pop().steps.values():
                    self._decoder.session.release_captured_graph(step.graph_id)

    def decode_batch(self, num_sequences: int, num_slots: int) -> int:
        """Return the next batch size that is recorded; see `runtime.session.Session.decode_batch`.

        Own kernels fill a batch up by themselves. Their session never asks for more: the slots behind those that decode
        need not be there, since these begin anywhere.
        """
        if self.decodes_anywhere(num_sequences):
            return num_sequences
        return self._recorded_batch(num_sequences, num_slots)

    def decodes_anywhere(self, num_sequences: int) -> bool:
        """Return whether own kernels step so many sequences, which may then begin at any slot."""
        return self._own is not None and self._own.has_batch(num_sequences)

    def rehearse_decode(self, cache: KVCache, num_rows: Sequence[int]) -> None:
        """Compare own kernels with ONNX Runtime; see `runtime.session.Session.rehearse_decode`."""
        assert isinstance(cache, OrtDeviceCache)
        self._decoder.check_open()
        if self._own is not None:
            decode = partial(self.decode_top, cache=cache)
            rehearse(self._own, cache.buffers.cache, self._memory, self._staging, self._config, num_rows, decode)

    def _recorded_batch(self, num_sequences: int, num_slots: int) -> int:
        is_padded = self._device.records and not self._records_every_batch
        return padded_batch(num_sequences, num_slots) if is_padded else num_sequences

    def prefill(self, inputs: DecoderInputs, cache: KVCache, slot: int = 0) -> FloatArray:
        """Run the decoder on a chunk, filled up to one of `chunk_sizes`; see `runtime.session.Session.prefill`."""
        batch, num_new = inputs.input_ids.shape
        size = next((each for each in self.chunk_sizes if each >= num_new), num_new)
        if batch == 1 and int(inputs.past_lengths[0]) + size <= cache.capacity:
            inputs = inputs.padded(size)
        return self.decode(inputs, cache, slot)

    def decode(self, inputs: DecoderInputs, cache: KVCache, slot: int = 0) -> FloatArray:
        """Run the decoder and copy all logits to the host; see `runtime.session.Session.decode`."""
        buffers = self._checked(inputs, cache, slot)
        if self._has_stepped(buffers, inputs, slot):
            return buffers.io.logits(len(inputs.input_ids))
        runs = self._runs(inputs, buffers.cache, slot, (LOGITS,))
        return np.concatenate([np.asarray(outputs[LOGITS].numpy(), np.float32) for outputs in runs])

    def decode_top(self, inputs: DecoderInputs, cache: KVCache, slot: int = 0) -> list[list[TopLogits]]:
        """Run the decoder and copy the largest logits alone; see `runtime.session.TopLogitsSession.decode_top`."""
        buffers = self._checked(inputs, cache, slot)
        if self._has_stepped(buffers, inputs, slot):
            return self._top_of_step(buffers.io, len(inputs.input_ids))
        runs = self._runs(inputs, buffers.cache, slot, (LOGITS, TOP_LOGITS, TOP_IDS))
        return [row for outputs in runs for row in self._top_of(outputs)]

    def _top_of_step(self, io: StepBuffers, batch: int) -> list[list[TopLogits]]:
        io.enqueue_download()
        self._memory.synchronize(self._stream)
        call = self._num_calls

        def fetch(b: int, i: int) -> FloatArray:
            assert call == self._num_calls, "the logits of an earlier call are gone"
            return io.logits_of(b)

        return top_logits(*io.tops(batch), self._config.text.vocab_size, fetch)

    def _top_of(self, outputs: Mapping[str, ort.OrtValue]) -> list[list[TopLogits]]:
        def fetch(b: int, i: int) -> FloatArray:
            return np.asarray(outputs[LOGITS].numpy()[b, i], np.float32)

        values = np.asarray(outputs[TOP_LOGITS].numpy(), np.float32)
        return top_logits(outputs[TOP_IDS].numpy(), values, self._config.text.vocab_size, fetch)

    def _checked(self, inputs: DecoderInputs, cache: KVCache, slot: int) -> CacheBuffers:
        assert isinstance(cache, OrtDeviceCache)
        self._decoder.check_open()  # own kernels are gone as well
        assert slot + len(inputs.input_ids) <= cache.batch, "slots that the cache does not have"
        assert inputs.num_cache_rows <= cache.capacity, "past_lengths + S exceeds the cache"
        self._num_calls += 1
        return cache.buffers

    def _has_stepped(self, buffers: CacheBuffers, inputs: DecoderInputs, slot: int) -> bool:
        """Run a call in the buffers of steps, if it is a step that own kernels run or a graph repeats."""
        if self._own is not None and self._own.takes(inputs):
            reference = partial(self._run_reference, buffers, inputs, slot)
            self._guard(partial(self._own.run, buffers.cache, buffers.io, inputs, slot, reference))
            self.decode_recorded = self._own.recorded
            return True
        is_step = self._is_step(inputs, buffers.cache, slot)
        if is_step:
            self._guard(partial(self._run_step, buffers, inputs))
        return is_step

    def _run_reference(self, buffers: CacheBuffers, inputs: DecoderInputs, slot: int) -> None:
        """Run a step in ONNX Runtime, uncaptured, from any slot on."""
        step = Step(self._decoder, buffers, len(inputs.input_ids), UNCAPTURED, self._device.name, slot)
        buffers.io.write(inputs)
        buffers.io.enqueue_upload()
        self._memory.synchronize(self._stream)
        step.run()

    def _is_step(self, inputs: DecoderInputs, cache: DeviceKVCache, slot: int) -> bool:
        """Return whether a call is one that a graph repeats."""
        (batch, num_new), num_asked = inputs.input_ids.shape, inputs.logits_positions.shape[1]
        is_text = num_new == 1 == num_asked and not (inputs.visual_rows >= 0).any()
        return is_text and slot == 0 and batch == self._recorded_batch(batch, cache.batch)

    def _run_step(self, buffers: CacheBuffers, inputs: DecoderInputs) -> None:
        batch = len(inputs.input_ids)
        if batch not in buffers.steps:
            buffers.steps[batch] = Step(self._decoder, buffers, batch, next(self._graph_ids), self._device.name)
        buffers.io.write(inputs)
        buffers.io.enqueue_upload()
        self._memory.synchronize(self._stream)
        buffers.steps[batch].run()
        self.decode_recorded = self._device.records

    def _runs(
        self, inputs: DecoderInputs, cache: DeviceKVCache, slot: int, names: tuple[str, ...]
    ) -> list[Mapping[str, ort.OrtValue]]:
        """Run the decoder uncaptured: at once, or sequence by sequence where each has several new tokens.

        Returns:
            Outputs on the device, of all sequences or of each.
        """
        batch, num_new = inputs.input_ids.shape
        if batch == 1 or num_new == 1:
            return [self._guard(partial(self._run_once, cache, slot, inputs, names))]
        return [self._guard(partial(self._run_once, cache, slot + row, inputs.row(row), names)) for row in range(batch)]

    def _run_once(
        self, cache: DeviceKVCache, slot: int, inputs: DecoderInputs, names: tuple[str, ...]
    ) -> Mapping[str, ort.OrtValue]:
        binding = self._decoder.session.io_binding()
        # With its own embeddings alone, so that a chunk does not upload or join those of the whole prompt.
        inputs = inputs.with_used_rows()
        self._bind_uploaded(binding, inputs.host_arrays())
        self._bind_embeds(binding, inputs.visual_embeds)
        for name in names:
            binding.bind_output(name, self._device.name)
        bind_cache(binding, cache, self._device.name, slot, len(inputs.input_ids))
        self._decoder.session.run_with_iobinding(binding, run_options(UNCAPTURED))
        return dict(zip(names, binding.get_outputs(), strict=False))

    def _bind_embeds(self, binding: ort.IOBinding, embeds: VisualEmbeds) -> None:
        """Bind visual embeddings that are on the device: those of one segment in place, of several joined there."""
        if isinstance(embeds, DeviceEmbeds):
            self._embeds.collect()
            address = self._embeds.contiguous(embeds, 0, embeds.shape[1])
            binding.bind_input("visual_embeds", self._device.name, 0, np.float32, embeds.shape, address)

    def _guard(self, work: Callable[[], _T]) -> _T:
        return guarded(self._device, work)


def _forget_steps(buffers: Iterable[CacheBuffers]) -> None:
    for each in buffers:
        each.forget_steps()


def open_session(folder: Path, manifest: Manifest, options: SessionOptions) -> OrtCudaSession:
    """Open an engine folder; see `runtime.session.open_session`.

    Raises:
        EngineError: ONNX Runtime has no CUDA here, or refuses a graph.
        CapacityError: The GPU is out of memory.
    """
    check_paths(folder, manifest)
    device = CUDA if options.cuda_graphs else replace(CUDA, decoder_options={})
    if options.sdpa_kernel is not None:
        device = replace(device, options={**device.options, "sdpa_kernel": options.sdpa_kernel})
    return OrtCudaSession(folder, manifest, options, device=device)
