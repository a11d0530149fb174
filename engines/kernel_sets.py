"""Choose the kernels that a target is built with, where there are several kinds."""

from __future__ import annotations

from collections.abc import Callable

from engines.target import Target
from runtime.errors import TargetError, UsageError
from runtime.model_config import ModelConfig

OWN, ORT = "own", "ort"
"""Our own kernels for CPUs (docs/cpu_kernels.md), and those of ONNX Runtime."""


def with_kernels(
    target: Target,
    name: str | None,
    config: ModelConfig | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Target:
    """Return a target with the kernels that were asked for, or else with the best that this machine can use.

    Args:
        target: As the registry has it.
        name: Kernels that were asked for; None for the best.
        config: Shape of the model, which kernels may not take; they are not asked if it is not given.
        say: Told which kernels are not taken although they would be better, and why.

    Raises:
        UsageError: The target has no kernels of that name.
        TargetError: They cannot be used here.
    """
    sets = {each.kernels: each for each in (*target.other_kernels, target)}
    if name is not None:
        if name not in sets or not target.kernels:
            known = ", ".join(sets) if target.kernels else "none to choose"
            raise UsageError(
                f"--kernels {name}: {target.name} has no such kernels",
                remedy=f"its kernels: {known}; leave --kernels out",
            )
        problem = _problem(sets[name])
        if problem:
            raise TargetError(f"--kernels {name}: {problem}", remedy=f"mend that, or give --kernels {target.kernels}")
        return sets[name]
    for each in target.other_kernels:
        problem = _problem(each) or _drawback(each) or _misfit(each, config)
        if not problem:
            return each
        say(f"note: {target.name} is built with --kernels {target.kernels}, not {each.kernels}: {problem}")
    return target


def _problem(target: Target) -> str:
    return "" if target.check_kernels is None else target.check_kernels()


def _drawback(target: Target) -> str:
    return "" if target.kernels_drawback is None else target.kernels_drawback()


def _misfit(target: Target, config: ModelConfig | None) -> str:
    """Return why kernels do not take a model, empty if they do."""
    if config is None or target.check_model is None:
        return ""
    try:
        target.check_model(config)
    except TargetError as error:
        return error.message
    return ""
