"""DecodeAttention of every instruction set and cache computes what its definition says."""

from __future__ import annotations

import numpy as np
import pytest

from helpers.native_attention import SUFFIXES, Call, Heads
from helpers.native_graphs import same_bits
from helpers.own_kernels import needs_own_kernels

pytestmark = [needs_own_kernels, pytest.mark.portable]
CACHES = pytest.mark.parametrize("suffix", SUFFIXES)


@CACHES
def test_one_token_after_any_number(isa: str, suffix: str) -> None:
    """Chunks of rows, and parts that several tasks take, are full or not."""
    for past in (0, 1, 15, 16, 17, 63, 64, 65, 255, 256, 300, 511, 512, 700):
        call = Call(suffix, [past], 1, seed=past)
        call.check(call.run())


@CACHES
def test_any_number_of_tokens(isa: str, suffix: str) -> None:
    for num_new in range(2, 41):
        call = Call(suffix, [(0, 7, 61, 64, 130)[num_new % 5]], num_new, Heads(2, 1, 16), seed=num_new)
        call.check(call.run())


@CACHES
@pytest.mark.parametrize("head_dim", [16, 48, 64, 80, 128, 256])
def test_sizes_of_heads(isa: str, suffix: str, head_dim: int) -> None:
    heads = Heads(4, 2, head_dim, scale=head_dim**-0.5, epsilon=1e-5)
    for pasts, num_new in (([70], 1), ([300, 2], 1), ([0], 9), ([33, 5], 6)):
        call = Call(suffix, pasts, num_new, heads)
        call.check(call.run())


@CACHES
@pytest.mark.parametrize(("num_heads", "num_kv"), [(1, 1), (3, 3), (2, 1), (6, 2), (4, 1), (16, 2), (7, 1), (16, 1)])
def test_groups(isa: str, suffix: str, num_heads: int, num_kv: int) -> None:
    heads = Heads(num_heads, num_kv, 32)
    for pasts, num_new in (([270], 1), ([5, 90, 0], 1), ([0], 21), ([67, 3], 5)):
        call = Call(suffix, pasts, num_new, heads)
        call.check(call.run())


@CACHES
@pytest.mark.parametrize("num_new", [1, 2, 18])
def test_ragged_batches(isa: str, suffix: str, num_new: int) -> None:
    for pasts in ([0, 0], [0, 300], [257, 1, 64, 513, 20], [3] * 9):
        call = Call(suffix, pasts, num_new, Heads(4, 2, 16))
        call.check(call.run())


@CACHES
@pytest.mark.parametrize(("pasts", "num_new"), [([300, 12, 0], 1), ([70, 0], 1), ([0, 130], 20), ([0], 33)])
def test_caches_that_are_written_in_place(isa: str, suffix: str, pasts: list[int], num_new: int) -> None:
    for num_free in (0, 5):
        call = Call(suffix, pasts, num_new, num_free=num_free)
        copied, in_place = call.run(), call.run_in_place()
        assert same_bits(copied[0], in_place[0])
        for i, name in ((1, "past_key"), (2, "past_value")):
            for b, past in enumerate(pasts):
                end = past + num_new
                assert same_bits(copied[i][b, :, :end], in_place[i][b, :, :end])
                # What lies after is left as it was.
                assert same_bits(in_place[i][b, :, end:], call.inputs[name][b, :, end:])


@CACHES
def test_a_prompt_at_once_in_chunks_and_token_by_token(isa: str, suffix: str) -> None:
    whole = Call(suffix, [0], 37)
    found = whole.run()
    for size in (1, 2, 9, 30):
        call = Call(suffix, [0], 37)
        caches = {name: call.inputs[name] for name in ("past_key", "past_value")}
        parts = []
        for start in range(0, 37, size):
            part = slice(start, min(start + size, 37))
            given = {name: call.inputs[name][:, part].copy() for name in ("qkv", "cos", "sin")}
            out, caches["past_key"], caches["past_value"] = call.run(past_lengths=np.array([start]), **given, **caches)
            parts.append(out)
        assert np.allclose(np.concatenate(parts, 1), found[0], rtol=0, atol=3e-6)
        for i, cache in enumerate(caches.values(), 1):
            assert same_bits(cache[:, :, :37], found[i][:, :, :37])


