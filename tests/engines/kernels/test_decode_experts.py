"""Products by chosen experts in the interpreter, against float64."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("triton")

from engines.kernels import experts
from engines.kernels.fragments import dequantized
from engines.kernels.launch import GPUS, HALF, INT4, INT8, Unserved
from helpers.decode_weights import HALVES, made_weight
from helpers.interpret import guarded, interpret, untouched

EXPERTS = 5
FORMATS = [(INT4, 64), (INT4, 128), (INT8, 64), (INT8, 128), (HALF, 0)]


def _choice(batch, top):
    rng = np.random.default_rng(top)
    ids = np.stack([rng.permutation(EXPERTS)[:top] for _ in range(batch)]).astype(np.int32)
    return ids, rng.dirichlet(np.ones(top), batch).astype(np.float32)


def _gate_up(kind, block, batch, top, *, rows=32, columns=192, dtype="float16", gpu=90, change=None):
    """Return the result of the kernel and of the reference."""
    weight, memory = made_weight(kind, rows, columns, block, experts=EXPERTS, dtype=dtype)
    rng = np.random.default_rng(batch)
    x = rng.normal(0, 3, (batch, columns)).astype(HALVES[dtype])
    gain = rng.normal(1, 0.2, columns).astype(HALVES[dtype])
    ids, _ = _choice(batch, top)
    out, whole = guarded((batch, top, rows // 2), HALVES[dtype])
    launch = experts.launch_gate_up(
        weight, "buffer:x", "buffer:ids", "buffer:out", batch, top, GPUS[gpu], num_experts=EXPERTS, dtype=dtype,
        norm="gain", eps=1e-6,
    )  # fmt: skip
    sources = {f"weight:{name}": array for name, array in memory.items()}
    sources |= {"weight:gain": gain, "buffer:x": x, "buffer:ids": ids.copy(), "buffer:out": out}
    sources["buffer:zeros"] = np.zeros(32, np.float32)
    if change is not None:
        change(sources)
    interpret(launch, sources)
    assert untouched(whole)
    expected = experts.reference_gate_up(
        dequantized(weight, memory), x.astype(np.float64), ids, gain=gain.astype(np.float64), eps=1e-6
    )
    return out.astype(np.float64), expected


def _down(kind, block, batch, top, *, rows=32, columns=192, dtype="float16", change=None):
    """Return the result of the kernel and of the reference."""
    weight, memory = made_weight(kind, rows, columns, block, experts=EXPERTS, dtype=dtype)
    rng = np.random.default_rng(batch)
    x = rng.normal(0, 1, (batch, top, columns)).astype(HALVES[dtype])
    ids, shares = _choice(batch, top)
    residual = rng.normal(0, 1, (batch, rows)).astype(HALVES[dtype])
    out, whole = guarded((batch, rows), HALVES[dtype])
    out[:] = residual
    launch = experts.launch_down(
        weight, "buffer:x", "buffer:ids", "buffer:shares", "buffer:out", batch, top, GPUS[90], num_experts=EXPERTS,
        dtype=dtype,
    )  # fmt: skip
    sources = {f"weight:{name}": array for name, array in memory.items()}
    sources |= {"buffer:x": x, "buffer:ids": ids.copy(), "buffer:shares": shares, "buffer:out": out}
    sources["buffer:zeros"] = np.zeros(32, np.float32)
    if change is not None:
        change(sources)
    interpret(launch, sources)
    assert untouched(whole)
    arrays = (x.astype(np.float64), ids, shares.astype(np.float64), residual.astype(np.float64))
    return out.astype(np.float64), experts.reference_down(dequantized(weight, memory), *arrays)


def _error(result, expected):
    return np.abs(result - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize(("kind", "block"), FORMATS)
def test_formats(kind, block):
    assert _error(*_gate_up(kind, block, 1, 2)) < 1e-3
    assert _error(*_down(kind, block, 1, 2)) < 1e-3


@pytest.mark.parametrize(("batch", "top"), [(3, 3), (2, 1)])
def test_batches_and_experts_of_a_row(batch, top):
    assert _error(*_gate_up(HALF, 0, batch, top, rows=16)) < 1e-3
    assert _error(*_down(HALF, 0, batch, top, rows=16)) < 1e-3


def test_bfloat16():
    assert _error(*_gate_up(HALF, 0, 2, 2, dtype="bfloat16")) < 8e-3
    assert _error(*_down(HALF, 0, 2, 2, dtype="bfloat16")) < 8e-3


def test_rows_that_fill_no_tile():
    assert _error(*_gate_up(HALF, 0, 1, 2, rows=24)) < 1e-3
    assert _error(*_down(HALF, 0, 1, 2, rows=24)) < 1e-3


def test_a_row_has_the_same_bits_in_every_batch():
    one, _ = _down(HALF, 0, 1, 2, rows=16)
    sixteen, _ = _down(HALF, 0, 16, 2, rows=16, change=_like_a_batch_of_one)
    assert (sixteen[7] == one[0]).all()


def _like_a_batch_of_one(sources):
    """Give row 7 what the only row of a batch of one has."""
    rng = np.random.default_rng(1)
    sources["buffer:x"][7] = rng.normal(0, 1, (1, 2, 192)).astype(np.float16)[0]
    sources["buffer:out"][7] = rng.normal(0, 1, (1, 16)).astype(np.float16)[0]
    ids, shares = _choice(1, 2)
    sources["buffer:ids"][7], sources["buffer:shares"][7] = ids[0], shares[0]


def test_a_wrong_expert_is_seen():
    def next_one(sources):
        sources["buffer:ids"][0, 0] = (sources["buffer:ids"][0, 0] + 1) % EXPERTS

    assert _error(*_gate_up(HALF, 0, 1, 2, change=next_one)) > 0.1
    assert _error(*_down(HALF, 0, 1, 2, change=next_one)) > 0.1


@pytest.mark.parametrize(("outside", "nearest"), [(EXPERTS, EXPERTS - 1), (-1, 0)])
@pytest.mark.parametrize("product", [_gate_up, _down])
def test_an_id_outside_reads_the_nearest_expert(product, outside, nearest):
    def first_is(expert):
        def change(sources):
            sources["buffer:ids"][0, 0] = expert

        return change

    result, _ = product(HALF, 0, 1, 2, rows=16, change=first_is(outside))
    wanted, _ = product(HALF, 0, 1, 2, rows=16, change=first_is(nearest))
    assert (result == wanted).all()


def test_what_is_not_served_is_said():
    weight, _ = made_weight(HALF, 32, 64, experts=2)
    with pytest.raises(Unserved, match="17 experts"):
        experts.launch_down(weight, "", "", "", "", 1, 17, GPUS[90], num_experts=2, dtype="float16")
    with pytest.raises(Unserved, match="batch of 33"):
        experts.launch_gate_up(weight, "", "", "", 33, 2, GPUS[90], num_experts=2, dtype="float16", norm="gain", eps=0)
