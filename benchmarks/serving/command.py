"""`python -m benchmarks serving`."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import options
from benchmarks.export import run_export
from benchmarks.measure import child_result, environment
from benchmarks.result_files import RESULTS, write
from benchmarks.serving import chart, tables
from benchmarks.serving.part import PARTS, command
from benchmarks.serving.workload import Workload
from engines.disk import replace_text
from runtime.errors import UsageError
from runtime.manifest import Manifest

_DEMO = Path(__file__).parents[2] / "qwen3vl_export" / "demo" / "checkpoint"
_DEMO_TARGET = "ort-cpu-int8"
_DEFAULT = Workload("", "")


def serving(
    engine: Annotated[Path, typer.Argument(help="Engine of the large shape, such as of a 2B checkpoint.")],
    demo: Annotated[Path | None, typer.Option(help="Engine of the demo checkpoint; else one is exported.")] = None,
    only: Annotated[str | None, typer.Option(help=f"Only these parts, with commas: {', '.join(PARTS)}.")] = None,
    threads: int = _DEFAULT.threads,
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds.")] = _DEFAULT.repeats,
    batches: Annotated[str, typer.Option(help="Sequences of a decode step.")] = "1,2,4,8,16",
    pasts: Annotated[str, typer.Option(help="Rows that each of them has in the cache.")] = "32,300,1000",
    clients: Annotated[int, typer.Option(min=2, help="Requests at once.")] = _DEFAULT.clients,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = _DEFAULT.prompt_tokens,
    new_tokens: Annotated[int, typer.Option(min=4, help="Tokens of an answer.")] = _DEFAULT.new_tokens,
    image_side: Annotated[int, typer.Option(help="Side of the image of the long prompt.")] = _DEFAULT.image_side,
    long_tokens: Annotated[int, typer.Option(help="Tokens of its text.")] = _DEFAULT.long_tokens,
    minutes: Annotated[float, typer.Option(help="How long the engine is overloaded.")] = _DEFAULT.minutes,
    overload: Annotated[float, typer.Option(help="Offered over possible requests.")] = _DEFAULT.overload,
    capacity_s: Annotated[float, typer.Option(help="Seconds to find out what is possible.")] = _DEFAULT.capacity_s,
    results: Annotated[
        Path | None, typer.Option(help="Folder for the JSON file, tables and plot; required with --only.")
    ] = None,
    work_dir: options.WorkDir = None,
) -> None:
    """Measure many requests on one engine: speed, fairness, overhead, overload; each part is a process of its own."""
    parts = _chosen(only, results)
    manifest = Manifest.read(engine)
    numbers = [tuple(int(each) for each in values.split(",")) for values in (batches, pasts)]
    with tempfile.TemporaryDirectory(dir=work_dir) as name:
        if demo is None:
            demo = Path(name) / "demo"
            run_export(_DEMO, demo, _DEMO_TARGET)
        work = Workload(
            str(engine), str(demo), threads, numbers[0], numbers[1], repeats, clients, prompt_tokens, new_tokens,
            image_side, long_tokens, minutes, overload, capacity_s,
        )  # fmt: skip
        sizes = {key: value for key, value in asdict(work).items() if key not in ("engine", "demo")}
        result: dict[str, Any] = {
            "model": Path(str(manifest.source.get("name"))).name,
            "target": manifest.target,
            "demo_target": Manifest.read(demo).target,
            "workload": sizes,
            "environment": environment(),
        }
        for part in parts:
            typer.echo(f"{part}: {PARTS[part]}", err=True)
            result[part] = child_result(command(part, work), Path(name) / f"{part}.json")[0]
    folder = results or RESULTS
    stem = f"serving-{result['model']}-{manifest.target}"
    write(stem, result, tables.table(result), folder)
    if "fairness" in result:
        replace_text(folder / f"{stem}.svg", chart.draw(result))


def _chosen(only: str | None, results: Path | None) -> list[str]:
    if only is None:
        return list(PARTS)
    names = only.split(",")
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        raise UsageError(f"--only {unknown[0]}: no such part", remedy=f"choose from {', '.join(PARTS)}")
    if results is None:
        raise UsageError(
            "--only without --results: a part would replace the whole result", remedy="give another folder"
        )
    return [name for name in PARTS if name in names]
