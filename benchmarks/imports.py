"""`python -m benchmarks import`: time of imports in fresh interpreters, and the heavy libraries that they load."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import measure, options
from benchmarks.measure import repeat
from benchmarks.result_files import RESULTS, markdown, write

STATEMENTS = ("import qwen3_vl", "from qwen3_vl import Qwen3VLModel")
HEAVY = ("onnx", "onnx_ir", "onnxscript", "tensorrt", "torch", "torchvision", "transformers")
_ROOT = Path(__file__).resolve().parent.parent


def time_imports(repeats: int = 11, results: options.Results = RESULTS) -> None:
    """Measure what importing the Python package costs, in fresh interpreters."""
    environment = measure.environment()
    result = wall_times(repeats) | {"environment": environment}
    write("import", result, table(result), results)


def wall_times(repeats: int) -> dict[str, Any]:
    """Return the wall times of a bare interpreter and of each statement; one run of each warms the file cache."""
    imports = {
        statement: repeat(lambda code=statement: _run(code), warmup=1, repeats=repeats)
        | {"heavy_modules": heavy_modules_after(statement)}
        for statement in STATEMENTS
    }
    return {"bare": repeat(lambda: _run("pass"), warmup=1, repeats=repeats), "imports": imports}


def heavy_modules_after(statement: str) -> list[str]:
    """Return which of `HEAVY` are in `sys.modules` after a statement."""
    code = f"{statement}\nimport json, sys\nprint(json.dumps(sorted(set({HEAVY!r}) & set(sys.modules))))"
    loaded: list[str] = json.loads(_run(code, stdout=subprocess.PIPE).stdout)
    return loaded


def added_s(result: Mapping[str, Any], statement: str) -> float:
    """Return the seconds that an import adds to a bare interpreter, median minus median."""
    return result["imports"][statement]["median_s"] - result["bare"]["median_s"]


def table(result: Mapping[str, Any]) -> str:
    """Return one row for each import, less the time of a bare interpreter."""
    rows = [("statement", "added, s", "heavy libraries loaded")]
    for statement, values in result["imports"].items():
        loaded = ", ".join(values["heavy_modules"]) or "none"
        rows.append((f"`{statement}`", f"{added_s(result, statement):.3f}", loaded))
    return (
        f"Fresh interpreters, median of {len(result['bare']['all_s'])}, "
        f"less {result['bare']['median_s']:.3f} s of a bare one.\n\n{markdown(rows)}"
    )


def _run(code: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-c", code], cwd=_ROOT, check=True, **options)
