"""Which kernels ONNX Runtime has for CUDA, and where it would run the nodes of a graph.

scripts/list_ort_cuda_kernels.py read the listing, configs/ort_cuda_kernels.toml, out of one version's wheel. What is
checked is the graph as it is written. ONNX Runtime's own optimisations come later and are not seen here; those that
fuse nodes do so for the provider that the nodes were assigned to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

import configs
from runtime.errors import TargetError

# Inputs that a kernel reads on the host while it is launched (`InputMemoryType(OrtMemTypeCPUInput, …)` in ONNX
# Runtime's core/providers/cuda and contrib_ops/cuda): shapes, axes, counts and limits.
_HOST_INPUTS: Mapping[str, frozenset[int]] = {
    "Clip": frozenset({1, 2}),
    "ConstantOfShape": frozenset({0}),
    "Expand": frozenset({1}),
    "GroupQueryAttention": frozenset({6}),
    "OneHot": frozenset({1}),
    "Pad": frozenset({1, 2, 3}),
    "Range": frozenset({0, 1, 2}),
    "ReduceMax": frozenset({1}),
    "ReduceMean": frozenset({1}),
    "ReduceSum": frozenset({1}),
    "Reshape": frozenset({1}),
    "Slice": frozenset({1, 2, 3, 4}),
    "Split": frozenset({1}),
    "Squeeze": frozenset({1}),
    "Tile": frozenset({1}),
    "TopK": frozenset({1}),
    "Unsqueeze": frozenset({1}),
}
# Kernels whose result is on the host.
_HOST_OUTPUTS = frozenset({"Shape", "Size"})
_HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
# `kSmallInitializerThreshold` of core/framework/fallback_cpu_capability.cc.
_SMALL_ELEMENTS = 100


@dataclass(frozen=True)
class Kernel:
    """One registered kernel.

    Attributes:
        first: First version of the operator that it runs.
        last: Last one; None if there was no later version when it was written.
        types: Element types that each of the operator's type parameters may have.
    """

    first: int
    last: int | None
    types: Mapping[str, frozenset[str]]

    @classmethod
    def parse(cls, text: str) -> Kernel:
        """Read `first-last T=float,float16 …`."""
        versions, *parameters = text.split()
        first, last = versions.split("-")
        pairs = (parameter.split("=") for parameter in parameters)
        return cls(
            int(first), int(last) if last else None, {name: frozenset(types.split(",")) for name, types in pairs}
        )

    def runs(self, version: int) -> bool:
        """Whether it runs that version of its operator; as `KernelRegistry::VerifyKernelDef` decides."""
        return self.first == version or (self.last is not None and self.first < version <= self.last)


@dataclass(frozen=True)
class KernelListing:
    """The CUDA kernels of one wheel.

    Attributes:
        wheel: Distribution and version.
        kernels: By domain and operator.
        operators: Type parameters of the inputs, then of the outputs, of ONNX Runtime's own operators.
    """

    wheel: str
    kernels: Mapping[tuple[str, str], tuple[Kernel, ...]]
    operators: Mapping[tuple[str, str], tuple[Sequence[str], Sequence[str]]]

    @classmethod
    def load(cls) -> KernelListing:
        """Read configs/ort_cuda_kernels.toml."""
        values: dict[str, Any] = configs.load("ort_cuda_kernels")
        kernels = {
            (domain, name): tuple(map(Kernel.parse, texts))
            for domain, found in values["kernels"].items()
            for name, texts in found.items()
        }
        operators = {}
        for domain, found in values["operators"].items():
            for name, text in found.items():
                inputs, _, outputs = text.partition("->")
                operators[domain, name] = (inputs.split(), outputs.split())
        return cls(values["wheel"], kernels, operators)

    def problem(self, node: ir.Node, opset_imports: Mapping[str, int]) -> str | None:
        """Return why no kernel runs a node, None if one does."""
        known = self.kernels.get((node.domain, node.op_type))
        if known is None:
            return "no kernel of that operator"
        version, inputs, outputs = self._operator(node, opset_imports)
        fitting = [kernel for kernel in known if kernel.runs(version)]
        if not fitting:
            return f"no kernel of its version {version}"
        found = [*_typed(node.inputs, inputs), *_typed(node.outputs, outputs)]
        if any(all(dtype in kernel.types.get(name, {dtype}) for name, dtype in found) for kernel in fitting):
            return None
        return "no kernel of " + ", ".join(f"{name} = {dtype}" for name, dtype in dict(found).items())

    def _operator(self, node: ir.Node, opset_imports: Mapping[str, int]) -> tuple[int, Sequence[str], Sequence[str]]:
        """Return an operator's version and the type parameters of its inputs and outputs."""
        own = self.operators.get((node.domain, node.op_type))
        if own is not None:
            return 1, *own
        import onnx.defs

        schema = onnx.defs.get_schema(node.op_type, opset_imports[node.domain], node.domain)
        return schema.since_version, [i.type_str for i in schema.inputs], [o.type_str for o in schema.outputs]


