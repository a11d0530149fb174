"""Measure the largest magnitude of every tensor, to tell whether float16, which ends at 65504, holds a checkpoint.

The checkpoint's graphs are lowered to float32 and standard operators, with one more output after each float tensor:
its largest magnitude. They run over the prompts of `verify`, prompt and greedy answer. What is inside one operator (the
scores of an Attention, the squares of a norm) is not a tensor of the graph and is not seen: kernels of half precision
compute it in float32.
"""

from __future__ import annotations

import dataclasses
import math
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from engines.bundle import DECODER, VISION
from qwen3vl_export.parity.cases import make_cases
from qwen3vl_export.parity.lowered import LoweredSession, model_of
from qwen3vl_export.parity.range_report import RangeReport, TensorRange
from qwen3vl_export.parity.verify import DEFAULT_NEW_TOKENS, PLAIN_GREEDY

if TYPE_CHECKING:
    import onnx

    from runtime.contract import DecoderInputs, VisionInputs
    from runtime.manifest import Manifest
    from runtime.session import KVCache

_TAP = "largest magnitude of "
_LAYER = re.compile(r"(?:layers|blocks)\.\d+")
_TOWER = re.compile(r"^model\.(?:visual|language_model)\.")


def measure_ranges(checkpoint: str, *, max_new_tokens: int = DEFAULT_NEW_TOKENS) -> RangeReport:
    """Run the prompts of `verify` in float32.

    Args:
        checkpoint: What `Checkpoint.open` takes.
        max_new_tokens: Greedy tokens of each prompt.

    Raises:
        CheckpointError: It does not open.
        CapacityError: The disk does not hold the float32 weights, which lie in the temporary folder meanwhile.
    """
    from engines import registry
    from engines.build import build_engine
    from qwen3vl_export.checkpoint import Checkpoint
    from qwen3vl_export.export import make_bundle
    from qwen3vl_export.parity.tasks import REFERENCE_TARGET

    source = Checkpoint.open(checkpoint)
    # No kernels and no fusions of a target: of those, the tensors would not be the ones that other targets compute.
    portable = dataclasses.replace(registry.get(REFERENCE_TARGET), native_ops={}, passes=lambda _: ())
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "graphs"
        manifest = build_engine(make_bundle(source), portable, folder, runnable=False)
        ranges = [each for graph in (VISION, DECODER) for each in tap(folder / f"{graph}.onnx")]
        session = _TappedSession(folder, manifest)
        model = model_of(folder, manifest, session)
        # Frames of a video are pictures to every layer, as images are: they would take time and add nothing.
        for case in [each for each in make_cases(Path(work)) if not each.videos]:
            model.logits(case.messages)  # of every position, where an answer asks for the last one's
            model.generate(case.messages, max_new_tokens=max_new_tokens, **PLAIN_GREEDY)
    measured = (
        each if each.is_weight else dataclasses.replace(each, max_abs=session.largest[each.graph, each.name])
        for each in ranges
    )
    return RangeReport(checkpoint, tuple(sorted(measured, key=lambda each: each.max_abs, reverse=True)))


