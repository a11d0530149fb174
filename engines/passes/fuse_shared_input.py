"""Multiply by the weights of one input in one product."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import onnx_ir as ir

from engines.initializers import add_initializer, add_integers
from engines.passes.matmul_weight import MatMulWeight, find_weight
from engines.quantize.blocks import held_blocks
from engines.weights import ConcatenatedTensor


class FuseSharedInputPass(ir.passes.InPlacePass):
    """Join products of one input, such as q, k and v or gate and up, into one product and a Split.

    One token's product is bound by the read of the weight: one call over all rows starts the threads once instead of
    two or three times, and quantises the input once.

    Args:
        kind_of: Weights are joined only if this gives the same for their checkpoint keys.
    """

    def __init__(self, kind_of: Callable[[str], Hashable] = lambda key: None) -> None:
        super().__init__()
        self._kind_of = kind_of

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Join every group of at least two."""
        groups: dict[Hashable, list[MatMulWeight]] = {}
        for node in model.graph:
            found = find_weight(node)
            if found is not None and found.bias is None and len(found.value.uses()) == 1:
                kind = (self._kind_of(found.key), frozenset(held_blocks(found.tensor)))
                groups.setdefault((found.x, found.num_inputs, kind), []).append(found)
        joined = [group for group in groups.values() if len(group) > 1]
        for group in joined:
            _fuse(model, group)
        return ir.passes.PassResult(model, bool(joined))


def _fuse(model: ir.Model, group: list[MatMulWeight]) -> None:
    first = group[0].nodes[0]
    tensor = ConcatenatedTensor(
        _joined_name([str(found.tensor.name) for found in group]), [found.tensor for found in group]
    )
    weight = add_initializer(model, tensor)
    rows = add_integers(model, f"{tensor.name}.rows", [found.num_outputs for found in group])
    transpose = ir.node("Transpose", [weight], attributes={"perm": [1, 0]}, name=f"{tensor.name}/transposed")
    product = ir.node("MatMul", [group[0].x, transpose.outputs[0]], name=f"{tensor.name}/product")
    split = ir.node(
        "Split",
        [product.outputs[0], rows],
        attributes={"axis": -1},
        num_outputs=len(group),
        name=f"{tensor.name}/split",
    )
    model.graph.insert_before(first, [transpose, product, split])
    for found, part in zip(group, split.outputs, strict=True):
        found.replace(model, [], part)


def _joined_name(names: list[str]) -> str:
    """Join a.q.weight and a.k.weight into a.{q,k}.weight."""
    parts = [name.split(".") for name in names]
    assert len({len(part) for part in parts}) == 1, f"weights of one input at different depths: {names}"
    columns = [list(dict.fromkeys(column)) for column in zip(*parts, strict=True)]
    return ".".join(column[0] if len(column) == 1 else f"{{{','.join(column)}}}" for column in columns)
