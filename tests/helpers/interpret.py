"""Run a launch of a decode kernel on arrays of the host, in Triton's interpreter.

Triton decides when a kernel is decorated whether it is interpreted, and decorates its own functions on import.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.kernels.launch import Launch

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported

INTERPRETED = {"ASM": 0, "PDL": 0}
"""Neither inline assembly nor dependent launches exist in the interpreter."""

_NUMPY = {
    "fp16": "float16",
    "bf16": "bfloat16",
    "fp32": "float32",
    "u8": "uint8",
    "i8": "int8",
    "i32": "int32",
    "i64": "int64",
}


def interpret(launch: Launch, memory: Mapping[str, NDArray[Any]], *, capacity: int = 0) -> None:
    """Run all programs of a launch, one after the other.

    Args:
        launch: What to run.
        memory: By `Argument.source`, the array that a pointer leads to; contiguous, and changed in place.
        capacity: What the source `capacity` stands for.
    """
    module = importlib.import_module(f"engines.kernels.triton.{launch.module}")
    kernel = getattr(module, launch.function)
    names = list(kernel.arg_names)
    constants = dict(launch.constants) | {name: value for name, value in INTERPRETED.items() if name in names}
    assert names == [*launch.arguments, *(name for name in names if name in constants)], f"{names} of {launch}"
    values: dict[str, Any] = {}
    for name, argument in launch.arguments.items():
        if argument.type.startswith("*"):
            values[name] = _tensor(argument.type[1:], str(argument.source), memory)
        else:
            values[name] = capacity if argument.source == "capacity" else argument.source
    kernel[launch.grid](**values, **constants)


def _tensor(kind: str, source: str, memory: Mapping[str, NDArray[Any]]) -> Any:
    """Return a PyTorch tensor of the array's own memory, which is all that the interpreter takes."""
    import torch

    if source == "null":
        return torch.zeros(0, dtype=getattr(torch, _NUMPY[kind]))
    array = memory[source]
    assert array.flags.c_contiguous, f"{source} is not contiguous"
    assert array.dtype.name == _NUMPY[kind], f"{source} is {array.dtype.name}, the kernel takes {kind}"
    if kind == "bf16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def guarded(shape: tuple[int, ...], dtype: Any, guard: int = 64) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return an array of zeros [shape] and the memory it is part of, whose elements before and after it are NaN or 77.

    A kernel that writes outside is found by `untouched`, one that reads there by what it makes of it.
    """
    size = int(np.prod(shape))
    whole = np.full(size + 2 * guard, 77, dtype)
    if np.dtype(dtype).kind not in "iub":
        whole[:] = np.nan
    whole[guard : guard + size] = 0
    return whole[guard : guard + size].reshape(shape), whole


def untouched(whole: NDArray[Any], guard: int = 64) -> bool:
    """Return whether the elements around an array of `guarded` are what they were."""
    ends = np.concatenate([whole[:guard], whole[-guard:]])
    return bool((ends == 77).all() if whole.dtype.kind in "iub" else np.isnan(ends.astype(np.float32)).all())
