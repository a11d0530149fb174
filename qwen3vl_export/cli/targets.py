"""`qwen3vl targets`: what this machine is, which targets it can build and run, and what a model takes on each."""

# ruff: noqa: D301 (typer keeps the line breaks of a paragraph that begins with a backspace character)

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import configs
from qwen3vl_export.cli.output import columns, print_json
from runtime.errors import UsageError

if TYPE_CHECKING:
    from engines.target import Target
    from runtime.model_config import ModelConfig


def targets(
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Estimate what this model takes: a folder, demo, demo-moe, or a size such as qwen3-vl-2b.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON value on stdout.")] = False,
) -> None:
    """Show this machine and the targets: which of them it can build and run, and why not otherwise.

    --model adds the memory that an engine of each target takes, by part, and what --target auto of the export makes of
    it; the weights of a folder are not read.

    --json prints one object: machine (cpu, cpu_features, num_cores, memory_bytes, gpus, versions, notes), targets
    (each: name, description, can_build, can_run, reason) and, with --model, choice: target (of --target auto, null if
    none fits) and candidates in order of preference (each: target, device, parts in bytes, limit_bytes, refusal,
    total_bytes).

    \b
    Examples:
      qwen3vl targets
      qwen3vl targets --model qwen3-vl-8b
      qwen3vl targets --model ./Qwen3-VL-2B-Instruct --json
    """
    from engines.choose import AUTO, consider
    from engines.hardware import probe
    from engines.registry import all_targets

    shape = None if model is None else model_shape(model)
    machine = probe()
    rows = [_row(target) for target in all_targets()]
    choice = None if shape is None else consider(machine, shape)
    chosen = None if choice is None or choice.target is None else choice.target.name
    if as_json:
        values: dict[str, Any] = {"machine": machine.to_dict(), "targets": rows}
        if choice is not None:
            values["choice"] = {"target": chosen, "candidates": [each.to_dict() for each in choice.candidates]}
        print_json(values)
        return
    print("\n".join(columns(machine.lines())), end="\n\n")
    cells = [("TARGET", "BUILD", "RUN", "DESCRIPTION")]
    cells += [(row["name"], _yes(row["can_build"]), _yes(row["can_run"]), row["description"]) for row in rows]
    lines = columns(cells)
    print(lines[0])
    for row, line in zip(rows, lines[1:], strict=True):
        print(line)
        if row["reason"]:
            print(f"  {row['reason']}")
    if choice is not None:
        print(f"\n{choice.render()}\n--target {AUTO}: {chosen or 'none fits'}")


def model_shape(model: str) -> ModelConfig:
    """Return the shape of a folder, of `demo`, or of a name in configs/models; nothing is downloaded.

    Raises:
        UsageError: It is none of them.
        CheckpointError: The folder has no `config.json` of a Qwen3-VL.
    """
    from runtime.model_config import SUPPORTED_MODEL_TYPE, ModelConfig

    if not Path(model).expanduser().is_dir() and model in configs.names("models"):
        return ModelConfig.from_hf({"model_type": SUPPORTED_MODEL_TYPE, **configs.load(f"models/{model}")})
    from qwen3vl_export.checkpoint import DEMO, DEMO_MOE, Checkpoint

    if Path(model).expanduser().is_dir() or model in (DEMO, DEMO_MOE):
        return Checkpoint.open(model).config
    raise UsageError(
        f"--model {model}: no such folder",
        remedy=f"give a Hugging Face folder, {DEMO}, {DEMO_MOE}, or one of {', '.join(configs.names('models'))}",
    )


def _row(target: Target) -> dict[str, Any]:
    return {
        "name": target.name,
        "description": target.description,
        **dataclasses.asdict(target.availability()),
    }


def _yes(value: bool) -> str:
    return "yes" if value else "no"
