"""`python -m benchmarks lowered`: the lowered graphs of every GPU target, executed on the CPU, against PyTorch."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
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
    from engines.bundle import Bundle
    from engines.quantize.cache_ranges import CacheQuantization
    from engines.target import Target
    from qwen3vl_export.parity.report import Report

# Targets whose activations have a fixed scale are calibrated on as many training canvases of the demo.
_CALIBRATION_CANVASES = 64
# Prompts and answers take 150 positions; a portable cell on the CPU costs all that the cache holds.
_CAPACITY = 256


def lowered(checkpoint: str = "demo", max_new_tokens: int = 64, results: options.Results = RESULTS) -> None:
    """Execute the lowered graphs of every GPU target on the CPU and compare them with PyTorch."""
    machine = environment()
    found = measure(checkpoint, max_new_tokens, lambda name: typer.echo(name, err=True))
    write("lowered", found | {"environment": machine}, table(found), results)


def measure(checkpoint: str, max_new_tokens: int, on_target: Callable[[str], None]) -> dict[str, Any]:
    """Return for each target whether its graphs were executed, and how near they came, or why not.

    Args:
        checkpoint: What `Checkpoint.open` takes.
        max_new_tokens: Greedy tokens of each prompt.
        on_target: Told each target's name before its turn.
    """
    from qwen3vl_export.checkpoint import Checkpoint
    from qwen3vl_export.export import make_bundle

    bundle = make_bundle(Checkpoint.open(checkpoint))
    found: dict[str, Any] = {}
    for target in all_targets():
        if target.device == GPU:
            on_target(target.name)
            with tempfile.TemporaryDirectory() as work:
                try:
                    report = verified(bundle, target, checkpoint, max_new_tokens, Path(work))
                    found[target.name] = {"is_executed": True, **_worst(report)}
                except ParityError as error:
                    reason = error.message.replace(f"{work}/engine/", "")
                    found[target.name] = {"is_executed": False, "reason": reason}
    return {"model": checkpoint, "max_new_tokens": max_new_tokens, "targets": found}


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


def verified(
    bundle: Bundle,
    target: Target,
    checkpoint: str,
    max_new_tokens: int,
    work: Path,
    cache: CacheQuantization | None = None,
) -> Report:
    """Build an engine, of a GPU's target its lowered graphs alone, and compare it with PyTorch.

    Args:
        bundle: The bundle of the checkpoint.
        target: What to build; calibrated on training canvases where it has to be.
        checkpoint: What the bundle was made of.
        max_new_tokens: Greedy tokens of each prompt.
        work: An empty folder.
        cache: Bits of the KV cache.

    Raises:
        ParityError: The lowered graphs do not run on the CPU.
    """
    from qwen3vl_export.parity.verify import verify

    options = BuildOptions(max_context=_CAPACITY, prefill_chunk=_CAPACITY) if target.compile is not None else None
    folder, codes = work / "engine", work / "codes"
    if needs_prompts(target):
        codes.mkdir()
        bundle = calibrate(bundle, target, training_prompts(_CALIBRATION_CANVASES), codes).applied_to(bundle)
    build_engine(bundle, target, folder, runnable=target.device != GPU, options=options, cache=cache)
    return verify(folder, checkpoint, max_new_tokens=max_new_tokens)


def _worst(report: Report) -> dict[str, Any]:
    values = {name: [check.value for check in report.checks if check.name == name] for name in _NAMES}
    return {
        "passed": report.passed,
        "precision": report.precision,
        "least_cosine": min(check.detail["cosine"] for check in report.checks if "cosine" in check.detail),
        "logits_scaled": max(values["prompt logits"] + values["greedy logits"]),
        "prompt_top1": min(values["prompt tokens agree"]),
        "greedy_top1": min(values["greedy tokens agree"]),
    }


_NAMES = ("prompt logits", "greedy logits", "prompt tokens agree", "greedy tokens agree")
