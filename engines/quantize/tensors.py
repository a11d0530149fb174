"""Quantised weights as streamed tensors: read, quantised and written row by row.

Shapes: N rows (outputs) and K columns (inputs) of a weight, J blocks of a row, G weights of a block.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from engines.quantize.blockwise import QuantizedBlocks, pack_codes, quantize_blocks, quantize_rows_int8
from engines.quantize.imported import GroupQuantizedTensor
from engines.weights import ConcatenatedTensor, StreamedTensor
from runtime.errors import BundleError
from runtime.machine import default_threads

# Weights handed to one thread at a time: a few passes of the search.
_CHUNK_WEIGHTS = 1 << 20
T = TypeVar("T")


class BlockwiseWeight:
    """A weight [N, K] in blocks along K, in the layout of ONNX Runtime's MatMulNBits and GatherBlockQuantized.

    `packed`, `scales` and `zero_points` come from one pass over the source, so `packed` must be written first; the
    other two wait in memory until they are written, 1/64 of the source's bytes or less.

    Attributes:
        bits, block: The format.
        packed: uint8 [N, J, G · bits / 8], low bits first; [N, J · G · bits / 8] for a table to look rows up in.
        scales: float32 [N, J].
        zero_points: uint8 [N, ceil(J · bits / 8)], packed along J.
    """

    def __init__(self, source: StreamedTensor, bits: int, block: int, *, is_table: bool = False) -> None:
        self._source, self.bits, self.block = source, bits, block
        num_rows, num_columns = (int(n) for n in source.shape.numpy())
        num_blocks = -(-num_columns // block)
        self._num_blocks = num_blocks
        self._side: dict[str, list[NDArray[Any]]] | None = None
        name = str(source.name)
        block_bytes = block * bits // 8
        shape = (num_rows, num_blocks * block_bytes) if is_table else (num_rows, num_blocks, block_bytes)
        self.packed = ProducedTensor(f"{name}.q{bits}", shape, ir.DataType.UINT8, self._pack)
        self.scales = ProducedTensor(
            f"{name}.scales", (num_rows, num_blocks), ir.DataType.FLOAT, lambda: self._take("scales")
        )
        self.zero_points = ProducedTensor(
            f"{name}.zero_points",
            (num_rows, -(-num_blocks * bits // 8)),
            ir.DataType.UINT8,
            lambda: self._take("zero_points"),
        )

    def _pack(self) -> Iterator[NDArray[Any]]:
        self._side = {"scales": [], "zero_points": []}
        for quantized in self._quantized_rows():
            scales_RJ = quantized.scales.reshape(-1, self._num_blocks)
            zeros_RJ = quantized.zero_points.reshape(-1, self._num_blocks)
            self._side["scales"].append(scales_RJ)
            self._side["zero_points"].append(pack_codes(zeros_RJ, self.bits))
            yield pack_codes(quantized.codes, self.bits).reshape(-1)

    def _quantized_rows(self) -> Iterator[QuantizedBlocks]:
        """Yield the blocks of whole rows: as the source holds them if its format is this one, else by search."""
        for part in self._source.parts if isinstance(self._source, ConcatenatedTensor) else (self._source,):
            if isinstance(part, GroupQuantizedTensor) and (part.bits, part.block) == (self.bits, self.block):
                yield from part.quantized_rows()
            else:
                yield from map_ahead(self._quantize, row_chunks(part))

    def _quantize(self, weights_RK: NDArray[np.float32]) -> QuantizedBlocks:
        missing = self._num_blocks * self.block - weights_RK.shape[1]
        if missing:
            weights_RK = np.pad(weights_RK, ((0, 0), (0, missing)))
        return quantize_blocks(weights_RK.reshape(-1, self.block), self.bits)

    def _take(self, kind: str) -> Iterator[NDArray[Any]]:
        if self._side is None or not self._side[kind]:
            for _ in self._pack():
                pass
        assert self._side is not None
        for array in self._side[kind]:
            yield array.reshape(-1)
        self._side[kind] = []


class RowwiseWeight:
    """A weight [N, K] in 8 bits with one scale a row, transposed to the [K, N] that a product takes.

    The codes of the whole weight are in memory while it is written, since they are written column by column.

    Args:
        source: The weight.
        dtype: Of the codes.
        quantize: Makes codes [R, K] and scales [R] of some rows.

    Attributes:
        transposed: Codes [K, N].
        scales: float32 [N].
    """

    def __init__(
        self,
        source: StreamedTensor,
        dtype: ir.DataType = ir.DataType.INT8,
        quantize: Callable[[NDArray[np.float32]], tuple[NDArray[Any], NDArray[np.float32]]] = quantize_rows_int8,
    ) -> None:
        self._source, self._quantize = source, quantize
        num_rows, num_columns = (int(n) for n in source.shape.numpy())
        self._scales: list[NDArray[np.float32]] = []
        suffix = "s8" if dtype == ir.DataType.INT8 else "f8"
        self.transposed = ProducedTensor(f"{source.name}.{suffix}", (num_columns, num_rows), dtype, self._transpose)
        self.scales = ProducedTensor(f"{source.name}.scales", (num_rows,), ir.DataType.FLOAT, self._take_scales)

    def _transpose(self) -> Iterator[NDArray[Any]]:
        num_columns, num_rows = (int(n) for n in self.transposed.shape.numpy())
        codes_KN = np.empty((num_columns, num_rows), self.transposed.dtype.numpy())
        self._scales = []
        done = 0
        for codes_RK, scales in map_ahead(self._quantize, row_chunks(self._source)):
            codes_KN[:, done : done + len(scales)] = codes_RK.T
            self._scales.append(scales)
            done += len(scales)
        yield codes_KN.reshape(-1)

    def _take_scales(self) -> Iterator[NDArray[Any]]:
        if not self._scales:
            for _ in self._transpose():
                pass
        yield from self._scales
        self._scales = []


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
