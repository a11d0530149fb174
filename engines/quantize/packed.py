"""Weights in few bits for the own CPU kernels (docs/cpu_kernels.md), in tiles that every instruction set reads.

Shapes: N rows (outputs) and K columns (inputs) of a weight, R rows of a part of it, J = ceil(K / G) blocks of a row, G
weights of a block.

A tile holds 16 rows, one after the other in the file: the codes of J blocks, scales float16 [J, 16], zero points uint8
[J, 16], one float32 `unit`, and zeros up to a multiple of 64 bytes. Codes of a block are bytes [g, row, j], j < 4:

    4 bits   code(row, 4g + j) | code(row, 4g + j + G / 2) << 4      g < G / 8
    8 bits   code(row, 4g + j)                                       g < G / 4

    weight(n, k) = unit · scale(n, block of k) · (code(n, k) - zero point(n, block of k))

A kernel thus reads 4 codes of each of 16 rows at once, which is what an instruction multiplies, and one stretch of
memory from the first byte of a weight to the last.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from engines.quantize.blockwise import QuantizedBlocks
from engines.quantize.tensors import QuantizedWeight, blocks_of
from engines.weights import StreamedTensor

TILE_ROWS = 16
PACKED_BLOCKS = (32, 64, 128, 256)
"""Block sizes that the kernels read."""
_ALIGNMENT = 64  # a cache line, and the widest vector
_LANE = 4  # codes that one instruction multiplies and adds up
_SCALE_EXPONENT = 15  # scales reach from 2^14 to 2^15: a factor of 2 below the largest float16
_LEAST_UNIT_EXPONENT = -126  # of a normal float32, since kernels may take smaller numbers for 0
Bytes = NDArray[np.uint8]


class PackedWeight(QuantizedWeight):
    """A weight [N, K] in blocks along K, in tiles of 16 rows; its rows can be multiplied and looked up.

    Missing columns of the last block have the code of the zero point; missing rows of the last tile are all 0. So both
    stand for zeros.

    Args:
        source: The weight. Codes that it holds in this format are kept; its scales are rounded to float16 by a power of
            2 that the rows of a tile share, which changes no scale of 11 bits (float16, bfloat16) unless it is 2^29
            times smaller than the tile's largest.
        bits: Bits of a code, 4 or 8.
        block: G.

    Attributes:
        bits, block: The format.
        packed: uint8 [ceil(N / 16), bytes of a tile].
    """

    def __init__(self, source: StreamedTensor, bits: int, block: int) -> None:
        num_rows, num_columns = (int(n) for n in source.shape.numpy())
        self._source, self.bits, self.block = source, bits, block
        self._num_blocks = -(-num_columns // block)
        tile = (-(-num_rows // TILE_ROWS), tile_bytes(num_columns, bits, block))
        super().__init__(str(source.name), [(f"t{bits}", tile, ir.DataType.UINT8)])
        (self.packed,) = self.tensors

    def quantized(self) -> Iterator[tuple[NDArray[Any], ...]]:
        """Yield tiles as soon as their rows are there."""
        waiting: list[QuantizedBlocks] = []
        num_waiting = 0
        for found in blocks_of(self._source, self.bits, self.block, symmetric=False):
            waiting.append(found)
            num_waiting += len(found.scales) // self._num_blocks
            if num_waiting >= TILE_ROWS:
                rows, rest = self._cut(waiting, num_waiting - num_waiting % TILE_ROWS)
                waiting, num_waiting = [rest], num_waiting % TILE_ROWS
                yield (pack_tiles(rows, self.bits, self._num_blocks).reshape(-1),)
        if num_waiting:
            rows, _ = self._cut(waiting, num_waiting)
            yield (pack_tiles(rows, self.bits, self._num_blocks).reshape(-1),)

    def _cut(self, parts: list[QuantizedBlocks], num_rows: int) -> tuple[QuantizedBlocks, QuantizedBlocks]:
        """Join parts and return the first rows, and the others."""
        codes, scales, zeros = (
            np.concatenate([getattr(part, name) for part in parts]) for name in ("codes", "scales", "zero_points")
        )
        at = num_rows * self._num_blocks
        return QuantizedBlocks(codes[:at], scales[:at], zeros[:at]), QuantizedBlocks(
            codes[at:].copy(), scales[at:].copy(), zeros[at:].copy()
        )


def tile_bytes(num_columns: int, bits: int, block: int) -> int:
    """Return the bytes of a tile of rows of so many columns."""
    num_blocks = -(-num_columns // block)
    used = num_blocks * (TILE_ROWS * block * bits // 8 + 3 * TILE_ROWS) + 4
    return -(-used // _ALIGNMENT) * _ALIGNMENT


def pack_tiles(rows: QuantizedBlocks, bits: int, num_blocks: int) -> Bytes:
    """Return the tiles [ceil(R / 16), bytes of a tile] of R rows, whose blocks are [R · J]."""
    block = rows.codes.shape[1]
    num_rows = len(rows.scales) // num_blocks
    missing = -num_rows % TILE_ROWS
    codes_RJG = np.pad(rows.codes.reshape(num_rows, num_blocks, block), ((0, missing), (0, 0), (0, 0)))
    scales_RJ = np.pad(rows.scales.reshape(num_rows, num_blocks), ((0, missing), (0, 0)))
    zeros_RJ = np.pad(rows.zero_points.reshape(num_rows, num_blocks), ((0, missing), (0, 0)))
    num_tiles = len(scales_RJ) // TILE_ROWS
    by_tile = (num_tiles, TILE_ROWS, num_blocks)
    scales, units = _scales_and_units(scales_RJ.reshape(by_tile).transpose(0, 2, 1))
    zeros = zeros_RJ.reshape(by_tile).transpose(0, 2, 1)
    parts = [
        _ordered(codes_RJG.reshape(*by_tile, block), bits),
        np.ascontiguousarray(scales).view(np.uint8).reshape(num_tiles, -1),
        np.ascontiguousarray(zeros).reshape(num_tiles, -1),
        units.view(np.uint8).reshape(num_tiles, -1),
    ]
    tiles = np.zeros((num_tiles, tile_bytes(num_blocks * block, bits, block)), np.uint8)
    at = 0
    for part in parts:
        tiles[:, at : at + part.shape[1]] = part
        at += part.shape[1]
    return tiles


def _ordered(codes: Bytes, bits: int) -> Bytes:
    """Return the bytes of the codes [tile, row, J, G] of each tile in the order of the file."""
    num_tiles, block = len(codes), codes.shape[-1]
    if bits == 4:
        codes = codes[..., : block // 2] | codes[..., block // 2 :] << np.uint8(4)
    # Four codes move as one number, [tile, row, J, g].
    lanes: NDArray[Any] = np.ascontiguousarray(codes).view(f"<u{_LANE}")
    return np.ascontiguousarray(lanes.transpose(0, 2, 3, 1)).view(np.uint8).reshape(num_tiles, -1)


def _scales_and_units(scales: NDArray[np.float32]) -> tuple[NDArray[np.float16], NDArray[np.float32]]:
    """Return scales [tile, J, row] over the tile's unit, in float16, and the units [tile]."""
    largest = np.abs(scales).max(axis=(1, 2))
    # frexp: largest = m · 2^e with m from 1/2 to 1, so the quotient is from 2^14 to 2^15.
    _, exponents = np.frexp(largest)
    shifts = np.maximum(exponents - _SCALE_EXPONENT, _LEAST_UNIT_EXPONENT)
    units = np.where(largest > 0, np.ldexp(np.float32(1), shifts), np.float32(1)).astype(np.float32)
    return (scales / units[:, None, None]).astype(np.float16), units
