"""Statistics of PyTorch's routers in a mixture of experts: tokens of each expert, and choices that were all but ties.

An engine's own routers are not seen: no target's graph has an output for them.

Shapes: T tokens, E experts, k experts of a token.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass
class LayerRouting:
    """What one layer's router did.

    Attributes:
        tokens_per_expert: [E].
        num_tokens: Tokens that it routed.
        num_ties: Tokens whose last chosen and first rejected expert have the same probability in float32: the choice is
            open, and two right implementations may differ from here on.
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
        """Say in a few words how the tokens spread, and how near to another choice they came."""
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
            lines.append("Of tied experts an engine takes the lower index, PyTorch any: behind a tie they may differ.")
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


@contextlib.contextmanager
def watched_routers(model: Any, statistics: RouterStatistics) -> Iterator[None]:
    """Count what the routers of a transformers model do while the context is open.

    Args:
        model: A `Qwen3VLMoeForConditionalGeneration`; a dense model gives no layers.
        statistics: Takes the counts.
    """
    handles = []

    def watch(layer: int, router: Any) -> None:
        def count(_: Any, __: Any, output: Any) -> None:
            statistics.add(layer, output[0].detach().float().numpy(), router.top_k)

        handles.append(router.register_forward_hook(count))

    for i, layer in enumerate(model.model.language_model.layers):
        router = getattr(layer.mlp, "gate", None)
        if router is not None:
            watch(i, router)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
