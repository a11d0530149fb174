"""How weights of few bits are stored for our own CPU kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engines.onnxruntime.storage import CPU_STORAGE, OrtStorage
from engines.quantize.formats import BLOCKWISE, WeightFormat

if TYPE_CHECKING:
    from engines.quantize.packed import PackedWeight
    from engines.quantize.tensors import BlockwiseWeight, QuantizedWeight
    from engines.weights import StackedTensor, StreamedTensor


@dataclass(frozen=True)
class PackedStorage:
    """Tiles for weights in blocks of 32 to 256.

    All else is stored for ONNX Runtime's kernels: experts, other formats, and codes that a checkpoint holds in blocks
    of 16, since other blocks would round them again.

    Attributes:
        others: What those kernels read.
    """

    others: OrtStorage = CPU_STORAGE

    def block(self, tensor: StreamedTensor, weight_format: WeightFormat, *, is_table: bool) -> int:
        """Return the block of a weight; 16 only for codes that are held so.

        That of codes which are held in as many bits; else the format's, or for a table the largest up to the format's
        that divides its rows, since a finer block costs no more than padding.
        """
        from engines.quantize.blocks import dividing_block, held_block
        from engines.quantize.packed import PACKED_BLOCKS

        held = held_block(tensor, weight_format.bits)
        if held is not None:
            return held
        wanted = max(weight_format.block, min(PACKED_BLOCKS))
        num_columns = int(tensor.shape.numpy()[1])
        return (dividing_block([num_columns], wanted, PACKED_BLOCKS) or wanted) if is_table else wanted

    def product(self, tensor: StreamedTensor, weight_format: WeightFormat, *, is_table: bool) -> QuantizedWeight:
        """Return the weight of a product, whose rows may be looked up in the same bytes.

        Raises:
            TargetError: Neither our kernels nor ONNX Runtime's read the format.
        """
        packed = self._packed(tensor, weight_format, is_table=is_table)
        return packed or self.others.product(tensor, weight_format, is_table=is_table)

    def table(self, tensor: StreamedTensor, weight_format: WeightFormat) -> QuantizedWeight | None:
        """Return a table that is only looked up; None if the kernels read none in that format.

        Raises:
            TargetError: It holds codes in a block that does not divide its rows, and that only ONNX Runtime reads.
        """
        return self._packed(tensor, weight_format, is_table=True) or self.others.table(tensor, weight_format)

    def experts(self, weights: Sequence[StackedTensor], formats: Sequence[WeightFormat]) -> list[BlockwiseWeight]:
        """Return a layer's experts as QMoE reads them.

        Raises:
            TargetError: It does not read them in any block, or in a format that was given.
        """
        return self.others.experts(weights, formats)

    def _packed(self, tensor: StreamedTensor, weight_format: WeightFormat, *, is_table: bool) -> PackedWeight | None:
        from engines.quantize.packed import PACKED_BLOCKS, PackedWeight

        if weight_format.kind != BLOCKWISE:
            return None
        block = self.block(tensor, weight_format, is_table=is_table)
        return PackedWeight(tensor, weight_format.bits, block) if block in PACKED_BLOCKS else None


PACKED_STORAGE = PackedStorage()
