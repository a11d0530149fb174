"""`qwen3vl targets`: what this machine is, and which targets it can build and run."""

# ruff: noqa: D301 (typer keeps the line breaks of a paragraph that begins with a backspace character)

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwen3vl_export.cli.output import columns, print_json

if TYPE_CHECKING:
    from engines.target import Target


def targets(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON value on stdout.")] = False) -> None:
    """List the targets: which of them this machine can build and run, and why not otherwise.

    --json prints a list of objects: name, description, can_build, can_run, reason.

    \b
    Examples:
      qwen3vl targets
      qwen3vl targets --json
    """
    from engines.registry import all_targets

    rows = [_target_row(target) for target in all_targets()]
    if as_json:
        print_json(rows)
        return
    cells = [("TARGET", "BUILD", "RUN", "DESCRIPTION")]
    cells += [(row["name"], _yes(row["can_build"]), _yes(row["can_run"]), row["description"]) for row in rows]
    lines = columns(cells)
    print(lines[0])
    for row, line in zip(rows, lines[1:], strict=True):
        print(line)
        if row["reason"]:
            print(f"  {row['reason']}")


def _target_row(target: Target) -> dict[str, Any]:
    return {
        "name": target.name,
        "description": target.description,
        **dataclasses.asdict(target.availability()),
    }


def _yes(value: bool) -> str:
    return "yes" if value else "no"
