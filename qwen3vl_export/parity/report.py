"""What a comparison found: single checks, and the report as plain values and as a table."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from qwen3vl_export.routing import RouterStatistics
from runtime.shown import columns, shown

_LAYER_NOTE = (
    "Keys and values of a layer show what came into it. What else is wrong in a layer shows in the rows of the next "
    "one, or in the logits if it is the last."
)

HEADERS = ("case", "comparison", "value", "limit", "", "more")
"""Of the table of a report."""


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

    @property
    def title(self) -> str:
        """Its name, with that of its layer."""
        return self.name if self.layer is None else f"{self.name} of layer {self.layer}"

    @property
    def row(self) -> tuple[str, str, str, str, str, str]:
        """The cells of its line in a table with `HEADERS`."""
        title = f"{self.title} (worst)" if self.layer is not None and self.passed else self.title
        limit = "" if self.limit is None else f"{'≥' if self.is_minimum else '≤'} {self.limit:g}"
        verdict = "" if self.limit is None else "ok" if self.passed else "FAILED"
        more = ", ".join(f"{key} {_text(value)}" for key, value in self.detail.items() if value != [])
        return self.case, title, f"{self.value:.3g}", limit, verdict, more


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

    def __repr__(self) -> str:
        """Say what it came to on one line."""
        return f"{type(self).__name__}({shown(self.verdict)}, checks={len(self.checks)})"

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the verdict, then a table as `render` prints it."""
        from qwen3vl_export.reports.page import paragraph, table, to_html

        rows = [list(check.row) for check in self.shown()]
        checks = table([header or "verdict" for header in HEADERS], rows, caption=f"Against {self.reference}")
        return "".join(map(to_html, [paragraph(self.verdict), checks, *map(paragraph, self.remarks)]))

    def render(self) -> str:
        """Return a table in plain text: all checks, but of the layers within their limits only the worst."""
        rows = [HEADERS, *(check.row for check in self.shown())]
        lines = [line.rstrip() for line in columns(rows)]
        return "\n".join([*lines, *self.remarks, self.verdict])

    @property
    def verdict(self) -> str:
        """What was compared, and what it came to."""
        verdict = "passed" if self.passed else "FAILED"
        return f"{self.target} against {self.checkpoint} ({self.precision}): {verdict}"

    @property
    def remarks(self) -> list[str]:
        """How to read failed layers, what the routers did, and the notes."""
        is_layer_off = any(check.layer is not None and not check.passed for check in self.checks)
        return [*([_LAYER_NOTE] if is_layer_off else []), *self.routers.render(), *self.notes]

    def shown(self) -> Iterator[Check]:
        """Yield all checks, but of the layers within their limits only the worst."""
        worst: dict[tuple[str, str], Check] = {}
        for check in self.checks:
            key = (check.case, check.name)
            if check.layer is not None and check.passed and (key not in worst or check.value > worst[key].value):
                worst[key] = check
        for check in self.checks:
            if check.layer is None or not check.passed or check is worst[check.case, check.name]:
                yield check


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
