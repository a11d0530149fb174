"""The products of a mixture of experts: gate and up of the chosen experts, and their sum through down.

The router's choice is read on the device: which weights a program multiplies by is known when it runs. Gate and up take
turns as rows of one weight [E, 2I, K], as ONNX Runtime's MoE and QMoE read them. A row of the batch has the same bits
in every batch, as each is computed by itself.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engines.kernels.fragments import num_units, unit_bytes, unit_constants
from engines.kernels.launch import Argument, Gpu, Launch, Unserved, Weight
from engines.kernels.product import MAX_BATCH, TYPES, ZEROS, weight_arguments

_MAX_WARPS = 16
_BYTES_ON_THEIR_WAY = 256  # of a lane


def launch_gate_up(
    weight: Weight,
    x: str,
    ids: str,
    out: str,
    batch: int,
    top: int,
    gpu: Gpu,
    *,
    num_experts: int,
    dtype: str,
    norm: str,
    eps: float,
) -> Launch:
    """Return the launch of out[b, j] = SiLU(gate) · up of n(x[b]) by expert ids[b, j].

    Args:
        weight: [E, 2I, K]; `rows` is 2I.
        x: Source of x, [batch, K].
        ids: Source of the chosen experts, int32 [batch, top].
        out: Source of the result, [batch, top, I].
        batch: Rows of x.
        top: Experts of a row.
        gpu: What it runs on.
        num_experts: E; an id outside [0, E) counts as the nearest one inside.
        dtype: Of x and out, `float16` or `bfloat16`.
        norm: Initializer of the gain of the RMSNorm of x.
        eps: Of the norm.

    Raises:
        Unserved: No kernel multiplies by such a weight, or so many rows.
    """
    _check(weight, batch, top)
    half = TYPES[dtype]
    units, size = num_units(weight), unit_bytes(weight)
    warps = 4
    while warps < 8 and -(-units // (2 * warps)) * size >= _BYTES_ON_THEIR_WAY // 2:
        warps *= 2
    return Launch(
        module="experts",
        function="experts_gate_up",
        arguments={
            "X": Argument(f"*{half}", x),
            "IDS": Argument("*i32", ids),
            **weight_arguments(weight, half),
            "GAIN": Argument(f"*{half}", f"weight:{norm}"),
            "ZEROS": Argument("*fp32", ZEROS),
            "OUT": Argument(f"*{half}", out),
            "eps": Argument("fp32", eps),
        },
        constants=_constants(weight, num_experts, dtype, top, gpu, warps, -(-units // warps), ahead=2),
        grid=(-(-weight.rows // 16), batch * top, 1),
        num_warps=warps,
    )


def launch_down(
    weight: Weight,
    x: str,
    ids: str,
    shares: str,
    out: str,
    batch: int,
    top: int,
    gpu: Gpu,
    *,
    num_experts: int,
    dtype: str,
) -> Launch:
    """Return the launch of out[b] += the sum over j of shares[b, j] · (W[ids[b, j]] · x[b, j]), rounded once.

    Args:
        weight: [E, N, K].
        x: Source of x, [batch, top, K].
        ids: Source of the chosen experts, int32 [batch, top].
        shares: Source of their weights, float32 [batch, top].
        out: Source of the result, [batch, N], in place.
        batch: Rows of out.
        top: Experts of a row.
        gpu: What it runs on.
        num_experts: E; an id outside [0, E) counts as the nearest one inside.
        dtype: Of x and out, `float16` or `bfloat16`.

    Raises:
        Unserved: No kernel multiplies by such a weight, so many rows, or so many experts a row.
    """
    _check(weight, batch, top)
    half = TYPES[dtype]
    slots = 1 << (top - 1).bit_length()
    units, size = num_units(weight), unit_bytes(weight)
    parts = 1
    while slots * parts < _MAX_WARPS and -(-units // parts) * size > _BYTES_ON_THEIR_WAY:
        parts *= 2
    rounds = -(-units // parts)
    return Launch(
        module="experts",
        function="experts_down",
        arguments={
            "X": Argument(f"*{half}", x),
            "IDS": Argument("*i32", ids),
            "SHARES": Argument("*fp32", shares),
            **weight_arguments(weight, half),
            "ZEROS": Argument("*fp32", ZEROS),
            "OUT": Argument(f"*{half}", out),
        },
        constants=_constants(weight, num_experts, dtype, top, gpu, slots * parts, rounds, ahead=2) | {"PARTS": parts},
        grid=(-(-weight.rows // 16), batch, 1),
        num_warps=slots * parts,
    )


def reference_gate_up(
    weight: NDArray[np.float64],
    x: NDArray[np.float64],
    ids: NDArray[np.int32],
    *,
    gain: NDArray[np.float64],
    eps: float,
) -> NDArray[np.float64]:
    """Return what `launch_gate_up` computes, [batch, top, I], from weight [E, 2I, K] and x [batch, K]."""
    normed = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * gain
    y = np.einsum("bjnk,bk->bjn", weight[ids], normed)
    gate, up = y[..., 0::2], y[..., 1::2]
    return np.asarray(gate / (1 + np.exp(-gate)) * up)


def reference_down(
    weight: NDArray[np.float64],
    x: NDArray[np.float64],
    ids: NDArray[np.int32],
    shares: NDArray[np.float64],
    residual: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Return what `launch_down` computes, [batch, N], from weight [E, N, K] and x [batch, top, K]."""
    return np.asarray(residual + np.einsum("bjnk,bjk,bj->bn", weight[ids], x, shares))


def _check(weight: Weight, batch: int, top: int) -> None:
    if not 1 <= batch <= MAX_BATCH:
        raise Unserved(f"{weight.data}: a batch of {batch}; there are kernels for 1 to {MAX_BATCH}")
    if not 1 <= top <= _MAX_WARPS:
        raise Unserved(f"{weight.data}: {top} experts a token; there are kernels for 1 to {_MAX_WARPS}")


def _constants(
    weight: Weight, num_experts: int, dtype: str, top: int, gpu: Gpu, warps: int, rounds: int, ahead: int
) -> dict[str, int | str]:
    return unit_constants(weight, dtype, gpu) | {
        "E": num_experts,
        "N": weight.rows,
        "K": weight.columns,
        "TOP": top,
        "WARPS": warps,
        "DEPTH": max(1, min(rounds, _BYTES_ON_THEIR_WAY // unit_bytes(weight))),
        "AHEAD": ahead,
        "TILES": 1,
    }
