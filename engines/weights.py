"""Weights that are read only while they are written.

A graph refers to weights by `StreamedTensor`: name, shape and dtype are known, the elements are produced in blocks of
rows. Lowerings compose tensors (`ConcatenatedTensor`) without reading any, so peak memory does not grow with the model.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from runtime.errors import BundleError

# Measured on Zen 4: casting bf16 to fp32 runs at 4-5 GB/s through reused blocks of 0.25-1 MiB that stay in the cache,
# at 1.8 GB/s through blocks of 32 MiB.
BLOCK_BYTES = 1 << 20


class StreamedTensor(ir.LazyTensor):
    """A tensor of known name, shape and dtype whose elements are produced in row-major blocks."""

    def __init__(self, name: str, shape: Sequence[int], dtype: ir.DataType) -> None:
        super().__init__(self._load, dtype=dtype, shape=ir.Shape(shape), name=name)

    def __repr__(self) -> str:
        # LazyTensor's shows the function that loads it, which is a method of this object and shows it again.
        return f"{type(self).__name__}({self.name!r}, {self.dtype}, {self.shape})"

    def stored_row(self, row: int) -> int:
        """Return which row of the checkpoint's matrix a row is, for messages."""
        return row

    @abc.abstractmethod
    def blocks(self) -> Iterator[np.ndarray[Any, Any]]:
        """Yield the elements in row-major order as 1-D arrays; each is valid only until the next one is asked for."""

    def _load(self) -> ir.TensorProtocol:
        """Read everything at once, for what takes an ordinary tensor: small graphs and tests."""
        flat = np.concatenate([block.copy() for block in self.blocks()])
        return ir.Tensor(flat.reshape(self.shape.numpy()), name=self.name)


class JoinedTensor(StreamedTensor):
    """Tensors of one dtype, one after the other."""

    def __init__(self, name: str, shape: Sequence[int], parts: Sequence[StreamedTensor]) -> None:
        super().__init__(name, shape, parts[0].dtype)
        self.parts = tuple(parts)

    def blocks(self) -> Iterator[np.ndarray[Any, Any]]:
        """Yield the blocks of each part in turn."""
        for part in self.parts:
            yield from part.blocks()


class ConcatenatedTensor(JoinedTensor):
    """Tensors of one dtype, one after the other along axis 0, such as the rows of the q, k and v projections."""

    def __init__(self, name: str, parts: Sequence[StreamedTensor]) -> None:
        first = parts[0]
        if any(part.dtype != first.dtype or part.shape[1:] != first.shape[1:] for part in parts):
            raise ValueError(f"{name}: parts differ in dtype or in the shape after axis 0")
        rows = sum(int(part.shape.numpy()[0]) for part in parts)
        super().__init__(name, (rows, *first.shape.numpy()[1:]), parts)


class StackedTensor(JoinedTensor):
    """Tensors of one shape along a new axis 0, such as the weights of the experts of a layer."""

    def __init__(self, name: str, parts: Sequence[StreamedTensor]) -> None:
        first = parts[0]
        if any(part.dtype != first.dtype or part.shape != first.shape for part in parts):
            raise ValueError(f"{name}: parts differ in dtype or shape")
        super().__init__(name, (len(parts), *first.shape.numpy()), parts)


class ViewTensor(StreamedTensor):
    """The elements of another tensor of the same graph in another shape: they are written once, and both refer to them.

    A Reshape in the graph would be folded into a copy while ONNX Runtime loads.
    """

    def __init__(self, name: str, base: StreamedTensor, shape: Sequence[int]) -> None:
        if int(np.prod(shape)) != int(np.prod(base.shape.numpy())):
            raise ValueError(f"{name}: {list(shape)} is no view of {base.shape}")
        super().__init__(name, shape, base.dtype)
        self.base = base

    def blocks(self) -> Iterator[np.ndarray[Any, Any]]:
        """Yield the blocks of the other tensor."""
        return self.base.blocks()


class CastTensor(StreamedTensor):
    """The elements of a float32 tensor in float16 or bfloat16, rounded to nearest even while they are streamed."""

    def __init__(self, name: str, source: StreamedTensor, dtype: ir.DataType) -> None:
        assert source.dtype == ir.DataType.FLOAT, f"{source.name}: {source.dtype}"
        super().__init__(name, source.shape.numpy(), dtype)
        self._source = source

    def blocks(self) -> Iterator[np.ndarray[Any, Any]]:
        """Yield the cast blocks.

        Raises:
            BundleError: An element is NaN, infinite, or beyond the range of the type.
        """
        target = self.dtype.numpy()
        for part in self._source.parts if isinstance(self._source, StackedTensor) else (self._source,):
            for block in part.blocks():
                with np.errstate(over="ignore"):
                    cast = block.astype(target)
                if not np.isfinite(cast).all():
                    worst = block[~np.isfinite(cast)][0]
                    raise BundleError(
                        f"{part.name}: {worst} is no finite number in {self.dtype.name.lower()}",
                        remedy="build a bf16 target if float32 holds it; otherwise the checkpoint is damaged",
                    )
                yield cast
