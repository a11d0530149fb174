"""`python -m benchmarks compare` and `python -m benchmarks compare-setup`."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from benchmarks import options, synthetic
from benchmarks.compare import chart, comparison, sides, tables
from benchmarks.compare.workloads import POINTS
from benchmarks.result_files import RESULTS, write
from runtime.errors import UsageError
from scripts import share_torch

_LOCKS = sides.ROOT / "locks"  # made of the requirements beside this file: make lock
_Known = TypeVar("_Known")


def compare(
    model: options.Model = "qwen3-vl-2b",
    layers: options.Layers = None,
    checkpoint: Annotated[Path | None, typer.Option(help="An existing checkpoint of that shape.")] = None,
    expert_stride: options.ExpertStride = 1,
    side: Annotated[list[str] | None, typer.Option(help="Measure only this side; may be repeated.")] = None,
    point: Annotated[list[str] | None, typer.Option(help="Only this point (decode-512-b1); may be repeated.")] = None,
    threads: int = 2,
    budget_s: Annotated[float, typer.Option(help="Seconds of timed calls at each point.")] = 3.0,
    min_repeats: Annotated[int, typer.Option(help="Fewest timed calls at each point, however long they take.")] = 3,
    max_repeats: Annotated[int, typer.Option(help="Most timed calls at each point.")] = 9,
    keep_engines: Annotated[bool, typer.Option(help="Reuse our engines of an earlier comparison.")] = False,
    max_minutes: Annotated[float, typer.Option(help="Start no further side after this many minutes.")] = 600.0,
    work_dir: Annotated[Path, typer.Option(help="Keeps checkpoint and exports.")] = Path("build/compare"),
    results: Annotated[
        Path | None, typer.Option(help="Folder for the JSON file, tables and plot; required with --side or --point.")
    ] = None,
) -> None:
    """Measure our targets beside PyTorch and the installed peers on one synthetic checkpoint."""
    if results is None and (side or point):
        raise UsageError(
            "--side or --point without --results: a part would replace the whole comparison",
            remedy=f"give another folder, or --results {RESULTS.relative_to(sides.ROOT)} if that is meant",
        )
    chosen = _choose("side", {each.name: each for each in sides.all_sides()}, side)
    points = _choose("point", {each.name: each for each in POINTS}, point)
    name = synthetic.name_of(model, layers)
    work = (work_dir / name).absolute()
    if checkpoint is not None and expert_stride != 1:
        raise UsageError("--checkpoint and --expert-stride: there is nothing to write", remedy="give one of them")
    if checkpoint is None:
        checkpoint = work / ("checkpoint" if expert_stride == 1 else f"checkpoint-stride-{expert_stride}")
        if not (checkpoint / "config.json").is_file():
            synthetic.write_checkpoint(checkpoint, model, layers=layers, expert_stride=expert_stride)
            allow_large_images(checkpoint)
    settings = comparison.Settings(threads, budget_s, min_repeats, max_repeats, keep_engines, max_minutes)
    result = {"model": name, **synthetic.sizes(checkpoint)} | comparison.compare(
        checkpoint.absolute(), work, chosen, points, settings
    )
    path = write(f"compare-{name}", result, tables.render(result), results or RESULTS)
    path.with_suffix(".svg").write_text(chart.draw(result), encoding="utf-8")
    for failed in result["failed"]:
        typer.echo(f"error: {failed}: {result['missing'][failed]}", err=True)
    if result["failed"]:
        raise typer.Exit(1)


def allow_large_images(checkpoint: Path) -> None:
    """Give a synthetic checkpoint Qwen's limits of an image; the demo's, which it has, shrink 1024 × 768 pixels."""
    path = checkpoint / "preprocessor_config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    values["size"] = {"shortest_edge": 65536, "longest_edge": 16777216}
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def compare_setup() -> None:
    """Install each peer into a virtual environment of its own in build/peers, and see that it starts.

    The environments share the PyTorch of this one: a peer of another build, or a second copy, is gigabytes.
    """
    typer.echo("About 300 MB to fetch on a first run, 1.4 GB on disk; the environments are made anew.")
    for lock in sorted(_LOCKS.glob("peers-*.txt")):
        folder = sides.PEERS / lock.stem.removeprefix("peers-")
        subprocess.run([*share_torch.make_environment(folder), "-r", str(lock)], check=True)
        for side in sides.all_sides():
            if side.environment == folder.name:
                # It has no `--help` to ask instead: the one of onnxruntime-genai 0.18.0 raises.
                subprocess.run(side.import_command(), cwd=sides.ROOT, check=True)
        typer.echo(f"{folder}: installed")


def _choose(kind: str, known: Mapping[str, _Known], names: list[str] | None) -> list[_Known]:
    for name in names or ():
        if name not in known:
            raise UsageError(f"--{kind} {name}: unknown", remedy=f"one of {', '.join(known)}")
    return [known[name] for name in names] if names else list(known.values())
