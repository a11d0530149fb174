"""`python -m benchmarks lowered`: the lowered graphs of every GPU target, executed on the CPU, against PyTorch."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from benchmarks import options
from benchmarks.measure import environment
from benchmarks.result_files import RESULTS, markdown, write
from demo_training.prompts import training_prompts
from engines.build import build_engine
from engines.build_options import BuildOptions
from engines.quantize.calibration import calibrate, needs_prompts
from engines.registry import all_targets
from engines.target import GPU
from runtime.errors import ParityError

if TYPE_CHECKING:
    from engines.quantize.cache_ranges import CacheQuantization
    from engines.target import Target
    from qwen3vl_export.parity.report import Report

# Targets whose activations have a fixed scale are calibrated on as many training canvases of the demo.
CALIBRATION_CANVASES = 64
# Prompts and answers take 150 positions; a portable cell on the CPU costs all that the cache holds.
_CAPACITY = 256


def lowered(checkpoint: str = "demo", max_new_tokens: int = 64, results: options.Results = RESULTS) -> None:
    """Execute the lowered graphs of every GPU target on the CPU and compare them with PyTorch."""
    machine = environment()
    variants = {target.name: (target, None) for target in all_targets() if target.device == GPU}
    found = {name: _summary(report) for name, report in reports(checkpoint, max_new_tokens, variants)}
    result = {"model": checkpoint, "max_new_tokens": max_new_tokens, "targets": found, "environment": machine}
    write("lowered", result, table(result), results)


def reports(
    checkpoint: str, max_new_tokens: int, variants: Mapping[str, tuple[Target, CacheQuantization | None]]
) -> Iterator[tuple[str, Report | ParityError]]:
    """Build engines, of a GPU's target the lowered graphs alone, and compare each with PyTorch.

    Args:
        checkpoint: What `Checkpoint.open` takes.
        max_new_tokens: Greedy tokens of each prompt.
        variants: By name, what to build for, calibrated on training canvases where it has to be, and the KV cache.

    Yields:
        The name, and the report, or why the lowered graphs do not run on the CPU.
    """
    from qwen3vl_export.checkpoint import Checkpoint
    from qwen3vl_export.export import make_bundle
    from qwen3vl_export.parity.verify import verify

    traced = make_bundle(Checkpoint.open(checkpoint))
    for name, (target, cache) in variants.items():
        typer.echo(name, err=True)
        sizes = BuildOptions(max_context=_CAPACITY, prefill_chunk=_CAPACITY) if target.compile is not None else None
        with tempfile.TemporaryDirectory() as work:
            bundle, folder, codes = traced, Path(work) / "engine", Path(work) / "codes"
            if needs_prompts(target):
                codes.mkdir()
                bundle = calibrate(bundle, target, training_prompts(CALIBRATION_CANVASES), codes).applied_to(bundle)
            try:
                build_engine(bundle, target, folder, runnable=target.device != GPU, options=sizes, cache=cache)
                yield name, verify(folder, checkpoint, max_new_tokens=max_new_tokens)
            except ParityError as error:
                yield name, ParityError(error.message.replace(f"{folder}/", ""), remedy=error.remedy)


def table(result: Mapping[str, Any]) -> str:
    """Return one row for each target."""
    rows = [("target", "executed", "least cosine", "logits", "top-1, prompt", "top-1, greedy", "within its tolerances")]
    for name, each in result["targets"].items():
        if each["is_executed"]:
            cells = (
                "yes",
                f"{each['least_cosine']:.7f}",
                f"{each['logits_scaled']:.2g}",
                f"{100 * each['prompt_top1']:.1f} %",
                f"{100 * each['greedy_top1']:.1f} %",
                "yes" if each["passed"] else "**no**",
            )
        else:
            cells = (f"no: {each['reason']}", "", "", "", "", "not known")
        rows.append((f"`{name}`", *cells))
    return (
        f"Lowered graphs of {result['model']}, {result['max_new_tokens']} greedy tokens after each prompt, against "
        f"PyTorch in float32; of all prompts the worst.\n\n{markdown(rows)}"
    )


def _summary(report: Report | ParityError) -> dict[str, Any]:
    if isinstance(report, ParityError):
        return {"is_executed": False, "reason": report.message}
    values = {name: [check.value for check in report.checks if check.name == name] for name in _NAMES}
    return {
        "is_executed": True,
        "passed": report.passed,
        "precision": report.precision,
        "least_cosine": min(check.detail["cosine"] for check in report.checks if "cosine" in check.detail),
        "logits_scaled": max(values["prompt logits"] + values["greedy logits"]),
        "prompt_top1": min(values["prompt tokens agree"]),
        "greedy_top1": min(values["greedy tokens agree"]),
    }


_NAMES = ("prompt logits", "greedy logits", "prompt tokens agree", "greedy tokens agree")
