"""No file imports one that imports it, over whatever detour; and what is shipped imports nothing that is not."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from helpers import ROOT

SHIPPED = ("configs", "engines", "qwen3_vl", "qwen3vl_export", "runtime")
BESIDE = ("benchmarks", "demo_training", "scripts")


def modules(root: Path, packages: tuple[str, ...]) -> dict[str, Path]:
    """Every source of some packages by the name that imports it."""
    found = {}
    for package in packages:
        for path in (root / package).rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(root: Path, packages: tuple[str, ...]) -> dict[str, set[str]]:
    """The modules that each module imports anywhere, inside functions and for types alone too."""
    known = modules(root, packages)
    found: dict[str, set[str]] = {}
    for name, path in known.items():
        names = found.setdefault(name, set())
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                full = [f"{node.module}.{alias.name}" for alias in node.names]
                names |= {each if each in known else node.module for each in full}
        names &= known.keys() - {name}
    return found


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """A cycle of a graph, empty if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_files_import_in_one_direction() -> None:
    graph = imports(ROOT, (*SHIPPED, *BESIDE))
    assert {"benchmarks.report", "demo_training.training", "runtime.model", "scripts.lock"} <= graph.keys()
    assert cycle(graph) == []


def test_what_is_shipped_imports_nothing_beside_it() -> None:
    graph = imports(ROOT, (*SHIPPED, *BESIDE))
    beside = {name for name in graph if name.split(".")[0] in BESIDE}
    assert {name: found & beside for name, found in graph.items() if name not in beside and found & beside} == {}


@pytest.mark.parametrize("line", ["import b.c", "from b import c", "def f():\n    from b.c import x"])
def test_a_cycle_is_seen(line: str, tmp_path: Path) -> None:
    for name, source in {"a/d.py": line, "b/c.py": "from a.d import f"}.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(source, encoding="utf-8")
    assert sorted(set(cycle(imports(tmp_path, ("a", "b"))))) == ["a.d", "b.c"]
    assert cycle(imports(tmp_path, ("b",))) == []
