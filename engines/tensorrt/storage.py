"""How weights of few bits are stored for TensorRT, which reads no zero points and no quantised tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from engines.quantize.formats import BLOCKWISE, FLOAT8, NVFP4, WeightFormat
from runtime.errors import TargetError

if TYPE_CHECKING:
    from engines.quantize.tensors import BlockwiseWeight
    from engines.quantize.transposed import TransposedWeight
    from engines.weights import StackedTensor, StreamedTensor

# TensorRT reads blocks of these sizes (tensorrt_rtx 1.7.1 builds no other).
_BLOCK_SIZES = (64, 128)


class TensorRtStorage:
    """What DequantizeLinear reads before a product, and arithmetic before experts."""

    def product(self, tensor: StreamedTensor, weight_format: WeightFormat, *, is_table: bool) -> TransposedWeight:
        """Return the weight of a product, in codes [K, N] beside the table.

        Raises:
            TargetError: TensorRT reads no such format.
        """
        import onnx_ir as ir

        from engines.quantize.float8 import quantize_rows_float8
        from engines.quantize.transposed import Nvfp4Weight, RowwiseWeight, SymmetricWeight

        if weight_format.kind == FLOAT8:
            return RowwiseWeight(tensor, ir.DataType.FLOAT8E4M3FN, quantize_rows_float8)
        if weight_format.kind == NVFP4:
            return Nvfp4Weight(tensor)
        if weight_format.bits != 4 or not weight_format.symmetric or weight_format.block not in _BLOCK_SIZES:
            raise TargetError(
                f"{tensor.name}: {weight_format} in a block DequantizeLinear",
                remedy=f"choose 4 bits, symmetric, blocks of {' or '.join(map(str, _BLOCK_SIZES))}",
            )
        return SymmetricWeight(tensor, self.block(tensor, weight_format, is_table=is_table))

    def block(self, tensor: StreamedTensor, weight_format: WeightFormat, *, is_table: bool) -> int:
        """Return the block of the weight of a product."""
        from engines.quantize.blocks import stored_block

        stored = stored_block(tensor, weight_format, is_table=is_table)
        return stored if stored in _BLOCK_SIZES else weight_format.block

    def table(self, tensor: StreamedTensor, weight_format: WeightFormat) -> None:
        """Return None: DequantizeLinear has no lookup."""

    def experts(self, weights: Sequence[StackedTensor], formats: Sequence[WeightFormat]) -> list[BlockwiseWeight]:
        """Return stacked weights, each in the largest block that divides its rows.

        Raises:
            TargetError: No block does, or a format has no meaning here.
        """
        from engines.quantize.blocks import dividing_block
        from engines.quantize.tensors import BlockwiseWeight

        stored = []
        for weight, weight_format in zip(weights, formats, strict=True):
            num_columns = int(weight.shape.numpy()[2])
            block = dividing_block([num_columns], weight_format.block)
            if weight_format.kind != BLOCKWISE or not weight_format.symmetric or block is None:
                raise TargetError(
                    f"{weight.name}: {weight_format} for experts with rows of {num_columns}",
                    remedy="choose 4 or 8 bits, symmetric, in blocks that divide the rows; or a target in half "
                    "precision",
                )
            stored.append(BlockwiseWeight(weight, weight_format.bits, block, has_whole_rows=True, symmetric=True))
        return stored
