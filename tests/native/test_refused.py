"""Inputs and attributes that are wrong end in a message, of every operator, and never in a crash."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from helpers import ROOT
from helpers.native_attention import SUFFIXES, Call, Heads
from helpers.native_graphs import ATTENTION_INPUTS, PRODUCT_INPUTS, Array, random_weight, run_op
from helpers.own_kernels import needs_own_kernels

pytestmark = [needs_own_kernels, pytest.mark.portable]
BITS = pytest.mark.parametrize("bits", [4, 8])
# 2 tiles of 2 blocks.
N, K, BLOCK = 20, 50, 32
SIZES = {"K": K, "N": N, "block_size": BLOCK}
HUGE = 1 << 40


def numbers(*shape: int) -> Array:
    return np.ones(shape, np.float32)


def product(bits: int, attributes: dict[str, Any], **inputs: Array) -> Array:
    given = {"x": numbers(3, K), "weight": random_weight(N, K, BLOCK, bits).tiles, **inputs}
    return run_op(f"MatMulInt{bits}", given, PRODUCT_INPUTS, **attributes)[0]


@BITS
@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        ({"x": numbers(3, K + 1)}, "rows of x have 51 elements, expected 50"),
        ({"x": numbers(3, 2 * K)}, "rows of x have 100 elements, expected 50"),
        ({"x": numbers(K, 3)}, "rows of x have 3 elements"),
        ({"x": numbers(3, 0)}, "rows of x have 0 elements"),
        ({"x": numbers()}, "rows of x have 0 elements"),
        ({"x": numbers(1, 1, 1, 1, 1, 1, 1, 1, K)}, "input 0 has 9 axes"),
        ({"weight": np.zeros((2, 64), np.uint8)}, "a packed weight of N = 20, K = 50"),
        ({"weight": np.zeros((0, 0), np.uint8)}, "a packed weight of N = 20, K = 50"),
        ({"weight": np.zeros(640, np.uint8)}, "a packed weight of N = 20, K = 50"),
        ({"weight": np.zeros((1, 2, 640), np.uint8)}, "a packed weight of N = 20, K = 50"),
        ({"bias": numbers(N - 1)}, "bias has 19 elements, expected 20"),
        ({"bias": numbers(32)}, "bias has 32 elements, expected 20"),
        ({"bias": numbers(0)}, "bias has 0 elements, expected 20"),
        ({"norm": numbers(K + 1)}, "norm has 51 elements, expected 50"),
        ({"norm": numbers(0)}, "norm has 0 elements, expected 50"),
        ({"residual": numbers(2, N)}, "residual has 40 elements, expected 60"),
        ({"residual": numbers(0, N)}, "residual has 0 elements, expected 60"),
        ({"residual": numbers(N, 3)}, "rows of the residual have 3 elements, expected 20"),
        ({"residual": numbers(1, N)}, "residual has 20 elements, expected 60"),
        ({"residual": numbers(N)}, "residual has 20 elements, expected 60"),
    ],
)
def test_inputs_of_a_product(bits: int, inputs: dict[str, Array], reason: str) -> None:
    with pytest.raises(Exception, match=re.escape(reason)):
        product(bits, SIZES, **inputs)


@BITS
@pytest.mark.parametrize("name", ["bias", "norm", "residual"])
def test_constants_without_elements(bits: int, name: str) -> None:
    """They have no memory, as inputs that are not there."""
    given = {"x": numbers(3, K), "weight": random_weight(N, K, BLOCK, bits).tiles}
    constants = {name: numbers(0)}
    with pytest.raises(Exception, match=f"{name} has 0 elements"):
        run_op(f"MatMulInt{bits}", given, PRODUCT_INPUTS, constants=constants, **SIZES)


@BITS
def test_inputs_of_a_gated_product(bits: int) -> None:
    gated = {**SIZES, "gated": 1}
    assert product(bits, gated, x=numbers(3, 2 * K)).shape == (3, N)
    with pytest.raises(Exception, match="rows of x have 50 elements, expected 100"):
        product(bits, gated)
    with pytest.raises(Exception, match="gated and norm exclude each other"):
        product(bits, gated, x=numbers(3, 2 * K), norm=numbers(K))


SIZE_ERRORS = [
    *(
        ({"block_size": size}, f"block_size is {size}, expected 32, 64, 128 or 256")
        for size in (0, -32, 16, 33, 512, HUGE)
    ),
    *(({"K": size}, f"K = {size}, N = 20: expected 1 to 2147483647") for size in (0, -1, 1 << 31, HUGE, 1 << 62)),
    *(({"N": size}, f"K = 50, N = {size}: expected 1 to 2147483647") for size in (0, -20, 1 << 31, HUGE, 1 << 62)),
    ({"K": 65}, "a packed weight of N = 20, K = 65"),
    ({"N": 33}, "a packed weight of N = 33, K = 50"),
    ({"N": (1 << 31) - 1}, "a packed weight of N = 2147483647, K = 50"),
    ({"K": (1 << 31) - 1}, "a packed weight of N = 20, K = 2147483647"),
]


@BITS
@pytest.mark.parametrize(("wrong", "reason"), SIZE_ERRORS)
def test_sizes(bits: int, wrong: dict[str, int], reason: str) -> None:
    attributes = {**SIZES, **wrong}
    weight = random_weight(N, K, BLOCK, bits).tiles
    with pytest.raises(Exception, match=re.escape(reason)):
        run_op(
            f"LookUpInt{bits}",
            {"indices": np.zeros(1, np.int64), "weight": weight},
            ("indices", "weight"),
            **attributes,
        )
    if "a packed weight" in reason and attributes["K"] != K:
        return  # the product looks at x first
    with pytest.raises(Exception, match=re.escape(reason)):
        product(bits, attributes)


@BITS
@pytest.mark.parametrize("name", SIZES)
def test_missing_sizes(bits: int, name: str) -> None:
    with pytest.raises(Exception, match=f"ttribute.*{name}"):
        product(bits, {key: value for key, value in SIZES.items() if key != name})


@BITS
@pytest.mark.parametrize("index", [-1, N, 1 << 31, -(1 << 63), (1 << 63) - 1])
def test_indices(bits: int, index: int) -> None:
    weight = random_weight(N, K, BLOCK, bits)
    with pytest.raises(Exception, match=f"index {index}, expected 0 to 19"):
        weight.look_up(np.array([0, 1, index, 2]))
    assert weight.look_up(np.array([0, 1, 19, 2])).shape == (4, K)


@BITS
def test_indices_of_many_axes(bits: int) -> None:
    weight = random_weight(N, K, BLOCK, bits)
    assert weight.look_up(np.zeros([1] * 7, np.int64)).shape == (*[1] * 7, K)
    with pytest.raises(Exception, match="indices have 8 axes"):
        weight.look_up(np.zeros([1] * 8, np.int64))


@pytest.fixture(params=SUFFIXES)
def call(request: pytest.FixtureRequest) -> Call:
    """Two sequences in caches of 9 rows."""
    return Call(request.param, [5, 0], 2, num_free=2)


@pytest.mark.parametrize("name", ATTENTION_INPUTS)
def test_inputs_of_attention_of_other_shapes(call: Call, name: str) -> None:
    if name not in call.inputs:
        pytest.skip(f"this cache has no {name}")
    array = call.inputs[name]
    others = [np.concatenate([array, array], axis=axis) for axis in range(array.ndim)]
    others += [np.delete(array, -1, axis) for axis in range(array.ndim)]
    others += [array[None], np.zeros([0] * array.ndim, array.dtype)]
    if name.startswith("past_") and name != "past_lengths":
        others = [*others[:2], *others[3:6], *others[7:]]  # caches of other lengths, if both are
    for other in others:
        if other.size == array.size and name.endswith("_scales"):
            continue  # of any shape
        with pytest.raises(Exception, match=r"expected|exceeds") as caught:
            call.run(**{name: np.ascontiguousarray(other)})
        assert "DecodeAttention" in str(caught.value)


def test_caches_of_two_lengths(call: Call) -> None:
    with pytest.raises(Exception, match="past_value is"):
        call.run(past_value=np.ascontiguousarray(call.inputs["past_value"][:, :, :-1]))


@pytest.mark.parametrize("length", [-1, 8, 9, 1 << 31, 1 << 40, -(1 << 63), (1 << 63) - 1])
def test_lengths_that_the_cache_does_not_hold(call: Call, length: int) -> None:
    with pytest.raises(
        Exception, match=rf"past_lengths\[1\] is {length}: with 2 new tokens it exceeds the cache of 9 rows"
    ):
        call.run(past_lengths=np.array([5, length]))
    out, *_ = call.run(past_lengths=np.array([5, 7]))
    assert out.shape == (2, 2, 128)


@pytest.mark.parametrize("head_dim", [8, 24, 40, 272])
def test_heads_of_other_sizes(head_dim: int) -> None:
    with pytest.raises(Exception, match=f"heads of {head_dim} channels, expected a multiple of 16 up to 256"):
        Call("", [3], 1, Heads(head_dim=head_dim)).run()


@pytest.mark.parametrize(
    ("num_heads", "num_kv"),
    [(0, 2), (4, 0), (-4, 2), (4, -2), (3, 2), (2, 4), (1 << 32, 2), (1 << 62, 1 << 61), (-(1 << 63), -1)],
)
def test_numbers_of_heads(call: Call, num_heads: int, num_kv: int) -> None:
    attributes = {**call.heads.attributes, "num_heads": num_heads, "kv_num_heads": num_kv}
    with pytest.raises(Exception, match=f"num_heads = {num_heads}, kv_num_heads = {num_kv}: expected"):
        run_op(f"DecodeAttention{call.suffix}", call.inputs, tuple(call.inputs), 3, **attributes)


@pytest.mark.parametrize("name", ["num_heads", "kv_num_heads", "scale", "epsilon"])
def test_missing_attributes_of_attention(call: Call, name: str) -> None:
    attributes = {key: value for key, value in call.heads.attributes.items() if key != name}
    with pytest.raises(Exception, match=f"ttribute.*{name}"):
        run_op(f"DecodeAttention{call.suffix}", call.inputs, tuple(call.inputs), 3, **attributes)


OLD_RUNTIME = """
import ctypes
from runtime import native

library = ctypes.CDLL(str(native.LIBRARY))
said = []

@ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)
def create_status(code, message):
    said.append((code, message.decode()))
    return 4711

table = (ctypes.c_void_p * 1)(ctypes.cast(create_status, ctypes.c_void_p))

@ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)
def get_api(version):
    return ctypes.addressof(table) if version <= 16 else None

@ctypes.CFUNCTYPE(ctypes.c_void_p)
def get_version():
    return ctypes.cast(ctypes.c_char_p(b"1.16.3"), ctypes.c_void_p).value

base = (ctypes.c_void_p * 2)(ctypes.cast(get_api, ctypes.c_void_p), ctypes.cast(get_version, ctypes.c_void_p))
register = library.RegisterCustomOps
register.restype, register.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_void_p]
status = register(None, ctypes.addressof(base))
assert status == 4711, status
print(said)
"""


def test_an_onnxruntime_that_is_too_old() -> None:
    done = subprocess.run([sys.executable, "-c", OLD_RUNTIME], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "need ONNX Runtime's C interface of version 17, which release 1.16.3 does not offer" in done.stdout
