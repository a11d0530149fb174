"""Quantised weights as streamed tensors: read, quantised and written row by row.

Shapes: E experts, N rows (outputs) and K columns (inputs) of a weight, R rows of a part of it, J blocks of a row, G
weights of a block.
"""

from __future__ import annotations

import abc
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from engines.quantize.blockwise import QuantizedBlocks, pack_codes, quantize_blocks
from engines.quantize.imported import GroupQuantizedTensor
from engines.weights import ConcatenatedTensor, StackedTensor, StreamedTensor
from runtime.errors import BundleError
from runtime.machine import default_threads

# Weights handed to one thread at a time: a few passes of the search.
_CHUNK_WEIGHTS = 1 << 20
T = TypeVar("T")


class QuantizedWeight(abc.ABC):
    """A weight as codes, and what is found in the same pass over its source, such as scales.

    The codes must be written first; the others wait in memory until they are written.

    Args:
        name: Name of the weight.
        outputs: Suffix of the name, shape and dtype of the codes, then of each other tensor.

    Attributes:
        tensors: The codes, then the others.
    """

    def __init__(self, name: str, outputs: Sequence[tuple[str, tuple[int, ...], ir.DataType]]) -> None:
        produce: list[Callable[[], Iterator[NDArray[Any]]]] = [self._codes]
        produce += (partial(self._take, index) for index in range(len(outputs) - 1))
        self.tensors = tuple(
            ProducedTensor(f"{name}.{suffix}", shape, dtype, each)
            for (suffix, shape, dtype), each in zip(outputs, produce, strict=True)
        )
        self._waiting: list[list[NDArray[Any]]] = [[] for _ in outputs[1:]]

    def num_bytes(self, float_bytes: int) -> int:
        """Return the bytes of all tensors in a graph whose float values take `float_bytes` each."""
        return sum(float_bytes * each.size if each.dtype == ir.DataType.FLOAT else each.nbytes for each in self.tensors)

    @abc.abstractmethod
    def quantized(self) -> Iterator[tuple[NDArray[Any], ...]]:
        """Yield the next elements of every tensor, each flat."""

    def _codes(self) -> Iterator[NDArray[Any]]:
        self._waiting = [[] for _ in self._waiting]
        for codes, *others in self.quantized():
            for waiting, part in zip(self._waiting, others, strict=True):
                waiting.append(part)
            yield codes

    def _take(self, index: int) -> Iterator[NDArray[Any]]:
        if not self._waiting[index]:
            for _ in self._codes():
                pass
        yield from self._waiting[index]
        self._waiting[index] = []


