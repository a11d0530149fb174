"""Rows of a weight times the columns of a batch, split by k over the warps of a program.

A unit is what a warp takes at once: LOADS loads of WORDS words a lane from each of its rows, consecutive in memory for
the four lanes of a row, and never more than what has one scale. In round r a warp takes unit `first + r · STRIDE`, so
that neighbouring warps read neighbouring bytes. DEPTH units are on their way at any time, the first of them requested
before the wait for the kernel before; x and the gain are requested AHEAD steps ahead.

Beyond K a weight is read at the start of its row, and x is zero.

Constants of all functions:
    KIND: half, int4, int8 or fp8.              K: Columns.
    CODES: Weights of one load of a lane.       UNIT, UNITS: Columns of a unit; units of a row.
    SCALES: Scales of a row.                    PER: Units with one scale.
    TILES: 16 rows each.                        GROUPS: 8 columns of the batch each.
    NORM: Whether x is multiplied by a gain.    ZP: Whether there are zero points, otherwise 8 and 128.
    CVT: Whether the GPU converts float8.       LATE: Whether the kernel before has been waited for.
"""

import triton.language as tl

from engines.kernels.triton.device import device_function
from engines.kernels.triton.fragments import (
    add_squares,
    expand,
    from_lane,
    load_byte,
    load_halves,
    load_scale,
    load_words,
    load_zero,
    multiply_add,
    ordered,
    times,
)


