"""Open what `verify` compares: an engine, or the lowered graphs of a target whose device is not here.

Lowered graphs run with ONNX Runtime's CPU provider, node by node as they are written: its optimisations would fold a
DequantizeLinear into a product of its own kind, which no device of the target computes. Most of its kernels know no
float16. It computes those nodes in float32 between two casts, and drops the casts between two such nodes, optimisations
or not (1.32): the square of 300 is then 90000 and not infinite. So each tensor is held by two Identities, which have
the type that the graph says; one alone, between two casts, would be computed in float32 too. Then every tensor is
rounded to float16 as on the device, and infinite beyond its end; what is inside a node, such as the sums of a product,
stays in float32.

Shapes: see runtime/session.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engines.bundle import DECODER, VISION
from qwen3vl_export.parity.float8_products import expand_float8_products
from runtime import native
from runtime.cache_types import cache_types
from runtime.contract import DECODER_OUTPUTS, VISION_OUTPUTS, DecoderInputs, FloatArray, VisionInputs
from runtime.errors import CapacityError, ParityError, UsageError
from runtime.files import is_folder, leads_somewhere
from runtime.machine import default_threads
from runtime.manifest import LOWERED_NAME, MANIFEST_NAME, Manifest
from runtime.route import RouteKeywords, other_engines
from runtime.routed_session import RoutedSession
from runtime.session import KVCache, TopLogits, top_logits

if TYPE_CHECKING:
    import onnx
    import onnxruntime as ort

    from qwen3vl_export.checkpoint import Checkpoint
    from runtime.model import Qwen3VLModel
    from runtime.sessions.ort_cpu import OrtKVCache

CPU_NOTE = (
    "these are the lowered graphs, run by ONNX Runtime's CPU provider: every tensor has the type of the graph, but "
    "kernels may compute in float32 inside, so this proves the graphs and not how a GPU rounds"
)
_PROVIDER = "CPUExecutionProvider"


class LoweredSession:
    """The graphs of a folder of lowered graphs, with the protocol of `runtime.session.Session`."""

    def __init__(self, folder: Path, manifest: Manifest, threads: int | None = None) -> None:
        self._text = manifest.model.text
        self._cache_types = cache_types(manifest.capabilities, self._text.num_layers)
        self._folder, self._manifest = folder, manifest
        has_own = "custom_ops" in manifest.capabilities
        self._graphs = {graph: open_graph(folder / f"{graph}.onnx", threads, has_own) for graph in (VISION, DECODER)}
        (shape,) = (node.shape for node in self._graphs[DECODER].get_inputs() if node.name == "past_key_values.0.key")
        # TensorRT takes no other cache than one of a fixed capacity, so there it is a number.
        self.capacity = shape[2] if isinstance(shape[2], int) else None

    def vision(self, inputs: VisionInputs) -> FloatArray:
        """Run the vision tower; see `runtime.session.Session.vision`."""
        (embeds,) = self._run(VISION, inputs, VISION_OUTPUTS)
        return np.asarray(embeds, np.float32)

    def new_cache(self, capacity: int, batch: int = 1) -> OrtKVCache:
        """Allocate a cache of zeros, of the graph's own capacity where that is fixed.

        Raises:
            CapacityError: The graph's capacity is less.
        """
        from runtime.sessions.ort_cpu import OrtKVCache, read_scales

        if self.capacity is not None and capacity > self.capacity:
            raise CapacityError(
                f"prompt and answer take {capacity} positions, the lowered graph has {self.capacity}",
                remedy="compare fewer tokens (--max-new-tokens), or lower for a larger capacity",
            )
        shape = (batch, self._text.num_kv_heads, self.capacity or capacity, self._text.head_dim)
        return OrtKVCache(self._cache_types, shape, read_scales(self._folder, self._manifest))

    def decode_batch(self, num_sequences: int, num_slots: int) -> int:
        """Return the same number: no step is recorded."""
        return num_sequences

    def prefill(self, inputs: DecoderInputs, cache: KVCache, slot: int = 0) -> FloatArray:
        """Run the decoder; see `runtime.session.Session.prefill`."""
        return self.decode(inputs, cache, slot)

    def decode(self, inputs: DecoderInputs, cache: KVCache, slot: int = 0) -> FloatArray:
        """Run the decoder; see `runtime.session.Session.decode`."""
        (logits,) = self._decode(inputs, cache, slot, DECODER_OUTPUTS)
        return logits

    def decode_top(self, inputs: DecoderInputs, cache: KVCache, slot: int = 0) -> list[list[TopLogits]]:
        """Run the decoder; see `runtime.session.TopLogitsSession.decode_top`."""
        names = (*DECODER_OUTPUTS, "top_logits", "top_ids")
        logits_BLV, values_BLk, ids_BLk = self._decode(inputs, cache, slot, names)
        return top_logits(ids_BLk, values_BLk, logits_BLV.shape[-1], lambda b, i: logits_BLV[b, i])

    def _decode(self, inputs: DecoderInputs, cache: KVCache, slot: int, names: Sequence[str]) -> list[NDArray[Any]]:
        assert inputs.num_cache_rows <= cache.capacity, "past_lengths + S exceeds the cache"
        return self._run(DECODER, inputs, names, cache, slot)

    def _run(
        self,
        graph: str,
        inputs: VisionInputs | DecoderInputs,
        names: Sequence[str],
        cache: KVCache | None = None,
        slot: int = 0,
    ) -> list[NDArray[Any]]:
        """Run a graph and return the outputs of these names; the cache is read and written in place."""
        session = self._graphs[graph]
        binding = session.io_binding()
        for name, array in inputs.arrays().items():
            binding.bind_cpu_input(name, array)
        for name in names:
            binding.bind_output(name, "cpu")
        if cache is not None:
            cache.bind(binding, slot, len(inputs.input_ids))  # type: ignore[attr-defined,union-attr]
        try:
            session.run_with_iobinding(binding)
        except Exception as error:  # onnxruntime raises classes of its own binding, without a common base
            raise _refusal(self._folder / f"{graph}.onnx", error) from error
        values = binding.get_outputs_as_ortvaluevector()  # in the order in which they were bound
        return [values[i].numpy() for i in range(len(names))]


def open_graph(
    path: Path,
    threads: int | None = None,
    has_own_kernels: bool = False,
    edit: Callable[[onnx.GraphProto], object] = lambda graph: None,
) -> ort.InferenceSession:
    """Open a graph so that its nodes run as they are and its tensors have the types that it says.

    Args:
        path: The file.
        threads: Threads of the session.
        has_own_kernels: It has operators of our own.
        edit: Changes the graph before it is opened; the file stays as it is.

    Raises:
        EngineError: It has operators of our own kernels, whose library cannot be used.
        ParityError: ONNX Runtime's CPU provider has no kernel for an op or a type.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4  # what it logs is also in what it raises
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = threads or default_threads()
    if has_own_kernels:
        native.register(options)
    # Nobody times these runs, and on busy cores waiting threads that spin take the time of those that work.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # The graph comes as bytes, so its weights' folder must be named.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    try:
        return ort.InferenceSession(_held(path, edit), options, providers=[_PROVIDER])
    except Exception as error:  # see above
        raise _refusal(path, error) from error


