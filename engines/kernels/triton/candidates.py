"""The largest logits of each row, in two launches: those of each tile of the vocabulary, then of all tiles."""

import triton
import triton.language as tl

from engines.kernels.triton.keys import LOWEST, index_of, key_of, value_of

# A block of 2^n keys has n axes of two, so that the partner of a key in a bitonic network lies along one axis.


@triton.jit
def _bit(DIMS: tl.constexpr, BIT: tl.constexpr):
    """Return bit BIT of each place of a block of 2^DIMS."""
    return tl.reshape(tl.arange(0, 2), [1] * (DIMS - BIT - 1) + [2] + [1] * BIT)


@triton.jit
def _merge(keys, falls, DIMS: tl.constexpr, STAGES: tl.constexpr):
    """Sort each run of 2^STAGES keys that rises and then falls, or the other way about, as `falls` says of it."""
    for stage in tl.static_range(STAGES):
        # The sum less the one is the other, also where it wraps around.
        partner = tl.sum(keys, axis=DIMS - STAGES + stage, keep_dims=True) - keys
        is_last = _bit(DIMS, STAGES - 1 - stage)
        keys = tl.where((keys > partner) != ((falls ^ is_last) != 0), partner, keys)
    return keys


@triton.jit
def _sort_runs(keys, DIMS: tl.constexpr, KEPT: tl.constexpr):
    """Sort each run of 2^KEPT of 2^DIMS keys: the first rises, the second falls, and so on; a single one falls."""
    for stages in tl.static_range(1, KEPT + 1):
        falls = _bit(DIMS, stages) if stages < DIMS else 1
        keys = _merge(keys, falls, DIMS, stages)
    return keys


@triton.jit
def _join_runs(keys, DIMS: tl.constexpr, KEPT: tl.constexpr):
    """Return the 2^KEPT largest keys of such runs, falling: of two runs, the larger of each pair, sorted again."""
    for joined in tl.static_range(DIMS - KEPT):
        keys = tl.max(keys, axis=DIMS - joined - 1 - KEPT)
        falls = _bit(DIMS - joined - 1, KEPT) if joined < DIMS - KEPT - 1 else 1
        keys = _merge(keys, falls, DIMS - joined - 1, KEPT)
    return tl.reshape(keys, [2**KEPT])


@triton.jit
def of_tiles(
    logits,
    keys,
    VOCAB: tl.constexpr,
    DIMS: tl.constexpr,
    KEPT: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """Find the 2^KEPT largest of 2^DIMS logits. Programs: tiles, rows; `keys` int64 [B, tiles, 2^KEPT]."""
    tile = tl.program_id(0)
    row = tl.program_id(1)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tile * 2**DIMS + tl.arange(0, 2**DIMS)
    is_token = token < VOCAB
    value = tl.load(logits + row.to(tl.int64) * VOCAB + token, mask=is_token, other=0.0)
    found = tl.reshape(tl.where(is_token, key_of(value, token), LOWEST), [2] * DIMS)
    best = _join_runs(_sort_runs(found, DIMS, KEPT), DIMS, KEPT)
    place = (row * tl.num_programs(0) + tile) * 2**KEPT
    tl.store(keys + place + tl.arange(0, 2**KEPT), best)


@triton.jit
def of_all(
    keys,
    top_logits,
    top_ids,
    TILES: tl.constexpr,
    TOP: tl.constexpr,
    DIMS: tl.constexpr,
    KEPT: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """Find the TOP <= 2^KEPT largest of the tiles' keys. Programs: rows; results [B, TOP] float32 and int64."""
    row = tl.program_id(0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    rank = tl.arange(0, 2**KEPT)
    run = tl.arange(0, 2 ** (DIMS - KEPT))[:, None]
    # All runs fall in memory.
    is_turned = (run % 2 == 0) & (DIMS > KEPT)
    place = run * 2**KEPT + tl.where(is_turned, 2**KEPT - 1 - rank[None, :], rank[None, :])
    found = tl.load(keys + row * (TILES * 2**KEPT) + place, mask=run < TILES, other=LOWEST)
    best = _join_runs(tl.reshape(found, [2] * DIMS), DIMS, KEPT)
    tl.store(top_logits + row * TOP + rank, value_of(best), mask=rank < TOP)
    tl.store(top_ids + row * TOP + rank, index_of(best).to(tl.int64), mask=rank < TOP)
