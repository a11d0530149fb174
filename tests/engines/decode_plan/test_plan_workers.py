"""Processes that compile kernels and die are an error, wherever in an answer."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from engines.decode_plan.compile import Job, compile_all
from engines.kernels.launch import GPUS, Argument, Launch
from runtime.errors import TargetError


@pytest.mark.parametrize("part", ["", '{"entry": "ker', '{"entry": "kernel"}'])
def test_a_process_that_dies_in_its_answer_is_an_error(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\nread -r job\nprintf '%s' '{part}'\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    job = Job.of(Launch("product", "kernel", {"X": Argument("*fp16", "buffer:x")}), GPUS[90])
    with pytest.raises(TargetError, match=r"the process that compiles product\.kernel for SM 9\.0 died"):
        compile_all([job], cache=tmp_path / "kept")
