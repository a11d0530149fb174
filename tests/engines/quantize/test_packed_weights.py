"""Weights in tiles for our own CPU kernels: layout, exactness, memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from engines.onnxruntime.packed_storage import PACKED_STORAGE
from engines.quantize.blockwise import QuantizedBlocks, quantize_blocks
from engines.quantize.formats import WeightFormat
from engines.quantize.imported import GroupQuantizedTensor
from engines.quantize.packed import PACKED_BLOCKS, PackedWeight, pack_tiles, tile_bytes
from engines.quantize.tensors import BlockwiseWeight
from engines.quantize.transposed import RowwiseWeight
from engines.weights import ConcatenatedTensor, StreamedTensor
from helpers.cpu_ops import parts_of_tiles, weight_of_tiles
from runtime.errors import BundleError, TargetError

pytestmark = pytest.mark.portable
RNG = np.random.default_rng(11)
BITS = pytest.mark.parametrize("bits", [4, 8])


class Rows(StreamedTensor):
    """An array as a streamed tensor, in blocks that end in the middle of rows."""

    def __init__(self, array: np.ndarray, name: str = "w") -> None:
        super().__init__(name, array.shape, ir.DataType.FLOAT)
        self._array = array.astype(np.float32)

    def blocks(self) -> Iterator[np.ndarray]:
        flat = self._array.reshape(-1)
        for start in range(0, flat.size, 1000):
            yield flat[start : start + 1000]


class Held(GroupQuantizedTensor):
    """Codes that a checkpoint holds, a few rows at a time."""

    def __init__(self, shape: tuple[int, int], bits: int, block: int, scales: np.ndarray, rows: int = 5) -> None:
        super().__init__("held", shape, bits, block)
        num_blocks = -(-shape[1] // block)
        zeros = RNG.integers(0, 1 << bits, scales.size).astype(np.uint8)
        codes = RNG.integers(0, 1 << bits, (scales.size, block)).astype(np.uint8)
        in_rows = codes.reshape(shape[0], -1)
        in_rows[:, shape[1] :] = np.repeat(zeros.reshape(-1, num_blocks)[:, -1:], in_rows.shape[1] - shape[1], 1)
        self.held = QuantizedBlocks(codes, scales.astype(np.float32).reshape(-1), zeros)
        self._step = rows * num_blocks

    def quantized_rows(self) -> Iterator[QuantizedBlocks]:
        for start in range(0, len(self.held.scales), self._step):
            part = slice(start, start + self._step)
            yield QuantizedBlocks(self.held.codes[part], self.held.scales[part], self.held.zero_points[part])


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def tiles_of(weight: PackedWeight) -> np.ndarray:
    tiles = weight.packed.numpy()
    assert tiles.dtype == np.uint8 and tiles.shape == tuple(weight.packed.shape.numpy())
    return tiles


def dequantized(weight: PackedWeight, num_rows: int, num_columns: int) -> np.ndarray:
    return weight_of_tiles(tiles_of(weight), num_rows, num_columns, weight.bits, weight.block)


@BITS
def test_bytes_of_a_tile_lie_where_the_kernels_read_them(bits: int) -> None:
    """The layout, byte by byte, by the words of docs/cpu_kernels.md."""
    num_rows, block, num_blocks = 19, 32, 2
    codes = RNG.integers(0, 1 << bits, (num_rows, num_blocks, block)).astype(np.uint8)
    scales = RNG.uniform(0.5, 1, (num_rows, num_blocks)).astype(np.float32)
    zeros = RNG.integers(0, 1 << bits, (num_rows, num_blocks)).astype(np.uint8)
    rows = QuantizedBlocks(codes.reshape(-1, block), scales.reshape(-1), zeros.reshape(-1))
    tiles = pack_tiles(rows, bits, num_blocks)
    assert tiles.shape == (2, {4: 640, 8: 1152}[bits]) and tiles.shape[1] == tile_bytes(64, bits, block)
    block_bytes = 16 * block * bits // 8
    for t, tile in enumerate(tiles):
        after = num_blocks * block_bytes
        found_scales = tile[after : after + 64].view(np.float16).reshape(num_blocks, 16)
        found_zeros = tile[after + 64 : after + 96].reshape(num_blocks, 16)
        unit = tile[after + 96 : after + 100].view(np.float32)[0]
        assert not tile[after + 100 :].any()
        for n in range(16):
            row = 16 * t + n
            for b in range(num_blocks):
                if row >= num_rows:
                    assert (found_scales[b, n], found_zeros[b, n]) == (0, 0)
                    continue
                assert found_scales[b, n] * unit == pytest.approx(scales[row, b], rel=2**-11)
                assert found_zeros[b, n] == zeros[row, b]
                for k in range(block):
                    g, j = divmod(k % (block // 2) if bits == 4 else k, 4)
                    byte = tile[b * block_bytes + (g * 16 + n) * 4 + j]
                    code = byte if bits == 8 else (byte & 15 if k < block // 2 else byte >> 4)
                    assert code == codes[row, b, k]


@BITS
@pytest.mark.parametrize("block", PACKED_BLOCKS)
@pytest.mark.parametrize(("num_rows", "num_columns"), [(1, 1), (16, 32), (17, 300), (100, 256), (33, 72)])
def test_a_weight_is_that_of_the_search(bits: int, block: int, num_rows: int, num_columns: int) -> None:
    array = normal(num_rows, num_columns)
    packed = PackedWeight(Rows(array), bits, block)
    codes, scales, zeros = parts_of_tiles(tiles_of(packed), num_columns, bits, block)
    padded = np.pad(array, ((0, 0), (0, -num_columns % block)))
    expected = quantize_blocks(padded.reshape(-1, block), bits)
    assert np.array_equal(codes[:num_rows].reshape(-1, block), expected.codes)
    assert np.array_equal(zeros[:num_rows].reshape(-1), expected.zero_points)
    np.testing.assert_allclose(scales[:num_rows].reshape(-1), expected.scales, rtol=2**-11)
    # What is missing stands for zeros, whatever a kernel multiplies it by.
    assert (codes[:num_rows].reshape(num_rows, -1)[:, num_columns:] == zeros[:num_rows, -1:]).all()
    assert not codes[num_rows:].any() and not scales[num_rows:].any() and not zeros[num_rows:].any()


@BITS
@pytest.mark.parametrize("kind", [np.float16, "bfloat16"])
def test_held_codes_and_their_scales_are_kept_to_the_bit(bits: int, kind: Any) -> None:
    import ml_dtypes

    dtype = ml_dtypes.bfloat16 if kind == "bfloat16" else kind
    scales = np.abs(RNG.standard_normal((37, 3))).astype(dtype).astype(np.float32) + np.float32(2**-10)
    scales = scales.astype(dtype).astype(np.float32)
    held = Held((37, 90), bits, 32, scales)
    packed = PACKED_STORAGE.product(held, WeightFormat("blockwise", bits, 128), is_table=False)
    assert isinstance(packed, PackedWeight) and packed.block == 32
    expected = np.concatenate([block.copy() for block in held.blocks()]).reshape(37, 90)
    assert np.array_equal(dequantized(packed, 37, 90), expected)


@BITS
def test_scales_of_any_size_keep_11_bits_beside_a_row_that_is_100_million_times_as_large(bits: int) -> None:
    tiny = np.float32(1e-30)
    arrays = {
        "tiny": normal(16, 64) * tiny,
        "huge": normal(16, 64) * np.float32(1e16),
        "one row of outliers": normal(16, 64) * np.where(np.arange(16) == 7, 1e8, 1)[:, None].astype(np.float32),
        "zeros": np.zeros((16, 64), np.float32),
        "subnormal": np.full((16, 64), 1e-42, np.float32),
    }
    for name, array in arrays.items():
        expected = quantize_blocks(array.reshape(-1, 32), bits).dequantize().reshape(array.shape)
        found = dequantized(PackedWeight(Rows(array), bits, 32), *array.shape)
        assert np.isfinite(found).all(), name
        np.testing.assert_allclose(found, expected, rtol=2**-11, atol=1e-44, err_msg=name)


def test_the_unit_is_a_power_of_two_that_puts_the_largest_scale_of_each_tile_below_2_to_the_15() -> None:
    sizes = np.logspace(-35, 16, 40)
    array = np.concatenate([normal(16, 32) * np.float32(size) for size in sizes])
    tiles = tiles_of(PackedWeight(Rows(array), 8, 32))
    for tile, size in zip(tiles, sizes, strict=True):
        scales, unit = tile[512:544].view(np.float16), tile[560:564].view(np.float32)[0]
        assert np.frexp(unit)[0] == 0.5 and unit >= np.finfo(np.float32).tiny
        if size > 1e-30:
            assert 2**14 <= scales.max() <= 2**15
        assert np.isfinite(scales).all()


def test_rows_of_several_sources_share_tiles() -> None:
    arrays = [normal(rows, 40) for rows in (5, 20, 1, 23)]
    joined = ConcatenatedTensor("qkv", [Rows(array) for array in arrays])
    whole = PackedWeight(Rows(np.concatenate(arrays)), 4, 32)
    assert np.array_equal(tiles_of(PackedWeight(joined, 4, 32)), tiles_of(whole))


def test_tiles_are_made_as_their_rows_are_read() -> None:
    """Memory does not grow with the weight: 64 times as many rows, one megabyte more."""

    def peak(num_rows: int) -> int:
        held = Held((16, 4096), 8, 128, RNG.uniform(1, 2, (16, 32)), rows=16)
        (chunk,) = held.quantized_rows()

        class Long(Held):
            def __init__(self) -> None:
                GroupQuantizedTensor.__init__(self, "long", (num_rows, 4096), 8, 128)

            def quantized_rows(self) -> Iterator[QuantizedBlocks]:
                for _ in range(num_rows // 16):
                    yield chunk

        weight = PackedWeight(Long(), 8, 128)
        tracemalloc.start()
        num_bytes = sum(block.nbytes for block in weight.packed.blocks())
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert num_bytes == weight.packed.nbytes
        return found

    assert peak(1024) < peak(16) + (1 << 20)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_named(bad: float) -> None:
    array = normal(50, 64)
    array[45, 6] = bad
    with pytest.raises(BundleError, match=f"layers.3.weight: {bad} at row 45, column 6"):
        list(PackedWeight(Rows(array, "layers.3.weight"), 4, 32).packed.blocks())


@pytest.mark.parametrize(
    ("columns", "block", "is_table", "expected"),
    [
        (256, 128, False, 128),
        (192, 128, False, 128),  # the last block is padded
        (192, 128, True, 64),  # a finer one, without padding
        (48, 128, True, 128),  # 32 does not divide it either
        (256, 256, True, 256),
        (256, 16, False, 32),
        (16, 16, True, 32),
    ],
)
def test_blocks_of_weights_and_tables(columns: int, block: int, is_table: bool, expected: int) -> None:
    tensor, weight_format = Rows(normal(3, columns)), WeightFormat("blockwise", 4, block)
    assert PACKED_STORAGE.block(tensor, weight_format, is_table=is_table) == expected
    stored = PACKED_STORAGE.product(tensor, weight_format, is_table=is_table)
    assert isinstance(stored, PackedWeight) and stored.block == expected
    if is_table:
        table = PACKED_STORAGE.table(tensor, weight_format)
        assert isinstance(table, PackedWeight) and table.block == expected


def test_what_the_kernels_do_not_read_is_stored_for_onnx_runtime() -> None:
    held = Held((8, 32), 4, 16, RNG.uniform(1, 2, (8, 2)))
    four, eight = (WeightFormat("blockwise", bits, 128) for bits in (4, 8))
    stored = PACKED_STORAGE.product(held, four, is_table=True)
    assert isinstance(stored, BlockwiseWeight) and stored.block == 16
    assert isinstance(PACKED_STORAGE.product(held, eight, is_table=True), PackedWeight)  # rounded anew in any case
    assert isinstance(PACKED_STORAGE.product(held, WeightFormat("rowwise"), is_table=False), RowwiseWeight)
    assert PACKED_STORAGE.table(held, WeightFormat("rowwise")) is None
    with pytest.raises(TargetError, match="float8"):
        PACKED_STORAGE.product(held, WeightFormat("float8"), is_table=False)
