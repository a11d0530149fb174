"""Read safetensors files with `pread`, a block at a time.

The safetensors package maps the file, and mapped pages count as resident memory: streaming 2B through it showed
4.5-5.7 GB. The format is 8 bytes of header length, a JSON header, then the tensors
(https://huggingface.co/docs/safetensors, "Format").
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from engines.weights import BLOCK_BYTES, StreamedTensor
from qwen3vl_export.names import shown_name
from runtime.errors import CheckpointError
from runtime.files import NotRegularError, open_regular, parse_json_object
from runtime.shown import shown

_FLOATS: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "F64": np.dtype("<f8"),
}
# What parts of quantised weights are stored in. FP8 is read as its byte.
_DTYPES: dict[str, np.dtype[Any]] = _FLOATS | {
    "I8": np.dtype("i1"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
    "F8_E4M3": np.dtype("u1"),
}
# Others of the format, by the bits of an element (safetensors 0.8, `Dtype`).
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "I16": 16, "U16": 16, "U32": 32, "U64": 64, "C64": 64},
    **{name: 8 * dtype.itemsize for name, dtype in _DTYPES.items()},
}
# A dimension of 2^63 and more fits no array, and no weight here has more than 5.
_MAX_DIMENSION, _MAX_RANK = (1 << 63) - 1, 16
_MAX_HEADER_BYTES = 20 << 20  # one file with all 56 000 tensors of 30B-A3B in AWQ has 7 MB
_TRANSPOSED_ROWS = 64


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: the file, the offset of its first byte, its shape and safetensors dtype name."""

    path: Path
    offset: int
    num_bytes: int
    shape: tuple[int, ...]
    dtype: str

    def tensor(self, key: str, view: tuple[int, ...] | None = None) -> StreamedTensor:
        """Refer to the tensor by its name in the graph, to be read later, in another shape if `view` is given.

        Raises:
            CheckpointError: Its dtype is no float type.
        """
        return CheckpointTensor(key, self, view)


@dataclass(frozen=True)
class FileHeader:
    """The header of one file: its tensors by key, and the SHA-256 of the header's bytes."""

    tensors: dict[str, TensorEntry]
    num_bytes: int
    sha256: str


def read_header(path: Path) -> FileHeader:
    """Read and check the header of one file.

    Raises:
        CheckpointError: The file is missing, truncated or no safetensors file, or its header is larger than any.
    """
    again = "the file was cut or is no safetensors file: download it again"
    length, raw, size = _read_raw(path, again)
    header = parse_json_object(raw, shown_name(str(path)), error=CheckpointError, remedy=again)
    header.pop("__metadata__", None)
    tensors = {key: _entry(path, key, values, 8 + length, again) for key, values in header.items()}
    for key, tensor in tensors.items():
        end = tensor.offset + tensor.num_bytes
        if tensor.num_bytes < 0 or end > size:
            raise CheckpointError(f"{path}: {shown_name(key)} ends at byte {end}, the file has {size}", remedy=again)
        bits = _BITS.get(tensor.dtype)
        if bits is not None and math.prod(tensor.shape) * bits != tensor.num_bytes * 8:
            raise CheckpointError(
                f"{path}: {shown_name(key)} has {tensor.num_bytes} bytes, {tensor.dtype} {list(tensor.shape)} needs "
                "another number",
                remedy=again,
            )
    _check_layout(path, 8 + length, size, tensors, again)
    return FileHeader(tensors, size, hashlib.sha256(raw).hexdigest())


def _read_raw(path: Path, again: str) -> tuple[int, bytes, int]:
    """Return the length of the header, its bytes, and the size of the file."""
    name = shown_name(str(path))
    try:
        descriptor = open_regular(path)
        with open(descriptor, "rb") as file:
            size = os.fstat(descriptor).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise CheckpointError(f"{name}: {size} bytes do not hold a header of {length} bytes", remedy=again)
            if length > _MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{name}: a header of {length} bytes, expected at most {_MAX_HEADER_BYTES}, as every checkpoint's",
                    remedy=again,
                )
            return length, file.read(length), size
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{name}: {'a broken link' if path.is_symlink() else 'missing'}",
            remedy=f"download {shown_name(path.name)} again, or the whole checkpoint",
        ) from error
    except NotRegularError as error:
        raise CheckpointError(f"{name}: expected a safetensors file, found {error.strerror}", remedy=again) from error
    except (OSError, ValueError) as error:  # ValueError: a null byte or a lone surrogate in the name
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"{name}: cannot be read ({reason})", remedy="check the file and its permissions"
        ) from error


def _entry(path: Path, key: str, values: Any, start: int, again: str) -> TensorEntry:
    """Return one entry of a header whose data begin at byte `start`."""

    def natural(value: Any, most: int) -> int:
        if type(value) is not int or not 0 <= value <= most:
            raise ValueError(f"expected a whole number of 0 to {most}, found {shown(value)}")
        return value

    try:
        offsets, shape, dtype = values["data_offsets"], values["shape"], values["dtype"]
        if not (isinstance(offsets, list) and len(offsets) == 2 and isinstance(shape, list) and type(dtype) is str):
            raise ValueError("expected dtype, shape and two data_offsets")
        if len(shape) > _MAX_RANK:
            raise ValueError(f"a shape of {len(shape)} dimensions, expected at most {_MAX_RANK}")
        begin, end = (natural(offset, _MAX_DIMENSION) for offset in offsets)
        dimensions = tuple(natural(size, _MAX_DIMENSION) for size in shape)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: the header is not readable: {shown_name(key)}: {error}", remedy=again
        ) from error
    return TensorEntry(path, start + begin, end - begin, dimensions, dtype)


