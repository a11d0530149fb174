"""Trace each distinct piece of the model once, as an ONNX function whose parameters are inputs.

All pieces are traced in one call and taken apart afterwards: torch.onnx builds its table of operators anew for each
call, which is half of the time of ten calls.

Sizes are those of an example: torch's symbolic ones give the same functions in more than twice the time, and the
tests compare both. The definition may ask no input for a dynamic size. Each trace is searched for integers that are
multiples of one, which are what a reshape would leave.

Shapes: B batch, S new tokens, T cache capacity, L logits positions, V visual rows, I segments, P patches, H head dim.
"""

from __future__ import annotations

import gc
import logging
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from engines.onnx_text import DOMAIN, DOMAIN_VERSION, OPSET_VERSION
from qwen3vl_export import modeling
from qwen3vl_export.ops import registry
from runtime.contract import DECODER_DTYPES, VISION_DTYPES, Dims, DType, cache_dims, decoder_dims, vision_dims
from runtime.model_config import ModelConfig

# Example sizes of the dynamic dimensions: primes, so that their multiples are seldom anything else. P is taken times
# the patches of a visual token.
EXAMPLE_SIZES = {"B": 10007, "S": 10009, "T": 10037, "L": 10039, "V": 10061, "I": 10067, "P": 10069}

_TRACING = threading.Lock()


@dataclass(frozen=True)
class Piece:
    """One traced function.

    Attributes:
        function: Inputs are the activations, then the parameters, all named.
        parameters: Shape of each parameter in the checkpoint, by its name inside the module, in input order.
        views: Shapes of those that the function takes in another shape.
    """

    function: ir.Function
    parameters: Mapping[str, tuple[int, ...]]
    views: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """All pieces of one model, and the two constants that no checkpoint holds.

    `dense_layer` and `sparse_layer` are decoder layers with a feed-forward network and with experts; `scored_block` is
    the last block of a vision tower that says how much attention its tokens get. A piece that the model does not have
    is None.
    """

    patch_embed: Piece
    vision_block: Piece
    scored_block: Piece | None = None
    merger: Piece
    deepstack_merger: Piece | None = None
    embed: Piece
    rotary: Piece
    dense_layer: Piece | None = None
    sparse_layer: Piece | None = None
    add_deepstack: Piece
    head: Piece
    inv_freq: np.ndarray[Any, Any]
    axis_of_frequency: np.ndarray[Any, Any]


@dataclass(frozen=True)
class _Input:
    """One activation: a letter among its dimensions is dynamic."""

    name: str
    dims: Sequence[int | str]
    dtype: torch.dtype = torch.float32

    def example(self, patches_per_token: int) -> Tensor:
        sizes = EXAMPLE_SIZES | {"P": EXAMPLE_SIZES["P"] * patches_per_token}
        return torch.zeros([sizes[dim] if isinstance(dim, str) else dim for dim in self.dims], dtype=self.dtype)


@dataclass(frozen=True)
class _Task:
    """What to trace: a module, and the names of what goes in and out."""

    name: str
    module: nn.Module
    inputs: Sequence[_Input]
    outputs: Sequence[str]
    # Parameters that the module takes in another shape than the checkpoint holds.
    views: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def parameters(self) -> dict[str, Tensor]:
        """The module's own, under their names in it."""
        return {key: value.detach() for key, value in self.module.named_parameters()}

    def shown(self) -> dict[str, Tensor]:
        """The parameters as the function takes them."""
        return {key: p.reshape(self.views[key]) if key in self.views else p for key, p in self.parameters().items()}


def trace_pieces(config: ModelConfig, *, token_scores: bool = False) -> Pieces:
    """Trace a model of one layer of each kind under fake tensors; no weight is read.

    Args:
        config: Shape of the model.
        token_scores: Trace the last block of the vision tower with the scores of its tokens, too.
    """
    # The `meta` device does not work here: it would trace tensors of two devices. torch.export keeps its state in
    # globals, so threads take turns.
    with _TRACING, FakeTensorMode():
        tasks = _vision_tasks(config, token_scores=token_scores) | _text_tasks(config)
        functions = _trace(list(tasks.values()), config.vision.patches_per_token)
    pieces = {
        name: Piece(function, {key: tuple(value.shape) for key, value in task.parameters().items()}, task.views)
        for (name, task), function in zip(tasks.items(), functions, strict=True)
    }
    inv_freq, axis_of_frequency = modeling.rotary_frequencies(config.text)
    return Pieces(**pieces, inv_freq=inv_freq, axis_of_frequency=axis_of_frequency)


