"""How weights of few bits are stored for the kernels of ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engines.quantize.formats import BLOCK_SIZES, BLOCKWISE, FLOAT8_WEIGHTS, ROWWISE, WeightFormat
from runtime.errors import TargetError

if TYPE_CHECKING:
    from engines.quantize.float8_blocks import Float8Weight
    from engines.quantize.tensors import BlockwiseWeight
    from engines.quantize.transposed import RowwiseWeight
    from engines.weights import StackedTensor, StreamedTensor

# Integer products of 8-bit blocks of the input: with float32 products (level 0) 8-bit weights are 100 times as slow,
# experts in 4 bits twice as slow (512 tokens of 30B-A3B, two threads, docs/mixture_of_experts.md).
_INT8_PRODUCTS = 4


@dataclass(frozen=True)
class OrtStorage:
    """What the kernels of one provider read, and how exactly they multiply.

    Attributes:
        accuracy_level: Attribute of MatMulNBits and QMoE. 4 lets the CPU round the input to 8 bits; 0 computes in the
            type of the input, except in QMoE of 8 bits, whose CPU kernel always rounds.
        expert_blocks: Block sizes that QMoE takes.
        expert_multiple: MoE takes unquantised experts whose rows are multiples of this.
        table_in_whole_bytes: A table gets blocks of which a row's zero points fill whole bytes. GatherBlockQuantized on
            CUDA numbers them through from row to row (gather_block_quantized.cu), on the CPU a row begins with a byte.
        reads_float8: There is a kernel of products with float8 weights.
    """

    accuracy_level: int = _INT8_PRODUCTS
    expert_blocks: tuple[int, ...] = BLOCK_SIZES
    expert_multiple: int = 1
    table_in_whole_bytes: bool = False
    reads_float8: bool = False

    def product(
        self, tensor: StreamedTensor, weight_format: WeightFormat, *, is_table: bool
    ) -> BlockwiseWeight | Float8Weight | RowwiseWeight:
        """Return the weight of a product, whose rows may also be looked up in the same bytes.

        Raises:
            TargetError: No kernel reads the format, or no block divides the rows of a table.
        """
        from engines.quantize.float8_blocks import Float8Weight
        from engines.quantize.tensors import BlockwiseWeight
        from engines.quantize.transposed import RowwiseWeight

        if weight_format.kind == ROWWISE:
            return RowwiseWeight(tensor)
        if weight_format.kind == FLOAT8_WEIGHTS and self.reads_float8:
            return Float8Weight(tensor, weight_format.block)
        if weight_format.kind != BLOCKWISE:
            raise TargetError(
                f"{tensor.name}: {weight_format}: no kernel of ONNX Runtime multiplies by it",
                remedy="choose a blockwise or rowwise format in the target's file in configs/targets",
            )
        block = self.block(tensor, weight_format, is_table=is_table)
        return BlockwiseWeight(tensor, weight_format.bits, block)

    def block(self, tensor: StreamedTensor, weight_format: WeightFormat, *, is_table: bool) -> int:
        """Return the block of the weight of a product.

        Raises:
            TargetError: None divides the rows of a table.
        """
        from engines.quantize.blocks import stored_block

        return stored_block(tensor, weight_format, is_table=is_table, multiple=self._table_multiple(weight_format))

    def table(self, tensor: StreamedTensor, weight_format: WeightFormat) -> BlockwiseWeight | Float8Weight | None:
        """Return a table that is only looked up; None if the kernels read none in that format.

        Raises:
            TargetError: No block divides its rows.
        """
        from engines.quantize.blocks import table_block
        from engines.quantize.float8_blocks import Float8Weight
        from engines.quantize.tensors import BlockwiseWeight

        if weight_format.kind == FLOAT8_WEIGHTS and self.reads_float8:
            return Float8Weight(tensor, weight_format.block)
        if weight_format.kind != BLOCKWISE:
            return None
        block = table_block(tensor, weight_format, self._table_multiple(weight_format))
        return BlockwiseWeight(tensor, weight_format.bits, block, has_whole_rows=True)

    def _table_multiple(self, weight_format: WeightFormat) -> int:
        """Return how many blocks' zero points a row of a table has a multiple of."""
        return 8 // weight_format.bits if self.table_in_whole_bytes else 1

    def experts(self, weights: Sequence[StackedTensor], formats: Sequence[WeightFormat]) -> list[BlockwiseWeight]:
        """Return gate and up, whose rows take turns, and down, of a layer's experts, in one block, as QMoE wants.

        Raises:
            TargetError: No block divides the rows of both, or a format is not blockwise.
        """
        from engines.quantize.blocks import dividing_block
        from engines.quantize.experts import interleaved
        from engines.quantize.tensors import BlockwiseWeight

        for weight, weight_format in zip(weights, formats, strict=True):
            if weight_format.kind != BLOCKWISE:
                raise TargetError(
                    f"{weight.name}: {weight_format}: no kernel of ONNX Runtime reads experts in that format",
                    remedy="choose a blockwise format for *.mlp.experts.*, for gate_up_proj and down_proj",
                )
        gate_up, down = weights
        columns = [int(weight.shape.numpy()[2]) for weight in weights]
        block = dividing_block(columns, min(weight_format.block for weight_format in formats), self.expert_blocks)
        if block is None:
            raise TargetError(
                f"{gate_up.name}: no block of {', '.join(map(str, self.expert_blocks))} divides rows of "
                f"{columns[0]} and {columns[1]}",
                remedy="build a target that keeps the experts unquantised, such as ort-cpu-fp32",
            )
        return [
            BlockwiseWeight(weight, weight_format.bits, block, has_whole_rows=True, symmetric=weight_format.symmetric)
            for weight, weight_format in zip((interleaved(gate_up), down), formats, strict=True)
        ]


CPU_STORAGE = OrtStorage()
