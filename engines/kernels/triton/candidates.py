"""The largest logits of each row, in two launches: those of each tile of the vocabulary, then of all tiles.

Keys are [R, 2, W, 32]: R runs of 64 in each of W warps, of which a lane holds the places `lane` and `32 + lane`. Only
the lanes of a warp exchange keys to sort them (Batcher's bitonic sorter); warps meet where they join what each of them
found. Triton keeps that layout as long as nothing but elementwise operations, inline assembly and reductions within a
lane touch it.

The stages of a sort are turns of a loop: unrolled code is run through once, and fetching it is what seems to take long
(see `engines.kernels.candidates`). `lane_bits`, which is 5, and `joins`, 2^joins = W, are arguments so that no compiler
unrolls the loops.
"""

import triton
import triton.language as tl

from engines.kernels.triton.device import device_function
from engines.kernels.triton.fragments import load_words
from engines.kernels.triton.keys import LOWEST, index_of, key_of, value_of


@device_function
def places():
    """Return the place in its run of each key of a lane."""
    return tl.arange(0, 2)[None, :, None, None] * 32 + tl.arange(0, 32)[None, None, None, :]


@device_function
def of_partners(keys, mask, ASM: tl.constexpr):
    """Return the keys of the lanes whose numbers differ in the bits of `mask`."""
    if ASM:
        others = tl.inline_asm_elementwise(
            "{ .reg .b32 a, b; mov.b64 {a, b}, $1; shfl.sync.bfly.b32 a, a, $2, 31, -1;"
            " shfl.sync.bfly.b32 b, b, $2, 31, -1; mov.b64 $0, {a, b}; }",
            "=l,l,r",
            [keys, mask],
            dtype=tl.int64,
            is_pure=False,
            pack=1,
        )
    else:
        lane = tl.arange(0, 32)[None, None, None, :]
        others = tl.gather(keys, (lane ^ mask) + tl.zeros(keys.shape, tl.int32), 3)
    return others


@device_function
def of_partner_warps(keys, mask, W: tl.constexpr, ASM: tl.constexpr):
    """Return the keys [1, 2, W, 32] of the warps whose numbers differ in the bits of `mask`.

    Through shared memory by hand: what Triton makes of `tl.gather` moves keys to other lanes and back, with 8 barriers.
    """
    if ASM:
        BYTES: tl.constexpr = W * 32 * 16
        others = tl.inline_asm_elementwise(
            f"{{ .shared .align 16 .b8 runs[{BYTES}]; .reg .b32 first, at; mov.b32 first, runs; mov.b32 at, %tid.x;"
            " mad.lo.u32 at, at, 16, first; bar.sync 0; st.shared.v2.b64 [at], {$2, $3}; bar.sync 0;"
            " mov.b32 at, %tid.x; xor.b32 at, at, $4; mad.lo.u32 at, at, 16, first;"
            " ld.shared.v2.b64 {$0, $1}, [at]; }",
            "=&l,=&l,l,l,r,r",
            [keys, mask * 32],
            dtype=tl.int64,
            is_pure=False,
            pack=2,
        )
    else:
        warp = tl.arange(0, W)[None, None, :, None]
        others = tl.gather(keys, (warp ^ mask) + tl.zeros(keys.shape, tl.int32), 2)
    return others


@device_function
def exchange(keys, mask, falls, ASM: tl.constexpr):
    """Return keys of which partners are in order: falling where `falls`, else rising."""
    others = of_partners(keys, mask, ASM)
    is_first = (tl.arange(0, 32)[None, None, None, :] & mask) == 0
    return tl.where((keys > others) == (is_first == falls), keys, others)


@device_function
def sort_bitonic(keys, falls, lane_bits, ASM: tl.constexpr):
    """Sort runs that rise and then fall, or the other way about: falling where `falls`, else rising."""
    is_first = tl.arange(0, 2)[None, :, None, None] == 0
    highest = tl.max(keys, axis=1, keep_dims=True)
    lowest = tl.min(keys, axis=1, keep_dims=True)
    keys = tl.where(is_first == falls, highest, lowest)
    for bit in range(lane_bits):
        keys = exchange(keys, 32 >> (bit + 1), falls, ASM)
    return keys


@device_function
def sort_runs(keys, falls, lane_bits, ASM: tl.constexpr):
    """Sort runs: falling where `falls`, else rising."""
    for bits in range(1, lane_bits + 1):
        part_falls = (places() >> bits) & 1 == 0
        for bit in range(bits):
            keys = exchange(keys, 1 << (bits - 1 - bit), part_falls, ASM)
    return sort_bitonic(keys, falls, lane_bits, ASM)


