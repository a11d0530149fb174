"""The limits on an engine's errors, of configs/tolerances.toml."""

from __future__ import annotations

from collections.abc import Mapping

import configs
from runtime.errors import ParityError
from runtime.manifest import Manifest


def limits_of(manifest: Manifest) -> tuple[str, dict[str, float]]:
    """Return what an engine computes in, as the report calls it, and the limits on its errors."""
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
