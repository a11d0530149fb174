"""A sequence that ends lets another one move into its slot, with all rows that the other has by then."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np

from runtime.contract import DecoderInputs
from runtime.messages import user_message
from runtime.model import Qwen3VLModel

SHORT, LONG = user_message("Hi", []), user_message("Say the digits from one to nine, one after the other. " * 3, [])


def test_a_sequence_keeps_the_row_of_the_step_in_which_the_one_before_it_ends(demo_engine: Path) -> None:
    model = Qwen3VLModel.from_engine(demo_engine, threads=1, prefix_cache=False)
    prefill, decode = model.session.prefill, model.session.decode
    both_wait = threading.Event()
    batches: list[int] = []
    rows: list[np.ndarray] = []

    def waiting(*arguments: Any) -> Any:
        assert both_wait.wait(60)
        return prefill(*arguments)

    def recording(inputs: DecoderInputs, cache: Any, slot: int = 0) -> Any:
        logits = decode(inputs, cache, slot)
        batches.append(len(inputs.input_ids))
        past = int(inputs.past_lengths[-1])
        rows[:] = [cache.layer(0)[0][len(inputs.input_ids) - 1, :, :past]]  # of the last sequence
        return logits

    model.session.prefill, model.session.decode = waiting, recording
    options = {"eos_token_id": (), "do_sample": False}
    answers: dict[str, Any] = {}

    def ask(name: str, messages: Any, num_tokens: int) -> threading.Thread:
        def run() -> None:
            answers[name] = model.generate(messages, max_new_tokens=num_tokens, **options)

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    threads = [ask("short", SHORT, 6)]
    while not model.statistics()["running"]:
        threading.Event().wait(0.01)
    threads.append(ask("long", LONG, 12))
    while model.statistics()["running"] + model.statistics()["waiting"] < 2:
        threading.Event().wait(0.01)
    both_wait.set()
    for thread in threads:
        thread.join(60)
    assert {1, 2} == set(batches) and batches[-1] == 1, "the short one ended while both decoded"
    (beside,) = rows
    alone = model.generate(LONG, max_new_tokens=12, **options)
    assert answers["long"].token_ids == alone.token_ids
    np.testing.assert_allclose(beside, rows[0], atol=1e-4)
    model.close()
