"""The most likely tokens of each row, with their logits."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from engines.kernels.dtypes import power_of_two
from engines.kernels.launch import Argument, Gpu, Launch, Unserved

_TILE: Final = 2048
_MAX_MERGED: Final = 16384  # keys that one program holds in registers
_MAX_TOP: Final = 64

Array = NDArray[Any]


def _sizes(vocab: int, top_k: int) -> tuple[int, int, int]:
    """Return the candidates, the keys kept of a tile, and the tokens of a tile; the last two powers of two."""
    top = min(top_k, vocab)
    if not 0 < top <= _MAX_TOP:
        raise Unserved(f"{top_k} candidates; the kernel finds 1 to {_MAX_TOP}")
    kept = max(2, power_of_two(top))
    tile = max(kept, min(_TILE, power_of_two(vocab)))
    if -(-vocab // tile) * kept > _MAX_MERGED:
        raise Unserved(f"a vocabulary of {vocab}; with {top} candidates the kernel takes {_MAX_MERGED // kept * tile}")
    return top, kept, tile


def buffers(vocab: int, batch: int, *, top_k: int = 64) -> dict[str, tuple[int, bool]]:
    """Return the scratch memory of the launches: bytes, and whether it begins with zeros."""
    _, kept, tile = _sizes(vocab, top_k)
    return {"candidate_keys": (8 * batch * -(-vocab // tile) * kept, False)}


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
        Unserved: The kernels find no so many candidates, or not of so large a vocabulary.
    """
    top, kept, tile = _sizes(vocab, top_k)
    tiles = -(-vocab // tile)
    merged = power_of_two(tiles * kept)
    keys = Argument("*i64", "buffer:candidate_keys")
    of_tiles = Launch(
        "candidates",
        "of_tiles",
        {"logits": Argument("*fp32", logits), "keys": keys},
        {"VOCAB": vocab, "DIMS": tile.bit_length() - 1, "KEPT": kept.bit_length() - 1},
        (tiles, batch, 1),
        num_warps=8,
    )
    of_all = Launch(
        "candidates",
        "of_all",
        {"keys": keys, "top_logits": Argument("*fp32", top_logits), "top_ids": Argument("*i64", top_ids)},
        {"TILES": tiles, "TOP": top, "DIMS": merged.bit_length() - 1, "KEPT": kept.bit_length() - 1},
        (batch, 1, 1),
        num_warps=min(16, max(4, merged // 512)),
    )
    return [of_tiles, of_all]


def reference(logits: Array, top_k: int = 64) -> tuple[Array, Array]:
    """Return the largest logits of [B, vocab] and their ids, falling, equal ones by rising id, NaN last."""
    order = np.argsort(np.where(np.isnan(logits), np.inf, -logits), axis=-1, kind="stable")
    # Infinities fall where NaN do, and come first.
    falls_last = np.isnan(np.take_along_axis(logits, order, -1))
    ids = np.take_along_axis(order, np.argsort(falls_last, axis=-1, kind="stable"), -1)[:, :top_k]
    return np.take_along_axis(logits, ids, -1), ids
