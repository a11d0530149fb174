"""Which block a weight in blocks gets."""

from __future__ import annotations

import math
from collections.abc import Sequence

from engines.quantize.formats import BLOCK_SIZES, WeightFormat
from engines.quantize.imported import GroupQuantizedTensor
from engines.weights import ConcatenatedTensor, StreamedTensor
from runtime.errors import TargetError


def dividing_block(columns: Sequence[int], most: int, sizes: tuple[int, ...] = BLOCK_SIZES) -> int | None:
    """Return the largest of the sizes, up to `most`, that divides rows of all these lengths, None if none does."""
    return max((size for size in sizes if size <= most and math.gcd(*columns) % size == 0), default=None)


def held_blocks(tensor: StreamedTensor) -> set[tuple[int, int] | None]:
    """Return bits and block of the codes that a checkpoint holds for a weight or its parts; None for plain numbers."""
    parts = tensor.parts if isinstance(tensor, ConcatenatedTensor) else (tensor,)
    return {(part.bits, part.block) if isinstance(part, GroupQuantizedTensor) else None for part in parts}


def stored_block(tensor: StreamedTensor, form: WeightFormat, *, is_table: bool, in_whole_bytes: bool = False) -> int:
    """Return the block that a weight [N, K] gets.

    The format's; but that of the codes which the checkpoint already holds in as many bits, so that nothing is rounded
    again; and one that divides the rows if the weight is a table too.

    Args:
        tensor: The weight.
        form: A blockwise format.
        is_table: The weight's rows are looked up.
        in_whole_bytes: The zero points of a table's row have to fill whole bytes.
    """
    num_columns = int(tensor.shape.numpy()[1])
    held = held_blocks(tensor)
    if len(held) == 1 and (codes := held.pop()) is not None:
        bits, block = codes
        if bits == form.bits and not (is_table and num_columns % _unit(block, bits, in_whole_bytes)):
            return block
    return table_block(tensor, form, in_whole_bytes=in_whole_bytes) if is_table else form.block


def table_block(tensor: StreamedTensor, form: WeightFormat, *, in_whole_bytes: bool = False) -> int:
    """Return the largest block up to the format's that divides a row: a table's rows have no padding.

    Raises:
        TargetError: None does.
    """
    num_columns = int(tensor.shape.numpy()[1])
    units = tuple(_unit(size, form.bits, in_whole_bytes) for size in BLOCK_SIZES)
    found = dividing_block([num_columns], _unit(form.block, form.bits, in_whole_bytes), units)
    if found is None:
        raise TargetError(
            f"{tensor.name}: no block of {', '.join(map(str, BLOCK_SIZES))} divides its {num_columns} columns",
            remedy="build a target that keeps the embedding in float32",
        )
    return BLOCK_SIZES[units.index(found)]


def _unit(block: int, bits: int, in_whole_bytes: bool) -> int:
    """Return the columns that a table's row has a multiple of: a block, or those whose zero points fill a byte."""
    return block * (8 // bits) if in_whole_bytes else block
