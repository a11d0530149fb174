"""Processes that compile kernels and die, or answer something else, are an error."""

from __future__ import annotations

import subprocess
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


@pytest.mark.parametrize("line", ["warning: of the compiler", "[]", '{"entry": "kernel"}', '{"code": "", "x": 1}'])
def test_a_process_that_answers_something_else_is_an_error(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\nread -r job\nprintf '%s\\n' '{line}'\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    job = Job.of(Launch("product", "kernel", {"X": Argument("*fp16", "buffer:x")}), GPUS[90])
    with pytest.raises(TargetError, match=r"compiles product\.kernel for SM 9\.0 answered '"):
        compile_all([job], cache=tmp_path / "kept")


def test_what_a_compiler_prints_is_no_answer(tmp_path: Path) -> None:
    """Its C++ parts write to the descriptor of stdout, which they know alone."""
    program = (
        "import os\nfrom engines.decode_plan import worker\n"
        "def compile_job(job):\n    os.write(1, b'remark'), print('note')\n    return {'entry': 'kernel'}\n"
        "worker.compile_job = compile_job\nworker.main()\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], input="{}\n{}\n", capture_output=True, text=True, check=True
    )
    assert found.stdout == '{"entry": "kernel"}\n' * 2
    assert found.stderr.count("remark") == found.stderr.count("note") == 2
