"""`python -m benchmarks structured`: what a format costs for each token, and whether all answers follow it."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import measure, options
from benchmarks.result_files import RESULTS, markdown, write
from runtime.answer import Generation
from runtime.errors import Qwen3VLError, UsageError
from runtime.generation_config import GenerationOptions
from runtime.model import Qwen3VLModel
from runtime.structured.compiler import Compiler

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "count": {"type": "integer", "minimum": 0, "maximum": 999},
        "kind": {"enum": ["a", "b"]},
        "flags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "count", "kind", "flags"],
    "additionalProperties": False,
}
# Each takes any number of tokens, so that all answers have as many as the plain ones.
_LONG = {"type": "array", "items": {"type": "integer"}, "minItems": 1000}
_MASK_STEPS = 200


def structured(
    engine: Path, answers: int = 500, repeats: int = 7, tokens: int = 32, results: options.Results = RESULTS
) -> None:
    """Count valid answers of an engine, and time tokens with and without a schema in turns."""
    model = Qwen3VLModel.from_engine(engine, tuned=False)
    result: dict[str, Any] = {
        "environment": measure.environment(),
        "engine": model.manifest.source.get("name"),
        "valid": valid_answers(model, answers) if answers else None,
        "step": step_times(model, repeats, tokens),
        "mask": mask_times(model),
    }
    write("structured", result, table(result), results)


def valid_answers(model: Qwen3VLModel, num_answers: int) -> dict[str, int]:
    """Return how many answers were made and how many follow the schema: half greedy prompts, half hot samples."""
    prompts = [f"Item {i}" for i in range(num_answers)]
    base = model.defaults.replace(response_format=SCHEMA, max_new_tokens=min(200, model.max_context - 32))
    hot = [base.replace(do_sample=True, temperature=1.5, top_k=0, seed=i) for i in range(num_answers)]
    chosen: list[GenerationOptions] = [hot[i] if i % 2 else base.replace(do_sample=False) for i in range(num_answers)]
    outcomes = model.generate_batch(prompts, chosen)
    return {
        "made": len(outcomes),
        "valid": sum(isinstance(each, Generation) and follows(each.text) for each in outcomes),
    }


def follows(text: str) -> bool:
    """Return whether a text follows `SCHEMA`."""
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return (
        isinstance(value, dict)
        and value.keys() == SCHEMA["properties"].keys()
        and isinstance(value["name"], str)
        and len(value["name"]) <= 8
        and type(value["count"]) is int
        and 0 <= value["count"] <= 999
        and value["kind"] in ("a", "b")
        and isinstance(value["flags"], list)
        and len(value["flags"]) <= 3
        and all(type(each) is bool for each in value["flags"])
    )


def step_times(model: Qwen3VLModel, repeats: int, num_tokens: int) -> dict[str, Any]:
    """Return the seconds of a token after the first, with and without a schema, one run of each in turns."""
    found: dict[str, list[float]] = {"plain": [], "schema": []}
    for run in range(repeats + 1):
        for name, form in (("plain", None), ("schema", _LONG)):
            answer = model.generate("Hi", max_new_tokens=num_tokens, eos_token_ids=(), response_format=form)
            if run:  # the first warms up
                found[name].append(answer.stats.tpot_s)
    medians = {name: statistics.median(values) for name, values in found.items()}
    return {"all_s": found, "median_s": medians, "ratio": medians["schema"] / medians["plain"]}


def mask_times(model: Qwen3VLModel) -> dict[str, float]:
    """Return the cost of a format without the engine: seconds to compile, microseconds of a token's mask."""
    started = time.perf_counter()
    compiler = Compiler(model.tokenizer, model.config.text.vocab_size)
    wanted = model.defaults.replace(response_format=_LONG).response_format
    assert wanted is not None
    make = compiler.compile(wanted, model.defaults.eos_token_ids)
    compiled = time.perf_counter()
    constraint, logits = make(None), np.zeros(model.config.text.vocab_size, np.float32)
    rng, took = np.random.default_rng(0), []
    for _ in range(_MASK_STEPS):
        start = time.perf_counter()
        masked = constraint.mask(logits)
        took.append(time.perf_counter() - start)
        try:
            constraint.accept(int(rng.choice(np.flatnonzero(np.isfinite(masked)))))
        except Qwen3VLError as error:
            raise UsageError("a token that was allowed was refused", remedy="report it") from error
    return {"compile_s": compiled - started, "median_us": statistics.median(took) * 1e6, "max_us": max(took) * 1e6}


def table(result: Mapping[str, Any]) -> str:
    """Return the figures."""
    step, mask, valid = result["step"], result["mask"], result["valid"]
    rows = [("figure", "value")]
    if valid is not None:
        rows.append(("valid answers", f"{valid['valid']} of {valid['made']}"))
    rows += [
        ("token without a format, ms", f"{step['median_s']['plain'] * 1e3:.2f}"),
        ("token with a schema, ms", f"{step['median_s']['schema'] * 1e3:.2f}"),
        ("ratio", f"{step['ratio']:.3f}"),
        ("mask of a token, µs", f"{mask['median_us']:.0f}"),
        ("vocabulary and schema, s", f"{mask['compile_s']:.2f}"),
    ]
    return markdown(rows)
