"""Read safetensors files with `pread`, a block at a time.

The safetensors package maps the file, and mapped pages count as resident memory: streaming 2B through it showed
4.5-5.7 GB. The format is 8 bytes of header length, a JSON header, then the tensors
(https://huggingface.co/docs/safetensors, "Format").
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from engines.weights import BLOCK_BYTES, StreamedTensor
from runtime.errors import CheckpointError
from runtime.files import open_regular

_FLOATS: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
# What parts of quantised weights are stored in. FP8 is read as its byte.
_DTYPES: dict[str, np.dtype[Any]] = _FLOATS | {
    "I8": np.dtype("i1"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
    "F8_E4M3": np.dtype("u1"),
}
_MAX_HEADER_BYTES = 100 << 20
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
            CheckpointError: It is not of floats.
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
        CheckpointError: The file is missing, truncated or no safetensors file.
    """
    again = "the file was cut or is no safetensors file: download it again"
    try:
        descriptor = open_regular(path)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path}: missing", remedy="download the checkpoint again; a shard is not there"
        ) from error
    except OSError as error:  # a pipe or a device too
        raise CheckpointError(f"{path}: expected a safetensors file, found {error.strerror}", remedy=again) from error
    with open(descriptor, "rb") as file:
        size = os.fstat(descriptor).st_size
        if size < 8:  # files of /proc say that they are empty
            raise CheckpointError(f"{path}: {size} bytes do not hold a header", remedy=again)
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, _MAX_HEADER_BYTES):
            raise CheckpointError(f"{path}: {size} bytes do not hold a header of {length} bytes", remedy=again)
        raw = file.read(length)
    try:
        header: dict[str, Any] = json.loads(raw)
        header.pop("__metadata__", None)
        tensors = {}
        for key, entry in header.items():
            begin, end = map(_natural, entry["data_offsets"])
            shape = tuple(map(_natural, entry["shape"]))
            tensors[key] = TensorEntry(path, 8 + length + begin, end - begin, shape, entry["dtype"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: the header is not readable ({error})", remedy=again) from error
    for key, tensor in tensors.items():
        end = tensor.offset + tensor.num_bytes
        if tensor.num_bytes < 0 or end > size:
            raise CheckpointError(f"{path}: {key} ends at byte {end}, the file has {size}", remedy=again)
        dtype = _DTYPES.get(tensor.dtype)
        if dtype is not None and int(np.prod(tensor.shape, dtype=np.int64)) * dtype.itemsize != tensor.num_bytes:
            raise CheckpointError(
                f"{path}: {key} has {tensor.num_bytes} bytes, {tensor.dtype} {list(tensor.shape)} needs another number",
                remedy=again,
            )
    _check_layout(path, 8 + length, size, tensors, again)
    return FileHeader(tensors, size, hashlib.sha256(raw).hexdigest())


def _natural(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"expected a non-negative integer, got {value!r}")
    return value


def _check_layout(path: Path, start: int, size: int, tensors: Mapping[str, TensorEntry], remedy: str) -> None:
    """Check that the tensors follow each other and fill the file, which the format requires: no overlap, no gap."""
    position = start
    for key, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].num_bytes)):
        if tensor.offset != position:
            raise CheckpointError(
                f"{path}: {key} begins at byte {tensor.offset}, what lies before it ends at byte {position}",
                remedy=remedy,
            )
        position += tensor.num_bytes
    if position != size:
        raise CheckpointError(f"{path}: the tensors end at byte {position}, the file has {size}", remedy=remedy)


class CheckpointTensor(StreamedTensor):
    """One tensor of a checkpoint, cast to float32 while it is read.

    Args:
        key: The checkpoint key, which is also the name in the graph.
        entry: Where it lies.
        shape: The shape to show, if it is another view of the same elements.
    """

    def __init__(self, key: str, entry: TensorEntry, shape: tuple[int, ...] | None = None) -> None:
        if entry.dtype not in _FLOATS:
            raise CheckpointError(
                f"{entry.path}: {key} is {entry.dtype}, expected one of {', '.join(_FLOATS)}",
                remedy="give the unquantised checkpoint",
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
        descriptor = os.open(entry.path, os.O_RDONLY)
        try:
            done = 0
            while done < entry.num_bytes:
                view = memoryview(buffer)[: min(len(buffer), entry.num_bytes - done)]
                _read_into(descriptor, view, entry, done)
                done += len(view)
                values = np.frombuffer(view, stored)
                block = out[: values.size]
                _cast(values, entry.dtype, block)
                yield block
        finally:
            os.close(descriptor)


def read_rows(entry: TensorEntry, first: int = 0, count: int | None = None) -> NDArray[Any]:
    """Read rows of a tensor, all from `first` on if no count is given, in the stored dtype; bf16 and FP8 as their bits.

    Raises:
        CheckpointError: The file became shorter since its header was read.
    """
    count = entry.shape[0] - first if count is None else count
    rows: NDArray[Any] = np.empty((count, *entry.shape[1:]), _DTYPES[entry.dtype])
    descriptor = os.open(entry.path, os.O_RDONLY)
    try:
        _read_into(descriptor, rows.data.cast("B"), entry, first * (entry.num_bytes // entry.shape[0]))
    finally:
        os.close(descriptor)
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
    descriptor = os.open(entry.path, os.O_RDONLY)
    try:
        for i, row in enumerate(columns):
            _read_into(descriptor, row.data.cast("B"), entry, (i * num_columns + first) * columns.itemsize)
    finally:
        os.close(descriptor)
    return columns


def read_floats(entry: TensorEntry) -> NDArray[np.float32]:
    """Read a whole small tensor of floats as float32.

    Raises:
        CheckpointError: The file became shorter since its header was read.
    """
    stored = read_rows(entry)
    values = np.empty(stored.shape, np.float32)
    _cast(stored, entry.dtype, values)
    return values


def read_transposed(entry: TensorEntry) -> NDArray[np.float32]:
    """Read a matrix [N, K] of floats as float32 [K, N].

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
        out[...] = values
