"""Steps of own kernels before the first request, made to be compared with ONNX Runtime's: the hardest of each batch.

One sequence is so long that each split of attention has more than a block of rows, others end at the edges of blocks.
The rows between those that are valid and the step are random: keys so small that all rows count nearly alike, else a
part that attention forgets would hardly show; values that are alike for a block of rows, so that their mean does not
vanish among thousands. Steps end at the last slot, so that those of fewer sequences do not begin at slot 0: there a
kernel that takes no heed of slots would find the right ones.

Shapes: B sequences, K kv heads, R rows, H head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Protocol

import numpy as np

from runtime.contract import DecoderInputs, FloatArray, IntArray, no_visual_embeds
from runtime.cuda import CudaDevice, Pieces
from runtime.decode_plan_steps import LONG_PAST, PlanSteps
from runtime.device_buffers import DeviceBuffer, Staging
from runtime.device_cache import DeviceKVCache, to_bits
from runtime.model_config import ModelConfig

# What the sequences before the two longest have cached; further ones have 31 more each.
_PASTS = (1, 17, 64, 129)
_FURTHER = 31
_KEY_SCALE, _VALUE_NOISE = 0.25, 0.1
_ALIKE = 64
# Layers and slots begin at different rows of the random ones.
_SHIFT, _LAYER_SHIFT, _SLOT_SHIFT = 512, 37, 101


class Decode(Protocol):
    """Runs a step of the sequences from a slot on."""

    def __call__(self, inputs: DecoderInputs, *, slot: int) -> object:
        """Run it."""


def rehearse(
    steps: PlanSteps,
    cache: DeviceKVCache,
    device: CudaDevice,
    staging: Staging,
    config: ModelConfig,
    num_rows: Sequence[int],
    decode: Decode,
) -> None:
    """Have the steps of all batches compared that so many sequences need; it costs a step of both for each.

    Args:
        steps: The steps.
        cache: Their cache.
        device: The GPU.
        staging: Copies; everything runs on its stream.
        config: Shape of the model.
        num_rows: Of the slots from 0 on, rows that are valid and stay, fewer than the capacity; a slot for each
            sequence that will step.
        decode: Runs a step by `steps`.

    Raises:
        CapacityError: The GPU is out of memory.
        EngineError: CUDA failed, or `batch_invariant` cannot be kept.
    """
    past_B = _pasts(num_rows, cache.capacity)
    most = steps.padded(len(past_B)) or steps.batches[-1]
    random = np.random.default_rng(0)
    _fill(cache, device, staging, num_rows, past_B, random)
    for batch in (each for each in steps.batches if each <= most):
        lengths = past_B[-batch:]
        # The plan is given up after some that differ.
        while steps.has_batch(batch) and not steps.is_proven(cache, lengths):
            ids = random.integers(0, config.text.vocab_size, (len(lengths), 1))
            decode(DecoderInputs.text(ids, lengths, no_visual_embeds(config)), slot=len(past_B) - len(lengths))


def _pasts(num_rows: Sequence[int], capacity: int) -> IntArray:
    """Return how many rows each sequence has before the step, at least those that are valid."""
    assert max(num_rows) < capacity, "a slot without room for a step"
    longest = min(LONG_PAST, capacity - 1)
    others = [*_PASTS, *(_PASTS[-1] + _FURTHER * (i + 1) for i in range(len(num_rows)))]
    wanted = np.array([longest, longest // 2, *others][: len(num_rows)])[::-1]
    return np.asarray(np.maximum(np.minimum(wanted, capacity - 1), num_rows), np.int64)


def _fill(
    cache: DeviceKVCache,
    device: CudaDevice,
    staging: Staging,
    num_rows: Sequence[int],
    past_B: IntArray,
    random: np.random.Generator,
) -> None:
    """Write random rows behind the valid ones of each slot, up to the step's."""
    _, num_heads, capacity, head_dim = cache.shape_BKTH
    most = int((past_B - np.asarray(num_rows)).max()) + _SHIFT
    row_bytes = head_dim * 2
    with ExitStack() as stack:
        sources = []
        for values in _keys_and_values(num_heads, most, head_dim, random):
            buffer = DeviceBuffer(device)
            stack.callback(buffer.close)
            bits = to_bits(values, cache.dtype)
            staging.upload(buffer.reserve(bits.nbytes), bits)
            sources.append(buffer.address)
        for b, (start, past) in enumerate(zip(num_rows, past_B, strict=True)):
            bound = cache.bindings(b)
            for i, name in enumerate(cache.past_names if past > start else ()):
                first = (i // 2 * _LAYER_SHIFT + b * _SLOT_SHIFT) % _SHIFT
                source = Pieces(sources[i % 2] + first * row_bytes, most * row_bytes)
                target = Pieces(bound[name] + start * row_bytes, capacity * row_bytes)
                device.copy_pieces(target, source, int(past - start) * row_bytes, num_heads, staging.stream)
        device.synchronize(staging.stream)


def _keys_and_values(
    num_heads: int, num_rows: int, head_dim: int, random: np.random.Generator
) -> tuple[FloatArray, FloatArray]:
    shape = (num_heads, num_rows, head_dim)
    blocks = random.standard_normal((num_heads, -(-num_rows // _ALIKE), head_dim), np.float32)
    keys = _KEY_SCALE * random.standard_normal(shape, np.float32)
    values = blocks.repeat(_ALIKE, axis=1)[:, :num_rows] + _VALUE_NOISE * random.standard_normal(shape, np.float32)
    return keys, values
