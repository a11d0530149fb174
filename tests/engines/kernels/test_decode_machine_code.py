"""Compiled decode kernels, run on the host instruction by instruction: what the interpreter leaves out.

It has no inline assembly, and no threads between which values could be exchanged wrongly.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton")

from engines.kernels import attention, candidates, experts, product, router
from engines.kernels.fragments import dequantized
from engines.kernels.launch import ADD, FP8, GLU, GPUS, HALF, INT4, INT8, LOGITS, STORE, Launch, Weight
from helpers.compiled import ptx_of
from helpers.decode_weights import made_weight
from helpers.ptx import Memory, run

Array = np.ndarray[Any, Any]
GPU = GPUS[90]
EXPERTS = 5


def execute(
    launches: list[Launch], arrays: Mapping[str, Array], change: Callable[[str], str] = lambda text: text
) -> None:
    """Run launches one after the other; `change` of the text of each."""
    memory = Memory()
    addresses = {"null": 0} | {source: memory.add(array) for source, array in arrays.items()}
    for launch, text in zip(launches, ptx_of(launches, GPU), strict=True):
        values = []
        for argument in launch.arguments.values():
            if argument.type == "fp32":
                values.append(int(np.float32(argument.source).view(np.uint32)))
            else:
                values.append(addresses[argument.source] if argument.type.startswith("*") else int(argument.source))
        run(change(text), [*values, 0, 0], launch.grid, launch.num_warps, memory)


def find(logits: Array, change: Callable[[str], str] = lambda text: text) -> tuple[Array, Array]:
    """Return the candidates that compiled kernels find."""
    batch, vocab = logits.shape
    arrays = {
        "step:logits": logits,
        "step:top_logits": np.zeros((batch, 64), np.float32),
        "step:top_ids": np.zeros((batch, 64), np.int64),
    }
    for name, (num_bytes, _) in candidates.buffers(vocab, batch).items():
        arrays[f"buffer:{name}"] = np.full(num_bytes // 8, 77, np.int64)
    execute(candidates.launches(vocab, batch, GPU), arrays, change)
    return arrays["step:top_logits"], arrays["step:top_ids"]


def draw_logits(batch: int, vocab: int) -> Array:
    rng = np.random.default_rng(vocab)
    logits: Array = np.round(rng.standard_normal((batch, vocab)) * 50).astype(np.float32)
    logits[0, ::7], logits[0, 5] = np.nan, np.inf
    return logits


@pytest.mark.parametrize(("batch", "vocab"), [(2, 399), (1, 5000)])
def test_candidates(batch: int, vocab: int) -> None:
    logits = draw_logits(batch, vocab)
    for found, wanted in zip(find(logits), candidates.reference(logits, 64), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_an_exchange_with_the_wrong_lane_is_seen() -> None:
    logits = draw_logits(1, 399)
    _, ids = find(logits, lambda text: text.replace("shfl.sync.bfly.b32 b, b,", "shfl.sync.idx.b32 b, b,"))
    assert (ids != candidates.reference(logits, 64)[1]).any()


def multiplied(
    weight: Weight, memory: Mapping[str, Array], batch: int, mode: int, *, warps: int, tiles: int
) -> tuple[Array, Array]:
    """Return a product by its compiled kernel, and the reference."""
    rng = np.random.default_rng(batch)
    norm = mode != ADD
    x = rng.normal(0, 3, (batch, weight.columns)).astype(np.float16)
    gain = rng.normal(1, 0.2, weight.columns).astype(np.float16)
    outputs = weight.rows // (2 if mode == GLU else 1)
    out = rng.normal(0, 1, (batch, outputs)).astype(np.float32 if mode == LOGITS else np.float16)
    residual = out.astype(np.float64)
    launch = product.launch(
        weight, "buffer:x", "buffer:out", batch, GPU, dtype="float16", mode=mode, norm="gain" if norm else None,
        eps=1e-6, invariant=True,
    )  # fmt: skip
    launch = replace(
        launch,
        constants=launch.constants | {"WARPS": warps, "DEPTH": 1, "TILES": tiles},
        grid=(-(-weight.rows // (16 * tiles)), 1, 1),
        num_warps=warps,
    )
    arrays = {f"weight:{name}": array for name, array in memory.items()}
    arrays |= {"weight:gain": gain, "buffer:x": x, "buffer:out": out, "buffer:zeros": np.zeros(32, np.float32)}
    execute([launch], arrays)
    wanted = product.reference(
        dequantized(weight, memory), x.astype(np.float64), mode=mode,
        gain=gain.astype(np.float64) if norm else None, eps=1e-6, residual=residual,
    )  # fmt: skip
    return out, wanted


def error(result: Array, wanted: Array) -> float:
    return float(np.abs(result - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize(
    ("kind", "batch", "mode", "warps", "tiles"),
    [
        (HALF, 20, ADD, 4, (1, 2, 4)),  # more sums than warps
        pytest.param(HALF, 9, GLU, 8, (1, 2), marks=pytest.mark.slow),
        (INT4, 12, GLU, 2, (1, 2)),
        pytest.param(INT8, 3, STORE, 1, (1,), marks=pytest.mark.slow),
        pytest.param(FP8, 2, STORE, 2, (2,), marks=pytest.mark.slow),
        (HALF, 32, LOGITS, 16, (2,)),  # sums that take several turns
    ],
)
def test_products(kind: str, batch: int, mode: int, warps: int, tiles: tuple[int, ...]) -> None:
    """Rows that fill no tile, of which more tiles a program must not change a bit."""
    weight, memory = made_weight(kind, 80 if mode == GLU else 40, 512 if warps == 16 else 384, 128)
    results = []
    for each in tiles:
        result, wanted = multiplied(weight, memory, batch, mode, warps=warps, tiles=each)
        assert error(result, wanted) < 1e-3
        results.append(result)
    assert all((result == results[0]).all() for result in results)


def expert_launches(kind: str, block: int) -> tuple[list[Launch], dict[str, Array], Callable[[], tuple[Array, Array]]]:
    """Return both products of experts, their memory, and what makes the reference of the second."""
    rng = np.random.default_rng(0)
    top, columns, inner = 2, 128, 32
    gate_up, of_gate_up = made_weight(kind, 2 * inner, columns, block, experts=EXPERTS)
    gate_up = replace(gate_up, data="g", scales=gate_up.scales and "gs")
    down, of_down = made_weight(HALF, columns, inner, experts=EXPERTS, seed=1)
    x = rng.normal(0, 3, (1, columns)).astype(np.float16)
    gain = rng.normal(1, 0.2, columns).astype(np.float16)
    ids, shares = np.array([[3, 1]], np.int32), np.array([[0.75, 0.25]], np.float32)
    arrays = {"weight:g": of_gate_up["w"], "weight:w": of_down["w"], "weight:gain": gain, "buffer:x": x}
    arrays |= {"buffer:ids": ids, "buffer:shares": shares, "buffer:zeros": np.zeros(32, np.float32)}
    arrays |= {"buffer:inner": np.zeros((1, top, inner), np.float16)}
    if "s" in of_gate_up:
        arrays["weight:gs"] = of_gate_up["s"]
    wide = dequantized(gate_up, {"g": of_gate_up["w"], "gs": of_gate_up.get("s", gain)})
    first = experts.launch_gate_up(
        gate_up, "buffer:x", "buffer:ids", "buffer:inner", 1, top, GPU, num_experts=EXPERTS, dtype="float16",
        norm="gain", eps=1e-6,
    )  # fmt: skip
    second = experts.launch_down(
        down, "buffer:inner", "buffer:ids", "buffer:shares", "buffer:x", 1, top, GPU, num_experts=EXPERTS,
        dtype="float16",
    )  # fmt: skip

    residual = x.astype(np.float64)
    inner_wanted = experts.reference_gate_up(wide, residual, ids, gain=gain.astype(np.float64), eps=1e-6)
    return (
        [first, second],
        arrays,
        lambda: (
            inner_wanted,
            experts.reference_down(
                of_down["w"].astype(np.float64), arrays["buffer:inner"].astype(np.float64), ids, shares, residual
            ),
        ),
    )


@pytest.mark.parametrize(("kind", "block"), [(HALF, 0), (INT4, 64)])
def test_experts(kind: str, block: int) -> None:
    launches, arrays, wanted = expert_launches(kind, block)
    execute(launches, arrays)
    inner, out = wanted()
    assert error(arrays["buffer:inner"], inner) < 1e-3
    assert error(arrays["buffer:x"], out) < 1e-3


def test_nothing_is_read_past_the_order_of_kernels() -> None:
    """Non-coherent loads may return what was there before; the router's results are read past L1."""
    expert, _, _ = expert_launches(HALF, 0)
    rest = [
        router.launch(Weight(HALF, 8, 256, "r"), "n", 1, GPU, dtype="float16", top_k=2, eps=1e-6, invariant=False),
        attention.launch(attention.Heads(4, 2, 64), 0, "q", "k", 1, GPU, dtype="float16", eps=1e-6, invariant=False),
        product.launch(Weight(HALF, 64, 256, "w"), "x", "o", 1, GPU, dtype="float16", mode=STORE, norm="n"),
        *candidates.launches(399, 1, GPU),
    ]
    texts = ptx_of([*expert, *rest], GPU)
    assert not [text for text in texts if re.search(r"ld\.global\S*\.nc", text)]
    assert "ld.global.cg.b32" in texts[0]
    before_the_wait = texts[1].partition("griddepcontrol.wait")[0]
    assert before_the_wait.count("ld.relaxed.gpu.global.b32") == 2  # ids and shares
