"""The `qwen3vl-export` command."""

# ruff: noqa: D301 (typer keeps the line breaks of a paragraph that begins with a backspace character)

from __future__ import annotations

import json

import typer

from qwen3vl_export.cli.errors import DEBUG_HELP, run_app
from qwen3vl_export.cli.options import AsJson, Quiet, grouped
from qwen3vl_export.cli.progress import progress
from qwen3vl_export.request import ExportRequest

app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(epilog=DEBUG_HELP)
@grouped
def export(request: ExportRequest, *, as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Export a Qwen3-VL checkpoint into an engine.

    The output folder appears once it is complete; until then an older engine stays in its place.

    --json prints one object: output, target (null for a bundle), is_engine (false for a bundle and with --no-compile
    or --no-weights), weight_bytes, trace_s, total_s.

    \b
    Examples:
      qwen3vl-export demo --output out/demo
      qwen3vl-export ./Qwen3-VL-2B-Instruct
      qwen3vl-export ./Qwen3-VL-2B-Instruct --target ort-cpu-fp32 --output engines/2b
      qwen3vl-export ./Qwen3-VL-2B-Instruct --target ort-cpu-int4 --calibration ./prompts
      qwen3vl-export ./Qwen3-VL-2B-Instruct --target ort-cpu-int4 --calibration ./prompts --kv-cache int8
      qwen3vl-export ./Qwen3-VL-2B-Instruct --target trt-rtx-fp16 --max-context 8192 --max-batch 4
      qwen3vl-export ./Qwen3-VL-2B-Instruct --target trt-fp16 --no-compile
      qwen3vl-export Qwen/Qwen3-VL-4B-Instruct@main --no-weights --json
    """
    from qwen3vl_export.export import export as run  # loads onnx_ir

    with progress(is_quiet=quiet, is_json=as_json) as shown:
        exported = run(request, shown)
    values = {
        "output": str(exported.output),
        "target": exported.target,
        "is_engine": exported.is_engine,
        "weight_bytes": exported.weight_bytes,
        "trace_s": round(exported.trace_s, 2),
        "total_s": round(exported.total_s, 2),
    }
    if as_json:
        print(json.dumps(values))
    else:
        print(f"{values['output']}  ({exported.weight_bytes / 1e6:.1f} MB of weights, {values['total_s']} s)")


def main() -> None:
    """Run the command line."""
    run_app(app)


if __name__ == "__main__":
    main()
