"""`python -m benchmarks routes`: where engines of a mixture of experts choose other experts than PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from benchmarks import options
from benchmarks.lowered import CALIBRATION_CANVASES, reports
from benchmarks.measure import environment
from benchmarks.result_files import RESULTS, markdown, write
from demo_training.prompts import training_prompts
from engines.quantize.cache_ranges import CacheQuantization
from engines.registry import all_targets, get
from runtime.errors import ParityError

if TYPE_CHECKING:
    from engines.target import Target
    from qwen3vl_export.parity.report import Report

# Caches in few bits, of these targets.
_CACHES = (("ort-cpu-fp32", 8), ("ort-cpu-fp32", 4), ("ort-cpu-int4", 8), ("ort-cpu-int4", 4))


def routes(checkpoint: str = "demo-moe", max_new_tokens: int = 64, results: options.Results = RESULTS) -> None:
    """Verify every target of a mixture of experts, and say where it chooses other experts than PyTorch.

    A target whose graphs do not run on the CPU is left out.
    """
    machine = environment()
    variants: dict[str, tuple[Target, CacheQuantization | None]]
    variants = {target.name: (target, None) for target in all_targets()}
    for name, bits in _CACHES:
        cache = CacheQuantization(bits, training_prompts(CALIBRATION_CANVASES))
        variants[f"{name}, cache in int{bits}"] = get(name), cache
    compared = reports(checkpoint, max_new_tokens, variants)
    found = {name: _worst(report) for name, report in compared if not isinstance(report, ParityError)}
    result = {"model": checkpoint, "max_new_tokens": max_new_tokens, "engines": found, "environment": machine}
    write("routes", result, table(result), results)


def table(result: Mapping[str, Any]) -> str:
    """Return one row for each engine."""
    rows = [("engine", "assignments followed", "widest gap", "largest share", "cache", "logits", "passed")]
    for name, each in result["engines"].items():
        cells = (f"{each[key]:.2g}" for key in ("widest_gap", "largest_share", "cache_relative", "logits_scaled"))
        rows.append((name, f"{each['differ']} of {each['assignments']}", *cells, "yes" if each["passed"] else "**no**"))
    return (
        f"`qwen3vl verify` of {result['model']}, {result['max_new_tokens']} greedy tokens after each prompt; values "
        f"are the largest of all prompts and layers. Targets that are missing do not run on a CPU.\n\n{markdown(rows)}"
    )


def _worst(report: Report) -> dict[str, Any]:
    def values(*names: str) -> list[float]:
        return [check.value for check in report.checks if check.name in names]

    gaps = [check for check in report.checks if check.name == "widest gap of routes"]
    return {
        "passed": report.passed,
        "differ": sum(check.detail["assignments"] for check in gaps),
        "assignments": sum(routing.num_tokens for routing in report.routers.layers.values()),
        "widest_gap": max((check.value for check in gaps), default=0.0),
        "largest_share": max((check.detail["share"] for check in gaps), default=0.0),
        "cache_relative": max(values("keys", "values")),
        "logits_scaled": max(values("prompt logits", "greedy logits")),
    }
