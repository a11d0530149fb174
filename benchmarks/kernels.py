"""8-bit products in the forms that engines use: `python -m benchmarks kernels`. Time, memory, test at opening."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import measure, options
from benchmarks.result_files import RESULTS, markdown, write

ROWS = (1, 16, 128, 512)
# A product of the 2B shape, and enough of them that memory is theirs.
_INPUTS, _OUTPUTS, _PRODUCTS = 2048, 6144, 8
CALL, CALL_EXACT, TOKEN = "call", "call, without VNNI", "token"
FORMS = {
    CALL: "`DynamicQuantizeMatMul`, one scale for a call",
    CALL_EXACT: "the same with the option for processors without VNNI",
    TOKEN: "one scale for each token by `MatMulIntegerToFloat`, rows independent",
}


def kernels(repeats: int = 21, threads: int = 1, results: options.Results = RESULTS) -> None:
    """Measure 8-bit products in the forms that engines use, their memory, and the tests of kernels at opening."""
    environment = measure.environment()
    result = measure_all(repeats, threads) | {"environment": environment}
    write("kernels", result, table(result), results)


def measure_all(repeats: int, threads: int) -> dict[str, Any]:
    """Return seconds of a product for each form and number of rows, bytes of an opened graph, seconds of the tests."""
    seconds: dict[str, dict[str, Any]] = {form: {} for form in FORMS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for form in FORMS:
            _write_graph(folder / f"{form}.onnx", form, 1)
        sessions = {form: _open(folder / f"{form}.onnx", form, threads) for form in FORMS}
        import numpy as np

        for num_rows in ROWS:
            x = np.random.default_rng(0).normal(size=(1, num_rows, _INPUTS)).astype(np.float32)
            taken: dict[str, list[float]] = {form: [] for form in FORMS}
            for _ in range(repeats + 2):  # alternated, so that what else runs here meets all alike
                for form, session in sessions.items():
                    taken[form].append(measure.seconds(lambda session=session, x=x: session.run(None, {"x": x})))
            for form in FORMS:
                seconds[form][str(num_rows)] = measure.summarise(taken[form][2:])
    return {
        "repeats": repeats,
        "threads": threads,
        "shape": [_INPUTS, _OUTPUTS],
        "seconds": seconds,
        "weight_bytes": _PRODUCTS * _INPUTS * _OUTPUTS,
        "anonymous_bytes": opened_bytes(),
        "test_s": _tests_s(repeats),
    }


def opened_bytes() -> dict[str, dict[str, int]]:
    """Return the anonymous memory of a graph of several products once it is open, and the peak of opening it."""
    found = {}
    with tempfile.TemporaryDirectory() as name:
        for form in (CALL, CALL_EXACT):
            path = Path(name) / f"{form}.onnx"
            _write_graph(path, form, _PRODUCTS)
            found[form] = _child("opened", str(path), form)
    return found


def table(result: Mapping[str, Any]) -> str:
    """Return the tables of times, of memory, and of the tests."""
    inputs, outputs = result["shape"]
    rows = [("form", *(f"{rows} rows, ms" for rows in ROWS), "512 rows over the first")]
    first = result["seconds"][CALL]["512"]["median_s"]
    for form, said in FORMS.items():
        medians = [result["seconds"][form][str(rows)]["median_s"] for rows in ROWS]
        rows.append((said, *(f"{1e3 * each:.2f}" for each in medians), f"{medians[-1] / first:.2f}"))
    weights = result["weight_bytes"]
    memory = [("opened", *(f"{key}, MB" for key in ("anonymous", "peak")), "over the weights")]
    for form, values in result["anonymous_bytes"].items():
        now, peak = values["now"], values["peak"]
        memory.append((FORMS[form], f"{now / 1e6:.0f}", f"{peak / 1e6:.0f}", f"{now / weights:.2f}"))
    tests = [("test", "first time in a process, ms")]
    tests += [(name, f"{1e3 * value['median_s']:.1f}") for name, value in result["test_s"].items()]
    return (
        f"One product [rows, {inputs}] · [{inputs}, {outputs}], {result['threads']} threads, median of "
        f"{result['repeats']} repeats, forms alternated.\n\n{markdown(rows)}\n"
        f"Memory of a graph with {weights / 1e6:.0f} MB of such weights once it is open and what was freed is given "
        f"back, and the process's largest resident memory beyond its start.\n\n{markdown(memory)}\n"
        f"The tests of kernels when an engine is opened; the first of a process also starts ONNX Runtime.\n\n"
        f"{markdown(tests)}"
    )


def _write_graph(path: Path, form: str, num_products: int) -> None:
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    constants = {
        "scales": np.full(_OUTPUTS, 1e-3, np.float32),
        "axis": np.array([-1]),
        "smallest": np.array(1e-30, np.float32),
        "up": np.array(1 / 127, np.float32),
        "down": np.array(-1 / 128, np.float32),
        "unit": np.array(1, np.float32),
        "middle": np.array(128, np.uint8),
    }
    nodes = []
    for i in range(num_products):
        constants[f"w{i}"] = random.integers(-127, 128, (_INPUTS, _OUTPUTS)).astype(np.int8)

        def add(op: str, inputs: str, output: str, domain: str = "", i: int = i) -> None:
            names = [f"{name}{i}" if name[0] in "wv" else name for name in inputs.split()]
            nodes.append(helper.make_node(op, names, [f"{output}{i}"], domain=domain))

        if form in (CALL, CALL_EXACT):
            add("DynamicQuantizeMatMul", "x w scales", "y", "com.microsoft")
            continue
        add("ReduceMax", "x axis", "va")
        add("ReduceMin", "x axis", "vb")
        add("Mul", "va up", "vu")
        add("Mul", "vb down", "vw")
        add("Max", "vu vw smallest", "vs")
        add("Div", "x vs", "vd")
        add("QuantizeLinear", "vd unit middle", "vq")
        add("MatMulIntegerToFloat", "vq w unit scales middle", "vp", "com.microsoft")
        add("Mul", "vp vs", "y")
    graph = helper.make_graph(
        nodes,
        "products",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, "rows", _INPUTS])],
        [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, None) for i in range(num_products)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data")


def _open(path: Path, form: str, threads: int) -> Any:
    import onnxruntime as ort

    from runtime.kernels import EXACT_PRODUCTS

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    if form == CALL_EXACT:
        options.add_session_config_entry(*EXACT_PRODUCTS)
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _tests_s(repeats: int) -> dict[str, Any]:
    """Return the seconds of the tests of kernels in fresh processes: of each, and of those of whole engines."""
    times = [_child("tests") for _ in range(min(repeats, 5))]
    return {name: measure.summarise([each[name] for each in times]) for name in times[0]}


def _child(*arguments: str) -> Any:
    import subprocess

    command = [sys.executable, "-m", "benchmarks.kernels", *arguments]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def _memory() -> dict[str, int]:
    text = "".join(Path(f"/proc/self/{name}").read_text(encoding="utf-8") for name in ("smaps_rollup", "status"))
    lines = [line.split() for line in text.splitlines() if line.endswith(" kB")]
    return {name.rstrip(":"): int(size) << 10 for name, size, _ in lines}


def _opened(path: str, form: str) -> dict[str, int]:
    from runtime.machine import release_freed_memory

    before = _memory()
    session = _open(Path(path), form, 1)
    release_freed_memory()
    after = _memory()
    assert session.get_inputs(), "it is open until here"
    return {"now": after["Anonymous"] - before["Anonymous"], "peak": after["VmHWM"] - before["Rss"]}


def _tests() -> dict[str, float]:
    from runtime.kernels import known_kernels, needs_exact_products

    def seconds(kernels: list[str]) -> float:
        return measure.seconds(lambda: needs_exact_products(kernels))

    first = seconds(["DynamicQuantizeMatMul"])
    each = {name: seconds([name]) for name in known_kernels() if name != "DynamicQuantizeMatMul"}
    names = ("MatMulIntegerToFloat", "MatMulNBits.4", "MatMulNBits.8", "GatherBlockQuantized.4")
    return {"DynamicQuantizeMatMul": first, **each, "all of ort-cpu-int4": first + sum(each[name] for name in names)}


if __name__ == "__main__":
    print(json.dumps({"opened": _opened, "tests": _tests}[sys.argv[1]](*sys.argv[2:])))