def _check_layout(path: Path, start: int, size: int, tensors: Mapping[str, TensorEntry], remedy: str) -> None:
    """Check that the tensors follow each other and fill the file, which the format requires: no overlap, no gap."""
    position = start
    for key, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].num_bytes)):
        if tensor.offset != position:
            raise CheckpointError(
                f"{path}: {shown_name(key)} begins at byte {tensor.offset}, what lies before it ends at byte "
                f"{position}",
                remedy=remedy,
            )
        position += tensor.num_bytes
    if position != size:
        raise CheckpointError(f"{path}: the tensors end at byte {position}, the file has {size}", remedy=remedy)


class CheckpointTensor(StreamedTensor):
    """One tensor of a checkpoint, cast to float32 while it is read, float64 rounded as PyTorch does.

    Args:
        key: The checkpoint key, which is also the name in the graph.
        entry: Where it lies.
        shape: The shape to show, if it is another view of the same elements.
    """

    def __init__(self, key: str, entry: TensorEntry, shape: tuple[int, ...] | None = None) -> None:
        if entry.dtype not in _FLOATS:
            raise CheckpointError(
                f"{entry.path}: {key} is {shown_name(entry.dtype)}, expected one of {', '.join(_FLOATS)}",
                remedy=_remedy_of(entry.dtype),
            )
        super().__init__(key, entry.shape if shape is None else shape, ir.DataType.FLOAT)
        self._entry = entry

    def blocks(self) -> Iterator[NDArray[Any]]:
        """Yield float32 blocks of one reused buffer.

        Raises:
            CheckpointError: The file became shorter since its header was read.
        """
        entry, stored = self._entry, _FLOATS[self._entry.dtype]
        buffer = bytearray(min(BLOCK_BYTES, max(entry.num_bytes, 1)))
        out = np.empty(len(buffer) // stored.itemsize, np.float32)
        done = 0
        with entry.path.open("rb", buffering=0) as file:
            while done < entry.num_bytes:
                view = memoryview(buffer)[: min(len(buffer), entry.num_bytes - done)]
                _read_into(file.fileno(), view, entry, done)
                done += len(view)
                values = np.frombuffer(view, stored)
                block = out[: values.size]
                _cast(values, entry.dtype, block)
                yield block


def _remedy_of(dtype: str) -> str:
    """Say what a weight of this dtype is likely to be, and what to do."""
    if dtype.startswith(("F8", "F6", "F4")):
        return (
            "its config.json lacks the quantization_config that says how the codes are scaled: take both from the "
            "quantised checkpoint, or give the unquantised one"
        )
    if dtype in ("I8", "U8"):
        return (
            "weights in 8 bits without a format that is read (bitsandbytes saves such ones): give the unquantised "
            "checkpoint, or one in a format that docs/quantized_checkpoints.md lists"
        )
    return (
        "no model of this kind stores weights so: take the weights from the original checkpoint, or cast them to BF16"
    )


def read_rows(entry: TensorEntry, first: int = 0, count: int | None = None) -> NDArray[Any]:
    """Read rows of a tensor, all from `first` on if no count is given, in the stored dtype; bf16 and FP8 as their bits.

    Raises:
        CheckpointError: The file became shorter since its header was read.
    """
    count = entry.shape[0] - first if count is None else count
    rows: NDArray[Any] = np.empty((count, *entry.shape[1:]), _DTYPES[entry.dtype])
    with entry.path.open("rb", buffering=0) as file:
        _read_into(file.fileno(), rows.data.cast("B"), entry, first * (entry.num_bytes // entry.shape[0]))
    return rows


def read_columns(entry: TensorEntry, first: int, count: int) -> NDArray[Any]:
    """Read columns of a matrix, in the stored dtype; one read for each row, unless these are all columns.

    Raises:
        CheckpointError: The file became shorter since its header was read.
    """
    num_rows, num_columns = entry.shape
    if count == num_columns:
        return read_rows(entry)
    columns: NDArray[Any] = np.empty((num_rows, count), _DTYPES[entry.dtype])
    with entry.path.open("rb", buffering=0) as file:
        for i, row in enumerate(columns):
            _read_into(file.fileno(), row.data.cast("B"), entry, (i * num_columns + first) * columns.itemsize)
    return columns


def read_transposed(entry: TensorEntry) -> NDArray[np.float32]:
    """Read a matrix [N, K] of a float type as float32 [K, N].

    Raises:
        CheckpointError: The file became shorter since its header was read.
    """
    stored = read_rows(entry)
    values = np.empty(stored.shape[::-1], np.uint32 if entry.dtype == "BF16" else np.float32)
    # A copy of 2048 x 1536 takes 8 ms in bands of 64 rows, 22 ms at once.
    for first in range(0, len(stored), _TRANSPOSED_ROWS):
        band = slice(first, first + _TRANSPOSED_ROWS)
        values[:, band] = stored[band].T
    if entry.dtype != "BF16":
        return values
    values <<= 16  # the upper half of a float32
    return values.view(np.float32)


def _read_into(descriptor: int, view: memoryview, entry: TensorEntry, position: int) -> None:
    """Fill `view` from a position inside of a tensor."""
    done = 0
    while done < len(view):  # one call reads at most 2 GiB
        num_bytes = os.preadv(descriptor, [view[done:]], entry.offset + position + done)
        if not num_bytes:
            raise CheckpointError(f"{entry.path}: became shorter while it was read", remedy="download the file again")
        done += num_bytes


def _cast(values: NDArray[Any], dtype: str, out: NDArray[np.float32]) -> None:
    if dtype == "BF16":  # the upper half of a float32
        bits = out.view(np.uint32)
        bits[...] = values
        bits <<= 16
    else:
        with np.errstate(
            over="ignore"
        ):  # a float64 beyond float32 becomes infinite, as in PyTorch, and is refused later
            out[...] = values