def open_model(folder: Path, *, threads: int | None = None, route: Mapping[str, Path] | None = None) -> Qwen3VLModel:
    """Open an engine with its own session, or a folder of lowered graphs with `LoweredSession`.

    Args:
        folder: The engine, or the graphs.
        threads: As of `from_engine`.
        route: Engines that run a part in its place, by option (`runtime.route.RouteKeywords`).

    Raises:
        EngineError: The folder is neither, or a file of it is missing or altered.
        ParityError: The CPU cannot execute the lowered graphs.
        UsageError: Other engines were given for parts of lowered graphs, or do not fit.
    """
    from runtime.model import Qwen3VLModel
    from runtime.urls import check_local

    check_local(folder, "engine")
    if not is_lowered(folder):
        return Qwen3VLModel.from_engine(folder, threads=threads, tuned=False, **RouteKeywords(**(route or {})))
    if route:
        raise UsageError(
            f"{folder} holds lowered graphs, which run all parts themselves",
            remedy=f"leave {' and '.join(route)} out, or give an engine",
        )
    manifest = Manifest.read(folder, LOWERED_NAME)
    manifest.check(folder, LOWERED_NAME)
    return model_of(folder, manifest, LoweredSession(folder, manifest, threads))


def open_model_of(
    checkpoint: Checkpoint, folder: Path, *, threads: int | None = None, route: Mapping[str, Path] | None = None
) -> Qwen3VLModel:
    """Open a folder, as `open_model` does, to compare it with the checkpoint it was built from.

    Raises:
        ParityError: It was built from a model of another shape.
    """
    model = open_model(folder, threads=threads, route=route)
    if model.config != checkpoint.config:
        raise ParityError(
            f"{folder} was built from a model of another shape than {checkpoint.name}",
            remedy="give the checkpoint that `qwen3vl inspect` names as its source",
        )
    return model


