"""What the formats share: the parts of one weight, and weights whose codes are read a few rows at a time.

Shapes: N rows (outputs) and K columns (inputs) of a weight, J groups of a row, R rows of a chunk.
"""

from __future__ import annotations

import abc
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from engines.quantize.blockwise import Codes, FloatArray, QuantizedBlocks
from engines.quantize.formats import BLOCK_SIZES
from engines.quantize.imported import GroupQuantizedTensor
from engines.weights import StreamedTensor
from qwen3vl_export.safetensors_reader import TensorEntry, read_columns, read_rows
from runtime.errors import CheckpointError

# Weights dequantised at a time: 1 MiB as float32, which stays in the cache (engines.weights.BLOCK_BYTES).
CHUNK_WEIGHTS = 1 << 18
# Read at a time of a matrix whose columns are wanted: the widest of 2B and 8B come whole or in two bands, so a page of
# the file is seldom read twice.
BAND_BYTES = 32 << 20

UNQUANTIZED = "give the unquantised checkpoint, or one in a format that docs/quantized_checkpoints.md lists"
_FLOAT_DTYPES = ("F16", "BF16", "F32", "F64")


@dataclass(frozen=True)
class QuantizedEntry:
    """One weight of several stored parts, under the key it has in the unquantised checkpoint.

    Attributes:
        path: File of its first part.
        shape: [N, K].
        open: Gives the weight as float32, by its name in the graph.
    """

    path: Path
    shape: tuple[int, ...]
    open: Callable[[str], StreamedTensor]

    def tensor(self, key: str, view: tuple[int, ...] | None = None) -> StreamedTensor:
        """Refer to the weight, to be dequantised while it is read.

        Raises:
            CheckpointError: It is needed in another shape: a convolution's, which no format quantises.
        """
        if view is not None and view != self.shape:
            raise CheckpointError(f"{self.path}: {key} is quantised, expected it unquantised", remedy=UNQUANTIZED)
        return self.open(key)


@dataclass(frozen=True)
class Module:
    """One quantised linear layer: its name, and the stored parts by the last word of their keys."""

    name: str
    parts: Mapping[str, TensorEntry]

    @property
    def path(self) -> Path:
        """File of the first part."""
        return next(iter(self.parts.values())).path

    def check_groups(self, num_columns: int, group: int) -> None:
        """Check that groups divide a row.

        Raises:
            CheckpointError: They do not.
        """
        if num_columns % group:
            raise CheckpointError(
                f"{self.path}: {self.name} has {num_columns} columns, which groups of {group} do not divide",
                remedy="check group_size in config.json's quantization_config",
            )

    def find(self, part: str, dtypes: Sequence[str] = _FLOAT_DTYPES, shape: Sequence[int] | None = None) -> TensorEntry:
        """Return a part.

        Args:
            part: The last word of its key.
            dtypes: What it may be stored in.
            shape: What its other parts and config.json imply; None checks that it is a matrix.

        Raises:
            CheckpointError: It is missing, or of another dtype or shape.
        """
        entry = self.parts.get(part)
        if entry is None:
            raise CheckpointError(
                f"{self.path}: {self.name} is quantised, but {self.name}.{part} is missing",
                remedy="the quantised checkpoint is incomplete: get it again",
            )
        if entry.dtype not in dtypes:
            raise CheckpointError(
                f"{entry.path}: {self.name}.{part} is {entry.dtype}, expected {' or '.join(dtypes)}",
                remedy=UNQUANTIZED,
            )
        if (len(entry.shape) != 2 or 0 in entry.shape) if shape is None else entry.shape != tuple(shape):
            expected = "a matrix" if shape is None else f"{list(shape)}, as its other parts and config.json imply"
            raise CheckpointError(
                f"{entry.path}: {self.name}.{part} has shape {list(entry.shape)}, expected {expected}",
                remedy="check bits, group size and ignored modules in config.json's quantization_config",
            )
        return entry

    def group_of_column(self, part: str, num_columns: int, num_groups: int) -> NDArray[np.int64]:
        """Return which group's scale each column has.

        Raises:
            CheckpointError: The part is missing or names a group that is not there.
        """
        groups_K = read_rows(self.find(part, ("I32", "I64"), (num_columns,))).astype(np.int64)
        unset = bool((groups_K == -1).all())  # compressed-tensors: no order was chosen
        if unset:
            return np.arange(num_columns) // -(-num_columns // num_groups)
        if groups_K.min() < 0 or groups_K.max() >= num_groups:
            raise CheckpointError(
                f"{self.path}: {self.name}.{part} names groups {groups_K.min()} to {groups_K.max()}, "
                f"expected 0 to {num_groups - 1}",
                remedy="check the group size in config.json's quantization_config",
            )
        return groups_K

    def scales(self, entry: TensorEntry) -> FloatArray:
        """Read scales as float32.

        Raises:
            CheckpointError: One is NaN or infinite.
        """
        scales: FloatArray = entry.tensor(self.name).numpy()
        if not np.isfinite(scales).all():
            raise CheckpointError(
                f"{entry.path}: scales of {self.name} are not finite", remedy="the checkpoint is damaged: get it again"
            )
        return scales


