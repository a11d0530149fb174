"""Faults in the rows that a routed session moves between two caches, for tests that must notice them."""

from __future__ import annotations

from typing import Any

import numpy as np

from runtime.routed_session import RoutedCache


def shifted(original: Any, self: RoutedCache, slot: int, start: int, stop: int) -> None:
    original(self, slot, start, stop)
    rows = self.cache.read_rows(slot, start, stop)
    self.cache.write_rows(slot, start, [np.roll(each, 1, axis=1) for each in rows])


def layers_swapped(original: Any, self: RoutedCache, slot: int, start: int, stop: int) -> None:
    original(self, slot, start, stop)
    rows = [each.copy() for each in self.cache.read_rows(slot, start, stop)]
    self.cache.write_rows(slot, start, [*rows[2:4], *rows[:2], *rows[4:]])
