"""What a decode plan is made of: the weights of a decoder, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engines.kernels.launch import Weight


@dataclass(frozen=True)
class Norm:
    """An RMSNorm: the initializer of its gain, and its epsilon."""

    gain: str
    epsilon: float


@dataclass(frozen=True)
class Experts:
    """Router [E, K] and experts of one layer: gate and up [E, 2·I, K], whose rows take turns, and down [E, K, I]."""

    router: Weight
    gate_up: Weight
    down: Weight
    num_experts: int
    top_k: int


@dataclass(frozen=True)
class Layer:
    """One decoder layer; either `gate_up` [2·I, K] and `down` [K, I], or `experts`."""

    attention_norm: Norm
    qkv: Weight
    q_norm: Norm
    k_norm: Norm
    scale: float
    output: Weight
    mlp_norm: Norm
    gate_up: Weight | None
    down: Weight | None
    experts: Experts | None


@dataclass(frozen=True)
class Decoder:
    """All weights of a decode step.

    Attributes:
        dtype: `float16` or `bfloat16`: of activations, KV cache and halves.
        num_heads, num_kv_heads, head_dim: Of attention.
        table: Embeddings, in whole rows of codes as GatherBlockQuantized reads them.
        layers: In order.
        final_norm, head: What makes the logits.
        top_k: How many of the largest logits a step gives.
        constants: Values of the small initializers that the rotary embedding takes: `inv_freq`, `axis_of_frequency`.
    """

    dtype: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    table: Weight
    layers: tuple[Layer, ...]
    final_norm: Norm
    head: Weight
    top_k: int
    constants: dict[str, np.ndarray]
