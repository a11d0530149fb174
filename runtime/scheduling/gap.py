"""The tokens between a sequence's sinks and the rest of its rows, which have no rows any more.

What is noted of them takes constant memory: a running hash tells whether a later prompt continues the same history.

Shapes: S tokens, L layers, K kv heads, R rows, H head dim.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from runtime.contract import FloatArray, IntArray
from runtime.scheduling.prompt_keys import common_length

if TYPE_CHECKING:
    from hashlib import _Hash

    from runtime.sliding_window import SlidingWindow


@dataclass(frozen=True, eq=False)
class Gap:
    """A gap in the rows of a sequence; without arguments, none.

    Attributes:
        num_sinks: Rows before it.
        num_tokens: Tokens in it.
        offset: Behind it, a token's position in the cache is that in the sequence minus this.
        num_done: Tokens that had been run when it last grew.
        sink_keys: Keys of the sinks as they were computed, [L, K, R, H]: moved from there each time, so that rounding
            does not add up.
        digest: Running hash of the keys (`prompt_keys`) of all tokens up to its end.
    """

    num_sinks: int = 0
    num_tokens: int = 0
    offset: int = 0
    num_done: int = 0
    sink_keys: FloatArray | None = field(default=None, repr=False)
    digest: _Hash | None = field(default=None, repr=False)

    @property
    def end(self) -> int:
        """First token behind it."""
        return self.num_sinks + self.num_tokens

    def digest_to(self, end: int, keys_S3: IntArray) -> _Hash:
        """Return the hash of all tokens before `end`, at least its own end, of a sequence with these keys."""
        digest = hashlib.sha256() if self.digest is None else self.digest.copy()
        start = 0 if self.digest is None else self.end
        digest.update(keys_S3[start:end].tobytes())
        return digest

    def is_of(self, keys_S3: IntArray) -> bool:
        """Return whether the tokens up to its end are those that a prompt begins with."""
        if self.digest is None:
            return True
        return Gap().digest_to(self.end, keys_S3).digest() == self.digest.digest()

    def shared_rows(self, kept_S3: IntArray, keys_S3: IntArray, window: SlidingWindow | None) -> int:
        """Return how many rows of a sequence with this gap a prompt can begin with.

        Behind the last of them the prompt is another. Where the gap has grown since, a run of the prompt would see
        tokens there that have no rows now; so it takes these only where they are many, and none if the whole prompt
        has room in the window, which is exact.

        Args:
            kept_S3: Keys of the rows behind the gap.
            keys_S3: Those of the prompt, but for tokens that run in any case.
            window: Where the gap comes from; None without gaps.
        """
        num_common = common_length(kept_S3, keys_S3[self.end :])
        num_rows = self.num_sinks + num_common
        if window is not None and self.num_tokens and self.end + num_common < self.num_done:
            is_exact_anew = len(keys_S3) < window.tokens
            if is_exact_anew or num_rows < window.least_shared:
                return 0
        return num_rows if num_common and self.is_of(keys_S3) else 0


NO_GAP = Gap()
