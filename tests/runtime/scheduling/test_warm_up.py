"""Warming up changes no answer, whatever runs or is kept meanwhile."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime.messages import user_message
from runtime.model import Qwen3VLModel

pytestmark = pytest.mark.portable
OPTIONS = {"do_sample": False, "eos_token_id": [], "max_new_tokens": 24}


def test_rows_of_others_are_left_alone(demo_engine: Path) -> None:
    prompts = [user_message(f"{number} Answer as JSON. How many digits are there?", []) for number in range(3)]
    expected = [
        Qwen3VLModel.from_engine(demo_engine, threads=1).generate(each, **OPTIONS).token_ids for each in prompts
    ]
    model = Qwen3VLModel.from_engine(demo_engine, threads=1, max_sequences=3, kept_sequences=0, max_context=128)
    model.warm_up()
    streams = [model.stream(each, **OPTIONS) for each in prompts]
    for stream in streams:
        next(stream)
    model.warm_up()  # while they run
    for stream, token_ids in zip(streams, expected, strict=True):
        assert stream.wait().token_ids == token_ids
    model.warm_up()  # where rows are kept
    again = [model.generate(each, **OPTIONS) for each in prompts]
    assert [each.token_ids for each in again] == expected
    assert all(each.stats.cached_tokens for each in again)


def test_each_size_of_batch_and_the_longest_chunk_run(demo_engine: Path) -> None:
    model = Qwen3VLModel.from_engine(demo_engine, threads=1, max_sequences=3, max_context=200)
    prefill, decode = model.session.prefill, model.session.decode
    chunks, batches = [], []

    def recording_prefill(inputs, cache, slot=0):
        chunks.append(inputs.input_ids.shape[1])
        return prefill(inputs, cache, slot)

    def recording_decode(inputs, cache, slot=0):
        batches.append(len(inputs.input_ids))
        return decode(inputs, cache, slot)

    model.session.prefill, model.session.decode = recording_prefill, recording_decode
    model.warm_up()
    assert chunks == [200] and set(batches) == {1, 2, 3}
