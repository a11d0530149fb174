"""`python -m benchmarks report`: whatever is made of result files, again: tables, plots and blocks in documents.

A new result file, of a new target too, shows up without a change here. Each generated block stands between two
comments, `<!-- NAME: written by python -m benchmarks report -->` and `<!-- end of NAME -->`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import typer

from benchmarks import (
    build,
    decode_plan_report,
    eviction,
    export,
    goals,
    gpu_pack_report,
    imports,
    kv_policies,
    lowered,
    memory_plan,
    mixture,
    plot,
    routed,
    routes,
    run,
    serve,
    serve_hostile,
    serve_peers,
    status,
    tune,
    visual_tokens,
    window,
)
from benchmarks.compare import chart, tables
from benchmarks.result_files import RESULTS, kind, of_kind, page
from benchmarks.serving import chart as serving_chart
from benchmarks.serving import tables as serving_tables
from engines.disk import replace_text

ROOT = Path(__file__).resolve().parent.parent
TABLES: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "build": build.table,
    "compare": tables.render,
    "decode": decode_plan_report.table,
    "eviction": eviction.table,
    "export": export.table,
    "gpu": gpu_pack_report.table,
    "hostile": serve_hostile.table,
    "import": imports.table,
    "kv": kv_policies.table,
    "lowered": lowered.table,
    "memory": memory_plan.table,
    "peers": serve_peers.table,
    "routed": routed.table,
    "routes": routes.table,
    "run": run.table,
    "serve": serve.table,
    "serving": serving_tables.table,
    "tune": tune.table,
    "visual": visual_tokens.table,
    "window": window.table,
}
"""What makes the table of a result, by its kind."""


def report() -> None:
    """Write all tables again from the result files: of each result, in README.md and in documents."""
    for path, text in generated().items():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            replace_text(path, text)
            typer.echo(path.relative_to(ROOT))


def load(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """Return all results of a folder, by name; other JSON files may lie beside them."""
    paths = [path for path in sorted(folder.glob("*.json")) if kind(path.stem) in TABLES]
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def render(name: str, result: Mapping[str, Any]) -> str:
    """Return the text of `name.md`."""
    return page(name, result, TABLES[kind(name)](result))


def generated(root: Path = ROOT) -> dict[Path, str]:
    """Return the contents that all files with generated parts should have."""
    folder = root / "benchmarks" / "results"
    results = load(folder)
    files = {folder / f"{name}.md": render(name, result) for name, result in results.items()}
    files[folder / "speed.svg"] = plot.speeds(of_kind(results, "run"))
    files |= {folder / f"{name}.svg": chart.draw(r) for name, r in results.items() if kind(name) == "compare"}
    files |= {
        folder / f"{name}.svg": serving_chart.draw(result)
        for name, result in results.items()
        if kind(name) == "serving" and "fairness" in result
    }
    blocks = [
        ("README.md", "what works", status.tables(results, folder, root / "docs")),
        ("docs/benchmarks.md", "figures", goals.table(results)),
        ("docs/mixture_of_experts.md", "speed", mixture.tables(results)),
    ]
    if "lowered" in results:
        blocks.append(("docs/accuracy.md", "lowered graphs", lowered.table(results["lowered"])))
    if "routes" in results:
        blocks.append(("docs/mixture_of_experts.md", "routes", routes.table(results["routes"])))
    if "window" in results:
        blocks.append(("docs/sliding_window.md", "window", window.table(results["window"])))
    for place, name, body in blocks:
        path = root / place
        files[path] = replace_block(files.get(path) or path.read_text(encoding="utf-8"), name, body)
    return files


def replace_block(text: str, name: str, body: str) -> str:
    """Return `text` with `body` between the two comments of a block.

    Raises:
        ValueError: The comments do not occur exactly once.
    """
    start, end = f"<!-- {name}: written by python -m benchmarks report -->", f"<!-- end of {name} -->"
    if text.count(start) != 1 or text.count(end) != 1:
        raise ValueError(f"expected each once: {start} and {end}")
    before, rest = text.split(start)
    return f"{before}{start}\n\n{body}\n{end}{rest.split(end)[1]}"