class _TappedSession(LoweredSession):
    """Runs tapped graphs and keeps the largest value of each tap."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        super().__init__(folder, manifest)
        self.largest: dict[tuple[str, str], float] = {}

    def _run(
        self,
        graph: str,
        inputs: VisionInputs | DecoderInputs,
        names: Sequence[str],
        cache: KVCache | None = None,
        slot: int = 0,
    ) -> list[NDArray[Any]]:
        taps = [output.name for output in self._graphs[graph].get_outputs() if output.name.startswith(_TAP)]
        found = super()._run(graph, inputs, [*names, *taps], cache, slot)
        for name, value in zip(taps, found[len(names) :], strict=True):
            key, magnitude = (graph, name.removeprefix(_TAP)), float(value)
            # A NaN stays: it comes of an infinity, and nothing is larger.
            largest = self.largest.get(key, 0.0)
            self.largest[key] = magnitude if math.isnan(magnitude) else max(largest, magnitude)
        return found[: len(names)]


def tap(path: Path) -> list[TensorRange]:
    """Give the graph in a file one more output for each float tensor that a node computes.

    Returns:
        What there is to measure: those tensors, their magnitude still 0, and the float weights, already measured.
    """
    import onnx
    from onnx import shape_inference

    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    typed = shape_inference.infer_shapes(model, strict_mode=True).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*typed.value_info, *typed.output)}
    ranges = list(_weights(graph, path.parent, path.stem))
    weights = {each.name: each.scope for each in ranges if each.scope}
    computed: dict[str, str] = {}
    begun = {"": 0}
    for node, typed_node in zip(list(graph.node), typed.node, strict=True):
        own = next((weights[name] for name in node.input if name in weights), None)
        # Without a weight of its own, a node belongs to the last part of the model that its inputs come from.
        scope = own or max((computed.get(name, "") for name in node.input), key=begun.__getitem__, default="")
        begun.setdefault(scope, len(begun))
        for name in filter(None, node.output):
            computed[name] = scope
            assert name in types, f"{path.name}: {node.op_type} {node.name}: the type of {name} is not known"
            if types[name] != onnx.TensorProto.FLOAT:
                continue
            ranges.append(TensorRange(path.stem, scope, node.op_type, name, 0.0))
            magnitude = f"magnitude of {name}"
            graph.node.append(onnx.helper.make_node("Abs", [name], [magnitude]))
            graph.node.append(onnx.helper.make_node("ReduceMax", [magnitude], [_TAP + name], keepdims=0))
            graph.output.append(onnx.helper.make_tensor_value_info(_TAP + name, onnx.TensorProto.FLOAT, []))
        if node.op_type == "Loop":
            ranges += _tap_loop(graph, node, typed_node, path.stem, scope)
    onnx.save(model, path)
    return ranges


def _tap_loop(
    graph: onnx.GraphProto, loop: onnx.NodeProto, typed: onnx.NodeProto, stem: str, scope: str
) -> Iterator[TensorRange]:
    """Do the same for what a loop, such as that over the experts, computes in its turns."""
    import onnx

    body, typed_body = (next(a.g for a in node.attribute if a.name == "body") for node in (loop, typed))
    types = {value.name: value.type.tensor_type.elem_type for value in (*typed_body.value_info, *typed_body.output)}
    for node in list(body.node):
        for name in node.output:
            if types[name] != onnx.TensorProto.FLOAT:
                continue
            yield TensorRange(stem, scope, node.op_type, name, 0.0)
            magnitude, of_turn, of_turns = (f"{what} of {name}" for what in ("magnitude", "largest", "turns"))
            body.node.append(onnx.helper.make_node("Abs", [name], [magnitude]))
            body.node.append(onnx.helper.make_node("ReduceMax", [magnitude], [of_turn], keepdims=0))
            body.output.append(onnx.helper.make_tensor_value_info(of_turn, onnx.TensorProto.FLOAT, []))
            loop.output.append(of_turns)
            graph.node.append(onnx.helper.make_node("ReduceMax", [of_turns], [_TAP + name], keepdims=0))
            graph.output.append(onnx.helper.make_tensor_value_info(_TAP + name, onnx.TensorProto.FLOAT, []))


def _weights(graph: onnx.GraphProto, folder: Path, stem: str) -> Iterator[TensorRange]:
    """Yield the float weights; they are read one at a time."""
    import numpy as np
    import onnx

    for tensor in graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            values: Any = onnx.numpy_helper.to_array(tensor, base_dir=str(folder))
            largest = float(np.abs(values).max(initial=0.0))
            yield TensorRange(stem, _scope_of_weight(tensor.name), "weight", tensor.name, largest)


def _scope_of_weight(name: str) -> str:
    """Return `layers.3` or `blocks.3` of a checkpoint key, else its module; nothing of a constant."""
    layer = _LAYER.search(name)
    module = name.rpartition(".")[0]
    return layer[0] if layer else _TOWER.sub("", module)
