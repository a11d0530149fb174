"""Find the operators by the names of the files in this folder: `<name>.py` defines the operator `qwen3vl::<name>`."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch

import qwen3vl_export.ops


def operators() -> Iterator[tuple[str, ModuleType]]:
    """Yield name and module of the files that define an operator; the others hold what these share."""
    for found in pkgutil.iter_modules(qwen3vl_export.ops.__path__):
        if found.name != "registry":
            module = importlib.import_module(f"{qwen3vl_export.ops.__name__}.{found.name}")
            if hasattr(module, "OP"):
                yield found.name, module


def translations() -> dict[Any, Callable[..., Any]]:
    """Return how torch.onnx writes each operator."""
    return {getattr(torch.ops.qwen3vl, name).default: module.translation for name, module in operators()}


def bodies() -> dict[str, str]:
    """Return the ONNX function of each operator that is ours, by its ONNX name."""
    return {module.NAME: module.BODY for _, module in operators() if hasattr(module, "BODY")}
