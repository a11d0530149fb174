"""Which block a weight in blocks gets."""

from __future__ import annotations

import math
from collections.abc import Sequence

from engines.quantize.formats import BLOCK_SIZES, WeightFormat
from engines.quantize.imported import GroupQuantizedTensor
from engines.weights import ConcatenatedTensor, StreamedTensor
from runtime.errors import TargetError


def dividing_block(
    columns: Sequence[int], most: int, sizes: tuple[int, ...] = BLOCK_SIZES, multiple: int = 1
) -> int | None:
    """Return the largest of the sizes, up to `most`, that divides rows of all these lengths, None if none does."""
    common = math.gcd(*columns)
    return max((size for size in sizes if size <= most and common % (size * multiple) == 0), default=None)


def held_blocks(tensor: StreamedTensor) -> set[tuple[int, int] | None]:
    """Return bits and block of the codes that a checkpoint holds for a weight or its parts; None for plain numbers."""
    parts = tensor.parts if isinstance(tensor, ConcatenatedTensor) else (tensor,)
    return {(part.bits, part.block) if isinstance(part, GroupQuantizedTensor) else None for part in parts}


def held_block(tensor: StreamedTensor, bits: int) -> int | None:
    """Return the block of codes that a checkpoint holds in so many bits for a whole weight, None if it holds none."""
    held = held_blocks(tensor)
    if len(held) != 1 or (codes := held.pop()) is None or codes[0] != bits:
        return None
    return codes[1]


def stored_block(tensor: StreamedTensor, weight_format: WeightFormat, *, is_table: bool, multiple: int = 1) -> int:
    """Return the block that a weight [N, K] gets.

    The format's; but that of the codes which the checkpoint already holds in as many bits, so that nothing is rounded
    again; and one that divides the rows if the weight is a table too.

    Args:
        tensor: The weight.
        weight_format: A blockwise format.
        is_table: The weight's rows are looked up.
        multiple: A table's row has a multiple of so many blocks.
    """
    held = held_block(tensor, weight_format.bits)
    if held is not None and not (is_table and int(tensor.shape.numpy()[1]) % (held * multiple)):
        return held
    return table_block(tensor, weight_format, multiple) if is_table else weight_format.block


def table_block(tensor: StreamedTensor, weight_format: WeightFormat, multiple: int = 1) -> int:
    """Return the largest block up to the format's that divides a row: a table's rows have no padding.

    Raises:
        TargetError: None does.
    """
    num_columns = int(tensor.shape.numpy()[1])
    block = dividing_block([num_columns], weight_format.block, multiple=multiple)
    if block is None:
        raise TargetError(
            f"{tensor.name}: no block of {', '.join(map(str, BLOCK_SIZES))} divides its {num_columns} columns",
            remedy="build a target that keeps the embedding in float32",
        )
    return block
