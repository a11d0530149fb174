"""What the host adds to a decode step: `python -m benchmarks overhead ENGINE`, of an engine of ONNX Runtime."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import measure, report
from benchmarks.speculation import Engine

_WARMUP = 5


def measure_steps(engine: Engine, steps: int) -> dict[str, Any]:
    """Time turns of the generation loop, and in each the call of ONNX Runtime.

    Args:
        engine: The engine, with the positions that its cache holds before the first step.
        steps: Timed steps, behind a few of warm-up.

    Returns:
        Of the steps, of the calls inside, and of the differences: median, extremes and all values in seconds.
    """
    from unittest import mock

    import onnxruntime as ort

    run = ort.InferenceSession.run_with_iobinding
    inside: list[float] = []

    def timed(session: ort.InferenceSession, *arguments: Any) -> None:
        start = time.perf_counter()
        run(session, *arguments)
        inside.append(time.perf_counter() - start)

    contender = engine.contender([0] * (steps + _WARMUP + 1), None)
    whole = []
    with mock.patch.object(ort.InferenceSession, "run_with_iobinding", timed):
        for _ in range(steps + _WARMUP):
            before = contender.seconds
            contender.step()
            whole.append(contender.seconds - before)
    assert len(inside) == len(whole), "a step is one call"
    outside = [step - call for step, call in zip(whole, inside, strict=True)]
    parts = {"step": whole, "inside": inside, "outside": outside}
    return {name: measure.summarise(seconds[_WARMUP:]) for name, seconds in parts.items()}


def overhead(
    engine: Annotated[Path, typer.Argument(help="Engine folder; random weights will do.")],
    name: Annotated[str, typer.Option(help="Names the result: overhead-NAME.")] = "",
    threads: int = 2,
    num_cached: Annotated[int, typer.Option(help="Positions in the cache before the first step.")] = 512,
    steps: int = 200,
    results: Annotated[Path, typer.Option(help="Folder for the JSON file and the table.")] = report.RESULTS,
) -> None:
    """Measure what of a decode step is spent outside ONNX Runtime."""
    environment = measure.environment()
    opened = Engine(engine, threads, num_cached)
    result = {"target": opened.target, "threads": threads, "num_cached": num_cached}
    result |= measure_steps(opened, steps) | {"environment": environment}
    path = report.write(f"overhead-{name or engine.resolve().name}", result, results)
    typer.echo(path.read_text(encoding="utf-8"))
