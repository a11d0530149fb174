"""`python -m benchmarks export`: wall time, CPU time and peak memory of an export, a process of its own."""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import measure, options, synthetic
from benchmarks.result_files import RESULTS, markdown, write
from runtime.errors import UsageError


def export(
    model: options.Model,
    layers: options.Layers = None,
    no_weights: Annotated[bool, typer.Option(help="Export the graphs alone, from a sparse checkpoint.")] = False,
    checkpoint: options.Checkpoint = None,
    target: options.Target = "ort-cpu-fp32",
    expert_stride: options.ExpertStride = 1,
    repeats: int = 1,
    results: options.Results = RESULTS,
    work_dir: options.WorkDir = None,
) -> None:
    """Measure wall time, CPU time and peak memory of an export, imports included."""
    if checkpoint is not None and expert_stride != 1:
        raise UsageError("--checkpoint and --expert-stride: there is nothing to write", remedy="give one of them")
    runs = []
    environment = measure.environment()
    with tempfile.TemporaryDirectory(dir=work_dir) as name:
        source, engine = checkpoint or Path(name) / "checkpoint", Path(name) / "engine"
        if checkpoint is None:
            synthetic.write_checkpoint(source, model, sparse=no_weights, layers=layers, expert_stride=expert_stride)
        sizes = synthetic.sizes(source)
        for _ in range(repeats):
            cost = run_export(source, engine, target, no_weights=no_weights)
            size = sum(path.stat().st_size for path in engine.rglob("*") if path.is_file())
            runs.append(asdict(cost) | {"output_bytes": size})
            shutil.rmtree(engine)
    shape = synthetic.name_of(model, layers)
    result = {"model": shape, "target": target, "no_weights": no_weights, **sizes, "runs": runs}
    result["environment"] = environment
    suffix = "-no-weights" if no_weights else ""
    write(f"export-{shape}-{target}{suffix}", result, table(result), results)


def run_export(
    source: Path, engine: Path, target: str, *, no_weights: bool = False, calibration: Path | None = None
) -> measure.ChildCost:
    """Run the exporter's command to its end and measure it."""
    command = [sys.executable, "-m", "qwen3vl_export.cli.export", str(source)]
    command += ["--target", target, "--output", str(engine), "--json"]
    if calibration is not None:
        command += ["--calibration", str(calibration)]
    return measure.run_child(command + ["--no-weights"] * no_weights)


def median(result: Mapping[str, Any], value: str) -> float:
    """Return the median of a value over the runs of an export."""
    return statistics.median(run[value] for run in result["runs"])


def peak_bytes(result: Mapping[str, Any]) -> int:
    """Return the largest peak memory of the runs of an export."""
    return max(run["peak_rss_bytes"] for run in result["runs"])


def table(result: Mapping[str, Any]) -> str:
    """Return the median run of an export."""
    wall = median(result, "wall_s")
    cells = {
        "model": result["model"],
        "weights": "no" if result["no_weights"] else "yes",
        "wall, s": f"{wall:.1f}",
        "CPU, s": f"{median(result, 'cpu_s'):.1f}",
        "peak RSS, GB": f"{peak_bytes(result) / 1e9:.2f}",
        "output, MB": f"{median(result, 'output_bytes') / 1e6:.1f}",
    }
    if "checkpoint_bytes" in result and not result["no_weights"]:  # earlier results do not have it
        size = result["checkpoint_bytes"]
        cells |= {"checkpoint, GB": f"{size / 1e9:.2f}", "GB/s": f"{size / wall / 1e9:.3f}"}
    walls = ", ".join(f"{run['wall_s']:.1f}" for run in result["runs"])
    note = synthetic.holes_note(result)
    return (
        markdown([list(cells), list(cells.values())])
        + f"\nMedian of {len(result['runs'])} runs (wall, s: {walls}); of the peaks the largest.{note}\n"
    )
