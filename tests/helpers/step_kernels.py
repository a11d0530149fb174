"""Small kernels of Triton for the tests of whatever launches kernels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def embed_rows(ids, table, hidden, K: tl.constexpr, KP: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0)
    token = tl.load(ids + row)
    columns = tl.arange(0, KP)
    x = tl.load(table + token * K + columns, mask=columns < K, other=0.0)
    tl.store(hidden + row * K + columns, x, mask=columns < K)


@triton.jit
def count_steps(counter, capacity, scale, ASM: tl.constexpr, PDL: tl.constexpr):
    tl.store(counter, tl.load(counter) + 1)
    tl.store(counter + 1, capacity)
    tl.store(counter + 2, (capacity * scale).to(tl.int32))
