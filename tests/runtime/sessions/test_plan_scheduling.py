"""Which slots and batches a session asks for: while own kernels decode, beyond their batches, and without them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers import PICTURES
from helpers.host_cuda import HostDevice
from helpers.host_device import device_of
from helpers.host_graphs import HostGraphs
from helpers.plan_session import filled, opened, steps
from runtime.manifest import Manifest
from runtime.messages import user_message
from runtime.model import Qwen3VLModel
from runtime.session import SessionOptions
from runtime.sessions import ort_cuda
from runtime.sessions.ort_cuda import OrtCudaSession

NEVER = 3
QUESTIONS = ["Read the digits.", "What is the sum of the digits?", "Read the digits, and then read them again."]


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> HostGraphs:
    """Open engines of GPUs on the host, where ONNX Runtime records steps as well."""

    def open_session(folder: Path, manifest: Manifest, options: SessionOptions) -> OrtCudaSession:
        device = dataclasses.replace(device_of(HostDevice()), decoder_options={"enable_cuda_graph": "1"})
        return OrtCudaSession(folder, manifest, options, device=device)

    monkeypatch.setattr(ort_cuda, "open_session", open_session)
    return HostGraphs(monkeypatch)


def test_what_a_session_says_is_what_its_steps_are_now(planned: Callable[[str], Path]) -> None:
    session = opened(planned(""))
    assert [session.decodes_anywhere(n) for n in (1, 3, 4, 5)] == [True, True, True, False], "the plan's are 1, 2 and 4"
    session = opened(planned("logits"))
    assert session.decodes_anywhere(2)
    steps(session, filled(session), 2, 1)
    assert not session.decodes_anywhere(2)


@pytest.mark.parametrize(("fault", "num_sequences"), [("logits", 3), ("", 6)])
def test_steps_that_onnx_runtime_runs_are_recorded_ones(
    plain: Path, planned: Callable[[str], Path], graphs: HostGraphs, fault: str, num_sequences: int
) -> None:
    prompts = [
        user_message(QUESTIONS[i % len(QUESTIONS)], [PICTURES / f"held_out_{i}.png"]) for i in range(num_sequences)
    ]
    with Qwen3VLModel.from_engine(plain, decode_plan=True, max_sequences=num_sequences) as model:
        expected = [each.token_ids for each in model.generate_batch(prompts)]
    with Qwen3VLModel.from_engine(planned(fault), max_sequences=num_sequences) as model:
        model.warm_up()
        graphs.take_runs()
        before = model.statistics()
        # The second time, prompts begin in other slots, beside rows that are kept.
        for _ in range(2):
            answers = model.generate_batch(prompts, max_new_tokens=14, eos_token_ids=[NEVER])  # so that all run at once
            for answer, wanted in zip(answers, expected, strict=True):
                assert answer.token_ids[: len(wanted)] == wanted[:14]
        found = model.statistics()
        runs = graphs.take_runs()
    num_chunks = found["prefill_chunks"] - before["prefill_chunks"]
    assert runs.count(None) == num_chunks, "nothing but prompts runs unrecorded"
    assert max(each for each in runs if each) >= num_sequences
    own_steps = found["decode_steps"] - before["decode_steps"] - (len(runs) - num_chunks)
    assert (own_steps > 0) == (fault == "")
    assert found["decode_kernels"] == ("own" if fault == "" else "onnxruntime")


def test_chunks_are_filled_up_by_an_eighth_at_most_where_that_costs_time() -> None:
    sizes = OrtCudaSession.chunk_sizes
    assert list(sizes) == sorted(set(sizes)) and not any(size % 16 for size in sizes)
    for size, smaller in zip(sizes[1:], sizes, strict=False):
        share = (size - smaller - 1) / size
        assert share <= (1 / 8 if size > 512 else 1 / 2), f"{smaller + 1} tokens take {size}"
    # An image of 1024 x 1024 pixels and a question are one chunk.
    assert next(size for size in sizes if size >= 1024 + 32) <= 1.05 * (1024 + 32)
