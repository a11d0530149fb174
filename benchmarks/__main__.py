"""Command line of the benchmarks: `python -m benchmarks --help` lists them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import imports, inference, kernels, lowered, measure, report, routes, status, synthetic
from benchmarks.against import against
from benchmarks.compare.command import ExpertStride, compare, compare_setup
from benchmarks.experts import experts
from benchmarks.kills import kills
from benchmarks.overhead import overhead
from benchmarks.race import race
from benchmarks.speculation import speculation
from engines.disk import replace_text
from engines.quantize.calibration import needs_prompts
from engines.registry import get
from runtime.errors import Qwen3VLError, UsageError
from runtime.manifest import Manifest

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.command()(against)
app.command()(compare)
app.command("compare-setup")(compare_setup)
app.command()(experts)
app.command()(kills)
app.command()(overhead)
app.command()(race)
app.command()(speculation)

Model = Annotated[str, typer.Option(help="Shape in configs/models, such as qwen3-vl-2b.")]
Layers = Annotated[int | None, typer.Option(help="Decoder layers, the first ones; all if not given.")]
Target = Annotated[str, typer.Option(help="Target to build.")]
Results = Annotated[Path, typer.Option(help="Folder for the JSON file and the table.")]
WorkDir = Annotated[Path | None, typer.Option(help="Folder for checkpoints and engines; emptied of them afterwards.")]


@app.command("synthetic")
def write_synthetic(
    folder: Path,
    model: Model,
    layers: Layers = None,
    sparse: Annotated[bool, typer.Option(help="Headers only, data as holes.")] = False,
    seed: int = 0,
    dtype: str = "BF16",
    expert_stride: ExpertStride = 1,
) -> None:
    """Write a synthetic checkpoint."""
    synthetic.write_checkpoint(
        folder, model, sparse=sparse, seed=seed, dtype=dtype, layers=layers, expert_stride=expert_stride
    )


@app.command()
def export(
    model: Model,
    layers: Layers = None,
    no_weights: Annotated[bool, typer.Option(help="Export graphs only, from a sparse checkpoint.")] = False,
    checkpoint: Annotated[Path | None, typer.Option(help="An existing checkpoint instead of a synthetic one.")] = None,
    target: Target = "ort-cpu-fp32",
    expert_stride: ExpertStride = 1,
    repeats: int = 1,
    results: Results = report.RESULTS,
    work_dir: WorkDir = None,
) -> None:
    """Measure wall time, CPU time and peak memory of an export, imports included."""
    if checkpoint is not None and expert_stride != 1:
        raise UsageError("--checkpoint and --expert-stride: there is nothing to write", remedy="give one of them")
    runs = []
    environment = measure.environment()
    with tempfile.TemporaryDirectory(dir=work_dir) as name:
        source = checkpoint or Path(name) / "checkpoint"
        if checkpoint is None:
            synthetic.write_checkpoint(source, model, sparse=no_weights, layers=layers, expert_stride=expert_stride)
        sizes = synthetic.sizes(source)
        for _ in range(repeats):
            engine = Path(name) / "engine"
            cost = _export(source, engine, target, no_weights)
            size = sum(path.stat().st_size for path in engine.rglob("*") if path.is_file())
            runs.append(asdict(cost) | {"output_bytes": size})
            shutil.rmtree(engine)
    shape = synthetic.name_of(model, layers)
    result = {
        "model": shape,
        "target": target,
        "no_weights": no_weights,
        **sizes,
        "runs": runs,
        "environment": environment,
    }
    suffix = "-no-weights" if no_weights else ""
    _print(report.write(f"export-{shape}-{target}{suffix}", result, results))


@app.command()
def build(
    model: Annotated[str, typer.Option(help="A shape in configs/models, `demo` or `demo-moe`.")],
    target: Annotated[str, typer.Option(help="A target that compiles plans, such as trt-rtx-fp16.")],
    layers: Layers = None,
    checkpoint: Annotated[Path | None, typer.Option(help="An existing checkpoint instead of a synthetic one.")] = None,
    results: Results = report.RESULTS,
    work_dir: WorkDir = None,
) -> None:
    """Measure the build of a compiled engine, tracing included: time, peak memory, bytes of plans and of weights.

    fp8, which needs calibration, gets prompts about the demo's pictures.
    """
    environment = measure.environment()
    with tempfile.TemporaryDirectory(dir=work_dir) as name:
        engine, source = Path(name) / "engine", checkpoint or Path(name) / "checkpoint"
        if model in status.SHIPPED:
            source, shape = Path(model), model
        else:
            shape = synthetic.name_of(model, layers)
            if checkpoint is None:
                synthetic.write_checkpoint(source, model, layers=layers)
        calibration = synthetic.write_calibration(Path(name) / "prompts") if needs_prompts(get(target)) else None
        cost = _export(source, engine, target, no_weights=False, calibration=calibration)
        manifest = Manifest.read(engine)
    plans = {name: record.num_bytes for name, record in manifest.files.items() if name.endswith(".plan")}
    if not plans:
        raise UsageError(f"{target} compiles no plans", remedy="measure it with: python -m benchmarks export")
    kept = ("library", "library_version", "compute_capabilities", "capacity", "max_batch", "prefill_chunk")
    result = {
        "model": shape,
        "target": target,
        **asdict(cost),
        "plan_bytes": plans,
        "weight_bytes": manifest.capabilities["graph_weight_bytes"],
        "options": {name: manifest.capabilities[name] for name in kept},
        "environment": environment,
    }
    _print(report.write(f"build-{shape}-{target}", result, results))


@app.command()
def run(
    model: Model,
    checkpoint: Annotated[Path | None, typer.Option(help="An existing checkpoint instead of a synthetic one.")] = None,
    engine: Annotated[Path | None, typer.Option(help="An engine of that checkpoint; exported if not given.")] = None,
    target: Target = "ort-cpu-fp32",
    threads: int = 2,
    image_side: int = 448,
    sentences: int = 8,
    decode_steps: int = 16,
    warmup: int = 1,
    repeats: int = 3,
    results: Results = report.RESULTS,
    work_dir: WorkDir = None,
) -> None:
    """Measure vision, prefill and decode of the engine and of PyTorch, one after the other."""
    work = inference.Workload(image_side, sentences, decode_steps, warmup, repeats, threads)
    result: dict[str, Any] = {"model": model, "target": target, "workload": asdict(work)}
    with tempfile.TemporaryDirectory(dir=work_dir) as name:
        folder = Path(name)
        source = checkpoint or folder / "checkpoint"
        if checkpoint is None:
            synthetic.write_checkpoint(source, model)
        if engine is None:
            engine = folder / "engine"
            _export(source, engine, target, no_weights=False)
        result["environment"] = measure.environment()
        for side, path in (("engine", engine), ("torch", source)):
            output = folder / f"{side}.json"
            cost = measure.run_child(inference.command(side, path, work, output))
            result[side] = json.loads(output.read_text(encoding="utf-8")) | {"peak_rss_bytes": cost.peak_rss_bytes}
    for count in ("prompt_tokens", "visual_tokens"):
        if result["engine"][count] != result["torch"][count]:
            raise UsageError(
                f"{count}: engine {result['engine'][count]}, PyTorch {result['torch'][count]}",
                remedy="give an engine that was exported from this checkpoint",
            )
    _print(report.write(f"run-{model}-{target}", result, results))


@app.command("import")
def time_imports(repeats: int = 11, results: Results = report.RESULTS) -> None:
    """Measure what importing the Python package costs, in fresh interpreters."""
    environment = measure.environment()
    _print(report.write("import", imports.time_imports(repeats=repeats) | {"environment": environment}, results))


@app.command("kernels")
def measure_kernels(repeats: int = 21, threads: int = 1, results: Results = report.RESULTS) -> None:
    """Measure 8-bit products in the forms that engines use, their memory, and the tests of kernels at opening."""
    environment = measure.environment()
    _print(report.write("kernels", kernels.measure_all(repeats, threads) | {"environment": environment}, results))


@app.command("lowered")
def verify_lowered(checkpoint: str = "demo", max_new_tokens: int = 64, results: Results = report.RESULTS) -> None:
    """Execute the lowered graphs of every GPU target on the CPU and compare them with PyTorch."""
    environment = measure.environment()
    found = lowered.measure(checkpoint, max_new_tokens, lambda name: typer.echo(name, err=True))
    _print(report.write("lowered", found | {"environment": environment}, results))


@app.command("routes")
def compare_routes(checkpoint: str = "demo-moe", max_new_tokens: int = 64, results: Results = report.RESULTS) -> None:
    """Verify every target of a mixture of experts, and say where it chooses other experts than PyTorch."""
    environment = measure.environment()
    found = routes.measure(checkpoint, max_new_tokens, lambda name: typer.echo(name, err=True))
    _print(report.write("routes", found | {"environment": environment}, results))


@app.command()
def quantizers(canvases: int = 100, calibration: int = 128, bits: int = 4, results: Results = report.RESULTS) -> None:
    """Compare ways to round the demo's decoder to few bits: KL to float32 on held-out canvases."""
    from benchmarks.quantizers import measure as compare_quantizers  # takes PyTorch and the exporter

    environment = measure.environment()
    found = compare_quantizers(canvases, calibration, bits, lambda text: typer.echo(text, err=True))
    _print(report.write("quantizers", found | {"environment": environment}, results))


@app.command("report")
def write_report() -> None:
    """Write all tables again from the result files: of each result, in README.md and in docs/benchmarks.md."""
    for path, text in status.generated().items():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            replace_text(path, text)
            typer.echo(path.relative_to(status.ROOT))


def _export(
    source: Path, engine: Path, target: str, no_weights: bool, calibration: Path | None = None
) -> measure.ChildCost:
    command = [sys.executable, "-m", "qwen3vl_export.cli.export", str(source)]
    command += ["--target", target, "--output", str(engine), "--json"]
    if calibration is not None:
        command += ["--calibration", str(calibration)]
    return measure.run_child(command + ["--no-weights"] * no_weights)


def _print(path: Path) -> None:
    typer.echo(path.read_text(encoding="utf-8"))


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
