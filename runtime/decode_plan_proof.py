"""Whether a step of own kernels gives what ONNX Runtime's gives: the comparison of the first steps on a GPU and driver.

Kernels are compiled elsewhere, for a GPU that need not have been there, so what they compute here is seen here.

Shapes: B sequences, V vocabulary, N layers' keys and values, K kv heads, R rows, H head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.cache_rows import CacheRows, Rows
from runtime.contract import FloatArray, IntArray
from runtime.cuda import CudaDevice
from runtime.device_buffers import Staging
from runtime.device_cache import DeviceKVCache, from_bfloat16

# Largest difference of two logits as a share of their spread, and of two numbers of a new row as one of its largest.
# Half a unit in the last place at each of some 60 additions to the hidden state is a relative error of 2^-11 · √60 =
# 0.4 % of a logit's standard deviation in float16 and 3 % in bfloat16; among 150 000 logits one is off by 4.5 times
# that, and their spread is about 9 deviations: 0.2 % and 1.5 %. A wrong step is off by tens of per cent.
_BOUNDS = {"float16": 0.02, "bfloat16": 0.06}
# Where two experts are nearly even, rounding decides which one is taken.
_WITH_EXPERTS = 4.0
_BLANK = 0xFFFF  # NaN in both types


@dataclass(frozen=True)
class StepResult:
    """What a step leaves.

    Attributes:
        logits_BV: All logits.
        rows: Of each sequence, the bits of the rows of the cache around the new one, [N, K, R, H].
    """

    logits_BV: FloatArray
    rows: list[Rows]


class StepWindow:
    """The rows of a cache that a step may write, and those beside them, which it may not.

    Args:
        device: Where.
        staging: Copies.
        cache: The cache.
        slot: Slot of the first sequence.
        past_B: Rows of each sequence before the step.
    """

    def __init__(self, device: CudaDevice, staging: Staging, cache: DeviceKVCache, slot: int, past_B: IntArray) -> None:
        starts = [max(int(past) - 1, 0) for past in past_B]
        self._news = [int(past) - start for past, start in zip(past_B, starts, strict=True)]
        self._windows = [
            CacheRows(device, staging, cache, slot + b, start, min(int(past) + 2, cache.capacity))
            for b, (past, start) in enumerate(zip(past_B, starts, strict=True))
        ]
        self._dtype = cache.dtype

    def read(self) -> list[Rows]:
        """Return the bits of the rows of each sequence."""
        return [window.read() for window in self._windows]

    def write(self, rows: list[Rows]) -> None:
        """Write the bits of the rows of each sequence."""
        for window, bits in zip(self._windows, rows, strict=True):
            window.write(bits)

    def blank(self, rows: list[Rows]) -> None:
        """Put NaN where the new rows belong, so that only a step that writes them there gives the right ones."""
        blanked = [bits.copy() for bits in rows]
        for bits, new in zip(blanked, self._news, strict=True):
            bits[:, :, new] = _BLANK
        self.write(blanked)

    def difference(self, expected: StepResult, found: StepResult, *, has_experts: bool) -> str | None:
        """Say how two steps differ beyond what rounding explains; None if they do not.

        Args:
            expected: What ONNX Runtime gives.
            found: What own kernels give; their batch may be larger, of rows like the last one.
            has_experts: The decoder is a mixture of experts.
        """
        bound = _BOUNDS[self._dtype] * (_WITH_EXPERTS if has_experts else 1.0)
        last = len(expected.logits_BV) - 1
        for b, given in enumerate(found.logits_BV):
            wanted = expected.logits_BV[min(b, last)]
            spread = float(wanted.max() - wanted.min())
            error = _largest(given, wanted)
            if not error <= bound * spread:
                return f"logits of sequence {b} are off by {error:.3g} of {spread:.3g}, more than {bound:.0%}"
        for b, (wanted_bits, given_bits) in enumerate(zip(expected.rows, found.rows, strict=True)):
            new = self._news[b]
            beside = [row for row in range(wanted_bits.shape[2]) if row != new]
            if not np.array_equal(wanted_bits[:, :, beside], given_bits[:, :, beside]):
                return f"rows of the KV cache beside the new one of sequence {b} were written"
            pairs = zip(self._floats(wanted_bits[:, :, new]), self._floats(given_bits[:, :, new]), strict=True)
            for i, (wanted_KH, given_KH) in enumerate(pairs):
                error, largest = _largest(given_KH, wanted_KH), float(np.abs(wanted_KH).max())
                if not error <= bound * largest:
                    kind = "values" if i % 2 else "keys"
                    return f"the new {kind} of layer {i // 2} of sequence {b} are off by {error:.3g} of {largest:.3g}"
        return None

    def _floats(self, bits: NDArray[Any]) -> NDArray[np.float32]:
        if self._dtype == "bfloat16":
            return from_bfloat16(np.ascontiguousarray(bits))
        return np.ascontiguousarray(bits).view(np.float16).astype(np.float32)


def wrong_candidates(logits_BV: FloatArray, ids_Bk: IntArray, values_Bk: FloatArray) -> str | None:
    """Say in what the largest logits that a step gave are not the largest of all its logits; None if they are."""
    for b, (logits, ids, values) in enumerate(zip(logits_BV, ids_Bk, values_Bk, strict=True)):
        if len(set(ids.tolist())) < len(ids) or ids.min() < 0 or ids.max() >= len(logits):
            return f"the largest logits of sequence {b} are not of as many tokens"
        if not np.array_equal(np.sort(logits)[::-1][: len(values)], values) or not np.array_equal(logits[ids], values):
            return f"the largest logits of sequence {b} are not the largest of all"
    return None


def _largest(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """Return the largest difference; NaN if there is a number that is none."""
    return float(np.abs(found.astype(np.float64) - expected.astype(np.float64)).max())
