"""A product of the rows of a batch by a weight, with what comes before and after it: the norm, SiLU · up, the residual.

Two forms. `product_vector` multiplies one row by a weight of halves in plain arithmetic, with the whole tile of a
program in registers before x is there: by it a prototype's step of 2B took 1.18 ms on an H200, 1.30 by the other.
`product_fragments` does everything else on tensor cores, with up to 32 columns a program (see
`engines.kernels.triton.row_products`). The sums of its columns do not depend on how many there are.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engines.kernels.fragments import Tiling, num_units, unit_bytes, unit_constants
from engines.kernels.launch import ADD, GLU, HALF, LOGITS, STORE, Argument, Gpu, Launch, Unserved, Weight

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

    From what was fastest in a prototype on an H200, with weights in another order: warps that fill the
    multiprocessors, as long as each has something to load; 256 bytes a lane on their way where all programs run at
    once, half of that where others follow. Two tiles a program halve the work on x, which for codes is as much as that
    on the weights: 193 instructions for a KB of weights of 4 bits instead of 248.
    """
    groups = _groups(MAX_BATCH if invariant else batch)
    tiles = 2 if weight.kind != HALF and groups <= 2 and weight.rows >= 64 * gpu.num_sms else 1
    programs = -(-weight.rows // (16 * tiles))
    warps = _warps(weight, programs, tiles, gpu)
    rounds, size = -(-num_units(weight) // warps), unit_bytes(weight)
    while num_units(weight) <= 4 and 2 * tiles * groups <= 4 and 2 * tiles * rounds * size <= 128:
        tiles *= 2
    at_once = tiles == 1 and groups == 1 and programs * warps <= 2 * _WARPS_PER_SM * gpu.num_sms
    depth = min(rounds, max(2, (256 if at_once else 128) // (size * tiles)))
    return Tiling(warps, depth, 2 if groups == 1 else 1, tiles)


def _warps(weight: Weight, programs: int, tiles: int, gpu: Gpu) -> int:
    """Return the warps of a program: up to 16, as long as a lane of each has enough bytes of its rows to load."""
    units, size = num_units(weight), unit_bytes(weight)
    warps = min(4, 1 << (units - 1).bit_length())
    while warps < 16 and 2 * warps <= units:
        bytes_now, bytes_then = -(-units // warps) * size, -(-units // (2 * warps)) * size
        resident = programs * warps * tiles / gpu.num_sms
        enough = 256 if warps >= 8 else 64 if resident < _WARPS_PER_SM / 2 else 96
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
