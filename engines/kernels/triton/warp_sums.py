"""Sums over the warps of a program, through shared memory by hand.

`tl.reduce` takes its operands one after the other, with 10 barriers for four accumulators and every sum in every warp:
183 barriers for 64 rows by 32 columns, in which a program does nothing else (Triton 3.8). Here each warp fetches what
it stores, and adds in the order of the warps, whatever else there is to be added.
"""

import triton
import triton.language as tl

from engines.kernels.triton.device import device_function


@triton.constexpr_function
def exchange(W, SIZE, QUADS, ACTIVE, SLOTS):
    """Return the machine code; operands are SIZE · SLOTS results, then SIZE · QUADS parts."""
    stride = W * 32 * 4 * SIZE
    at_once = max(1, min(QUADS, 16384 // stride))  # 16 KB are filled between two barriers
    results = [[f"${SIZE * slot + i}" for i in range(SIZE)] for slot in range(SLOTS)]
    parts = [[f"${SIZE * (SLOTS + quad) + i}" for i in range(SIZE)] for quad in range(QUADS)]
    read = [f"r{i}" for i in range(SIZE)]
    lines = [
        f".shared .align 16 .b8 parts[{at_once * stride}]",
        f".reg .b32 mine, lane, warp, quad, at; .reg .pred is_mine; .reg .f32 {', '.join(read)}",
        f"mov.b32 at, parts; mov.b32 lane, %tid.x; mad.lo.u32 mine, lane, {4 * SIZE}, at; shr.u32 warp, lane, 5",
        f"and.b32 lane, lane, 31; mad.lo.u32 lane, lane, {4 * SIZE}, at",
        *(f"mov.f32 {result}, 0f00000000" for slot in results for result in slot),
    ]
    for begin in range(0, QUADS, at_once):
        if begin:
            lines.append("bar.sync 0")
        for quad in range(at_once):
            lines.append(f"st.shared.v{SIZE}.f32 [mine + {quad * stride}], {{{', '.join(parts[begin + quad])}}}")
        lines.append("bar.sync 0")
        for slot, result in enumerate(results):
            lines += [
                f"add.u32 quad, warp, {slot * W}; setp.lt.u32 is_mine, quad, {ACTIVE}",
                f"and.b32 quad, quad, {QUADS - 1}; setp.ge.and.u32 is_mine, quad, {begin}, is_mine",
                f"setp.lt.and.u32 is_mine, quad, {begin + at_once}, is_mine; sub.u32 quad, quad, {begin}",
                f"mad.lo.u32 at, quad, {stride}, lane",
            ]
            for warp in range(W):
                lines.append(f"@is_mine ld.shared.v{SIZE}.f32 {{{', '.join(read)}}}, [at + {warp * 32 * 4 * SIZE}]")
                lines += [f"@is_mine add.f32 {sum_}, {sum_}, {part}" for sum_, part in zip(result, read, strict=True)]
    return f"{{ {'; '.join(lines)}; }}"


@triton.constexpr_function
def constraints(results, parts):
    """Return the constraints of so many operands."""
    return ",".join(["=&f"] * results + ["f"] * parts)


@triton.constexpr_function
def float_types(count):
    """Return the types of so many results."""
    return (tl.float32,) * count


@device_function
def sums_of_warps(
    parts, SIZE: tl.constexpr, W: tl.constexpr, QUADS: tl.constexpr, ACTIVE: tl.constexpr, ASM: tl.constexpr
):
    """Return sums over the warps of a program, spread over its warps.

    Args:
        parts: SIZE tensors [W, 32] of each of QUADS quads, 2 or 4; QUADS and W are powers of two.
        ACTIVE: Sums that are wanted, each of SIZE tensors.

    Returns:
        SIZE tensors [W, 32] for each of ceil(ACTIVE / W) slots: those of slot s of warp w are the sums of quad
        (s · W + w) % QUADS, as long as s · W + w < ACTIVE.
    """
    SLOTS: tl.constexpr = (ACTIVE + W - 1) // W
    sums = ()
    if W == 1:
        for slot in tl.static_range(SLOTS):
            sums = sums + parts[slot % QUADS * SIZE : slot % QUADS * SIZE + SIZE]
    elif ASM:
        sums = tl.inline_asm_elementwise(
            exchange(W, SIZE, QUADS, ACTIVE, SLOTS),
            constraints(SIZE * SLOTS, SIZE * QUADS),
            parts,
            dtype=float_types(SIZE * SLOTS),
            is_pure=False,
            pack=1,
        )
    else:
        warp = tl.arange(0, W)[:, None]
        for slot in tl.static_range(SLOTS):
            for i in tl.static_range(SIZE):
                mine = tl.zeros([W, 32], tl.float32)
                for quad in tl.static_range(QUADS):
                    whole = tl.sum(parts[quad * SIZE + i], axis=0, keep_dims=True)
                    mine = tl.where((slot * W + warp) % QUADS == quad, whole, mine)
                sums = sums + (mine,)
    return sums
