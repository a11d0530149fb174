"""The experts of each row: norm, logits in float32, and the largest of them with their shares."""

import triton
import triton.language as tl

from engines.kernels.triton.keys import LOWEST, index_of, key_of, value_of


@triton.jit
def _choose(
    logits,
    expert_ids,
    expert_weights,
    E: tl.constexpr,
    PADDED: tl.constexpr,
    TOP: tl.constexpr,
    TOP_PADDED: tl.constexpr,
):
    """Write the TOP experts of a row by falling logit, and the softmax over them."""
    expert = tl.arange(0, PADDED)
    logit = tl.load(logits + expert, mask=expert < E, other=0.0, cache_modifier=".cg")
    keys = tl.where(expert < E, key_of(logit, expert), LOWEST)
    place = tl.arange(0, TOP_PADDED)
    chosen = tl.full([TOP_PADDED], LOWEST, tl.int64)
    for rank in tl.static_range(TOP):
        best = tl.max(keys, axis=0)
        chosen = tl.where(place == rank, best, chosen)
        keys = tl.where(keys == best, LOWEST, keys)
    value = value_of(chosen)
    first = tl.sum(tl.where(place == 0, value, 0.0), axis=0)
    share = tl.where(place < TOP, tl.exp(value - first), 0.0)
    tl.store(expert_ids + place, index_of(chosen), mask=place < TOP)
    tl.store(expert_weights + place, share / tl.sum(share, axis=0), mask=place < TOP)


@triton.jit
def router(
    x,
    gain,
    weight,
    logits,
    counters,
    expert_ids,
    expert_weights,
    eps,
    E: tl.constexpr,
    PADDED: tl.constexpr,
    K: tl.constexpr,
    TOP: tl.constexpr,
    TOP_PADDED: tl.constexpr,
    EXPERTS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """Route a row. Programs: groups of EXPERTS, rows; `x` [B, K], `weight` [E, K], `logits` [B, E], results [B, TOP].

    The last program of a row chooses, once all logits are there.
    """
    group = tl.program_id(0)
    row = tl.program_id(1)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    expert = group * EXPERTS + tl.arange(0, EXPERTS)
    is_expert = expert < E
    column = tl.arange(0, CHUNK)
    tiles = ()
    gains = ()
    for chunk in tl.static_range(CHUNKS):
        at = chunk * CHUNK + column
        is_there = is_expert[:, None] & (at < K)[None, :]
        tiles += (tl.load(weight + expert[:, None] * K + at[None, :], mask=is_there, other=0.0),)
        gains += (tl.load(gain + at, mask=at < K, other=0.0),)
    if PDL:
        tl.extra.cuda.gdc_wait()
    products = tl.zeros([EXPERTS, CHUNK], tl.float32)
    squares = tl.zeros([CHUNK], tl.float32)
    for chunk in tl.static_range(CHUNKS):
        at = chunk * CHUNK + column
        value = tl.load(x + row * K + at, mask=at < K, other=0.0).to(tl.float32)
        squares += value * value
        products += tiles[chunk].to(tl.float32) * (value * gains[chunk].to(tl.float32))[None, :]
    logit = tl.sum(products, axis=1) * tl.rsqrt(tl.sum(squares, axis=0) / K + eps)
    tl.store(logits + row * E + expert, logit, mask=is_expert)
    # All threads' stores come before the one that counts, whose release covers them.
    tl.debug_barrier()
    num_before = tl.atomic_add(counters + row, 1, sem="acq_rel")
    if num_before == tl.num_programs(0) - 1:
        tl.store(counters + row, 0)
        _choose(logits + row * E, expert_ids + row * TOP, expert_weights + row * TOP, E, PADDED, TOP, TOP_PADDED)
