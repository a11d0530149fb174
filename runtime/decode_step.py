"""What a decode step of text reads and writes in device memory, at addresses that never change.

Shapes: B batch, k largest logits; see `runtime.contract` for the inputs.
"""

from __future__ import annotations

import math
import weakref
from contextlib import ExitStack

import numpy as np

from runtime.contract import DECODER_DTYPES, DecoderInputs, FloatArray, IntArray, decoder_dims
from runtime.cuda import CudaDevice
from runtime.device_buffers import Block, DeviceBuffer, Shape, Staging
from runtime.model_config import ModelConfig

_FLOAT_BYTES = 4
_BLANK = 0xFF  # of each byte: NaN, and -1
# A step takes no visual row, but the graph wants some: they are zeros, written once.
_INTS = [name for name, dtype in DECODER_DTYPES.items() if dtype is np.int64]
SLOTS = "slots"


class StepBuffers:
    """Inputs and outputs of steps of text, one new token a sequence, for any batch up to the largest.

    The inputs are written in one copy, and the largest logits read in one. The memory is freed with the last reference,
    or by `close`.

    Args:
        device: Where.
        staging: Reads logits back; everything runs on its stream.
        config: Shape of the model.
        max_batch: The largest batch.
        num_top: Largest logits that the graph gives of each sequence.

    Attributes:
        addresses: Device address of every input but the KV cache, of `logits`, `top_ids` and `top_logits`, by name.
        slots_address: That of the slot of each sequence's cache, int64 [B], which no graph of ONNX takes.

    Raises:
        CapacityError: The GPU is out of memory.
    """

    def __init__(self, device: CudaDevice, staging: Staging, config: ModelConfig, max_batch: int, num_top: int) -> None:
        self._device, self._staging, self._config = device, staging, config
        self._max_batch, self._num_top = max_batch, num_top
        shapes, top = self.shapes(max_batch), (max_batch, 1, num_top)
        embeds_bytes = math.prod(shapes["visual_embeds"]) * _FLOAT_BYTES
        with ExitStack() as stack:
            ints = {name: (shapes[name], np.int64) for name in _INTS}
            self._inputs = Block(device, {**ints, SLOTS: ((max_batch,), np.int64)})
            stack.callback(self._inputs.close)
            self._tops = Block(device, {"top_ids": (top, np.int64), "top_logits": (top, np.float32)})
            stack.callback(self._tops.close)
            logits, embeds = DeviceBuffer(device), DeviceBuffer(device)
            stack.callback(logits.close)
            stack.callback(embeds.close)
            logits.reserve(max_batch * self._logits_bytes)
            device.fill(embeds.reserve(embeds_bytes), 0, embeds_bytes, staging.stream)
            device.synchronize(staging.stream)
            self.close = weakref.finalize(self, stack.pop_all().close)
            self.close.atexit = False  # the driver frees what a process leaves
        others = {"visual_embeds": embeds.address, "logits": logits.address}
        inputs = self._inputs.addresses()
        self.slots_address = inputs.pop(SLOTS)
        self.addresses: dict[str, int] = {**inputs, **self._tops.addresses(), **others}

    def shapes(self, batch: int) -> dict[str, Shape]:
        """Return the shape of every input but the KV cache."""
        sizes = {"B": batch, "S": 1, "L": 1, "V": 1}
        dims = decoder_dims(self._config)
        return {name: tuple(sizes[dim] if isinstance(dim, str) else dim for dim in dims[name]) for name in dims}

    def output_shapes(self, batch: int) -> dict[str, Shape]:
        """Return the shapes of `logits`, `top_ids` and `top_logits`."""
        top = (batch, 1, self._num_top)
        return {"logits": (batch, 1, self._config.text.vocab_size), "top_ids": top, "top_logits": top}

    def write(self, inputs: DecoderInputs, slot: int = 0) -> None:
        """Take over the inputs of a step of the sequences from a slot on, for `enqueue_upload`."""
        for name in _INTS:
            array = getattr(inputs, name)
            self._inputs.array(name, array.shape)[:] = array
        num_sequences = len(inputs.input_ids)
        self._inputs.array(SLOTS, (num_sequences,))[:] = np.arange(slot, slot + num_sequences)

    def write_padded(self, inputs: DecoderInputs, slot: int, batch: int) -> None:
        """Take over the inputs of a step as one of a larger batch, whose last rows all are those of the last sequence.

        They write the same values to the same rows of the cache, so that no other slot is needed.
        """
        num_sequences = len(inputs.input_ids)
        rows = np.minimum(np.arange(batch), num_sequences - 1)
        for name in _INTS:
            array = getattr(inputs, name)
            padded = array.take(rows, axis=1 if name == "position_ids" else 0)
            self._inputs.array(name, padded.shape)[:] = padded
        self._inputs.array(SLOTS, (batch,))[:] = slot + rows

    def enqueue_upload(self) -> None:
        """Enqueue the copy of the inputs to the device."""
        self._inputs.enqueue_upload(self._staging.stream)

    def enqueue_download(self) -> None:
        """Enqueue the copy of the largest logits from the device, for `tops`."""
        self._tops.enqueue_download(self._staging.stream)

    def enqueue_blank(self) -> None:
        """Enqueue that what steps give is overwritten by numbers that are none, and ids that no token has."""
        self._device.fill(self.addresses["logits"], _BLANK, self._max_batch * self._logits_bytes, self._staging.stream)
        self._tops.enqueue_fill(_BLANK, self._staging.stream)

    def tops(self, batch: int) -> tuple[IntArray, FloatArray]:
        """Return ids and values of the largest logits, [B, 1, k], once their copy was waited for."""
        shapes = self.output_shapes(batch)
        # Copies, since the next step overwrites the block.
        ids, values = (self._tops.array(name, shapes[name]).copy() for name in ("top_ids", "top_logits"))
        return np.asarray(ids, np.int64), np.asarray(values, np.float32)

    def logits(self, batch: int) -> FloatArray:
        """Return a copy of the logits, [B, 1, vocab]."""
        return self._download(self.addresses["logits"], self.output_shapes(batch)["logits"])

    def logits_of(self, row: int) -> FloatArray:
        """Return a copy of one sequence's logits, [vocab]."""
        return self._download(self.logits_address(row), (self._config.text.vocab_size,))

    def logits_address(self, row: int) -> int:
        """Return the device address of one sequence's logits."""
        return self.addresses["logits"] + row * self._logits_bytes

    def _download(self, address: int, shape: Shape) -> FloatArray:
        return np.asarray(self._staging.download(address, shape, np.float32), np.float32)

    @property
    def _logits_bytes(self) -> int:
        return self._config.text.vocab_size * _FLOAT_BYTES


def padded_batch(num_sequences: int, num_slots: int) -> int:
    """Return the next power of two, at most the slots: the batch sizes that steps are recorded for."""
    return min(1 << (num_sequences - 1).bit_length(), num_slots)
