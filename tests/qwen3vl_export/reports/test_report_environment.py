"""What a report says of the machine that it was made on."""

from __future__ import annotations

import json

import pytest

from engines.hardware import Gpu, Hardware
from qwen3vl_export.reports.environment import Environment
from runtime import __version__, native

MACHINE = Hardware("Abacus", ("avx2",), 2, 24_000_000_000, (Gpu("NVIDIA H200", "9.0", 140 << 30, 139 << 30, "570.1"),))


def test_machine_libraries_and_load() -> None:
    found = Environment.of_this_machine(3, MACHINE)
    rows = dict(found.rows())
    assert rows["processor"] == "Abacus (avx2)" and rows["threads"] == "3" and rows["cores"] == "2"
    assert rows["GPU"] == "NVIDIA H200, driver 570.1" and rows["memory"] == "24.0 GB"
    assert f"qwen3vl-export {__version__}, python 3." in rows["versions"] and "numpy" in rows["versions"]
    assert found.load_average is not None and rows["load before"].startswith(f"{found.load_average:.2f} ")
    assert json.loads(json.dumps(found.to_dict()))["versions"] == dict(found.versions)


def test_what_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "failure", lambda: native.EngineError("no library", remedy="build it"))
    rows = dict(Environment.of_this_machine(machine=Hardware("Abacus", (), 1, 1)).rows())
    assert rows["own kernels"] == "cannot be used" and rows["GPU"] == "none" and "threads" not in rows


def test_the_instruction_set_is_that_in_use() -> None:
    if problem := native.problem():
        pytest.skip(problem)
    assert Environment.of_this_machine(machine=MACHINE).isa == native.isa()
