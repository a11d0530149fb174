"""Kernels with a fault put in on purpose."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import sys
from pathlib import Path

import pytest

from engines.kernels.launch import Launch


def with_fault(launch: Launch, old: str, new: str, folder: Path, patch: pytest.MonkeyPatch) -> Launch:
    """Return the launch of a kernel in whose source `old`, which stands there once, is `new`."""
    path = importlib.util.find_spec(f"engines.kernels.triton.{launch.module}")
    assert path is not None and path.origin is not None
    source = Path(path.origin).read_text()
    assert source.count(old) == 1, f"{old!r} stands in {launch.module} {source.count(old)} times"
    name = f"broken_{launch.module}"
    file = folder / f"{name}.py"  # Triton reads the source of what it decorates
    file.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(f"engines.kernels.triton.{name}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    patch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return dataclasses.replace(launch, module=name)
