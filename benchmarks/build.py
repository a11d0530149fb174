"""`python -m benchmarks build`: the build of a compiled engine."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import measure, options, synthetic
from benchmarks.export import run_export
from benchmarks.result_files import RESULTS, markdown, write
from engines.quantize.calibration import needs_prompts
from engines.registry import get
from runtime.errors import UsageError
from runtime.manifest import Manifest

SHIPPED = ("demo", "demo-moe")


def build(
    model: Annotated[str, typer.Option(help="A shape in configs/models, `demo` or `demo-moe`.")],
    target: Annotated[str, typer.Option(help="A target that compiles plans, such as trt-rtx-fp16.")],
    layers: options.Layers = None,
    checkpoint: options.Checkpoint = None,
    results: options.Results = RESULTS,
    work_dir: options.WorkDir = None,
) -> None:
    """Measure the build of a compiled engine, tracing included: time, peak memory, bytes of plans and of weights.

    fp8, which needs calibration, gets prompts about the demo's pictures.
    """
    environment = measure.environment()
    with tempfile.TemporaryDirectory(dir=work_dir) as name:
        engine, source = Path(name) / "engine", checkpoint or Path(name) / "checkpoint"
        if model in SHIPPED:
            source, shape = Path(model), model
        else:
            shape = synthetic.name_of(model, layers)
            if checkpoint is None:
                synthetic.write_checkpoint(source, model, layers=layers)
        calibration = synthetic.write_calibration(Path(name) / "prompts") if needs_prompts(get(target)) else None
        cost = run_export(source, engine, target, calibration=calibration)
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
    write(f"build-{shape}-{target}", result, table(result), results)


def table(result: Mapping[str, Any]) -> str:
    """Return what one build of plans took, and how its bytes compare with the weights of the lowered graphs."""
    rows = [("graph", "weights, MB", "plan, MB", "plan / weights")]
    for graph, weights in result["weight_bytes"].items():
        plan = result["plan_bytes"][f"{graph}.plan"]
        rows.append((graph, f"{weights / 1e6:.1f}", f"{plan / 1e6:.1f}", f"{plan / weights:.2f}"))
    used = result["options"]
    return (
        f"{result['model']}, {result['target']}: {result['wall_s']:.0f} s, {result['cpu_s']:.0f} s of CPU, "
        f"{result['peak_rss_bytes'] / 1e9:.1f} GB at the peak, tracing included. {used['library']} "
        f"{used['library_version']}, no GPU, for SM {', '.join(used['compute_capabilities'])}; "
        f"{used['capacity']} positions, batch {used['max_batch']}, chunks of {used['prefill_chunk']}."
        f"\n\n{markdown(rows)}"
    )
