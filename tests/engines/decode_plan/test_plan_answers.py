"""Whole answers through the decode plan that the exporter makes, its kernels interpreted on the host.

The session is the one of a GPU; its memory, streams and graphs are the tests' checked ones, ONNX Runtime's part of it
runs on the CPU provider, and the machine code alone is replaced by Triton's interpreter. The first steps are compared
with ONNX Runtime's by the session itself, which would give the plan up.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from engines.bundle import Bundle
from helpers import PICTURES
from helpers.engines import build
from helpers.host_cuda import HostDevice
from helpers.host_device import device_of
from helpers.interpreted_plan import add_interpreted_plan
from runtime.manifest import Manifest
from runtime.messages import user_message
from runtime.model import Qwen3VLModel
from runtime.session import SessionOptions
from runtime.sessions import ort_cuda
from runtime.sessions.ort_cuda import OrtCudaSession

pytest.importorskip("triton")
PROMPT = user_message("Read the digits.", [PICTURES / "held_out_0.png"])


@pytest.fixture
def on_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Open engines of GPUs on the host."""
    device = device_of(HostDevice())

    def open_session(folder: Path, manifest: Manifest, options: SessionOptions) -> OrtCudaSession:
        return OrtCudaSession(folder, manifest, options, device=device)

    monkeypatch.setattr(ort_cuda, "open_session", open_session)


def answer(folder: Path, max_new_tokens: int) -> list[int]:
    with Qwen3VLModel.from_engine(folder, max_sequences=1) as model:
        found = model.generate(PROMPT, max_new_tokens=max_new_tokens, do_sample=False).token_ids
        statistics = model.statistics()
    assert (statistics["decode_kernels"], statistics["decode_plan_problem"]) == ("own", None)
    return list(found)


def test_a_whole_answer_is_that_of_the_cpu(
    demo_bundle: Bundle, demo_engine: Path, tmp_path: Path, on_host: None
) -> None:
    with Qwen3VLModel.from_engine(demo_engine) as model:
        expected = model.generate(PROMPT, max_new_tokens=32, do_sample=False).token_ids
    planned = add_interpreted_plan(build(demo_bundle, "ort-cuda-fp16", tmp_path / "engine"))
    assert len(expected) < 32, "it ends by itself"
    assert answer(planned, 32) == list(expected)


@pytest.mark.slow
def test_tokens_of_codes_are_those_of_onnx_runtime(demo_bundle: Bundle, tmp_path: Path, on_host: None) -> None:
    check_tokens(build(demo_bundle, "ort-cuda-int4", tmp_path / "engine"), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["ort-cuda-fp16", "ort-cuda-int4"])
def test_tokens_of_experts_are_those_of_onnx_runtime(
    target: str, demo_moe_bundle: Bundle, tmp_path: Path, on_host: None
) -> None:
    check_tokens(build(demo_moe_bundle, target, tmp_path / "engine"), tmp_path)


def check_tokens(engine: Path, tmp_path: Path) -> None:
    """Compare the first tokens of an answer with and without the plan."""
    planned = add_interpreted_plan(Path(shutil.copytree(engine, tmp_path / "planned")))
    with Qwen3VLModel.from_engine(engine) as model:
        expected = model.generate(PROMPT, max_new_tokens=3, do_sample=False).token_ids
    assert answer(planned, 3) == list(expected)