@device_function
def join_runs(keys, lane_bits, LEFT: tl.constexpr, W: tl.constexpr, ASM: tl.constexpr):
    """Return the best of each pair of runs, of which the first falls and the second rises.

    The larger key at each place is one of the 64 largest of both, and these are bitonic. Of what is left every second
    one rises; the last one in every second warp.
    """
    keys = tl.max(tl.reshape(keys, [LEFT, 2, 2, W, 32]), axis=1)
    if LEFT > 1:
        falls = tl.arange(0, LEFT)[:, None, None, None] % 2 == 0
    else:
        falls = tl.arange(0, W)[None, None, :, None] % 2 == 0
    return sort_bitonic(keys, falls, lane_bits, ASM)


@device_function
def join_warps(keys, lane_bits, joins, W: tl.constexpr, ASM: tl.constexpr):
    """Return the best of all warps, falling, in each of them; `keys` fall in even warps and rise in odd ones."""
    warp = tl.arange(0, W)[None, None, :, None]
    for join in range(joins):
        others = of_partner_warps(keys, 1 << join, W, ASM)
        keys = sort_bitonic(tl.maximum(keys, others), (warp >> (join + 1)) & 1 == 0, lane_bits, ASM)
    return keys


@triton.jit
def of_tiles(
    logits,
    keys,
    lane_bits,
    joins,
    VOCAB: tl.constexpr,
    RUNS: tl.constexpr,
    RUN_JOINS: tl.constexpr,
    W: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """Find the 64 largest of a tile. Programs: tiles of RUNS · W · 64, rows; `keys` int64 [B, tiles, 64], falling.

    RUNS is 2^RUN_JOINS.
    """
    tile = tl.program_id(0)
    row = tl.program_id(1)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    tl.assume(lane_bits > 0)
    tl.assume(joins > 0)
    run = tl.arange(0, RUNS)[:, None, None, None]
    warp = tl.arange(0, W)[None, None, :, None]
    token = ((tile * RUNS + run) * W + warp) * 64 + places()
    p = logits + row.to(tl.int64) * VOCAB + tl.minimum(token, VOCAB - 1)
    value = load_words(p, 1, True, ASM)[0].to(tl.float32, bitcast=True)
    found = tl.where(token < VOCAB, key_of(value, token), LOWEST)
    found = sort_runs(found, run % 2 == 0, lane_bits, ASM)
    for join in tl.static_range(RUN_JOINS):
        found = join_runs(found, lane_bits, RUNS >> (join + 1), W, ASM)
    found = join_warps(found, lane_bits, joins, W, ASM)
    where = (row * tl.num_programs(0) + tile) * 64 + places()
    tl.store(keys + where + warp * 0, found, mask=warp == 0)


@device_function
def load_run(keys, row, tile, tiles, falls, ASM: tl.constexpr):
    """Return the keys of a tile for each warp, falling where `falls`, else rising; the lowest beyond the last tile."""
    place = tl.where(falls, places(), 63 - places())
    p = keys + (row + tl.minimum(tile, tiles - 1)) * 64 + place
    if ASM:
        found = tl.inline_asm_elementwise(
            "ld.relaxed.gpu.global.b64 $0, [$1];", "=l,l", [p], dtype=tl.int64, is_pure=False, pack=1
        )
    else:
        found = tl.load(p)
    return tl.where(tile < tiles, found, LOWEST)


@triton.jit
def of_all(
    keys,
    top_logits,
    top_ids,
    lane_bits,
    joins,
    tiles,
    TOP: tl.constexpr,
    W: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """Find the TOP <= 64 largest of the tiles' keys. Programs: rows; results [B, TOP] float32 and int64."""
    row = tl.program_id(0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    tl.assume(lane_bits > 0)
    tl.assume(joins > 0)
    warp = tl.arange(0, W)[None, None, :, None]
    falls = warp % 2 == 0
    best = load_run(keys, row * tiles, warp, tiles, falls, ASM)
    joined = load_run(keys, row * tiles, W + warp, tiles, falls == 0, ASM)
    for first in range(W, tiles, W):
        ahead = load_run(keys, row * tiles, first + W + warp, tiles, falls == 0, ASM)
        best = sort_bitonic(tl.maximum(best, joined), falls, lane_bits, ASM)
        joined = ahead
    best = join_warps(best, lane_bits, joins, W, ASM)
    rank = places() + warp * 64
    tl.store(top_logits + row * TOP + rank, value_of(best), mask=rank < TOP)
    tl.store(top_ids + row * TOP + rank, index_of(best).to(tl.int64), mask=rank < TOP)
