"""Elements of a KV cache in the type of another: exact into more bits, rounded to the nearest into fewer."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from runtime.errors import EngineError
from runtime.moved_rows import FLOATS, converted, rounds

EVERY_16 = np.arange(1 << 16, dtype=np.uint16).reshape(1, -1, 16)


def of_type(bits: np.ndarray, dtype: str) -> np.ndarray:
    return bits if dtype == "bfloat16" else bits.view(dtype)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_number_of_16_bits_goes_to_float32_and_back(dtype: str) -> None:
    values = of_type(EVERY_16, dtype)
    if dtype == "float16":
        values = np.where(np.isfinite(values), values, np.float16(0))
    (wide,) = converted([values], dtype, "float32")
    assert wide.dtype == np.float32
    (back,) = converted([wide], "float32", dtype)
    is_nan = np.isnan(wide)
    np.testing.assert_array_equal(back.view(np.uint16)[~is_nan], values.view(np.uint16)[~is_nan])
    assert not is_nan.any() or np.isnan(converted([back], dtype, "float32")[0][is_nan]).all()


def test_rounding_is_that_of_pytorch() -> None:
    torch = pytest.importorskip("torch")
    generator = np.random.default_rng(0)
    values = generator.normal(size=(3, 500, 4)).astype(np.float32) * np.float32(10) ** generator.integers(
        -30, 4, (3, 500, 4)
    )
    bits = values.view(np.uint32)
    bits[0] = (bits[0] & 0xFFFF0000) | 0x8000  # halfway between two of bfloat16
    (half,), (brain,) = converted([values], "float32", "float16"), converted([values], "float32", "bfloat16")
    np.testing.assert_array_equal(half, torch.from_numpy(values).half().numpy())
    expected = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(brain, expected)


def test_numbers_that_are_none_stay_none() -> None:
    values = np.array([[[np.nan, np.inf, -np.inf]]], np.float32)
    hidden = np.array([[[0x7F800001]]], np.uint32).view(np.float32)  # a NaN whose upper half is that of infinity
    (brain,) = converted([values], "float32", "bfloat16")
    np.testing.assert_array_equal(converted([brain], "bfloat16", "float32")[0], values)
    (brain,) = converted([hidden], "float32", "bfloat16")
    assert np.isnan(converted([brain], "bfloat16", "float32")[0]).all()


def test_what_float16_does_not_hold_is_refused() -> None:
    values = np.array([[[65504.0, -70000.0]]], np.float32)
    with pytest.raises(EngineError, match="a key or value of 7e\\+04 does not fit float16") as caught:
        converted([values], "float32", "float16")
    assert "bfloat16 or float32" in caught.value.remedy
    (half,) = converted([values[..., :1]], "float32", "float16")
    assert half[0, 0, 0] == np.float16(65504)


def test_the_same_type_is_not_copied() -> None:
    codes = np.arange(8, dtype=np.int8).reshape(1, 2, 4)
    assert converted([codes], "int8", "int8")[0] is codes


def test_which_types_lose_bits() -> None:
    lossless = {(a, b) for a, b in itertools.product(sorted(FLOATS), repeat=2) if not rounds(a, b)}
    same = {(each, each) for each in FLOATS}
    assert lossless == same | {("float16", "float32"), ("bfloat16", "float32")}
