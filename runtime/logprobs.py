"""Log probabilities of the tokens of an answer, and of those that the model held for likely in their places.

They are of the distribution that the model gives, before temperature, penalties, biases and formats change it: vLLM's
`raw_logprobs`. So a token that a format forced may be unlikely here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from runtime.tokenizer import Tokenizer

MAX_TOP_LOGPROBS = 20
"""Most alternatives of a token, as in OpenAI's API."""


@dataclass(frozen=True)
class Likelihood:
    """A token and how likely it was.

    Attributes:
        token_id: Its id.
        token_bytes: Its bytes, which need not be whole characters; those of its spelling for a special token.
        logprob: Natural logarithm of its probability.
    """

    token_id: int
    token_bytes: bytes
    logprob: float

    @property
    def text(self) -> str:
        """Its text; U+FFFD where its bytes are part of a character."""
        return self.token_bytes.decode(errors="replace")


@dataclass(frozen=True)
class TokenLogprob(Likelihood):
    """A token of an answer.

    Attributes:
        top: The likeliest tokens in its place, the likeliest first; of equally likely ones the lower id.
    """

    top: tuple[Likelihood, ...] = ()


def log_softmax(logits_V: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Return log probabilities in float64."""
    shifted_V = logits_V.astype(np.float64)
    shifted_V -= shifted_V.max()
    shifted_V -= np.log(np.exp(shifted_V).sum())
    return shifted_V


def token_logprob(logits_V: npt.NDArray[np.float32], token_id: int, num_top: int, tokenizer: Tokenizer) -> TokenLogprob:
    """Return the log probability of a token and of the likeliest ones.

    Args:
        logits_V: What the engine gave in its place, [V].
        token_id: The token that was chosen.
        num_top: How many of the likeliest.
        tokenizer: Knows their bytes.
    """
    logprobs_V = log_softmax(logits_V)
    ids: list[int] = []
    if num_top:
        num_top = min(num_top, len(logprobs_V))
        kth = np.partition(logprobs_V, -num_top)[-num_top]
        candidates = np.flatnonzero(logprobs_V >= kth)
        ids = candidates[np.argsort(-logprobs_V[candidates], kind="stable")][:num_top].tolist()
    top = tuple(Likelihood(i, tokenizer.token_bytes(i), float(logprobs_V[i])) for i in ids)
    return TokenLogprob(token_id, tokenizer.token_bytes(token_id), float(logprobs_V[token_id]), top)
