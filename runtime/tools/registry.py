"""Find the formats of calls by the names of their files."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

import runtime.tools.formats
from runtime.tools.call import CallFormat


@cache
def call_formats() -> tuple[CallFormat, ...]:
    """Return all formats, by name."""
    names = sorted(found.name for found in pkgutil.iter_modules(runtime.tools.formats.__path__))
    return tuple(importlib.import_module(f"runtime.tools.formats.{name}").FORMAT for name in names)


def format_of(template: str) -> CallFormat | None:
    """Return the format that a chat template asks for; None if no format knows it.

    Args:
        template: Its jinja2 source.
    """
    found = [each for each in call_formats() if each.is_asked_by(template)]
    assert len(found) < 2, f"two formats know one template: {found}"
    return found[0] if found else None
