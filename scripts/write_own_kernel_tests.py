"""Write the graphs with which the runtime proves our own kernels (runtime/kernels.py), as write_kernel_tests.py does.

    python -m scripts.write_own_kernel_tests [FOLDER]

Weights are packed here by docs/cpu_kernels.md, and expected products are of float64: neither is the exporter's or the
library's. Each block of activations holds whole numbers of -127 to 127 and one of the ends, times one factor, so that
rounding it to 8 bits loses nothing, and a right kernel is exact but for rounding in float32. Calls have 1, 7, 24 and 40
rows, for which kernels take different ways; rows of weights and columns leave tiles and blocks unfilled.

Shapes: M rows of activations, K inputs, N outputs, J blocks of a row, G columns of a block; for attention B sequences,
S new tokens, A all tokens, Q query heads, K kv heads, H head dim.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from onnx import TensorProto

from scripts.write_kernel_tests import FOLDER, Array, Test, either, weights_of, write

OWN_FOLDER = FOLDER / "own"
DOMAIN = "qwen3vl.cpu"
BLOCKS = (32, 64, 128, 256)
_ROWS = (1, 7, 24, 40)
_TILE_ROWS, _ALIGNMENT = 16, 64
_NUM_OUTPUTS = 35
_EPSILON = 1e-6


def packed(codes_NK: Array, scales_NJ: Array, zeros_NJ: Array, block: int, bits: int) -> Array:
    """Return a weight in tiles of 16 rows, uint8 [tiles, bytes of a tile]: codes, scales, zero points, unit."""
    num_rows, num_columns = codes_NK.shape
    num_blocks = -(-num_columns // block)
    tiles = []
    for first in range(0, num_rows, _TILE_ROWS):
        rows = slice(first, min(first + _TILE_ROWS, num_rows))
        count = rows.stop - rows.start
        codes = np.zeros((_TILE_ROWS, num_blocks * block), np.uint8)
        zeros = np.zeros((_TILE_ROWS, num_blocks), np.uint8)
        scales = np.zeros((_TILE_ROWS, num_blocks))
        zeros[:count], scales[:count] = zeros_NJ[rows], scales_NJ[rows]
        codes[:] = np.repeat(zeros, block, axis=1)
        codes[:count, :num_columns] = codes_NK[rows]
        # A power of two that brings the largest scale to 2^14 … 2^15.
        unit = 2.0 ** (np.floor(np.log2(scales.max())) - 14)
        parts_NJgj = codes.reshape(_TILE_ROWS, num_blocks, block // 4, 4)
        ordered = parts_NJgj.transpose(1, 2, 0, 3).astype(np.uint8)  # [J, g, n, j]
        if bits == 4:
            half = block // 8
            ordered = ordered[:, :half] | (ordered[:, half:] << 4)
        parts = (ordered, (scales / unit).T.astype(np.float16), zeros.T, np.float32(unit))
        tile = b"".join(np.ascontiguousarray(part).tobytes() for part in parts)
        tiles.append(np.frombuffer(tile.ljust(-(-len(tile) // _ALIGNMENT) * _ALIGNMENT, b"\0"), np.uint8))
    return np.stack(tiles)


def weight(num_columns: int, block: int, bits: int) -> tuple[Array, Array]:
    """Return a packed weight and its values [N, K]: codes, zero points at the ends, scales of 1, 2 and 4."""
    num_blocks = -(-num_columns // block)
    shape = (_NUM_OUTPUTS, num_blocks)
    codes_NK = weights_of(num_columns, _NUM_OUTPUTS, 0, 2**bits - 1).T
    zeros_NJ = either(shape, 0, 2**bits - 1, salt=3)
    zeros_NJ[0], zeros_NJ[1] = 0, 2**bits - 1
    scales_NJ = 2.0 ** (np.arange(np.prod(shape)).reshape(shape) % 3)
    of_column = np.arange(num_columns) // block
    values_NK = (codes_NK - zeros_NJ[:, of_column]) * scales_NJ[:, of_column]
    return packed(codes_NK, scales_NJ, zeros_NJ, block, bits), values_NK


def activations(num_columns: int) -> Array:
    """Return int8 [M, K]: ends of the range, numbers between them; first rows of calls are of one sign."""
    x_MK = either((sum(_ROWS), num_columns), -127, 127, salt=1)
    x_MK[:, 1::3] = (np.arange(x_MK[:, 1::3].size) * 37 % 255 - 127).reshape(x_MK[:, 1::3].shape)
    x_MK[np.cumsum((0, *_ROWS[:-1]))] = 127
    return x_MK.astype(np.int8)


def products(bits: int) -> Test:
    """MatMulInt4 or MatMulInt8, each size of block, and with each of the optional inputs."""
    test = Test(DOMAIN)
    for block in BLOCKS:
        num_columns = 2 * block + block // 2 + 1
        tiles, values_NK = weight(num_columns, block, bits)
        x_MK = activations(num_columns)
        has_norm, is_gated = block == 32, block == 64
        bias_N = np.linspace(-1e4, 1e4, _NUM_OUTPUTS).astype(np.float32)
        bias, norm = "", ""
        factors_MK = x_MK.astype(np.float64)
        x = test.node("Cast", [test.constant(x_MK)], to=TensorProto.FLOAT)
        if has_norm:
            # Rows of one magnitude, which RMSNorm makes 1: what is rounded are the norm's weights.
            norm_K = x_MK[-1].astype(np.float32)
            signs_MK = np.where(x_MK < 0, -1, 1).astype(np.int8)
            sizes_M1 = 1.0 + np.arange(len(x_MK))[:, None]
            x = test.node(
                "Mul", [test.constant(signs_MK.astype(np.float32)), test.constant(sizes_M1.astype(np.float32))]
            )
            norm, factors_MK = test.constant(norm_K), signs_MK * norm_K.astype(np.float64)
        if is_gated:
            gate = test.constant(np.full((len(x_MK), num_columns), 8, np.float32))
            x, factors_MK = test.node("Concat", [gate, x], axis=1), factors_MK * 8 / (1 + np.exp(-8.0))
        expected_MN = factors_MK @ values_NK.T
        if block != 256:
            bias, expected_MN = test.constant(bias_N), expected_MN + bias_N
        x = test.node("Add", [x, "zero"])
        parts = test.nodes("Split", [x, test.constant(np.array(_ROWS))], len(_ROWS), axis=0)
        found = []
        for num_rows, part in zip(_ROWS, parts, strict=True):
            residual = ""
            if is_gated:
                residual_MN = either((num_rows, _NUM_OUTPUTS), -50000, 50000, salt=num_rows)
                residual = test.live(residual_MN.astype(np.float32))
                first = sum(_ROWS[: _ROWS.index(num_rows)])
                expected_MN[first : first + num_rows] += residual_MN
            inputs = [part, test.constant(tiles), bias, norm, residual]
            while not inputs[-1]:
                inputs.pop()
            sizes = {"K": num_columns, "N": _NUM_OUTPUTS, "block_size": block, "gated": int(is_gated)}
            found.append(test.node(f"MatMulInt{bits}", inputs, DOMAIN, epsilon=_EPSILON, **sizes))
        test.expect(test.node("Concat", found, axis=0), expected_MN)
    return test


def look_ups(bits: int) -> Test:
    """LookUpInt4 or LookUpInt8: rows of each tile."""
    test, ids = Test(DOMAIN), np.array([[0, 1, 15, 16], [2, 31, _NUM_OUTPUTS - 1, 3]])
    for block in BLOCKS:
        num_columns = 2 * block + block // 2 + 1
        tiles, values_NK = weight(num_columns, block, bits)
        sizes = {"K": num_columns, "N": _NUM_OUTPUTS, "block_size": block}
        found = test.node(f"LookUpInt{bits}", [test.live(ids), test.constant(tiles)], DOMAIN, **sizes)
        test.expect(found, values_NK[ids])
    return test


class Cache:
    """One type of a KV cache: how numbers are held, and a graph's constants of it.

    Attributes:
        kind: Ending of the operator's name.
        top: Largest code, of a cache of codes; in float types, numbers are codes of 4 bits all the same.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.has_codes = kind in ("Int8", "Int4")
        self.top = 127 if kind == "Int8" else 7

    def scales(self, num_kv_heads: int, head_dim: int, salt: int) -> Array:
        """Return what each channel's codes are multiples of, [K, H]."""
        unit = 1 / 256 if self.kind == "Int8" else 1 / 16
        return either((num_kv_heads, head_dim), 1, 2, salt) * unit

    def held(self, codes: Array, scales_KH: Array) -> Array:
        """Return codes [K, A, H] as the cache holds them."""
        if self.kind == "Int4":
            raised = (codes + 8).astype(np.uint8)
            return raised[..., 0::2] | (raised[..., 1::2] << 4)
        if self.kind == "Int8":
            return codes.astype(np.int8)
        return (codes * scales_KH[:, None]).astype(np.float16 if self.kind == "Float16" else np.float32)

    def rest(self, shape: Sequence[int]) -> Array:
        """Return rows that nobody may look at, as the cache holds them."""
        if self.kind == "Int4":
            return np.full((*shape[:-1], shape[-1] // 2), 0xF0, np.uint8)
        if self.kind == "Int8":
            return np.full(shape, -128, np.int8)
        return np.full(shape, np.nan, np.float16 if self.kind == "Float16" else np.float32)


# Five query heads on each: kernels take four together where registers allow. Half of a head fills no 16 lanes.
_Q, _K, _H = 10, 2, 48
_HALF = _H // 2
_FREE_ROWS = 5
# Past rows of each sequence, and new ones: a first token, chunks of a prompt, decoding over several splits, several
# sequences at once.
_CALLS = (((0,), 1), ((0,), 33), ((65,), 18), ((300,), 1), ((3, 70), 1), ((7, 0), 4))


def attention(kind: str) -> Test:
    """DecodeAttention on one type of cache: past rows are codes, and new keys become codes after norm and rotation."""
    test, cache = Test(DOMAIN), Cache(kind)
    k_norm_H = (1 + np.arange(_H) % 3) / 8 * np.where(np.arange(_H) % 2, 1, -1)
    q_norm_H = np.linspace(-1.5, 1.5, _H)
    key_scales_KH, value_scales_KH = (cache.scales(_K, _H, salt) for salt in (11, 12))
    norms = [test.constant(norm_H.astype(np.float32)) for norm_H in (q_norm_H, k_norm_H)]
    scales = [test.constant(each.reshape(-1).astype(np.float32)) for each in (key_scales_KH, value_scales_KH)]
    for call, (pasts, num_new) in enumerate(_CALLS):
        case = _Case(
            cache, pasts, num_new, salt=20 * (call + 1), key_scales=key_scales_KH, value_scales=value_scales_KH
        )
        expected = case.expected(q_norm_H, k_norm_H)
        inputs = [
            test.live(case.qkv.astype(np.float32)),
            *norms,
            *(test.constant(table.astype(np.float32)) for table in (case.cos, case.sin)),
            *(test.live(held) if held.dtype == np.float32 else test.constant(held) for held in case.past()),
            test.constant(np.array(pasts)),
            *(scales if cache.has_codes else []),
        ]
        sizes = {"num_heads": _Q, "kv_num_heads": _K, "scale": 1.0, "epsilon": _EPSILON}
        name = f"DecodeAttention{'' if kind == 'Float32' else kind}"
        found, *presents = test.nodes(name, inputs, 3, DOMAIN, **sizes)
        test.expect(found, expected)
        for present, held in zip(presents, case.new_rows(), strict=True):
            for index, past in enumerate(pasts):
                ends = [np.array([index, past]), np.array([index + 1, past + num_new]), np.array([0, 2])]
                rows = test.node("Slice", [present, *map(test.constant, ends)])
                numbers = test.node("Cast", [rows], to=TensorProto.FLOAT)
                test.expect(numbers, held[index : index + 1].astype(np.float32))
    return test


class _Case:
    """The inputs of one call, and what must come of them."""

    def __init__(
        self, cache: Cache, pasts: Sequence[int], num_new: int, *, salt: int, key_scales: Array, value_scales: Array
    ) -> None:
        self._cache, self._pasts, self._num_new = cache, pasts, num_new
        self._scales = key_scales, value_scales
        self._most = max(pasts) + num_new
        shape = (len(pasts), _K, self._most, _H)
        # Of new rows, keys are replaced below.
        self._codes = [either(shape, -cache.top, cache.top, salt + i) for i in range(2)]
        self._codes[1][:, 0] = cache.top
        self._q = either((len(pasts), num_new, _Q, _H), 1, 3, salt + 2) * either((_H,), -1, 1, salt + 3)
        self._signs = either((len(pasts), num_new, _K, _H), -1, 1, salt + 4)
        # Quarters of a turn: rotation exchanges numbers without rounding them.
        quarters = either((len(pasts), num_new, _HALF), 0, 1, salt + 5) + 2 * either(
            (len(pasts), num_new, _HALF), 0, 1, salt + 6
        )
        self.cos, self.sin = np.array([1, 0, -1, 0])[quarters], np.array([0, 1, 0, -1])[quarters]
        v_BSKH = np.stack([self._value_rows(index) for index in range(len(pasts))])
        parts = (self._q, 2 * self._signs, v_BSKH)
        self.qkv = np.concatenate([part.reshape(len(pasts), num_new, -1) for part in parts], axis=-1)

    def _value_rows(self, index: int) -> Array:
        """Return the new values of one sequence, [S, K, H]."""
        first = self._pasts[index]
        codes_KSH = self._codes[1][index, :, first : first + self._num_new]
        return (codes_KSH * self._scales[1][:, None]).transpose(1, 0, 2)

    def _rotated(self, x_BSNH: Array) -> Array:
        low, high = x_BSNH[..., :_HALF], x_BSNH[..., _HALF:]
        cos, sin = self.cos[:, :, None], self.sin[:, :, None]
        return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)

    def expected(self, q_norm_H: Array, k_norm_H: Array) -> Array:
        """Return the outputs [B, S, Q·H], and fill in the codes of new keys."""
        sizes = np.sqrt((self._q**2).mean(axis=-1, keepdims=True) + _EPSILON)
        q_BSQH = self._rotated(self._q / sizes * q_norm_H)
        k_BSKH = self._rotated(self._signs * k_norm_H) / self._scales[0]
        out = np.zeros_like(q_BSQH)
        for b, past in enumerate(self._pasts):
            self._codes[0][b, :, past : past + self._num_new] = np.rint(k_BSKH[b]).transpose(1, 0, 2)
            keys_KAH, values_KAH = (
                codes[b] * scales[:, None] for codes, scales in zip(self._codes, self._scales, strict=True)
            )
            for s in range(self._num_new):
                for head in range(_Q):
                    seen, kv_head = past + s + 1, head * _K // _Q
                    scores = keys_KAH[kv_head, :seen] @ q_BSQH[b, s, head]
                    weights = np.exp(scores - scores.max())
                    out[b, s, head] = weights @ values_KAH[kv_head, :seen] / weights.sum()
        return out.reshape(len(self._pasts), self._num_new, -1)

    def past(self) -> list[Array]:
        """Return keys and values as they are held before the call, [B, K, T, H]."""
        caches = []
        for codes, scales in zip(self._codes, self._scales, strict=True):
            rows = []
            for b, past in enumerate(self._pasts):
                rest = self._cache.rest((_K, self._most - past + _FREE_ROWS, _H))
                rows.append(np.concatenate([self._cache.held(codes[b, :, :past], scales), rest], axis=1))
            caches.append(np.stack(rows))
        return caches

    def new_rows(self) -> list[Array]:
        """Return the new keys and values as they must be held, [B, K, S, H]."""
        return [
            np.stack(
                [
                    self._cache.held(codes[b, :, past : past + self._num_new], scales)
                    for b, past in enumerate(self._pasts)
                ]
            )
            for codes, scales in zip(self._codes, self._scales, strict=True)
        ]


TESTS: dict[str, Callable[[], Test]] = {
    **{f"MatMulInt{bits}": lambda bits=bits: products(bits) for bits in (4, 8)},
    **{f"LookUpInt{bits}": lambda bits=bits: look_ups(bits) for bits in (4, 8)},
    "DecodeAttention": lambda: attention("Float32"),
    **{f"DecodeAttention{kind}": lambda kind=kind: attention(kind) for kind in ("Float16", "Int8", "Int4")},
}
"""By the names of the operators."""


def main(folder: Path = OWN_FOLDER) -> None:
    """Write every test."""
    write(TESTS, folder)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
