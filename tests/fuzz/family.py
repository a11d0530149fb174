"""What a family of inputs is."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any, Protocol

ROOT = Path(__file__).resolve().parents[2]

Recipe = dict[str, Any]
"""A JSON value that says all about an input. `edits`, a list, is what a finding is made smaller by."""

SHARES: Mapping[str, int] = {
    "configs": 5,
    "engines": 2,
    "images": 5,
    "messages": 5,
    "safetensors": 3,
    "templates": 2,
}
"""Families, which are modules of `fuzz.families`, and their shares of a long run: engines take longest to open."""


class Family(Protocol):
    """A module of `fuzz.families`."""

    def setup(self, engine: Path, folder: Path) -> Any:
        """Return what `run` needs, made once in each child process.

        Args:
            engine: Of the demo, for ort-cpu-fp32; not to be changed.
            folder: Empty, and of this process alone.
        """

    def make(self, random: Random) -> Recipe:
        """Return a recipe: the same one for the same state of `random`."""

    def size(self, recipe: Recipe) -> tuple[int, int]:
        """Return the bytes of the input, and the memory that one that is taken may use beyond that of a refusal."""

    def run(self, recipe: Recipe, context: Any) -> str:
        """Give the input to the project; return a word on what it did with it.

        Raises:
            Qwen3VLError: It is refused.
        """


def load(name: str) -> Family:
    """Return a family by its name."""
    if name not in SHARES:
        raise SystemExit(f"unknown family {name!r}; known: {', '.join(SHARES)}")
    return importlib.import_module(f"fuzz.families.{name}")  # type: ignore[return-value]
