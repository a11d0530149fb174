"""Run a graph slice by slice, so that only one slice's weights are in memory and on the disk.

A slice is a stretch of the graph's nodes. Every sample runs through one before the next is opened; in between, a sample
is the values that later slices need.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import onnx_ir as ir
from numpy.typing import NDArray

from engines.external_data import write_model
from runtime.errors import EngineError

Arrays: TypeAlias = dict[str, NDArray[Any]]
"""Values of one sample, by name."""


@dataclass(frozen=True)
class Slice:
    """One stretch of a graph.

    Attributes:
        graph: The whole graph.
        inputs: What it takes from earlier slices and from the graph's inputs.
        outputs: What it computes for later slices, for the caller, or to be watched.
        watched: Those of the watched values that it computes.
        later: Names that later slices, or the caller, need.
    """

    graph: ir.Graph
    inputs: tuple[ir.Value, ...]
    outputs: tuple[ir.Value, ...]
    watched: tuple[ir.Value, ...]
    later: frozenset[str]

    def open(self, sample: Arrays, folder: Path) -> OpenSlice:
        """Write the slice with the weights that the graph has now, and open it.

        Args:
            sample: Any sample: it tells dtypes and ranks of the inputs.
            folder: Takes the slice's files, in place of those of the slice before.

        Raises:
            EngineError: ONNX Runtime does not open it.
        """
        import onnxruntime as ort

        graph = ir.convenience.extract(self.graph, self.inputs, self.outputs)
        for value in graph.inputs:
            array = sample[str(value.name)]
            value.dtype, value.shape = ir.DataType.from_numpy(array.dtype), ir.Shape([None] * array.ndim)
        path = folder / "slice.onnx"
        write_model(ir.Model(graph, ir_version=11), path, with_weights=True)
        options = ort.SessionOptions()
        options.log_severity_level = 4  # what fails is in the exception
        try:
            session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises classes of its own binding, without a common base
            raise EngineError(
                f"{path}: ONNX Runtime does not open it ({str(error).splitlines()[0]})",
                remedy="this release of ONNX Runtime may lack a kernel: install the one that locks/dev.txt names",
            ) from error
        return OpenSlice(self, session)


@dataclass(frozen=True)
class OpenSlice:
    """A slice in ONNX Runtime."""

    slice: Slice
    session: Any

    def run(self, sample: Arrays) -> Arrays:
        """Return the slice's outputs for one sample."""
        names = [str(value.name) for value in self.slice.outputs]
        found = self.session.run(names, {str(value.name): sample[str(value.name)] for value in self.slice.inputs})
        return dict(zip(names, found, strict=True))

    def advance(self, sample: Arrays) -> Arrays:
        """Run one sample, turn it, in place, into what later slices need, and return the slice's outputs."""
        found = self.run(sample)
        later = {name: array for name, array in {**sample, **found}.items() if name in self.slice.later}
        sample.clear()
        sample.update(later)
        return found


def cut(
    graph: ir.Graph, watched: Mapping[ir.Value, int], outputs: Collection[ir.Value], max_bytes: int
) -> Iterator[Slice]:
    """Cut what the watched values and the outputs depend on into slices.

    Each slice ends where the fewest values are alive, in the second half of what it may weigh: between two layers.

    Args:
        graph: Its nodes are in topological order.
        watched: Computed values, with the bytes that the caller needs for each.
        outputs: Values to compute to the end.
        max_bytes: Weights of a slice and bytes for its watched values; one node that needs more is a slice.
    """
    dynamic = _dynamic_values(graph)
    nodes = _needed_nodes(graph, {*watched, *outputs}, dynamic)
    last_use = {value: len(nodes) for value in outputs}
    for i, node in reversed(list(enumerate(nodes))):
        for value in node.inputs:
            if value is not None and value in dynamic:
                last_use.setdefault(value, i)
    num_bytes = [_weight_bytes(node, dynamic) + sum(watched.get(v, 0) for v in node.outputs) for node in nodes]
    num_alive = _count_alive(nodes, last_use)
    first = 0
    while first < len(nodes):
        last = _end(first, num_bytes, num_alive, max_bytes)
        made = dict.fromkeys(value for node in nodes[first:last] for value in node.outputs)
        used = dict.fromkeys(value for node in nodes[first:last] for value in node.inputs if value in last_use)
        yield Slice(
            graph,
            tuple(value for value in used if value is not None and value not in made),
            tuple(value for value in made if value in watched or last_use.get(value, -1) >= last),
            tuple(value for value in made if value in watched),
            frozenset(str(value.name) for value, use in last_use.items() if use >= last),
        )
        first = last


def _end(first: int, num_bytes: list[int], num_alive: list[int], max_bytes: int) -> int:
    """Return the index after the last node of the slice that begins at `first`."""
    total = 0
    ends: list[int] = []
    for i in range(first, len(num_bytes)):
        total += num_bytes[i]
        if total > max_bytes and i > first:
            return min(reversed(ends), key=lambda end: num_alive[end - 1]) if ends else i
        if 2 * total >= max_bytes:
            ends.append(i + 1)
    return len(num_bytes)


def _dynamic_values(graph: ir.Graph) -> set[ir.Value]:
    """Return what depends on the graph's inputs: all else is computed again in every slice that needs it."""
    dynamic = set(graph.inputs)
    for node in graph:
        if any(value in dynamic for value in node.inputs):
            dynamic.update(node.outputs)
    return dynamic


def _needed_nodes(graph: ir.Graph, wanted: set[ir.Value], dynamic: set[ir.Value]) -> list[ir.Node]:
    needed, nodes = set(wanted), []
    for node in reversed(list(graph)):
        if any(value in needed and value in dynamic for value in node.outputs):
            needed.update(value for value in node.inputs if value is not None)
            nodes.append(node)
    return nodes[::-1]


def _count_alive(nodes: list[ir.Node], last_use: Mapping[ir.Value, int]) -> list[int]:
    """Return how many values of the graph's nodes are alive after each node."""
    changes = [0] * (len(nodes) + 1)
    for i, node in enumerate(nodes):
        for value in node.outputs:
            if value in last_use:
                changes[i] += 1
                changes[last_use[value]] -= 1
    return list(itertools.accumulate(changes))


def _weight_bytes(node: ir.Node, dynamic: set[ir.Value]) -> int:
    """Return the bytes of the initializers that a node reads, also through nodes that compute constants."""
    num_bytes = 0
    for value in node.inputs:
        if value is None or value in dynamic:
            continue
        producer = value.producer()
        if producer is not None:
            num_bytes += _weight_bytes(producer, dynamic)
        elif value.const_value is not None:
            num_bytes += value.const_value.nbytes
    return num_bytes
