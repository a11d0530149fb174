"""The router of a mixture of experts: which experts each row takes, and in which shares."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from engines.kernels.dtypes import pointer, power_of_two
from engines.kernels.launch import HALF, Argument, Gpu, Launch, Unserved, Weight

_MAX_EXPERTS: Final = 512
_MAX_TOP: Final = 32
_MAX_CHUNK: Final = 2048
_MAX_COLUMNS: Final = 8192
_INVARIANT_BATCH: Final = 2

Array = NDArray[Any]


def chunk(columns: int) -> int:
    """Return how many columns are taken at a time: the largest power of two that leaves the least of a chunk empty."""
    choices = [1 << bit for bit in range(8, _MAX_CHUNK.bit_length())]
    return min(choices, key=lambda size: (-(-columns // size) * size, -size))


def experts_of_program(batch: int, columns: int, *, invariant: bool) -> int:
    """Return how many experts a program has.

    Two were the fastest for one row of 2048 in a prototype on an H200. More rows make programs enough, and with more
    experts each of them the row is normalised less often. A program holds 8192 halves of the weight at most.
    """
    if invariant:
        batch = _INVARIANT_BATCH
    padded = -(-columns // chunk(columns)) * chunk(columns)
    at_most = max(1, _MAX_COLUMNS // padded)
    return min(2 if batch <= 2 else 4, 1 << (at_most.bit_length() - 1))


def buffers(num_experts: int, batch: int, *, top_k: int) -> dict[str, tuple[int, bool]]:
    """Return the memory of a launch and of its results: bytes, and whether it begins with zeros."""
    return {
        "router_logits": (4 * batch * num_experts, False),
        "router_counters": (4 * batch, True),
        "expert_ids": (4 * batch * top_k, False),
        "expert_weights": (4 * batch * top_k, False),
    }


def launch(
    weight: Weight,
    norm: str,
    batch: int,
    gpu: Gpu,
    *,
    dtype: str,
    top_k: int,
    eps: float,
    invariant: bool,
    x: str = "buffer:hidden",
) -> Launch:
    """Make the launch; it writes `buffer:expert_ids` int32 and `buffer:expert_weights` float32, [B, top_k].

    Experts come by falling logit, of equal ones the one with the lower index first; the weights are the softmax over
    the chosen.

    Args:
        weight: Of all experts, [E, K].
        norm: Initializer of the gain [K] of the norm before it.
        batch: Rows of the step.
        gpu: Where it runs.
        dtype: Of activations, gain and weight, `float16` or `bfloat16`.
        top_k: Experts of a row.
        eps: Of the norm.
        invariant: Whether a row's bits may not depend on the batch.
        x: Source of [B, K].

    Raises:
        Unserved: The kernel does not serve this weight or so many experts.
    """
    _check(weight, top_k)
    num_experts, columns = weight.rows, weight.columns
    half = pointer(dtype)
    arguments = {
        "x": Argument(half, x),
        "gain": Argument(half, f"weight:{norm}"),
        "weight": Argument(half, f"weight:{weight.data}"),
        "logits": Argument("*fp32", "buffer:router_logits"),
        "counters": Argument("*i32", "buffer:router_counters"),
        "expert_ids": Argument("*i32", "buffer:expert_ids"),
        "expert_weights": Argument("*fp32", "buffer:expert_weights"),
        "eps": Argument("fp32", eps),
    }
    size = chunk(columns)
    experts = experts_of_program(batch, columns, invariant=invariant)
    constants = {
        "E": num_experts,
        "PADDED": power_of_two(num_experts),
        "K": columns,
        "TOP": top_k,
        "TOP_PADDED": power_of_two(top_k),
        "EXPERTS": experts,
        "CHUNK": size,
        "CHUNKS": -(-columns // size),
    }
    return Launch("router", "router", arguments, constants, (-(-num_experts // experts), batch, 1))


def _check(weight: Weight, top_k: int) -> None:
    if weight.kind != HALF or weight.rows > _MAX_EXPERTS or weight.columns > _MAX_COLUMNS:
        raise Unserved(
            f"a router of {weight.kind} [{weight.rows}, {weight.columns}]; the kernel takes halves, up to "
            f"[{_MAX_EXPERTS}, {_MAX_COLUMNS}]"
        )
    if not 0 < top_k <= min(_MAX_TOP, weight.rows):
        raise Unserved(f"{top_k} of {weight.rows} experts; the kernel chooses up to {_MAX_TOP}")


def reference(x: Array, gain: Array, weight: Array, *, top_k: int, eps: float) -> tuple[Array, Array, Array]:
    """Return the experts [B, top_k], their weights and all logits [B, E], in float64."""
    wide = np.asarray(x, np.float64)
    normed = wide / np.sqrt((wide * wide).mean(-1, keepdims=True) + eps) * np.asarray(gain, np.float64)
    logits = normed @ np.asarray(weight, np.float64).T
    ids = np.argsort(-logits, axis=-1, kind="stable")[:, :top_k]
    chosen = np.take_along_axis(logits, ids, -1)
    shares = np.exp(chosen - chosen[:, :1])
    return ids, shares / shares.sum(-1, keepdims=True), logits
