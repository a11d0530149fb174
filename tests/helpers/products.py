"""Memory of a graph of `DynamicQuantizeMatMul` nodes, opened with the option for processors without VNNI or not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from runtime.kernels import EXACT_PRODUCTS
from runtime.machine import release_freed_memory

# Products of the 2B shape, and enough of them that memory is theirs.
_INPUTS, _OUTPUTS, _PRODUCTS = 2048, 6144, 8


def opened_bytes(folder: Path, *, exact: bool) -> dict[str, int]:
    """Return the anonymous memory once it is open (`now`), and the largest resident one on the way (`peak`)."""
    path = folder / "products.onnx"
    _write_graph(path)
    command = [sys.executable, __file__, str(path), str(int(exact))]
    sizes: dict[str, int] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return sizes


def _write_graph(path: Path) -> None:
    random = np.random.default_rng(0)
    constants = {"scales": np.full(_OUTPUTS, 1e-3, np.float32)}
    nodes = []
    for i in range(_PRODUCTS):
        constants[f"w{i}"] = random.integers(-127, 128, (_INPUTS, _OUTPUTS)).astype(np.int8)
        nodes.append(
            helper.make_node("DynamicQuantizeMatMul", ["x", f"w{i}", "scales"], [f"y{i}"], domain="com.microsoft")
        )
    graph = helper.make_graph(
        nodes,
        "products",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, "rows", _INPUTS])],
        [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, None) for i in range(_PRODUCTS)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data")


def _memory() -> dict[str, int]:
    text = "".join(Path(f"/proc/self/{name}").read_text(encoding="utf-8") for name in ("smaps_rollup", "status"))
    lines = [line.split() for line in text.splitlines() if line.endswith(" kB")]
    return {name.rstrip(":"): int(size) << 10 for name, size, _ in lines}


def _opened(path: str, exact: bool) -> dict[str, int]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if exact:
        options.add_session_config_entry(*EXACT_PRODUCTS)
    before = _memory()
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    release_freed_memory()
    after = _memory()
    assert session.get_inputs(), "it is open until here"
    return {"now": after["Anonymous"] - before["Anonymous"], "peak": after["VmHWM"] - before["Rss"]}


if __name__ == "__main__":
    print(json.dumps(_opened(sys.argv[1], sys.argv[2] == "1")))
