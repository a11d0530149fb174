"""The launches of a decode step, for each number of sequences, on one GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from engines.decode_plan.decoder import Decoder, Experts, Layer, Norm
from engines.kernels import attention, candidates, embed, experts, product, router
from engines.kernels.launch import ADD, GLU, LOGITS, STORE, Gpu, Launch, Unserved, Weight
from runtime.decode_plan import FAST, INVARIANT

BATCHES = (1, 2, 4, 8, 16, 32)
"""Numbers of sequences that a step is made for; others are filled up."""

FORMS = (FAST, INVARIANT)
"""The fastest launches for a batch, and those whose bits do not depend on it."""

_HALF_BYTES = 2
HIDDEN, QKV, ATTENTION, INNER = "buffer:hidden", "buffer:qkv", "buffer:attention", "buffer:inner"
IDS, SHARES = "buffer:expert_ids", "buffer:expert_weights"


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


def make_steps(decoder: Decoder, gpu: Gpu) -> Steps:
    """Return the launches of a decoder's steps on a GPU.

    Raises:
        Unserved: No kernel serves one of its shapes or formats.
    """
    makers = {
        (batch, form): _Step(decoder, gpu, batch, invariant=form == INVARIANT) for batch in BATCHES for form in FORMS
    }
    buffers: dict[str, tuple[int, bool]] = {}
    for maker in makers.values():
        for name, (num_bytes, zeroed) in maker.buffers().items():
            before, was_zeroed = buffers.get(name, (0, zeroed))
            assert was_zeroed == zeroed, f"{name} begins with zeros for one kernel and not for another"
            buffers[name] = max(num_bytes, before), zeroed
    return Steps(gpu, {key: tuple(maker.launches()) for key, maker in makers.items()}, buffers)


class _Step:
    """Makes the launches of one step.

    Shapes: B batch, K hidden size, H and KVH heads, D head dim, I inner size, k experts of a token.
    """

    def __init__(self, decoder: Decoder, gpu: Gpu, batch: int, *, invariant: bool) -> None:
        self._decoder, self._gpu, self._batch, self._invariant = decoder, gpu, batch, invariant
        self._heads = attention.Heads(decoder.num_heads, decoder.num_kv_heads, decoder.head_dim)

    def buffers(self) -> dict[str, tuple[int, bool]]:
        """Return the memory that the launches share: bytes, and whether it begins with zeros."""
        decoder, batch, gpu = self._decoder, self._batch, self._gpu
        width = decoder.head_dim * decoder.num_heads
        found = {
            "hidden": (_HALF_BYTES * batch * decoder.table.columns, False),  # [B, K]
            "qkv": (_HALF_BYTES * batch * decoder.layers[0].qkv.rows, False),  # [B, (H + 2 KVH) D]
            "attention": (_HALF_BYTES * batch * width, False),  # [B, H D]
            "inner": (_HALF_BYTES * batch * max(map(_inner_width, decoder.layers)), False),  # [B, I] or [B, k, I]
            **product.buffers(),
            **embed.buffers(batch, decoder.head_dim),
            **attention.buffers(self._heads, batch, gpu, invariant=self._invariant),
            **candidates.buffers(decoder.head.rows, batch),
        }
        for layer in decoder.layers:
            if layer.experts is not None:
                found |= router.buffers(layer.experts.num_experts, batch, top_k=layer.experts.top_k)
        return found

    def launches(self) -> Iterator[Launch]:
        """Yield the launches in order."""
        decoder, batch, gpu = self._decoder, self._batch, self._gpu
        yield embed.launch(
            decoder.table,
            batch,
            gpu,
            dtype=decoder.dtype,
            head_dim=decoder.head_dim,
            axes="constant:axis_of_frequency",
            inv_freq="constant:inv_freq",
            hidden=HIDDEN,
        )
        for index, layer in enumerate(decoder.layers):
            yield from self._layer(index, layer)
        yield self._product(decoder.head, HIDDEN, "step:logits", LOGITS, decoder.final_norm)
        yield from candidates.launches(decoder.head.rows, batch, gpu, top_k=decoder.top_k)

    def _layer(self, index: int, layer: Layer) -> Iterator[Launch]:
        yield self._product(layer.qkv, HIDDEN, QKV, STORE, layer.attention_norm)
        if layer.q_norm.epsilon != layer.k_norm.epsilon:
            raise Unserved("queries and keys are normalised with unequal epsilons")
        yield attention.launch(
            self._heads,
            index,
            layer.q_norm.gain,
            layer.k_norm.gain,
            self._batch,
            self._gpu,
            dtype=self._decoder.dtype,
            eps=layer.q_norm.epsilon,
            invariant=self._invariant,
            scale=layer.scale,
            qkv=QKV,
            out=ATTENTION,
        )
        yield self._product(layer.output, ATTENTION, HIDDEN, ADD)
        if layer.experts is not None:
            yield from self._experts(layer.experts, layer.mlp_norm)
            return
        assert layer.gate_up is not None and layer.down is not None
        yield self._product(layer.gate_up, HIDDEN, INNER, GLU, layer.mlp_norm)
        yield self._product(layer.down, INNER, HIDDEN, ADD)

    def _product(self, weight: Weight, x: str, out: str, mode: int, norm: Norm | None = None) -> Launch:
        return product.launch(
            weight,
            x,
            out,
            self._batch,
            self._gpu,
            dtype=self._decoder.dtype,
            mode=mode,
            norm=None if norm is None else norm.gain,
            eps=0.0 if norm is None else norm.epsilon,
            invariant=self._invariant,
        )

    def _experts(self, layer: Experts, norm: Norm) -> Iterator[Launch]:
        dtype, top_k = self._decoder.dtype, layer.top_k
        yield router.launch(
            layer.router,
            norm.gain,
            self._batch,
            self._gpu,
            dtype=dtype,
            top_k=top_k,
            eps=norm.epsilon,
            invariant=self._invariant,
            x=HIDDEN,
        )
        yield experts.launch_gate_up(
            layer.gate_up,
            HIDDEN,
            IDS,
            INNER,
            self._batch,
            top_k,
            self._gpu,
            num_experts=layer.num_experts,
            dtype=dtype,
            norm=norm.gain,
            eps=norm.epsilon,
        )
        yield experts.launch_down(
            layer.down,
            INNER,
            IDS,
            SHARES,
            HIDDEN,
            self._batch,
            top_k,
            self._gpu,
            num_experts=layer.num_experts,
            dtype=dtype,
        )


def _inner_width(layer: Layer) -> int:
    """Return the numbers between gate and down of one token."""
    if layer.experts is not None:
        return layer.experts.top_k * layer.experts.down.columns
    assert layer.down is not None
    return layer.down.columns
