"""Follow an engine through the experts that it chose, and say how far they are from those of PyTorch.

Which experts a token goes through is a discontinuous function of the router's logits. Where the last chosen and the
first rejected one are as near as the engine's precision, two right implementations may choose differently, and nothing
of that token can be compared from there on. So the reference is run again with the engine's experts, and all limits
hold for what it then gives. How far apart the logits of the two experts are has a limit of its own: a right engine
differs where two experts are nearly tied; one whose router is wrong differs where they are far apart, too.

The graphs do not say what their routers chose. An assignment in layer i shows in the keys and values of the same token
in layer i + 1, or in its logits if i is the last layer: where they are off, the other one is tried, and kept if at most
half of the error is left. After a layer that stays far off nothing is tried: that report fails already.

One expert of a token and layer can be another. Where three or more stand so near that two of the chosen differ, the
limits of the values decide.

Positions count tokens from the start of the prompt; greedy steps go on after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qwen3vl_export.parity.reference import ReferenceOutput
from qwen3vl_export.routing import Assignment

# In units of the limits: smaller errors are not looked into; after larger ones nothing is.
_NOTICED = 0.25
_FAR_OFF = 10.0
# Share of the error that may be left.
_LEFT = 0.5
# A right engine takes two runs a layer, and the first layers of a text once more when one of its tokens changes.
_RUNS_PER_LAYER = 6


@dataclass
class Followed:
    """The run of the reference that the engine is compared with.

    Attributes:
        output: What it gave.
        gaps: For each assignment that was taken from the engine, the difference of the logits.
        num_runs: Runs of the reference.
        is_complete: Whether it ended before the runs did.
    """

    output: ReferenceOutput
    gaps: dict[Assignment, float]
    num_runs: int
    is_complete: bool = True


def follow(
    run: Callable[[frozenset[Assignment]], ReferenceOutput],
    errors_of: Callable[[ReferenceOutput], list[NDArray[np.float64]]],
    *,
    runs_per_layer: int = _RUNS_PER_LAYER,
) -> Followed:
    """Run the reference until no other assignment explains what the engine does differently.

    Args:
        run: Runs the reference with the other expert in these assignments.
        errors_of: Compares the engine with a run: for each layer, and last for the logits, the errors of all positions
            [T], in units of their limit.
        runs_per_layer: Runs after which it ends, for each layer.
    """
    swapped: dict[Assignment, float] = {}
    refused: set[Assignment] = set()
    trials: dict[Assignment, float] = {}
    tokens: Sequence[int] | None = None
    num_runs = 0
    while True:
        output = run(frozenset(swapped))
        num_runs += 1
        errors = errors_of(output)
        end = len(errors[-1]) if tokens is None else _first_change(tokens, output.tokens, len(errors[-1]))
        tokens = output.tokens
        # From there on it is another text, because of an earlier assignment, and what was found of the old one is void.
        void = {place for place in swapped if place[1] >= end}
        worse = {place for place in trials.keys() - void if not _error_after(errors, place) <= _LEFT * trials[place]}
        refused = {place for place in refused if place[1] < end} | worse
        for place in void | worse:
            del swapped[place]
        trials = {}
        if void or worse:
            continue
        if num_runs >= runs_per_layer * len(errors):
            return Followed(output, swapped, num_runs, is_complete=False)
        for layer in range(len(errors) - 1):
            if errors[layer].max() > _FAR_OFF:
                break
            trials = {
                place: error
                for place in output.gaps
                if place[0] == layer
                and place not in swapped
                and place not in refused
                and (error := _error_after(errors, place)) > _NOTICED
            }
            if trials:
                swapped |= {place: output.gaps[place] for place in trials}
                break
        if not trials:
            return Followed(output, swapped, num_runs)


def _first_change(before: Sequence[int], after: Sequence[int], num_positions: int) -> int:
    """Return the first position whose input changed, or `num_positions`: the last token is no input."""
    same = [a == b for a, b in zip(before[:-1], after[:-1], strict=True)]
    return num_positions - len(same) + (same.index(False) if False in same else len(same))


def _error_after(errors: list[NDArray[np.float64]], place: Assignment) -> float:
    """Return the error where an assignment shows first; 0 at positions that were not compared."""
    layer, position = place
    found = errors[layer + 1]
    return float(found[position]) if position < len(found) else 0.0
