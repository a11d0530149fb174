"""Time every form in which ONNX Runtime's CPU kernels compute a mixture of experts: `python -m benchmarks experts`.

One layer with random codes and its own router, at one token (each a new one, so that its experts come from memory) and
at prompts. The forms take turns, so that another load on the machine meets all of them.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks import measure, report, synthetic
from benchmarks.expert_forms import FORMS, GATHERED, KERNEL, Shape, open_form, random_weights
from runtime.errors import UsageError
from runtime.model_config import ModelConfig

TOKENS = (1, 16, 128, 512)
_FEW_TOKENS = 16
_CALLS_OF_ONE = 20  # calls at one token in a turn
# Threads of the form before spin on after its last call: without a pause QMoE took 27 ms, not 13, at 16 tokens.
_SPINNING_S = 0.2
# The forms that round their inputs to 8 bits differ from the others by that.
_ROUNDING = 0.05


def run(shape: Shape, forms: Sequence[str], rounds: int, threads: int, counts: Sequence[int]) -> dict[str, Any]:
    """Time some forms at each number of tokens of a call and compare their outputs.

    Returns:
        Of each form, by the number of tokens: median, extremes and all times in seconds.
    """
    weights = random_weights(shape)
    seconds: dict[str, dict[str, list[float]]] = {form: {} for form in forms}
    random = np.random.default_rng(1)
    with tempfile.TemporaryDirectory() as folder:
        sessions = {form: open_form(form, shape, weights, Path(folder), threads) for form in forms}
        for count in counts:
            # It looks up the weights of every token, in float32.
            fitting = {form: each for form, each in sessions.items() if form != GATHERED or count <= _FEW_TOKENS}
            example = random.standard_normal((count, shape.hidden), np.float32)
            outputs = [session.run(None, {"x": example})[0] for session in fitting.values()]
            for form, output in zip(fitting, outputs, strict=True):
                apart = np.linalg.norm(output - outputs[0]) / np.linalg.norm(outputs[0])
                assert apart < _ROUNDING, f"{form}: {apart:.3f} from the first form"
            for _ in range(rounds):
                for form, session in fitting.items():
                    time.sleep(_SPINNING_S)
                    for _ in range(_CALLS_OF_ONE if count == 1 else 1):
                        x = random.standard_normal((count, shape.hidden), np.float32)
                        start = time.perf_counter()
                        session.run(None, {"x": x})
                        seconds[form].setdefault(str(count), []).append(time.perf_counter() - start)
    return {form: {count: measure.summarise(times) for count, times in each.items()} for form, each in seconds.items()}


def table(result: Mapping[str, Any]) -> str:
    """Return the body of the result's page."""
    counts = list(next(iter(result["forms"].values())))
    shape = result["shape"]
    is_float = shape["bits"] == 32
    rows = [["form, ms", *(f"{count} token{'s' * (count != '1')}" for count in counts), "GB/s at 1", "% of memory's"]]
    for form, times in result["forms"].items():
        cells = [f"{1e3 * times[count]['median_s']:.2f}" if count in times else "" for count in counts]
        rate = result["token_bytes"] / times["1"]["median_s"]
        label = "MoE" if is_float and form == KERNEL else form
        rows.append([label, *cells, f"{rate / 1e9:.1f}", f"{100 * rate / result['memory_bytes_per_s']:.0f}"])
    weights = "float32" if is_float else f"{shape['bits']} bits, blocks of {shape['block']}"
    return (
        f"One layer of {result['model']}, {weights}, {result['threads']} "
        f"threads; medians of {result['rounds']} turns, at one token of {_CALLS_OF_ONE} calls in each. One token reads "
        f"{result['token_bytes'] / 1e6:.1f} MB of weights; reading memory reached "
        f"{result['memory_bytes_per_s'] / 1e9:.1f} GB/s in the same run.\n\n{report.table(rows)}"
    )


def experts(
    model: Annotated[str, typer.Option(help="Shape in configs/models.")] = "qwen3-vl-30b-a3b",
    bits: Annotated[int, typer.Option(help="4, 8 or 32.")] = 4,
    block: Annotated[int, typer.Option(help="Weights of a block.")] = 128,
    form: Annotated[list[int] | None, typer.Option(help="Number of a form, from 0; repeat for several.")] = None,
    rounds: Annotated[int, typer.Option(help="Turns of each form.")] = 7,
    threads: int = 2,
    results: Annotated[Path, typer.Option(help="Folder for the JSON file and the table.")] = report.RESULTS,
) -> None:
    """Time the forms of a mixture of experts, one layer."""
    text = ModelConfig.from_hf(synthetic.hf_config(model)).text
    if text.experts is None:
        raise UsageError(f"{model} has no experts", remedy="--model qwen3-vl-30b-a3b")
    environment = measure.environment()
    shape = Shape(
        text.experts.num_experts, text.experts.top_k, text.hidden_size, text.experts.intermediate_size, bits, block
    )
    chosen = [name for i, name in enumerate(FORMS) if not form or i in form]
    result = {
        "model": model,
        "shape": asdict(shape),
        "threads": threads,
        "rounds": rounds,
        "token_bytes": shape.token_bytes(),
        "memory_bytes_per_s": _memory_bytes_per_s(threads),
        "forms": run(shape, chosen, rounds, threads, TOKENS),
        "environment": environment,
    }
    path = report.write(f"experts-{model}-{bits}-bits", result, results)
    typer.echo(path.read_text(encoding="utf-8"))


def _memory_bytes_per_s(threads: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ceilings.json"
        measure.run_child([sys.executable, "-m", "benchmarks.compare.ceilings", str(threads), str(path)])
        return float(json.loads(path.read_text(encoding="utf-8"))["memory_bytes_per_s"])
