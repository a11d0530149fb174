"""Repetitions in turns, prompts that no cache knows, batches at once, and memory."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from qwen3vl_export.bench.measure import PHASES, measure, messages, repeat, stream_once
from qwen3vl_export.bench.memory import ProcessMemory, estimate
from qwen3vl_export.bench.points import Point
from runtime.answer import Stats
from runtime.model import Qwen3VLModel

SHORT, LONG = Point(8, 3), Point(16, 3)


class Scripted:
    """Answers at once; the n-th of its answers takes n seconds to the first token."""

    def __init__(self, name: str, calls: list[tuple[str, int]]) -> None:
        self.name, self.calls, self.answers = name, calls, 0

    def generate(self, prompt: list[dict[str, Any]], **options: Any) -> SimpleNamespace:
        self.answers += 1
        self.calls.append((self.name, len(prompt[0]["content"][-1]["text"])))
        times = (0.0, 0.1, 0.2, 0.3, float(self.answers), 2.0 * self.answers)
        counts = {"prompt_tokens": 9, "visual_tokens": 0, "new_tokens": 3, "peak_cache_bytes": 1}
        return SimpleNamespace(stats=Stats.of(times, **counts))


def test_engines_take_turns() -> None:
    calls: list[tuple[str, int]] = []
    steps: list[tuple[int, int, str]] = []
    models: dict[str, Any] = {name: Scripted(name, calls) for name in ("a", "b")}
    found = measure(models, [SHORT, LONG], 2, lambda *step: steps.append(step))
    there, back = [("a", 8), ("b", 8), ("a", 16), ("b", 16)], [("b", 8), ("a", 8), ("b", 16), ("a", 16)]
    assert calls == there + back + there
    assert [done for done, _, _ in steps] == list(range(12)) and {total for _, total, _ in steps} == {12}
    assert steps[1][2] == "b: 8 tokens, 3 new"
    # The first of each is the warm-up; of a, the answers 1, 3, 5 are of the short point, 2, 4, 6 of the long one.
    assert list(found) == [("a", SHORT), ("b", SHORT), ("a", LONG), ("b", LONG)]
    measured = found["a", LONG]
    assert measured.warmup.ttft_s == 2.0 and [each.ttft_s for each in measured.repetitions] == [4.0, 6.0]
    assert measured.repetitions[0].tpot_s == 2.0, "two later tokens in four seconds"
    assert measured.repetitions[0].phases_s == pytest.approx(
        {"preprocess": 0.1, "queue": 0.1, "vision": 0.1, "prefill": 3.7}
    )


def test_no_two_prompts_are_alike_and_each_is_the_same_again() -> None:
    point = Point(40, 2, 2, (64, 32), 2)
    keys = [(index, seat) for index in range(3) for seat in range(2)]
    prompts = {key: messages(point, *key)[0]["content"] for key in keys}
    texts = {content[-1]["text"] for content in prompts.values()}
    pixels = {part["image"].tobytes() for content in prompts.values() for part in content[:-1]}
    assert len(texts) == 6 and len(pixels) == 12
    assert [part["image"].shape for part in prompts[0, 0][:-1]] == [(32, 64, 3)] * 2
    again = messages(point, 1, 1)[0]["content"]
    assert again[-1] == prompts[1, 1][-1] and np.array_equal(again[0]["image"], prompts[1, 1][0]["image"])


@pytest.mark.parametrize("tokens", [1, 20, 257])
def test_a_text_has_as_many_tokens_as_are_asked_for(tiny_engine: Path, demo_engine: Path, tokens: int) -> None:
    for folder in (tiny_engine, demo_engine):
        with Qwen3VLModel.from_engine(folder, threads=1) as model:
            assert len(model.tokenizer.encode(messages(Point(tokens, 2), 5)[0]["content"][0]["text"])) == tokens


def test_no_cache_shortens_a_repetition(tiny_engine: Path) -> None:
    """With one prompt again and again, all of its tokens but one were cached, and the image too."""
    point = Point(60, 2, 1, (64, 64), 1)
    with Qwen3VLModel.from_engine(tiny_engine, threads=1) as model:
        found = [repeat(model, point, index) for index in range(3)]
        same = repeat(model, point, 2)
    assert {each.prompt_tokens for each in found} == {found[0].prompt_tokens}
    before_the_image = found[0].prompt_tokens - 60 - found[0].visual_tokens
    assert found[0].visual_tokens == 4 and all(each.cached_tokens <= before_the_image for each in found)
    assert same.cached_tokens == found[0].prompt_tokens - 1
    for each in found:
        assert set(each.phases_s) == set(PHASES) and each.phases_s["vision"] > 0
        assert sum(each.phases_s.values()) == pytest.approx(each.ttft_s)
        assert each.latency_s >= each.ttft_s + each.tpot_s


def test_no_point_shortens_another(tiny_engine: Path) -> None:
    """Where pixels followed from repetition and seat alone, all points after the first found the image in the cache."""
    points = [Point(*each, (64, 64), 2) for each in ((60, 2, 1), (90, 2, 1), (60, 3, 1), (60, 2, 2))]
    with Qwen3VLModel.from_engine(tiny_engine, threads=1) as model:
        found = measure({"tiny": model}, points, repeats=2)
        vision_calls = model.statistics()["vision_calls"]
    repetitions = [each for values in found.values() for each in values.repetitions]
    before_the_image = found["tiny", points[0]].warmup.prompt_tokens - 60 - 8
    assert len(repetitions) == 8 and all(each.phases_s["vision"] > 0 for each in repetitions)
    assert all(each.cached_tokens <= before_the_image * 2 for each in repetitions)
    assert vision_calls >= 3 * 5  # of three rounds; images of a prompt run together


def test_a_batch_of_an_engine(tiny_engine: Path) -> None:
    with Qwen3VLModel.from_engine(tiny_engine, threads=1) as model:
        before = model.statistics()["batch_size"]["count"]
        found = repeat(model, Point(8, 40, 4), 1)
        steps = model.statistics()["batch_size"]["count"] - before
    assert 39 <= steps <= 4 * 39, "decode steps of four answers, side by side or not"
    assert found.prompt_tokens > 8 and found.visual_tokens == 0
    assert found.latency_s >= found.ttft_s + 39 * found.tpot_s > 0


def test_the_time_of_a_batch_begins_with_its_first_answer() -> None:
    together = threading.Barrier(3)

    class Waiting:
        def generate(self, prompt: list[dict[str, Any]], **options: Any) -> SimpleNamespace:
            together.wait(60)  # all three run
            return SimpleNamespace(
                stats=Stats.of((0, 0, 0, 0, 1, 3), prompt_tokens=1, visual_tokens=0, new_tokens=3, peak_cache_bytes=1)
            )

    started = time.perf_counter()
    found = repeat(Waiting(), Point(1, 3, 3), 0)  # type: ignore[arg-type]
    assert 0 < found.latency_s <= time.perf_counter() - started and found.ttft_s == 1 and found.tpot_s == 1


def test_what_ends_one_answer_of_a_batch_is_raised() -> None:
    class Broken:
        def generate(self, prompt: list[dict[str, Any]], **options: Any) -> Any:
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        repeat(Broken(), Point(1, 2, 3), 0)  # type: ignore[arg-type]


def test_pieces_of_an_answer_as_they_come(demo_engine: Path) -> None:
    with Qwen3VLModel.from_engine(demo_engine, threads=1) as model:
        found = stream_once(model, Point(16, 8, 4), 7)
    assert found.stats.new_tokens == 8 and 1 < len(found.pieces_s) <= 8
    assert list(found.pieces_s) == sorted(found.pieces_s) and found.pieces_s[0] > 0


def test_the_estimate_counts_the_images_of_a_whole_batch(tiny_engine: Path) -> None:
    with Qwen3VLModel.from_engine(tiny_engine, threads=1) as model:
        one = estimate(model, [Point(8, 2, 1, (64, 64), 1), Point(99, 2)])
        four = estimate(model, [Point(8, 2), Point(8, 2, 2, (64, 64), 2)])
        none = estimate(model, [Point(8, 2)])
        weights = model.manifest.weight_bytes
    assert list(one) == ["weights", "KV cache", "staging", "prefill", "vision", "kept embeddings", "libraries"]
    assert one["weights"] >= weights and none["vision"] == 0 < one["vision"] < four["vision"]
    assert {**one, "vision": 0} == none


def test_memory_of_the_process(tmp_path: Path) -> None:
    status = tmp_path / "status"
    status.write_text(
        "Name:\tpython\nVmHWM:\t  300 kB\nVmRSS:\t 250 kB\nRssAnon:\t 200 kB\nRssFile:\t 40 kB\nRssShmem:\t 10 kB\n"
    )
    assert ProcessMemory.now(status) == ProcessMemory(200 << 10, 50 << 10, 300 << 10)
    assert ProcessMemory.now(tmp_path / "none") is None
    now = ProcessMemory.now()
    assert now is None or now.peak >= now.anonymous > 1 << 20
