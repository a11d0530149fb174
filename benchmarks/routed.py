"""`python -m benchmarks routed`: what it gains to let another engine run the vision tower, prompts, or both."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import measure, options
from benchmarks.result_files import RESULTS, markdown, write
from qwen3vl_export.bench.measure import Measured
from qwen3vl_export.bench.measure import measure as take_turns
from qwen3vl_export.bench.points import Point
from runtime.manifest import Manifest
from runtime.memory import STAGING, WEIGHTS
from runtime.model import Qwen3VLModel
from runtime.route import possible_routes
from runtime.scheduling.plan import held_bytes

# Of the differences between a route and the engine alone, those within this are not called gain or loss: the quartiles
# of one engine that takes turns with itself lie as far apart on a busy machine.
_NOISE = 0.03
_TIMES = ("ttft_s", "vision_s", "prefill_s", "tpot_s")


def routed(
    engine: Annotated[Path, typer.Argument(help="Engine that decodes.")],
    others: Annotated[list[Path], typer.Argument(help="Engines of the same checkpoint that run parts for it.")],
    model: options.Model = "qwen3-vl-2b",
    prompt: Annotated[int, typer.Option(help="Tokens of the text of a prompt.")] = 256,
    image: Annotated[int, typer.Option(help="Width and height of the image.")] = 448,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of an answer.")] = 24,
    rounds: Annotated[int, typer.Option(min=2, help="Turns of each.")] = 7,
    results: options.Results = RESULTS,
) -> None:
    """Time an engine alone, each of the others alone, and every route between them, in turns.

    All are open at once, each with a KV cache for one sequence, so the machine has to hold the weights of all.
    """
    machine = measure.environment()
    point = Point(prompt, new_tokens, image_size=(image, image), images=1)
    rows: list[dict[str, Any]] = []
    for other in others:
        ways: dict[str, tuple[Path, dict[str, Path]]] = {"alone": (engine, {})}
        ways |= {_name(route): (engine, route) for route in possible_routes(engine, other)}
        ways["the other alone"] = other, {}
        with ExitStack() as stack:
            opened = {
                name: stack.enter_context(
                    Qwen3VLModel.from_engine(
                        folder, max_context=1024, max_sequences=1, kept_sequences=0, prefix_cache=False, **route
                    )
                )
                for name, (folder, route) in ways.items()
            }
            found = take_turns(opened, [point], rounds)
            for name, each in opened.items():
                rows.append(
                    {"other": _words(ways["the other alone"][0]), "route": name, **_row(each, found[name, point])}
                )
    result = {
        "model": model,
        "engine": _words(engine),
        "point": point.name,
        "rounds": rounds,
        "rows": rows,
        "environment": machine,
    }
    write(f"routed-{model}-{Manifest.read(engine).target}", result, table(result), results)


def table(result: Mapping[str, Any]) -> str:
    """Return a row for each route, with the change of each time against the engine alone."""
    head = ("other engine", "it runs", "vision", "prefill", "TTFT", "TPOT", "weights", "staging", "TTFT, TPOT")
    rows = [head]
    alone: Mapping[str, Any] = {}
    for row in result["rows"]:
        if row["route"] == "alone":
            alone = row
        times = [f"{1e3 * row[name]:.4g} ms" for name in ("vision_s", "prefill_s", "ttft_s", "tpot_s")]
        sizes = [f"{row[name] / 1e6:,.0f} MB" for name in ("weight_bytes", "staging_bytes")]
        verdict = "" if row is alone else ", ".join(_verdict(row[name] / alone[name]) for name in ("ttft_s", "tpot_s"))
        rows.append((row["other"], row["route"], *times, *sizes, verdict))
    return (
        f"{result['engine']} decodes, shape {result['model']}; {result['point']}. Medians of {result['rounds']} rounds "
        f"in which all take turns; a change of less than {_NOISE:.0%} counts as none.\n\n{markdown(rows)}"
    )


def _name(route: Mapping[str, Path]) -> str:
    return " and ".join(option.removesuffix("_engine") for option in route)


def _words(engine: Path) -> str:
    """Return target and kind of kernels of an engine."""
    manifest = Manifest.read(engine)
    return f"{manifest.target}, {'own' if 'custom_ops' in manifest.capabilities else 'library'} kernels"


def _row(model: Qwen3VLModel, found: Measured) -> dict[str, Any]:
    held = held_bytes(model.manifest, model.limits)

    def median(name: str) -> float:
        times = [each.phases_s.get(name.removesuffix("_s"), getattr(each, name, 0.0)) for each in found.repetitions]
        return statistics.median(times)

    return {
        **{name: median(name) for name in _TIMES},
        "weight_bytes": held[WEIGHTS],
        "staging_bytes": held.get(STAGING, 0),
    }


def _verdict(ratio: float) -> str:
    if abs(ratio - 1) < _NOISE:
        return "same"
    return f"{1 / ratio:.2f}x faster" if ratio < 1 else f"{ratio:.2f}x slower"
