"""GPTQ (Frantar et al. 2022, arXiv:2210.17323): round a weight so that the product's error is small, not the weight's.

With H = Σ x xᵀ over the inputs of a product, codes Q of its weight W cost tr((W - Q) H (W - Q)ᵀ). Columns are rounded
one after the other, each to the code nearest to what makes up best for the errors of the columns before it.

The paper updates the remaining columns with rows of the Cholesky factor of H⁻¹. Here H = R Rᵀ with R upper triangular,
so that the cost is Σ_j ((W - Q) R)²_j, whose term j depends on columns up to j alone: rounding column j to make it
smallest is the same algorithm (Babai's nearest plane; Chen et al. 2025, arXiv:2507.18553) without an inverse of H.

Shapes: N rows and K columns of a weight, J blocks of a row, G weights of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engines.quantize.blockwise import QuantizedBlocks, quantize_blocks

FloatArray = NDArray[np.float32]

DAMPENING = 0.01
"""Share of H's mean diagonal that is added to its diagonal, as in the paper: columns that were never active count too,
and few prompts leave H of lower rank than K."""


@dataclass(frozen=True)
class InputMetric:
    """What H says to rounding in blocks.

    Attributes:
        block: G.
        columns: Columns of each block in the order of rounding, K in all. The paper's order is by decreasing diagonal
            of H, so that the largest inputs are rounded while most columns can still make up for it; here it is that
            of the blocks, by their mean, and of the columns inside each: where codes are stored stays the same.
        factor_KK: R, float32, of H in that order.
        symmetric: Blocks have no zero points of their own.
    """

    block: int
    columns: tuple[NDArray[np.int64], ...]
    factor_KK: FloatArray
    symmetric: bool = False


def factorize(gram_KK: FloatArray, block: int, *, dampening: float = DAMPENING, symmetric: bool = False) -> InputMetric:
    """Return R with R Rᵀ = H / m + dampening · I, m the mean of H's diagonal, and the order of its columns.

    Dividing by m changes no code. H of zeros counts as the identity.
    """
    diagonal_K = np.diagonal(gram_KK).astype(np.float64)
    mean = float(diagonal_K.mean())
    starts = range(0, len(gram_KK), block)
    columns = [first + np.argsort(-diagonal_K[first : first + block], kind="stable") for first in starts]
    order = np.argsort([-diagonal_K[each].mean() for each in columns], kind="stable")
    ordered = tuple(columns[j] for j in order)
    # numpy's factor is lower triangular: from the last row and column to the first it is R.
    backwards_K = np.concatenate(ordered)[::-1]
    damped_KK = gram_KK[np.ix_(backwards_K, backwards_K)].astype(np.float64)
    damped_KK /= mean if mean > 0 else 1.0
    damped_KK[np.diag_indices_from(damped_KK)] += dampening
    factor_KK = np.linalg.cholesky(damped_KK).astype(np.float32)[::-1, ::-1]
    return InputMetric(block, ordered, np.ascontiguousarray(factor_KK), symmetric)


def quantize_rows(weights_NK: FloatArray, metric: InputMetric, bits: int) -> QuantizedBlocks:
    """Quantise rows of a weight; the last block of a row is padded with zeros if G does not divide K.

    Scale and zero point of a block come from the search of `quantize_blocks`, on the weights that make up best for the
    blocks before it, each column's error counted as R_jj²: what it costs once later columns have made up for it.

    Args:
        weights_NK: Finite weights.
        metric: From `factorize`.
        bits: 4 or 8.

    Returns:
        N · J blocks, row by row.
    """
    num_rows, num_columns = weights_NK.shape
    num_blocks, block, factor_KK = len(metric.columns), metric.block, metric.factor_KK
    codes = np.empty((num_rows, num_blocks, block), np.uint8)
    scales = np.empty((num_rows, num_blocks), np.float32)
    zeros = np.empty((num_rows, num_blocks), np.uint8)
    errors_KN = np.empty((num_columns, num_rows), np.float32)
    first = 0
    for columns_G in metric.columns:
        last = first + len(columns_G)
        factor_GG = factor_KK[first:last, first:last]
        weights_NG = weights_NK[:, columns_G]
        owed_NG = errors_KN[:first].T @ factor_KK[:first, first:last]
        targets_NG = weights_NG + owed_NG @ np.linalg.inv(factor_GG)
        found = _quantize_block(targets_NG, factor_GG, bits, metric)
        np.subtract(weights_NG.T, found.dequantize().T[: len(columns_G)], out=errors_KN[first:last])
        j = int(columns_G[0]) // block
        codes[:, j] = found.zero_points[:, None]
        codes[:, j, columns_G - j * block] = found.codes[:, : len(columns_G)]
        scales[:, j], zeros[:, j] = found.scales, found.zero_points
        first = last
    return QuantizedBlocks(codes.reshape(-1, block), scales.reshape(-1), zeros.reshape(-1))


def _quantize_block(targets_NG: FloatArray, factor_GG: FloatArray, bits: int, metric: InputMetric) -> QuantizedBlocks:
    """Return the codes of one block of every row, from what its weights should be."""
    size = len(factor_GG)
    importance_G = np.diagonal(factor_GG) ** 2
    # To 1 exactly where all are equal, so that the search is the plain one there.
    importance_G = importance_G / importance_G.mean()
    padding = (0, metric.block - size)
    searched = quantize_blocks(
        np.pad(targets_NG, ((0, 0), padding)),
        bits,
        importance_G=np.pad(importance_G, padding).astype(np.float32),
        symmetric=metric.symmetric,
    )
    scales, zeros = searched.scales, searched.zero_points.astype(np.float32)
    per_scale, lowest, highest = 1 / scales, -zeros, np.float32((1 << bits) - 1) - zeros
    targets_GN = np.ascontiguousarray(targets_NG.T)
    errors_GN = np.empty_like(targets_GN)
    shares_GG = factor_GG / np.diagonal(factor_GG)
    for i in range(size):
        steps = np.rint((targets_GN[i] + shares_GG[:i, i] @ errors_GN[:i]) * per_scale)
        np.clip(steps, lowest, highest, out=steps)
        np.subtract(targets_GN[i], steps * scales, out=errors_GN[i])
        searched.codes[:, i] = steps + zeros
    return searched
