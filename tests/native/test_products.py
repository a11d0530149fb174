"""MatMulInt4, MatMulInt8, LookUpInt4 and LookUpInt8 of every instruction set compute what their definition says.

Where activations are whole numbers times a factor, nothing is lost by their rounding to 8 bits, and what is left is the
rounding of a few float32 numbers, whose bound is known. Other activations are off by half a step at most.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from helpers.cpu_ops import matmul, rms_norm, swiglu
from helpers.native_graphs import BLOCKS, Array, Weight, random_weight, same_bits, whole_rows
from helpers.own_kernels import needs_own_kernels

pytestmark = [needs_own_kernels, pytest.mark.portable]
BITS = pytest.mark.parametrize("bits", [4, 8])
# Kernels take few rows, many, and what is left of panels of 96 by different ways.
NUM_ROWS = (*range(1, 18), 33, 96, 97, 200)
# Rows of W fill tiles or not, columns fill blocks or not.
SHAPES = {32: (1, 32), 64: (15, 63), 128: (16, 300), 256: (17, 513)}


def check(found: Array, x: Array, weight: Array | Weight, rounding: Array) -> None:
    values = weight.values if isinstance(weight, Weight) else weight
    expected = x.astype(np.float64) @ values.T
    assert found.dtype == np.float32 and found.shape == expected.shape
    wrong = np.abs(found - expected) - rounding
    assert wrong.max(initial=-1) <= 0, f"{wrong.max()} at {np.unravel_index(wrong.argmax(), wrong.shape)}"


@BITS
@pytest.mark.parametrize("block", BLOCKS)
def test_products_of_any_number_of_rows(isa: str, bits: int, block: int) -> None:
    weight = random_weight(*SHAPES[block], block, bits)
    for num_rows in NUM_ROWS:
        x = whole_rows(num_rows, weight.num_columns, block, seed=num_rows)
        check(weight.multiply(x), x, weight, weight.rounding(x))


@BITS
@pytest.mark.parametrize("num_rows", [1, 15, 16, 17, 100])
def test_products_with_any_number_of_outputs(isa: str, bits: int, num_rows: int) -> None:
    for num_columns, block in ((1, 32), (31, 32), (33, 32), (129, 64), (640, 128), (255, 256)):
        weight = random_weight(num_rows, num_columns, block, bits)
        for x in (whole_rows(m, num_columns, block, seed=m) for m in (1, 3, 40)):
            check(weight.multiply(x), x, weight, weight.rounding(x))


def end_patterns(count: int, low: int, high: int) -> dict[str, Array]:
    """Rows of a range's ends and middle."""
    turns = np.arange(count)
    random = np.random.default_rng(count)
    return {
        "high": np.full(count, high),
        "low": np.full(count, low),
        "in turn": np.where(turns % 2, low, high),
        "halves": np.where(turns < count // 2, low, high),
        "middle": np.full(count, (low + high + 1) // 2),
        "either": random.choice([low, high], count),
    }


@BITS
@pytest.mark.parametrize("block", BLOCKS)
def test_ends_of_all_ranges(isa: str, bits: int, block: int) -> None:
    """Every pattern of codes with every pattern of zero points, times every pattern of activations."""
    num_blocks, top = 3, (1 << bits) - 1
    num_columns = num_blocks * block
    of_codes, of_zeros = end_patterns(num_columns, 0, top), end_patterns(num_blocks, 0, top)
    pairs = list(itertools.product(of_codes.values(), of_zeros.values()))
    weight = Weight(
        np.stack([codes for codes, _ in pairs]),
        np.ones((len(pairs), num_blocks)),
        np.stack([zeros for _, zeros in pairs]),
        block,
        bits,
    )
    x = np.stack(list(end_patterns(num_columns, -127, 127).values())).astype(np.float32)
    x[4, ::block] = 127  # a row of zeros and one other number
    for times in (1, 2, 7):
        rows = np.tile(x, (times, 1))
        # All are whole numbers, whose sums float32 holds.
        assert np.array_equal(weight.multiply(rows), rows.astype(np.float64) @ weight.values.T)
    for row in x:
        assert np.array_equal(weight.multiply(row[None]), row[None].astype(np.float64) @ weight.values.T)


@BITS
def test_scales_of_any_size(isa: str, bits: int) -> None:
    """Scales of a tile reach over 2^29, and tiles over all of float32; those of 0 make rows of 0."""
    random = np.random.default_rng(bits)
    num_tiles, num_blocks, block = 12, 4, 32
    shape = (16 * num_tiles, num_blocks)
    scales = np.ldexp(1 + random.random(shape), random.integers(-12, 1, shape))
    scales *= np.repeat(2.0 ** np.linspace(-110, 90, num_tiles).round(), 16)[:, None]
    scales[3], scales[32:48], scales[50, 2] = 0, 0, 0
    codes, zeros = random.integers(0, 1 << bits, (len(scales), 128)), random.integers(0, 1 << bits, shape)
    weight = Weight(codes, scales, zeros, block, bits)
    for num_rows in (1, 40):
        x = np.sign(whole_rows(num_rows, 128, block)) * np.float32(127)
        found = weight.multiply(x)
        check(found, x, weight, weight.rounding(x))
        assert not found[:, 3].any() and not found[:, 32:48].any() and np.isfinite(found).all()
    rows = weight.look_up(np.arange(len(scales)))
    assert np.array_equal(rows, weight.values.astype(np.float32))


@BITS
def test_activations_of_any_size(isa: str, bits: int) -> None:
    weight = random_weight(20, 256, 128, bits)
    x = np.sign(whole_rows(31, 256, 128)) * np.float32(127)
    x *= np.float32(2) ** np.linspace(-100, 80, len(x)).round().astype(np.float32)[:, None]
    check(weight.multiply(x), x, weight, weight.rounding(x))
    # Below what a reciprocal of float32 can scale, a block is 0.
    for size in (1e-45, 1e-38, 1e-37):
        found = weight.multiply(np.full((5, 256), size, np.float32))
        assert np.abs(found).max() <= 1.1 * size * np.abs(weight.values).sum(-1).max()


@BITS
def test_rows_of_zeros(isa: str, bits: int) -> None:
    weight = random_weight(33, 200, 64, bits)
    bias = np.linspace(-3, 3, 33).astype(np.float32)
    x = whole_rows(20, 200, 64)
    x[::3], x[1, :64], x[4, 192:] = 0, 0, -0.0
    found = weight.multiply(x, bias=bias)
    assert (found[::3] == bias).all()
    check(found - bias, x, weight, weight.rounding(x) + 1e-6 * np.abs(found))


@BITS
@pytest.mark.parametrize("block", BLOCKS)
def test_activations_are_off_by_half_a_step(isa: str, bits: int, block: int) -> None:
    weight = random_weight(37, 2 * block + 8, block, bits)
    for num_rows in (1, 5, 40):
        x = np.random.default_rng(num_rows).standard_normal((num_rows, weight.num_columns)).astype(np.float32)
        steps = step_sizes(x, block)
        half = 0.5001 * steps @ np.abs(weight.values).T
        check(weight.multiply(x), x, weight, half + weight.rounding(x))
        # It does round: a product of the numbers themselves is another.
        assert not np.allclose(weight.multiply(x), x @ weight.values.T, rtol=0, atol=1e-6)
        rounded = matmul(x, weight.values, block=block)
        assert np.linalg.norm(weight.multiply(x) - rounded) < 1e-3 * np.linalg.norm(rounded)


def step_sizes(x: Array, block: int) -> Array:
    """For each number [M, K], the step of the 8 bits that its block is rounded to."""
    steps = np.empty(x.shape)
    for start in range(0, x.shape[1], block):
        steps[:, start : start + block] = np.abs(x[:, start : start + block]).max(-1, keepdims=True) / 127
    return steps


def one_of_a_block(num_columns: int, block: int, place: int) -> Array:
    """A mask [K] of one column in each block: a block with one number is rounded to that number."""
    mask = np.zeros(num_columns, np.float32)
    mask[place::block] = 1
    return mask


@BITS
@pytest.mark.parametrize(("num_columns", "block"), [(128, 32), (200, 64), (1027, 128), (520, 256)])
def test_norm(isa: str, bits: int, num_columns: int, block: int) -> None:
    weight = random_weight(21, num_columns, block, bits)
    random = np.random.default_rng(num_columns)
    x = random.standard_normal((18, num_columns)).astype(np.float32) * 2.0 ** np.arange(-9, 9)[:, None]
    x = x.astype(np.float32)
    x[7], x[8, 1:] = 0, 0
    for place, epsilon in ((0, 1e-6), (7, 0.5)):
        norm = (1 + random.random(num_columns).astype(np.float32)) * one_of_a_block(num_columns, block, place)
        for rows in (x[:1], x[7:9], x):
            factors = rms_norm(rows, norm, np.float32(epsilon))
            check(
                weight.multiply(rows, norm=norm, epsilon=epsilon),
                factors,
                weight,
                weight.rounding(factors) + 1e-6 * np.abs(factors) @ np.abs(weight.values).T,
            )


@BITS
@pytest.mark.parametrize(("num_columns", "block"), [(128, 32), (200, 64), (1027, 128), (520, 256)])
def test_gate(isa: str, bits: int, num_columns: int, block: int) -> None:
    weight = random_weight(21, num_columns, block, bits)
    random = np.random.default_rng(num_columns)
    gate = random.standard_normal((18, num_columns)) * np.array([0.1, 1, 3, 30, 100, 1e4])[np.arange(18) % 6, None]
    for place in (0, 7):
        up = random.standard_normal((18, num_columns)) * one_of_a_block(num_columns, block, place)
        x = np.concatenate([gate, up], -1).astype(np.float32)
        for rows in (x[:1], x[4:6], x):
            factors = swiglu(rows)
            check(
                weight.multiply(rows, gated=1),
                factors,
                weight,
                # silu of gates below -87 is less than float32's normal numbers.
                weight.rounding(factors) + (1e-6 * np.abs(factors) + 1e-35) @ np.abs(weight.values).T,
            )


@BITS
@pytest.mark.parametrize("kind", ["plain", "norm", "gated"])
def test_norm_and_gate_of_full_rows(isa: str, bits: int, kind: str) -> None:
    """With bias and residual, and without."""
    block, num_columns = 64, 328
    weight = random_weight(50, num_columns, block, bits)
    random = np.random.default_rng(5)
    norm = random.standard_normal(num_columns).astype(np.float32)
    for num_rows in (1, 4, 50):
        x = random.standard_normal((num_rows, num_columns * (2 if kind == "gated" else 1))).astype(np.float32)
        factors = swiglu(x) if kind == "gated" else rms_norm(x, norm, 1e-6) if kind == "norm" else x.astype(np.float64)
        bound = 0.501 * step_sizes(factors, block) @ np.abs(weight.values).T + 1e-4
        bias, residual = (random.standard_normal(shape).astype(np.float32) * 9 for shape in ((50,), (num_rows, 50)))
        given = {"norm": norm} if kind == "norm" else {}
        plain = weight.multiply(x, gated=int(kind == "gated"), **given)
        check(plain, factors, weight, bound)
        for more, extra in (({"bias": bias}, bias), ({"residual": residual}, residual)):
            found = weight.multiply(x, gated=int(kind == "gated"), **given, **more)
            assert np.allclose(found, plain.astype(np.float64) + extra, rtol=3e-7, atol=3e-6)
        both = weight.multiply(x, gated=int(kind == "gated"), **given, bias=bias, residual=residual)
        assert np.allclose(both, plain.astype(np.float64) + bias + residual, rtol=3e-7, atol=3e-6)


@BITS
@pytest.mark.parametrize("kind", ["plain", "norm", "gated"])
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_none_stays_in_its_row(isa: str, bits: int, kind: str, number: float) -> None:
    weight = random_weight(35, 300, 128, bits)
    norm = {"norm": np.ones(300, np.float32)} if kind == "norm" else {}
    for num_rows in (2, 5, 17, 100):
        x = whole_rows(num_rows, 600 if kind == "gated" else 300, 128)
        clean = weight.multiply(x, gated=int(kind == "gated"), **norm)
        x[1, 299] = number
        found = weight.multiply(x, gated=int(kind == "gated"), **norm)
        others = np.arange(num_rows) != 1
        assert same_bits(found[others], clean[others])
        if kind != "gated" or number != -np.inf:  # silu of minus infinity is 0 or NaN
            assert np.isnan(found[1]).all()


@BITS
def test_shapes_of_x(isa: str, bits: int) -> None:
    weight = random_weight(19, 70, 32, bits)
    x = whole_rows(12, 70, 32)
    expected = weight.multiply(x)
    residual = np.random.default_rng(0).standard_normal((12, 19)).astype(np.float32)
    added = weight.multiply(x, residual=residual)
    for shape in ((3, 4), (12, 1), (1, 12), (2, 1, 3, 2)):
        assert same_bits(weight.multiply(x.reshape(*shape, 70)), expected.reshape(*shape, 19))
        found = weight.multiply(x.reshape(*shape, 70), residual=residual.reshape(*shape, 19))
        assert same_bits(found, added.reshape(*shape, 19))
    assert same_bits(weight.multiply(x[5]), expected[5])


@BITS
def test_no_rows(isa: str, bits: int) -> None:
    weight = random_weight(19, 70, 32, bits)
    for shape in ((0,), (0, 3), (3, 0)):
        assert weight.multiply(np.zeros((*shape, 70), np.float32)).shape == (*shape, 19)
        assert weight.multiply(np.zeros((*shape, 140), np.float32), gated=1).shape == (*shape, 19)
        assert weight.look_up(np.zeros(shape, np.int64)).shape == (*shape, 70)
        residual = np.zeros((*shape, 19), np.float32)
        assert weight.multiply(np.zeros((*shape, 70), np.float32), residual=residual).shape == (*shape, 19)


@BITS
@pytest.mark.parametrize("block", BLOCKS)
def test_rows_are_looked_up(isa: str, bits: int, block: int) -> None:
    for num_rows, num_columns in ((1, 1), (15, block), (16, block + 1), (17, 2 * block - 1), (100, 3 * block)):
        weight = random_weight(num_rows, num_columns, block, bits)
        rows = weight.values.astype(np.float32)
        # Scale and unit are multiplied first, then the code's distance from the zero point.
        every = np.arange(num_rows)
        assert np.allclose(weight.look_up(every), rows, rtol=2e-7, atol=0)
        some = np.array([[num_rows - 1, 0], [0, num_rows // 2]])
        assert same_bits(weight.look_up(some), weight.look_up(every)[some])
        assert same_bits(weight.look_up(np.array(num_rows - 1)), weight.look_up(every)[-1])
