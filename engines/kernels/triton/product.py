"""Products of a few rows by a weight, as `engines.kernels.product` launches them.

B rows of the batch, N rows and K columns of the weight. MODE as in `engines.kernels.launch`: 0 stores, 1 adds to what
is there, 2 stores SiLU(gate) · up of rows r and N/2 + r, 3 stores float32.
"""

import triton
import triton.language as tl

from engines.kernels.triton.device import device_function
from engines.kernels.triton.fragments import rounded
from engines.kernels.triton.row_products import first_two, multiply_rows, norm_factors
from engines.kernels.triton.warp_sums import sums_of_warps


@triton.jit
def product_vector(
    X, W, GAIN, OUT, eps, N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
    NORM: tl.constexpr, MODE: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Multiply one row of halves by ROWS rows of a weight of halves, which are in registers before x is there."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    CHUNKS: tl.constexpr = (K + CHUNK - 1) // CHUNK
    OUTPUTS: tl.constexpr = N // 2 if MODE == 2 else N
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, CHUNK)
    weights = W + tl.minimum(row, OUTPUTS - 1).to(tl.int64)[:, None] * K + column[None, :]
    gate, up, gain = (), (), ()
    for i in tl.static_range(CHUNKS):
        if (i + 1) * CHUNK <= K:
            gate = gate + (tl.load(weights + i * CHUNK, eviction_policy="evict_first"),)
            if MODE == 2:
                up = up + (tl.load(weights + i * CHUNK + OUTPUTS * K, eviction_policy="evict_first"),)
        else:
            mask = (column < K - i * CHUNK)[None, :]
            gate = gate + (tl.load(weights + i * CHUNK, mask, 0.0, eviction_policy="evict_first"),)
            if MODE == 2:
                up = up + (tl.load(weights + i * CHUNK + OUTPUTS * K, mask, 0.0, eviction_policy="evict_first"),)
    if NORM:
        for i in tl.static_range(CHUNKS):
            gain = gain + (tl.load(GAIN + i * CHUNK + column, column < K - i * CHUNK, 0.0),)
    if PDL:
        tl.extra.cuda.gdc_wait()
    squares = tl.zeros([CHUNK], tl.float32)
    sums = tl.zeros([ROWS, CHUNK], tl.float32)
    up_sums = sums
    for i in tl.static_range(CHUNKS):
        x = tl.load(X + i * CHUNK + column, column < K - i * CHUNK, 0.0).to(tl.float32)
        if NORM:
            squares += x * x
            x = x * gain[i].to(tl.float32)
        sums += gate[i].to(tl.float32) * x[None, :]
        if MODE == 2:
            up_sums += up[i].to(tl.float32) * x[None, :]
    y = tl.sum(sums, axis=1)
    z = y
    if MODE == 2:
        z = tl.sum(up_sums, axis=1)
    if NORM:
        scale = tl.rsqrt(tl.sum(squares, axis=0) / K + eps)
        y = y * scale
        z = z * scale
    store_row(OUT + row, y, z, row < OUTPUTS, MODE, ASM)


@device_function
def store_row(p, y, z, mask, MODE: tl.constexpr, ASM: tl.constexpr):
    """Store results y of which z is the up of a gate."""
    if MODE == 1:
        y += tl.load(p, mask, 0.0).to(tl.float32)
    if MODE == 2:
        y = y / (1.0 + tl.exp(-y)) * z
    tl.store(p, rounded(y, p.dtype.element_ty, ASM), mask)