@device_function
def request_unit(
    rows, scales, zeros, first, start, ROUND: tl.constexpr, KIND: tl.constexpr, K: tl.constexpr, CODES: tl.constexpr,
    UNIT: tl.constexpr, UNITS: tl.constexpr, PER: tl.constexpr, STRIDE: tl.constexpr, ZP: tl.constexpr,
    LATE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Return the words of a unit, row by row, then its scales and its zero points.

    Args:
        rows: Pointers to the lane's first weight of each row, of which there are two a tile.
        scales: Pointers to the scales of each row.
        zeros: Pointers to the zero points of each row.
        first: Unit of the warp in round 0.
        start: Column of the lane's first weight in round 0.
    """
    BITS: tl.constexpr = 16 if KIND == "half" else 4 if KIND == "int4" else 8
    WORDS: tl.constexpr = CODES * BITS // 32
    WHOLE: tl.constexpr = (ROUND + 1) * STRIDE * UNIT <= K
    unit = ()
    for i in tl.static_range(len(rows)):
        for load in tl.static_range(UNIT // (4 * CODES)):
            at = ROUND * STRIDE * UNIT + load * 4 * CODES
            if WHOLE:
                p = rows[i] + at * BITS // 8
            else:
                p = rows[i] + tl.where(start + at < K, at * BITS // 8, 0)
            unit = unit + load_words(p, WORDS, LATE, ASM)
    if KIND != "half":
        block = tl.minimum(first + ROUND * STRIDE, UNITS - 1) // PER
        for i in tl.static_range(len(rows)):
            unit = unit + (load_scale(scales[i] + block, ASM),)
        if ZP:
            for i in tl.static_range(len(rows)):
                if KIND == "int4":
                    unit = unit + ((load_byte(zeros[i] + block // 2, ASM) >> (block % 2 * 4)) & 15,)
                else:
                    unit = unit + (load_byte(zeros[i] + block, ASM),)
    return unit


@device_function
def zero_words(zero, KIND: tl.constexpr, ZP: tl.constexpr):
    """Return what `expand` adds to codes: two halves of -(1024 + z), and of -(64 + z) for 4 bits."""
    if KIND == "int4":
        if ZP:
            words = ((zero * 0x10001) | (0xE400E400 - 0x100000000), (zero * 0x100010) | (0xD400D400 - 0x100000000))
        else:
            low = tl.full([1, 1], 0xE408E408 - 0x100000000, tl.int32)
            words = (low, tl.full([1, 1], 0xD480D480 - 0x100000000, tl.int32))
    else:
        if ZP:
            words = ((zero * 0x10001) | (0xE400E400 - 0x100000000),)
        else:
            words = (tl.full([1, 1], 0xE480E480 - 0x100000000, tl.int32),)
    return words


@device_function
def request_step(
    pointers, start, STEP: tl.constexpr, K: tl.constexpr, CODES: tl.constexpr, UNIT: tl.constexpr,
    STRIDE: tl.constexpr, LATE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Return 8 halves of a step of each of some rows of x, or of the gain, as words.

    Args:
        pointers: To the lane's first column of each row in round 0.
        start: That column.
    """
    STEPS: tl.constexpr = UNIT // 32
    ROUND: tl.constexpr = STEP // STEPS
    COLUMN: tl.constexpr = STEP % STEPS * 8
    AT: tl.constexpr = ROUND * STRIDE * UNIT + COLUMN // CODES * 4 * CODES + COLUMN % CODES
    words = ()
    for i in tl.static_range(len(pointers)):
        if (ROUND + 1) * STRIDE * UNIT <= K:
            words = words + load_halves(pointers[i] + AT, LATE, ASM)
        else:
            inside = start + AT < K
            halves = load_halves(pointers[i] + tl.where(inside, AT, 0), LATE, ASM)
            for j in tl.static_range(4):
                words = words + (tl.where(inside, halves[j], 0),)
    return words


@device_function
def request_gain(
    gain, start, STEP: tl.constexpr, K: tl.constexpr, CODES: tl.constexpr, UNIT: tl.constexpr, STRIDE: tl.constexpr,
    BF16: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Return the gain of a step; of float16 a sixteenth, so that its product with x stays in range."""
    words = request_step((gain,), start, STEP, K, CODES, UNIT, STRIDE, False, ASM)
    if not BF16:
        sixteenth = tl.full(words[0].shape, 0x2C002C00, tl.int32)
        words = times(words, (sixteenth, sixteenth, sixteenth, sixteenth), BF16, ASM)
    return words


@device_function
def prepare_step(
    words, gain, squares, GROUPS: tl.constexpr, KIND: tl.constexpr, NORM: tl.constexpr, BF16: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Return x of a step, times the gain if there is one, in the order of the weights; and the sums of its squares."""
    xs = ()
    after = ()
    for group in tl.static_range(GROUPS):
        x = words[4 * group : 4 * group + 4]
        if NORM:
            s = squares[4 * group : 4 * group + 4]
            after = after + add_squares(s[0], s[1], s[2], s[3], x, BF16, ASM)
            x = times(x, gain, BF16, ASM)
        xs = xs + ordered(x, KIND, ASM)
    return xs, after


@device_function
def multiply_step(
    sums, unit, zeros, x, STEP: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr, KIND: tl.constexpr,
    CVT: tl.constexpr, BF16: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Return the accumulators of all tiles and groups after a step of a unit.

    Args:
        sums: Four of each tile and group.
        unit: Words of `request_unit`.
        zeros: Words of `zero_words` of each row.
        x: Four words of each group.
        STEP: Number of the step in its unit.
        ROWS: Rows of a lane.
        WORDS: Words of a row in a unit.
    """
    GROUPS: tl.constexpr = len(x) // 4
    TAKEN: tl.constexpr = 4 if KIND == "half" else 1 if KIND == "int4" else 2
    FIRST: tl.constexpr = STEP * TAKEN
    after = ()
    for tile in tl.static_range(ROWS // 2):
        low = unit[2 * tile * WORDS + FIRST : 2 * tile * WORDS + FIRST + TAKEN]
        low = expand(low, zeros[2 * tile], KIND, CVT, BF16, ASM)
        high = unit[(2 * tile + 1) * WORDS + FIRST : (2 * tile + 1) * WORDS + FIRST + TAKEN]
        high = expand(high, zeros[2 * tile + 1], KIND, CVT, BF16, ASM)
        for group in tl.static_range(GROUPS):
            c = sums[4 * (tile * GROUPS + group) : 4 * (tile * GROUPS + group) + 4]
            x8 = x[4 * group : 4 * group + 4]
            after = after + multiply_add(c[0], c[1], c[2], c[3], low, high, x8, BF16, ASM)
    return after


@device_function
def add_scaled(totals, sums, scales, GROUPS: tl.constexpr, FACTOR: tl.constexpr):
    """Return totals + sums · scale · FACTOR, of each tile, group and row."""
    after = ()
    for n in tl.static_range(len(sums) // 4):
        for i in tl.static_range(4):
            scale = scales[n // GROUPS * 2 + i // 2] * FACTOR + tl.zeros_like(sums[4 * n + i])
            after = after + (tl.fma(sums[4 * n + i], scale, totals[4 * n + i]),)
    return after


@device_function
def copies(x, N: tl.constexpr):
    """Return a tuple of N times the same."""
    many = ()
    for _ in tl.static_range(N):
        many = many + (x,)
    return many


@device_function
def next_steps(
    ahead, gains, xs, gain, start, STEP: tl.constexpr, TOTAL: tl.constexpr, K: tl.constexpr, CODES: tl.constexpr,
    UNIT: tl.constexpr, STRIDE: tl.constexpr, NORM: tl.constexpr, BF16: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Return the steps of x and of the gain on their way: without the first, with STEP if it is one of TOTAL."""
    ahead = ahead[4 * len(xs) :]
    gains = gains[4:]
    if STEP < TOTAL:
        ahead = ahead + request_step(xs, start, STEP, K, CODES, UNIT, STRIDE, True, ASM)
        if NORM:
            gains = gains + request_gain(gain, start, STEP, K, CODES, UNIT, STRIDE, BF16, ASM)
    return ahead, gains


@device_function
def request_first(
    rows, scales, zeros, gain, first, start, KIND: tl.constexpr, K: tl.constexpr, CODES: tl.constexpr,
    UNIT: tl.constexpr, UNITS: tl.constexpr, PER: tl.constexpr, STRIDE: tl.constexpr, COUNT: tl.constexpr,
    COUNT_STEPS: tl.constexpr, NORM: tl.constexpr, ZP: tl.constexpr, LATE: tl.constexpr, BF16: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Return COUNT units of a weight and COUNT_STEPS steps of the gain, which no kernel before writes."""
    ring = ()
    for r in tl.static_range(COUNT):
        ring = ring + request_unit(
            rows, scales, zeros, first, start, r, KIND, K, CODES, UNIT, UNITS, PER, STRIDE, ZP, LATE, ASM
        )
    gains = ()
    if NORM:
        for step in tl.static_range(COUNT_STEPS):
            gains = gains + request_gain(gain, start, step, K, CODES, UNIT, STRIDE, BF16, ASM)
    return ring, gains


@device_function
def zero_words_of_rows(unit, ROWS: tl.constexpr, KIND: tl.constexpr, ZP: tl.constexpr):
    """Return `zero_words` of each row of a unit, whose zero points are its last words."""
    words = ()
    for i in tl.static_range(ROWS):
        words = words + (zero_words(unit[len(unit) - ROWS + i], KIND, ZP),)
    return words


@device_function
def multiply_rows(
    rows, scales, zeros, xs, gain, zero, first, start, KIND: tl.constexpr, K: tl.constexpr, CODES: tl.constexpr,
    UNIT: tl.constexpr, UNITS: tl.constexpr, PER: tl.constexpr, STRIDE: tl.constexpr, ROUNDS: tl.constexpr,
    DEPTH: tl.constexpr, AHEAD: tl.constexpr, NORM: tl.constexpr, ZP: tl.constexpr, CVT: tl.constexpr,
    LATE: tl.constexpr, PDL: tl.constexpr, BF16: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Return a warp's part of the products, and of the sums of the squares of x.

    Args:
        rows, scales, zeros: Pointers of `request_unit`.
        xs: For each group of columns, the pointer to the lane's first column of its row of x.
        gain: Pointer to the lane's first column of the gain.
        zero: Pointer to a zero of the lane.
        first: Unit of the warp in round 0.
        start: Column of the lane in round 0.

    Returns:
        For each tile and group four accumulators of `multiply_add`; for each group four of `add_squares`.
    """
    ROWS: tl.constexpr = len(rows)
    GROUPS: tl.constexpr = len(xs)
    STEPS: tl.constexpr = UNIT // 32
    WORDS: tl.constexpr = STEPS * (4 if KIND == "half" else 1 if KIND == "int4" else 2)
    FACTOR: tl.constexpr = 256.0 if KIND == "fp8" and not CVT else 1.0  # see expand_e4m3
    ring, gains = request_first(
        rows, scales, zeros, gain, first, start, KIND, K, CODES, UNIT, UNITS, PER, STRIDE, min(DEPTH, ROUNDS),
        min(AHEAD, ROUNDS * STEPS), NORM, ZP, LATE or not PDL, BF16, ASM,
    )  # fmt: skip
    SIZE: tl.constexpr = len(ring) // min(DEPTH, ROUNDS)
    if PDL:
        if not LATE:
            tl.extra.cuda.gdc_wait()
    ahead = ()
    for step in tl.static_range(min(AHEAD, ROUNDS * STEPS)):
        ahead = ahead + request_step(xs, start, step, K, CODES, UNIT, STRIDE, True, ASM)
    # After the loads above: the assembler would put each of them off until its mma.
    none = load_zero(zero, ASM)
    totals = copies(none, 2 * ROWS * GROUPS)
    sums = totals
    squares = copies(none, 4 * GROUPS)
    for r in tl.static_range(ROUNDS):
        unit = ring[:SIZE]
        ring = ring[SIZE:]
        shifts = zero_words_of_rows(unit, ROWS, KIND, ZP)
        for step in tl.static_range(STEPS):
            x, squares = prepare_step(ahead[: 4 * GROUPS], gains[:4], squares, GROUPS, KIND, NORM, BF16, ASM)
            ahead, gains = next_steps(
                ahead, gains, xs, gain, start, r * STEPS + step + AHEAD, ROUNDS * STEPS, K, CODES, UNIT, STRIDE, NORM,
                BF16, ASM,
            )  # fmt: skip
            sums = multiply_step(sums, unit, shifts, x, step, ROWS, WORDS, KIND, CVT, BF16, ASM)
        if KIND != "half":
            totals = add_scaled(totals, sums, unit[ROWS * WORDS :], GROUPS, FACTOR)
            sums = copies(none, 2 * ROWS * GROUPS)
        if r + DEPTH < ROUNDS:
            ring = ring + request_unit(
                rows, scales, zeros, first, start, r + DEPTH, KIND, K, CODES, UNIT, UNITS, PER, STRIDE, ZP, True, ASM
            )
    if KIND != "half":
        sums = totals
    return sums, squares


@device_function
def first_two(squares):
    """Return the two accumulators of each four of `add_squares` that are not zero."""
    pairs = ()
    for i in tl.static_range(len(squares) // 4):
        pairs = pairs + squares[4 * i : 4 * i + 2]
    return pairs


@device_function
def norm_factors(s0, s1, K: tl.constexpr, eps, BF16: tl.constexpr, ASM: tl.constexpr):
    """Return, for the columns 2t and 2t + 1 of each lane, by what products of x · gain are normalised.

    Of s0 and s1 of `add_squares`, summed over the warps: row and column 2t are in s0 of lane 9t, row and column 2t + 1
    in s1 of lane 9t + 4.
    """
    lane = tl.arange(0, 32)[None, :] % 4 * 9
    SCALE: tl.constexpr = 1.0 if BF16 else 16.0  # of the gain
    even = tl.rsqrt(from_lane(s0, lane, ASM) / K + eps) * SCALE
    odd = tl.rsqrt(from_lane(s1, lane + 4, ASM) / K + eps) * SCALE
    return even, odd
