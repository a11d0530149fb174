"""Whether ONNX Runtime reads the weights that it was given where they are, or copies of its own.

Free memory of the GPU cannot tell: other processes take and free some at the same time, and what the driver says of one
process is missing in containers. So weights are overwritten where they are for the time of a step: if the logits stay
as they were, a copy was read.

Shapes: B tokens, V vocabulary.
"""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np

from runtime.contract import DecoderInputs, FloatArray, no_visual_embeds
from runtime.cuda import CudaDevice, Pieces
from runtime.decode_step import StepBuffers
from runtime.device_buffers import DeviceBuffer, Staging
from runtime.device_cache import DeviceKVCache
from runtime.device_weights import DeviceWeights
from runtime.errors import EngineError
from runtime.guard import naming_errors
from runtime.model_config import ModelConfig
from runtime.ort_cache import TOP_IDS, UNCAPTURED, CacheBuffers, Step
from runtime.ort_device import Device, OpenedGraph, guarded
from runtime.stored_weight import StoredWeight

# Of the step: some sequences, since one may hardly need a layer.
_NUM_TOKENS, _CAPACITY = 8, 16
# Of one weight; of a layer's codes, so many are a large part.
_MOST_BYTES = 16 << 20
# Random bytes are also NaN in each type that has it, and random codes in a part of one layer move logits by tens of per
# cent of their spread; rounding moves them by less than one (runtime/decode_plan_proof.py).
_LEAST_CHANGE = 0.01
# A kind of weight that is a smaller part of all bytes is not asked about: norms, and others that a graph may convert.
_PARTS = 64


class WeightsInPlace:
    """A step of a decoder, and the weights that it may or may not read where they are; `close` frees its memory.

    Args:
        decoder: Opened with the weights; nothing else may run on it meanwhile.
        weights: The weights.
        config: Shape of the model.
        cache_dtype: Type of its cache.
        device: Where it runs.
        memory: Memory of the device.
        staging: Copies, on the decoder's stream.

    Raises:
        CapacityError: The device is out of memory.
        EngineError: The decoder does not run.
    """

    def __init__(
        self,
        decoder: OpenedGraph,
        weights: DeviceWeights,
        config: ModelConfig,
        cache_dtype: str,
        device: Device,
        memory: CudaDevice,
        staging: Staging,
    ) -> None:
        self._weights, self._device, self._memory, self._staging = weights, device, memory, staging
        text, no_embeds = config.text, no_visual_embeds(config)
        with ExitStack() as stack:
            shape = (_NUM_TOKENS, text.num_kv_heads, _CAPACITY, text.head_dim)
            cache = DeviceKVCache(memory, staging, text.num_layers, shape, cache_dtype)
            stack.callback(cache.close)
            num_top = next(output.shape[-1] for output in decoder.session.get_outputs() if output.name == TOP_IDS)
            self._io = StepBuffers(memory, staging, config, _NUM_TOKENS, num_top)
            stack.callback(self._io.close)
            self._aside, self._wrong = DeviceBuffer(memory), DeviceBuffer(memory)
            stack.callback(self._aside.close)
            stack.callback(self._wrong.close)
            most_bytes = min(_MOST_BYTES, max(weight.num_bytes for weight in weights.stored.values()))
            wrong = np.random.default_rng(0).integers(0, 256, most_bytes, np.uint8)
            staging.upload(self._wrong.reserve(most_bytes), wrong)
            self._buffers = CacheBuffers(cache, self._io)  # which hold the memory that the step is bound to
            self._step: Step | None = Step(decoder, self._buffers, _NUM_TOKENS, UNCAPTURED, device.name)
            # A step after another, whose rows make keys matter.
            ids = np.linspace(0, text.vocab_size - 1, _NUM_TOKENS).astype(np.int64)[:, None]
            for past in range(2):
                self._io.write(DecoderInputs.text(ids[:: 1 - 2 * past], np.full(_NUM_TOKENS, past), no_embeds))
                self._io.enqueue_upload()
                self._logits_BV = self._run()
            self._taken = stack.pop_all()

    def close(self) -> None:
        """Free what the step took; the decoder may be closed then."""
        self._step = None
        self._taken.close()

    def copied_bytes(self) -> int:
        """Return the bytes of those weights that the decoder reads elsewhere; all are as before then.

        Weights of one type and shape are taken to be treated alike, so that takes a step for each such kind.

        Raises:
            CapacityError: The device is out of memory.
            EngineError: The decoder does not run, or its logits are not finite.
        """
        if not np.isfinite(self._logits_BV).all():
            raise EngineError(
                "ONNX Runtime's logits are not finite, so it cannot be seen which weights it reads",
                remedy="build the engine in bfloat16 or another format, or open it with decode_plan=False",
            )
        kinds: dict[tuple[int, tuple[int, ...]], dict[int, StoredWeight]] = {}
        for name, weight in self._weights.stored.items():
            kinds.setdefault((weight.onnx_type, weight.shape), {})[self._weights.addresses[name]] = weight
        copied_bytes = 0
        for alike in kinds.values():
            num_bytes = sum(weight.num_bytes for weight in alike.values())
            if num_bytes * _PARTS >= self._weights.num_bytes:
                found = self._run_without(*next(iter(alike.items())))
                copied_bytes += 0 if _differ(self._logits_BV, found) else num_bytes
        return copied_bytes

    def _run(self) -> FloatArray:
        assert self._step is not None, "it was closed"
        self._memory.synchronize(self._staging.stream)
        with naming_errors():
            guarded(self._device, self._step.run)
        return self._io.logits(_NUM_TOKENS)[:, 0]

    def _run_without(self, address: int, weight: StoredWeight) -> FloatArray:
        """Return the logits of a step while the first bytes of each row, of each expert, of a weight are wrong."""
        num_rows = weight.shape[0] if len(weight.shape) > 1 else 1
        row_bytes = weight.num_bytes // num_rows
        piece_bytes = min(row_bytes, _MOST_BYTES // num_rows)
        stream, place = self._staging.stream, Pieces(address, row_bytes)
        aside = Pieces(self._aside.reserve(num_rows * piece_bytes), piece_bytes)
        self._memory.copy_pieces(aside, place, piece_bytes, num_rows, stream)
        self._memory.copy_pieces(place, Pieces(self._wrong.address, piece_bytes), piece_bytes, num_rows, stream)
        found = self._run()
        self._memory.copy_pieces(place, aside, piece_bytes, num_rows, stream)
        self._memory.synchronize(stream)
        return found


def _differ(expected_BV: FloatArray, found_BV: FloatArray) -> bool:
    """Return whether some token's logits are beyond what rounding explains; what is no number is."""
    errors, spreads = np.abs(found_BV - expected_BV).max(axis=1), np.ptp(expected_BV, axis=1)
    return not bool((errors <= _LEAST_CHANGE * spreads).all())