@triton.jit
def product_fragments(
    X, W, S, Z, GAIN, ZEROS, OUT, eps, B, N: tl.constexpr, K: tl.constexpr, KIND: tl.constexpr,
    ROW_BYTES: tl.constexpr, CODES: tl.constexpr, UNIT: tl.constexpr, SCALES: tl.constexpr, PER: tl.constexpr,
    ZP: tl.constexpr, WARPS: tl.constexpr, DEPTH: tl.constexpr, AHEAD: tl.constexpr, TILES: tl.constexpr,
    GROUPS: tl.constexpr, NORM: tl.constexpr, MODE: tl.constexpr, CVT: tl.constexpr, ASM: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Multiply up to 8 · GROUPS rows by 16 · TILES rows of a weight, on tensor cores."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    BF16: tl.constexpr = X.dtype.element_ty == tl.bfloat16
    OUTPUTS: tl.constexpr = N // 2 if MODE == 2 else N
    UNITS: tl.constexpr = (K + UNIT - 1) // UNIT
    first = tl.arange(0, WARPS)[:, None]
    lane = tl.arange(0, 32)[None, :]
    start = first * UNIT + lane % 4 * CODES
    inside = tl.where(start < K, start, 0)
    offset = inside * 2 if KIND == "half" else inside // 2 if KIND == "int4" else inside
    rows, scales, zeros, xs = (), (), (), ()
    # Without a clamp the rows of a tile are constant distances apart, which takes no registers.
    ROWS: tl.constexpr = 8 * TILES if MODE == 2 else 16 * TILES
    FILLED: tl.constexpr = OUTPUTS % ROWS == 0
    for i in tl.static_range(2 * TILES):
        row = tl.program_id(0) * ROWS + lane // 4
        row = row_at(row, i // 2 * 8 if MODE == 2 else i * 8, OUTPUTS, FILLED)
        if MODE == 2:
            row = row + i % 2 * OUTPUTS
        rows = rows + (W.to(tl.pointer_type(tl.int8)) + (row * ROW_BYTES + offset),)
        scales = scales + (S + row * SCALES,)
        zeros = zeros + (Z + row * ((SCALES + 1) // 2 if KIND == "int4" else SCALES),)
    for i in tl.static_range(GROUPS):
        xs = xs + (X + tl.minimum(8 * i + lane // 4, B - 1) * K + inside,)
    sums, squares = multiply_rows(
        rows, scales, zeros, xs, GAIN + inside, ZEROS + lane + first * 0, first, start, KIND, K, CODES, UNIT, UNITS,
        PER, WARPS, (UNITS + WARPS - 1) // WARPS, DEPTH, AHEAD, NORM, ZP, CVT, False, PDL, BF16, ASM,
    )  # fmt: skip
    # Of each pair of a tile and a group one warp finishes the sums and stores them.
    PAIRS: tl.constexpr = TILES * GROUPS
    sums = sums_of_warps(sums, 4, WARPS, PAIRS, PAIRS, ASM)
    if NORM:
        squares = sums_of_warps(first_two(squares), 2, WARPS, GROUPS, PAIRS, ASM)
    for slot in tl.static_range((PAIRS + WARPS - 1) // WARPS):
        pair = slot * WARPS + first
        even, odd = 1.0, 1.0
        if NORM:
            even, odd = norm_factors(squares[2 * slot], squares[2 * slot + 1], K, eps, BF16, ASM)
        c = sums[4 * slot : 4 * slot + 4]
        store_tile(
            OUT, c[0] * even, c[1] * odd, c[2] * even, c[3] * odd, tl.program_id(0) * TILES + pair // GROUPS,
            pair % GROUPS * 8, pair < PAIRS, B, OUTPUTS, MODE, ASM,
        )  # fmt: skip


@device_function
def row_at(first, distance: tl.constexpr, COUNT: tl.constexpr, FILLED: tl.constexpr):
    """Return row `first + distance`, int64; unless all tiles are FILLED the last of COUNT in place of those beyond."""
    if FILLED:
        row = first.to(tl.int64) + distance
    else:
        row = tl.minimum(first + distance, COUNT - 1).to(tl.int64)
    return row


@device_function
def store_tile(
    OUT, c0, c1, c2, c3, tile, column, is_there, B, OUTPUTS: tl.constexpr, MODE: tl.constexpr, ASM: tl.constexpr
):  # fmt: skip
    """Store the results of a tile for 8 columns from `column` on, which are rows of the batch; one of each warp."""
    lane = tl.arange(0, 32)[None, :]
    column = column + lane % 4 * 2
    if MODE == 2:
        row = tile * 8 + lane // 4
        p = OUT + column * OUTPUTS + row
        store_row(p, c0, c2, is_there & (row < OUTPUTS) & (column < B), MODE, ASM)
        store_row(p + OUTPUTS, c1, c3, is_there & (row < OUTPUTS) & (column + 1 < B), MODE, ASM)
    else:
        for i in tl.static_range(2):
            row = tile * 16 + i * 8 + lane // 4
            p = OUT + column * OUTPUTS + row
            store_row(p, c0 if i == 0 else c2, c0, is_there & (row < OUTPUTS) & (column < B), MODE, ASM)
            store_row(p + OUTPUTS, c1 if i == 0 else c3, c0, is_there & (row < OUTPUTS) & (column + 1 < B), MODE, ASM)
