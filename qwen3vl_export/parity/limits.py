"""The limits on an engine's errors, of configs/tolerances.toml."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import configs
from runtime.cache_types import cache_name
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
    if (cache := cache_name(manifest.capabilities)) is None:
        return precision, tolerances[precision]
    return f"{precision} with {cache}", wider_limits(tolerances[precision], tolerances[cache])


def wider_limits(limits: Mapping[str, float], others: Mapping[str, float]) -> dict[str, float]:
    """Return all limits; of those that both have, the one that lets more pass."""
    chosen = {
        name: (min if name.endswith("_agreement") else max)(limits.get(name, other), other)
        for name, other in others.items()
    }
    return {**limits, **chosen}
