"""Operators of every instruction set on shapes and numbers that hypothesis chooses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.native_attention import SUFFIXES, Call, Heads
from helpers.native_graphs import BLOCKS, Weight, random_weight, same_bits, whole_rows
from helpers.own_kernels import needs_own_kernels
from runtime import native

pytestmark = [needs_own_kernels, pytest.mark.portable]


@pytest.fixture(autouse=True)
def _any_isa(any_isa: None) -> None:
    """Hypothesis runs many examples in one test, each with all instruction sets."""


@st.composite
def products(draw: st.DrawFn, largest: int) -> dict[str, Any]:
    """A weight's sizes, rows of x, optional inputs, and a seed."""
    block = draw(st.sampled_from(BLOCKS))
    return {
        "num_outputs": draw(st.integers(1, largest)),
        "num_columns": draw(st.integers(1, largest * 5)),
        "num_rows": draw(st.one_of(st.integers(1, 20), st.integers(21, 2 * largest))),
        "block": block,
        "bits": draw(st.sampled_from([4, 8])),
        "kind": draw(st.sampled_from(["plain", "norm", "gated"])),
        "has": draw(st.sets(st.sampled_from(["bias", "residual"]))),
        "threads": draw(st.integers(1, 4)),
        "seed": draw(st.integers(0, 1 << 32)),
    }


def check_product(case: dict[str, Any]) -> None:
    weight = random_weight(case["num_outputs"], case["num_columns"], case["block"], case["bits"], case["seed"])
    random = np.random.default_rng(case["seed"])
    num_rows, num_columns = case["num_rows"], case["num_columns"]
    inputs = {"x": whole_rows(num_rows, num_columns, case["block"], case["seed"])}
    # Gates and norms whose products with x are x again.
    if case["kind"] == "gated":
        inputs["x"] = np.concatenate([np.full_like(inputs["x"], 100), inputs["x"] / np.float32(100)], -1)
    if case["kind"] == "norm":
        norm = random.integers(-127, 128, num_columns).astype(np.float32)
        norm[:: case["block"]] = 127
        inputs = {"x": random.choice([-1, 1], (num_rows, num_columns)).astype(np.float32), "norm": norm}
    shapes = {"bias": (case["num_outputs"],), "residual": (num_rows, case["num_outputs"])}
    inputs |= {name: random.standard_normal(shapes[name]).astype(np.float32) for name in sorted(case["has"])}
    results = {}
    for isa in native.isas():
        native.use(isa)
        results[isa] = weight.multiply(threads=case["threads"], gated=int(case["kind"] == "gated"), **inputs)
        assert same_bits(results[isa], next(iter(results.values()))), isa
    check_values(case, weight, inputs, results[native.PORTABLE])


def check_values(case: dict[str, Any], weight: Weight, inputs: dict[str, np.ndarray], found: np.ndarray) -> None:
    x = inputs["x"].astype(np.float64)
    factors = x[:, case["num_columns"] :] * 100 if case["kind"] == "gated" else x * inputs.get("norm", 1)
    extra = inputs.get("bias", 0) + np.asarray(inputs.get("residual", 0), np.float64)
    # RMSNorm's epsilon and silu(100) are as good as nothing, but not quite.
    rounding = weight.rounding(factors) + 2e-6 * np.abs(factors) @ np.abs(weight.values).T + 1e-6 * np.abs(extra) + 1e-6
    assert (np.abs(found - (factors @ weight.values.T + extra)) <= rounding).all()


@given(products(60))
@settings(max_examples=40)
def test_products(case: dict[str, Any]) -> None:
    check_product(case)


@pytest.mark.slow
@given(products(300))
@settings(max_examples=1500)
def test_many_products(case: dict[str, Any]) -> None:
    check_product(case)


@given(products(60), st.lists(st.integers(0, 1 << 20), max_size=40))
@settings(max_examples=30)
def test_rows_that_are_looked_up(case: dict[str, Any], numbers: list[int]) -> None:
    weight = random_weight(case["num_outputs"], case["num_columns"], case["block"], case["bits"], case["seed"])
    ids = np.array(numbers, np.int64) % case["num_outputs"]
    for isa in native.isas():
        native.use(isa)
        assert np.allclose(weight.look_up(ids, case["threads"]), weight.values[ids], rtol=2e-7, atol=0), isa


@st.composite
def calls(draw: st.DrawFn, longest: int) -> dict[str, Any]:
    """Sizes of heads, lengths of sequences, new tokens, and a seed."""
    num_kv = draw(st.integers(1, 4))
    group = draw(st.integers(1, 16 // num_kv))
    head_dim = 16 * draw(st.integers(1, 8))
    return {
        "suffix": draw(st.sampled_from(SUFFIXES)),
        "pasts": draw(st.lists(st.integers(0, longest), min_size=1, max_size=4)),
        "num_new": draw(st.one_of(st.just(1), st.integers(1, 40))),
        "heads": Heads(num_kv * group, num_kv, head_dim, scale=head_dim**-0.5),
        "num_free": draw(st.integers(0, 3)),
        "seed": draw(st.integers(0, 1 << 32)),
        "threads": draw(st.integers(1, 4)),
        "is_in_place": draw(st.booleans()),
    }


def check_call(case: dict[str, Any]) -> None:
    threads, is_in_place = case.pop("threads"), case.pop("is_in_place")
    call = Call(**case)
    first = None
    for isa in native.isas():
        native.use(isa)
        found = call.run_in_place(threads) if is_in_place else call.run(threads)
        if first is None:
            call.check(found)
            first = found
        assert same_bits(found[0], first[0]), isa
        for i in (1, 2):
            for b, past in enumerate(call.pasts):
                end = past + call.num_new
                assert same_bits(found[i][b, :, :end], first[i][b, :, :end]), isa


@given(calls(300))
@settings(max_examples=25)
def test_attention(case: dict[str, Any]) -> None:
    check_call(case)


@pytest.mark.slow
@given(calls(1200))
@settings(max_examples=700)
def test_much_attention(case: dict[str, Any]) -> None:
    check_call(case)
