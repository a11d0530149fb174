"""A product of the rows of a batch by a weight, with what comes before and after it: the norm, SiLU · up, the residual.

Two forms. `product_vector` multiplies one row by a weight of halves in plain arithmetic, with the whole tile of a
program in registers before x is there: by it a prototype's step of 2B took 1.18 ms on an H200, 1.30 by the other.
`product_fragments` does everything else on tensor cores, with up to 32 columns a program (see
`engines.kernels.triton.row_products`). The sums of its columns do not depend on how many there are, nor on the tiles of
a program.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engines.kernels.fragments import Tiling, num_units, unit_bytes, unit_constants
from engines.kernels.launch import ADD, GLU, HALF, INT4, INT8, LOGITS, STORE, Argument, Gpu, Launch, Unserved, Weight

TYPES = {"float16": "fp16", "bfloat16": "bf16"}
MAX_BATCH = 32
ZEROS = "buffer:zeros"
_LARGEST_CHUNK = 2048
_MAX_VECTOR_BYTES = 1 << 16  # of a program's tile; its 8 warps have four times as much in registers
_WARPS_PER_SM = 15


def launch(
    weight: Weight,
    x: str,
    out: str,
    batch: int,
    gpu: Gpu,
    *,
    dtype: str,
    mode: int,
    norm: str | None,
    eps: float = 0.0,
    invariant: bool = False,
) -> Launch:
    """Return the launch of a product.

    Args:
        weight: The weight; with `GLU` gate in its first half of rows, up in the second.
        x: Source of x, [batch, K].
        out: Source of the result, [batch, N], or [batch, N / 2] with `GLU`; float32 with `LOGITS`.
        batch: Rows of x.
        gpu: What it runs on.
        dtype: Of x and out, `float16` or `bfloat16`.
        mode: `STORE`, `ADD`, `GLU` or `LOGITS`.
        norm: Initializer of the gain of the RMSNorm of x; None for no norm.
        eps: Of the norm.
        invariant: Whether a row's result must have the same bits in every batch.

    Raises:
        Unserved: No kernel multiplies by such a weight, or so many rows.
    """
    if not 1 <= batch <= MAX_BATCH:
        raise Unserved(f"{weight.data}: a batch of {batch}; there are kernels for 1 to {MAX_BATCH}")
    if weight.rows % (16 if mode == GLU else 1):
        raise Unserved(f"{weight.data}: {weight.rows} rows of gate and up; there are kernels for multiples of 16")
    if batch == 1 and weight.kind == HALF and not invariant and _fits_vector(weight, mode):
        return _vector(weight, x, out, gpu, dtype, mode, norm, eps)
    return _fragments(weight, x, out, batch, gpu, dtype, mode, norm, eps, invariant)


def buffers() -> dict[str, tuple[int, bool]]:
    """Return the memory that products take from the plan: bytes, and whether it is zeroed."""
    return {"zeros": (128, True)}


def reference(
    weight: NDArray[np.float64],
    x: NDArray[np.float64],
    *,
    mode: int,
    gain: NDArray[np.float64] | None = None,
    eps: float = 0.0,
    residual: NDArray[np.float64] | None = None,
) -> NDArray[np.float64]:
    """Return the result [batch, N], or [batch, N / 2] with `GLU`, in float64.

    Args:
        weight: [N, K].
        x: [batch, K].
        mode: As in `launch`.
        gain: [K] of the norm.
        eps: Of the norm.
        residual: [batch, N] of `ADD`.
    """
    if gain is not None:
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * gain
    y = x @ weight.T
    if mode == GLU:
        gate, up = np.split(y, 2, -1)
        return np.asarray(gate / (1 + np.exp(-gate)) * up)
    if mode == ADD:
        assert residual is not None
        return residual + y
    return y


def tiling(weight: Weight, batch: int, gpu: Gpu, *, invariant: bool) -> Tiling:
    """Return how a product on tensor cores is split; `invariant` has what serves every batch.

    The order of a sum depends on `warps` alone. Measured on an H200, batch 1, weights of 4 bits in blocks of 128, in
    microseconds; the second is what an earlier version of this function chose:

    | rows · columns | warps, depth, tiles | | before | |
    |---|---|---|---|---|
    | 4096 · 2048 | 8, 2, 1 | 3.85 | 4, 4, 1 | 5.07 |
    | 12288 · 2048 | 4, 2, 2 | 8.4 | another | 9.75 |
    | 4096 · 12288 | 8, 6, 2 | 11.5 | 8, 8, 1 | 14.9 |
    | 24576 · 4096 | 4, 4, 2 | 24.5 | not recorded | |

    All else is reasoned and not measured. Where everything can be on its way at once it is, in warps that fill the
    multiprocessors; where there is more, two tiles a program halve the work on x, which for codes is as much as that on
    the weights, and half of a row is on its way. Every program reads all of x: with 32 columns of halves that is twice
    the bytes of one tile, and as many as those of two. More tiles would not fit into registers: four take all 255 at 32
    columns, and codes keep two sets of sums.
    """
    groups = _groups(MAX_BATCH if invariant else batch)
    tiles = _tiles(weight, groups, gpu)
    programs = -(-weight.rows // (16 * tiles))
    warps = _warps(weight, programs, tiles, gpu)
    rounds, size = -(-num_units(weight) // warps), unit_bytes(weight)
    while num_units(weight) <= 4 and 2 * tiles * groups <= 4 and 2 * tiles * rounds * size <= 128:
        tiles *= 2
    depth = _depth(weight, groups, tiles, programs, warps, gpu)
    ahead = 2 if groups == 1 or _is_alone(weight, groups, warps) else 1
    return Tiling(warps, depth, ahead, tiles)


def _tiles(weight: Weight, groups: int, gpu: Gpu) -> int:
    """Return the tiles of a program: two where programs enough are left, and each has more than it can request."""
    programs = -(-weight.rows // 32)
    if 10 * programs < 9 * gpu.num_sms or (weight.kind != HALF and groups == 4):
        return 1
    if weight.kind == HALF:
        is_worth_it = groups > 1 or programs >= 2 * gpu.num_sms
    else:
        is_worth_it = programs * num_units(weight) >= 3 * _WARPS_PER_SM * gpu.num_sms
    return 2 if is_worth_it else 1


def _is_alone(weight: Weight, groups: int, warps: int) -> bool:
    """Return whether no second program fits a multiprocessor and each may request as much as two would."""
    return weight.kind == HALF and groups == 4 and warps <= 8


def _depth(weight: Weight, groups: int, tiles: int, programs: int, warps: int, gpu: Gpu) -> int:
    """Return the units that a warp has requested at any time."""
    rounds, size = -(-num_units(weight) // warps), unit_bytes(weight) * tiles
    if weight.kind == HALF:
        wanted = 256 if _is_alone(weight, groups, warps) else 128
    elif tiles == 1 or groups == 2:
        wanted = 128
    else:
        # What registers hold on all GPUs, also of rows of 12288.
        wanted = min(384 if weight.zero_points is None else 320, rounds // 2 * size)
    if tiles == 1 and groups == 1 and programs * warps <= 2 * _WARPS_PER_SM * gpu.num_sms:
        wanted = 256
    units = wanted // size
    if weight.kind in (INT4, INT8) and weight.block < 128:
        # As many registers as blocks of 128 take, with their scales and zero points: of blocks of 32 these are half.
        beside = 8 if weight.zero_points is None else 16
        units = wanted * (32 + beside) // 32 // (size + beside * tiles)
    return min(rounds, max(2, units))


def _warps(weight: Weight, programs: int, tiles: int, gpu: Gpu) -> int:
    """Return the warps of a program: up to 16, as long as a lane of each has enough bytes of its rows to load."""
    units, size = num_units(weight), unit_bytes(weight)
    warps = min(4, 1 << (units - 1).bit_length())
    while warps < 16 and 2 * warps <= units:
        bytes_now, bytes_then = -(-units // warps) * size, -(-units // (2 * warps)) * size
        resident = programs * warps * tiles / gpu.num_sms
        enough = 256 if warps >= 8 else 64 if resident < _WARPS_PER_SM else 96
        if bytes_then < enough or (resident >= _WARPS_PER_SM and (warps >= 8 or bytes_now <= 384)):
            break
        warps *= 2
    return warps


def _groups(batch: int) -> int:
    """Return the groups of 8 columns of a program: a power of two."""
    return 1 << (-(-batch // 8) - 1).bit_length()


def _fits_vector(weight: Weight, mode: int) -> bool:
    """Return whether a tile of one row, or of one of gate and one of up, fits into registers."""
    return weight.columns * 2 * (2 if mode == GLU else 1) <= _MAX_VECTOR_BYTES and weight.columns % 8 == 0


def _vector(weight: Weight, x: str, out: str, gpu: Gpu, dtype: str, mode: int, norm: str | None, eps: float) -> Launch:
    half = TYPES[dtype]
    outputs = weight.rows // (2 if mode == GLU else 1)
    rows, warps = _vector_tile(weight, gpu, mode)
    chunk = 1 << (weight.columns - 1).bit_length()
    while chunk > _LARGEST_CHUNK or (chunk > 64 and weight.columns % chunk):
        chunk //= 2
    if chunk < 256:  # few lanes would share a row
        chunk = min(1 << (weight.columns - 1).bit_length(), 256)
    return Launch(
        module="product",
        function="product_vector",
        arguments={
            "X": Argument(f"*{half}", x),
            "W": Argument(f"*{half}", f"weight:{weight.data}"),
            "GAIN": Argument(f"*{half}", "null" if norm is None else f"weight:{norm}"),
            "OUT": Argument("*fp32" if mode == LOGITS else f"*{half}", out),
            "eps": Argument("fp32", eps),
        },
        constants={
            "N": weight.rows,
            "K": weight.columns,
            "ROWS": rows,
            "CHUNK": chunk,
            "NORM": int(norm is not None),
            "MODE": mode,
        },
        grid=(-(-outputs // rows), 1, 1),
        num_warps=warps,
    )


def _vector_tile(weight: Weight, gpu: Gpu, mode: int) -> tuple[int, int]:
    """Return rows and warps of a program of the vector form, from what was fastest in a prototype on an H200.

    16 KB of weights for 4 warps and 32 KB for 8; 32 KB for queries, keys and values; 48 KB for what is added, whose
    rows are long. Of short rows enough for two loads a lane.
    """
    row_bytes = 2 * weight.columns * (2 if mode == GLU else 1)
    outputs = weight.rows // (2 if mode == GLU else 1)
    warps = 4 if 2 * weight.columns <= 4096 and mode != ADD else 8
    most = {STORE: 8192 * 4, ADD: 6144 * warps}.get(mode, 4096 * warps)
    rows = 1
    while rows * row_bytes < 1024 * warps and 2 * rows <= outputs:
        rows *= 2
    while (
        rows < 8 and 2 * rows * row_bytes <= most and -(-outputs // (2 * rows)) * warps >= _WARPS_PER_SM * gpu.num_sms
    ):
        rows *= 2
    return rows, warps


def _fragments(
    weight: Weight,
    x: str,
    out: str,
    batch: int,
    gpu: Gpu,
    dtype: str,
    mode: int,
    norm: str | None,
    eps: float,
    invariant: bool,
) -> Launch:
    half = TYPES[dtype]
    tile = tiling(weight, batch, gpu, invariant=invariant)
    constants = unit_constants(weight, dtype, gpu) | {
        "N": weight.rows,
        "K": weight.columns,
        "WARPS": tile.warps,
        "DEPTH": tile.depth,
        "AHEAD": tile.ahead,
        "TILES": tile.tiles,
        "GROUPS": _groups(batch),
        "NORM": int(norm is not None),
        "MODE": mode,
    }
    return Launch(
        module="product",
        function="product_fragments",
        arguments={
            "X": Argument(f"*{half}", x),
            **weight_arguments(weight, half),
            "GAIN": Argument(f"*{half}", "null" if norm is None else f"weight:{norm}"),
            "ZEROS": Argument("*fp32", ZEROS),
            "OUT": Argument("*fp32" if mode == LOGITS else f"*{half}", out),
            "eps": Argument("fp32", eps),
            "B": Argument("i32", batch),
        },
        constants=constants,
        grid=(-(-weight.rows // (16 * tile.tiles)), 1, 1),
        num_warps=tile.warps,
    )


def weight_arguments(weight: Weight, half: str) -> dict[str, Argument]:
    """Return the pointers to a weight, its scales and its zero points."""
    scales = "fp32" if weight.kind == "fp8" else "fp16"
    return {
        "W": Argument(f"*{half}" if weight.kind == HALF else "*u8", f"weight:{weight.data}"),
        "S": Argument(f"*{scales}", "null" if weight.scales is None else f"weight:{weight.scales}"),
        "Z": Argument("*u8", "null" if weight.zero_points is None else f"weight:{weight.zero_points}"),
    }
