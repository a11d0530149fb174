"""Read out of a lowered decoder which weights a decode step takes, and how they are stored."""

from __future__ import annotations

from typing import Any, Final

import onnx_ir as ir

from engines.decode_plan.attention import AttentionReader
from engines.decode_plan.decoder import Decoder, Experts, Layer, Norm
from engines.decode_plan.match import (
    attributes,
    before_cast,
    check_input,
    check_numbers,
    check_same,
    inputs,
    is_made_by,
    made_by,
    numbers,
    result,
    taken,
)
from engines.decode_plan.norm import read_norm
from engines.decode_plan.stored import block_of, read_experts, read_product, read_table
from engines.kernels.launch import Unserved, Weight
from runtime.contract import past_names, present_names
from runtime.model_config import ModelConfig

_LOGITS: Final = ("logits", "top_logits", "top_ids")
_SUM_AND_NORM: Final = "SkipSimplifiedLayerNormalization"
_DTYPES: Final = {ir.DataType.FLOAT16: "float16", ir.DataType.BFLOAT16: "bfloat16"}
# The exponential of this is 0 in every type, whatever is added by a router.
_NO_LOGIT: Final = -60000.0


def read_decoder(model: ir.Model, config: ModelConfig) -> Decoder:
    """Find the weights of a flat decoder graph of an ort-cuda target.

    The graph is followed from its results back to its inputs, so that whatever the plan's kernels do not compute is
    found. Where an image would be is left out: a plan runs steps of text.

    Args:
        model: The lowered graph.
        config: Shape of the model, which the graph is compared with.

    Raises:
        Unserved: The graph computes anything else, or stores it otherwise, than a plan is made of.
    """
    return _Reader(model, config).decoder()


