"""Plain definitions, in float64, of the operators of `qwen3vl.cpu` (docs/cpu_kernels.md), and graphs run by them.

Shapes: M rows of x, N rows (outputs) and K columns (inputs) of a weight, J blocks of a row, G weights of a block.
Attention: B batch, S new tokens, T cache capacity, N query heads, K kv heads, H head dim.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

DOMAIN = "qwen3vl.cpu"
Array = NDArray[Any]
_ROWS = 16


def parts_of_tiles(tiles: Array, K: int, bits: int, block: int) -> tuple[Array, Array, Array]:
    """Return codes [rows, J, G], scales · unit [rows, J] in float64, and zero points [rows, J]; rows of whole tiles."""
    num_blocks, code_bytes = -(-K // block), _ROWS * block * bits // 8
    codes, scales, zeros = [], [], []
    for tile in tiles:
        raw = tile[: num_blocks * code_bytes].reshape(num_blocks, -1, _ROWS, 4)  # [J, g, row, j]
        low_first = [raw & 15, raw >> 4] if bits == 4 else [raw]
        codes.append(
            np.concatenate([each.transpose(2, 0, 1, 3).reshape(_ROWS, num_blocks, -1) for each in low_first], -1)
        )
        at = num_blocks * code_bytes
        scale = tile[at : at + 32 * num_blocks].view(np.float16).astype(np.float64)
        zero = tile[at + 32 * num_blocks : at + 48 * num_blocks]
        unit = float(tile[at + 48 * num_blocks : at + 48 * num_blocks + 4].view(np.float32)[0])
        scales.append(unit * scale.reshape(num_blocks, _ROWS).T)
        zeros.append(zero.reshape(num_blocks, _ROWS).T)
    return np.concatenate(codes), np.concatenate(scales), np.concatenate(zeros)


def weight_of_tiles(tiles: Array, N: int, K: int, bits: int, block: int) -> Array:
    """Return the weight [N, K] that tiles stand for."""
    codes, scales, zeros = parts_of_tiles(tiles, K, bits, block)
    weights = scales[..., None] * (codes.astype(np.float64) - zeros[..., None])
    return weights.reshape(len(codes), -1)[:N, :K]


def rms_norm(x: Array, weight: Array, epsilon: float) -> Array:
    """Return x [..., K] over its root mean square, times weight [K]."""
    x = np.asarray(x, np.float64)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * weight


def swiglu(x: Array) -> Array:
    """Return silu(gate) · up of x [..., 2K], gate first."""
    gate, up = np.split(np.asarray(x, np.float64), 2, -1)
    with np.errstate(over="ignore"):  # exp of a large number is infinite, and its inverse 0, as it should be
        return gate / (1 + np.exp(-gate)) * up


def round_rows(x: Array, block: int) -> Array:
    """Return x [..., K] as a product sees it: each block of a row in 8 bits, by a scale of its own."""
    missing = -x.shape[-1] % block
    padded = np.pad(np.asarray(x, np.float64), [(0, 0)] * (x.ndim - 1) + [(0, missing)])
    blocks = padded.reshape(*x.shape[:-1], -1, block)
    scales = np.abs(blocks).max(-1, keepdims=True) / 127
    codes = np.rint(blocks / np.where(scales > 0, scales, 1))
    return (codes * scales).reshape(padded.shape)[..., : x.shape[-1]]


def matmul(
    x: Array,
    weight_NK: Array,
    *,
    block: int,
    bias: Array | None = None,
    norm: Array | None = None,
    residual: Array | None = None,
    epsilon: float = 1e-6,
    gated: bool = False,
    is_rounded: bool = True,
) -> Array:
    """Return what MatMulInt4 and MatMulInt8 do; `is_rounded=False` leaves the activations as they are."""
    f = swiglu(x) if gated else np.asarray(x, np.float64) if norm is None else rms_norm(x, norm, epsilon)
    y = (round_rows(f, block) if is_rounded else f) @ np.asarray(weight_NK, np.float64).T
    return y + (0 if bias is None else bias) + (0 if residual is None else residual)


def stored(values: Array, kind: str, scales_KH: Array | None = None) -> Array:
    """Return keys or values [B, K, S, H] as a cache of a kind (float32, float16, int8, int4) holds them."""
    if kind == "float32":
        return np.asarray(values, np.float32)
    if kind == "float16":
        return np.clip(np.asarray(values, np.float32), -65504, 65504).astype(np.float16)
    assert scales_KH is not None
    largest = 127 if kind == "int8" else 7
    codes = np.clip(np.rint(values / scales_KH[None, :, None]), -largest - 1, largest).astype(np.int8)
    if kind == "int8":
        return codes
    pairs = (codes + 8).astype(np.uint8)
    return pairs[..., 0::2] | pairs[..., 1::2] << 4


def read(cache: Array, kind: str, scales_KH: Array | None = None) -> Array:
    """Return what a cache stands for, float64 [B, K, T, H]."""
    if kind in ("float32", "float16"):
        return cache.astype(np.float64)
    assert scales_KH is not None
    codes: Array = cache
    if kind == "int4":
        codes = np.stack([cache & 15, cache >> 4], -1).reshape(*cache.shape[:-1], -1).astype(np.int16) - 8
    return codes.astype(np.float64) * scales_KH[None, :, None]


def decode_attention(
    qkv: Array,
    q_norm: Array,
    k_norm: Array,
    cos: Array,
    sin: Array,
    past_key: Array,
    past_value: Array,
    past_lengths: Array,
    *,
    num_heads: int,
    kv_num_heads: int,
    scale: float,
    epsilon: float,
    kind: str = "float32",
    key_scales: Array | None = None,
    value_scales: Array | None = None,
    held: tuple[Array, Array] | None = None,
) -> tuple[Array, Array, Array]:
    """Return out [B, S, N·H] and the new caches, which are copies.

    `held` are caches to attend to instead, where numbers in the middle between two codes may have become the other.
    """
    B, S, _ = qkv.shape
    H = len(q_norm)
    key_KH, value_KH = (None if each is None else each.reshape(kv_num_heads, H) for each in (key_scales, value_scales))
    heads = np.asarray(qkv, np.float64).reshape(B, S, -1, H)
    q, k, v = np.split(heads, [num_heads, num_heads + kv_num_heads], 2)
    q, k = (_rotated(rms_norm(each, norm, epsilon), cos, sin) for each, norm in ((q, q_norm), (k, k_norm)))
    present_key, present_value = past_key.copy(), past_value.copy()
    out = np.zeros((B, S, num_heads, H))
    for b, past in enumerate(int(n) for n in past_lengths):
        assert past + S <= past_key.shape[2], "past_lengths + S exceeds the cache"
        new = slice(past, past + S)
        present_key[b, :, new] = stored(k[b : b + 1].transpose(0, 2, 1, 3), kind, key_KH)[0]
        present_value[b, :, new] = stored(v[b : b + 1].transpose(0, 2, 1, 3), kind, value_KH)[0]
        keys, values = (
            read(cache[b : b + 1, :, : past + S], kind, each)[0]
            for cache, each in zip(held or (present_key, present_value), (key_KH, value_KH), strict=True)
        )
        for n in range(num_heads):
            kv = n * kv_num_heads // num_heads
            scores = q[b, :, n] @ keys[kv].T * scale
            scores[np.arange(past + S)[None] > past + np.arange(S)[:, None]] = -np.inf
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out[b, :, n] = weights / weights.sum(-1, keepdims=True) @ values[kv]
    return out.reshape(B, S, -1), present_key, present_value


def _rotated(x_BSNH: Array, cos: Array, sin: Array) -> Array:
    first, second = np.split(x_BSNH, 2, -1)
    cos, sin = (np.asarray(each, np.float64)[:, :, None] for each in (cos, sin))
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def evaluate(model: ModelProto, inputs: dict[str, Array]) -> dict[str, Array]:
    """Run a graph of standard operators and those of `qwen3vl.cpu` in numpy, and return its outputs by name."""
    session = ReferenceEvaluator(model, new_ops=list(OPERATORS))
    names = [value.name for value in model.graph.output]
    return dict(zip(names, session.run(None, inputs), strict=True))


def _product(bits: int) -> type[OpRun]:
    def run(
        self: OpRun,
        x: Array,
        tiles: Array,
        bias: Array | None = None,
        norm: Array | None = None,
        residual: Array | None = None,
        K: int = 0,
        N: int = 0,
        block_size: int = 0,
        epsilon: float = 1e-6,
        gated: int = 0,
    ) -> tuple[Array]:
        weight = weight_of_tiles(tiles, N, K, bits, block_size)
        given = {"bias": bias, "norm": norm, "residual": residual}
        found = matmul(x, weight, block=block_size, epsilon=epsilon, gated=bool(gated), **given)  # type: ignore[arg-type]
        assert found.shape == (*x.shape[:-1], N), "a residual of another shape"
        return (found.astype(np.float32),)

    return type(f"MatMulInt{bits}", (OpRun,), {"op_domain": DOMAIN, "_run": run})


def _lookup(bits: int) -> type[OpRun]:
    def run(self: OpRun, indices: Array, tiles: Array, K: int = 0, N: int = 0, block_size: int = 0) -> tuple[Array]:
        assert indices.min() >= 0 and indices.max() < N, "an index outside of the table"
        return (weight_of_tiles(tiles, N, K, bits, block_size)[indices].astype(np.float32),)

    return type(f"LookUpInt{bits}", (OpRun,), {"op_domain": DOMAIN, "_run": run})


def _attention(suffix: str) -> type[OpRun]:
    kind = suffix.lower() or "float32"

    def run(
        self: OpRun,
        *inputs: Array,
        num_heads: int = 0,
        kv_num_heads: int = 0,
        scale: float = 0.0,
        epsilon: float = 0.0,
    ) -> tuple[Array, Array, Array]:
        given = dict(zip(("key_scales", "value_scales"), inputs[8:], strict=False))
        values = {"num_heads": num_heads, "kv_num_heads": kv_num_heads, "scale": scale, "epsilon": epsilon}
        out, key, value = decode_attention(*inputs[:8], kind=kind, **given, **values)  # type: ignore[arg-type]
        return out.astype(np.float32), key, value

    return type(f"DecodeAttention{suffix}", (OpRun,), {"op_domain": DOMAIN, "_run": run})


OPERATORS = (
    *(_product(bits) for bits in (4, 8)),
    *(_lookup(bits) for bits in (4, 8)),
    *(_attention(suffix) for suffix in ("", "Float16", "Int8", "Int4")),
)
