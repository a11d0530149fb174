"""The types of activations and caches that the kernels take."""

from __future__ import annotations

from engines.kernels.launch import Unserved

_POINTERS = {"float16": "*fp16", "bfloat16": "*bf16"}


def pointer(dtype: str) -> str:
    """Return Triton's name of a pointer to a half type.

    Raises:
        Unserved: The type is not a half one.
    """
    if dtype not in _POINTERS:
        raise Unserved(f"activations are {dtype}; the kernels take {' and '.join(_POINTERS)}")
    return _POINTERS[dtype]


def power_of_two(size: int) -> int:
    """Return the smallest power of two that is not below a positive size: what a block of Triton has."""
    return 1 << (size - 1).bit_length()
