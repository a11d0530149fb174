"""Values of a JSON text that know where they stand in it, so that whoever finds one wrong can say which."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, NoReturn

from runtime.errors import EngineError
from runtime.shown import shown_numbers


class Entry:
    """One value.

    Args:
        value: What was read.
        where: Path to it, such as `decode_plan.json: kernels[3].code`.
        remedy: What to do if it is wrong.

    Attributes:
        value: As given.

    Every method raises `EngineError` if the value is not of the kind it asks for.
    """

    __slots__ = ("_remedy", "_where", "value")

    def __init__(self, value: Any, where: str, remedy: str) -> None:
        self.value, self._where, self._remedy = value, where, remedy

    def refuse(self, expected: str) -> NoReturn:
        """Say that it is not what was expected."""
        raise EngineError(f"{self._where} is {shown_numbers(self.value)}, expected {expected}", remedy=self._remedy)

    def get(self, key: str) -> Entry:
        """Return an entry of an object; None is in the place of one that is missing."""
        if not isinstance(self.value, dict):
            self.refuse("an object")
        return Entry(self.value.get(key), f"{self._where}.{key}", self._remedy)

    def items(self) -> Iterator[tuple[str, Entry]]:
        """Yield the names and entries of an object."""
        if not isinstance(self.value, dict):
            self.refuse("an object")
        for key in self.value:
            yield key, self.get(key)

    def values(self, length: int | None = None) -> list[Entry]:
        """Return the entries of a list, of so many if a length is given."""
        if not isinstance(self.value, list) or (length is not None and len(self.value) != length):
            self.refuse("a list" if length is None else f"a list of {length}")
        return [Entry(each, f"{self._where}[{i}]", self._remedy) for i, each in enumerate(self.value)]

    def integer(self, least: int, most: int) -> int:
        """Return an integer of a range."""
        value = self.value
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            self.refuse(f"an integer of {least} to {most}")
        return int(value)

    def number(self) -> float:
        """Return a finite number."""
        value, most = self.value, sys.float_info.max
        if not isinstance(value, int | float) or isinstance(value, bool) or not -most <= value <= most:
            self.refuse("a finite number")
        return float(value)

    def truth(self) -> bool:
        """Return true or false."""
        if not isinstance(self.value, bool):
            self.refuse("true or false")
        return self.value

    def text(self) -> str:
        """Return a string that is not empty."""
        if not isinstance(self.value, str) or not self.value:
            self.refuse("a string")
        return self.value
