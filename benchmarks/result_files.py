"""Result files: `name.json`, and `name.md` made of the JSON alone, so that it can be made again.

The kind of a result is the first part of its name: `export-MODEL-TARGET`, `build-MODEL-TARGET`, `run-MODEL-TARGET`,
`decode-plan`, `eviction-MODEL-TARGET`, `gpu-NAME`, `hostile-MODEL-TARGET`, `import`, `compare-MODEL`, `kv-policies`,
`lowered`, `memory-plan`, `peers-MODEL-TARGET`, `preprocess`, `routed-MODEL-TARGET`, `routes`, `serve-MODEL-TARGET`,
`serving-MODEL-TARGET`, `tune-ENGINE`, `video`, `visual-tokens`, `window`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from engines.disk import replace_text

RESULTS = Path(__file__).with_name("results")
Results = Mapping[str, Mapping[str, Any]]
"""Results by name."""


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; the first row is its head."""
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body]) + "\n"


def page(name: str, result: Mapping[str, Any], body: str) -> str:
    """Return the text of `name.md`: the body that the benchmark made of its result, and the machine."""
    return f"# {name}\n\n{body}\n{_environment_line(result['environment'])}\n"


def write(name: str, result: Mapping[str, Any], body: str, folder: Path = RESULTS, *, shown: bool = True) -> Path:
    """Write `name.json` and `name.md`, print the latter unless it is not to be shown yet, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / f"{name}.json", json.dumps(result, indent=2) + "\n")
    path = folder / f"{name}.md"
    text = page(name, result, body)
    replace_text(path, text)
    if shown:
        typer.echo(text)
    return path


def kind(name: str) -> str:
    """Return what a result of this name measures."""
    return name.partition("-")[0]


def of_kind(results: Results, wanted: str) -> list[Mapping[str, Any]]:
    """Return the results of one kind, in the order of their names."""
    return [result for name, result in results.items() if kind(name) == wanted]


def _environment_line(environment: Mapping[str, Any]) -> str:
    libraries = ", ".join(f"{name} {version}" for name, version in environment["libraries"].items())
    cpu = environment["cpu"]
    if environment.get("instruction_sets"):  # earlier results do not have them
        cpu += f" ({' '.join(environment['instruction_sets'])})"
    return (
        f"{cpu}, {environment['cores']} cores, {environment['memory_bytes'] / 2**30:.0f} GiB, "
        f"{environment['system']}, Python {environment['python']}, {libraries}; "
        f"load average before the run {environment['load_average_1min']:.1f}."
    )
