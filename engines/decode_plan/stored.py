"""How the weights of a lowered decoder are stored: those of products, of the lookup of tokens, and of experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from engines.decode_plan.match import attributes, check_stored, inputs, made_by, shape_of, stored, taken
from engines.kernels.launch import FP8, HALF, INT4, INT8, Unserved, Weight

_CODES = {4: INT4, 8: INT8}


def read_product(
    value: ir.Value | None, rows: int, columns: int, half: ir.DataType, what: str
) -> tuple[Weight, ir.Value]:
    """Return the weight [rows, columns] of the product that makes a value, and what it multiplies.

    Args:
        value: The product's result.
        rows: N.
        columns: K.
        half: Type of activations and of weights that are not quantised.
        what: What the value is, for messages.

    Raises:
        Unserved: It is another product: of another shape, with a bias, a factor, or codes that are stored otherwise.
    """
    node = made_by(value, "FusedMatMul", "MatMulNBits", "MatMulBlockQuantizedFp8Weight", what=what)
    x: ir.Value | None
    if node.op_type == "FusedMatMul":
        x, data = taken(node, 2, transB=1)
        check_stored(stored(data, what), (rows, columns), half)
        weight = Weight(HALF, rows, columns, _name(data))
    elif node.op_type == "MatMulBlockQuantizedFp8Weight":
        block = block_of(attributes(node, free=("block_size",)), node)
        # More of them would be activations in float8, and a bias.
        x, *tensors = inputs(node, range(3))
        weight = _float8(tensors, rows, columns, block, what)
    else:
        found = attributes(node, free=("bits", "block_size", "accuracy_level"), K=columns, N=rows)
        x, *tensors = inputs(node, range(3), range(4))
        weight = _codes(tensors, rows, columns, found["bits"], block_of(found, node), what, has_whole_rows=False)
    if x is None:
        raise Unserved(f"{what}: a product of nothing")
    return weight, x


def read_table(value: ir.Value | None, rows: int, columns: int, half: ir.DataType) -> tuple[Weight, ir.Value | None]:
    """Return the table [rows, columns] that a value is looked up in, and the indices.

    Raises:
        Unserved: It is looked up by another operator, or stored otherwise.
    """
    what = "the embeddings"
    node = made_by(value, "Gather", "GatherBlockQuantized", what=what)
    if node.op_type == "Gather":
        table, ids = taken(node, 2)
        check_stored(stored(table, what), (rows, columns), half)
        return Weight(HALF, rows, columns, _name(table)), ids
    return _quantised_table(node, rows, columns, what)


def _quantised_table(node: ir.Node, rows: int, columns: int, what: str) -> tuple[Weight, ir.Value | None]:
    found = attributes(node, free=("bits", "block_size"))
    data, ids, *others = inputs(node, range(3), range(4))
    if data is not None and data.dtype == ir.DataType.FLOAT8E4M3FN:
        if len(others) > 1 and others[1] is not None:
            raise Unserved(f"{what}: zero points of float8")
        return _float8([data, others[0]], rows, columns, block_of(found, node), what), ids
    tensors = [data, *others]
    return _codes(tensors, rows, columns, found["bits"], block_of(found, node), what, has_whole_rows=True), ids


def read_experts(
    node: ir.Node, place: int, shape: tuple[int, int, int], half: ir.DataType, bits: int, block: int
) -> Weight:
    """Return the weights [E, N, K] of all experts of a layer that MoE or QMoE has at an input.

    Args:
        node: MoE or QMoE.
        place: Of the weights; of QMoE their scales follow.
        shape: E, N and K.
        half: Type of weights that are not quantised.
        bits: Of a code; 0 for MoE.
        block: Codes with one scale.

    Raises:
        Unserved: They have another shape or type.
    """
    count, rows, columns = shape
    what = "the experts"
    data = stored(node.inputs[place], what)
    if not bits:
        check_stored(data, shape, half)
        return Weight(HALF, rows, columns, _name(data))
    if bits not in _CODES or columns % block:
        raise Unserved(f"{data.name}: codes of {bits} bits in blocks of {block}, in rows of {columns}")
    scales = stored(node.inputs[place + 1], what)
    check_stored(data, (count, rows, columns * bits // 8), ir.DataType.UINT8)
    check_stored(scales, (count, rows, columns // block), ir.DataType.FLOAT16)
    return Weight(_CODES[bits], rows, columns, _name(data), block, _name(scales))


def _float8(tensors: list[ir.Value | None], rows: int, columns: int, block: int, what: str) -> Weight:
    data, scales = (stored(each, what) for each in tensors)
    check_stored(data, (rows, columns), ir.DataType.FLOAT8E4M3FN)
    check_stored(scales, (rows, -(-columns // block)), ir.DataType.FLOAT)
    return Weight(FP8, rows, columns, _name(data), block, _name(scales))


def _codes(
    tensors: list[ir.Value | None],
    rows: int,
    columns: int,
    bits: int,
    block: int,
    what: str,
    *,
    has_whole_rows: bool,
) -> Weight:
    """Return a weight of codes, scales and perhaps zero points.

    MatMulNBits fills up the last block of a row; GatherBlockQuantized has `has_whole_rows`, without an axis for blocks.
    """
    data, scales, *others = (stored(each, what) for each in tensors if each is not None)
    if bits not in _CODES:
        raise Unserved(f"{data.name}: codes of {bits} bits; there are kernels for 4 and 8")
    blocks = -(-columns // block)
    row = (columns * bits // 8,) if has_whole_rows else (blocks, block * bits // 8)
    check_stored(data, (rows, *row), ir.DataType.UINT8)
    _check_rows(scales, rows, blocks, ir.DataType.FLOAT16)
    for zero_points in others:
        _check_rows(zero_points, rows, -(-blocks * bits // 8), ir.DataType.UINT8)
    names = [_name(each) for each in others]
    return Weight(_CODES[bits], rows, columns, _name(data), block, _name(scales), names[0] if names else None)


def _check_rows(value: ir.Value, rows: int, columns: int, dtype: ir.DataType) -> None:
    """Raise unless an initializer is [rows, columns], perhaps without the axis between them."""
    flat = (rows * columns,)
    check_stored(value, flat if shape_of(value) == flat else (rows, columns), dtype)


def block_of(found: Mapping[str, Any], node: ir.Node) -> int:
    """Return how many codes have one scale, of a node's attributes.

    Raises:
        Unserved: It is no power of two.
    """
    block = int(found["block_size"])
    if block < 1 or block & (block - 1):
        raise Unserved(f"{node.op_type} {node.name}: blocks of {block}, expected a power of two")
    return block


def _name(value: ir.Value) -> str:
    return str(value.name)