class BlockwiseWeight(QuantizedWeight):
    """A weight [N, K], or a stack of them [E, N, K], in blocks along K, in the layouts of ONNX Runtime's kernels.

    Args:
        source: The weight; K of a stack or a table is a multiple of the block, else the last block is padded.
        bits: Bits of a code.
        block: G.
        has_whole_rows: The codes of a row have no axis for its blocks: for GatherBlockQuantized and QMoE, not for
            MatMulNBits.
        symmetric: The kernel takes 2^(bits - 1) for every zero point.

    Attributes:
        bits, block: The format.
        packed: uint8 [N, J, G · bits / 8], low bits first; [N, J · G · bits / 8] in whole rows.
        scales: float32 [N, J].
        zero_points: uint8 [N, ceil(J · bits / 8)], packed along J; None if symmetric.
    """

    def __init__(
        self, source: StreamedTensor, bits: int, block: int, *, has_whole_rows: bool = False, symmetric: bool = False
    ) -> None:
        *rows, num_columns = (int(n) for n in source.shape.numpy())
        self._source, self.bits, self.block, self._symmetric = source, bits, block, symmetric
        self._num_blocks = -(-num_columns // block)
        block_bytes = block * bits // 8
        row = (self._num_blocks * block_bytes,) if has_whole_rows else (self._num_blocks, block_bytes)
        outputs: list[tuple[str, tuple[int, ...], ir.DataType]] = [
            (f"q{bits}", (*rows, *row), ir.DataType.UINT8),
            ("scales", (*rows, self._num_blocks), ir.DataType.FLOAT),
        ]
        if not symmetric:
            outputs.append(("zero_points", (*rows, -(-self._num_blocks * bits // 8)), ir.DataType.UINT8))
        super().__init__(str(source.name), outputs)
        self.packed, self.scales, *zero_points = self.tensors
        self.zero_points = zero_points[0] if zero_points else None

    def quantized(self) -> Iterator[tuple[NDArray[Any], ...]]:
        """Yield codes, scales and zero points of some rows."""
        for found in blocks_of(self._source, self.bits, self.block, symmetric=self._symmetric):
            parts = pack_codes(found.codes, self.bits).reshape(-1), found.scales
            zeros_RJ = found.zero_points.reshape(-1, self._num_blocks)
            yield parts if self._symmetric else (*parts, pack_codes(zeros_RJ, self.bits).reshape(-1))


def blocks_of(source: StreamedTensor, bits: int, block: int, *, symmetric: bool) -> Iterator[QuantizedBlocks]:
    """Yield the blocks of whole rows of a weight: as it holds them if its format is this one, else by search.

    Held codes with zero points of their own are rounded anew where the format has none. Experts are always searched.
    """

    def search(weights_RK: NDArray[np.float32]) -> QuantizedBlocks:
        missing = -weights_RK.shape[1] % block
        if missing:
            weights_RK = np.pad(weights_RK, ((0, 0), (0, missing)))
        return quantize_blocks(weights_RK.reshape(-1, block), bits, symmetric=symmetric)

    if isinstance(source, StackedTensor):
        yield from map_ahead(search, (rows_RK for part in source.parts for rows_RK in row_chunks(part)))
        return
    padded = -(-int(source.shape.numpy()[1]) // block) * block
    for part in source.parts if isinstance(source, ConcatenatedTensor) else (source,):
        if not isinstance(part, GroupQuantizedTensor) or (part.bits, part.block) != (bits, block):
            yield from map_ahead(search, row_chunks(part))
            continue
        for held in part.quantized_rows():
            is_kept = not symmetric or (held.zero_points == 1 << (bits - 1)).all()
            yield held if is_kept else search(held.dequantize().reshape(-1, padded))


class ProducedTensor(StreamedTensor):
    """A streamed tensor whose blocks a function produces."""

    def __init__(
        self, name: str, shape: tuple[int, ...], dtype: ir.DataType, produce: Callable[[], Iterator[NDArray[Any]]]
    ) -> None:
        super().__init__(name, shape, dtype)
        self._produce = produce

    def blocks(self) -> Iterator[NDArray[Any]]:
        """Yield what the function produces."""
        return self._produce()


def row_chunks(source: StreamedTensor, chunk_weights: int = _CHUNK_WEIGHTS) -> Iterator[NDArray[np.float32]]:
    """Yield whole rows of a float32 weight [N, K] as fresh arrays [R, K] of about `chunk_weights` elements.

    Raises:
        BundleError: A weight is NaN or infinite.
    """
    num_rows, num_columns = (int(n) for n in source.shape.numpy())
    chunk_rows = max(1, chunk_weights // num_columns)
    chunk, filled, first_row = np.empty(0, np.float32), 0, 0
    for block in source.blocks():
        done = 0
        while done < block.size:
            if not filled:
                chunk = np.empty(min(chunk_rows, num_rows - first_row) * num_columns, np.float32)
            taken = min(chunk.size - filled, block.size - done)
            chunk[filled : filled + taken] = block[done : done + taken]
            filled, done = filled + taken, done + taken
            if filled == chunk.size:
                rows = chunk.reshape(-1, num_columns)
                _check_finite(rows, source, first_row)
                yield rows
                first_row, filled = first_row + len(rows), 0


def map_ahead(function: Callable[[Any], T], items: Iterator[Any]) -> Iterator[T]:
    """Apply `function` to the items in order, on as many threads as `default_threads` says, a few items ahead."""
    workers = default_threads()
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[T]] = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _check_finite(rows: NDArray[np.float32], source: StreamedTensor, first_row: int) -> None:
    # The sum of squares, which the search takes of every block, is finite unless a weight is not, or is beyond 1e19.
    flat = rows.reshape(-1)
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(np.dot(flat, flat)):
            return
    bad = np.argwhere(~np.isfinite(rows))
    if not len(bad):
        bad = np.argwhere(np.abs(rows) == np.abs(rows).max())
    row, column = (int(i) for i in bad[0])
    raise BundleError(
        f"{source.name}: {rows[row, column]} at row {source.stored_row(first_row + row)}, column {column}: no number "
        "that can be quantised",
        remedy="the checkpoint is damaged, or was saved after a training that diverged: get it again",
    )
