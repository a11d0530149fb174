"""`qwen3vl targets`: what this machine is, which targets it can build and run, and what a model takes on each."""

# ruff: noqa: D301 (typer keeps the line breaks of a paragraph that begins with a backspace character)

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import configs
from qwen3vl_export.cli.options import AsJson
from qwen3vl_export.cli.output import print_json, print_text
from runtime.errors import CheckpointError, UsageError
from runtime.files import is_folder
from runtime.shown import columns, shown

if TYPE_CHECKING:
    from engines.hardware import Hardware
    from engines.target import Target
    from runtime.model_config import ModelConfig


_HUB_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?")

# The authors' checkpoints; all of one size have one shape.
_RELEASED = re.compile(r"Qwen/(?P<size>Qwen3-VL-[\w-]+?)-(Instruct|Thinking)(-FP8)?")


def targets(
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Estimate the memory that this model takes: a folder, a Hub id (owner/name[@revision]), demo, "
            "demo-moe, demo-long, or a size such as qwen3-vl-2b.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show this machine and all targets: which of them it can build and run, and the reasons where it cannot.

    --model adds an estimate of the memory that an engine of each target takes, part by part, and the target that
    --target auto chooses; where a GPU is too small for all of a model, also what it could run beside the processor,
    with the commands for both engines. No weights are read. For a Hub id, config.json alone is fetched, and nothing at
    all for the released Qwen3-VL checkpoints, whose shapes are shipped with this package.

    --json prints one object: machine (cpu, cpu_features, num_cores, memory_bytes, gpus, versions, notes), own_kernels
    (isa: the instruction set in use, null if they cannot be used; isas: those that this processor runs, the best first;
    problem and remedy: why they cannot be used, null if they can), targets (each: name, description, has_fixed_sizes,
    can_build, can_run, reason) and, with --model, choice: target (what --target auto chooses, null if none fits),
    candidates in order of preference (each: target, device, parts in bytes, limit_bytes, refusal, total_bytes) and
    split (null, or two engines that fit where no target fits the GPU, the one that decodes first; each: target, device,
    runs, parts, total_bytes, limit_bytes).

    \b
    Examples:
      qwen3vl targets
      qwen3vl targets --model qwen3-vl-8b
      qwen3vl targets --model Qwen/Qwen3-VL-4B-Instruct
      qwen3vl targets --model ./Qwen3-VL-2B-Instruct --json
    """
    from engines.choose import AUTO, consider
    from engines.hardware import probe
    from engines.registry import all_targets
    from engines.split import find_split

    shape = None if model is None else model_shape(model)
    machine = probe()
    own_kernels = _own_kernels()
    rows = [_row(target, machine) for target in all_targets()]
    choice = None if shape is None else consider(machine, shape)
    chosen = None if choice is None or choice.target is None else choice.target.name
    split = None if shape is None or choice is None else find_split(machine, shape, choice)
    if as_json:
        values: dict[str, Any] = {"machine": machine.to_dict(), "own_kernels": own_kernels, "targets": rows}
        if choice is not None:
            candidates = [each.to_dict() for each in choice.candidates]
            two = None if split is None else split.to_dict()
            values["choice"] = {"target": chosen, "candidates": candidates, "split": two}
        print_json(values)
        return
    print_text("\n".join(columns([*machine.lines(), *_kernel_lines(own_kernels)])) + "\n")
    print_text(f"{_table(rows)}\n\n{_sizes_of(rows)}")
    if choice is not None:
        print(f"\n{choice.render()}\n--target {AUTO}: {chosen or 'none fits'}")
    if split is not None:
        # Of a size there is no checkpoint that the commands could name.
        print_text(f"\n{split.render('MODEL' if model in configs.names('models') else str(model))}")


def _table(rows: list[dict[str, Any]]) -> str:
    """Return a line for each target, and the reasons below it."""
    cells = [("TARGET", "BUILD", "RUN", "DESCRIPTION")]
    cells += [(row["name"], _yes(row["can_build"]), _yes(row["can_run"]), row["description"]) for row in rows]
    head, *lines = columns(cells)
    reasons = [[f"  {row['reason']}"] if row["reason"] else [] for row in rows]
    return "\n".join([head, *(text for line, reason in zip(lines, reasons, strict=True) for text in (line, *reason))])


def model_shape(model: str, *, name: str = "--model") -> ModelConfig:
    """Return the shape of a folder, of a shipped checkpoint, of a name in configs/models, or of a Hub id.

    From the Hub, or its cache, `config.json` alone is fetched; the released checkpoints have shapes in configs/models.

    Raises:
        UsageError: It is none of them.
        CheckpointError: There is no `config.json` of a Qwen3-VL, in the folder or on the Hub, or the Hub is out of
            reach.
    """
    from runtime.model_config import SUPPORTED_MODEL_TYPE, ModelConfig

    released = _RELEASED.fullmatch(model)
    size = model if released is None else released["size"].lower()
    is_size = size in configs.names("models")
    if is_size and not is_folder(model, error=CheckpointError):
        return ModelConfig.from_hf({"model_type": SUPPORTED_MODEL_TYPE, **configs.load(f"models/{size}")})
    from qwen3vl_export.checkpoint import Checkpoint
    from qwen3vl_export.sources import SHIPPED, local_path

    path = local_path(model)
    if model in SHIPPED or (path is not None and os.path.lexists(path)):
        return Checkpoint.open(model).config
    if path is not None:
        is_folder(path, error=CheckpointError)  # raises where the system does not let this user look
    match = _HUB_ID.fullmatch(model)
    if match is not None:
        return Checkpoint(_fetched_config(f"{name} {model}", match["repo"], match["revision"]).parent, model).config
    raise UsageError(
        f"{name} {shown(model)}: no such folder",
        remedy=f"give a Hugging Face folder, a Hub id, {', '.join(SHIPPED)}, or one of {_sizes()}",
    )


def _fetched_config(where: str, repo: str, revision: str | None) -> Path:
    import huggingface_hub

    from qwen3vl_export.hub import quiet_hub

    try:
        with quiet_hub():
            return Path(huggingface_hub.hf_hub_download(repo, "config.json", revision=revision))
    except Exception as error:  # the Hub client raises errors of several libraries
        raise CheckpointError(
            f"{where}: its config.json is neither here nor on the Hub ({type(error).__name__}: {error})",
            remedy=f"check the spelling and the connection, or give one of {_sizes()}",
        ) from error


def _sizes() -> str:
    return ", ".join(configs.names("models"))


def _row(target: Target, machine: Hardware) -> dict[str, Any]:
    return {
        "name": target.name,
        "description": target.description,
        "has_fixed_sizes": target.compile is not None,
        **dataclasses.asdict(target.availability(machine)),
    }


def _own_kernels() -> dict[str, Any]:
    """Return what there is to know of the own kernels, as plain values."""
    from runtime import native

    error = native.failure()
    if error is not None:
        return {"isa": None, "isas": [], "problem": error.message, "remedy": error.remedy}
    return {"isa": native.isa(), "isas": list(native.isas()), "problem": None, "remedy": None}


def _kernel_lines(own_kernels: dict[str, Any]) -> list[tuple[str, str]]:
    if own_kernels["problem"] is not None:
        reason = f"cannot be used: {own_kernels['problem']}"
        return [("own kernels", reason), ("", f"remedy: {own_kernels['remedy']}")]
    others = [each for each in own_kernels["isas"] if each != own_kernels["isa"]]
    beside = f"; this processor also runs {', '.join(others)}" if others else ""
    return [("own kernels", f"{own_kernels['isa']}{beside}")]


def _sizes_of(rows: list[dict[str, Any]]) -> str:
    """Return how many sequences, and of what length, an engine of each target runs."""
    families = dict.fromkeys(row["name"].rsplit("-", 1)[0] + "-*" for row in rows if row["has_fixed_sizes"])
    return (
        "A decode step takes any number of sequences, and a sequence may have any length that the model was trained "
        f"for; engines of {', '.join(families)} take those that they were built for (--max-batch, --max-context)."
    )


def _yes(value: bool) -> str:
    return "yes" if value else "no"
