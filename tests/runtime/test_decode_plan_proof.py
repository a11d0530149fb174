"""What the comparison of a step with ONNX Runtime's lets pass, and what it does not, in both types of a cache."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from helpers.host_cuda import HostDevice
from runtime.cache_rows import Rows
from runtime.decode_plan_proof import StepResult, StepWindow, wrong_candidates
from runtime.device_buffers import Staging
from runtime.device_cache import DeviceKVCache

SHAPE = 3, 2, 16, 8  # slots, heads, rows, head dim
PAST = np.array([0, 15])  # neither a row before the first nor one behind the last
NEW = [0, 1]  # place of the new row in each window
LOGITS = np.linspace(-10, 10, 2 * 50, dtype=np.float32).reshape(2, 50)
BOUNDS = {"float16": 0.02, "bfloat16": 0.06}

Change = Callable[[np.ndarray], object]


def bits_of(values: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "float16":
        return values.astype(np.float16).view(np.uint16)
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


class Bench:
    """Two sequences from slot 1 on, whose cache holds random numbers."""

    def __init__(self, dtype: str) -> None:
        self.device = HostDevice()
        staging = Staging(self.device, self.device.new_stream())
        self.cache = DeviceKVCache(self.device, staging, 2, SHAPE, dtype)
        self.dtype = dtype
        numbers = np.random.default_rng(0).normal(size=(4, *SHAPE))
        for name, values in zip(self.cache.past_names, numbers, strict=True):
            staging.upload(self.cache.bindings()[name], bits_of(values, dtype))
        self.window = StepWindow(self.device, staging, self.cache, 1, PAST)

    def difference(self, rows: list[Rows], logits: np.ndarray = LOGITS, *, has_experts: bool = False) -> str | None:
        expected = StepResult(LOGITS, self.window.read())
        return self.window.difference(expected, StepResult(logits, rows), has_experts=has_experts)


@pytest.fixture(params=BOUNDS)
def bench(request: pytest.FixtureRequest) -> Bench:
    return Bench(request.param)


def test_a_window_holds_the_new_row_and_those_beside_it(bench: Bench) -> None:
    keys = bench.cache.layer(0)[0]
    found = bench.window.read()
    assert [each.shape for each in found] == [(4, 2, 2, 8), (4, 2, 2, 8)]
    assert np.array_equal(found[0][0], bits_of(keys[1, :, 0:2], bench.dtype))
    assert np.array_equal(found[1][0], bits_of(keys[2, :, 14:16], bench.dtype))


def test_the_new_rows_are_blanked_and_written_back(bench: Bench) -> None:
    before = [layer for index in range(2) for layer in bench.cache.layer(index)]
    rows = bench.window.read()
    bench.window.blank(rows)
    blanked = [layer for index in range(2) for layer in bench.cache.layer(index)]
    for now, then in zip(blanked, before, strict=True):
        is_new = np.zeros(SHAPE, bool)
        is_new[1, :, 0] = is_new[2, :, 15] = True
        assert np.isnan(now[is_new]).all()
        assert np.array_equal(now[~is_new], then[~is_new])
    assert "logits" not in str(bench.difference(rows)), "the rows differ"
    bench.window.write(rows)
    again = [layer for index in range(2) for layer in bench.cache.layer(index)]
    assert all(np.array_equal(now, then) for now, then in zip(again, before, strict=True))
    assert bench.difference(rows) is None


@pytest.mark.parametrize("share", [0.9, 1.1])
@pytest.mark.parametrize("has_experts", [False, True])
def test_logits_may_be_off_by_a_share_of_their_spread(bench: Bench, share: float, has_experts: bool) -> None:
    off = LOGITS.copy()
    off[1, 7] += share * BOUNDS[bench.dtype] * (4 if has_experts else 1) * np.ptp(LOGITS[1])
    found = bench.difference(bench.window.read(), off, has_experts=has_experts)
    assert found is None if share < 1 else "logits of sequence 1 are off" in str(found)


@pytest.mark.parametrize(("share", "passes"), [(0.5, True), (2.0, False)])
def test_new_rows_may_be_off_by_a_share_of_their_largest_number(bench: Bench, share: float, passes: bool) -> None:
    rows = bench.window.read()
    values = bench.cache.layer(1)[1][2, :, 15].copy()  # those of layer 1, sequence 1
    values[0, 3] += share * BOUNDS[bench.dtype] * np.abs(values).max()
    rows[1][3, :, NEW[1]] = bits_of(values, bench.dtype)
    found = bench.difference(rows)
    assert found is None if passes else "the new values of layer 1 of sequence 1 are off" in str(found)


def test_rows_beside_the_new_one_must_stay_to_the_bit(bench: Bench) -> None:
    for b, new in enumerate(NEW):
        rows = bench.window.read()
        rows[b][2, 1, 1 - new, 0] ^= 1
        assert f"beside the new one of sequence {b}" in str(bench.difference(rows))


CANDIDATES: dict[str, tuple[str | None, Change, Change]] = {
    "right": (None, lambda ids: None, lambda values: None),
    "another token": ("not the largest", lambda ids: ids.__setitem__((1, 0), 3), lambda values: None),
    "one token twice": ("as many tokens", lambda ids: ids.__setitem__((0, 1), ids[0, 0]), lambda values: None),
    "beyond the vocabulary": ("as many tokens", lambda ids: ids.__setitem__((0, 0), 50), lambda values: None),
    "a value": ("not the largest", lambda ids: None, lambda values: values.__setitem__((1, 2), 0.0)),
}


@pytest.mark.parametrize("name", CANDIDATES)
def test_the_largest_logits_must_be_exactly_those(name: str) -> None:
    message, change_ids, change_values = CANDIDATES[name]
    ids = np.argsort(-LOGITS, axis=1, kind="stable")[:, :4]
    values = np.take_along_axis(LOGITS, ids, axis=1)
    change_ids(ids)
    change_values(values)
    found = wrong_candidates(LOGITS, ids, values)
    assert found is None if message is None else message in str(found)
