"""Statistics of the routers in a mixture of experts: tokens of each expert, and assignments that were nearly tied.

Only the routers of our own definition of the model in PyTorch are watched: no engine's graph has an output for them.

Shapes: T tokens, E experts, k experts of a token.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from qwen3vl_export.modeling import MixtureOfExperts, Qwen3VL, Router


@dataclass
class LayerRouting:
    """What one layer's router did.

    Attributes:
        tokens_per_expert: [E].
        num_tokens: Tokens that it routed.
        num_ties: Tokens whose last chosen and first rejected expert have the same probability in float32: either may
            be taken, and two right implementations may differ from here on.
        smallest_gap: Smallest difference of these two logits, ties aside; infinite if a token goes through all experts.
    """

    tokens_per_expert: NDArray[np.int64]
    num_tokens: int = 0
    num_ties: int = 0
    smallest_gap: float = float("inf")

    def add(self, logits_TE: NDArray[np.float32], top_k: int) -> None:
        """Count tokens."""
        order_TE = np.argsort(-logits_TE, axis=-1, kind="stable")
        self.tokens_per_expert += np.bincount(order_TE[:, :top_k].reshape(-1), minlength=logits_TE.shape[1])
        self.num_tokens += len(logits_TE)
        if top_k == logits_TE.shape[1]:
            return
        sorted_TE = np.take_along_axis(logits_TE, order_TE, -1)
        exponentials = np.exp(sorted_TE - sorted_TE[:, :1])
        is_tie = exponentials[:, top_k - 1] == exponentials[:, top_k]
        self.num_ties += int(is_tie.sum())
        gaps = (sorted_TE[:, top_k - 1] - sorted_TE[:, top_k])[~is_tie]
        self.smallest_gap = min(self.smallest_gap, float(gaps.min(initial=np.inf)))

    def summary(self) -> str:
        """Say in a few words how the tokens spread, and how near to another assignment they came."""
        return _summary(self.tokens_per_expert, self.num_ties, self.smallest_gap)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; an infinite gap is null."""
        return {
            "tokens": self.num_tokens,
            "tokens_per_expert": self.tokens_per_expert.tolist(),
            "fewest": int(self.tokens_per_expert.min()),
            "most": int(self.tokens_per_expert.max()),
            "unused": int((self.tokens_per_expert == 0).sum()),
            "ties": self.num_ties,
            "smallest_gap": self.smallest_gap if np.isfinite(self.smallest_gap) else None,
        }


