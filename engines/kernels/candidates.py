"""The most likely tokens of each row, with their logits.

A tile's program finds the 64 largest of its logits; one program for each row joins what the tiles found. For one row of
151,936 logits, as compiled for SM 9.0; keys are those of a lane, barriers and instructions those that a warp meets:

| | stages of exchange · keys | instructions, of them once | barriers | H200 |
|---|---|---|---|---|
| tiles of 2048, at first | 21 · 8, then 6 each · 8, 4, 2, 1 and less | 2558, all | 25 | 20 us |
| 75 runs at once, at first | 6 each · 16, 8, 4, 2, 1 and less | 3931, all | 223 | 40 us |
| tiles of 2048 | 21 · 8, 6 · 4, 24 · 2 | 2300, 514 in the code | 7 | not measured |
| 5 runs of each of 16 warps one by one, then the warps | 48 · 2 | 1200, 300 in the code | 11 | not measured |

Issuing what there was at first takes 3 us and 9 us of the 20 and 40. The rest must be barriers, and fetching code that
is run through once from end to end, after other kernels have used the caches; so now stages are turns of loops. Both
launches together are expected to take less than 10 us.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from engines.kernels.dtypes import power_of_two
from engines.kernels.launch import Argument, Gpu, Launch, Unserved

_MAX_TOP: Final = 64
_RUN: Final = 64  # keys that a warp sorts; also what is kept of a tile
_RUNS: Final = 4  # of a warp
_MOST_WARPS_OF_TILE: Final = 8
_MOST_WARPS_OF_ALL: Final = 16
_LANE_BITS: Final = 5

Array = NDArray[Any]


def _warps(num_runs: int, most: int) -> int:
    """Return the warps for so many runs: a power of two, two at least."""
    return min(most, max(2, power_of_two(num_runs)))


def _warps_of_tile(vocab: int) -> int:
    return _warps(-(-vocab // (_RUNS * _RUN)), _MOST_WARPS_OF_TILE)


def _num_tiles(vocab: int) -> int:
    return -(-vocab // (_warps_of_tile(vocab) * _RUNS * _RUN))


def buffers(vocab: int, batch: int) -> dict[str, tuple[int, bool]]:
    """Return the scratch memory of the launches: bytes, and whether it begins with zeros."""
    return {"candidate_keys": (8 * batch * _num_tiles(vocab) * _RUN, False)}


def launches(
    vocab: int,
    batch: int,
    gpu: Gpu,
    *,
    top_k: int = 64,
    logits: str = "step:logits",
    top_logits: str = "step:top_logits",
    top_ids: str = "step:top_ids",
) -> list[Launch]:
    """Make the launches that find the largest logits; the same for all GPUs and batches.

    Args:
        vocab: Logits of a row.
        batch: Rows of the step.
        gpu: Where they run.
        top_k: Candidates of a row; of a smaller vocabulary all tokens.
        logits: Source of float32 [B, vocab].
        top_logits: Source of float32 [B, min(top_k, vocab)], falling; equal ones by rising id, NaN last.
        top_ids: Source of int64 of the same shape.

    Raises:
        Unserved: The kernels do not find so many candidates.
    """
    top = min(top_k, vocab)
    if not 0 < top <= _MAX_TOP:
        raise Unserved(f"{top_k} candidates; the kernel finds 1 to {_MAX_TOP}")
    tiles = _num_tiles(vocab)
    keys = Argument("*i64", "buffer:candidate_keys")
    warps = _warps_of_tile(vocab)
    of_tiles = Launch(
        "candidates",
        "of_tiles",
        {"logits": Argument("*fp32", logits), "keys": keys, **_loops(warps)},
        {"VOCAB": vocab, "RUNS": _RUNS, "RUN_JOINS": _RUNS.bit_length() - 1, "W": warps},
        (tiles, batch, 1),
        num_warps=warps,
    )
    warps = _warps(tiles, _MOST_WARPS_OF_ALL)
    of_all = Launch(
        "candidates",
        "of_all",
        {
            "keys": keys,
            "top_logits": Argument("*fp32", top_logits),
            "top_ids": Argument("*i64", top_ids),
            **_loops(warps),
            "tiles": Argument("i32", tiles),
        },
        {"TOP": top, "W": warps},
        (batch, 1, 1),
        num_warps=warps,
    )
    return [of_tiles, of_all]


def _loops(warps: int) -> dict[str, Argument]:
    """Return the turns of loops: exchanges between the lanes of a warp, and between warps."""
    return {"lane_bits": Argument("i32", _LANE_BITS), "joins": Argument("i32", warps.bit_length() - 1)}


def reference(logits: Array, top_k: int = 64) -> tuple[Array, Array]:
    """Return the largest logits of [B, vocab] and their ids, falling, equal ones by rising id, NaN last."""
    order = np.argsort(np.where(np.isnan(logits), np.inf, -logits), axis=-1, kind="stable")
    # Infinities fall where NaN do, and come first.
    falls_last = np.isnan(np.take_along_axis(logits, order, -1))
    ids = np.take_along_axis(order, np.argsort(falls_last, axis=-1, kind="stable"), -1)[:, :top_k]
    return np.take_along_axis(logits, ids, -1), ids
