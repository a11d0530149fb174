"""How the KV cache stores each layer's keys and values, as the capabilities of a manifest say it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

MIXED = "mixed"
"""`cache_dtype` of an engine whose layers differ; `cache_layer_bits` then has the bits of each."""
DTYPE_OF_BITS: Mapping[int, str] = {32: "float32", 16: "float16", 8: "int8", 4: "uint8"}
"""Types of arrays by the bits of one channel; two of 4 bits share a byte."""
CODE_BITS = (8, 4)
"""Those that are codes, multiples of a scale."""


@dataclass(frozen=True)
class CacheType:
    """Type of one layer's arrays.

    Attributes:
        dtype: numpy name of their elements, or bfloat16, which numpy does not have.
        bits: Of one channel.
    """

    dtype: str
    bits: int

    def row_elements(self, head_dim: int) -> int:
        """Return how many elements hold the channels of a head."""
        return head_dim * self.bits // (8 * np.dtype(self.dtype).itemsize)


def cache_types(capabilities: Mapping[str, Any], num_layers: int) -> tuple[CacheType, ...]:
    """Return the type of each layer.

    Args:
        capabilities: Those of a manifest that was checked, or of a target.
        num_layers: Of the decoder.
    """
    dtype = str(capabilities["cache_dtype"])
    if dtype == MIXED:
        return tuple(CacheType(DTYPE_OF_BITS[bits], bits) for bits in capabilities["cache_layer_bits"])
    whole = 16 if dtype == "bfloat16" else 8 * np.dtype(dtype).itemsize
    return (CacheType(dtype, int(capabilities.get("cache_bits", whole))),) * num_layers


def code_bits(capabilities: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the numbers of bits of the codes that an engine's cache holds; none if it holds floats alone."""
    given = capabilities.get("cache_layer_bits", [capabilities.get("cache_bits")])
    return tuple(bits for bits in CODE_BITS if bits in given)


def cache_name(capabilities: Mapping[str, Any]) -> str | None:
    """Return what an engine's cache is called in reports and in configs/tolerances.toml; None for one of floats."""
    if capabilities.get("cache_dtype") == MIXED:
        return f"cache_{MIXED}"
    bits = code_bits(capabilities)
    return f"cache_int{bits[0]}" if bits else None
