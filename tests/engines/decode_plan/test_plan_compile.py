"""Kernels are compiled in processes of their own, once: what was compiled is kept, and damage to it is seen."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from engines.decode_plan.compile import Code, Job, compile_all
from engines.kernels import embed
from engines.kernels.launch import GPUS, HALF, Weight
from runtime.errors import TargetError


def a_job() -> Job:
    table = Weight(HALF, 30, 64, "table")
    places = {"axes": "constant:axes", "inv_freq": "constant:inv_freq", "hidden": "buffer:hidden"}
    return Job.of(embed.launch(table, 1, GPUS[80], dtype="float16", head_dim=16, **places), GPUS[80])


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Code, Path]:
    """Code, and the folder that it is kept in; compiled in a folder whose modules would stop every process."""
    pytest.importorskip("triton")
    here, kept = tmp_path_factory.mktemp("modules"), tmp_path_factory.mktemp("kept")
    for name in ("json.py", "triton.py", "token.py"):
        (here / name).write_text("raise SystemExit(1)")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        return compile_all([a_job()], cache=kept)[a_job()], kept


def test_compiled_code_is_kept(compiled: tuple[Code, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    code, kept = compiled
    assert code.binary.startswith(b"\x7fELF") and int(code.ptxas.partition(".")[0]) >= 12
    monkeypatch.setattr(sys, "executable", "/bin/false")
    steps: list[tuple[int, int]] = []
    assert compile_all([a_job()], lambda *counts: steps.append(counts), kept) == {a_job(): code}
    assert steps == [(1, 1)]


@pytest.mark.parametrize("place", [0, 80, -1], ids=["digest", "head", "code"])
def test_damaged_code_is_not_taken(
    compiled: tuple[Code, Path], place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (kept,) = compiled[1].iterdir()
    content = bytearray(kept.read_bytes())
    content[place] ^= 1
    (tmp_path / kept.name).write_bytes(content)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(TargetError, match=r"the process that compiles embed\.\w+ for SM 8\.0 died"):
        compile_all([a_job()], cache=tmp_path)
