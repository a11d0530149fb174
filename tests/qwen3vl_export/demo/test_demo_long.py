"""The shipped checkpoint for long prompts: the demo's files, its accuracy, and its engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from demo_training.evaluate_long import PROMPTS, LongOutcome, as_long_markdown, ask_prompts, cases, summarise_long
from helpers import DOCS
from qwen3vl_export.demo import CHECKPOINT, CHECKPOINT_LONG
from qwen3vl_export.demo.data import held_out
from qwen3vl_export.demo.long_tasks import CONVERSATION, LONG_TASKS, MAX_NEW_TOKENS
from qwen3vl_export.demo.tasks import TASKS
from qwen3vl_export.parity.verify import verify
from runtime.messages import user_message
from runtime.model import Qwen3VLModel

CANVASES = 20
ASKED = 5


@pytest.mark.portable
def test_all_but_the_weights_is_the_demos() -> None:
    names = {path.name for path in CHECKPOINT.iterdir()}
    assert {path.name for path in CHECKPOINT_LONG.iterdir()} == names
    for name in names - {"model.safetensors", "README.md"}:
        assert (CHECKPOINT_LONG / name).read_bytes() == (CHECKPOINT / name).read_bytes(), name
    assert (CHECKPOINT_LONG / "README.md").read_bytes() == (DOCS / "demo_long.md").read_bytes()
    assert sum(path.stat().st_size for path in CHECKPOINT_LONG.iterdir()) <= 8_000_000


@pytest.mark.portable
def test_the_further_tasks_were_measured_at_each_limit() -> None:
    rows = read("demo_long_tasks_ort-cpu-fp32")["rows"]
    assert [(row["task"], row["max_tokens"]) for row in rows] == cases()
    assert {row["prompts"] for row in rows} == {PROMPTS}
    right = {(row["task"], row["max_tokens"]): row["right"] for row in rows}
    # No guess comes near these: the least, of "earlier", is far above the share of right reads of another canvas.
    assert min(right.values()) >= 0.25
    assert min(share for (task, _), share in right.items() if task not in ("earlier", "lines", "each")) >= 0.8


def test_the_table_is_that_of_the_results() -> None:
    table = as_long_markdown(read("demo_long_tasks_ort-cpu-fp32"))
    assert table in (DOCS / "demo_long_tasks_ort-cpu-fp32.md").read_text()
    assert table in (DOCS / "demo_long.md").read_text()


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DOCS / f"{name}.json").read_text())
    return found


def test_float32_still_reads_canvases(demo_long_engine: Path) -> None:
    model = Qwen3VLModel.from_engine(demo_long_engine)
    right = [
        model.generate(user_message(question, [example.image]), do_sample=False).text.strip() == truth
        for example in map(held_out, range(CANVASES))
        for question, truth in example.tasks.values()
    ]
    assert len(right) == CANVASES * len(TASKS)
    assert sum(right) >= 0.9 * len(right)


@pytest.mark.parametrize(("task", "max_tokens"), [case for case in cases() if case[1] == 1024])
def test_float32_answers_prompts_as_was_measured(task: str, max_tokens: int, demo_long_engine: Path) -> None:
    check_prompts(demo_long_engine, task, max_tokens)


@pytest.mark.slow
@pytest.mark.parametrize(("task", "max_tokens"), [case for case in cases() if case[1] > 1024])
def test_float32_answers_long_prompts_as_was_measured(task: str, max_tokens: int, demo_long_engine: Path) -> None:
    check_prompts(demo_long_engine, task, max_tokens)


def check_prompts(engine: Path, task: str, max_tokens: int) -> None:
    model = Qwen3VLModel.from_engine(engine)

    def answer(messages: list[dict[str, Any]]) -> str:
        return model.generate(messages, do_sample=False, max_new_tokens=MAX_NEW_TOKENS).text

    outcomes = ask_prompts(answer, task, max_tokens, ASKED)
    known = {
        entry["index"]: entry["answer"]
        for entry in read("demo_long_tasks_ort-cpu-fp32")["wrong"]
        if (entry["task"], entry["max_tokens"]) == (task, max_tokens) and entry["index"] < ASKED
    }
    assert {each.index: each.answer for each in outcomes if not each.is_right} == known


@pytest.mark.judge
def test_verify_passes(demo_long_engine: Path) -> None:
    report = verify(demo_long_engine, "demo-long", max_new_tokens=8)
    assert report.passed, [check for check in report.checks if not check.passed]


def test_shares_of_right_answers_are_counted() -> None:
    outcomes = [
        LongOutcome(task, limit, index, 900 + index, 5 + index, "31", " 31\n" if index else "13")
        for task, limit in (("picture", 1024), ("picture", 2048))
        for index in range(4)
    ]
    summary = summarise_long(outcomes)
    assert [(row["max_tokens"], row["prompts"], row["right"]) for row in summary["rows"]] == [
        (1024, 4, 0.75),
        (2048, 4, 0.75),
    ]
    assert [entry["index"] for entry in summary["wrong"]] == [0, 0]
    assert "| picture | 2048 | 4 | 902 | 6.5 | 75.0 % |" in as_long_markdown(summary)


def test_prompts_are_asked_one_by_one() -> None:
    asked = []

    def answer(messages: list[dict[str, Any]]) -> str:
        asked.append(messages[-1]["content"][-1]["text"])
        return "7"

    outcomes = ask_prompts(answer, "line", 1024, 3)
    assert [each.index for each in outcomes] == [0, 1, 2]
    assert all(question.startswith("Read line ") for question in asked)
    assert {each.answer for each in outcomes} == {"7"}


def test_conversations_are_asked_at_every_limit() -> None:
    assert {task for task, _ in cases()} == set(LONG_TASKS)
    for task in CONVERSATION:
        assert [limit for name, limit in cases() if name == task] == [1024, 2048, 4096]
