"""The embedding of each row's token, and its rotary table."""

import triton
import triton.language as tl


@triton.jit
def _codes(data, index, BITS: tl.constexpr, is_there):
    """Return whole numbers of BITS bits, of which the first in a byte has the lowest bits."""
    byte = tl.load(data + index * BITS // 8, mask=is_there, other=0).to(tl.int32)
    return (byte >> ((index * BITS) % 8).to(tl.int32)) & ((1 << BITS) - 1)


@triton.jit
def embed(
    ids,
    positions,
    table,
    scales,
    zero_points,
    axes,
    inv_freq,
    hidden,
    cos,
    sin,
    VOCAB: tl.constexpr,
    K: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    FLOAT8: tl.constexpr,
    ZERO_POINTS: tl.constexpr,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """Look up COLUMNS of a row. Programs: parts of a row, rows; `positions` [3, B], `hidden` [B, K], `cos` [B, D].

    BITS is 16 for a table of halves [V, K], else the table holds codes in groups of GROUP with a scale each: E4M3 with
    FLOAT8, where the last group may be shorter, or whole numbers.
    """
    part = tl.program_id(0)
    row = tl.program_id(1)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    # A wrong token makes a wrong row, and no address outside the table.
    token = tl.minimum(tl.maximum(tl.load(ids + row, cache_modifier=".cg"), 0), VOCAB - 1)
    column = part * COLUMNS + tl.arange(0, COLUMNS)
    is_column = column < K
    if BITS == 16:
        value = tl.load(table + token * K + column, mask=is_column, other=0.0)
    else:
        GROUPS: tl.constexpr = (K + GROUP - 1) // GROUP
        group = column // GROUP
        code = _codes(table + token * (K * BITS // 8), column, BITS, is_column)
        scale = tl.load(scales + token * GROUPS + group, mask=is_column, other=0.0)
        if FLOAT8:
            # The bits of a half whose exponent is read with a bias of 15 and not 7.
            bits = ((code & 0x80) << 8) | ((code & 0x7F) << 7)
            step = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        elif ZERO_POINTS:
            code -= _codes(zero_points + token * ((GROUPS * BITS + 7) // 8), group, BITS, is_column)
            step = code.to(tl.float32)
        else:
            step = (code - (1 << (BITS - 1))).to(tl.float32)
        value = step * scale.to(tl.float32)
    tl.store(hidden + row * K + column, value.to(hidden.dtype.element_ty), mask=is_column)
    if part == 0:
        HALF: tl.constexpr = D // 2
        frequency = tl.arange(0, HALF)
        axis = tl.minimum(tl.maximum(tl.load(axes + frequency), 0), 2)
        position = tl.load(positions + axis * tl.num_programs(1) + row, cache_modifier=".cg")
        angle = position.to(tl.float32) * tl.load(inv_freq + frequency)
        cosine = tl.cos(angle)
        sine = tl.sin(angle)
        place = row * D + frequency
        tl.store(cos + place, cosine)
        tl.store(cos + place + HALF, cosine)
        tl.store(sin + place, sine)
        tl.store(sin + place + HALF, sine)
