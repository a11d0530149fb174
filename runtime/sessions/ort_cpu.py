"""Run an engine with ONNX Runtime's CPU provider; the KV cache is updated in place through IOBinding.

Shapes: see runtime/session.py.
"""

from __future__ import annotations

import errno
import io
import logging
import math
import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime import native
from runtime.cache_types import CODE_BITS, MIXED, CacheType, cache_types
from runtime.contract import (
    DECODER_INPUTS,
    DECODER_OUTPUTS,
    TOKEN_SCORES,
    VISION_INPUTS,
    VISION_OUTPUTS,
    WINDOW_QUERIES,
    DecoderInputs,
    FloatArray,
    IntArray,
    VisionInputs,
    check_names,
    past_names,
    present_names,
)
from runtime.engine_paths import check_paths
from runtime.errors import EngineError
from runtime.files import read_small_file
from runtime.huge_pages import anonymous_regions, copy_to_huge_pages, use_huge_pages
from runtime.installation import from_extra
from runtime.kernels import EXACT_PRODUCTS, kernels_of, needs_exact_products
from runtime.machine import default_threads, release_freed_memory
from runtime.manifest import Manifest
from runtime.session import DECODE, PREFILL, VISION, KVCache, SessionOptions
from runtime.visual_pruning.scored import ScoredEmbeds

with from_extra("cpu"):
    import onnxruntime as ort

# Python shows warnings on stderr if the program sets up no logging of its own.
_LOGGER = logging.getLogger(__name__)
_PROVIDER = "CPUExecutionProvider"
_TYPE_NAMES = {
    "float32": "tensor(float)",
    "float16": "tensor(float16)",
    "int8": "tensor(int8)",
    "uint8": "tensor(uint8)",
}
_VISION, _DECODER, _PREFILL = "vision.onnx", "decoder.onnx", "prefill.onnx"
_NOT_ASKED_FOR = "the session was opened for other parts"
_AS_REQUESTED = 1  # of onnxruntime's ArenaExtendStrategy; 0 doubles