@CACHES
@pytest.mark.parametrize("num_new", [1, 12])
@pytest.mark.parametrize("size", [0.0, 1e-20, 1e4, 1e18])
def test_numbers_of_any_size(isa: str, suffix: str, num_new: int, size: float) -> None:
    """Of queries and keys, which the norm brings to one size; values are stored as far as the cache reaches."""
    call = Call(suffix, [40, 3], num_new)
    heads = call.heads
    width = (heads.num_heads + heads.kv_num_heads) * heads.head_dim
    call.inputs["qkv"][..., :width] *= np.float32(size)
    call.check(call.run())


@pytest.mark.parametrize("num_new", [1, 5])
def test_float16_ends_at_its_largest_number(isa: str, num_new: int) -> None:
    call = Call("Float16", [2], num_new)
    values = call.inputs["qkv"][..., -64:]
    values[..., ::4] = np.array(
        [1e6, -1e6, 65504, -65504, 65519.9, 65520, 1e-7, 6e-8, -3e-8, 1e-4, 0, -0.0, 3e38, 2049, 2051, 5e-8]
    )
    out, _, value = call.run()
    assert np.isfinite(out).all() and np.abs(value[:, :, 2 : 2 + num_new].astype(np.float32)).max() == 65504
    call.check((out, *call.run()[1:]))


@pytest.mark.parametrize("suffix", ["Int8", "Int4"])
@pytest.mark.parametrize("num_new", [1, 5])
def test_codes_end_at_their_range(isa: str, suffix: str, num_new: int) -> None:
    call = Call(suffix, [2], num_new)
    call.inputs["qkv"][..., -64:] *= 1e3
    call.inputs["key_scales"][0, :8] = 1e-3
    call.check(call.run())
    lowest, highest = (-128, 127) if suffix == "Int8" else (0, 255)
    value = call.run()[2][:, :, 2 : 2 + num_new]
    assert (value.min(), value.max()) == (lowest, highest)


@CACHES
@pytest.mark.parametrize("num_new", [1, 6])
def test_one_token_wins_or_all_are_alike(isa: str, suffix: str, num_new: int) -> None:
    sharp = Call(suffix, [300, 20], num_new, Heads(scale=40.0))
    sharp.check(sharp.run())
    even = Call(suffix, [300, 20], num_new, Heads(scale=0.0))
    even.check(even.run())


@CACHES
def test_a_number_that_is_none_stays_in_its_sequence(isa: str, suffix: str) -> None:
    for num_new in (1, 20):
        call = Call(suffix, [40, 300, 7], num_new)
        clean = call.run()
        for number in (np.nan, np.inf):
            call.inputs["qkv"][1, -1] = number
            found = call.run()
            for b in (0, 2):
                end = call.pasts[b] + num_new
                assert same_bits(found[0][b], clean[0][b])
                assert all(same_bits(found[i][b, :, :end], clean[i][b, :, :end]) for i in (1, 2))
            assert not np.isfinite(found[0][1, -1]).any()
            # Nor do the rows before its own change in the cache.
            assert all(same_bits(found[i][1, :, : 299 + num_new], clean[i][1, :, : 299 + num_new]) for i in (1, 2))


@CACHES
def test_no_sequences_and_no_tokens(isa: str, suffix: str) -> None:
    one = Call(suffix, [3], 1)
    none = {
        name: a[:0].copy()
        for name, a in one.inputs.items()
        if name not in ("q_norm", "k_norm", "key_scales", "value_scales")
    }
    out, key, _ = one.run(**none)
    assert (out.shape, key.shape[0]) == ((0, 1, 128), 0)
    call = Call(suffix, [3, 1], 0)
    out, key, value = call.run()
    assert out.shape == (2, 0, 128)
    for found, name in ((key, "past_key"), (value, "past_value")):
        for b, past in enumerate(call.pasts):
            assert same_bits(found[b, :, :past], call.inputs[name][b, :, :past])
