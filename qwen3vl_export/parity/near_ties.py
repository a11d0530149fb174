"""Follow an engine where a router could as well have chosen otherwise.

Which experts a token goes through is a discontinuous function of the router's logits. Where the last chosen and the
first rejected one are as near as the engine's precision, two right implementations may choose differently, and nothing
of that token can be compared from there on. So the reference is run again with the engine's choice, at such places
alone: the limits then hold for all values, and a wrong choice anywhere else is still a failure.

The graphs do not say what their routers chose. A choice of layer i shows in the keys and values of the same token in
layer i + 1, or in its logits if i is the last layer: where they are off, the other choice is tried, and kept if it
brings them nearer.

One expert of a token and layer can be another. Where three or more stand so near that two of the chosen differ, the
limits decide.

Positions count tokens from the start of the prompt; greedy steps go on behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from qwen3vl_export.routing import Choice

# Shares of the limit: smaller errors are not looked into.
_NOTICED = 0.25


class ReferenceRun(Protocol):
    """A run of the reference."""

    @property
    def tokens(self) -> Sequence[int]:
        """What it generated: all but the last are its input behind the prompt."""
        ...

    @property
    def near_ties(self) -> Mapping[Choice, float]:
        """Choices that could as well have been the other one, and the difference of the two logits."""
        ...


R = TypeVar("R", bound=ReferenceRun)


@dataclass
class Followed(Generic[R]):
    """The run of the reference that the engine is compared with.

    Attributes:
        output: What it gave.
        gaps: Of each choice that was taken from the engine, the difference of the logits.
    """

    output: R
    gaps: dict[Choice, float] = field(default_factory=dict)


def follow(run: Callable[[frozenset[Choice]], R], errors_of: Callable[[R], list[NDArray[np.float64]]]) -> Followed[R]:
    """Run the reference until no near tie explains what the engine does otherwise.

    Args:
        run: Runs the reference with the other choice at these places.
        errors_of: Compares the engine with a run: for each layer, and last for the logits, the errors of all positions
            [T], in units of their limit.
    """
    swapped: dict[Choice, float] = {}
    refused: set[Choice] = set()
    trials: dict[Choice, float] = {}
    tokens: Sequence[int] | None = None
    while True:
        output = run(frozenset(swapped))
        errors = errors_of(output)
        end = len(errors[-1]) if tokens is None else _first_change(tokens, output.tokens, len(errors[-1]))
        tokens = output.tokens
        # From there on it is another text, because of an earlier choice, and what was found of the old one is void.
        void = {place for place in swapped if place[1] >= end}
        worse = {place for place in trials.keys() - void if not _behind(errors, place) < trials[place]}
        refused = {place for place in refused if place[1] < end} | worse
        for place in void | worse:
            del swapped[place]
        trials = {}
        if void or worse:
            continue
        for layer in range(len(errors) - 1):
            open_ties = {
                place: gap
                for place, gap in output.near_ties.items()
                if place[0] == layer
                and place not in swapped
                and place not in refused
                and _behind(errors, place) > _NOTICED
            }
            if open_ties:
                trials = {place: _behind(errors, place) for place in open_ties}
                swapped |= open_ties
                break
        if not trials:
            return Followed(output, swapped)


def _first_change(before: Sequence[int], after: Sequence[int], num_positions: int) -> int:
    """Return the first position whose input changed, or `num_positions`: the last token is no input."""
    same = [a == b for a, b in zip(before[:-1], after[:-1], strict=True)]
    return num_positions - len(same) + (same.index(False) if False in same else len(same))


def _behind(errors: list[NDArray[np.float64]], place: Choice) -> float:
    """Return the error where a choice shows first; 0 at positions that were not compared."""
    layer, position = place
    found = errors[layer + 1]
    return float(found[position]) if position < len(found) else 0.0