def manifests_of(model: Qwen3VLModel) -> list[Manifest]:
    """Return the manifests of the engines that a model runs on."""
    session = model.session
    return [each.manifest for each in session.engines] if isinstance(session, RoutedSession) else [model.manifest]


def route_notes(model: Qwen3VLModel) -> list[str]:
    """Say which engines run a part beside the one that decodes."""
    return [f"{option}: {engine}" for option, engine in other_engines(model.session)]


def model_of(folder: Path, manifest: Manifest, session: LoweredSession) -> Qwen3VLModel:
    """Put what a folder holds for prompts around a session."""
    from runtime.engine_options import DEFAULT_MAX_CONTEXT
    from runtime.memory import machine_bytes
    from runtime.model import Qwen3VLModel
    from runtime.preparation import Preparation

    max_context = min(session.capacity or DEFAULT_MAX_CONTEXT, manifest.model.text.max_positions)
    preparation = Preparation.from_folder(folder, manifest.model).for_engine(manifest.capabilities)
    return Qwen3VLModel(manifest, session, preparation, max_context, machine_bytes())


def is_lowered(folder: Path) -> bool:
    """Whether the folder holds lowered graphs and no engine.

    Raises:
        EngineError: This user may not look into it.
    """
    if not is_folder(folder):
        return False  # of what it is instead, the reader of engines tells
    return leads_somewhere(folder / LOWERED_NAME) and not leads_somewhere(folder / MANIFEST_NAME)


def _held(path: Path, edit: Callable[[onnx.GraphProto], object]) -> bytes:
    """Return the graph of a file, in operators that the CPU runs, with two Identities after each tensor of a node."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    expand_float8_products(model.graph)
    edit(model.graph)
    outputs = {value.name for value in model.graph.output}
    nodes = []
    for node in model.graph.node:
        nodes.append(node)
        for i, name in enumerate(node.output):
            if name and name not in outputs:  # what leaves the graph has its type anyway
                node.output[i] = f"{name}/computed"
                nodes.append(onnx.helper.make_node("Identity", [node.output[i]], [f"{name}/held"]))
                nodes.append(onnx.helper.make_node("Identity", [f"{name}/held"], [name]))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model.SerializeToString()


def _refusal(path: Path, error: Exception) -> ParityError:
    """Return the error that names the op and the types that the CPU provider lacks, or what is wrong."""
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : ", "", " ".join(str(error).split()))
    node = re.search(r"node with name '([^']*)'|\(node:'([^']*)'", text)
    if "NOT_IMPLEMENTED" not in text or node is None:
        return ParityError(f"{path}: ONNX Runtime refuses it ({text})", remedy="the graph is wrong: export it again")
    return ParityError(
        f"{path}: ONNX Runtime's CPU provider has no kernel for {_op_and_types(path, node[1] or node[2])}",
        remedy="it needs its own device: build the engine there and give `verify` that",
    )


def _op_and_types(path: Path, name: str) -> str:
    """Return the op of a node and the types of its inputs, such as `MatMul (bfloat16, bfloat16)`."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.value_info)}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    node = next(node for node in graph.node if node.name == name)
    known = (types[value] for value in node.input if value in types)
    return f"{node.op_type} ({', '.join(onnx.TensorProto.DataType.Name(dtype).lower() for dtype in known)})"
