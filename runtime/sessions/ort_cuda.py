"""Run an engine with ONNX Runtime's CUDA provider: weights, KV cache and logits stay on the device.

A decode step of one token a sequence reads and writes fixed buffers, so the provider captures it once as a CUDA graph
and replays it; a step then costs one launch. All other calls run uncaptured.

What differs between devices is in `Device`, and nothing else here asks for one, so tests run the same code on the CPU.

Shapes: see runtime/session.py.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.contract import VISION_OUTPUTS, DecoderInputs, FloatArray, VisionInputs, past_names, present_names
from runtime.device_cache import from_bfloat16
from runtime.engine_paths import check_paths
from runtime.errors import CapacityError, EngineError
from runtime.installation import from_extra, how_to_install
from runtime.manifest import Manifest
from runtime.session import KVCache, SessionOptions, TopLogits, top_logits

with from_extra("cuda"):
    import onnxruntime as ort

LOGITS, TOP_LOGITS, TOP_IDS = "logits", "top_logits", "top_ids"
# Element types of a cache as ONNX numbers them (TensorProto.DataType): numpy has no bfloat16.
_ONNX_TYPES = {"float16": 10, "bfloat16": 16}
# A capacity is rounded up to this, so that the buffers of one answer, and their captured step, serve the next.
_CAPACITY_STEP = 512
_UNCAPTURED = "-1"


@dataclass(frozen=True)
class Device:
    """Where the graphs run.

    Attributes:
        provider: ONNX Runtime's name of the execution provider.
        name: Name of the memory, for OrtValue and IOBinding.
        options: Options of the provider, for both graphs.
        decoder_options: Further ones for the decoder.
    """

    provider: str
    name: str
    options: Mapping[str, str] = field(default_factory=dict)
    decoder_options: Mapping[str, str] = field(default_factory=dict)


# Without the strict mode SkipSimplifiedLayerNormalization sums squares of float16 in float16
# (contrib_ops/cuda/bert/skip_layer_norm_impl.cu).
CUDA = Device("CUDAExecutionProvider", "cuda", {"enable_skip_layer_norm_strict_mode": "1"}, {"enable_cuda_graph": "1"})


class CacheBuffers:
    """Keys and values of all layers on the device, and the step that was bound to them."""

    def __init__(self, num_layers: int, shape_BKTH: tuple[int, int, int, int], dtype: str, device: str) -> None:
        self.shape_BKTH, self.dtype, self.device = shape_BKTH, dtype, device
        # bfloat16 is stored as float16, whose zeros and size it shares; bindings say what it is. On the CPU a value
        # keeps the array's own memory, so each has an array.
        self.values = [
            [ort.OrtValue.ortvalue_from_numpy(np.zeros(shape_BKTH, np.float16), device) for _ in ("key", "value")]
            for _ in range(num_layers)
        ]
        self.step: _Step | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of all of them."""
        return 2 * len(self.values) * int(np.prod(self.shape_BKTH)) * np.dtype(np.float16).itemsize

    def bind(self, binding: ort.IOBinding, row: int | None = None) -> None:
        """Bind past and present to the same memory: of all sequences, or of one, whose rows lie together."""
        shape = list(self.shape_BKTH)
        offset = 0
        if row is not None:
            shape[0] = 1
            offset = row * int(np.prod(shape)) * np.dtype(np.float16).itemsize
        element = _ONNX_TYPES[self.dtype]
        num_layers = len(self.values)
        values = itertools.chain.from_iterable(self.values)
        for past, present, value in zip(past_names(num_layers), present_names(num_layers), values, strict=True):
            place = (self.device, 0, element, shape, value.data_ptr() + offset)
            binding.bind_input(past, *place)
            binding.bind_output(present, *place)

    def layer(self, index: int) -> tuple[FloatArray, FloatArray]:
        """Return copies of one layer's keys and values as float32."""
        key, value = (value.numpy() for value in self.values[index])
        if self.dtype == "float16":
            return key.astype(np.float32), value.astype(np.float32)
        return from_bfloat16(key), from_bfloat16(value)


