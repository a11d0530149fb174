"""Write the graphs with which the runtime proves kernels of quantised weights (runtime/kernels.py).

    python scripts/write_kernel_tests.py [FOLDER]

A graph multiplies codes at the ends of their ranges, of one sign and of mixed ones, by activations that 8 bits hold
exactly, so that a right kernel is exact, too; it compares the products with stored ones of float64 and returns the
largest error of all, `error`, as a share of the largest product. Its input `zero` is 0: added to constants, it keeps
the library from computing the products when the graph is opened.

Shapes: M rows of activations, K inputs, N outputs, J blocks of a row, E experts, D hidden, I inner size; S new tokens,
T cache capacity, Q query heads, H head dim.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

Array = NDArray[Any]
FOLDER = Path(__file__).resolve().parent.parent / "runtime" / "kernel_tests"
_MICROSOFT = "com.microsoft"
# One token, a draft of few, and a part of a prompt: kernels differ by the rows of a call.
_ROWS = (1, 2, 3, 9)


class Test:
    """Collects nodes, and products beside what they must be.

    Args:
        domain: Of the kernels.
    """

    def __init__(self, domain: str = _MICROSOFT) -> None:
        self._domain = domain
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []
        self._errors: list[str] = []
        self._count = 0

    def constant(self, values: Any) -> str:
        """Store an array."""
        name = self._name()
        self._constants.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def nodes(
        self, op_type: str, inputs: list[str], num_outputs: int, domain: str = "", **attributes: Any
    ) -> list[str]:
        """Add a node and return the names of its outputs."""
        outputs = [self._name() for _ in range(num_outputs)]
        self._nodes.append(helper.make_node(op_type, inputs, outputs, domain=domain, **attributes))
        return outputs

    def node(self, op_type: str, inputs: list[str], domain: str = "", **attributes: Any) -> str:
        """Add a node of one output and return its name."""
        return self.nodes(op_type, inputs, 1, domain, **attributes)[0]

    def in_calls(self, x_MK: Array, product: Callable[[str], str]) -> str:
        """Return the products of activations that are given in calls of `_ROWS` rows."""
        sizes = self.constant(np.array(_ROWS))
        parts = self.nodes("Split", [self.live(x_MK.astype(np.float32)), sizes], len(_ROWS), axis=0)
        return self.node("Concat", [product(part) for part in parts], axis=0)

    def live(self, values: Array) -> str:
        """Store an array that the library cannot take for a constant."""
        dtype = helper.np_dtype_to_tensor_dtype(values.dtype)
        zero = "zero" if values.dtype == np.float32 else self.node("Cast", ["zero"], to=dtype)
        return self.node("Add", [self.constant(values), zero])

    def expect(self, found: str, expected: Array) -> None:
        """Compare a product with the right one."""
        wrong = self.node("Abs", [self.node("Sub", [found, self.constant(np.asarray(expected, np.float32))])])
        most = self.constant(np.float32(np.abs(expected).max()).reshape(()))
        largest = self.node("Div", [self.node("ReduceMax", [wrong], keepdims=0), most])
        self._errors.append(self.node("Reshape", [largest, self.constant(np.array([1]))]))

    def model(self) -> onnx.ModelProto:
        """Return the graph `zero` -> `error`."""
        every = self.node("Concat", self._errors, axis=0)
        self._nodes.append(helper.make_node("ReduceMax", [every], ["error"], keepdims=0))
        scalars = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, []) for name in ("zero", "error")]
        graph = helper.make_graph(self._nodes, "kernel_test", scalars[:1], scalars[1:], self._constants)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid(self._domain, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)

    def _name(self) -> str:
        self._count += 1
        return f"v{self._count}"


def either(shape: tuple[int, ...], low: int, high: int, salt: int = 0) -> Array:
    """Return both ends of a range in a fixed order without a pattern that a kernel could cancel."""
    numbers = (np.arange(np.prod(shape), dtype=np.uint64) + np.uint64(salt * 7919)) * np.uint64(0x9E3779B97F4A7C15)
    return np.where((numbers >> np.uint64(61)) & np.uint64(1), high, low).reshape(shape)


def weights_of(num_inputs: int, num_outputs: int, low: int, high: int) -> Array:
    """Return codes [K, N]: columns of the highest, of the lowest, of both in turn, of middle ones, and of either."""
    codes_KN = either((num_inputs, num_outputs), low, high)
    codes_KN[:, 0], codes_KN[:, 1] = high, low
    codes_KN[:, 2] = np.where(np.arange(num_inputs) % 2, high, low)
    codes_KN[:, 3] = (low + high + 1) // 2
    return codes_KN


def _activations(num_inputs: int, low: int, high: int) -> Array:
    """Return numbers [M, K] at the ends of a range, both in each row; the first rows of calls are of the highest."""
    x_MK = either((sum(_ROWS), num_inputs), low, high, salt=1)
    x_MK[np.cumsum((0, *_ROWS[:-1]))] = high
    x_MK[:, 0] = low
    return x_MK


def _pack(codes: Array, bits: int) -> Array:
    """Return codes [..., n] as bytes, two of 4 bits in one, the first in the low half."""
    codes = codes.astype(np.uint8)
    if bits == 8:
        return codes
    padded = np.concatenate([codes, np.zeros((*codes.shape[:-1], codes.shape[-1] % 2), np.uint8)], axis=-1)
    return padded[..., 0::2] | (padded[..., 1::2] << 4)


def _zero_points(shape: tuple[int, ...], bits: int) -> Array:
    """Return zero points at both ends of their range; those of the first two columns of weights are 0 and the last."""
    zeros = either(shape, 0, 2**bits - 1, salt=3)
    zeros[0], zeros[1] = 0, 2**bits - 1
    return zeros


def dynamic_quantize_matmul() -> Test:
    """DynamicQuantizeMatMul: it rounds the activations of a call to uint8 by their range, here 0 to 255."""
    test, (num_inputs, num_outputs) = Test(), (96, 20)
    codes_KN, x_MK = weights_of(num_inputs, num_outputs, -127, 127), _activations(num_inputs, 0, 255)

    def product(x: str) -> str:
        # Constants for each: the library's option for CPUs without VNNI takes no weights that nodes share.
        weights = [test.constant(codes_KN.astype(np.int8)), test.constant(np.ones(num_outputs, np.float32))]
        return test.node("DynamicQuantizeMatMul", [x, *weights], _MICROSOFT)

    test.expect(test.in_calls(x_MK, product), x_MK.astype(np.float64) @ codes_KN)
    return test


def matmul_integer_to_float() -> Test:
    """MatMulIntegerToFloat, on activations that QuantizeLinear rounds around 128."""
    test, (num_inputs, num_outputs) = Test(), (96, 20)
    codes_KN, x_MK = weights_of(num_inputs, num_outputs, -127, 127), _activations(num_inputs, -127, 127)
    unit, middle = test.constant(np.array(1, np.float32)), test.constant(np.array(128, np.uint8))

    def product(x: str) -> str:
        codes, scales = test.constant(codes_KN.astype(np.int8)), test.constant(np.ones(num_outputs, np.float32))
        rounded = test.node("QuantizeLinear", [x, unit, middle])
        return test.node("MatMulIntegerToFloat", [rounded, codes, unit, scales, middle], _MICROSOFT)

    test.expect(test.in_calls(x_MK, product), x_MK.astype(np.float64) @ codes_KN)
    return test


def matmul_n_bits(bits: int) -> Test:
    """MatMulNBits with integer products, every size of block: it rounds each block of activations to int8."""
    test, (num_inputs, num_outputs) = Test(), (256, 10)
    codes_NK, x_MK = weights_of(num_inputs, num_outputs, 0, 2**bits - 1).T, _activations(num_inputs, -127, 127)
    for block in (16, 32, 64, 128, 256):
        num_blocks = num_inputs // block
        codes_NJG = codes_NK.reshape(num_outputs, num_blocks, block)
        zeros_NJ = _zero_points((num_outputs, num_blocks), bits)
        weights_KN = (codes_NJG - zeros_NJ[..., None]).reshape(num_outputs, num_inputs).T
        scales = test.constant(np.ones((num_outputs, num_blocks), np.float32))
        operands = [test.constant(_pack(codes_NJG, bits)), scales, test.constant(_pack(zeros_NJ, bits))]
        attributes = {"K": num_inputs, "N": num_outputs, "bits": bits, "block_size": block, "accuracy_level": 4}
        found = test.in_calls(
            x_MK,
            lambda x, operands=operands, attributes=attributes: test.node(
                "MatMulNBits", [x, *operands], _MICROSOFT, **attributes
            ),
        )
        test.expect(found, x_MK.astype(np.float64) @ weights_KN)
    return test


def gather_block_quantized(bits: int) -> Test:
    """GatherBlockQuantized: rows of a table."""
    test, (num_rows, num_columns) = Test(), (8, 128)
    codes_RK = weights_of(num_columns, num_rows, 0, 2**bits - 1).T
    ids = np.array([[0, 1, num_rows - 1]])
    for block in (16, 32, 64, 128):
        zeros_RJ = _zero_points((num_rows, num_columns // block), bits)
        table_RK = codes_RK - np.repeat(zeros_RJ, block, axis=1)
        codes, zeros = test.constant(_pack(codes_RK, bits)), test.constant(_pack(zeros_RJ, bits))
        scales = test.constant(np.ones(zeros_RJ.shape, np.float32))
        attributes = {"bits": bits, "block_size": block, "gather_axis": 0, "quantize_axis": 1}
        found = test.node("GatherBlockQuantized", [codes, test.live(ids), scales, zeros], _MICROSOFT, **attributes)
        test.expect(found, table_RK[ids])
    return test


def quantised_experts(bits: int) -> Test:
    """QMoE, one expert a token. Gate and up are the same everywhere, so that the inner row is rounded exactly, too."""
    test, (num_experts, hidden, inner), top = Test(), (2, 64, 64), 2**bits - 1
    for block in (32, 64):
        gate_up_scale = 8 / (127 * hidden * top)  # gate and up become 8
        gate_up = np.full((num_experts, 2 * inner, hidden), top)
        down = np.stack([weights_of(inner, hidden, 0, top).T] * num_experts)
        operands, zero_points, weights = [], [], []
        for codes, scale in ((gate_up, gate_up_scale), (down, 1 / 64)):
            shape = (*codes.shape[:2], codes.shape[2] // block)
            zeros = np.zeros(shape, int) if codes is gate_up else either(shape, 0, top, salt=3)
            weights.append((codes - np.repeat(zeros, block, axis=2)) * scale)
            operands += [test.constant(_pack(codes, bits)), test.constant(np.full(shape, scale, np.float32)), ""]
            zero_points.append(test.constant(_pack(zeros, bits)))
        for num_rows in (1, 5):
            expert_M = np.arange(num_rows) % num_experts
            logits_ME = np.full((num_rows, num_experts), -1e30, np.float32)
            logits_ME[np.arange(num_rows), expert_M] = 0
            x = test.live(np.full((num_rows, hidden), 127, np.float32))
            found = test.node(
                "QMoE",
                [x, test.live(logits_ME), *operands, "", "", "", *zero_points],
                _MICROSOFT,
                k=1,
                activation_type="swiglu",
                activation_alpha=1.0,
                activation_beta=0.0,
                swiglu_fusion=1,
                normalize_routing_weights=1,
                expert_weight_bits=bits,
                block_size=block,
                accuracy_level=4,
                weights_prepacked=0,
            )
            inner_I = np.full(inner, 8 / (1 + np.exp(-8.0)) * 8)  # silu(gate) · up
            test.expect(found, np.stack([weights[1][expert] @ inner_I for expert in expert_M]))
    return test


def quantised_cache(bits: int) -> Test:
    """GroupQueryAttention on a cache of codes: one token after others, and a prompt. New keys and values are codes."""
    test, (num_heads, num_kv_heads, head_dim, capacity), top = Test(), (4, 2, 32, 12), 2 ** (bits - 1) - 1
    spread = 1 + np.arange(num_kv_heads * head_dim).reshape(num_kv_heads, head_dim) / (num_kv_heads * head_dim)
    scales = {"key": spread / (4 * top), "value": spread / top}
    for num_past, num_new in ((7, 1), (0, 5)):
        num_all = num_past + num_new
        codes = {
            kind: either((num_kv_heads, num_all, head_dim), -top, top, salt)
            for salt, kind in enumerate(("key", "value"))
        }
        codes["value"][0] = top
        new, past, rows = [], [], {}
        for kind, codes_KAH in codes.items():
            rows[kind] = codes_KAH * scales[kind][:, None]
            new_KSH = rows[kind][:, num_past:]
            new.append(test.live(new_KSH.transpose(1, 0, 2).reshape(1, num_new, -1).astype(np.float32)))
            held_KTH = np.zeros((num_kv_heads, capacity, head_dim), int)
            held_KTH[:, :num_past] = codes_KAH[:, :num_past]
            held = held_KTH.astype(np.int8) if bits == 8 else _pack(held_KTH + 8, bits)
            past.append(test.live(held[None]))
        q_SQH = either((num_new, num_heads, head_dim), -1, 1, salt=5) * np.linspace(0.2, 1, num_heads)[:, None]
        query = test.live(q_SQH.reshape(1, num_new, -1).astype(np.float32))
        lengths = [test.constant(np.array([num_all - 1], np.int32)), test.constant(np.array(num_all, np.int32))]
        factors = [test.constant(scales[kind][None, :, None].astype(np.float32)) for kind in codes]
        found, *_ = test.nodes(
            "GroupQueryAttention",
            [query, *new, *past, *lengths, "", "", "", "", "", *factors],
            3,
            _MICROSOFT,
            num_heads=num_heads,
            kv_num_heads=num_kv_heads,
            do_rotary=0,
            scale=1.0,
            k_quant_type="PER_CHANNEL",
            v_quant_type="PER_CHANNEL",
            kv_cache_bit_width=bits,
        )
        out_SQH = np.zeros_like(q_SQH)
        for token in range(num_new):
            seen = num_past + token + 1
            for head in range(num_heads):
                kv_head = head * num_kv_heads // num_heads
                weights = np.exp(rows["key"][kv_head, :seen] @ q_SQH[token, head])
                out_SQH[token, head] = weights @ rows["value"][kv_head, :seen] / weights.sum()
        test.expect(found, out_SQH.reshape(1, num_new, -1))
    return test


TESTS: dict[str, Callable[[], Test]] = {
    "DynamicQuantizeMatMul": dynamic_quantize_matmul,
    "MatMulIntegerToFloat": matmul_integer_to_float,
    **{f"MatMulNBits.{bits}": lambda bits=bits: matmul_n_bits(bits) for bits in (4, 8)},
    **{f"GatherBlockQuantized.{bits}": lambda bits=bits: gather_block_quantized(bits) for bits in (4, 8)},
    **{f"QMoE.{bits}": lambda bits=bits: quantised_experts(bits) for bits in (4, 8)},
    **{f"GroupQueryAttention.{bits}": lambda bits=bits: quantised_cache(bits) for bits in (4, 8)},
}
"""By the names of runtime/kernels.py: the operator and, where it has several, the bits of its codes."""


def write(tests: dict[str, Callable[[], Test]], folder: Path) -> None:
    """Write tests by their names."""
    folder.mkdir(exist_ok=True, parents=True)
    for name, make in tests.items():
        (folder / f"{name}.onnx").write_bytes(make().model().SerializeToString(deterministic=True))


def main(folder: Path = FOLDER) -> None:
    """Write every test."""
    write(TESTS, folder)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