@dataclass(frozen=True)
class Placement:
    """Where the nodes of a graph run.

    Attributes:
        cuda: Nodes that a CUDA kernel runs.
        cpu: Shape computations, which ONNX Runtime keeps on the CPU on purpose.
        copies: Values that have to cross between host and device in every run. With one, ONNX Runtime refuses to
            capture the graph (`ALLOW_CPU_FOR_SHAPES`: nodes on the CPU, but no copies).
    """

    cuda: tuple[ir.Node, ...]
    cpu: tuple[ir.Node, ...]
    copies: tuple[ir.Value, ...]


def check_placement(model: ir.Model, listing: KernelListing) -> Placement:
    """Find out where ONNX Runtime runs each node of a flat, sorted graph whose values have types.

    The rule of small shape computations: a node runs on the CPU if it reads a result that is on the host, all else that
    it reads is on the host too, or a graph input, or a constant of at most 100 elements, and nothing is float16 or
    bfloat16 (`GetCpuPreferredNodes` in core/framework/fallback_cpu_capability.cc). Every other node must have a CUDA
    kernel for its operator, version and element types.

    Raises:
        TargetError: A node has none; the message names it.
    """
    on_host: set[ir.Value] = set()
    cuda: list[ir.Node] = []
    cpu: list[ir.Node] = []
    for node in model.graph:
        if _is_shape_computation(node, on_host):
            cpu.append(node)
            on_host.update(node.outputs)
            continue
        problem = listing.problem(node, model.graph.opset_imports)
        if problem is not None:
            operator = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
            raise TargetError(
                f"node {node.name!r}, {operator}: {problem} among the CUDA kernels of {listing.wheel}, so it would run "
                "on the CPU",
                remedy="lower it to operators that have a kernel, or build for another target",
            )
        cuda.append(node)
        if node.op_type in _HOST_OUTPUTS:
            on_host.update(node.outputs)
    return Placement(tuple(cuda), tuple(cpu), tuple(_copies(cuda, cpu, on_host)))


class CheckPlacementPass(ir.passes.InPlacePass):
    """Raise if a node of a flat graph would run on the CPU, or a value be copied to or from it; changes nothing."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Check the main graph; see `check_placement`."""
        copies = check_placement(model, KernelListing.load()).copies
        if copies:
            names = ", ".join(repr(value.name) for value in copies)
            raise TargetError(
                f"{names} would be copied between CPU and GPU in every run, so the graph could not be captured",
                remedy="compute shapes on the CPU and everything else on the GPU, or build for another target",
            )
        return ir.passes.PassResult(model, False)


def _is_shape_computation(node: ir.Node, on_host: set[ir.Value]) -> bool:
    inputs = [value for value in node.inputs if value is not None]
    if not any(value in on_host for value in inputs):
        return False
    for index, value in enumerate(node.inputs):
        if value is None or _is_small_constant(value) or value.is_graph_input():
            continue
        if value.dtype in _HALVES or value not in on_host or index in _HOST_INPUTS.get(node.op_type, ()):
            return False
    return all(value.dtype not in _HALVES for value in inputs)


def _is_small_constant(value: ir.Value) -> bool:
    return value.is_initializer() and value.shape is not None and math.prod(value.shape.numpy()) <= _SMALL_ELEMENTS


def _copies(cuda: Sequence[ir.Node], cpu: Sequence[ir.Node], on_host: set[ir.Value]) -> dict[ir.Value, None]:
    crossing: dict[ir.Value, None] = {}
    for node in cuda:
        read_on_host = _HOST_INPUTS.get(node.op_type, frozenset())
        # Only the shape of its input is asked for.
        if node.op_type in _HOST_OUTPUTS:
            continue
        for index, value in enumerate(node.inputs):
            if value is not None and not value.is_initializer() and (value in on_host) != (index in read_on_host):
                crossing[value] = None
    for node in cpu:
        for value in node.inputs:
            if value is not None and not value.is_initializer() and value not in on_host:
                crossing[value] = None
    return crossing


def _typed(values: Sequence[ir.Value | None], parameters: Sequence[str]) -> list[tuple[str, str]]:
    """Pair the type parameters of an operator's inputs or outputs with the element types that are there."""
    pairs = []
    for index, value in enumerate(values):
        if value is None or not parameters:
            continue
        if not (value.producer() is None or value.uses() or value.is_graph_output()):
            continue
        assert value.dtype is not None, f"{value.name}: no element type"
        # The last parameter may be repeated.
        pairs.append((parameters[min(index, len(parameters) - 1)], value.dtype.name.lower()))
    return pairs