def _inputs(dims: Mapping[str, Dims], dtypes: Mapping[str, DType]) -> list[_Input]:
    """Return the inputs of a graph, in order."""
    torch_types = {np.float32: torch.float32, np.int64: torch.int64}
    return [_Input(name, each, torch_types[dtypes[name]]) for name, each in dims.items()]


def _vision_tasks(config: ModelConfig, *, token_scores: bool) -> dict[str, _Task]:
    """Return what to trace of the vision tower, by fields of `Pieces`."""
    vision, hidden_size = config.vision, config.text.hidden_size
    patches = _Input("hidden_states", ["I", "P", vision.hidden_size])
    *pixels, cos, sin = _inputs(vision_dims(config), VISION_DTYPES)
    embedding = _Joined(
        modeling.embed_patches,
        patch_embed=modeling.PatchEmbed(vision),
        pos_embed=nn.Embedding(vision.num_position_embeddings, vision.hidden_size),
    )
    view = {"patch_embed.proj.weight": (vision.hidden_size, vision.patch_elements)}

    def merger(name: str, *, joins_first: bool) -> _Task:
        return _Task(name, modeling.PatchMerger(vision, hidden_size, joins_first=joins_first), [patches], ["embeds"])

    tasks = {
        "patch_embed": _Task("VisionPatchEmbed", embedding, pixels, ["hidden_states"], view),
        "vision_block": _Task("VisionBlock", modeling.VisionBlock(vision), [patches, cos, sin], ["hidden_states_out"]),
        "merger": merger("VisionMerger", joins_first=False),
    }
    if token_scores:
        outputs = ["hidden_states_out", "token_scores"]
        block = modeling.ScoredVisionBlock(vision)
        tasks["scored_block"] = _Task("ScoredVisionBlock", block, [patches, cos, sin], outputs)
    if vision.deepstack_layers:
        tasks["deepstack_merger"] = merger("DeepStackMerger", joins_first=True)
    return tasks


def _text_tasks(config: ModelConfig) -> dict[str, _Task]:
    """Return what to trace of the decoder, by fields of `Pieces`."""
    text, half = config.text, config.text.head_dim // 2
    ids, positions, rows, embeds, past_lengths, logits_positions = _inputs(decoder_dims(config), DECODER_DTYPES)
    hidden = _Input("hidden_states", ["B", "S", text.hidden_size])
    frequencies = [_Input("inv_freq", [half]), _Input("axis_of_frequency", [half], torch.int64)]
    rotary = [_Input(name, ["B", "S", half]) for name in ("cos", "sin")]
    cache = [_Input(name, cache_dims(config)) for name in ("past_key", "past_value")]
    layer_inputs = [hidden, *rotary, *cache, past_lengths]
    presents = ["hidden_states_out", "present_key", "present_value"]
    embedding = modeling.EmbedTokens(text.vocab_size, text.hidden_size)
    head = _Joined(
        modeling.language_head,
        norm=modeling.RMSNorm(text.hidden_size, text.rms_norm_eps),
        lm_head=nn.Linear(text.hidden_size, text.vocab_size, bias=False),
    )
    level = _Input("level", [1], torch.int64)
    tasks = {
        "embed": _Task("EmbedTokens", embedding, [ids, rows, embeds], ["hidden_states"]),
        "rotary": _Task("RotaryTable", _Joined(modeling.rotary_table), [positions, *frequencies], ["cos", "sin"]),
    }
    for has_experts in sorted({text.experts_of(layer) is not None for layer in range(text.num_layers)}):
        layer = modeling.DecoderLayer(text, text.experts if has_experts else None)
        field_name, name = ("sparse_layer", "SparseDecoderLayer") if has_experts else ("dense_layer", "DecoderLayer")
        tasks[field_name] = _Task(name, layer, layer_inputs, presents)
    return tasks | {
        "add_deepstack": _Task(
            "AddDeepStack", _Joined(modeling.add_deepstack), [hidden, rows, embeds, level], ["hidden_states_out"]
        ),
        "head": _Task("LanguageHead", head, [hidden, logits_positions], ["logits"]),
    }


class _Joined(nn.Module):
    """Modules that lie apart in the model, under one function that takes them first."""

    def __init__(self, function: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self._function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *inputs: Tensor) -> Any:
        return self._function(*self.children(), *inputs)


