"""Forms in which ONNX Runtime's CPU kernels compute a mixture of experts: one layer with random codes.

Shapes: T tokens, E experts, D hidden, I width of an expert, k experts of a token, N outputs and K inputs of a product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engines.onnx_text import OPSET_VERSION

Arrays = dict[str, np.ndarray[Any, Any]]
Nodes = list[Any]
KERNEL, GATHERED = "QMoE, inputs in 8 bits", "gathered weights"  # MoE where the weights are float32
_MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class Shape:
    """Sizes of the layer and form of its weights; 32 bits are float32."""

    num_experts: int
    top_k: int
    hidden: int
    width: int
    bits: int
    block: int

    def token_bytes(self) -> float:
        """Bytes of the weights that one token goes through, scales and zero points included."""
        weights = 3 * self.top_k * self.hidden * self.width
        return weights * (self.bits / 8 + (0 if self.bits == 32 else (4 + self.bits / 8) / self.block))


class Graph:
    """Nodes and initializers of one form; input `x` [T, D], output `y`."""

    def __init__(self, shape: Shape, weights: Arrays) -> None:
        self.shape, self.weights = shape, weights
        self.nodes: Nodes = []
        self.constants: Arrays = {}

    def add(self, op: str, inputs: list[str], outputs: list[str], **attributes: Any) -> str:
        """Add a node and return its first output."""
        from onnx import helper

        self.nodes.append(helper.make_node(op, inputs, outputs, **attributes))
        return outputs[0]

    def constant(self, name: str, value: Any) -> str:
        """Add an initializer once and return its name."""
        self.constants[name] = np.asarray(value)
        return name

    def route(self) -> None:
        """Compute `logits`, and the experts `ids` and weights `share` [T, k] of each token."""
        self.constant("router", self.weights["router"])
        self.add("MatMul", ["x", "router"], ["logits"])
        self.add("Softmax", ["logits"], ["probabilities"], axis=-1)
        self.add("TopK", ["probabilities", self.constant("k", [self.shape.top_k])], ["largest", "ids"])
        self.add("ReduceSum", ["largest", self.constant("last", [-1])], ["total"])
        self.add("Div", ["largest", "total"], ["share"])

    def product(self, x: str, name: str, expert: int, out: str) -> Any:
        """Return the node of one expert's product."""
        from onnx import helper

        if self.shape.bits == 32:
            weight = self.constant(f"{name}.{expert}", self.weights[name][expert])
            return helper.make_node("FusedMatMul", [x, weight], [out], domain=_MICROSOFT, transB=1)
        parts = []
        for part in ("codes", "scales", "zeros"):
            array = self.weights[f"{name}.{part}"][expert]
            if part == "codes":
                array = array.reshape(len(array), -1, self.shape.block * self.shape.bits // 8)
            parts.append(self.constant(f"{name}.{expert}.{part}", array))
        num_outputs, num_inputs = self._size(name)
        return helper.make_node(
            "MatMulNBits",
            [x, *parts],
            [out],
            domain=_MICROSOFT,
            N=num_outputs,
            K=num_inputs,
            bits=self.shape.bits,
            block_size=self.shape.block,
            accuracy_level=4,
        )

    def swiglu(self, both: str, out: str, prefix: str = "") -> None:
        """Add the activation of gate and up, which lie behind each other."""
        gate, up, sigmoid, silu = (f"{prefix}{name}" for name in ("gate", "up", "sigmoid", "silu"))
        self.add("Split", [both], [gate, up], axis=-1, num_outputs=2)
        self.add("Sigmoid", [gate], [sigmoid])
        self.add("Mul", [gate, sigmoid], [silu])
        self.add("Mul", [silu, up], [out])

    def sort(self) -> list[str]:
        """Sort the pairs of token and expert by expert; return each expert's rows of x."""
        shape = self.shape
        experts = range(shape.num_experts)
        self.add("Reshape", ["ids", "last"], ["flat"])
        self.add("Shape", ["flat"], ["pairs"])
        self.add("TopK", ["flat", "pairs"], ["sorted", "order"], largest=0)
        self.add("TopK", ["order", "pairs"], ["positions", "inverse"], largest=0)
        self.add("Div", ["order", self.constant("per_token", shape.top_k)], ["token"])
        self.add("Gather", ["x", "token"], ["sorted_x"])
        self.add("Unsqueeze", ["flat", self.constant("one", [1])], ["column"])
        self.add("Equal", ["column", self.constant("experts", np.arange(shape.num_experts))], ["is_of"])
        self.add("Cast", ["is_of"], ["counted"], to=7)
        self.add("ReduceSum", ["counted", self.constant("zero", [0])], ["counts"], keepdims=0)
        rows = [f"x.{e}" for e in experts]
        self.add("Split", ["sorted_x", "counts"], rows, axis=0)
        return rows

    def unsort(self, rows: list[str]) -> None:
        """Put the experts' outputs back in the order of the tokens and add those of each."""
        shape = self.shape
        self.add("Concat", rows, ["joined"], axis=0)
        self.add("Gather", ["joined", "inverse"], ["unsorted"])
        self.add("Reshape", ["unsorted", self.constant("per", [-1, shape.top_k, shape.hidden])], ["of_token"])
        self.add("Unsqueeze", ["share", "last"], ["share_1"])
        self.add("Mul", ["of_token", "share_1"], ["weighted"])
        self.add("ReduceSum", ["weighted", "one"], ["y"], keepdims=0)

    def _size(self, name: str) -> tuple[int, int]:
        hidden, width = self.shape.hidden, self.shape.width
        return (2 * width, hidden) if name == "gate_up" else (hidden, width)


def kernel(graph: Graph, accuracy_level: int) -> None:
    """One node for the whole layer: MoE or QMoE."""
    shape, is_float = graph.shape, graph.shape.bits == 32
    graph.constant("router", graph.weights["router"])
    graph.add("MatMul", ["x", "router"], ["logits"])
    order = np.arange(2 * shape.width).reshape(2, -1).T.reshape(-1)
    names = {}
    for key, array in graph.weights.items():
        if key != "router":
            names[key] = graph.constant(key, array[:, order] if key.startswith("gate_up") else array)
    activation = {"activation_type": "swiglu", "activation_alpha": 1.0, "activation_beta": 0.0, "swiglu_fusion": 1}
    common = {"domain": _MICROSOFT, "k": shape.top_k, "normalize_routing_weights": 1, **activation}
    if is_float:
        graph.add("MoE", ["x", "logits", names["gate_up"], "", names["down"]], ["y"], **common)
        return
    inputs = ["x", "logits"]
    for name in ("gate_up", "down"):
        inputs += [names[f"{name}.codes"], names[f"{name}.scales"], ""]
    inputs += ["", "", "", names["gate_up.zeros"], names["down.zeros"]]
    form = {"expert_weight_bits": shape.bits, "block_size": shape.block, "weights_prepacked": 0}
    graph.add("QMoE", inputs, ["y"], **form, accuracy_level=accuracy_level, **common)


def products(graph: Graph) -> None:
    """Two products for each expert, over its rows of the sorted tokens; most have no row at one token."""
    graph.route()
    rows = graph.sort()
    both = [f"both.{e}" for e in range(len(rows))]
    graph.nodes += [graph.product(row, "gate_up", e, both[e]) for e, row in enumerate(rows)]
    graph.add("Concat", both, ["both"], axis=0)
    graph.swiglu("both", "inner")
    inner, out = ([f"{name}.{e}" for e in range(len(rows))] for name in ("inner", "out"))
    graph.add("Split", ["inner", "counts"], inner, axis=0)
    graph.nodes += [graph.product(row, "down", e, out[e]) for e, row in enumerate(inner)]
    graph.unsort(out)


def guarded_products(graph: Graph) -> None:
    """As `products`, each expert in an If of its own that is taken if it has rows."""
    from onnx import TensorProto, helper

    graph.route()
    rows = graph.sort()
    graph.add("Greater", ["counts", graph.constant("none", 0)], ["has_rows"])
    has_rows, out = ([f"{name}.{e}" for e in range(len(rows))] for name in ("has_rows", "out"))
    graph.add("Split", ["has_rows"], has_rows, axis=0, num_outputs=len(rows))
    graph.constant("empty", np.zeros((0, graph.shape.hidden), np.float32))
    for e, row in enumerate(rows):
        inside = Graph(graph.shape, graph.weights)
        inside.nodes.append(inside.product(row, "gate_up", e, f"both.{e}"))
        inside.swiglu(f"both.{e}", f"inner.{e}", f"{e}.")
        inside.nodes.append(inside.product(f"inner.{e}", "down", e, f"then.{e}"))
        graph.constants |= inside.constants
        branches = {
            "then_branch": (inside.nodes, f"then.{e}"),
            "else_branch": ([helper.make_node("Identity", ["empty"], [f"else.{e}"])], f"else.{e}"),
        }
        graphs = {
            name: helper.make_graph(nodes, name, [], [helper.make_tensor_value_info(result, TensorProto.FLOAT, None)])
            for name, (nodes, result) in branches.items()
        }
        graph.add("If", [has_rows[e]], [out[e]], **graphs)
    graph.unsort(out)


def gathered(graph: Graph) -> None:
    """The weights of every chosen expert are looked up, to float32, and multiplied in one batch."""
    graph.route()
    graph.add("Unsqueeze", ["x", graph.constant("column_axes", [1, 3])], ["x_column"])
    out = "x_column"
    for name in ("gate_up", "down"):
        if graph.shape.bits == 32:
            graph.add("Gather", [graph.constant(name, graph.weights[name]), "ids"], [f"{name}.chosen"])
        else:
            parts = [graph.constant(f"{name}.{part}", graph.weights[f"{name}.{part}"]) for part in ("codes", "scales")]
            graph.add(
                "GatherBlockQuantized",
                [parts[0], "ids", parts[1], graph.constant(f"{name}.zeros", graph.weights[f"{name}.zeros"])],
                [f"{name}.chosen"],
                domain=_MICROSOFT,
                bits=graph.shape.bits,
                block_size=graph.shape.block,
                gather_axis=0,
                quantize_axis=2,
            )
        graph.add("MatMul", [f"{name}.chosen", out], [f"{name}.product"])
        out = f"{name}.product"
        if name == "gate_up":
            graph.add("Squeeze", [out, "last"], ["both"])
            graph.constant("last", [-1])
            graph.swiglu("both", "inner")
            out = graph.add("Unsqueeze", ["inner", "last"], ["inner_column"])
    graph.add("Squeeze", [out, "last"], ["of_token"])
    graph.add("Unsqueeze", ["share", "last"], ["share_1"])
    graph.add("Mul", ["of_token", "share_1"], ["weighted"])
    graph.add("ReduceSum", ["weighted", graph.constant("one", [1])], ["y"], keepdims=0)


FORMS: dict[str, Callable[[Graph], None]] = {
    KERNEL: lambda graph: kernel(graph, 4),
    "QMoE, inputs in float32": lambda graph: kernel(graph, 0),
    "products of sorted tokens": products,
    "products of sorted tokens, If": guarded_products,
    GATHERED: gathered,
}


def random_weights(shape: Shape, seed: int = 0) -> Arrays:
    """Draw the weights of a layer; codes are random, so no form gains by values."""
    rng = np.random.default_rng(seed)
    count, hidden, width = shape.num_experts, shape.hidden, shape.width
    weights = {"router": rng.standard_normal((hidden, count), dtype=np.float32) * np.float32(0.05)}
    for name, rows, columns in (("gate_up", 2 * width, hidden), ("down", hidden, width)):
        if shape.bits == 32:
            weights[name] = rng.standard_normal((count, rows, columns), dtype=np.float32) * np.float32(0.02)
            continue
        blocks = columns // shape.block
        sizes = {"codes": columns * shape.bits // 8, "zeros": -(-blocks * shape.bits // 8)}
        for part, size in sizes.items():
            weights[f"{name}.{part}"] = rng.integers(0, 256, (count, rows, size), dtype=np.uint8)
        scales = rng.uniform(0.5, 1.5, (count, rows, blocks)) * 0.02 / (1 << (shape.bits - 2))
        weights[f"{name}.scales"] = scales.astype(np.float32)
    return weights


def open_form(form: str, shape: Shape, weights: Arrays, folder: Path, threads: int) -> Any:
    """Write the graph of a form and open it."""
    import onnx
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    graph = Graph(shape, weights)
    FORMS[form](graph)
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["T", shape.hidden]) for name in "xy")
    initializers = [numpy_helper.from_array(np.ascontiguousarray(v), k) for k, v in graph.constants.items()]
    model = helper.make_model(
        helper.make_graph(graph.nodes, "experts", [x], [y], initializers),
        opset_imports=[helper.make_opsetid("", OPSET_VERSION), helper.make_opsetid(_MICROSOFT, 1)],
        ir_version=11,
    )
    path = folder / f"{list(FORMS).index(form)}.onnx"
    onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data")
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    path.with_name(f"{path.name}.data").unlink()
    return session
