"""The launches of a decode step, for each number of sequences, on one GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from engines.decode_plan.graph import Decoder
from engines.kernels.launch import Gpu, Launch

BATCHES = (1, 2, 4, 8, 16, 32)
"""Numbers of sequences that a step is made for; others are filled up."""

FAST, INVARIANT = "fast", "invariant"
FORMS = (FAST, INVARIANT)
"""The fastest launches for a batch, and those whose bits do not depend on it."""


@dataclass(frozen=True)
class Steps:
    """All launches for one GPU.

    Attributes:
        gpu: The GPU.
        by_batch: Launches in order, by batch and form.
        buffers: Bytes of the plan's memory for the largest batch, and whether it begins with zeros, by name.
    """

    gpu: Gpu
    by_batch: dict[tuple[int, str], tuple[Launch, ...]]
    buffers: dict[str, tuple[int, bool]]

    def of(self, batch: int, form: str) -> tuple[Launch, ...]:
        """Return the launches of a step."""
        return self.by_batch[batch, form]

    def launches(self) -> Iterator[Launch]:
        """Iterate over all launches of all steps."""
        for each in self.by_batch.values():
            yield from each


def make_steps(decoder: Decoder, gpu: Gpu, top_k: int) -> Steps:
    """Return the launches of a decoder's steps on a GPU."""
    raise NotImplementedError
