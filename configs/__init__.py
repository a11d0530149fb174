"""Numbers that describe models, targets and tolerances, as TOML; the only place where such a number lives.

`models/*.toml` are model shapes, `targets/*.toml` build settings, `tolerances.toml` the parity limits with their
reasons. The files travel in the wheel, so they are read as package resources.
"""

from __future__ import annotations

import tomllib
from importlib import resources
from typing import Any


def names(section: str) -> list[str]:
    """List the names that `load(f"{section}/{name}")` takes, sorted."""
    folder = resources.files(__name__) / section
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load(name: str) -> dict[str, Any]:
    """Read one file, named by its path without the suffix, such as `models/qwen3-vl-2b`.

    Raises:
        FileNotFoundError: There is no such file.
    """
    return tomllib.loads((resources.files(__name__) / f"{name}.toml").read_text(encoding="utf-8"))
