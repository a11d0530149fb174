"""The limits on an engine's errors, of configs/tolerances.toml."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import configs
from runtime.errors import ParityError
from runtime.manifest import Manifest


def limits_of(*manifests: Manifest) -> tuple[str, dict[str, float]]:
    """Return what engines compute in, as the report calls it, and the widest of the limits on their errors."""
    names, limits = zip(*map(_limits_of, manifests), strict=True)
    return " and ".join(dict.fromkeys(names)), functools.reduce(wider_limits, limits)


def _limits_of(manifest: Manifest) -> tuple[str, dict[str, float]]:
    precision, tolerances = str(manifest.capabilities["precision"]), configs.load("tolerances")
    if precision not in tolerances:
        raise ParityError(f"configs/tolerances.toml has no table [{precision}]", remedy="add it, with its reasons")
    if (bits := manifest.capabilities.get("cache_bits")) is None:
        return precision, tolerances[precision]
    cache = f"cache_int{bits}"
    return f"{precision} with {cache}", wider_limits(tolerances[precision], tolerances[cache])


def wider_limits(limits: Mapping[str, float], others: Mapping[str, float]) -> dict[str, float]:
    """Return `limits`, each replaced by that of `others` if more passes it."""
    chosen = {name: (min if name.endswith("_agreement") else max)(limits[name], others[name]) for name in others}
    return {**limits, **chosen}
