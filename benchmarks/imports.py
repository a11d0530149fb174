"""Time of imports in fresh interpreters, and the heavy libraries that they load."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import repeat

STATEMENTS = ("import qwen3_vl", "from qwen3_vl import Qwen3VLModel")
HEAVY = ("onnx", "onnx_ir", "onnxscript", "tensorrt", "torch", "torchvision", "transformers")
_ROOT = Path(__file__).resolve().parent.parent


def time_imports(*, repeats: int) -> dict[str, Any]:
    """Return the wall times of a bare interpreter and of each statement; one run of each warms the file cache."""
    imports = {
        statement: repeat(lambda code=statement: _wall_s(code), warmup=1, repeats=repeats)
        | {"heavy_modules": heavy_modules_after(statement)}
        for statement in STATEMENTS
    }
    return {"bare": repeat(lambda: _wall_s("pass"), warmup=1, repeats=repeats), "imports": imports}


def heavy_modules_after(statement: str) -> list[str]:
    """Return which of `HEAVY` are in `sys.modules` after a statement."""
    code = f"{statement}\nimport json, sys\nprint(json.dumps(sorted(set({HEAVY!r}) & set(sys.modules))))"
    done = subprocess.run([sys.executable, "-c", code], cwd=_ROOT, stdout=subprocess.PIPE, check=True)
    loaded: list[str] = json.loads(done.stdout)
    return loaded


def _wall_s(code: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], cwd=_ROOT, check=True)
    return time.perf_counter() - start
