"""`python -m benchmarks routed`: what it gains to let another engine run the vision tower, prompts, or both."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import typer

from benchmarks import measure, options
from benchmarks.result_files import RESULTS, markdown, write
from qwen3vl_export.bench.measure import messages
from qwen3vl_export.bench.points import Point
from runtime import generation
from runtime.contract import join_embeds, no_visual_embeds
from runtime.manifest import Manifest
from runtime.memory import STAGING, WEIGHTS
from runtime.model import Qwen3VLModel
from runtime.preparation import Prepared
from runtime.route import possible_routes
from runtime.scheduling.plan import held_bytes

_T = TypeVar("_T")
_STEPS = 8
_MAX_CONTEXT = 1024
# Times nearer to each other than this are not told apart: medians of the vision tower by the same kernels lay up to 7 %
# apart on a busy machine.
_NOISE = 0.08


def routed(
    engine: Annotated[Path, typer.Argument(help="Engine that decodes.")],
    others: Annotated[list[Path], typer.Argument(help="Engines of the same checkpoint that run parts for it.")],
    model: options.Model = "qwen3-vl-2b",
    prompt: Annotated[int, typer.Option(help="Tokens of the text of a prompt.")] = 200,
    image: Annotated[int, typer.Option(help="Width and height of the image.")] = 320,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each engine.")] = 1,
    rounds: Annotated[int, typer.Option(min=2, help="Turns of each, after one of warm-up.")] = 5,
    results: options.Results = RESULTS,
) -> None:
    """Time an engine alone, each of the others alone, and every route between them, in turns.

    Times are those of the processor, over all threads: on one thread they hardly depend on what else the machine does.
    Those of a route include the rows' way from one KV cache to the other. All are open at once, so the machine has to
    hold their weights together.
    """
    machine = measure.environment()
    point = Point(prompt, _STEPS + 1, image_size=(image, image), images=1)
    rows: list[dict[str, Any]] = []
    for other in others:
        ways: dict[str, tuple[Path, dict[str, Any]]] = {"nothing": (engine, {})}
        ways |= {_name(route): (engine, route) for route in possible_routes(engine, other)}
        ways["everything"] = other, {}
        with ExitStack() as stack:
            opened = {
                name: stack.enter_context(_open(folder, threads, route)) for name, (folder, route) in ways.items()
            }
            found = _take_turns(opened, point, rounds)
            rows += [{"other": _words(other), "runs": name, **_row(opened[name], found[name])} for name in ways]
    result = {
        "model": model,
        "engine": _words(engine),
        "point": point.name,
        "threads": threads,
        "rounds": rounds,
        "rows": rows,
        "environment": machine,
    }
    write(f"routed-{model}-{Manifest.read(engine).target}", result, table(result), results)


def table(result: Mapping[str, Any]) -> str:
    """Return a row for each route, with the change of each time against the engine alone."""
    rows = [("other engine", "it runs", "vision", "prefill", "first token", "step", "weights", "staging")]
    alone: Mapping[str, Any] = {}
    for row in result["rows"]:
        alone = row if row["runs"] == "nothing" else alone
        first, first_alone = (each["vision"]["median_s"] + each["prefill"]["median_s"] for each in (row, alone))
        step, step_alone = row["step"]["median_s"], alone["step"]["median_s"]
        times = [f"{1e3 * row[name]['median_s']:.4g} ms" for name in ("vision", "prefill")]
        times.append(f"{1e3 * first:.4g} ms{_change(first, first_alone)}")
        times.append(f"{1e3 * step:.3g} ms{_change(step, step_alone)}")
        sizes = [f"{row[name] / 1e6:,.0f} MB" for name in ("weight_bytes", "staging_bytes")]
        rows.append((row["other"], row["runs"], *times, *sizes))
    return (
        f"{result['engine']}, runs the rest; shape {result['model']}, {result['point']}, threads: {result['threads']}. "
        f"Processor time, medians of {result['rounds']} rounds in which all take turns; in brackets the factor to the "
        f"engine alone, = within {_NOISE:.0%}.\n\n{markdown(rows)}"
    )


def _change(found: float, alone: float) -> str:
    if found == alone:
        return ""
    return " (=)" if abs(found / alone - 1) < _NOISE else f" ({found / alone:.2f})"


def _name(route: Mapping[str, Path]) -> str:
    words = {"vision_engine": "vision tower", "prefill_engine": "prompts"}
    return " and ".join(words[option] for option in route)


def _words(engine: Path) -> str:
    """Return target and kind of kernels of an engine."""
    manifest = Manifest.read(engine)
    return f"{manifest.target}, {'own' if 'custom_ops' in manifest.capabilities else 'library'} kernels"


def _open(folder: Path, threads: int, route: Mapping[str, Any]) -> Qwen3VLModel:
    one = {"max_sequences": 1, "kept_sequences": 0, "vision_cache_bytes": 0}
    return Qwen3VLModel.from_engine(folder, threads=threads, tuned=False, max_context=_MAX_CONTEXT, **one, **route)


def _take_turns(models: Mapping[str, Qwen3VLModel], point: Point, rounds: int) -> dict[str, list[dict[str, float]]]:
    """Time each model once a round, every second round backwards; the first round is left out."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in models}
    for index in range(rounds + 1):
        for name in list(models) if index % 2 else list(models)[::-1]:
            times = _times(models[name], models[name].prepare(messages(point, index)))
            found[name] += [times] if index else []
    return found


def _times(model: Qwen3VLModel, prepared: Prepared) -> dict[str, float]:
    """Return processor seconds of the vision tower, of the prompt, and of a decode step."""
    session, num_tokens = model.session, len(prepared.prompt.input_ids)
    inputs = [model.preparation.vision_inputs(each) for each in prepared.images]
    vision_s, embeds = _timed(lambda: join_embeds([session.vision(each) for each in inputs]))
    cache, chunk = session.new_cache(num_tokens + _STEPS + 1), model.limits.prefill_chunk
    prompt = prepared.decoder_inputs(embeds)
    prefill_s, logits = _timed(lambda: generation.prefill(session, cache, prompt, chunk=chunk)[-1])
    none, delta = no_visual_embeds(model.config), prepared.positions.delta
    steps = generation.decode_steps(session, cache, logits, num_tokens, delta, none, lambda each: int(np.argmax(each)))
    next(steps)  # of the prompt's logits
    steps_s, _ = _timed(lambda: [next(steps) for _ in range(_STEPS)])
    return {"vision": vision_s, "prefill": prefill_s, "step": steps_s / _STEPS}


def _timed(work: Callable[[], _T]) -> tuple[float, _T]:
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def _row(model: Qwen3VLModel, found: list[dict[str, float]]) -> dict[str, Any]:
    held = held_bytes(model.manifest, model.limits)
    times = {name: measure.summarise([each[name] for each in found]) for name in found[0]}
    return {**times, "weight_bytes": held[WEIGHTS], "staging_bytes": held.get(STAGING, 0)}
