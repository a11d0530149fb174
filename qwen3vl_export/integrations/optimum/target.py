"""Choose a target by what optimum's users say of an engine: the format of its weights, and the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from engines.choose import AUTO, choose_target
from engines.hardware import Hardware, probe
from engines.registry import all_targets
from engines.target import CPU, GPU
from runtime.errors import CapacityError, TargetError, UsageError
from runtime.shown import shown

if TYPE_CHECKING:
    from engines.target import Target
    from runtime.model_config import ModelConfig

DEVICES = {"cpu": CPU, "cuda": GPU, "gpu": GPU}
"""What `--device` may be, and what a target calls it."""


def target_for(
    weight_format: str | None,
    device: str | None,
    config: Callable[[], ModelConfig],
    *,
    hardware: Hardware | None = None,
) -> str:
    """Return the name of the target that suits the machine best among those of a format and a device.

    Args:
        weight_format: Last part of a target's name, such as int4; None for any that is not only taken by name.
        device: A key of `DEVICES`; None for any.
        config: Reads the shape of the model, which has to fit; not called where nothing is asked for.
        hardware: What the machine is; probed if not given.

    Raises:
        UsageError: No target has the format on the device.
        TargetError: This machine builds and runs none of them.
        CapacityError: None of them fits.
    """
    if weight_format is None and device is None:
        return AUTO
    targets = _matching(weight_format, device)
    try:
        chosen = choose_target(hardware or probe(), config(), targets=targets).target
    except (TargetError, CapacityError) as error:
        names = ", ".join(target.name for target in targets)
        raise type(error)(
            f"{_asked(weight_format, device)}: {error.message}",
            remedy=f"to build for another machine, pass --target with one of {names}; `qwen3vl targets` says what each "
            "needs",
        ) from error
    assert chosen is not None, "choose_target raises otherwise"
    return chosen.name


def _matching(weight_format: str | None, device: str | None) -> list[Target]:
    if device is not None and device not in DEVICES:
        raise UsageError(f"--device {shown(device)} is not known", remedy=f"pass one of {', '.join(DEVICES)}")
    on_device = [each for each in all_targets() if device is None or each.device == DEVICES[device]]
    if weight_format is None:
        return on_device
    # Who names the format asks for it by name.
    found = [replace(each, by_name_only="") for each in on_device if _format_of(each) == weight_format]
    if not found:
        formats = ", ".join(sorted({_format_of(each) for each in on_device}))
        raise UsageError(
            f"{_asked(weight_format, device)}: no target has weights in that format", remedy=f"pass one of {formats}"
        )
    return found


def _format_of(target: Target) -> str:
    """Return the last part of its name; `precision` names tolerances, which two formats may have one of."""
    return target.name.rpartition("-")[2]


def _asked(weight_format: str | None, device: str | None) -> str:
    words = [] if weight_format is None else [f"--weight-format {shown(weight_format)}"]
    return " ".join(words if device is None else [*words, f"--device {device}"])
