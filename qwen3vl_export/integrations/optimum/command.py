"""The options of `optimum-cli export qwen3vl`: those of `qwen3vl-export`, some of them in optimum's words.

They are made of that command's own parameters, and what is given is handed to it as its arguments: it does the work,
with its progress, its messages and its exit codes.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer.main

from qwen3vl_export.cli.errors import run_app
from qwen3vl_export.cli.export import app
from runtime.errors import UsageError
from runtime.shown import shown

WORDS: Mapping[str, tuple[str, ...]] = {
    "model": ("-m", "--model"),
    "output": ("output",),
    "cache_dir": ("--cache_dir", "--cache-dir"),
}
"""What optimum calls a parameter of ours; the others keep their names."""

FIXED: Mapping[str, tuple[str, ...]] = {
    "task": ("image-text-to-text", "auto"),
    "framework": ("pt",),
    "library": ("transformers",),
}
"""Options of optimum's that have no choice here, and what they may say."""

_OF_TARGETS = ("target", "weight_format", "device")
_NOT_OFFERED = ("help", "install_completion", "show_completion")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add all options to a parser; what is not given is None afterwards."""
    for each in parameters():
        kind: dict[str, Any] = {"dest": each.name, "default": None}
        if each.name == "model":
            kind["required"] = True
        if getattr(each, "is_flag", False):
            kind["action"] = argparse.BooleanOptionalAction if each.secondary_opts else "store_true"
        elif getattr(each, "multiple", False):
            kind["action"] = "append"
        words = WORDS.get(each.name, tuple(each.opts))
        if not words[0].startswith("-"):
            del kind["dest"]
            kind["nargs"] = "?"
        if "action" not in kind or kind["action"] == "append":
            kind["metavar"] = each.name.upper()
        parser.add_argument(*words, help=(each.help or "").replace("%", "%%"), **kind)
    group = parser.add_argument_group("options of optimum")
    for name, values in FIXED.items():
        group.add_argument(f"--{name}", metavar=name.upper(), help=f"{' or '.join(values)}; there is no other.")
    group.add_argument(
        *("--weight-format", "--dtype"),
        metavar="FORMAT",
        help="Choose the target whose weights have this format: the last part of the names that `qwen3vl targets` "
        "lists, such as fp32, fp16, int8 or int4. In place of --target.",
    )
    group.add_argument("--device", help="Choose among the targets of this device: cpu or cuda. In place of --target.")
    group.add_argument("--trust-remote-code", action="store_true", help="Refused: no code of a checkpoint is run.")
    group.add_argument("--debug", action="store_true", help="Add the Python traceback to an error.")


def run(values: argparse.Namespace) -> None:
    """Run `qwen3vl-export` with what was given; always raises SystemExit."""
    plain, model = arguments(values), ["--", values.model]
    run_app(app, plain, more=lambda: [*_target_arguments(values), *model])


def parameters() -> Sequence[Any]:
    """Return the parameters of `qwen3vl-export` that can be given here."""
    return [each for each in typer.main.get_command(app).params if each.name not in _NOT_OFFERED]


def arguments(values: argparse.Namespace) -> list[str]:
    """Return what was given as arguments of `qwen3vl-export`, but the model, and what may choose a target."""
    found = ["--debug"] if values.debug else []
    for each in parameters():
        value = getattr(values, each.name)
        if value is None or each.name in ("model", "target"):
            continue
        word = each.opts[-1]
        if isinstance(value, bool):
            found.append(word if value else each.secondary_opts[-1])
            continue
        for item in value if isinstance(value, list) else [value]:
            found.append(f"{word}={item}")
    return found


def _target_arguments(values: argparse.Namespace) -> list[str]:
    """Check what has no choice here, and return the arguments that say the target.

    Raises:
        UsageError: An option is refused, or two of them exclude each other.
        Qwen3VLError: As `target_for`, and as opening the checkpoint.
    """
    if values.trust_remote_code:
        raise UsageError(
            "--trust-remote-code: the model is defined in this package, and no code of a checkpoint is ever run",
            remedy="leave it out",
        )
    for name, allowed in FIXED.items():
        if getattr(values, name) not in (None, *allowed):
            raise UsageError(
                f"--{name} {shown(getattr(values, name))}: Qwen3-VL is exported for {allowed[0]} alone",
                remedy=f"leave it out, or pass {' or '.join(allowed)}",
            )
    given = [f"--{name.replace('_', '-')}" for name in _OF_TARGETS if getattr(values, name) is not None]
    if values.target is not None and len(given) > 1:
        raise UsageError(f"{given[0]} and {given[1]} both say the target", remedy="give one of them")
    if values.bundle is not None and given and values.target is None:
        raise UsageError(f"{given[0]} is a target's, and a bundle is for none", remedy=f"leave {given[0]} out")
    if values.target is not None:
        return [f"--target={values.target}"]
    if not given:
        return []
    from qwen3vl_export.checkpoint import Checkpoint
    from qwen3vl_export.integrations.optimum.target import target_for

    def config() -> Any:
        return Checkpoint.open(values.model, None if values.cache_dir is None else Path(values.cache_dir)).config

    return [f"--target={target_for(values.weight_format, values.device, config)}"]
