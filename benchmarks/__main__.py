"""Command line of the benchmarks: `python -m benchmarks --help` lists them."""

from __future__ import annotations

import subprocess
import sys

import typer

from benchmarks.build import build
from benchmarks.compare.command import compare, compare_setup
from benchmarks.decode_plan import decode_plan
from benchmarks.eviction import kv_eviction
from benchmarks.export import export
from benchmarks.gpu_check import gpu_check
from benchmarks.gpu_pack import gpu_pack
from benchmarks.imports import time_imports
from benchmarks.kernels import kernels
from benchmarks.kv_policies import kv_policies
from benchmarks.lowered import lowered
from benchmarks.memory_plan import memory_plan
from benchmarks.preprocess import preprocess
from benchmarks.report import report
from benchmarks.routed import routed
from benchmarks.routes import routes
from benchmarks.run import run
from benchmarks.serve import serve
from benchmarks.serve_hostile import serve_hostile
from benchmarks.serve_peers import serve_peers
from benchmarks.serving.command import serving
from benchmarks.structured import structured
from benchmarks.synthetic import write
from benchmarks.tune import tune
from benchmarks.video import video
from benchmarks.visual_tokens import visual_tokens
from benchmarks.window import window
from runtime.errors import Qwen3VLError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
_COMMANDS = (
    build,
    compare,
    compare_setup,
    decode_plan,
    export,
    gpu_check,
    gpu_pack,
    kernels,
    kv_eviction,
    kv_policies,
    lowered,
    memory_plan,
    preprocess,
    report,
    routed,
    routes,
    run,
    serve,
    serve_hostile,
    serve_peers,
    serving,
    structured,
    tune,
    video,
    visual_tokens,
    window,
)
for command in _COMMANDS:
    app.command()(command)
app.command("import")(time_imports)
app.command("synthetic")(write)


def main() -> None:
    """Run the command line; an expected error is one line on stderr."""
    try:
        app()
    except Qwen3VLError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except subprocess.CalledProcessError as error:
        last = f": {error.output}" if error.output else ""
        typer.echo(f"error: {error.cmd[2]} ended with exit code {error.returncode}{last}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
