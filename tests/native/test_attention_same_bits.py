"""A sequence's attention is the same bits with every instruction set, thread, address, cache size and batch."""

from __future__ import annotations

import numpy as np
import pytest

from helpers.native_attention import SUFFIXES, Call, Heads, Results, run_with_all
from helpers.native_graphs import same_bits
from helpers.native_memory import Fence, at_address
from helpers.own_kernels import needs_own_kernels
from runtime import native

pytestmark = [needs_own_kernels, pytest.mark.portable]
CACHES = pytest.mark.parametrize("suffix", SUFFIXES)
# A decode step over several parts, a short one, chunks of prompts, a batch that is ragged.
CALLS = (([600], 1), ([3, 300, 0], 1), ([0], 35), ([70, 5], 19), ([9, 64], 2))


def assert_same(found: Results, expected: Results, call: Call) -> None:
    """Compare all that a call must write."""
    assert same_bits(found[0], expected[0])
    for i in (1, 2):
        for b, past in enumerate(call.pasts):
            end = past + call.num_new
            assert same_bits(found[i][b, :, :end], expected[i][b, :, :end])


@CACHES
def test_instruction_sets(suffix: str, any_isa: None) -> None:
    for heads in (Heads(4, 2, 32), Heads(3, 1, 80), Heads(8, 8, 16), Heads(16, 1, 64)):
        for pasts, num_new in CALLS:
            call = Call(suffix, pasts, num_new, heads)
            results = run_with_all(call)
            for found in results.values():
                assert_same(found, results[native.PORTABLE], call)


@CACHES
def test_threads(isa: str, suffix: str) -> None:
    for pasts, num_new in CALLS:
        call = Call(suffix, pasts, num_new)
        alone = call.run()
        for threads in range(2, 9):
            assert_same(call.run(threads=threads), alone, call)


@CACHES
@pytest.mark.parametrize("num_new", [1, 19])
def test_company(isa: str, suffix: str, num_new: int) -> None:
    """Also in caches of other sizes."""
    pasts = [70, 300, 0, 5, 513]
    everyone = Call(suffix, pasts, num_new)
    together = everyone.run()
    for b, past in enumerate(pasts):
        for num_free in (0, 30):
            call = Call(suffix, [past], num_new, num_free=num_free)
            rows = past + num_new
            given = {name: everyone.inputs[name][b : b + 1].copy() for name in ("qkv", "cos", "sin")}
            for name in ("past_key", "past_value"):
                given[name] = call.inputs[name].copy()
                given[name][:, :, :rows] = everyone.inputs[name][b : b + 1, :, :rows]
            found = call.run(**given)
            assert same_bits(found[0][0], together[0][b])
            assert all(same_bits(found[i][0, :, :rows], together[i][b, :, :rows]) for i in (1, 2))


@CACHES
@pytest.mark.parametrize(("pasts", "num_new"), CALLS)
def test_addresses(isa: str, suffix: str, pasts: list[int], num_new: int) -> None:
    call = Call(suffix, pasts, num_new)
    expected = call.run()
    for step in (1, 3, 11):
        there = {name: at_address(array, step * array.itemsize) for name, array in call.inputs.items()}
        assert_same(call.run(**there), expected, call)


@CACHES
@pytest.mark.parametrize("at_end", [True, False])
def test_nothing_beside_the_inputs_is_read(isa: str, suffix: str, at_end: bool) -> None:
    """What lies beside is no memory: the process would end."""
    for heads in (Heads(2, 1, 16), Heads(3, 1, 48)):
        for pasts, num_new in (([5], 1), ([300, 2], 1), ([0], 3), ([20, 7], 18)):
            call = Call(suffix, pasts, num_new, heads, num_free=0)
            fence = Fence()
            there = {name: fence.copy(array, at_end=at_end) for name, array in call.inputs.items()}
            assert_same(call.run(**there), call.run(), call)


@CACHES
def test_rows_after_a_sequence_count_for_nothing(isa: str, suffix: str) -> None:
    for pasts, num_new in CALLS:
        call = Call(suffix, pasts, num_new)
        expected = call.run()
        for fill in (0, np.inf):
            caches = {name: call.inputs[name].copy() for name in ("past_key", "past_value")}
            for cache in caches.values():
                for b, past in enumerate(pasts):
                    cache[b, :, past:] = fill if cache.dtype in (np.float32, np.float16) else 77
            assert_same(call.run(**caches), expected, call)
