"""Trace each distinct piece of the model once, as an ONNX function whose parameters are inputs.

Shapes: B batch, S new tokens, T cache capacity, L logits positions, V visual rows, I segments, P patches, H head dim.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from engines.onnx_text import DOMAIN, DOMAIN_VERSION, OPSET_VERSION
from qwen3vl_export.tracing.emitters import CacheSlot, emitting

if TYPE_CHECKING:
    import numpy as np
    import torch

    from qwen3vl_export.checkpoint import Checkpoint

# Example sizes, pairwise different where a trace could mistake one dimension for another.
_B, _S, _T, _L, _V, _I, _P = 3, 7, 40, 2, 5, 3, 24


@dataclass(frozen=True)
class Piece:
    """One traced function.

    Attributes:
        function: Inputs are the activations, then the parameters, all named.
        parameters: Shape of each parameter in the checkpoint, by its name inside the module, in input order.
    """

    function: ir.Function
    parameters: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Pieces:
    """All pieces of one model, and the two constants that no checkpoint holds.

    `dense_layer` and `sparse_layer` are decoder layers with a feed-forward network and with experts; a piece that the
    model does not have is None.
    """

    patch_embed: Piece
    vision_block: Piece
    merger: Piece
    deepstack_merger: Piece | None
    embed: Piece
    rotary: Piece
    dense_layer: Piece | None
    sparse_layer: Piece | None
    add_deepstack: Piece
    head: Piece
    inv_freq: np.ndarray[Any, Any]
    axis_of_frequency: np.ndarray[Any, Any]


def trace_pieces(checkpoint: Checkpoint) -> Pieces:
    """Trace a model of one layer of each kind under fake tensors; no weight is read."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import AutoConfig, AutoModelForImageTextToText
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

    values = copy.deepcopy(checkpoint.hf_config)
    shape = checkpoint.config
    values["text_config"]["num_hidden_layers"] = 1
    if shape.text.experts is not None:  # layer 0 dense, layer 1 with experts
        values["text_config"] |= {"num_hidden_layers": 2, "mlp_only_layers": [0], "decoder_sparse_step": 1}
    values["text_config"].pop("layer_types", None)
    values["vision_config"]["depth"] = 1
    values["vision_config"]["deepstack_visual_indexes"] = [0] if shape.vision.deepstack_layers else []
    config = AutoConfig.for_model(**values)
    rotary = Qwen3VLTextRotaryEmbedding(config.text_config)
    # The `meta` device does not work here: ops made by torch.onnx.ops.symbolic put their outputs on the CPU.
    mode = FakeTensorMode()
    with mode:
        # config.json says in which type the weights are stored; the bundle is float32.
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    language, visual = model.model.language_model, model.model.visual
    head_dim, vision, text = shape.text.head_dim, shape.vision, shape.text
    tracer = _Tracer(mode)

    def integers(*size: int) -> torch.Tensor:
        return torch.zeros(*size, dtype=torch.int64)

    floats = torch.empty

    def decoder_layer(name: str, index: int) -> Piece:
        return tracer.trace(
            name,
            {"": language.layers[index]},
            _decoder_layer,
            {
                "hidden_states": (lambda: floats(_B, _S, text.hidden_size), "B S _"),
                "cos": (lambda: floats(_B, _S, head_dim // 2), "B S _"),
                "sin": (lambda: floats(_B, _S, head_dim // 2), "B S _"),
                "past_key": (lambda: floats(_B, text.num_kv_heads, _T, head_dim), "B _ T _"),
                "past_value": (lambda: floats(_B, text.num_kv_heads, _T, head_dim), "B _ T _"),
                "past_lengths": (lambda: integers(_B), "B"),
            },
            ["hidden_states_out", "present_key", "present_value"],
        )

    is_sparse = {text.experts_of(layer) is not None for layer in range(text.num_layers)}
    with emitting():
        return Pieces(
            patch_embed=tracer.trace(
                "VisionPatchEmbed",
                {"patch_embed": visual.patch_embed, "pos_embed": visual.pos_embed},
                _embed_patches,
                {
                    "pixel_values": (lambda: floats(_I, _P, vision.patch_elements), "I P _"),
                    "pos_indices": (lambda: integers(_P, 4), "P _"),
                    "pos_weights": (lambda: floats(_P, 4), "P _"),
                },
                ["hidden_states"],
                views={"patch_embed.proj.weight": (vision.hidden_size, vision.patch_elements)},
            ),
            vision_block=tracer.trace(
                "VisionBlock",
                {"": visual.blocks[0]},
                lambda m, x, cos, sin: m[""](x, cu_seqlens=None, position_embeddings=(cos, sin)),
                {
                    "hidden_states": (lambda: floats(_I, _P, vision.hidden_size), "I P _"),
                    "rope_cos": (lambda: floats(_P, vision.head_dim // 2), "P _"),
                    "rope_sin": (lambda: floats(_P, vision.head_dim // 2), "P _"),
                },
                ["hidden_states_out"],
            ),
            merger=tracer.trace(
                "VisionMerger", {"": visual.merger}, _merge, _merger_inputs(floats, vision), ["embeds"]
            ),
            deepstack_merger=tracer.trace(
                "DeepStackMerger",
                {"": visual.deepstack_merger_list[0]},
                _merge,
                _merger_inputs(floats, vision),
                ["embeds"],
            )
            if vision.deepstack_layers
            else None,
            embed=tracer.trace(
                "EmbedTokens",
                {"": language.embed_tokens},
                _embed_tokens,
                {
                    "input_ids": (lambda: integers(_B, _S), "B S"),
                    "visual_rows": (lambda: integers(_B, _S), "B S"),
                    "visual_embeds": (lambda: floats(shape.num_visual_levels, _V, text.hidden_size), "_ V _"),
                },
                ["hidden_states"],
            ),
            rotary=tracer.trace(
                "RotaryTable",
                {"": language.rotary_emb},
                lambda m, *inputs: m[""](*inputs),
                {
                    "position_ids": (lambda: integers(3, _B, _S), "_ B S"),
                    "inv_freq": (lambda: floats(head_dim // 2), "_"),
                    "axis_of_frequency": (lambda: integers(head_dim // 2), "_"),
                },
                ["cos", "sin"],
            ),
            dense_layer=decoder_layer("DecoderLayer", 0) if False in is_sparse else None,
            sparse_layer=decoder_layer("SparseDecoderLayer", 1) if True in is_sparse else None,
            add_deepstack=tracer.trace(
                "AddDeepStack",
                {},
                _add_deepstack,
                {
                    "hidden_states": (lambda: floats(_B, _S, text.hidden_size), "B S _"),
                    "visual_rows": (lambda: integers(_B, _S), "B S"),
                    "visual_embeds": (lambda: floats(shape.num_visual_levels, _V, text.hidden_size), "_ V _"),
                    "level": (lambda: integers(1), "_"),
                },
                ["hidden_states_out"],
            ),
            head=tracer.trace(
                "LanguageHead",
                {"norm": language.norm, "lm_head": model.lm_head},
                _head,
                {
                    "hidden_states": (lambda: floats(_B, _S, text.hidden_size), "B S _"),
                    "logits_positions": (lambda: integers(_B, _L), "B L"),
                },
                ["logits"],
            ),
            inv_freq=rotary.inv_freq.numpy(),
            axis_of_frequency=_axis_of_frequency(rotary),
        )


def _axis_of_frequency(rotary: Any) -> np.ndarray[Any, Any]:
    """Find the axis (0 t, 1 h, 2 w) of each frequency by sending markers through transformers' own interleaving."""
    import torch

    num_frequencies = len(rotary.inv_freq)
    markers = torch.arange(3).reshape(3, 1, 1, 1).repeat(1, 1, 1, num_frequencies)
    return rotary.recomposition_frequencies(markers)[0, 0, :num_frequencies].numpy()


def _merger_inputs(floats: Any, vision: Any) -> dict[str, tuple[Callable[[], torch.Tensor], str]]:
    return {"hidden_states": (lambda: floats(_I, _P, vision.hidden_size), "I P _")}


# The glue between modules, which transformers writes inside the forwards of its two models.


def _embed_patches(m: Any, pixels: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return m["patch_embed"](pixels) + (m["pos_embed"](indices) * weights[:, :, None]).sum(1)


def _merge(m: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    return m[""](hidden_states)[None]


def _visual_level(visual_embeds: torch.Tensor, level: torch.Tensor, visual_rows: torch.Tensor) -> torch.Tensor:
    """Rows of one level of visual_embeds [1+D, V, hidden], row 0 where a position is text; [B, S, hidden]."""
    import torch

    # index_select and embedding export as Gather, indexing brackets as GatherND.
    return torch.nn.functional.embedding(visual_rows.clamp(min=0), visual_embeds.index_select(0, level).squeeze(0))


def _embed_tokens(m: Any, ids: torch.Tensor, visual_rows: torch.Tensor, visual_embeds: torch.Tensor) -> torch.Tensor:
    import torch

    merged = _visual_level(visual_embeds, torch.zeros(1, dtype=torch.int64), visual_rows)
    return torch.where(visual_rows[..., None] >= 0, merged, m[""](ids))


def _add_deepstack(
    _: Any, hidden_states: torch.Tensor, visual_rows: torch.Tensor, visual_embeds: torch.Tensor, level: torch.Tensor
) -> torch.Tensor:
    import torch

    added = hidden_states + _visual_level(visual_embeds, level, visual_rows)
    return torch.where(visual_rows[..., None] >= 0, added, hidden_states)


def _decoder_layer(
    m: Any, hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *past: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    slot = CacheSlot(*past)
    hidden_states = m[""](hidden_states, position_embeddings=(cos, sin), past_key_values=slot)
    return (hidden_states, *slot.present)


def _head(m: Any, hidden_states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    import torch

    index = positions[..., None].expand(-1, -1, hidden_states.shape[-1])
    return m["lm_head"](m["norm"](torch.gather(hidden_states, 1, index))).float()


class _Tracer:
    """Trace modules into functions of domain `qwen3vl`."""

    def __init__(self, mode: Any) -> None:
        self._mode = mode

    def trace(
        self,
        name: str,
        modules: Mapping[str, Any],
        forward: Callable[..., Any],
        inputs: Mapping[str, tuple[Callable[[], torch.Tensor], str]],
        outputs: list[str],
        views: Mapping[str, tuple[int, ...]] | None = None,
    ) -> Piece:
        """Trace `forward(modules, *inputs)` once.

        Args:
            name: Name of the function.
            modules: The transformers modules by prefix of their parameters' names.
            forward: What to trace.
            inputs: Maker of an example, and the names of its dimensions (`_` is fixed), by input name.
            outputs: Names of the outputs.
            views: Parameters that the forward takes in another shape than the module holds.
        """
        import torch

        views = views or {}
        parameters: dict[str, torch.Tensor] = {}
        for prefix, module in modules.items():
            for key, parameter in module.named_parameters():
                parameters[f"{prefix}.{key}" if prefix else key] = parameter.detach()
        shown = {key: p.reshape(views[key]) if key in views else p for key, p in parameters.items()}
        wrapper = _wrap(modules, forward)
        with self._mode:
            examples = tuple(make() for make, _ in inputs.values())
        dims = tuple(
            {axis: torch.export.Dim.AUTO for axis, dim in enumerate(names.split()) if dim != "_"}
            for _, names in inputs.values()
        )
        with _quiet():
            program = torch.export.export(
                wrapper, (examples, shown), dynamic_shapes=(dims, {key: None for key in shown}), strict=False
            )
            # Every parameter is an input, so the optimizer reads no fake weight.
            onnx_program = torch.onnx.export(
                program, dynamo=True, opset_version=OPSET_VERSION, optimize=True, verbose=False
            )
        assert onnx_program is not None
        function = _as_function(onnx_program.model, name, [*inputs, *shown], outputs)
        return Piece(function, {key: tuple(p.shape) for key, p in parameters.items()})


def _wrap(modules: Mapping[str, Any], forward: Callable[..., Any]) -> torch.nn.Module:
    import torch

    class Wrapper(torch.nn.Module):
        """Hide the modules from torch.export, so that their parameters are inputs and not state."""

        def forward(self, examples: tuple[torch.Tensor, ...], parameters: dict[str, torch.Tensor]) -> Any:
            def bound(prefix: str, module: torch.nn.Module) -> Callable[..., Any]:
                start = f"{prefix}." if prefix else ""
                own = {key.removeprefix(start): p for key, p in parameters.items() if key.startswith(start)}
                return lambda *args, **kwargs: torch.func.functional_call(module, own, args, kwargs)

            return forward({prefix: bound(prefix, module) for prefix, module in modules.items()}, *examples)

    return Wrapper()


class _quiet:
    """Silence the progress chatter of torch.onnx, which is about opset and shape details of no use to a user."""

    def __enter__(self) -> None:
        self._level = logging.root.manager.disable
        logging.disable(logging.WARNING)
        self._warnings = warnings.catch_warnings()
        self._warnings.__enter__()
        warnings.simplefilter("ignore")

    def __exit__(self, *exc: object) -> None:
        self._warnings.__exit__(*exc)  # type: ignore[arg-type]
        logging.disable(self._level)


def _as_function(model: ir.Model, name: str, inputs: list[str], outputs: list[str]) -> ir.Function:
    """Turn a traced graph into a function: named values, constants as nodes, no types of the example left behind."""
    graph = model.graph
    assert len(graph.inputs) == len(inputs), f"{name}: traced {len(graph.inputs)} inputs, expected {len(inputs)}"
    assert len(graph.outputs) == len(outputs), f"{name}: traced {len(graph.outputs)} outputs, expected {len(outputs)}"
    assert not model.functions, f"{name}: the trace left functions {list(model.functions)}"
    first = graph[0]
    for key, value in list(graph.initializers.items()):
        constant = ir.node("Constant", [], attributes={"value": value.const_value}, name=f"constant_{key}")
        constant.outputs[0].name = key
        graph.insert_before(first, constant)
        ir.convenience.replace_all_uses_with(value, constant.outputs[0])
        del graph.initializers[key]
    for value, new_name in zip(graph.inputs, inputs, strict=True):
        value.name = new_name
    for value, new_name in zip(graph.outputs, outputs, strict=True):
        value.name = new_name
    for node in graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.shape = None
            value.metadata_props.clear()
    for value in graph.inputs:
        value.shape = None
        value.metadata_props.clear()
    graph.metadata_props.clear()
    graph.opset_imports.clear()
    graph.opset_imports.update({"": OPSET_VERSION, DOMAIN: DOMAIN_VERSION})
    return ir.Function(DOMAIN, name, "", graph=graph, attributes=[])