class _Reader:
    """Follows one graph. Values: B sequences, S new tokens, L logits asked for, H heads, D head dim, K hidden size."""

    def __init__(self, model: ir.Model, config: ModelConfig) -> None:
        self._text = config.text
        self._outputs = {str(value.name): value for value in model.graph.outputs}
        self._half = _half_of(model)
        self._attention = AttentionReader(config.text, self._half, self._outputs)

    def decoder(self) -> Decoder:
        """Return what the graph is."""
        text = self._text
        present = present_names(text.num_layers)
        if set(self._outputs) != {*_LOGITS, *present}:
            odd = sorted(set(self._outputs) ^ {*_LOGITS, *present})
            raise Unserved(f"the graph's results are not {', '.join(_LOGITS)} and caches: {', '.join(odd[:4])}")
        logits, top_k = self._logits()
        head, normed = self._product(logits, text.vocab_size, text.hidden_size, "the logits")
        final_norm, asked = self._norm(normed, "what the head multiplies")
        hidden = self._asked_for(asked)
        layers = []
        for index in reversed(range(text.num_layers)):
            layer, hidden = self._layer(hidden, index)
            layers.append(layer)
        looked_up = before_cast(self._of_text(hidden), "the embeddings")
        table, ids = read_table(looked_up, text.vocab_size, text.hidden_size, self._half)
        check_input(ids, "input_ids", "what is looked up")
        return Decoder(
            dtype=_DTYPES[self._half],
            num_heads=text.num_heads,
            num_kv_heads=text.num_kv_heads,
            head_dim=text.head_dim,
            table=table,
            layers=tuple(reversed(layers)),
            final_norm=final_norm,
            head=head,
            top_k=top_k,
            constants=self._attention.frequencies,
        )

    def _logits(self) -> tuple[ir.Value, int]:
        """Return the product that is given as logits, and how many of its largest elements are."""
        logits, top_logits, top_ids = (self._outputs[name] for name in _LOGITS)
        product = before_cast(logits, "the logits")
        top = made_by(before_cast(top_logits, "the largest logits"), "TopK", what="the largest logits")
        check_same(top_ids, result(top, 1), "top_ids")
        searched, count = taken(top, 2)
        check_same(searched, product, "what the largest logits are chosen of")
        (top_k,) = numbers(count, "the number of largest logits")
        return searched, int(top_k)

    def _asked_for(self, value: ir.Value | None) -> ir.Value:
        """Return the hidden states that those of the tokens whose logits are asked for are chosen of."""
        chosen = made_by(value, "GatherElements", what="what the last norm takes")
        hidden, index = taken(chosen, 2, axis=1)
        positions, shape = taken(made_by(index, "Expand", what="the chosen positions"), 2)
        check_numbers(shape, [1, 1, self._text.hidden_size], "the shape of the chosen positions")
        asked, axis = taken(made_by(positions, "Unsqueeze", what="the chosen positions"), 2)
        _check_last_axis(axis)
        check_input(asked, "logits_positions", "the chosen positions")
        return hidden

    def _of_text(self, value: ir.Value | None) -> ir.Value | None:
        """Return what a value is for a token of text, where it is another for one of an image."""
        if not is_made_by(value, "Where"):
            return value
        is_visual, _, of_text = taken(made_by(value, "Where", what="hidden states"), 3)
        row, zero = taken(made_by(is_visual, "GreaterOrEqual", what="whether a token is of an image"), 2)
        check_numbers(zero, [0], "the first row of an image")
        rows, axis = taken(made_by(row, "Unsqueeze", what="a token's row of an image"), 2)
        _check_last_axis(axis)
        check_input(rows, "visual_rows", "a token's row of an image")
        return of_text

    def _layer(self, hidden: ir.Value | None, index: int) -> tuple[Layer, ir.Value]:
        """Return a layer, and the hidden states that it takes."""
        text = self._text
        middle, fed = self._sum(self._of_text(hidden), f"the result of layer {index}")
        gate_up = down = experts = None
        if text.experts_of(index) is None:
            gate_up, down, normed = self._dense(fed)
        else:
            experts, normed = self._experts(fed)
        mlp_norm, source = self._norm(normed, "what the feed-forward part takes")
        check_same(source, middle, "what is normalised for the feed-forward part")

        before, attended = self._sum(middle, f"the result of attention in layer {index}")
        width = text.num_heads * text.head_dim
        output, joined = self._product(attended, text.hidden_size, width, "attention's output")
        attention, qkv_value = self._attention.read(joined, index)
        rows = (text.num_heads + 2 * text.num_kv_heads) * text.head_dim
        qkv, normed = self._product(qkv_value, rows, text.hidden_size, "queries, keys and values")
        attention_norm, source = self._norm(normed, "what attention takes")
        check_same(source, before, "what is normalised for attention")
        layer = Layer(
            attention_norm=attention_norm,
            qkv=qkv,
            q_norm=attention.q_norm,
            k_norm=attention.k_norm,
            scale=attention.scale,
            output=output,
            mlp_norm=mlp_norm,
            gate_up=gate_up,
            down=down,
            experts=experts,
        )
        return layer, before

    def _sum(self, value: ir.Value | None, what: str) -> tuple[ir.Value, ir.Value]:
        """Return the residual and what is added to it."""
        if is_made_by(value, _SUM_AND_NORM):
            node = made_by(value, _SUM_AND_NORM, what=what, output=3)
            residual, added, _ = taken(node, 3, free=("epsilon",))
        else:
            residual, added = taken(made_by(value, "Add", what=what), 2)
        return residual, added

    def _norm(self, value: ir.Value | None, what: str) -> tuple[Norm, ir.Value | None]:
        return read_norm(value, self._text.hidden_size, self._half, what)

    def _product(self, value: ir.Value | None, rows: int, columns: int, what: str) -> tuple[Weight, ir.Value]:
        return read_product(value, rows, columns, self._half, what)

    def _dense(self, value: ir.Value) -> tuple[Weight, Weight, ir.Value]:
        """Return gate and up, down, and what they take, of down(SiLU(gate) · up)."""
        hidden, inner = self._text.hidden_size, self._text.intermediate_size
        down, product = self._product(value, hidden, inner, "the feed-forward part")
        activated, up = taken(made_by(product, "Mul", what="what down takes"), 2)
        gate, opened = taken(made_by(activated, "Mul", what="SiLU of the gate"), 2)
        (sigmoid_of,) = taken(made_by(opened, "Sigmoid", what="the sigmoid of the gate"), 1)
        check_same(sigmoid_of, gate, "what the sigmoid of the gate is of")
        split = made_by(gate, "Split", what="the gate")
        check_same(up, result(split, 1), "up")
        both, sizes = taken(split, 2, axis=-1)
        check_numbers(sizes, [inner, inner], "the sizes of gate and up")
        gate_up, normed = self._product(both, 2 * inner, hidden, "gate and up")
        return gate_up, down, normed

    def _experts(self, value: ir.Value) -> tuple[Experts, ir.Value]:
        """Return router and experts of a layer, and what they take."""
        config = self._text.experts
        if config is None:
            raise Unserved("experts in a model without")
        hidden, inner, count = self._text.hidden_size, config.intermediate_size, config.num_experts
        node = made_by(value, "MoE", "QMoE", what="the experts' result")
        common: dict[str, Any] = {
            "k": config.top_k,
            "activation_type": "swiglu",
            "activation_alpha": 1.0,
            "activation_beta": 0.0,
            "swiglu_fusion": 1,  # gate and up take turns
            "normalize_routing_weights": 1,
        }
        if node.op_type == "MoE":
            attributes(node, **common)
            normed, chosen, *_ = inputs(node, (0, 1, 2, 4))
            places, bits, block = (2, 4), (0, 0), 0
        else:
            free = ("expert_weight_bits", "fc2_expert_weight_bits", "block_size", "accuracy_level")
            found = attributes(node, free=free, weights_prepacked=0, **common)
            normed, chosen, *_ = inputs(node, (0, 1, 2, 3, 5, 6))  # no biases, and no zero points
            first = int(found["expert_weight_bits"])
            places, bits = (2, 5), (first, int(found["fc2_expert_weight_bits"]) or first)
            block = block_of(found, node)
        router, routed = self._router(chosen, count, config.top_k)
        check_same(routed, normed, "what the router takes")
        shapes = (count, 2 * inner, hidden), (count, hidden, inner)
        gate_up, down = (
            read_experts(node, place, shape, self._half, width, block)
            for place, shape, width in zip(places, shapes, bits, strict=True)
        )
        return Experts(router, gate_up, down, count, config.top_k), routed

    def _router(self, value: ir.Value | None, count: int, top_k: int) -> tuple[Weight, ir.Value]:
        """Return the router, and what it takes, of logits whose largest alone were left."""
        scattered = made_by(value, "ScatterElements", what="the logits of the chosen experts")
        nothing, ids, kept = taken(scattered, 3, axis=-1)
        top = made_by(kept, "TopK", what="the logits of the chosen experts")
        check_same(ids, result(top, 1), "the chosen experts")
        logits, number = taken(top, 2)
        check_numbers(number, [top_k], "the number of chosen experts")
        least, shape = taken(made_by(nothing, "Expand", what="the logits of the others"), 2)
        if not all(each <= _NO_LOGIT for each in numbers(least, "the logits of the others")):
            raise Unserved("experts that were not chosen have a share")
        (shape_of_logits,) = taken(made_by(shape, "Shape", what="the shape of the experts' logits"), 1)
        check_same(shape_of_logits, logits, "what the shape of the experts' logits is of")
        product, rows = taken(made_by(logits, "Reshape", what="the experts' logits"), 2)
        check_numbers(rows, [-1, count], "the shape of the experts' logits")
        return self._product(product, count, self._text.hidden_size, "the router")


def _half_of(model: ir.Model) -> ir.DataType:
    """Return the type of the KV cache, which is that of activations too."""
    past = next((value for value in model.graph.inputs if value.name == past_names(1)[0]), None)
    if past is None or past.dtype not in _DTYPES:
        found = None if past is None else past.dtype
        raise Unserved(f"a KV cache of {found}, expected {' or '.join(map(str, _DTYPES))}")
    return past.dtype


def _check_last_axis(value: ir.Value) -> None:
    """Raise unless a value is the axis after two others."""
    if numbers(value, "an axis") not in ([2], [-1]):
        raise Unserved(f"{value.name} is no last axis")