@dataclass
class RouterStatistics:
    """The routing of all layers that have experts, by layer."""

    layers: dict[int, LayerRouting] = field(default_factory=dict)

    def add(self, layer: int, logits_TE: NDArray[np.float32], top_k: int) -> None:
        """Count the tokens of one call of one layer."""
        if layer not in self.layers:
            self.layers[layer] = LayerRouting(np.zeros(logits_TE.shape[1], np.int64))
        self.layers[layer].add(logits_TE, top_k)

    def merge(self, other: RouterStatistics) -> None:
        """Take the counts of another run."""
        for layer, theirs in other.layers.items():
            ours = self.layers.setdefault(layer, LayerRouting(np.zeros_like(theirs.tokens_per_expert)))
            ours.tokens_per_expert += theirs.tokens_per_expert
            ours.num_tokens += theirs.num_tokens
            ours.num_ties += theirs.num_ties
            ours.smallest_gap = min(ours.smallest_gap, theirs.smallest_gap)

    def render(self) -> list[str]:
        """Return a line on all layers and one on the worst, and one that says what ties mean if there are any."""
        if not self.layers:
            return []
        worst = min(self.layers, key=lambda i: (-self.layers[i].num_ties, self.layers[i].smallest_gap))
        counts = np.concatenate([routing.tokens_per_expert for routing in self.layers.values()])
        num_tokens = max(routing.num_tokens for routing in self.layers.values())
        num_ties = sum(routing.num_ties for routing in self.layers.values())
        gap = min(routing.smallest_gap for routing in self.layers.values())
        lines = [
            f"routers of PyTorch, {len(self.layers)} layers: {num_tokens} tokens, {_summary(counts, num_ties, gap)}",
            f"worst is layer {worst}: {self.layers[worst].summary()}",
        ]
        if num_ties:
            lines.append("Of tied experts an engine takes the lower index, PyTorch any: after a tie they may differ.")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON: each layer, and what `render` says of ties."""
        return {
            "layers": [{"layer": layer, **routing.to_dict()} for layer, routing in sorted(self.layers.items())],
            "notes": self.render(),
        }


def _summary(counts: NDArray[np.int64], num_ties: int, gap: float) -> str:
    return (
        f"{counts.min()} to {counts.max()} an expert, {int((counts == 0).sum())} of {len(counts)} experts unused, "
        f"{num_ties} ties, smallest gap {gap:.3g}"
    )


Assignment = tuple[int, int]
"""Which experts a token gets, named by its layer and its position, counted from the first token that was watched."""


@dataclass
class Watched:
    """What the routers did while they were watched.

    Attributes:
        statistics: Counts of all layers.
        gaps: For each assignment, the difference of the logits of the last chosen and the first rejected expert, in
            standard deviations of the logits that the layer's router gave for the prompt.
    """

    statistics: RouterStatistics = field(default_factory=RouterStatistics)
    gaps: dict[Assignment, float] = field(default_factory=dict)


@contextlib.contextmanager
def watched_routers(
    model: Qwen3VL, prompt_length: int, *, swapped: frozenset[Assignment] = frozenset()
) -> Iterator[Watched]:
    """Watch the routers of a model while the context is open.

    Args:
        model: It is given one sequence; a dense model gives no layers.
        prompt_length: Tokens of the first call that are the prompt.
        swapped: Where the first rejected expert takes the place of the last chosen one.
    """
    watched = Watched()
    handles = []

    def watch(layer: int, router: Router) -> None:
        num_seen, spread = 0, 0.0

        def look(_: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            nonlocal num_seen, spread
            logits_TE, weight_Tk, expert_Tk = (part.detach() for part in (*inputs, *output))
            float32_TE = logits_TE.float().numpy()
            watched.statistics.add(layer, float32_TE, router.top_k)
            spread = spread or max(float(float32_TE[:prompt_length].std()), float(np.finfo(np.float32).tiny))
            if router.top_k < float32_TE.shape[1]:
                for t, (logits, chosen) in enumerate(zip(float32_TE, expert_Tk.numpy(), strict=True)):
                    out, into = _at_the_border(logits, chosen)
                    place = layer, num_seen + t
                    watched.gaps[place] = float(logits[chosen[out]] - logits[into]) / spread
                    if place in swapped:
                        expert_Tk[t, out] = into
                        weight_Tk[t] = logits_TE[t][expert_Tk[t]].float().softmax(-1).to(weight_Tk.dtype)
            num_seen += len(float32_TE)
            return weight_Tk, expert_Tk

        handles.append(router.register_forward_hook(look))

    for i, layer in enumerate(model.language_model.layers):
        if isinstance(layer.mlp, MixtureOfExperts):
            watch(i, layer.mlp.router)
    try:
        yield watched
    finally:
        for handle in handles:
            handle.remove()


def _at_the_border(logits_E: NDArray[np.float32], chosen_k: NDArray[np.int64]) -> tuple[int, int]:
    """Return the place in `chosen_k` of the last chosen expert, and the first rejected; the lower of equals wins."""
    last = max(range(len(chosen_k)), key=lambda i: (-logits_E[chosen_k[i]], chosen_k[i]))
    rejected = np.delete(np.arange(len(logits_E)), chosen_k)
    return last, int(rejected[np.argmax(logits_E[rejected])])