class GroupedWeight(abc.ABC):
    """A weight [N, K] of integer codes, with one scale and zero point for each group of a row's columns.

    Attributes:
        module: Parts of the weight.
        shape: (N, K).
        bits: 4 or 8.
        group: Columns of a group; the last group of a row may be shorter.
        group_of_column: [K], or None if groups follow one another.
    """

    def __init__(
        self,
        module: Module,
        shape: tuple[int, int],
        bits: int,
        group: int,
        group_of_column: NDArray[np.int64] | None = None,
    ) -> None:
        self.module, self.shape, self.bits, self.group = module, shape, bits, group
        in_order = group_of_column is None or np.array_equal(group_of_column, np.arange(shape[1]) // group)
        self.group_of_column = None if in_order else group_of_column

    @property
    def num_groups(self) -> int:
        """J."""
        return -(-self.shape[1] // self.group)

    @abc.abstractmethod
    def chunks(self) -> Iterator[Codes]:
        """Yield codes [R, K] of whole rows, in order, about `CHUNK_WEIGHTS` at a time."""

    @abc.abstractmethod
    def read_scales(self) -> FloatArray:
        """Read the scales [N, J]."""

    @abc.abstractmethod
    def read_zero_points(self) -> Codes:
        """Read the zero points [N, J]."""

    def rows(self) -> Iterator[tuple[Codes, FloatArray, Codes]]:
        """Yield codes [R, K], scales [R, J] and zero points [R, J] of whole rows, in order."""
        scales_NJ, zeros_NJ = self.read_scales(), self.read_zero_points()
        done = 0
        for codes_RK in self.chunks():
            rows = slice(done, done + len(codes_RK))
            yield codes_RK, scales_NJ[rows], zeros_NJ[rows]
            done = rows.stop

    def entry(self) -> QuantizedEntry:
        """Return what stands for the weight in the checkpoint."""
        return QuantizedEntry(self.module.path, self.shape, self._open)

    def _open(self, key: str) -> StreamedTensor:
        fitting = [size for size in BLOCK_SIZES if self.group % size == 0]
        if self.group_of_column is None and fitting:
            return _Blocks(key, self, fitting[-1])
        return _Scattered(key, self)


class _Blocks(GroupQuantizedTensor):
    """A weight whose groups are blocks of a kernel, or several of them."""

    def __init__(self, key: str, weight: GroupedWeight, block: int) -> None:
        super().__init__(key, weight.shape, weight.bits, block)
        self._weight = weight

    def quantized_rows(self) -> Iterator[QuantizedBlocks]:
        """Yield the stored codes, with a group's scale and zero point for each of its blocks."""
        weight, (_, num_columns) = self._weight, self._weight.shape
        num_blocks = -(-num_columns // self.block)
        missing = num_blocks * self.block - num_columns
        group_of_block = np.arange(num_blocks) * self.block // weight.group
        for codes_RK, scales_RJ, zeros_RJ in weight.rows():
            zeros_RB = zeros_RJ[:, group_of_block]
            if missing:
                codes_RK = np.concatenate([codes_RK, zeros_RB[:, -1:].repeat(missing, 1)], 1)
            scales_RB = scales_RJ[:, group_of_block]
            yield QuantizedBlocks(codes_RK.reshape(-1, self.block), scales_RB.reshape(-1), zeros_RB.reshape(-1))


class _Scattered(StreamedTensor):
    """A weight whose groups are no blocks: columns in the order of their activations, or another size."""

    def __init__(self, key: str, weight: GroupedWeight) -> None:
        super().__init__(key, weight.shape, ir.DataType.FLOAT)
        self._weight = weight

    def blocks(self) -> Iterator[NDArray[Any]]:
        """Yield what the codes stand for, as float32."""
        weight, (_, num_columns) = self._weight, self._weight.shape
        group_of_column = weight.group_of_column
        if group_of_column is None:
            group_of_column = np.arange(num_columns) // weight.group
        for codes_RK, scales_RJ, zeros_RJ in weight.rows():
            steps_RK = codes_RK.astype(np.float32) - zeros_RJ[:, group_of_column]
            steps_RK *= scales_RJ[:, group_of_column]
            yield steps_RK.reshape(-1)


def column_slices(entry: TensorEntry, num_codes: int) -> Iterator[NDArray[np.int32]]:
    """Yield all columns of a matrix of words, as many at a time as hold the codes of one chunk.

    Args:
        entry: The matrix.
        num_codes: Codes in one of its columns.
    """
    num_rows, num_columns = entry.shape
    band = max(1, BAND_BYTES // (num_rows * 4))
    width = max(1, CHUNK_WEIGHTS // num_codes)
    for first in range(0, num_columns, band):
        words = read_columns(entry, first, min(band, num_columns - first))
        for start in range(0, words.shape[1], width):
            yield words[:, start : start + width]


def unpack_codes(words: NDArray[np.int32], bits: int) -> Codes:
    """Unpack int32 words along the last axis, the first code in the lowest bits; 4 or 8 bits."""
    packed = np.ascontiguousarray(words, "<i4").view(np.uint8)
    if bits == 8:
        return packed
    codes = np.empty((*packed.shape[:-1], 2 * packed.shape[-1]), np.uint8)
    np.bitwise_and(packed, 15, out=codes[..., 0::2])
    np.right_shift(packed, 4, out=codes[..., 1::2])
    return codes


def unsupported(where: str, field: str, found: object, expected: str) -> CheckpointError:
    """Return the error of a format that is not read."""
    return CheckpointError(
        f"{where}: {field} is {json_like(found)}, expected {expected}",
        remedy=UNQUANTIZED,
    )


def as_object(value: object, where: str, field: str) -> Mapping[str, Any]:
    """Return an object of config.json, empty for null.

    Raises:
        CheckpointError: It is something else.
    """
    if value is not None and not isinstance(value, dict):
        raise unsupported(where, field, value, "an object")
    return value or {}


def matches(pattern: str, name: str, where: str) -> bool:
    """Say whether a pattern of config.json fits the beginning of a module's name.

    Raises:
        CheckpointError: It is no regular expression.
    """
    try:
        return re.match(pattern, name) is not None
    except re.error as error:
        raise CheckpointError(
            f"{where}: {json_like(pattern)} is not a regular expression ({error})",
            remedy="correct the pattern in config.json",
        ) from error


def json_like(value: object) -> str:
    """Show a value as config.json writes it, in a few words."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
