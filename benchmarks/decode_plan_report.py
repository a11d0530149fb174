"""The table of `python -m benchmarks decode-plan`: models, formats and GPUs, and what was not compiled yet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.result_files import markdown

NAME = "decode-plan"
MODELS = ("qwen3-vl-2b", "qwen3-vl-4b", "qwen3-vl-8b", "qwen3-vl-32b", "qwen3-vl-30b-a3b")
TARGETS = ("ort-cuda-fp16", "ort-cuda-int4", "ort-cuda-fp8")
# A card of each kind, and the bandwidth of its memory in bytes a second, as its data sheet says.
_CARDS: Mapping[int, tuple[str, float]] = {
    80: ("A100 80 GB", 2.04e12),
    86: ("RTX 3090", 0.936e12),
    89: ("RTX 4090", 1.01e12),
    90: ("H200", 4.8e12),
    100: ("B200", 8.0e12),
    120: ("RTX 5090", 1.79e12),
}
_HEAD = (
    *("model", "target", "GPU", "kernels", "launches", "compiled in", "registers", "stack", "shared memory", "code"),
    *("weights read", "at the card's bandwidth"),
)
_TEXT = """Kernels for 1 to 32 sequences, in both forms; launches of a step of one sequence. Compiled in: processor
time. Registers and stack of a thread (spilled registers are on the stack; kernels with one are named) and shared memory
of a program: the most that a kernel takes. Weights read: by a step of one sequence. At the card's bandwidth: how long
that takes by its data sheet, which is less than a step takes; an expectation, not measured."""
_STALE = "\\* Kernels have changed since."


def table(result: Mapping[str, Any]) -> str:
    """Return the Markdown table of a result, with a row for each plan that was not compiled yet."""
    found = {place_of(plan): plan for plan in result["plans"]}
    asked = [(model, target, sm) for model in MODELS for target in TARGETS for sm in _CARDS]
    places = [*asked, *sorted(set(found) - set(asked))]
    rows = [found.get(place) or dict(zip(("model", "target", "sm"), place, strict=True)) for place in places]
    body = markdown([_HEAD, *(cells(row, result) for row in rows)])
    stale = any(not is_current(plan, result) for plan in result["plans"])
    return f"{_TEXT}\n\n{body}" + (f"\n{_STALE}\n" if stale else "")


def cells(plan: Mapping[str, Any], result: Mapping[str, Any]) -> list[str]:
    """Return the row of a plan, or of one that was not compiled."""
    mark = "" if "source" not in plan or is_current(plan, result) else "\\*"
    where = [plan["model"], plan["target"], f"{plan['sm'] // 10}.{plan['sm'] % 10}{mark}"]
    if "kernels" not in plan:
        return [*where, f"none: {plan['unserved']}" if "unserved" in plan else "not compiled yet", *[""] * 8]
    card, bandwidth = _CARDS[plan["sm"]]
    spilling = f" ({', '.join(plan['spilling_kernels'])})" if plan["spilling_kernels"] else ""
    return [
        *where,
        str(plan["kernels"]),
        str(plan["launches"]),
        f"{plan['compile_s']:.0f} s",
        str(plan["most_registers"]),
        f"{plan['most_stack_bytes']} B{spilling}",
        f"{plan['most_shared_bytes'] / 1024:.0f} KiB",
        f"{plan['code_bytes'] / 1e6:.2f} MB",
        f"{plan['weight_bytes'] / 1e9:.2f} GB",
        f"{plan['weight_bytes'] / bandwidth * 1e3:.2f} ms ({card})",
    ]


def is_current(plan: Mapping[str, Any], result: Mapping[str, Any]) -> bool:
    """Return whether a plan is of the kernels and the compiler of the latest run."""
    return all(plan[key] == result[key] for key in ("source", "triton"))


def place_of(plan: Mapping[str, Any]) -> tuple[str, str, int]:
    """Return which plan it is: model, target, GPU."""
    return plan["model"], plan["target"], plan["sm"]
