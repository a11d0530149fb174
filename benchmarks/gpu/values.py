"""What every section does: read its folder, write its values, take the median of repeated calls."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def parser(*, with_folder: bool = True) -> argparse.ArgumentParser:
    """Return the options that all sections take: a folder, and the file for the values."""
    result = argparse.ArgumentParser()
    if with_folder:
        result.add_argument("folder", type=Path)
    result.add_argument("--values", type=Path, required=True, help="file for the values, as JSON")
    return result


class Values(dict[str, Any]):
    """The values of a section, written to a file whenever one is added, so that a crash loses none before it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        partial = self._path.with_name(self._path.name + ".partial")
        partial.write_text(json.dumps(self), encoding="utf-8")
        partial.replace(self._path)
        print(name, value, flush=True)


def repeated(call: Callable[[], object], *, warmup: int, repeats: int) -> dict[str, float]:
    """Return median, least and 90 % of the milliseconds of calls that return when their work is done."""
    for _ in range(warmup):
        call()
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        taken.append(1e3 * (time.perf_counter() - start))
    return summary(taken)


def summary(taken_ms: list[float]) -> dict[str, float]:
    """Return median, least and 90 % of some milliseconds, and how many there are."""
    ordered = sorted(taken_ms)
    return {
        "median_ms": round(statistics.median(ordered), 4),
        "min_ms": round(ordered[0], 4),
        "p90_ms": round(ordered[int(0.9 * (len(ordered) - 1))], 4),
        "n": len(ordered),
    }
