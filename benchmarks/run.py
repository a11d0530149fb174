"""`python -m benchmarks run`: vision, prefill and decode of an engine beside PyTorch, each a process of its own."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import inference, measure, options, synthetic
from benchmarks.export import run_export
from benchmarks.result_files import RESULTS, markdown, write
from runtime.errors import UsageError

PHASES = ("vision", "prefill", "decode")


def run(
    model: options.Model,
    checkpoint: options.Checkpoint = None,
    engine: Annotated[Path | None, typer.Option(help="Engine of that checkpoint; else one is exported.")] = None,
    target: options.Target = "ort-cpu-fp32",
    threads: int = 2,
    image_side: int = 448,
    sentences: int = 8,
    decode_steps: int = 16,
    warmup: int = 1,
    repeats: int = 3,
    results: options.Results = RESULTS,
    work_dir: options.WorkDir = None,
) -> None:
    """Measure vision, prefill and decode of the engine and of PyTorch, one after the other."""
    work = inference.Workload(image_side, sentences, decode_steps, warmup, repeats, threads)
    result: dict[str, Any] = {"model": model, "target": target, "workload": asdict(work)}
    with tempfile.TemporaryDirectory(dir=work_dir) as name:
        source = checkpoint or Path(name) / "checkpoint"
        if checkpoint is None:
            synthetic.write_checkpoint(source, model)
        if engine is None:
            engine = Path(name) / "engine"
            run_export(source, engine, target)
        result["environment"] = measure.environment()
        for side, path in (("engine", engine), ("torch", source)):
            command = inference.command(side, path, work)
            values, cost = measure.child_result(command, Path(name) / f"{side}.json")
            result[side] = values | {"peak_rss_bytes": cost.peak_rss_bytes}
    for count in ("prompt_tokens", "visual_tokens"):
        if result["engine"][count] != result["torch"][count]:
            raise UsageError(
                f"{count}: engine {result['engine'][count]}, PyTorch {result['torch'][count]}",
                remedy="give an engine that was exported from this checkpoint",
            )
    write(f"run-{model}-{target}", result, table(result), results)


def speed(result: Mapping[str, Any], phase: str) -> float:
    """Return how many times as fast as PyTorch the engine was in a phase, median against median."""
    return result["torch"][phase]["median_s"] / result["engine"][phase]["median_s"]


def table(result: Mapping[str, Any]) -> str:
    """Return one row for each phase, engine against PyTorch."""
    engine, torch = result["engine"], result["torch"]
    rows = [(result["model"], "engine, s", "PyTorch fp32, s", "PyTorch / engine")]
    for phase in PHASES:
        ours, theirs = engine[phase]["median_s"], torch[phase]["median_s"]
        rows.append((phase, f"{ours:.4f}", f"{theirs:.4f}", f"{speed(result, phase):.2f}"))
    loads = engine["load_s"], torch["load_s"]
    rows.append(("load", f"{loads[0]:.1f}", f"{loads[1]:.1f}", f"{loads[1] / loads[0]:.2f}"))
    rss = engine["peak_rss_bytes"] / 1e9, torch["peak_rss_bytes"] / 1e9
    rows.append(("peak RSS, GB", f"{rss[0]:.2f}", f"{rss[1]:.2f}", f"{rss[1] / rss[0]:.2f}"))
    return (
        f"{engine['prompt_tokens']} prompt tokens, {engine['visual_tokens']} of them visual; "
        f"{result['workload']['threads']} threads; median of {result['workload']['repeats']} repeats "
        f"({result['workload']['decode_steps']} decode steps).\n\n{markdown(rows)}"
    )