class OrtDeviceCache:
    """A KV cache on the device; its buffers go back to the session when nobody holds it any more."""

    def __init__(self, buffers: CacheBuffers, give_back: Callable[[CacheBuffers], None]) -> None:
        self.buffers = buffers
        self.batch, _, self.capacity, _ = buffers.shape_BKTH
        weakref.finalize(self, give_back, buffers).atexit = False

    @property
    def num_bytes(self) -> int:
        """Bytes of all buffers."""
        return self.buffers.num_bytes

    def layer(self, index: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return copies of one layer's keys and values, [B, K, T, H], as float32."""
        return self.buffers.layer(index)


class _Step:
    """One new token a sequence, in buffers whose addresses never change: what a CUDA graph replays."""

    def __init__(
        self, session: ort.InferenceSession, buffers: CacheBuffers, inputs: DecoderInputs, graph_id: int
    ) -> None:
        self._inputs = {
            name: ort.OrtValue.ortvalue_from_numpy(array.copy(), buffers.device)
            for name, array in inputs.arrays().items()
        }
        known = {output.name: output for output in session.get_outputs()}
        rows = inputs.logits_positions.shape
        self.outputs = {
            name: ort.OrtValue.ortvalue_from_shape_and_type(
                [*rows, known[name].shape[-1]], _numpy_type(known[name].type), buffers.device
            )
            for name in (LOGITS, TOP_LOGITS, TOP_IDS)
        }
        self._session = session
        self._binding = session.io_binding()
        for name, value in self._inputs.items():
            self._binding.bind_ortvalue_input(name, value)
        for name, value in self.outputs.items():
            self._binding.bind_ortvalue_output(name, value)
        buffers.bind(self._binding)
        self.graph_id = graph_id
        self._options = _run_options(str(graph_id))

    def run(self, inputs: DecoderInputs) -> None:
        """Copy the inputs to the device and run."""
        for name, array in inputs.arrays().items():
            # Nothing of the embeddings is read, and a step's logits are those of its one token.
            if name not in ("visual_embeds", "logits_positions"):
                self._inputs[name].update_inplace(array)
        self._session.run_with_iobinding(self._binding, self._options)


class OrtCudaSession:
    """The two graphs of an engine in ONNX Runtime, on one device.

    Attributes:
        decode_recorded: Whether decode steps run as a CUDA graph; none before the first. With the option set, ONNX
            Runtime repeats a run until it has recorded it, or fails.
    """

    def __init__(self, folder: Path, manifest: Manifest, threads: int | None = None, *, device: Device = CUDA) -> None:
        self._config = manifest.model
        self._cache_dtype = str(manifest.capabilities["cache_dtype"])
        self._device = device
        self.decode_recorded: bool | None = None
        self._vision = _open(folder / "vision.onnx", device, device.options, threads)
        self._decoder = _open(folder / "decoder.onnx", device, {**device.options, **device.decoder_options}, threads)
        self._idle: dict[tuple[int, ...], list[CacheBuffers]] = {}
        self._graph_ids = itertools.count(1)

    def vision(self, inputs: VisionInputs) -> FloatArray:
        """Run the vision tower; see `runtime.session.Session.vision`."""
        (embeds,) = self._guard(partial(self._vision.run, VISION_OUTPUTS, inputs.arrays()))
        return np.asarray(embeds, np.float32)

    def new_cache(self, capacity: int, batch: int = 1) -> OrtDeviceCache:
        """Return a cache of at least that capacity.

        Buffers of that size which lie idle are used again, as they are: rows beyond a sequence's length are never read.
        A new size frees all that lie idle, so that they never add up.
        """
        text = self._config.text
        rounded = -(-capacity // _CAPACITY_STEP) * _CAPACITY_STEP
        shape = (batch, text.num_kv_heads, rounded, text.head_dim)
        idle = self._idle.setdefault(shape, [])
        if idle:
            buffers = idle.pop()
        else:
            self._free_idle()
            buffers = self._guard(partial(CacheBuffers, text.num_layers, shape, self._cache_dtype, self._device.name))
        return OrtDeviceCache(buffers, idle.append)

    def _free_idle(self) -> None:
        for idle in self._idle.values():
            while idle:
                step = idle.pop().step
                if step is not None:
                    self._decoder.release_captured_graph(step.graph_id)

    def decode(self, inputs: DecoderInputs, cache: KVCache) -> FloatArray:
        """Run the decoder and copy all logits to the host; see `runtime.session.Session.decode`."""
        runs = self._runs(inputs, cache, (LOGITS,))
        return np.concatenate([np.asarray(outputs[LOGITS].numpy(), np.float32) for outputs in runs])

    def decode_top(self, inputs: DecoderInputs, cache: KVCache) -> list[list[TopLogits]]:
        """Run the decoder and copy the largest logits alone; see `runtime.session.TopLogitsSession.decode_top`."""
        runs = self._runs(inputs, cache, (LOGITS, TOP_LOGITS, TOP_IDS))
        return [row for outputs in runs for row in self._top_of(outputs)]

    def _top_of(self, outputs: Mapping[str, ort.OrtValue]) -> list[list[TopLogits]]:
        def fetch(b: int, i: int) -> FloatArray:
            return np.asarray(outputs[LOGITS].numpy()[b, i], np.float32)

        values = np.asarray(outputs[TOP_LOGITS].numpy(), np.float32)
        return top_logits(outputs[TOP_IDS].numpy(), values, self._config.text.vocab_size, fetch)

    def _runs(self, inputs: DecoderInputs, cache: KVCache, names: tuple[str, ...]) -> list[Mapping[str, ort.OrtValue]]:
        """Run the decoder: at once, or sequence by sequence where each has several new tokens.

        Returns:
            Outputs on the device, of all sequences or of each.
        """
        assert isinstance(cache, OrtDeviceCache)
        (batch, num_new), buffers = inputs.input_ids.shape, cache.buffers
        assert batch == cache.batch, "the cache is of another batch"
        assert inputs.num_cache_rows <= cache.capacity, "past_lengths + S exceeds the cache"
        if num_new == 1 and inputs.logits_positions.shape[1] == 1 and not (inputs.visual_rows >= 0).any():
            return [self._guard(partial(self._run_step, buffers, inputs))]
        if batch == 1 or num_new == 1:
            return [self._guard(partial(self._run_once, buffers, inputs, names))]
        return [self._guard(partial(self._run_once, buffers, inputs.row(row), names, row)) for row in range(batch)]

    def _run_step(self, buffers: CacheBuffers, inputs: DecoderInputs) -> Mapping[str, ort.OrtValue]:
        if buffers.step is None:
            buffers.step = _Step(self._decoder, buffers, inputs.with_used_rows(), next(self._graph_ids))
        buffers.step.run(inputs)
        self.decode_recorded = "enable_cuda_graph" in self._device.decoder_options
        return buffers.step.outputs

    def _run_once(
        self,
        buffers: CacheBuffers,
        inputs: DecoderInputs,
        names: tuple[str, ...],
        row: int | None = None,
    ) -> Mapping[str, ort.OrtValue]:
        binding = self._decoder.io_binding()
        for name, array in inputs.arrays().items():
            binding.bind_cpu_input(name, array)
        for name in names:
            binding.bind_output(name, self._device.name)
        buffers.bind(binding, row)
        self._decoder.run_with_iobinding(binding, _run_options(_UNCAPTURED))
        return dict(zip(names, binding.get_outputs(), strict=False))

    def _guard(self, work: Callable[[], Any]) -> Any:
        """Run, and say what to do if the device has no memory left."""
        try:
            return work()
        except Exception as error:  # onnxruntime raises classes of its own binding, without a common base
            if _is_out_of_memory(error):
                raise _capacity_error(error, self._device) from error
            raise


def open_session(folder: Path, manifest: Manifest, options: SessionOptions) -> OrtCudaSession:
    """Open an engine folder; see `runtime.session.open_session`.

    Raises:
        EngineError: ONNX Runtime has no CUDA here, or refuses a graph.
        CapacityError: The GPU is out of memory.
    """
    check_paths(folder, manifest)
    device = CUDA if options.cuda_graphs else replace(CUDA, decoder_options={})
    return OrtCudaSession(folder, manifest, options.threads, device=device)


def _open(path: Path, device: Device, provider_options: Mapping[str, str], threads: int | None) -> ort.InferenceSession:
    if device.provider not in ort.get_available_providers():
        raise EngineError(
            f"{path}: onnxruntime {ort.__version__} has no {device.provider}, only "
            f"{', '.join(ort.get_available_providers())}",
            remedy=f"uninstall onnxruntime, which excludes onnxruntime-gpu, then {how_to_install('cuda')}",
        )
    if device.name == "cuda":
        # CUDA's libraries from the package index lie where the loader does not look; it prints what it misses.
        with contextlib.redirect_stdout(sys.stderr):
            ort.preload_dlls()
    options = ort.SessionOptions()
    options.log_severity_level = 4  # as in ort_cpu.py
    options.intra_op_num_threads = threads or 1  # the CPU computes shapes alone
    try:
        session = ort.InferenceSession(
            str(path), options, providers=[(device.provider, dict(provider_options))], enable_fallback=0
        )
    except Exception as error:  # onnxruntime raises classes of its own binding, without a common base
        if _is_out_of_memory(error):
            raise _capacity_error(error, device) from error
        raise EngineError(
            f"{path}: ONNX Runtime {ort.__version__} does not open it on {device.provider} "
            f"({str(error).splitlines()[0]})",
            remedy="see that nvidia-smi lists a GPU with enough free memory; else build the engine again",
        ) from error
    # A provider that cannot be loaded is left out with a warning.
    if session.get_providers()[0] != device.provider:
        raise EngineError(
            f"{path}: {device.provider} does not start, ONNX Runtime offers {', '.join(session.get_providers())}",
            remedy=f"see that nvidia-smi lists a GPU, and that CUDA's libraries are there: {how_to_install('cuda')}",
        )
    return session


def _is_out_of_memory(error: Exception) -> bool:
    text = str(error).lower()
    return any(words in text for words in ("allocate memory", "out of memory", "bad allocation"))


def _capacity_error(error: Exception, device: Device) -> CapacityError:
    return CapacityError(
        f"{device.provider}: the device has too little memory ({' '.join(str(error).split())[:200]})",
        remedy="lower max_context or max_pixels, choose a target of fewer bits, or free the GPU",
    )


def _run_options(graph_id: str) -> ort.RunOptions:
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", graph_id)
    return options


def _numpy_type(type_str: str) -> type[Any]:
    types: dict[str, type[Any]] = {
        "tensor(float)": np.float32,
        "tensor(float16)": np.float16,
        "tensor(int64)": np.int64,
    }
    return types[type_str]
