"""Exports that are killed at random moments leave a whole engine, and nothing beside it after the next run began."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from helpers.kills import kill_exports

if TYPE_CHECKING:
    from engines.bundle import Bundle


@pytest.mark.parametrize(
    ("count", "has_exchange"),
    [(3, True), (2, False), *(pytest.param(100, each, marks=pytest.mark.slow) for each in (True, False))],
)
def test_killed_exports_leave_the_older_engine_or_the_new_one(
    count: int, has_exchange: bool, demo_bundle: Bundle, tmp_path: Path
) -> None:
    found = kill_exports(demo_bundle, "ort-cpu-int4", tmp_path, count, seed=1, has_exchange=has_exchange)
    assert found["killed"] == count and found["old"] + found["new"] + found["missing"] == found["exports"]
    assert found["left"] > 0 or count < 100  # else nothing was tried; where a few kills strike is chance
    assert (found["broken"], found["left_after_next_run"]) == (0, 0)
    assert found["missing"] == 0 or not has_exchange
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]
