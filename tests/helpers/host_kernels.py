"""Kernels of a decode plan on the host: what stands for a cubin is a JSON of the function that runs.

A function that Triton compiled runs in its interpreter; any other is called with the grid, its arguments (addresses and
numbers) and its constants by name. The interpreter must be chosen before Triton is imported: tests/conftest.py does.
"""

from __future__ import annotations

import ctypes
import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_NAMES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "fp8e4nv": "float8_e4m3fn", "i1": "bool"}
_NAMES |= {f"{sign[0]}{bits}": f"{sign}{bits}" for sign in ("int", "uint") for bits in (8, 16, 32, 64)}


def host_code(
    module: str, function: str, types: Mapping[str, str], constants: Mapping[str, Any], compute_capability: str = "8.9"
) -> bytes:
    """Return what `HostDevice.load_module` takes: `module` is imported, `types` are of the arguments at run time."""
    values = {"module": module, "function": function, "types": types, "constants": constants}
    return json.dumps(values | {"compute_capability": compute_capability}).encode()


def array_at(address: int, shape: Sequence[int], dtype: Any) -> np.ndarray:
    """Return memory of this process as an array."""
    dtype = np.dtype(dtype)
    memory = (ctypes.c_uint8 * (int(np.prod(shape)) * dtype.itemsize)).from_address(address)
    return np.frombuffer(memory, dtype).reshape(shape)


@dataclass(frozen=True)
class HostKernel:
    module: str
    function: str
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    compute_capability: str

    @classmethod
    def of(cls, code: bytes) -> HostKernel:
        return cls(**json.loads(code))

    def values(self, arguments: Sequence[Any]) -> list[Any]:
        """Return what ctypes values hold, checked against the types; a null pointer is 0."""
        assert len(arguments) == len(self.types) + 2, "as many arguments as the kernel takes, and two hidden pointers"
        assert all(isinstance(each, ctypes.c_void_p) and not each.value for each in arguments[-2:]), "both are null"
        for kind, each in zip(self.types.values(), arguments, strict=False):
            assert isinstance(each, ctypes.c_void_p) == kind.startswith("*"), "a pointer where the kernel takes one"
        return [each.value or 0 for each in arguments[:-2]]

    def run(self, grid: tuple[int, int, int], values: Sequence[Any]) -> None:
        function = getattr(importlib.import_module(self.module), self.function)
        if not hasattr(function, "__getitem__"):
            function(grid, *values, **self.constants)
            return
        wrapped = [
            _Pointer(value, _NAMES[kind.removeprefix("*").removeprefix("k")]) if kind.startswith("*") else value
            for kind, value in zip(self.types.values(), values, strict=True)
        ]
        function[grid](*wrapped, **self.constants)


class _Pointer:
    """What the interpreter asks of a tensor of PyTorch's, for an address in this process."""

    def __init__(self, address: int, dtype: str) -> None:
        self._address, self.dtype = address, dtype

    def data_ptr(self) -> int:
        return self._address

    def untyped_storage(self) -> _Pointer:
        return self

    def cpu(self) -> _Pointer:
        return self

    def new_empty(self, *_: Any, **__: Any) -> _Pointer:
        return _Pointer(self._address, self.dtype)

    def set_(self, *_: Any) -> None:
        pass

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return (0,)

    def stride(self) -> tuple[int, ...]:
        return (0,)

    def copy_(self, _: Any) -> None:
        pass
