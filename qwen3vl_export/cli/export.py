"""The `qwen3vl-export` command."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def export(
    model: Annotated[
        str, typer.Argument(help="A Hugging Face folder, a Hub id (owner/name[@revision]), or 'demo'.", metavar="MODEL")
    ],
    target: Annotated[str, typer.Option(help="What to build for; `qwen3vl targets` lists them.")] = "ort-cpu-fp32",
    output: Annotated[Path | None, typer.Option(help="Engine folder to write [default: out/MODEL-TARGET].")] = None,
    bundle: Annotated[
        Path | None,
        typer.Option(help="Write the target-neutral graphs and weights here instead of building an engine."),
    ] = None,
    compile: Annotated[
        bool, typer.Option("--compile/--no-compile", help="--no-compile stops at the lowered graph and its weights.")
    ] = True,
    weights: Annotated[bool, typer.Option("--weights/--no-weights", help="--no-weights writes graphs only.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Export a Qwen3-VL checkpoint into an engine.

    For example:

        qwen3vl-export demo --output out/demo

        qwen3vl-export ./Qwen3-VL-2B-Instruct --target ort-cpu-fp32 --output engines/2b
    """
    from engines import registry
    from engines.build import build_engine, output_folder
    from qwen3vl_export.checkpoint import Checkpoint

    started = time.perf_counter()
    chosen = registry.get(target)
    checkpoint = Checkpoint.open(model)
    if bundle is not None and output is not None:
        from runtime.errors import UsageError

        raise UsageError("--bundle and --output exclude each other", remedy="run the command twice")
    destination = bundle or output or Path("out") / f"{Path(model).name}-{chosen.name}"
    print(f"tracing {checkpoint.name}", file=sys.stderr)
    from qwen3vl_export.export import make_bundle

    made = make_bundle(checkpoint)
    traced_s = time.perf_counter() - started
    weight_bytes = made.weight_bytes if weights else 0
    with _progress(weight_bytes) as advance:
        if bundle is not None:
            with output_folder(destination, weight_bytes) as folder:
                made.write(folder, with_weights=weights, progress=advance)
        else:
            # ONNX Runtime compiles when it opens the graph, so for it the lowered graph is the engine.
            build_engine(
                made, chosen, destination, with_weights=weights, runnable=weights and compile, progress=advance
            )
    result = {
        "output": str(destination),
        "target": None if bundle is not None else chosen.name,
        "weight_bytes": weight_bytes,
        "trace_s": round(traced_s, 2),
        "total_s": round(time.perf_counter() - started, 2),
    }
    if as_json:
        print(json.dumps(result))
    else:
        print(f"{destination}  ({weight_bytes / 1e6:.1f} MB of weights, {result['total_s']} s)")


def _progress(total_bytes: int):
    """Return a context that shows a bar on stderr and gives the function that advances it."""
    import contextlib

    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    @contextlib.contextmanager
    def shown():
        columns = TextColumn("writing weights"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("weights", total=total_bytes)
            yield lambda num_bytes: progress.advance(task, num_bytes)

    return shown()


def main() -> None:
    """Run the command line."""
    from qwen3vl_export.cli.errors import run_app

    run_app(app)


if __name__ == "__main__":
    main()
