"""Values and their indices as whole numbers, whose order is by value and then by falling index."""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-(2**63))
"""A key below all those of values."""


@triton.jit
def key_of(value, index):
    """Return int64 keys of float32 values at int32 indices: NaN below all numbers, zeros of either sign alike."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
    # The bits of negative numbers fall as the numbers rise, but for the sign.
    order = tl.where(value != value, -0x80000000, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    return (order.to(tl.int64) << 32) + (0x7FFFFFFF - index).to(tl.int64)


@triton.jit
def value_of(key):
    """Return the values of keys, float32."""
    order = (key >> 32).to(tl.int32)
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def index_of(key):
    """Return the indices of keys, int32."""
    return 0x7FFFFFFF - (key & 0x7FFFFFFF).to(tl.int32)
