"""Embedding and rotary table of a decode step in Triton's interpreter, against float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from engines.kernels import embed
from engines.kernels.launch import GPUS, Unserved, Weight
from helpers.broken_kernels import with_fault
from helpers.interpret import guarded, interpret, untouched

pytest.importorskip("triton")

TYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
VOCAB = 41
DIM = 64


class Case:
    """A table, and a step that reads it."""

    def __init__(
        self, columns: int, kind: str, batch: int, *, block: int = 32, zero_points: bool = True, dtype: str = "float16"
    ) -> None:
        rng = np.random.default_rng(batch)
        self.dtype, self.batch, self.block = dtype, batch, block
        bits = self.bits = {"half": 16, "fp8": 8, "int8": 8, "int4": 4}[kind]
        self.memory: dict[str, np.ndarray[Any, Any]] = {
            "step:input_ids": rng.integers(0, VOCAB, (batch, 1)),
            "step:position_ids": rng.integers(0, 262144, (3, batch, 1)),
            "weight:axis_of_frequency": rng.integers(0, 3, DIM // 2),
            "weight:inv_freq": (5e6 ** -(np.arange(DIM // 2) * 2 / DIM)).astype(np.float32),
        }
        self.memory["step:position_ids"][:, 0] = 262143
        if kind == "half":
            self.table = rng.standard_normal((VOCAB, columns)).astype(TYPES[dtype])
            self.memory["weight:t"] = self.table
            self.weight = Weight(kind, VOCAB, columns, "t")
        elif kind == "fp8":
            codes = rng.standard_normal((VOCAB, columns)).astype(np.float32) * 100
            codes[0, :4] = [448, -448, 2.0**-9, -(2.0**-7)]  # the ends of the range, and below the least normal number
            stored = codes.astype(ml_dtypes.float8_e4m3fn)
            scales = rng.uniform(0.01, 0.02, (VOCAB, -(-columns // block))).astype(np.float32)
            self.table = stored.astype(np.float32) * np.repeat(scales, block, 1)[:, :columns]
            self.memory |= {"weight:t": stored.view(np.uint8), "weight:s": scales}
            self.memory["step:input_ids"][0] = 0
            self.weight = Weight(kind, VOCAB, columns, "t", block, "s")
        else:
            blocks = columns // block
            codes = rng.integers(0, 256, (VOCAB, columns * bits // 8), np.uint8)
            scales = rng.uniform(0.01, 0.02, (VOCAB, blocks)).astype(np.float16)
            zeros = rng.integers(0, 256, (VOCAB, -(-blocks * bits // 8)), np.uint8) if zero_points else None
            self.table = embed.dequantize(codes, scales, zeros, bits=bits, block=block)
            self.memory |= {"weight:t": codes, "weight:s": scales}
            if zeros is not None:
                self.memory["weight:z"] = zeros
            self.weight = Weight(kind, VOCAB, columns, "t", block, "s", "z" if zero_points else None)
        self.hidden, self._whole_hidden = guarded((batch, columns), TYPES[dtype])
        self.memory["buffer:hidden"] = self.hidden
        self._whole = {}
        for name in ("cos", "sin"):
            self.memory[f"buffer:{name}"], self._whole[name] = guarded((batch, DIM), np.float32)

    @property
    def launch(self) -> Any:
        return embed.launch(self.weight, self.batch, GPUS[90], dtype=self.dtype, head_dim=DIM)

    def check(self, launch: Any = None) -> None:
        memory = self.memory
        wanted, cos, sin = embed.reference(
            self.table,
            memory["step:input_ids"][:, 0],
            memory["step:position_ids"][:, :, 0],
            memory["weight:axis_of_frequency"],
            memory["weight:inv_freq"],
        )
        interpret(launch or self.launch, memory)
        # A code times its scale is exact in float32, and rounded once; Triton 3.8's interpreter cuts off to bfloat16.
        rounding = 2**-7 if self.dtype == "bfloat16" and self.bits < 16 else 0
        np.testing.assert_allclose(
            self.hidden.astype(np.float64), wanted.astype(self.hidden.dtype).astype(np.float64), rtol=rounding, atol=0
        )
        # Angles are the float32 numbers of the reference; a larger error would come of reducing them by less of pi.
        np.testing.assert_allclose(memory["buffer:cos"], cos, rtol=0, atol=3e-7)
        np.testing.assert_allclose(memory["buffer:sin"], sin, rtol=0, atol=3e-7)
        assert untouched(self._whole_hidden) and all(untouched(each) for each in self._whole.values())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("columns", [192, 2560, 100])
def test_halves(columns: int, dtype: str) -> None:
    Case(columns, "half", 3, dtype=dtype).check()


@pytest.mark.parametrize("zero_points", [True, False])
@pytest.mark.parametrize("kind", ["int4", "int8"])
@pytest.mark.parametrize(("columns", "block"), [(192, 32), (1088, 64), (1280, 128), (96, 32), (80, 16)])
def test_codes(columns: int, block: int, kind: str, zero_points: bool) -> None:
    Case(columns, kind, 2, block=block, zero_points=zero_points).check()


@pytest.mark.parametrize(("columns", "block"), [(192, 128), (1280, 128), (100, 16)])
def test_float8(columns: int, block: int) -> None:
    Case(columns, "fp8", 3, block=block).check()


def test_codes_in_bfloat16() -> None:
    Case(192, "int4", 2, dtype="bfloat16").check()


@pytest.mark.parametrize("batch", [*range(1, 9), 16, 32])
def test_batches(batch: int) -> None:
    Case(192, "half", batch).check()


@pytest.mark.parametrize("kind", ["half", "int4"])
def test_a_token_outside_reads_the_nearest_row(kind: str) -> None:
    found = []
    for tokens in ([VOCAB, -1], [VOCAB - 1, 0]):
        case = Case(192, kind, 2)
        case.memory["step:input_ids"][:, 0] = tokens
        interpret(case.launch, case.memory)
        found.append(case.hidden)
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("zero_points", [True, False])
@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_codes_mean_what_onnx_runtime_reads(kind: str, zero_points: bool) -> None:
    case = Case(96, kind, 4, zero_points=zero_points)
    names = ["weight:t", "step:input_ids", "weight:s", *(["weight:z"] if zero_points else [])]
    node = helper.make_node(
        "GatherBlockQuantized",
        names,
        ["y"],
        domain="com.microsoft",
        bits=case.bits,
        block_size=case.block,
        gather_axis=0,
        quantize_axis=1,
    )
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(case.memory[name].dtype), None)
        for name in names
    ]
    graph = helper.make_graph([node], "g", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT16, None)])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {name: case.memory[name] for name in names})
    case.check()
    np.testing.assert_array_equal(found[:, 0], case.hidden)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("group = column // GROUP", "group = (column + 1) // GROUP % GROUPS"),
        ("code -= _codes(", "code += _codes("),
        ("axis * tl.num_programs(1) + row", "axis + row"),
        ("((index * BITS) % 8)", "(8 - BITS - (index * BITS) % 8)"),
    ],
)
def test_faults_are_found(old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(192, "int4", 2)
    launch = with_fault(case.launch, old, new, tmp_path, monkeypatch)
    with pytest.raises(AssertionError, match=r"(?i)not equal"):
        case.check(launch)


def test_other_tables_are_refused() -> None:
    for table in (Weight("float3", 9, 64, "t", 32, "s"), Weight("int4", 9, 100, "t", 32, "s")):
        with pytest.raises(Unserved, match="a table of"):
            embed.launch(table, 1, GPUS[90], dtype="float16", head_dim=DIM)
    with pytest.raises(Unserved, match="heads of 96"):
        embed.launch(Weight("half", 9, 64, "t"), 1, GPUS[90], dtype="float16", head_dim=96)
