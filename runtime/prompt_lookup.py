"""Draft the next tokens by prompt lookup: propose what followed the last tokens when they stood earlier in the text.

Answers that copy (text read back, JSON with the same keys again and again) then take several tokens from one call of
the decoder. A draft changes no token: `runtime.generation.decode_steps` keeps what the sampler itself chooses.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

# The values of n, the preferred one first: a long match is right more often, a single token such as the quote after
# a key's colon finds more. Against (3, 2), by cost: JSON +5, HTML +3, page read back +4, prose -1 %
# (docs/experiments.md).
NGRAM_SIZES = (4, 3, 2, 1)
# Cost of one more position in a call, as a share of the cost of a call of one position: 2B shape, int4, 2 cores.
# A constant and not a clock: were the length of a draft measured, the same seed would not always give the same bits.
# `qwen3vl tune` measures it once for a machine, and stores it.
DRAFT_COST = 0.2
# Weight of the newest drafted token in the running acceptance rate: some ten tokens are remembered.
RATE_WEIGHT = 0.2
FIRST_RATE = 0.5


def best_length(rate: float, cost: float, limit: int) -> int:
    """Return how many tokens to draft, 0 to `limit`, where a share `rate` of them is accepted; see `DraftLength`."""
    best, most, tokens = 0, 1.0, 1.0
    for length in range(1, limit + 1):
        tokens += rate**length
        if tokens / (1 + cost * length) <= most:
            break  # the gain has one maximum
        best, most = length, tokens / (1 + cost * length)
    return best


class DraftLength:
    """Choose how many tokens to draft, from how many were accepted so far.

    With an acceptance rate a per token, a draft of k tokens makes one call give 1 + a + … + a^k tokens at the cost of
    1 + cost · k calls (Leviathan et al. 2023, arXiv:2211.17192, equation 1 and theorem 3.8). The k that gives
    most tokens at that cost is taken. If that is 0, one token is drafted now and then, to see whether the text has
    changed: each such probe that is rejected doubles the number of calls that pass before the next one. So an answer of
    which every draft is wrong costs a number of drafted tokens that grows with the logarithm of its length.

    The rate is an exponential average over the tokens that were judged: the accepted ones and the first rejected one.

    Args:
        cost: What one more position costs a call, as a share of a call of one position.
    """

    def __init__(self, cost: float = DRAFT_COST) -> None:
        self._cost = cost
        self.rate = FIRST_RATE
        self._is_probe = False
        self._pause = 0
        self._calls_to_probe = 0

    def next(self, limit: int) -> int:
        """Return the number of tokens to draft for the next call, 0 to `limit`; ask once a call."""
        best = best_length(self.rate, self._cost, limit)
        self._is_probe = not best
        if best or limit < 1:
            return best
        if self._calls_to_probe:
            self._calls_to_probe -= 1
            return 0
        return 1

    def judge(self, is_accepted: bool) -> None:
        """Learn whether the next token of a draft was accepted; what stands after a rejected one is never judged."""
        self.rate += RATE_WEIGHT * (is_accepted - self.rate)
        if is_accepted:
            self._pause = 0
        elif self._is_probe:
            self._pause = max(1, 2 * self._pause)
        self._calls_to_probe = self._pause


class NgramIndex:
    """Find the latest earlier place of a sequence's last n-gram, with constant work a token.

    Args:
        token_ids: The sequence so far.
    """

    def __init__(self, token_ids: Iterable[int]) -> None:
        self._ids: list[int] = []
        self._behind: dict[tuple[int, ...], int] = {}
        for token_id in token_ids:
            self.append(token_id)

    def append(self, token_id: int) -> None:
        """Add one token."""
        # What ends here becomes findable only now, so the last n-gram never finds itself.
        end = len(self._ids)
        for size in NGRAM_SIZES:
            if size <= end:
                self._behind[tuple(self._ids[end - size :])] = end
        self._ids.append(token_id)

    def following(self, num_tokens: int) -> list[int]:
        """Return the `num_tokens` tokens after the place that was found, or none.

        A copy that reaches the end of the sequence goes on with itself: after `a b a b a` come `b a b a …`.
        """
        for size in NGRAM_SIZES:
            start = self._behind.get(tuple(self._ids[-size:]))
            if start is not None:
                period = self._ids[start : start + num_tokens]
                return [period[i % len(period)] for i in range(num_tokens)]
        return []


class PromptLookup:
    """Draft the tokens of one answer; a `runtime.generation.Drafter`.

    Args:
        prompt_ids: The token ids of the prompt, image tokens included.
        max_tokens: Most tokens of one draft, at least 1.
        never: Token ids that no answer holds, such as the image token; a draft ends before them.
        cost: That of `DraftLength`.
    """

    def __init__(
        self, prompt_ids: Iterable[int], max_tokens: int, never: Iterable[int] = (), cost: float = DRAFT_COST
    ) -> None:
        self._index = NgramIndex(prompt_ids)
        self.length = DraftLength(cost)
        self._max_tokens = max_tokens
        self._never = frozenset(never)
        self._awaited: deque[int] = deque()
        self.num_drafted = 0
        self.num_accepted = 0

    def append(self, token_id: int) -> None:
        """Take the next token of the answer, and learn from it whether the draft was right."""
        self._index.append(token_id)
        if self._awaited:
            is_accepted = token_id == self._awaited.popleft()
            self.length.judge(is_accepted)
            self.num_accepted += is_accepted
            if not is_accepted:
                self._awaited.clear()

    def draft(self, room: int) -> list[int]:
        """Return the tokens that may come next, at most `room`; often none."""
        found = self._index.following(self.length.next(min(room, self._max_tokens)))
        end = next((i for i, token_id in enumerate(found) if token_id in self._never), len(found))
        self._awaited = deque(found[:end])
        self.num_drafted += end
        return found[:end]
