"""This checkout beside another one of the project, such as an older commit, in turn: exports and import."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import measure, report, synthetic
from runtime.errors import UsageError

_ROOT = Path(__file__).resolve().parent.parent
_IMPORT = "from qwen3_vl import Qwen3VLModel"
_IMPORTS_PER_EXPORT = 5


def against(
    other: Annotated[Path, typer.Argument(help="The other checkout, such as a git worktree of an older commit.")],
    python: Annotated[Path, typer.Option(help="Python of an environment in which the other checkout works.")],
    model: Annotated[str, typer.Option(help="Shape to export without weights, beside the demo.")] = "qwen3-vl-2b",
    repeats: int = 5,
    results: Annotated[Path, typer.Option(help="Folder for the JSON file and the table.")] = report.RESULTS,
) -> None:
    """Measure the CPU time of exports and the wall time of the import, in this checkout and in another one, in turn."""
    if not (other / "qwen3vl_export").is_dir():
        raise UsageError(f"{other}: no checkout of this project", remedy="give the folder that holds qwen3vl_export")
    environment = measure.environment()
    checkouts = {"other": (other.resolve(), python.absolute()), "this": (_ROOT, Path(sys.executable))}
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        synthetic.write_checkpoint(work / "checkpoint", model, sparse=True)
        steps: dict[str, Callable[[Path, Path], float]] = {
            "demo": lambda folder, with_: _export_cpu_s(folder, with_, work, "demo"),
            model: lambda folder, with_: _export_cpu_s(folder, with_, work, str(work / "checkpoint"), "--no-weights"),
            "import": lambda folder, with_: statistics.median(
                _import_s(folder, with_) for _ in range(_IMPORTS_PER_EXPORT)
            ),
        }
        found: dict[str, dict[str, list[float]]] = {step: {side: [] for side in checkouts} for step in steps}
        for turn in range(repeats + 1):  # the first fills the caches of both
            for step, run in steps.items():
                for side, place in checkouts.items():
                    seconds = run(*place)
                    if turn:
                        found[step][side].append(seconds)
    result = {
        "model": model,
        "commits": {side: _commit(folder) for side, (folder, _) in checkouts.items()},
        "steps": found,
        "environment": environment,
    }
    typer.echo(report.write(f"against-{result['commits']['other']}", result, results).read_text(encoding="utf-8"))


def ratio(result: Mapping[str, Any], step: str) -> float:
    """Return median of this checkout over median of the other."""
    this, other = (statistics.median(result["steps"][step][side]) for side in ("this", "other"))
    return this / other


def table_of(result: Mapping[str, Any]) -> str:
    """Return one row for each thing measured."""
    names = {"demo": "export of the demo, CPU s", "import": f"`{_IMPORT}`, wall s"}
    names[result["model"]] = f"export of {result['model']} without weights, CPU s"
    rows = [("", f"commit {result['commits']['other']}", "this checkout", "ratio")]
    for step, sides in result["steps"].items():
        cells = (f"{statistics.median(sides[side]):.2f}" for side in ("other", "this"))
        rows.append((names[step], *cells, f"{ratio(result, step):.2f}"))
    runs = len(result["steps"]["demo"]["this"])
    return f"Medians of {runs} runs, both checkouts in turn.\n\n{report.table(rows)}"


def _export_cpu_s(folder: Path, python: Path, work: Path, source: str, *options: str) -> float:
    command = [str(python), "-m", "qwen3vl_export.cli.export", source, "--target", "ort-cpu-fp32"]
    command += ["--output", str(work / "engine"), *options]
    return measure.run_child(command, folder).cpu_s


def _import_s(folder: Path, python: Path) -> float:
    start = time.perf_counter()
    subprocess.run([str(python), "-c", _IMPORT], cwd=folder, check=True)
    return time.perf_counter() - start


def _commit(folder: Path) -> str:
    command = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
