"""Processors against transformers' on random logits, alone and as `generate` chains them; what a draw follows."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import judge
from helpers.random_checkpoints import tiny_values
from runtime import sampling
from runtime.errors import EngineError
from runtime.generation_config import GenerationOptions
from runtime.sampling import PROCESSORS, Logits, LogitsProcessor, Sampler, TokenHistory, build_processors


def random_logits(seed: int, num_rows: int = 3, num_tokens: int = 1000, *, ties: bool = False) -> Logits:
    logits = (np.random.default_rng(seed).standard_normal((num_rows, num_tokens)) * 3).astype(np.float32)
    return np.round(logits * 2) / np.float32(2) if ties else logits


def run_reference(processor: Any, logits_BV: Logits, ids: list[list[int]] | None = None) -> Logits:
    import torch

    ids = [[0]] * len(logits_BV) if ids is None else ids
    return processor(torch.tensor(ids), torch.from_numpy(logits_BV.copy())).numpy()


def assert_same_filter(ours_BV: Logits, reference_BV: Logits, *, ties: bool) -> None:
    # Which of several equal tokens top-p drops is up to torch.sort, which is not stable: then values are compared, not
    # places. Equal tokens are many at the edge of every filter here, so their number is what is tested.
    if ties:
        ours_BV, reference_BV = np.sort(ours_BV), np.sort(reference_BV)
    np.testing.assert_array_equal(ours_BV, reference_BV)


@pytest.mark.portable
def test_top_p_drops_the_lower_ids_of_equal_tokens() -> None:
    logits_BV = np.array([[1, 2, 1, 1, 2, 1]], np.float32)
    # e² = 7.39, e = 2.72: shares 0.288 and 0.106. 1 - 0.75 leaves room to drop two of the smaller.
    kept = np.isfinite(sampling.TopP(0.75)(logits_BV, [TokenHistory()]))
    assert kept.tolist() == [[False, True, False, True, True, True]]


# Our processor, and the name of transformers' with its argument.
WARPERS: dict[str, tuple[Any, str, float]] = {
    "temperature 0.7": (sampling.Temperature(0.7), "TemperatureLogitsWarper", 0.7),
    "temperature 1.9": (sampling.Temperature(1.9), "TemperatureLogitsWarper", 1.9),
    "top_k 1": (sampling.TopK(1), "TopKLogitsWarper", 1),
    "top_k 20": (sampling.TopK(20), "TopKLogitsWarper", 20),
    "top_k all": (sampling.TopK(5000), "TopKLogitsWarper", 5000),
    "top_p 0.8": (sampling.TopP(0.8), "TopPLogitsWarper", 0.8),
    "top_p 0.999": (sampling.TopP(0.999), "TopPLogitsWarper", 0.999),
    "top_p 1e-6": (sampling.TopP(1e-6), "TopPLogitsWarper", 1e-6),
    "min_p 0.05": (sampling.MinP(0.05), "MinPLogitsWarper", 0.05),
    "min_p 1": (sampling.MinP(1.0), "MinPLogitsWarper", 1.0),
}


def warpers(name: str) -> tuple[Any, Any]:
    import transformers

    ours, theirs, argument = WARPERS[name]
    return ours, getattr(transformers, theirs)(argument)


@pytest.mark.judge
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("name", WARPERS)
def test_warper_equals_transformers(name: str, ties: bool) -> None:
    ours, reference = warpers(name)
    histories = [TokenHistory()] * 3
    for seed in range(8):
        logits_BV = random_logits(seed, ties=ties)
        before = logits_BV.copy()
        assert_same_filter(ours(logits_BV, histories), run_reference(reference, logits_BV), ties=ties)
        np.testing.assert_array_equal(logits_BV, before)


@pytest.mark.judge
@pytest.mark.parametrize("name", WARPERS)
def test_warper_equals_transformers_after_top_k(name: str) -> None:
    ours, reference = warpers(name)
    for seed in range(8):
        logits_BV = sampling.TopK(40)(random_logits(seed), [TokenHistory()] * 3)
        np.testing.assert_array_equal(ours(logits_BV, [TokenHistory()] * 3), run_reference(reference, logits_BV))


@pytest.mark.judge
def test_top_p_equals_transformers_at_the_size_of_the_real_vocabulary() -> None:
    from transformers import TopPLogitsWarper

    logits_BV = random_logits(0, 1, 151936)
    ours = sampling.TopP(0.9)(logits_BV, [TokenHistory()])
    reference = run_reference(TopPLogitsWarper(0.9), logits_BV)
    # The float32 sums of 151936 probabilities differ in the last bit, so a token at the very edge may go either way.
    assert np.count_nonzero(np.isfinite(ours) != np.isfinite(reference)) <= 1
    assert 1000 < np.count_nonzero(np.isfinite(ours)) < 100000


@pytest.mark.judge
@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_repetition_penalty_equals_transformers(penalty: float) -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    rng = np.random.default_rng(1)
    # Ids at and beyond V occur where an embedding is larger than the head; 5.10 and before do not stand them. Repeated
    # ids count once.
    ids = rng.integers(0, 60 if judge.release() > (5, 10) else 50, size=(3, 40))
    histories = [TokenHistory(row[:25]) for row in ids]
    for history, row in zip(histories, ids, strict=True):
        for token_id in row[25:]:
            history.append(int(token_id))
    logits_BV = random_logits(2, num_tokens=50)
    ours = sampling.RepetitionPenalty(penalty)(logits_BV, histories)
    np.testing.assert_array_equal(
        ours, run_reference(RepetitionPenaltyLogitsProcessor(penalty), logits_BV, ids.tolist())
    )
    assert not np.array_equal(ours, logits_BV)


@pytest.mark.portable
def test_additive_penalties_count_the_answer_alone() -> None:
    history = TokenHistory([0, 1, 1])
    for token_id in (1, 2, 2, 2):
        history.append(token_id)
    logits_BV = np.zeros((1, 4), np.float32)
    # OpenAI: mu - count · frequency - (count > 0) · presence
    np.testing.assert_array_equal(sampling.PresencePenalty(0.5)(logits_BV, [history]), [[0, -0.5, -0.5, 0]])
    np.testing.assert_array_equal(sampling.FrequencyPenalty(0.5)(logits_BV, [history]), [[0, -0.5, -1.5, 0]])


@pytest.mark.judge
@pytest.mark.parametrize("ties", [False, True])
def test_the_whole_chain_equals_what_generate_makes_of_the_logits(ties: bool) -> None:
    """Raw logits and scores of every step, which penalties, temperature and the filters lie between."""
    import torch

    torch.manual_seed(0)
    model = judge.new_model(tiny_values(tie_word_embeddings=False, text_config={"vocab_size": 1000}))
    head = torch.from_numpy(random_logits(0, 1000, 48)) / 12
    # Rows of the head that are equal make equal logits, far more of them than top-k keeps.
    model.lm_head.weight.data = head[torch.arange(1000) % 40] if ties else head
    settings_ = {"temperature": 0.8, "top_k": 30, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2}
    ours, num_kept = build_processors(GenerationOptions(do_sample=True, **settings_)), []
    for seed in range(8):
        torch.manual_seed(seed)
        ids = torch.randint(0, 1000, (1, 50))
        asked = {"output_logits": True, "output_scores": True, "return_dict_in_generate": True, "max_new_tokens": 4}
        generated = model.generate(ids, do_sample=True, eos_token_id=None, **settings_, **asked)
        assert len(generated.scores) == 4
        for step, (logits, scores) in enumerate(zip(generated.logits, generated.scores, strict=True)):
            found = logits.numpy()
            history = TokenHistory(generated.sequences[0, : 50 + step].tolist())
            for processor in ours:
                found = processor(found, [history])
            num_kept.append(np.isfinite(found).sum())
            assert_same_filter(found, scores.numpy(), ties=ties)
    assert len(set(num_kept)) > 3 and 5 < np.mean(num_kept) < (500 if ties else 30), num_kept


def test_every_processor_says_both_flags() -> None:
    """Else an engine that hands out the largest logits alone would sample from them, and nobody would see it."""
    flags = ("is_for_greedy", "needs_all_logits")

    class Forgetful(LogitsProcessor):
        option, off = "min_p", 0.0
        is_for_greedy = False

        def __call__(self, logits_BV: Logits, histories: Sequence[TokenHistory]) -> Logits:
            return logits_BV

    said = {kind: [getattr(kind, flag, None) for flag in flags] for kind in (*PROCESSORS, Forgetful)}
    assert said.pop(Forgetful) == [False, None]
    assert {type(value) for values in said.values() for value in values} == {bool}
    with pytest.raises(AttributeError):
        Forgetful(0.5).needs_all_logits  # noqa: B018


@pytest.mark.portable
def test_only_what_is_switched_on_is_built() -> None:
    everything = GenerationOptions(
        do_sample=True,
        temperature=0.5,
        top_k=5,
        top_p=0.5,
        min_p=0.5,
        repetition_penalty=1.1,
        presence_penalty=1,
        frequency_penalty=1,
    )
    names = [type(processor).__name__ for processor in build_processors(everything)]
    assert names == [
        *("RepetitionPenalty", "PresencePenalty", "FrequencyPenalty"),
        *("Temperature", "TopK", "TopP", "MinP"),
    ]
    assert [type(p).__name__ for p in build_processors(everything.replace(do_sample=False))] == names[:3]
    assert build_processors(GenerationOptions(do_sample=True, top_k=0)) == []


@pytest.mark.portable
@settings(max_examples=50)
@given(
    prompt=st.lists(st.integers(0, 30), max_size=20),
    answer=st.lists(st.integers(0, 30), max_size=90),
)
def test_history_equals_a_recount(prompt: list[int], answer: list[int]) -> None:
    history = TokenHistory(prompt)
    for token_id in answer:
        history.append(token_id)
    assert sorted(history.seen_ids.tolist()) == sorted({*prompt, *answer})
    counts = dict(zip(history.generated_ids.tolist(), history.generated_counts.tolist(), strict=True))
    assert counts == {token_id: answer.count(token_id) for token_id in set(answer)}


@pytest.mark.portable
def test_a_history_holds_each_token_once() -> None:
    history = TokenHistory(range(10))
    for token_id in range(5, 500):
        history.append(token_id)
    assert sorted(history.seen_ids.tolist()) == list(range(500))
    assert history.generated_ids.tolist() == list(range(5, 500))


@pytest.mark.portable
def test_sampler_applies_penalties_step_by_step() -> None:
    sampler = Sampler(GenerationOptions(frequency_penalty=0.4, repetition_penalty=2.0))
    sampler.start([3])
    logits_V = np.array([1.0, 0.9, 0.0, 1.9, -5.0], np.float32)
    # Token 3 is in the prompt and starts at 1.9 / 2; token 0 falls from 1 to 1 / 2 - 0.4 once it is taken, token 1
    # from 0.9 to 0.05; token 3 goes 0.95, 0.55, 0.15, -0.25.
    assert [sampler.next(logits_V) for _ in range(6)] == [0, 3, 1, 3, 3, 0]
    sampler.start([])
    assert sampler.next(logits_V) == 3


@pytest.mark.portable
def test_greedy_takes_the_lowest_of_equal_tokens_as_torch_does() -> None:
    import torch

    for seed in range(20):
        logits_V = np.round(random_logits(seed, 1, 300)[0] / 3)
        assert sampling.greedy(logits_V) == int(torch.argmax(torch.from_numpy(logits_V)))
        assert np.count_nonzero(logits_V == logits_V.max()) >= 1
    assert sampling.greedy(np.array([0, 2, 2, 2], np.float32)) == 1


@pytest.mark.portable
def test_the_draw_follows_the_distribution() -> None:
    logits_V = np.array([1.0, 0.0, -np.inf, 2.0, -1.0], np.float32)
    rng = np.random.default_rng(0)
    counts = np.bincount([sampling.sample(logits_V, rng) for _ in range(20000)], minlength=5)
    weights = np.exp(logits_V.astype(np.float64))
    expected = 20000 * weights / weights.sum()
    assert counts[2] == 0
    # 5 standard deviations of a binomial count.
    assert np.all(np.abs(counts - expected) <= 5 * np.sqrt(expected))


@pytest.mark.portable
@pytest.mark.parametrize(("uniform", "expected"), [(0.0, 1), (0.49, 1), (0.51, 3), (1.0, 3)])
def test_the_edges_of_the_uniform_number_never_leave_the_support(uniform: float, expected: int) -> None:
    # The first and the last token have weights that underflow to 0; 1.0 stands for a product rounded up to the total.
    logits_V = np.array([-1000.0, 0.0, -np.inf, 0.0, -1000.0], np.float32)
    assert sampling.sample(logits_V, SimpleNamespace(random=lambda: uniform)) == expected


@pytest.mark.portable
def test_a_seed_makes_the_answer_repeatable() -> None:
    logits = random_logits(0, 40, 200)
    sampler = Sampler(GenerationOptions(do_sample=True, seed=7, top_k=0))
    sampler.start([1, 2])
    first = [sampler.next(row) for row in logits]
    sampler.start([1, 2])
    assert [sampler.next(row) for row in logits] == first
    other = Sampler(GenerationOptions(do_sample=True, seed=8, top_k=0))
    assert [other.next(row) for row in logits] != first


@pytest.mark.portable
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("do_sample", [False, True])
def test_logits_that_are_not_finite_are_an_error(bad: float, do_sample: bool) -> None:
    logits_V = random_logits(0, 1, 10)[0]
    logits_V[4] = bad
    with pytest.raises(EngineError, match="1 of 10, the first at token 4"):
        Sampler(GenerationOptions(do_sample=do_sample, seed=0)).next(logits_V)


@pytest.mark.portable
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_the_bare_functions_refuse_them_too(bad: float) -> None:
    logits_V = np.array([0.0, bad, 1.0], np.float32)
    with pytest.raises(EngineError):
        sampling.greedy(logits_V)
    with pytest.raises(EngineError):
        sampling.sample(logits_V, np.random.default_rng(0))
    with pytest.raises(EngineError):
        sampling.sample(np.full(3, -np.inf, np.float32), np.random.default_rng(0))


@pytest.mark.judge
def test_any_options_give_the_scores_and_the_tokens_of_transformers() -> None:
    """Random options together, as `generate` chains them; with the same uniform number, the same token."""
    import torch

    torch.manual_seed(0)
    model = judge.new_model(tiny_values(tie_word_embeddings=False, text_config={"vocab_size": 400}))
    model.lm_head.weight.data = torch.from_numpy(random_logits(0, 400, 48)) / 12
    rng = np.random.default_rng(5)
    choices: dict[str, list[Any]] = {
        "do_sample": [True, True, False],
        "temperature": [1.0, 0.3, 1.7],
        "top_k": [0, 1, 7, 50, 1000],
        "top_p": [0.0, 1e-6, 0.5, 0.95, 1.0],
        "min_p": [0.0, 0.05, 1.0],
        "repetition_penalty": [1.0, 0.8, 1.3],
    }
    num_kept = set()
    for seed in range(60):
        options = {name: values[rng.integers(len(values))] for name, values in choices.items()}
        if not options["do_sample"]:
            options = {name: options[name] for name in ("do_sample", "repetition_penalty")}
        ids = torch.from_numpy(rng.integers(0, 400, (1, 30)))
        asked = {"output_logits": True, "output_scores": True, "return_dict_in_generate": True, "max_new_tokens": 3}
        made = model.generate(ids, eos_token_id=None, **options, **asked)
        for step, (logits, scores) in enumerate(zip(made.logits, made.scores, strict=True)):
            before = made.sequences[0, : 30 + step].tolist()
            sampler, found = Sampler(GenerationOptions(**options, seed=seed)), logits.numpy()
            for processor in build_processors(sampler.options):
                found = processor(found, [TokenHistory(before)])
            np.testing.assert_array_equal(found, scores.numpy(), err_msg=str(options))
            num_kept.add(int(np.isfinite(found).sum()))
            sampler.start(before)
            chosen = sampler.next(logits[0].numpy())
            if options["do_sample"]:
                shares = torch.softmax(scores[0].double(), 0).cumsum(0).numpy()
                uniform = np.random.default_rng(seed).random()
                assert chosen == int(np.searchsorted(shares / shares[-1], uniform, side="right"))
            else:
                assert chosen == made.sequences[0, 30 + step]
    assert len(num_kept) > 15 and {1, 400} <= num_kept