class OrtKVCache:
    """One pair of arrays a layer, bound as past and present at once; their memory is committed as rows are written.

    Elements of 8 and 4 bits are the codes of GroupQueryAttention: multiples of the channel's scale, rounded to even
    and cut off at the ends; 8 bits as int8, 4 bits as uint8, two channels a byte, the even one in the low half, each
    with 8 added.

    Args:
        types: Of each layer.
        shape_BKTH: Shape of a layer's keys, or values, whatever their type.
        scales_L2KH: The step between two codes of each channel, keys before values; of layers without codes it is not
            read. None if no layer has codes.
    """

    def __init__(
        self,
        types: Sequence[CacheType],
        shape_BKTH: tuple[int, int, int, int],
        scales_L2KH: FloatArray | None = None,
    ) -> None:
        self.batch, _, self.capacity, head_dim = shape_BKTH
        self._types = tuple(types)
        dtypes = {each.dtype for each in types}
        self.dtype = dtypes.pop() if len(dtypes) == 1 else MIXED
        made = [_zeros((*shape_BKTH[:3], each.row_elements(head_dim)), each.dtype) for each in types for _ in range(2)]
        self._memory, self._arrays = [memory for memory, _ in made], [array for _, array in made]
        self.num_bytes = sum(array.nbytes for array in self._arrays)
        self._scales_L2KH = scales_L2KH
        self._bindings: dict[tuple[ort.InferenceSession, int, int, tuple[str, ...]], ort.IOBinding] = {}

    def layer(self, index: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return copies of one layer's keys and values, [B, K, T, H], as float32."""
        keys, values = self._arrays[2 * index : 2 * index + 2]
        return self._floats(index, 0, keys), self._floats(index, 1, values)

    def keys(self, index: int, slot: int, num_rows: int) -> FloatArray:
        """Return the keys of the first rows of a slot in one layer, float32 [K, rows, H]."""
        found: FloatArray = self._floats(index, 0, self._arrays[2 * index][slot, :, :num_rows])
        return found

    def _floats(self, index: int, kind: int, array: NDArray[Any]) -> FloatArray:
        if self._types[index].bits not in CODE_BITS:
            return np.array(array, np.float32)
        assert self._scales_L2KH is not None, "codes have scales"
        return _dequantize(array, self._scales_L2KH[index, kind])

    def write_layer(self, index: int, keys_BKTH: FloatArray, values_BKTH: FloatArray) -> None:
        """Put other keys and values into a layer of floats, in place."""
        assert self._types[index].bits not in CODE_BITS, "codes are not written so"
        for array, values in zip(self._arrays[2 * index : 2 * index + 2], (keys_BKTH, values_BKTH), strict=True):
            array[:] = values

    def copy_rows(self, source: int, target: int, num_rows: int) -> None:
        """Copy the first rows of one slot to another."""
        for array_BKTH in self._arrays:
            array_BKTH[target, :, :num_rows] = array_BKTH[source, :, :num_rows]

    def swap_rows(self, slot: int, other: int, num_rows: int) -> None:
        """Exchange the first rows of two slots."""
        for array_BKTH in self._arrays:
            rows = array_BKTH[slot, :, :num_rows].copy()
            array_BKTH[slot, :, :num_rows] = array_BKTH[other, :, :num_rows]
            array_BKTH[other, :, :num_rows] = rows

    def move_rows(self, slot: int, source: int, target: int, num_rows: int) -> None:
        """Move rows of a slot down; see `runtime.sliding_window.SlidingCache`."""
        for array_BKTH in self._arrays:
            # Head by head, since numpy copies aside what overlaps: one head's rows, not all of them.
            for rows_TH in array_BKTH[slot]:
                rows_TH[target : target + num_rows] = rows_TH[source : source + num_rows]

    def read_keys(self, slot: int, start: int, num_rows: int) -> FloatArray:
        """Return keys of rows, float32 [layers, K, R, H]."""
        rows = slice(start, start + num_rows)
        return np.stack([self._floats(i, 0, array[slot, :, rows]) for i, array in enumerate(self._arrays[::2])])

    def write_keys(self, slot: int, start: int, keys_LKRH: FloatArray) -> None:
        """Write keys of rows from `start` on, rounded to the type of each layer."""
        stop = start + keys_LKRH.shape[2]
        for layer, keys_KRH in enumerate(keys_LKRH):
            array = self._arrays[2 * layer]
            if self._types[layer].bits in CODE_BITS:
                assert self._scales_L2KH is not None, "codes have scales"
                keys_KRH = _quantize(keys_KRH, self._scales_L2KH[layer, 0], array.dtype)
            array[slot, :, start:stop] = keys_KRH

    def read_rows(self, slot: int, start: int, stop: int) -> list[NDArray[Any]]:
        """Return views of rows of a slot; see `runtime.moved_rows.MovableCache`."""
        return [array_BKTH[slot, :, start:stop] for array_BKTH in self._arrays]

    def write_rows(self, slot: int, start: int, rows_NKRH: Sequence[NDArray[Any]]) -> None:
        """Write rows of a slot; see `runtime.moved_rows.MovableCache`."""
        for array_BKTH, rows_KRH in zip(self._arrays, rows_NKRH, strict=True):
            array_BKTH[slot, :, start : start + rows_KRH.shape[1]] = rows_KRH

    def keep_rows(self, index: int, slot: int, rows_KM: IntArray) -> None:
        """Move the rows that each kv head of a layer keeps to the front of a slot, in their order."""
        for array_BKTH in self._arrays[2 * index : 2 * index + 2]:
            for rows_TH, kept_M in zip(array_BKTH[slot], rows_KM, strict=True):
                rows_TH[: len(kept_M)] = rows_TH[kept_M]

    def release_rows(self, slot: int, start: int, stop: int) -> None:
        """Give the memory of rows start … stop - 1 of a slot back to the system, until they are written again."""
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        for memory, array_BKTH in zip(self._memory, self._arrays, strict=True):
            slot_bytes, head_bytes, row_bytes, _ = array_BKTH.strides
            for head in range(array_BKTH.shape[1]):
                begin = slot * slot_bytes + head * head_bytes
                first = -(-(begin + start * row_bytes) // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages
                last = (begin + stop * row_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
                if first < last:
                    memory.madvise(mmap.MADV_DONTNEED, first, last - first)

    def binding(
        self, session: ort.InferenceSession, slot: int, batch: int, outputs: tuple[str, ...] = DECODER_OUTPUTS
    ) -> ort.IOBinding:
        """Return the binding of some slots to a decoder; its first outputs are those that are named."""
        key = session, slot, batch, outputs
        if key not in self._bindings:
            # Made once: binding the cache of 28 layers anew takes 0.18 ms a step.
            self._bindings[key] = binding = session.io_binding()
            for name in outputs:
                binding.bind_output(name, "cpu")
            self.bind(binding, slot, batch)
        return self._bindings[key]

    def bind(self, binding: ort.IOBinding, slot: int, batch: int) -> None:
        """Bind past and present of slots slot … slot + batch - 1 to the same memory."""
        num_layers = len(self._arrays) // 2
        for past, present, array in zip(past_names(num_layers), present_names(num_layers), self._arrays, strict=True):
            value = ort.OrtValue.ortvalue_from_numpy(array[slot : slot + batch])  # the array's own memory
            binding.bind_ortvalue_input(past, value)
            binding.bind_ortvalue_output(present, value)


class OrtCpuSession:
    """The two graphs of an engine in ONNX Runtime.

    Attributes:
        runs_vision_beside: The vision tower may run in another thread than the decoder at the same time. Steps of two
            sequences beside an image of 2304 patches (2B in 4 bits, 2 cores): 124 ms, the slowest 179 ms, where they
            take 43 ms alone; after it, they would wait 5.2 s.
        huge_page_bytes: Memory that has huge pages because they were asked for.
    """

    runs_vision_beside = True

    def __init__(self, folder: Path, manifest: Manifest, given: SessionOptions) -> None:
        options = session_options(folder, manifest, given)
        exact = needs_exact_products(kernels_of(manifest))
        self._config = manifest.model
        self._cache_types = cache_types(manifest.capabilities, manifest.model.text.num_layers)
        self._cache_scales = read_scales(folder, manifest)
        self._has_batched_chunks = bool(manifest.capabilities.get("batched_chunks", False))
        before = anonymous_regions()
        self.has_token_scores = bool(manifest.capabilities.get(TOKEN_SCORES))
        parts = given.parts
        has_prefill = "prefill_min_tokens" in manifest.capabilities and given.separate_prefill
        self._vision = _open_graph(folder, manifest, options, _VISION) if VISION in parts else None
        is_decoder_used = DECODE in parts or (PREFILL in parts and not has_prefill)
        self._decoder = _open_graph(folder, manifest, options, _DECODER) if is_decoder_used else None
        # Some engines hold the decoder twice: this one is faster for prompts.
        self._prefill = self._decoder
        if has_prefill and PREFILL in parts:
            self._prefill = _open_graph(folder, manifest, options, _PREFILL)
        if exact:
            # The library made two more copies of the weights on its way, 96 MB of weights: 234 MB before, 98 MB after.
            release_freed_memory()
        self.huge_page_bytes = 0
        if given.huge_pages:
            self.huge_page_bytes = use_huge_pages(before)
            self.huge_page_bytes += copy_to_huge_pages(folder) if _has_own_kernels(manifest) else 0
        if given.huge_pages and not self.huge_page_bytes:
            _LOGGER.warning("note: the kernel gave no huge pages, so tokens come as they would without")

    def vision(self, inputs: VisionInputs) -> FloatArray:
        """Run the vision tower; see `runtime.session.Session.vision`."""
        assert self._vision is not None, _NOT_ASKED_FOR
        (embeds,) = self._vision.run(VISION_OUTPUTS, inputs.arrays())
        return np.asarray(embeds, np.float32)

    def scored_vision(self, inputs: VisionInputs) -> ScoredEmbeds:
        """Run the vision tower; see `runtime.visual_pruning.scored.ScoringSession.scored_vision`."""
        assert self._vision is not None, _NOT_ASKED_FOR
        embeds, scores = self._vision.run((*VISION_OUTPUTS, TOKEN_SCORES), inputs.arrays())
        return ScoredEmbeds(np.asarray(embeds, np.float32), np.asarray(scores, np.float32))

    def new_cache(self, capacity: int, batch: int = 1) -> OrtKVCache:
        """Allocate a cache of zeros."""
        text = self._config.text
        shape = (batch, text.num_kv_heads, capacity, text.head_dim)
        return OrtKVCache(self._cache_types, shape, self._cache_scales)

    def decode_batch(self, num_sequences: int, num_slots: int) -> int:
        """Return the same number: no step is recorded."""
        return num_sequences

    def decodes_anywhere(self, num_sequences: int) -> bool:
        """Return that steps run in any slots side by side.

        So a request that decodes alone moves no rows: exchanging 300 of them takes 20 ms (2B, cache in float32).
        """
        return True

    def prefill(self, inputs: DecoderInputs, cache: KVCache, slot: int = 0) -> FloatArray:
        """Run the decoder that is faster for prompts, if there is one; see `runtime.session.Session.prefill`."""
        return self._run(self._prefill, inputs, cache, slot)[0]

    def prefill_with_queries(
        self, inputs: DecoderInputs, cache: KVCache, slot: int = 0
    ) -> tuple[FloatArray, FloatArray]:
        """Run a chunk as `prefill` does, of an engine with `kv_scores`: logits, and queries [W, layers, N, H]."""
        logits, queries = self._run(self._prefill, inputs, cache, slot, (*DECODER_OUTPUTS, WINDOW_QUERIES))
        return logits, queries[0]

    def decode(self, inputs: DecoderInputs, cache: KVCache, slot: int = 0) -> FloatArray:
        """Run the decoder; see `runtime.session.Session.decode`."""
        return self._run(self._decoder, inputs, cache, slot)[0]

    def _run(
        self,
        session: ort.InferenceSession | None,
        inputs: DecoderInputs,
        cache: KVCache,
        slot: int,
        outputs: tuple[str, ...] = DECODER_OUTPUTS,
    ) -> list[FloatArray]:
        assert session is not None, _NOT_ASKED_FOR
        assert isinstance(cache, OrtKVCache)
        batch, num_new = inputs.input_ids.shape
        assert slot + batch <= cache.batch, "slots that the cache does not have"
        assert inputs.num_cache_rows <= cache.capacity, "past_lengths + S exceeds the cache"
        is_one_by_one = batch == 1 or num_new == 1 or not inputs.past_lengths.any()
        assert is_one_by_one or self._has_batched_chunks, "a chunk with a past is one sequence"
        binding = cache.binding(session, slot, batch, outputs)
        for name, array in inputs.arrays().items():
            binding.bind_cpu_input(name, array)
        # Else the run would write into the logits of the last one.
        for name in outputs:
            binding.bind_output(name, "cpu")
        session.run_with_iobinding(binding)
        found = binding.get_outputs_as_ortvaluevector()
        return [found[i].numpy() for i in range(len(outputs))]


def session_options(folder: Path, manifest: Manifest, given: SessionOptions) -> ort.SessionOptions:
    """Return the options that all graphs of an engine are opened with; its own operators are registered in them.

    Raises:
        EngineError: The engine has operators of ours that cannot be used here, or others.
        UsageError: The instruction set that was chosen for them cannot be used.
    """
    options = ort.SessionOptions()
    # What fails is in the exception; the log would write names of the graph to stderr as they are.
    options.log_severity_level = 4
    # One arena for all graphs, which run one after the other, grown by what is asked for, and no plan of a run's
    # memory, which is made for shapes that return: 0.36 GB less at the peak of an image of 3072 patches and 512
    # tokens (2B, 4 bits), in the same time. Registered anew, it belongs to the sessions opened from here on.
    memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(memory, ort.OrtArenaCfg({"arena_extend_strategy": _AS_REQUESTED}))
    options.add_session_config_entry("session.use_env_allocators", "1")
    options.enable_mem_pattern = False
    # Threads spin while they wait, ONNX Runtime's default: a decode step of 2B in 4 bits takes 49.2 ms so, 51.7 ms
    # without. Pinned to cores it takes 46.7 ms, but two processes pinned to the same cores would halve each other.
    options.intra_op_num_threads = given.threads or default_threads()
    # But not between two runs, where they would take a core from the threads that ask and answer: on two busy cores
    # these then woke 3 to 5 ms late, so 0.5 ms. Steps are as fast (2B in 4 bits, in turns: 138 ms, with it 148 ms).
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if _has_own_kernels(manifest):
        _register_own_kernels(folder, manifest, options)
    if needs_exact_products(kernels_of(manifest)):
        options.add_session_config_entry(*EXACT_PRODUCTS)
    return options


def _has_own_kernels(manifest: Manifest) -> bool:
    return manifest.capabilities.get("custom_ops") is not None


def _register_own_kernels(folder: Path, manifest: Manifest, options: ort.SessionOptions) -> None:
    """Add our own operators to the options.

    Raises:
        EngineError: They cannot be used here, or the engine asks for others.
        UsageError: The instruction set that was chosen for them cannot be used.
    """
    wanted = manifest.capabilities["custom_ops"]
    if wanted != native.DOMAIN:
        raise EngineError(
            f"{folder}: the engine uses the operators {wanted!r:.80}, which this version does not have; it has "
            f"{native.DOMAIN}",
            remedy="install the version that built the engine, or build it again",
        )
    native.register(options)
    native.warn_of_portable_code()


def _zeros(shape: tuple[int, ...], dtype: str) -> tuple[mmap.mmap, NDArray[Any]]:
    """Return an array and its memory, which is committed page by page as it is written.

    `numpy.zeros` asks for huge pages, and each holds more rows of a head than most prompts have, so that a few tokens
    committed a whole slot: 470 MB, and 1 s of the first prompt (2B, 2048 rows in float32).

    Raises:
        MemoryError: The process may not have so much, as `numpy.zeros` says it.
    """
    num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    try:
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        if error.errno != errno.ENOMEM:
            raise
        raise MemoryError(f"a KV cache of {num_bytes} bytes") from error
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return memory, np.frombuffer(memory, dtype).reshape(shape)


def open_session(folder: Path, manifest: Manifest, options: SessionOptions) -> OrtCpuSession:
    """Open an engine folder; see `runtime.session.open_session`."""
    check_paths(folder, manifest)
    return OrtCpuSession(folder, manifest, options)


def _dequantize(codes: NDArray[Any], scales_KH: FloatArray) -> FloatArray:
    """Return the values of codes [B, K, T, H], or [B, K, T, H / 2] if two share a byte."""
    if codes.dtype == np.uint8:
        halves = np.stack((codes & 15, codes >> 4), axis=-1)
        codes = halves.reshape(*codes.shape[:-1], 2 * codes.shape[-1]).astype(np.int8) - 8
    return np.asarray(codes * scales_KH[:, None], np.float32)


def _quantize(values_KRH: FloatArray, scales_KH: FloatArray, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return the codes of values: [K, R, H], or [K, R, H / 2] if two share a byte."""
    is_packed = dtype == np.uint8
    half = 8 if is_packed else 128
    codes = np.clip(np.rint(values_KRH / scales_KH[:, None]), -half, half - 1).astype(np.int8)
    if not is_packed:
        return np.asarray(codes)
    low, high = (np.asarray(codes[..., side::2] + 8, np.uint8) for side in (0, 1))
    return np.asarray(low | high << 4)


def read_scales(folder: Path, manifest: Manifest) -> FloatArray | None:
    """Read the scales of a cache's codes, float32 [layers, 2, K, H]; None if the cache holds floats.

    Raises:
        EngineError: The file is missing, or not such an array.
    """
    name = manifest.capabilities.get("cache_scales")
    if name is None:
        return None
    manifest.require(folder, name)
    text = manifest.model.text
    shape = (text.num_layers, 2, text.num_kv_heads, text.head_dim)
    try:
        scales = np.load(io.BytesIO(read_small_file(folder / name)), allow_pickle=False)
    except (ValueError, EOFError, MemoryError) as error:
        raise EngineError(f"{folder / name}: no array ({error})", remedy="build the engine again") from error
    if not isinstance(scales, np.ndarray) or scales.shape != shape or scales.dtype != np.float32:
        found = f"{scales.dtype}{list(scales.shape)}" if isinstance(scales, np.ndarray) else "an archive"
        raise EngineError(
            f"{folder / name}: found {found}, expected float32{list(shape)}", remedy="build the engine again"
        )
    return scales


def _open_graph(folder: Path, manifest: Manifest, options: ort.SessionOptions, name: str) -> ort.InferenceSession:
    """Open the vision tower or a decoder, and check its inputs and outputs."""
    if name == _VISION:
        scores = (TOKEN_SCORES,) if manifest.capabilities.get(TOKEN_SCORES) else ()
        return _open(folder, manifest, options, name, VISION_INPUTS, (*VISION_OUTPUTS, *scores))
    num_layers = manifest.model.text.num_layers
    inputs, outputs = past_names(num_layers), present_names(num_layers)
    optional = (WINDOW_QUERIES,) if "kv_scores" in manifest.capabilities else ()
    expected = *DECODER_OUTPUTS, *outputs, *optional
    session = _open(folder, manifest, options, name, (*DECODER_INPUTS, *inputs), expected)
    found = {value.name: value.type for value in session.get_inputs()}
    types = cache_types(manifest.capabilities, num_layers)
    wrong = [i for i, each in enumerate(types) if found[inputs[2 * i]] != _TYPE_NAMES.get(each.dtype)]
    if wrong:
        raise EngineError(
            f"{folder / name}: its KV cache is of {found[inputs[2 * wrong[0]]]}, engine.json says "
            f"{types[wrong[0]].dtype} of layer {wrong[0]}",
            remedy="build the engine again",
        )
    return session


def _open(
    folder: Path,
    manifest: Manifest,
    options: ort.SessionOptions,
    name: str,
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
) -> ort.InferenceSession:
    """Open a graph with these inputs and outputs."""
    manifest.require(folder, name)
    path = folder / name
    try:
        # Its fallback would print on stdout and try the same provider once more.
        session = ort.InferenceSession(str(path), options, providers=[_PROVIDER], enable_fallback=0)
    except Exception as error:  # onnxruntime raises classes of its own binding, without a common base
        raise EngineError(
            f"{path}: ONNX Runtime {ort.__version__} does not open it ({str(error).splitlines()[0]})",
            remedy="build the engine again with this version",
        ) from error
    names = ([value.name for value in values] for values in (session.get_inputs(), session.get_outputs()))
    check_names(path, *names, expected_inputs=inputs, expected_outputs=outputs)
    return session