def _trace(tasks: Sequence[_Task], patches_per_token: int) -> list[ir.Function]:
    """Trace all tasks in one call, and return a function for each."""
    modules = [task.module for task in tasks]

    class All(nn.Module):
        """Takes the parameters as inputs: the modules lie outside of it, so they are no state that torch would keep."""

        def forward(self, examples: Sequence[Sequence[Tensor]], parameters: Sequence[Mapping[str, Tensor]]) -> Any:
            calls = zip(modules, parameters, examples, strict=True)
            return [torch.func.functional_call(module, dict(own), tuple(given)) for module, own, given in calls]

    examples = [tuple(each.example(patches_per_token) for each in task.inputs) for task in tasks]
    parameters = [task.shown() for task in tasks]
    with _undisturbed():
        program = torch.export.export(All(), (examples, parameters), strict=False)
        # Every parameter is an input, so the optimizer reads no fake weight.
        traced = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET_VERSION,
            optimize=True,
            verbose=False,
            custom_translation_table=registry.translations(),
        )
    assert traced is not None and not traced.model.functions, "the trace left functions"
    return list(_taken_apart(traced.model.graph, tasks))


def _taken_apart(graph: ir.Graph, tasks: Sequence[_Task]) -> Iterator[ir.Function]:
    """Cut the common graph at the inputs and outputs of each task; examples of all tasks come before parameters."""
    values = iter(graph.inputs)
    examples = [[next(values) for _ in task.inputs] for task in tasks]
    inputs = [[*given, *(next(values) for _ in task.parameters())] for task, given in zip(tasks, examples, strict=True)]
    assert next(values, None) is None, "the trace has more inputs than the pieces"
    results = iter(graph.outputs)
    outputs = [[next(results) for _ in task.outputs] for task in tasks]
    assert next(results, None) is None, "the trace has more outputs than the pieces"
    for task, given, made in zip(tasks, inputs, outputs, strict=True):
        piece = ir.convenience.extract(graph, given, made)
        yield _as_function(
            piece, task.name, [each.name for each in task.inputs] + list(task.parameters()), task.outputs
        )


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Silence torch.onnx, whose chatter about opsets and shapes is of no use to a user, and keep garbage for later.

    Collections took an eighth of the CPU of a demo's export, since torch makes millions of small objects, and freed
    next to nothing.
    """
    level, collects = logging.root.manager.disable, gc.isenabled()
    logging.disable(logging.WARNING)
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if collects:
            gc.enable()
        logging.disable(level)


def _as_function(graph: ir.Graph, name: str, inputs: Sequence[str], outputs: Sequence[str]) -> ir.Function:
    """Turn a traced graph into a function: named values, constants as nodes, no types of the example left behind."""
    first = graph[0]
    for key, value in sorted(graph.initializers.items()):  # in an order of their own they come out of a set
        assert value.const_value is not None
        _check_sizes(name, value.const_value.numpy())
        constant = ir.node("Constant", [], attributes={"value": value.const_value}, name=f"constant_{key}")
        constant.outputs[0].name = key
        graph.insert_before(first, constant)
        ir.convenience.replace_all_uses_with(value, constant.outputs[0])
        del graph.initializers[key]
    for node in graph:
        for attribute in node.attributes.values():
            if attribute.type in (ir.AttributeType.INT, ir.AttributeType.INTS):
                _check_sizes(name, attribute.value)
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.shape = None
            value.metadata_props.clear()
    for value in graph.inputs:
        value.shape = None
        value.metadata_props.clear()
    for value, new_name in (*zip(graph.inputs, inputs, strict=True), *zip(graph.outputs, outputs, strict=True)):
        value.name = new_name
    graph.metadata_props.clear()
    graph.opset_imports.clear()
    graph.opset_imports.update({"": OPSET_VERSION, DOMAIN: DOMAIN_VERSION})
    return ir.Function(DOMAIN, name, "", graph=graph, attributes=[])


def _check_sizes(name: str, values: Any) -> None:
    """Raise if the shape of a constant, or an integer in it, is a multiple of a dynamic size of the example."""
    values = np.asarray(values)
    for numbers in (np.array(values.shape, np.int64), values.ravel() if values.dtype.kind in "iu" else np.array([0])):
        is_fixed = np.array([(numbers % size == 0) & (numbers != 0) for size in EXAMPLE_SIZES.values()])
        if is_fixed.any():
            place = is_fixed.any(0).argmax()
            letters = [letter for letter, found in zip(EXAMPLE_SIZES, is_fixed[:, place], strict=True) if found]
            raise AssertionError(f"{name}: the trace fixed {' · '.join(letters)}: a constant has {numbers[place]}")
