"""What a CPU engine computes with, and the memory that kernels take by themselves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FLOAT_BYTES = 4
OWN, ROWWISE, FLOAT = "own", "rowwise", "float"
_BLOCK = 128
# Of glibc (mallopt(3), M_MMAP_THRESHOLD): the limit of what its heap keeps grows with what is freed, up to this.
_MMAP_BYTES = 32 << 20


@dataclass(frozen=True)
class Kernels:
    """What a CPU engine computes with.

    Attributes:
        vision: Products of the vision tower: `own` in blocks, `rowwise` integers of ONNX Runtime, or `float`.
        is_own: Whether the decoder has our own kernels, too.
        threads: Threads of the engine.
        l2_bytes: Of one core: ONNX Runtime's attention cuts its tiles by it.
    """

    vision: str
    is_own: bool
    threads: int
    l2_bytes: int

    @classmethod
    def of(cls, capabilities: Mapping[str, Any], threads: int, l2_bytes: int) -> Kernels:
        """Return those of an engine with these capabilities; of one on a GPU, float32 without tiles of attention."""
        if capabilities.get("device", "cpu") == "gpu":
            return cls(FLOAT, False, 0, l2_bytes)
        is_own = capabilities.get("custom_ops") is not None
        vision = OWN if is_own else FLOAT if capabilities.get("precision", "fp32") == "fp32" else ROWWISE
        return cls(vision, is_own, threads, l2_bytes)

    @property
    def is_quantised(self) -> bool:
        """Whether weights are stored in few bits."""
        return self.vision != FLOAT

    def attention_bytes(self, num_queries: int, num_keys: int, head_dim: int) -> int:
        """Return the tiles of ONNX Runtime's attention, of all threads.

        From onnxruntime/contrib_ops/cpu/bert (1.32): MlasFlashAttention takes as many keys as fit with
        their values into a quarter of the L2 cache, at most twice as many queries as a head has channels, and no more
        of either than there are.
        """
        fitting = max(1, self.l2_bytes // (4 * FLOAT_BYTES * 2 * head_dim))
        keys, queries = min(fitting, num_keys), min(fitting, 2 * head_dim, num_queries)
        return FLOAT_BYTES * self.threads * queries * (2 + keys + head_dim)

    def heap_bytes(self, products: Iterable[tuple[int, int]], others: Sequence[int] = ()) -> int:
        """Return what our own kernels take of the C library's heap: native/products_operators.cpp.

        A product takes rounded activations, a scale and a sum for each block, and a row of floats for each task of four
        rows. What is freed stays in the heap, and buffers of several sizes lie beside each other; but the largest, from
        `_MMAP_BYTES` on, are pages of their own, of which there is one at a time.

        Args:
            products: Rows and columns of what is multiplied; each shape counts once.
            others: Bytes of other buffers.
        """
        if not self.is_own:
            return 0
        sizes = [*others, *(_product_bytes(*shape) for shape in {*products})]
        pages = max((size for size in sizes if size >= _MMAP_BYTES), default=0)
        return sum(size for size in sizes if size < _MMAP_BYTES) + pages


def _product_bytes(rows: int, columns: int) -> int:
    return rows * columns + 2 * FLOAT_BYTES * rows * -(-columns // _BLOCK) + FLOAT_BYTES * -(-rows // 4) * columns


def telling_layers(num_layers: int, taps: Sequence[int]) -> list[int]:
    """Return the layers after which nothing new is allocated: the first two, those of DeepStack, and those after."""
    return sorted({layer for tap in (0, *taps) for layer in (tap, tap + 1) if layer < num_layers})
