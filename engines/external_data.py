"""Write a model whose weights are streamed into one external-data file beside it, hashing while writing."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from engines.weights import StreamedTensor, ViewTensor
from runtime.errors import BundleError
from runtime.manifest import FileRecord

# ONNX asks for page-aligned offsets so that a runtime can map the file.
_ALIGNMENT_BYTES = 4096


def streamed_tensors(model: ir.Model) -> dict[str, StreamedTensor]:
    """Return the initializers of the main graph that are streamed and have bytes of their own, in file order."""
    tensors = {}
    for name, value in model.graph.initializers.items():
        if isinstance(value.const_value, StreamedTensor) and not isinstance(value.const_value, ViewTensor):
            tensors[name] = value.const_value
    return tensors


def weight_bytes(model: ir.Model) -> int:
    """Return the bytes that the streamed weights of a model take on disk, without alignment."""
    return sum(tensor.nbytes for tensor in streamed_tensors(model).values())


def write_model(
    model: ir.Model, path: Path, *, with_weights: bool, advance: Callable[[int], None] = lambda _: None
) -> dict[str, FileRecord]:
    """Write `model` to `path` and its streamed weights to `<path>.data`.

    Args:
        model: The model; its initializers are replaced by references to the written file.
        path: The `.onnx` file to write.
        with_weights: False writes the graph alone: it refers to a data file that is not there.
        advance: Told the bytes of weights that were written since the last call.

    Returns:
        A record for each file written.

    Raises:
        OSError: The disk is full, say; `engines.output.output_folder` turns it into one of our errors.
    """
    data_name = f"{path.name}.data"
    records: dict[str, FileRecord] = {}
    tensors = streamed_tensors(model)
    if tensors and with_weights:
        records[data_name] = _write_weights(tensors, path.with_name(data_name), advance)
    offset, offsets = 0, {}
    for tensor in tensors.values():
        offsets[id(tensor)] = offset
        offset = _aligned(offset + tensor.nbytes)
    for name, value in model.graph.initializers.items():
        stored = value.const_value
        if isinstance(stored, StreamedTensor):
            base = stored.base if isinstance(stored, ViewTensor) else stored
            value.const_value = ir.ExternalTensor(
                data_name,
                offsets[id(base)],
                stored.nbytes,
                stored.dtype,
                shape=stored.shape,
                name=name,
                base_dir=path.parent,
            )
    ir.save(model, path)
    records[path.name] = FileRecord.of(path)
    return records


def _write_weights(tensors: dict[str, StreamedTensor], path: Path, advance: Callable[[int], None]) -> FileRecord:
    digest = hashlib.sha256()
    position = 0
    with path.open("wb", buffering=0) as file:

        def put(data: memoryview) -> None:
            nonlocal position
            while data:
                written = os.write(file.fileno(), data)
                digest.update(data[:written])
                position += written
                data = data[written:]

        for tensor in tensors.values():
            put(memoryview(bytes(_aligned(position) - position)))
            start = position
            for block in tensor.blocks():
                if block.dtype == np.float32:
                    _check_finite(block, str(tensor.name), (position - start) // block.itemsize)
                put(block.view(np.uint8).data)
                advance(block.nbytes)
            assert position - start == tensor.nbytes, (
                f"{tensor.name}: wrote {position - start} of {tensor.nbytes} bytes"
            )
    return FileRecord(position, digest.hexdigest(), is_weights=True)


def _check_finite(block: NDArray[np.float32], name: str, first: int) -> None:
    """Raise if an element is NaN or infinite: kernels that round activations to 8 bits would hide it.

    Raises:
        BundleError: One is; `first` is the index of the block's first element.
    """
    # The sum of squares is finite unless an element is not, or is beyond 1e19: one cheap pass before the exact one.
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(np.dot(block, block)):
            return
    bad = np.flatnonzero(~np.isfinite(block))
    if len(bad):
        raise BundleError(
            f"{name}: {block[bad[0]]} at element {first + bad[0]}; {len(bad)} weights of this part are not finite",
            remedy="the checkpoint is damaged, or was saved after a training that diverged: get it again",
        )


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
