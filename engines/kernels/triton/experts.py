"""Products by the experts that the router chose, as `engines.kernels.experts` launches them.

TOP of E experts a row of the batch. One row is multiplied at a time: all 8 columns of the tensor cores' tile are that
row, and column 0 is stored. What the router wrote is read past L1, which a kernel that ran here before may have filled,
and clamped: a wrong id makes a wrong result, which a comparison finds, and never an address outside the weights.
"""

import triton
import triton.language as tl

from engines.kernels.triton.device import device_function
from engines.kernels.triton.fragments import load_words, rounded
from engines.kernels.triton.row_products import first_two, multiply_rows, norm_factors
from engines.kernels.triton.warp_sums import sums_of_warps


@device_function
def clamped(expert, E: tl.constexpr):
    """Return the id that the router wrote as int64, in [0, E)."""
    return tl.minimum(tl.maximum(expert, 0), E - 1).to(tl.int64)


@triton.jit
def experts_gate_up(
    X, IDS, W, S, Z, GAIN, ZEROS, OUT, eps, E: tl.constexpr, N: tl.constexpr, K: tl.constexpr, TOP: tl.constexpr,
    KIND: tl.constexpr, ROW_BYTES: tl.constexpr, CODES: tl.constexpr, UNIT: tl.constexpr, SCALES: tl.constexpr,
    PER: tl.constexpr, ZP: tl.constexpr, WARPS: tl.constexpr, DEPTH: tl.constexpr, AHEAD: tl.constexpr,
    TILES: tl.constexpr, CVT: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Store SiLU(gate) · up of one of the experts of a row; gate and up are rows 2r and 2r + 1 of its N."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        # Only now: `experts_down` reads before its own wait what the router wrote.
        tl.extra.cuda.gdc_launch_dependents()
    BF16: tl.constexpr = X.dtype.element_ty == tl.bfloat16
    UNITS: tl.constexpr = (K + UNIT - 1) // UNIT
    expert = clamped(tl.load(IDS + tl.program_id(1), cache_modifier=".cg"), E) * N
    first = tl.arange(0, WARPS)[:, None]
    lane = tl.arange(0, 32)[None, :]
    start = first * UNIT + lane % 4 * CODES
    inside = tl.where(start < K, start, 0)
    offset = inside * 2 if KIND == "half" else inside // 2 if KIND == "int4" else inside
    rows, scales, zeros = (), (), ()
    for i in tl.static_range(2 * TILES):
        pair = tl.minimum(tl.program_id(0) * (8 * TILES) + i // 2 * 8 + lane // 4, N // 2 - 1)
        row = expert + pair * 2 + i % 2
        rows = rows + (W.to(tl.pointer_type(tl.int8)) + (row * ROW_BYTES + offset),)
        scales = scales + (S + row * SCALES,)
        zeros = zeros + (Z + row * ((SCALES + 1) // 2 if KIND == "int4" else SCALES),)
    x = X + tl.program_id(1) // TOP * K + inside
    sums, squares = multiply_rows(
        rows, scales, zeros, (x,), GAIN + inside, ZEROS + lane + first * 0, first, start, KIND, K, CODES, UNIT, UNITS,
        PER, WARPS, (UNITS + WARPS - 1) // WARPS, DEPTH, AHEAD, True, ZP, CVT, True, PDL, BF16, ASM,
    )  # fmt: skip
    # One warp finishes the sums of a tile and stores them.
    sums = sums_of_warps(sums, 4, WARPS, TILES, TILES, ASM)
    squares = sums_of_warps(first_two(squares), 2, WARPS, 1, TILES, ASM)
    for slot in tl.static_range((TILES + WARPS - 1) // WARPS):
        tile = slot * WARPS + first
        factor, _ = norm_factors(squares[2 * slot], squares[2 * slot + 1], K, eps, BF16, ASM)
        gate = sums[4 * slot] * factor
        y = gate / (1.0 + tl.exp(-gate)) * (sums[4 * slot + 2] * factor)
        pair = tl.program_id(0) * (8 * TILES) + tile * 8 + lane // 4
        p = OUT + tl.program_id(1) * (N // 2) + pair
        tl.store(p, rounded(y, OUT.dtype.element_ty, ASM), (tile < TILES) & (lane % 4 == 0) & (pair < N // 2))


@triton.jit
def experts_down(
    X, IDS, SHARES, W, S, Z, ZEROS, OUT, E: tl.constexpr, N: tl.constexpr, K: tl.constexpr, TOP: tl.constexpr,
    KIND: tl.constexpr, ROW_BYTES: tl.constexpr, CODES: tl.constexpr, UNIT: tl.constexpr, SCALES: tl.constexpr,
    PER: tl.constexpr, ZP: tl.constexpr, WARPS: tl.constexpr, PARTS: tl.constexpr, DEPTH: tl.constexpr,
    AHEAD: tl.constexpr, TILES: tl.constexpr, CVT: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Add the shares of all experts of a row to it: PARTS warps for each expert, and one sum over all warps."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    BF16: tl.constexpr = X.dtype.element_ty == tl.bfloat16
    UNITS: tl.constexpr = (K + UNIT - 1) // UNIT
    warp = tl.arange(0, WARPS)[:, None]
    lane = tl.arange(0, 32)[None, :]
    first = warp % PARTS
    slot = tl.minimum(warp // PARTS, TOP - 1)
    at = tl.program_id(1) * TOP + slot + lane * 0
    # The router's results: the kernel before this one has waited for them before it let this one start.
    expert = clamped(load_words(IDS + at, 1, True, ASM)[0], E) * N
    share = load_words(SHARES + at, 1, True, ASM)[0].to(tl.float32, bitcast=True)
    share = tl.where(warp // PARTS < TOP, share, 0.0)
    start = first * UNIT + lane % 4 * CODES
    inside = tl.where(start < K, start, 0)
    offset = inside * 2 if KIND == "half" else inside // 2 if KIND == "int4" else inside
    rows, scales, zeros = (), (), ()
    for i in tl.static_range(2 * TILES):
        row = expert + tl.minimum(tl.program_id(0) * (16 * TILES) + i * 8 + lane // 4, N - 1)
        rows = rows + (W.to(tl.pointer_type(tl.int8)) + (row * ROW_BYTES + offset),)
        scales = scales + (S + row * SCALES,)
        zeros = zeros + (Z + row * ((SCALES + 1) // 2 if KIND == "int4" else SCALES),)
    x = X + (tl.program_id(1) * TOP + slot) * K + inside
    sums, _ = multiply_rows(
        rows, scales, zeros, (x,), X + inside, ZEROS + lane + warp * 0, first + warp * 0, start, KIND, K, CODES, UNIT,
        UNITS, PER, PARTS, (UNITS + PARTS - 1) // PARTS, DEPTH, AHEAD, False, ZP, CVT, False, PDL, BF16, ASM,
    )  # fmt: skip
    shared = ()
    for tile in tl.static_range(TILES):
        shared = shared + (sums[4 * tile] * share, sums[4 * tile + 2] * share)
    sums = sums_of_warps(shared, 2, WARPS, TILES, TILES, ASM)
    for slot in tl.static_range((TILES + WARPS - 1) // WARPS):
        tile = slot * WARPS + warp
        row = tl.program_id(0) * (16 * TILES) + tile * 16 + lane // 4
        p = OUT + tl.program_id(1) * N + row
        is_there = (tile < TILES) & (lane % 4 == 0)
        add_row(p, sums[2 * slot], is_there & (row < N), ASM)
        add_row(p + 8, sums[2 * slot + 1], is_there & (row + 8 < N), ASM)


@device_function
def add_row(p, y, mask, ASM: tl.constexpr):
    """Add to what is there, with one rounding."""
    y += tl.load(p, mask, 0.0).to(tl.float32)
    tl.store(p, rounded(y, p.dtype.element_ty, ASM), mask)
