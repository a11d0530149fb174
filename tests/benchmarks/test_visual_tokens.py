"""`python -m benchmarks visual-tokens`: its measurements on the demo, and the table made of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import visual_tokens
from benchmarks.visual_tokens import accuracy, demo_prompts, table, times
from runtime.contract import FloatArray, IntArray


def test_right_answers_depend_on_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeping the tokens that look like the rest of the picture, none of the digits can be read."""
    prompts = [each for each in demo_prompts(4) if each[0] == "read"][1:]  # the first canvas is too small to be pruned
    found = accuracy("demo", prompts)
    assert found["questions"] == {"read": 3}
    assert found["right"]["all tokens, 1"]["read"] == 1
    assert found["right"]["embeddings, 0.5"]["read"] == 1
    assert len(found["right"]) == 1 + 3 * 3

    def plainest(embeds_VD: FloatArray, num_kept: int, scores_V: FloatArray | None = None) -> IntArray:
        distance_V = np.linalg.norm(embeds_VD - embeds_VD.mean(0), axis=1)
        return np.sort(np.argsort(distance_V)[:num_kept])

    monkeypatch.setattr(visual_tokens, "choose_visual_tokens", plainest)
    assert accuracy("demo", prompts)["right"]["embeddings, 0.25"]["read"] == 0


def test_times_are_of_whole_and_pruned_prompts(demo_engine: Path) -> None:
    found = times(demo_engine, "demo", [160, 192], 0.5, 2)
    assert [each["visual_tokens"] for each in found["sizes"]] == [{"all": 25, "kept": 16}, {"all": 36, "kept": 18}]
    for size in found["sizes"]:
        assert {len(size["prefill_s"][name]["all_s"]) for name in ("all", "kept")} == {2}
        assert size["other_ttft_s"]["kept"]["median_s"] > 0 < size["choose_s"]["median_s"]
    text = table(json.loads(json.dumps({"times": found})))
    assert "| 16 of 25 |" in text and "| 18 of 36 |" in text and "shape of demo" in text


def test_the_table_holds_what_was_measured() -> None:
    right = {"all tokens, 1": {"read": 0.98, "count": 1.0}, "random, 0.5": {"read": 0.5, "count": 0.612}}
    text = table({"accuracy": [{"checkpoint": "demo", "questions": {"read": 50, "count": 50}, "right": right}]})
    assert "| all tokens, 1 | 98.0 % | 100.0 % |" in text and "| random, 0.5 | 50.0 % | 61.2 % |" in text
    assert "50 held-out questions" in text
