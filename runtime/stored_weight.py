"""Where the bytes of an initializer lie in an engine's folder, and what they are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

# What DLPack calls an element (DLDataTypeCode, bits), by ONNX's number of its type (TensorProto.DataType).
_INT, _UINT, _FLOAT, _BFLOAT, _BOOL, _FLOAT8_E4M3FN, _FLOAT8_E5M2 = 0, 1, 2, 4, 6, 10, 12
ELEMENTS: Mapping[int, tuple[int, int]] = {
    1: (_FLOAT, 32),
    2: (_UINT, 8),
    3: (_INT, 8),
    6: (_INT, 32),
    7: (_INT, 64),
    9: (_BOOL, 8),
    10: (_FLOAT, 16),
    16: (_BFLOAT, 16),
    17: (_FLOAT8_E4M3FN, 8),
    19: (_FLOAT8_E5M2, 8),
    21: (_UINT, 4),
    22: (_INT, 4),
}


@dataclass(frozen=True)
class StoredWeight:
    """Where the bytes of an initializer lie, and what they are.

    Attributes:
        file: Name of a file in the engine's folder.
        offset: Of its first byte there.
        num_bytes: Its size.
        onnx_type: Element type as ONNX numbers it, one of `ELEMENTS`.
        shape: Its shape.
    """

    file: str
    offset: int
    num_bytes: int
    onnx_type: int
    shape: tuple[int, ...]


def stored_bytes(onnx_type: int, shape: tuple[int, ...]) -> int:
    """Return the size of a tensor, elements of 4 bits two in a byte."""
    return -(-math.prod(shape) * ELEMENTS[onnx_type][1] // 8)
