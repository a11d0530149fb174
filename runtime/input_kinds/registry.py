"""Find the kinds of inputs by the names of their files."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

import runtime.input_kinds
from runtime.input_kinds.kind import InputKind

_OTHERS = ("kind", "registry")


@cache
def input_kinds() -> tuple[InputKind, ...]:
    """Return all kinds, by name."""
    names = [found.name for found in pkgutil.iter_modules(runtime.input_kinds.__path__) if found.name not in _OTHERS]
    kinds = tuple(importlib.import_module(f"runtime.input_kinds.{name}").KIND for name in sorted(names))
    for words in ([kind.token for kind in kinds], [part_type for kind in kinds for part_type in kind.part_types]):
        assert len(words) == len({*words}), f"two kinds of input share one of {words}"
    return kinds


def kind_of(part_type: str) -> InputKind | None:
    """Return the kind that has message parts of a type, or None."""
    return next((kind for kind in input_kinds() if part_type in kind.part_types), None)
