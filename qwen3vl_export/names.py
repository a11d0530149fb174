"""Names of files and tensors as messages show them."""

from __future__ import annotations

from runtime.shown import one_line

_LONGEST = 160


def shown_name(name: str) -> str:
    """Return a name on one line, with control characters and lone surrogates escaped, its middle left out if long."""
    return one_line(name, _LONGEST)
