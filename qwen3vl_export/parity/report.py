"""What a comparison found: single checks, and the report as plain values and as a table."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from qwen3vl_export.routing import RouterStatistics
from runtime.shown import columns

_LAYER_NOTE = (
    "Keys and values of a layer show what came into it. What else is wrong in a layer shows in the rows of the next "
    "one, or in the logits if it is the last."
)


@dataclass(frozen=True)
class Check:
    """One comparison: `value` must be at most `limit`, or at least it where `is_minimum`; no limit is only reported."""

    case: str
    name: str
    value: float
    limit: float | None = None
    is_minimum: bool = False
    layer: int | None = None
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether the value is within its limit; NaN is not."""
        if self.limit is None:
            return True
        return self.value >= self.limit if self.is_minimum else self.value <= self.limit


@dataclass(frozen=True)
class Report:
    """All comparisons of one engine; `notes` say what they do not prove, and where values stopped being finite.

    `reference` says what it was compared with, in which version.
    """

    target: str
    checkpoint: str
    precision: str
    checks: tuple[Check, ...]
    notes: tuple[str, ...] = ()
    routers: RouterStatistics = field(default_factory=RouterStatistics)
    reference: str = ""

    @property
    def passed(self) -> bool:
        """Whether there are comparisons and all are within their limits."""
        return bool(self.checks) and all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; what is not finite becomes null.

        `routers` is there only for a mixture of experts.
        """
        values = {
            "passed": self.passed,
            "target": self.target,
            "checkpoint": self.checkpoint,
            "reference": self.reference,
            "precision": self.precision,
            "notes": list(self.notes),
            "checks": [finite(asdict(check) | {"passed": check.passed}) for check in self.checks],
        }
        return values | ({"routers": self.routers.to_dict()} if self.routers.layers else {})

    def render(self) -> str:
        """Return a table in plain text: all checks, but of the layers within their limits only the worst."""
        rows = [("case", "comparison", "value", "limit", "", "more"), *map(_row, self._shown())]
        lines = [line.rstrip() for line in columns(rows)]
        if any(check.layer is not None and not check.passed for check in self.checks):
            lines.append(_LAYER_NOTE)
        verdict = "passed" if self.passed else "FAILED"
        last = f"{self.target} against {self.checkpoint} ({self.precision}): {verdict}"
        return "\n".join([*lines, *self.routers.render(), *self.notes, last])

    def _shown(self) -> Iterator[Check]:
        worst: dict[tuple[str, str], Check] = {}
        for check in self.checks:
            key = (check.case, check.name)
            if check.layer is not None and check.passed and (key not in worst or check.value > worst[key].value):
                worst[key] = check
        for check in self.checks:
            if check.layer is None or not check.passed or check is worst[check.case, check.name]:
                yield check


def _row(check: Check) -> tuple[str, ...]:
    name = check.name
    if check.layer is not None:
        name += f" of layer {check.layer}" + (" (worst)" if check.passed else "")
    limit = "" if check.limit is None else f"{'≥' if check.is_minimum else '≤'} {check.limit:g}"
    verdict = "" if check.limit is None else "ok" if check.passed else "FAILED"
    more = ", ".join(f"{key} {_text(value)}" for key, value in check.detail.items() if value != [])
    return check.case, name, f"{check.value:.3g}", limit, verdict, more


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return "(" + ", ".join(f"{key} {_text(item)}" for key, item in value.items()) + ")"
    if isinstance(value, list):
        return " ".join(map(_text, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def finite(value: Any) -> Any:
    """Return plain values for JSON, which knows no infinity and no NaN: they become null."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
