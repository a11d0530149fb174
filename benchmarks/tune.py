"""`python -m benchmarks tune ENGINE...`: what `qwen3vl tune` finds for engines on this machine, kept in a result."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import options
from benchmarks.measure import environment
from benchmarks.result_files import RESULTS, markdown, write
from qwen3vl_export.tune.search import APART
from qwen3vl_export.tune.tuner import DEFAULT_BUDGET_S
from qwen3vl_export.tune.tuner import tune as measure

_TIMES = {
    **{"ttft_s": "TTFT", "image_s": "image", "prefill_s": "prefill", "tpot_s": "TPOT"},
    **{name: metric.value for metric, name in APART.items()},
}


def tune(
    engines: Annotated[list[Path], typer.Argument(metavar="ENGINE...", help="Folders, whose names the results get.")],
    budget: Annotated[int, typer.Option(metavar="SECONDS", help="For each engine.")] = DEFAULT_BUDGET_S,
    results: options.Results = RESULTS,
) -> None:
    """Tune engines one after the other, and write a result for each; nothing is kept in the user's cache."""
    for engine in engines:
        machine = environment()
        typer.echo(f"{engine.name}: {budget} s", err=True)
        values = measure(engine, budget, keeps=False).to_dict()
        for name in ("stored", "reason", "machine"):  # of a cache, or in the environment
            del values[name]
        result = {**values, "engine": engine.resolve().name, "budget_s": budget, "environment": machine}
        write(f"tune-{result['engine']}", result, table(result), results)


def table(result: Mapping[str, Any]) -> str:
    """Return what whole requests gain or lose, and each candidate with its verdict."""
    chosen = ", ".join(f"`{name}` {_word(value)}" for name, value in result["settings"].items()) or "the defaults"
    text = (
        f"`{result['engine']}` ({result['target']}) in {result['budget_s']} s: {chosen}; {result['verdict']}. "
        f"Repeated times spread by {100 * result['noise']:.1f} %. Below 1 is faster; intervals are of 95 %.\n"
    )
    parts = [text]
    if result["changes"]:
        head = ("whole request", "defaults", "tuned", "factor")
        rows = [
            (_TIMES[name], f"{1e3 * each['default_s']:.1f} ms", f"{1e3 * each['tuned_s']:.1f} ms", _factor(each))
            for name, each in result["changes"].items()
        ]
        parts.append(markdown([head, *rows]))
    rows = [("setting", "default", "candidate", "factors", "verdict")]
    for tried in result["tried"]:
        start = f"`{tried['setting']}`", _word(tried["default"])
        for each in tried["candidates"]:
            factors = "; ".join(f"{name} {_factor(shift)}" for name, shift in each["factors"].items())
            rows.append((*start, _word(each["value"]), factors, _verdict(each)))
        if tried["note"]:
            rows.append((*start, "", "", tried["note"]))
    return "\n".join([*parts, markdown(rows), *(f"{note.capitalize()}." for note in result["notes"])])


def _verdict(candidate: Mapping[str, Any]) -> str:
    if candidate["same_bits"] is None:
        return str(candidate["verdict"])
    answer = "same bits" if candidate["same_bits"] else f"logits within {candidate['logits_scaled']:.1g}"
    return f"{candidate['verdict']}, {answer}"


def _factor(shift: Mapping[str, Any]) -> str:
    interval = "" if shift["low"] is None else f" ({shift['low']:.2f} to {shift['high']:.2f})"
    return f"{shift['ratio']:.2f}{interval}"


def _word(value: Any) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)
