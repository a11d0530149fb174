"""Prompts that give up rows: what they answer then, against PyTorch with a mask of the same rows."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from demo_training.prompts import training_prompts
from engines.build import build_engine
from engines.bundle import Bundle
from engines.quantize.cache_ranges import CacheQuantization
from engines.registry import get
from helpers.own_kernels import needs_own_kernels
from qwen3vl_export.demo.data import canvas_at, example_of
from qwen3vl_export.eager import open_eager
from qwen3vl_export.ops import causal_attention
from runtime.cache_eviction import choose_rows, window_scores
from runtime.cache_types import CacheType
from runtime.contract import DecoderInputs
from runtime.errors import EngineError, UsageError
from runtime.fitting import LEAST_CHUNK, LEAST_PATCHES
from runtime.manifest import Manifest
from runtime.memory_plan import Planner, Work
from runtime.messages import user_message
from runtime.model import Qwen3VLModel
from runtime.scheduling.eviction import MIN_EVICTED_ROWS, Eviction
from runtime.scheduling.sequence import Sequence
from runtime.sessions.ort_cpu import OrtKVCache

BUDGET, NEW_TOKENS = 96, 12
ANSWER: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "eos_token_ids": ()}


def prompt_of(start: int = 0, question: str = "Read the digits.") -> list[dict[str, Any]]:
    """Pictures, some hundred tokens together, and a question."""
    examples = [example_of(i, canvas_at(77, i, "train")) for i in range(start, start + 9)]
    return user_message(question, [each.image.resize((256, 192)) for each in examples])


@pytest.fixture(scope="module")
def engine(demo_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scores") / "engine"
    build_engine(demo_bundle, get("ort-cpu-fp32"), folder, kv_scores=True)
    return folder


@pytest.fixture(scope="module")
def evicting(engine: Path) -> Qwen3VLModel:
    return Qwen3VLModel.from_engine(engine, kv_budget=BUDGET)


@pytest.fixture(scope="module")
def exact(engine: Path) -> Qwen3VLModel:
    return Qwen3VLModel.from_engine(engine)


def kept_rows(model: Qwen3VLModel, messages: list[dict[str, Any]]) -> np.ndarray:
    """Return the rows that a prompt keeps, [layers, K, M]."""
    prepared, text = model.prepare(messages), model.config.text
    inputs = prepared.decoder_inputs(model.encode_images(prepared.images))
    num_rows = inputs.num_cache_rows
    cache = model.session.new_cache(num_rows)
    _, queries = model.session.prefill_with_queries(inputs, cache)
    assert queries.shape == (32, text.num_layers, text.num_heads, text.head_dim)
    chosen = []
    for layer in range(text.num_layers):
        scores = window_scores(queries[:, layer], cache.keys(layer, 0, num_rows), text.head_dim**-0.5)
        chosen.append(choose_rows(scores, BUDGET, len(queries), prepared.prompt.spans))
    return np.stack(chosen)


@pytest.fixture
def masked_attention(monkeypatch: pytest.MonkeyPatch) -> Callable[[np.ndarray], None]:
    """Let PyTorch's decode steps, one layer after the other, attend to some rows of the prompt alone."""

    def use(rows: np.ndarray, num_rows: int) -> None:
        attend = causal_attention.attend
        layers = iter(())

        def masked(q: Any, k: Any, v: Any, scale: float, visible: Any = None) -> Any:
            nonlocal layers
            if q.shape[2] == 1:
                layer = next(layers, None)
                if layer is None:
                    layers = iter(range(len(rows)))
                    layer = next(layers)
                seen = torch.ones(k.shape[1], k.shape[2], dtype=torch.bool)
                seen[:, :num_rows] = False
                seen.scatter_(1, torch.from_numpy(rows[layer]), True)
                visible = visible & seen.repeat_interleave(q.shape[1] // k.shape[1], 0)[None, :, None]
            return attend(q, k, v, scale, visible)

        monkeypatch.setattr(causal_attention, "attend", masked)

    return use


def reference(rows: np.ndarray, messages: list[dict[str, Any]], tokens: list[int], use: Any) -> np.ndarray:
    """Return PyTorch's log probabilities after each of the tokens, with a mask of the rows, [tokens, vocab]."""
    model = open_eager("demo")
    prepared = model.prepare(messages)
    inputs = prepared.decoder_inputs(model.encode_images(prepared.images))
    num_rows = inputs.num_cache_rows
    cache = model.session.new_cache(num_rows + len(tokens))
    use(rows, num_rows)
    found = [model.session.prefill(inputs, cache)[0, -1]]
    for i, token in enumerate(tokens[:-1]):
        step = DecoderInputs.text(
            np.array([[token]]), np.array([num_rows + i]), inputs.visual_embeds[:, :1], delta=prepared.positions.delta
        )
        found.append(model.session.decode(step, cache)[0, -1])
    return torch.log_softmax(torch.from_numpy(np.stack(found)), -1).numpy()


def error_of(model: Qwen3VLModel, messages: list[dict[str, Any]], exact: Qwen3VLModel, use: Any) -> float:
    """Return the largest difference of the log probabilities of an answer's tokens from those of PyTorch."""
    answer = model.generate(messages, logprobs=True, **ANSWER)
    expected = reference(kept_rows(exact, messages), messages, answer.token_ids, use)
    found = [each.logprob for each in answer.logprobs]
    wanted = expected[np.arange(len(answer.token_ids)), answer.token_ids]
    return float(np.abs(wanted - found).max())


def test_answers_are_those_of_attention_to_the_kept_rows(
    evicting: Qwen3VLModel, exact: Qwen3VLModel, masked_attention: Any
) -> None:
    messages = prompt_of()
    answer, whole = (model.generate(messages, logprobs=True, **ANSWER) for model in (evicting, exact))
    assert answer.stats.evicted_rows == answer.stats.prompt_tokens - BUDGET
    assert whole.stats.evicted_rows == 0
    # What was given up matters: the same check would fail for an engine that kept all rows.
    after_first = [abs(a.logprob - b.logprob) for a, b in zip(answer.logprobs[1:], whole.logprobs[1:], strict=True)]
    assert max(after_first) > 0.01
    assert error_of(evicting, messages, exact, masked_attention) < 1e-3


def wrong_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    evict = Sequence.evict

    def changed(self: Sequence, num_kept: int) -> None:
        delta = self.delta
        evict(self, num_kept)
        self.delta = delta

    monkeypatch.setattr(Sequence, "evict", changed)


def rows_of_another_head(monkeypatch: pytest.MonkeyPatch) -> None:
    keep = OrtKVCache.keep_rows
    monkeypatch.setattr(OrtKVCache, "keep_rows", lambda self, i, slot, rows: keep(self, i, slot, rows[::-1]))


def rows_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    keep = OrtKVCache.keep_rows
    monkeypatch.setattr(
        OrtKVCache, "keep_rows", lambda self, i, slot, rows: keep(self, i, slot, np.maximum(rows - 1, 0))
    )


@pytest.mark.parametrize("sabotage", [wrong_positions, rows_of_another_head, rows_off_by_one])
def test_the_comparison_sees_what_is_wrong(
    sabotage: Callable[[pytest.MonkeyPatch], None],
    engine: Path,
    exact: Qwen3VLModel,
    masked_attention: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sabotage(monkeypatch)
    with Qwen3VLModel.from_engine(engine, kv_budget=BUDGET) as model:
        assert error_of(model, prompt_of(), exact, masked_attention) > 1e-2


def test_the_window_is_of_the_last_tokens_whatever_the_chunks(engine: Path) -> None:
    class Session:
        def prefill_with_queries(self, inputs: Any, cache: Any, slot: int) -> tuple[np.ndarray, np.ndarray]:
            return np.zeros((1, 1, 4)), np.array(inputs[-32:], np.float32).reshape(-1, 1, 1, 1)

    eviction = Eviction(cast(Any, Session()), Manifest.read(engine).model, BUDGET, 32)
    sequence = cast(Any, SimpleNamespace(window_queries=None))
    for start, stop in ((0, 5), (5, 60), (60, 63), (63, 64)):
        eviction.prefill(sequence, cast(Any, range(start, stop)), cast(Any, None), 0)
    assert sequence.window_queries.ravel().tolist() == [*range(32, 64)]


def test_what_is_short_is_exact(evicting: Qwen3VLModel, exact: Qwen3VLModel) -> None:
    messages = user_message("How many digits are there?", [example_of(0, canvas_at(77, 0, "train")).image])
    found, wanted = (model.generate(messages, logprobs=True, **ANSWER) for model in (evicting, exact))
    assert found.stats.prompt_tokens < BUDGET + MIN_EVICTED_ROWS and found.stats.evicted_rows == 0
    assert [each.logprob for each in found.logprobs] == [each.logprob for each in wanted.logprobs]


def test_logits_of_prompts_are_exact(evicting: Qwen3VLModel, exact: Qwen3VLModel) -> None:
    messages = prompt_of()
    np.testing.assert_array_equal(evicting.logits(messages), exact.logits(messages))


def test_an_answer_does_not_depend_on_what_ran_before(engine: Path) -> None:
    first, second = prompt_of(), prompt_of(question="How many digits are there?")
    with Qwen3VLModel.from_engine(engine, kv_budget=BUDGET) as model:
        alone = model.generate(second, logprobs=True, **ANSWER)
    with Qwen3VLModel.from_engine(engine, kv_budget=BUDGET) as model:
        before = model.generate(first, **ANSWER)
        after = model.generate(second, logprobs=True, **ANSWER)
        again = model.generate(second, logprobs=True, **ANSWER)
        counted = model.statistics()["evicted_prompt_rows"]
    # What is left of a prompt is the start of no other.
    assert after.stats.cached_tokens == again.stats.cached_tokens == 0
    assert counted == sum(each.stats.evicted_rows for each in (before, after, again))
    assert alone.token_ids == after.token_ids == again.token_ids
    for found in (after, again):
        assert [each.logprob for each in found.logprobs] == [each.logprob for each in alone.logprobs]


def test_rows_of_a_short_prompt_are_shared_but_for_the_window(engine: Path) -> None:
    with Qwen3VLModel.from_engine(engine, kv_budget=BUDGET, kept_sequences=2) as model:
        alone = model.generate(prompt_of(), logprobs=True, **ANSWER)
        short = prompt_of()
        short[0]["content"] = [*short[0]["content"][:2], short[0]["content"][-1]]
        model.generate(short, **ANSWER)
        shared = model.generate(prompt_of(), logprobs=True, **ANSWER)
    assert 0 < shared.stats.cached_tokens <= shared.stats.prompt_tokens - 32
    assert shared.token_ids == alone.token_ids
    np.testing.assert_allclose(
        [each.logprob for each in shared.logprobs], [each.logprob for each in alone.logprobs], atol=1e-3
    )


def test_side_by_side_and_with_drafts(engine: Path, evicting: Qwen3VLModel) -> None:
    prompts = [prompt_of(), prompt_of(9), user_message("Hi"), prompt_of(4)]
    alone = [evicting.generate(each, **ANSWER) for each in prompts]
    beside = evicting.generate_batch(prompts, **ANSWER)
    assert [each.token_ids for each in beside] == [each.token_ids for each in alone]
    assert [each.stats.evicted_rows > 0 for each in alone] == [True, True, False, True]
    drafted = [evicting.generate(each, prompt_lookup_num_tokens=4, **ANSWER) for each in prompts]
    assert [each.token_ids for each in drafted] == [each.token_ids for each in alone]


def test_an_answer_may_fill_the_context(engine: Path) -> None:
    messages = prompt_of()
    with Qwen3VLModel.from_engine(engine) as model:
        num_tokens = len(model.prepare(messages).prompt.input_ids)
    with Qwen3VLModel.from_engine(engine, kv_budget=BUDGET, max_context=num_tokens + 8) as model:
        answer = model.generate(messages, do_sample=False, eos_token_ids=(), prompt_lookup_num_tokens=4)
    assert (len(answer.token_ids), answer.finish_reason) == (8, "length")


@needs_own_kernels
@pytest.mark.parametrize("bits", [None, 16, 8, 4])
def test_own_kernels_and_smaller_caches(bits: int | None, demo_bundle: Bundle, tmp_path: Path) -> None:
    (own,) = get("ort-cpu-int8").other_kernels
    cache = None if bits is None else CacheQuantization(bits, () if bits == 16 else training_prompts(8))
    build_engine(demo_bundle, own, tmp_path / "engine", cache=cache, kv_scores=True)
    messages = prompt_of()
    with Qwen3VLModel.from_engine(tmp_path / "engine") as model:
        prepared = model.prepare(messages)
        inputs = prepared.decoder_inputs(model.encode_images(prepared.images))
        num_rows = inputs.num_cache_rows
        cache_of = model.session.new_cache(num_rows)
        logits, _ = model.session.prefill_with_queries(inputs, cache_of)
        before = [cache_of.layer(i) for i in range(4)]
        np.testing.assert_array_equal(logits, model.session.prefill(inputs, model.session.new_cache(num_rows)))
        rows = np.sort(np.random.default_rng(0).permuted(np.tile(np.arange(num_rows), (2, 1)), axis=1)[:, :60], axis=1)
        for layer in range(4):
            cache_of.keep_rows(layer, 0, rows)
            for kept, whole in zip(cache_of.layer(layer), before[layer], strict=True):
                np.testing.assert_array_equal(kept[0, :, :60], np.take_along_axis(whole[0], rows[..., None], 1))
    with Qwen3VLModel.from_engine(tmp_path / "engine", kv_budget=BUDGET) as model:
        answer = model.generate(messages, **ANSWER)
    assert answer.stats.evicted_rows == num_rows - BUDGET and len(answer.token_ids) == NEW_TOKENS


@needs_own_kernels
def test_own_kernels_give_the_queries_that_the_library_gives(demo_bundle: Bundle, tmp_path: Path) -> None:
    """The library's attention takes them normed and rotated; for our own, that is done once more."""
    target = get("ort-cpu-int8")
    found = []
    for name, each in (("library", target), ("own", target.other_kernels[0])):
        build_engine(demo_bundle, each, tmp_path / name, kv_scores=True)
        with Qwen3VLModel.from_engine(tmp_path / name) as model:
            prepared = model.prepare(prompt_of())
            inputs = prepared.decoder_inputs(model.encode_images(prepared.images))
            found.append(model.session.prefill_with_queries(inputs, model.session.new_cache(inputs.num_cache_rows))[1])
    library, own = found
    assert library.shape == own.shape
    errors_L = [np.linalg.norm(own[:, i] - library[:, i]) / np.linalg.norm(library[:, i]) for i in range(own.shape[1])]
    print(errors_L)  # pytest -rP shows them
    assert max(errors_L) < 0.05


def resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_rows_is_given_back() -> None:
    cache = OrtKVCache([CacheType("float32", 32)], (2, 4, 4096, 64))
    ones = np.ones((2, 4, 4096, 64), np.float32)
    cache.write_layer(0, ones, ones)
    before = resident_bytes()
    cache.release_rows(1, 100, 4096)
    freed = before - resident_bytes()
    assert 0.9 < freed / (2 * 4 * (4096 - 100) * 64 * 4) <= 1.1
    keys, values = cache.layer(0)
    for part in (keys, values):
        assert (part[0] == 1).all() and (part[1, :, :100] == 1).all()


def test_refused(engine: Path, demo_engine: Path) -> None:
    for value, words in ((63, "expected 64"), (4096, "to 3840"), (0, "at least|1 to"), (1.5, "kv_budget")):
        with pytest.raises(UsageError, match=words):
            Qwen3VLModel.from_engine(engine, kv_budget=value)
    with pytest.raises(UsageError, match="too short to give up rows"):
        Qwen3VLModel.from_engine(engine, kv_budget=64, max_context=300)
    with pytest.raises(UsageError, match="kv_budget and window are given together"):
        Qwen3VLModel.from_engine(engine, kv_budget=BUDGET, window=1024)
    with pytest.raises(UsageError, match="does not give the queries"):
        Qwen3VLModel.from_engine(engine, kv_budget=BUDGET, prefill_engine=demo_engine)
    with pytest.raises(UsageError, match="does not give the queries") as caught:
        Qwen3VLModel.from_engine(demo_engine, kv_budget=BUDGET)
    assert caught.value.remedy == "build the engine with --kv-scores, and leave prefill_engine out"


def test_a_budget_that_the_fitted_context_never_reaches_is_refused(engine: Path) -> None:
    least = Work(1000, images=(LEAST_PATCHES,), prompts_with_images=1, embeds_bytes=0, chunk=LEAST_CHUNK)
    room = Planner.of(Manifest.read(engine), 1).plan(least).total_bytes
    options: dict[str, Any] = {"fit": True, "max_memory": room, "threads": 1}
    with Qwen3VLModel.from_engine(engine, kv_budget=BUDGET, **options) as model:
        assert BUDGET + MIN_EVICTED_ROWS < model.max_context < 3000
    with pytest.raises(UsageError, match=r"kv_budget=3000: expected 64, .* to \d{3}, "):
        Qwen3VLModel.from_engine(engine, kv_budget=3000, **options)


def test_another_engine_may_run_the_vision_tower(engine: Path, demo_engine: Path, evicting: Qwen3VLModel) -> None:
    alone = evicting.generate(prompt_of(), logprobs=True, **ANSWER)
    with Qwen3VLModel.from_engine(engine, kv_budget=BUDGET, vision_engine=demo_engine) as model:
        answer = model.generate(prompt_of(), logprobs=True, **ANSWER)
    assert answer.stats.evicted_rows == alone.stats.evicted_rows > 0
    assert [each.logprob for each in answer.logprobs] == [each.logprob for each in alone.logprobs]


def test_prompts_of_which_visual_tokens_were_pruned_give_up_rows_too(engine: Path) -> None:
    messages = prompt_of()
    with Qwen3VLModel.from_engine(engine, kv_budget=64, visual_token_share=0.7) as model:
        answer = model.generate(messages, **ANSWER)
        assert answer.stats.pruned_tokens > 0
        assert answer.stats.evicted_rows == answer.stats.prompt_tokens - 64 >= MIN_EVICTED_ROWS


def test_a_graph_without_the_queries_is_refused(demo_engine: Path, tmp_path: Path) -> None:
    shutil.copytree(demo_engine, tmp_path / "engine")
    manifest = Manifest.read(demo_engine)
    dataclasses.replace(manifest, capabilities={**manifest.capabilities, "kv_scores": 32}).write(tmp_path / "engine")
    with pytest.raises(EngineError, match="lacks the outputs window_queries"):
        Qwen3VLModel.from_engine(tmp_path / "engine")


def test_a_second_decoder_for_prompts_gives_them_too(demo_bundle: Bundle, tmp_path: Path) -> None:
    build_engine(demo_bundle, get("ort-cpu-int4p8"), tmp_path / "engine", kv_scores=True)
    with Qwen3VLModel.from_engine(tmp_path / "engine", kv_budget=BUDGET) as model:
        assert model.generate(prompt_of(), **ANSWER).stats.evicted_rows > 0
