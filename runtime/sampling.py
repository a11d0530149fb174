"""From logits to the next token: penalties, filters, and the draw.

Every processor is a plain callable `(logits_BV, histories) -> logits_BV`: float32 in and out, the input is left as it
is, filtered tokens become -inf. Each equals the processor of transformers 5.23 named in its docstring, in which the
order of `build_processors` is that of `GenerationMixin._get_logits_processor`.

Shape suffixes: B sequences, V vocabulary, K candidates that a filter has left.

One `Sampler.next` at V = 151936, normal logits of deviation 2.5, prompt of 4000 distinct tokens, median of 40 on one
core of an AMD EPYC Zen 4, numpy 2: greedy 0.05 ms · temperature 0.7, top_k 20, top_p 0.8 (Qwen3-VL's defaults) 0.4 ms ·
top_p alone 3.5 ms (it sorts the vocabulary) · no filter 1.8 ms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from runtime.errors import EngineError
from runtime.generation_config import GenerationOptions
from runtime.session import TopLogits

Logits = npt.NDArray[np.float32]


class TokenHistory:
    """Remember which tokens a sequence holds.

    Args:
        prompt_ids: The token ids of the prompt, image tokens included (as transformers' `input_ids`).
    """

    def __init__(self, prompt_ids: Sequence[int] | npt.NDArray[np.int64] = ()) -> None:
        self._seen = dict.fromkeys(np.unique(np.asarray(prompt_ids, np.int64)).tolist())
        self._counts: dict[int, int] = {}

    @property
    def seen_ids(self) -> npt.NDArray[np.int64]:
        """Distinct token ids of prompt and answer, in no particular order."""
        return np.fromiter(self._seen, np.int64, len(self._seen))

    @property
    def generated_ids(self) -> npt.NDArray[np.int64]:
        """Distinct token ids of the answer."""
        return np.fromiter(self._counts, np.int64, len(self._counts))

    @property
    def generated_counts(self) -> npt.NDArray[np.int64]:
        """How often each of `generated_ids` occurs in the answer."""
        return np.fromiter(self._counts.values(), np.int64, len(self._counts))

    def append(self, token_id: int) -> None:
        """Add one generated token."""
        self._seen[token_id] = None
        self._counts[token_id] = self._counts.get(token_id, 0) + 1


LogitsProcessor = Callable[[Logits, Sequence[TokenHistory]], Logits]


class _OfRows:
    """A processor that looks at one sequence at a time."""

    def __call__(self, logits_BV: Logits, histories: Sequence[TokenHistory]) -> Logits:
        """Return processed logits."""
        result_BV = logits_BV.copy()
        for row_V, history in zip(result_BV, histories, strict=True):
            self.change(row_V, history)
        return result_BV

    def change(self, row_V: Logits, history: TokenHistory) -> None:
        """Write the processed logits of a sequence over its row."""
        raise NotImplementedError


@dataclass(frozen=True)
class RepetitionPenalty(_OfRows):
    """Make the tokens of prompt and answer less likely, once each.

    A positive logit is divided by the penalty, a negative one multiplied (Keskar et al. 2019, arXiv:1909.05858,
    section 4.1, in the form of transformers' `RepetitionPenaltyLogitsProcessor`).
    """

    penalty: float

    def change(self, row_V: Logits, history: TokenHistory) -> None:
        """Penalise a row; ids at or beyond V are passed over."""
        ids = history.seen_ids
        ids = ids[ids < len(row_V)]
        values, penalty = row_V[ids], np.float32(self.penalty)
        row_V[ids] = np.where(values < 0, values * penalty, values / penalty)


@dataclass(frozen=True)
class PresencePenalty(_OfRows):
    """Subtract a constant from the logit of every token that the answer holds; the prompt does not count.

    OpenAI's definition, `mu[j] - c[j] * alpha_frequency - float(c[j] > 0) * alpha_presence` with c the counts in the
    sampled text (API guide, "Frequency and presence penalties"); vLLM's `presence_penalty` is the same. transformers
    5.23 has no such processor.
    """

    penalty: float

    def change(self, row_V: Logits, history: TokenHistory) -> None:
        """Penalise a row."""
        row_V[history.generated_ids] -= np.float32(self.penalty)


@dataclass(frozen=True)
class FrequencyPenalty(_OfRows):
    """Subtract a constant times the number of occurrences in the answer; for the source see `PresencePenalty`."""

    penalty: float

    def change(self, row_V: Logits, history: TokenHistory) -> None:
        """Penalise a row."""
        row_V[history.generated_ids] -= np.float32(self.penalty) * history.generated_counts.astype(np.float32)


@dataclass(frozen=True)
class Temperature:
    """Divide the logits by the temperature (transformers' `TemperatureLogitsWarper`)."""

    temperature: float

    def __call__(self, logits_BV: Logits, histories: Sequence[TokenHistory]) -> Logits:
        """Return scaled logits."""
        return logits_BV / np.float32(self.temperature)


@dataclass(frozen=True)
class TopK:
    """Keep the k largest logits, and all that equal the k-th (transformers' `TopKLogitsWarper`)."""

    top_k: int

    def __call__(self, logits_BV: Logits, histories: Sequence[TokenHistory]) -> Logits:
        """Return filtered logits."""
        num_tokens = logits_BV.shape[-1]
        if self.top_k >= num_tokens:
            return logits_BV.copy()
        kth_B1 = np.partition(logits_BV, num_tokens - self.top_k, axis=-1)[:, num_tokens - self.top_k, None]
        return np.where(logits_BV < kth_B1, np.float32(-np.inf), logits_BV)


@dataclass(frozen=True)
class TopP:
    """Keep the most likely tokens whose probabilities add up to `top_p` (transformers' `TopPLogitsWarper`).

    The least likely tokens are dropped while their sum is at most `1 - top_p`; of equally likely ones the lower id
    goes first. Holtzman et al. 2020, arXiv:1904.09751.
    """

    top_p: float

    def __call__(self, logits_BV: Logits, histories: Sequence[TokenHistory]) -> Logits:
        """Return filtered logits."""
        result_BV = logits_BV.copy()
        for row_V in result_BV:
            # Tokens a filter before this one has dropped have probability 0 and change no sum: after top-k there are
            # few left. Sorting values and not indices lets numpy use its vectorised sort.
            candidates_K = np.flatnonzero(row_V > -np.inf)
            values_K = row_V[candidates_K]
            sorted_K = np.sort(values_K)
            probabilities_K = _softmax(sorted_K)
            # torch's cumsum on the CPU adds float32 in double precision and rounds every partial sum.
            sums_K = np.cumsum(probabilities_K, dtype=np.float64).astype(np.float32)
            num_dropped = int(np.count_nonzero(sums_K <= np.float32(1 - self.top_p)))
            num_dropped = min(num_dropped, len(sorted_K) - 1)
            edge = sorted_K[num_dropped]
            row_V[candidates_K[values_K < edge]] = -np.inf
            num_dropped_at_edge = num_dropped - int(np.searchsorted(sorted_K, edge, side="left"))
            row_V[candidates_K[values_K == edge][:num_dropped_at_edge]] = -np.inf
        return result_BV


@dataclass(frozen=True)
class MinP:
    """Keep tokens whose probability is at least `min_p` times the largest one (transformers' `MinPLogitsWarper`)."""

    min_p: float

    def __call__(self, logits_BV: Logits, histories: Sequence[TokenHistory]) -> Logits:
        """Return filtered logits."""
        probabilities_BV = _softmax(logits_BV)
        threshold_B1 = np.float32(self.min_p) * probabilities_BV.max(axis=-1, keepdims=True)
        return np.where(probabilities_BV < threshold_B1, np.float32(-np.inf), logits_BV)


def _softmax(logits: Logits) -> Logits:
    """Return softmax over the last axis, in float32 as transformers' warpers compute it; -inf gives 0."""
    exponentials: Logits = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probabilities: Logits = exponentials / exponentials.sum(axis=-1, keepdims=True)
    return probabilities


def build_processors(options: GenerationOptions) -> list[LogitsProcessor]:
    """Return the processors that the options switch on, in transformers' order.

    Penalties come first and also shape greedy decoding; temperature and filters only exist when sampling. The
    additive penalties stand where transformers puts a caller's own processors, between the two groups, as in vLLM.
    """
    processors: list[LogitsProcessor] = []
    if options.repetition_penalty != 1.0:
        processors.append(RepetitionPenalty(options.repetition_penalty))
    if options.presence_penalty != 0.0:
        processors.append(PresencePenalty(options.presence_penalty))
    if options.frequency_penalty != 0.0:
        processors.append(FrequencyPenalty(options.frequency_penalty))
    if not options.do_sample:
        return processors
    if options.temperature != 1.0:
        processors.append(Temperature(options.temperature))
    if options.top_k != 0:
        processors.append(TopK(options.top_k))
    if options.top_p < 1.0:
        processors.append(TopP(options.top_p))
    if options.min_p > 0.0:
        processors.append(MinP(options.min_p))
    return processors


def greedy(logits_V: Logits) -> int:
    """Return the token with the largest logit; of equal ones the lowest id, as `torch.argmax` on the CPU.

    Raises:
        EngineError: A logit is NaN or +inf, or all are -inf.
    """
    token_id = int(np.argmax(logits_V))
    # argmax returns the position of a NaN if there is one.
    if not np.isfinite(logits_V[token_id]):
        raise _bad_logits(logits_V)
    return token_id


def sample(logits_V: Logits, rng: np.random.Generator) -> int:
    """Draw a token from softmax(logits) by inverting the cumulative distribution in float64.

    Uses one uniform number of `rng`. A token with logit -inf is never drawn.

    Raises:
        EngineError: A logit is NaN or +inf, or all are -inf.
    """
    largest = logits_V.max()
    if not np.isfinite(largest):
        raise _bad_logits(logits_V)
    candidates_K = np.flatnonzero(logits_V > -np.inf)
    weights_K = np.exp(logits_V[candidates_K].astype(np.float64) - np.float64(largest))
    sums_K = np.cumsum(weights_K)
    index = int(np.searchsorted(sums_K, rng.random() * sums_K[-1], side="right"))
    if index == len(sums_K):
        # The product can round up to the total: take the last token of weight above 0.
        index = int(np.searchsorted(sums_K, sums_K[-1], side="left"))
    return int(candidates_K[index])


def _bad_logits(logits_V: Logits) -> EngineError:
    bad = np.flatnonzero(~np.isfinite(logits_V))
    return EngineError(
        f"the engine gave logits that are not finite: {len(bad)} of {len(logits_V)}, the first at token {bad[0]}: "
        f"{logits_V[bad[0]]}",
        remedy="compare the engine with PyTorch (`qwen3vl verify`); a half-precision target may have overflowed",
    )


class Sampler:
    """Choose the tokens of one answer: processors, then greedy or a seeded draw.

    Args:
        options: The checked options. The same seed, prompt and logits give the same tokens.
    """

    def __init__(self, options: GenerationOptions) -> None:
        self.options = options
        self._processors = build_processors(options)
        self.start(())

    def start(self, prompt_ids: Sequence[int] | npt.NDArray[np.int64]) -> None:
        """Begin an answer: forget the last one, take the prompt's tokens, reseed the generator."""
        self._history = TokenHistory(prompt_ids)
        self._rng = np.random.default_rng(self.options.seed)

    def can_use_top(self, num_top: int) -> bool:
        """Return whether so many largest logits, ties aside, decide the next token whatever the others are.

        Greedy decoding needs one, sampling the `top_k` of the options. A penalty may raise any other token above
        them, and `min_p` sums the exponentials of the whole row, in which the order of the summands shows.
        """
        o = self.options
        if (o.repetition_penalty, o.presence_penalty, o.frequency_penalty) != (1.0, 0.0, 0.0):
            return False
        return 0 < self._num_kept < num_top and not (o.do_sample and o.min_p > 0.0)

    def next(self, logits: Logits | TopLogits) -> int:
        """Return the next token of the answer and remember it.

        Args:
            logits: float32 [V], as the engine gives them; not written to. Or the largest of them, if `can_use_top`:
                the token is the same, and only where a tie reaches beyond them is the whole row fetched.

        Raises:
            EngineError: A logit is not finite.
        """
        if isinstance(logits, TopLogits):
            row, ids = self._candidates(logits)
        else:
            row, ids = logits, None
        if not np.isfinite(row).all():
            raise _bad_logits(row)
        processed: Logits = np.asarray(row, dtype=np.float32)[None]
        for processor in self._processors:
            processed = processor(processed, (self._history,))
        index = sample(processed[0], self._rng) if self.options.do_sample else greedy(processed[0])
        token_id = index if ids is None else int(ids[index])
        self._history.append(token_id)
        return token_id

    @property
    def _num_kept(self) -> int:
        return self.options.top_k if self.options.do_sample else 1

    def _candidates(self, top: TopLogits) -> tuple[Logits, npt.NDArray[np.int64] | None]:
        """Return a row that leads to the token of the whole row, with the ids of its columns; None for all ids.

        Dividing by the temperature keeps the order but may make unequal logits equal. If what is kept last is still
        above the smallest one here, then so is it above all that are not here, and top-k drops those. The order of
        the ids is restored, since ties and sums follow it.
        """
        scaled = top.values / np.float32(self.options.temperature) if self.options.do_sample else top.values
        is_decided = np.isfinite(top.values).all() and scaled[self._num_kept - 1] > scaled[-1]
        if not is_decided:
            return top.fetch(), None
        order = np.argsort(top.ids)
        return top.values[order], top.ids[order]
