"""Targets of the registry as they would be on another machine."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from engines.hardware import Hardware
from engines.kernel_sets import OWN
from engines.registry import all_targets, get
from engines.target import Availability, Target


@dataclass(frozen=True)
class Elsewhere(Target):
    """A target that is available or not, whatever this machine is."""

    found: Availability = field(default_factory=lambda: Availability(True, True))

    def availability(self, machine: Hardware | None = None) -> Availability:
        return self.found


def like(
    name: str, weights: str | None = None, *, builds: bool = True, runs: bool = True, reason: str = "for a reason"
) -> Target:
    """Return a target of the registry, available or not, with the weights and the cache of another one."""
    values = {each.name: getattr(get(name), each.name) for each in fields(Target)}
    if weights is not None:
        names = ("passes", "storage", "formats", "prefill_formats", "float_dtype", "cache_dtype", "prefill_workspace")
        values |= {each: getattr(get(weights), each) for each in names}
    return Elsewhere(**values, found=Availability(builds, runs, reason))


def by_name(target: Target) -> str:
    """Return the id of a test that is run for a target."""
    return f"{target.name}-{target.kernels}" if target.kernels else target.name


def with_all_kernels() -> list[Target]:
    """Return every target of the registry, once with each kind of kernels that it can be built with."""
    return [each for target in all_targets() for each in (target, *target.other_kernels)]


def own(name: str) -> Target:
    """Return a target with our own CPU kernels, whether this machine can run them or not."""
    (target,) = get(name).other_kernels
    assert target.kernels == OWN
    return target
