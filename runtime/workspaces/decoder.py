"""The buffers of a call of the decoder.

As in `runtime.workspaces.vision`.

Shapes: S new tokens of one sequence, D hidden, I intermediate, N query and K kv heads, H head dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from runtime.arena import Stage
from runtime.model_config import ExpertsConfig, ModelConfig
from runtime.workspaces.kernels import FLOAT_BYTES, Kernels, telling_layers

# Tokens of a chunk that the busiest expert has, in even shares: 3.0 to 3.2 in the layers of demo-moe.
_BUSIEST = 3


class PrefillCall:
    """A call of the decoder on new tokens of one sequence.

    Args:
        config: Shape of the model.
        num_tokens: New ones.
        past: Tokens before them.
        kernels: What computes it.
    """

    def __init__(self, config: ModelConfig, num_tokens: int, past: int, kernels: Kernels) -> None:
        text = self._text = config.text
        self._kernels, self._num_tokens = kernels, num_tokens
        self._num_levels = len(config.vision.deepstack_layers)
        row = FLOAT_BYTES * num_tokens
        self._d, self._inner = row * text.hidden_size, row * text.intermediate_size
        self._q, self._kv = row * text.num_heads * text.head_dim, row * text.num_kv_heads * text.head_dim
        self._angles = row * text.head_dim // 2
        self._tiles = kernels.attention_bytes(num_tokens, past + num_tokens, text.head_dim)

    def stages(self) -> Iterator[Stage]:
        """Yield the buffers of each operator."""
        d, angles, is_own = self._d, self._angles, self._kernels.is_own
        deep = {f"deep {level}": d for level in reversed(range(self._num_levels))}
        yield deep
        turning: dict[str, int] = {}
        if not is_own:
            yield from self._positions(deep)
            turning = {"angles": angles, "cos": angles}
        yield {**deep, **turning, "embedded": d}
        yield {**deep, **turning, "embedded": d, "visual": d}
        yield {**deep, **turning, "embedded": d, "visual": d, **self._where(), "x": d}
        x = "x"
        for index, layer in enumerate(telling_layers(self._text.num_layers, range(self._num_levels))):
            y, base = f"y{layer}", {**deep, **turning, x: d}
            yield from self._attend_own(base, turning, y) if is_own else self._attend(base, turning, y)
            turning = {"sin": angles, "cos": angles}
            x, base = f"x{layer}", {**deep, **turning, y: d}
            experts = self._text.experts_of(layer)
            yield from self._feed_forward(base, x) if experts is None else self._mix(base, experts, index, x)
            if layer < self._num_levels:
                base = {**deep, **turning, x: d, "added": d}
                yield base
                x = f"joined {layer}"
                yield {**base, **self._where(), x: d}
                del deep[f"deep {layer}"]
        yield {x: d, "logits": FLOAT_BYTES * self._text.vocab_size}

    def heap_bytes(self) -> int:
        """Return what our own kernels take beside the arena: for products, and for the queries of the attention."""
        text, rows = self._text, self._num_tokens
        sizes = text.hidden_size, text.num_heads * text.head_dim, text.intermediate_size
        return self._kernels.heap_bytes([(rows, size) for size in sizes], [self._q])

    def _positions(self, base: Stage) -> Iterator[Stage]:
        numbers = 2 * self._angles  # int64
        yield {**base, "positions": numbers, "positions turned": numbers}
        yield {**base, "positions turned": numbers, "angles": self._angles}
        yield {**base, "angles": self._angles, "cos": self._angles}

    def _where(self) -> Stage:
        """Return what Where takes beside its output: what it selects of either side."""
        return {"~one side": self._d, "~other side": self._d}

    def _attend_own(self, base: Stage, turning: Stage, out: str) -> Iterator[Stage]:
        d, q, qkv = self._d, self._q, self._q + 2 * self._kv
        yield {**base, "qkv": qkv}
        if not turning:
            yield from self._positions({**base, "qkv": qkv})
            base = {**base, "sin": self._angles, "cos": self._angles}
        yield {**base, "qkv": qkv, "attended": q}
        yield {**base, "attended": q, out: d}

    def _attend(self, base: Stage, turning: Stage, out: str) -> Iterator[Stage]:
        d, q, kv = self._d, self._q, self._kv
        yield {**base, "normed": d}
        yield {**base, "normed": d, "qkv": q + 2 * kv}
        yield {**base, "qkv": q + 2 * kv, "q": q, "k": kv, "v": kv}
        yield {**base, "q": q, "k": kv, "v": kv, "4:k normed": kv}
        base = {**{name: size for name, size in base.items() if name not in turning}, "sin": self._angles}
        base["cos"] = self._angles
        yield {**base, "q": q, "4:k normed": kv, "v": kv, "k turned": kv}
        yield {**base, "q": q, "v": kv, "k turned": kv, "4:q normed": q}
        yield {**base, "v": kv, "k turned": kv, "4:q normed": q, "q turned": q}
        # GroupQueryAttention brings the heads to the front, in copies.
        copies = {"~q heads": q, "~k heads": kv, "~v heads": kv, "~tiles": self._tiles}
        yield {**base, "v": kv, "k turned": kv, "q turned": q, "attended": q, **copies}
        yield {**base, "attended": q, "projected": d}
        yield {**base, "projected": d, "normed": d, out: d}

    def _feed_forward(self, base: Stage, out: str) -> Iterator[Stage]:
        d, inner = self._d, self._inner
        if self._kernels.is_own:
            yield {**base, "gate, up": 2 * inner}
            yield {**base, "gate, up": 2 * inner, out: d}
            return
        yield {**base, "normed": d, "gate, up": 2 * inner}
        yield {**base, "gate, up": 2 * inner, "gate": inner, "up": inner}
        yield {**base, "gate": inner, "up": inner, "activated": inner}
        yield {**base, "up": inner, "activated": inner, "gated": inner}
        yield {**base, "gated": inner, out: d}

    def _mix(self, base: Stage, experts: ExpertsConfig, index: int, out: str) -> Iterator[Stage]:
        """Yield those of a mixture, as QMoE and MoE of onnxruntime/contrib_ops/cpu/moe compute it.

        How many tokens the busiest expert has depends on the prompt. A layer in which it has more than in all layers
        before makes the arena grow by all of its buffers; of n layers in random order, 1 + 1/2 + … + 1/n are such.
        """
        records = math.ceil(sum(1 / layer for layer in range(1, self._text.num_layers + 1)))
        record, hidden, inner = min(index, records - 1), self._text.hidden_size, experts.intermediate_size
        tokens, rows = self._num_tokens, self._num_tokens * experts.top_k
        router = FLOAT_BYTES * tokens * experts.num_experts
        if self._kernels.is_quantised:
            busiest = min(tokens, -(-_BUSIEST * rows // experts.num_experts)) + record
            # A thread's tokens on their way, and its expert's weights as floats.
            each = busiest * (2 * hidden + 3 * inner) + 3 * inner * hidden
            own = {f"~tokens and weights {record}": FLOAT_BYTES * self._kernels.threads * each}
        else:
            sizes = 2 * inner, hidden, hidden, hidden, 2 * inner
            own = {f"~rows {record} {i}": FLOAT_BYTES * (rows + record) * size for i, size in enumerate(sizes)}
        base = {**base, "normed": self._d}
        yield base
        yield {**base, "router": router, "probabilities": router, "masked": router}
        yield {**base, "masked": router, "mixed": self._d, **own}
        yield {**base, "mixed": self._d, out: self._d}


def decode_stages(config: ModelConfig, batch: int) -> Iterator[Stage]:
    """Yield the largest buffers of a step of one token of each sequence: its logits beside those of the last step."""
    size = FLOAT_BYTES * batch * config.text.vocab_size
    yield {"~earlier logits": size}
    yield {"~earlier logits": size, "~logits": size}
