"""Calls of DecodeAttention, and what must come of them.

Shapes: B sequences, S new tokens of each, N query heads, K kv heads, H head dim, T cache rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from helpers.cpu_ops import decode_attention, read
from helpers.native_graphs import ATTENTION_INPUTS, CACHE_DTYPES, Array, run_op, session_of
from runtime import native

SUFFIXES = tuple(CACHE_DTYPES)
Results = tuple[Array, Array, Array]
_OUTPUTS = ("out0", "out1", "out2")


@dataclasses.dataclass(frozen=True)
class Heads:
    """N, K and H, and the other attributes of a node."""

    num_heads: int = 4
    kv_num_heads: int = 2
    head_dim: int = 32
    scale: float = 0.25
    epsilon: float = 1e-6

    @property
    def attributes(self) -> dict[str, Any]:
        """Of the node."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "head_dim"}


class Call:
    """One call, on random numbers.

    Args:
        suffix: Of the operator's name, by the cache's type.
        pasts: Cached tokens of each sequence.
        num_new: S.
        heads: Sizes.
        num_free: Rows of the cache that stay free after the longest sequence.
        seed: Of the numbers of each sequence, which do not depend on the others.

    Attributes:
        inputs: By their names; rows of the cache that no sequence has are NaN, or garbage of codes.
    """

    def __init__(
        self,
        suffix: str,
        pasts: Sequence[int],
        num_new: int,
        heads: Heads | None = None,
        *,
        num_free: int = 3,
        seed: int = 0,
    ) -> None:
        self.suffix, self.pasts, self.num_new = suffix, list(pasts), num_new
        self.heads = heads or Heads()
        self.kind = suffix.lower() or "float32"
        self._capacity = max(pasts, default=0) + num_new + num_free
        random = np.random.default_rng(1000)
        head_dim, num_kv = self.heads.head_dim, self.heads.kv_num_heads
        norms = [random.uniform(0.5, 1.5, head_dim) * random.choice([-1, 1], head_dim) for _ in range(2)]
        parts = [self._sequence(past, np.random.default_rng((seed, i))) for i, past in enumerate(pasts)]
        joined = {name: np.stack([part[name] for part in parts]) for name in parts[0]} if parts else {}
        self.inputs: dict[str, Array] = {
            **{name: each.astype(np.float32) for name, each in zip(("q_norm", "k_norm"), norms, strict=True)},
            **joined,
            "past_lengths": np.array(self.pasts, np.int64),
        }
        if self._has_codes:
            top = 127 if suffix == "Int8" else 7
            for name in ("key_scales", "value_scales"):
                self.inputs[name] = (random.uniform(1, 3, (num_kv, head_dim)) / top).astype(np.float32)

    @property
    def _has_codes(self) -> bool:
        return self.suffix in ("Int8", "Int4")

    def _sequence(self, past: int, random: np.random.Generator) -> dict[str, Array]:
        heads, num_new = self.heads, self.num_new
        width = (heads.num_heads + 2 * heads.kv_num_heads) * heads.head_dim
        angles = random.uniform(-9, 9, (num_new, heads.head_dim // 2))
        given = {"qkv": random.standard_normal((num_new, width)), "cos": np.cos(angles), "sin": np.sin(angles)}
        # Rows come one after the other, so that they do not depend on the capacity.
        rows = [self._row(random) for _ in range(2 * past)]
        for name, part in (("past_key", rows[:past]), ("past_value", rows[past:])):
            shape = (heads.kv_num_heads, self._capacity, self._row(random).shape[-1])
            garbage = random.integers(0, 256, (*shape, 4)).astype(np.uint8)
            if self._has_codes:
                cache = garbage[..., 0].view(CACHE_DTYPES[self.suffix])
            else:
                cache = np.full(shape, np.nan, CACHE_DTYPES[self.suffix])
            cache = cache.copy()
            if part:
                cache[:, :past] = np.stack(part, 1)
            given[name] = cache
        return {name: a.astype(np.float32) if a.dtype == np.float64 else a for name, a in given.items()}

    def _row(self, random: np.random.Generator) -> Array:
        """Return one row [K, H] as the cache holds it; codes of any value."""
        shape = (self.heads.kv_num_heads, self.heads.head_dim)
        if self.suffix == "Int8":
            return random.integers(-128, 128, shape).astype(np.int8)
        if self.suffix == "Int4":
            return random.integers(0, 256, (shape[0], shape[1] // 2)).astype(np.uint8)
        return random.standard_normal(shape).astype(CACHE_DTYPES[self.suffix])

    def run(self, threads: int = 1, **inputs: Array) -> Results:
        """Return out and the new caches; `inputs` take the place of its own."""
        out, key, value = run_op(
            f"DecodeAttention{self.suffix}",
            {**self.inputs, **inputs},
            self._names,
            num_outputs=3,
            threads=threads,
            **self.heads.attributes,
        )
        return out, key, value

    def run_in_place(self, threads: int = 1) -> Results:
        """Return out and the caches, which are copies that the call has written to."""
        caches = [self.inputs[name].copy() for name in ("past_key", "past_value")]
        given = {**self.inputs, "past_key": caches[0], "past_value": caches[1]}
        name = f"DecodeAttention{self.suffix}"
        session = session_of(name, given, self._names, 3, threads, **self.heads.attributes)
        binding = session.io_binding()
        for name, array in given.items():
            binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        binding.bind_output(_OUTPUTS[0], "cpu")
        for name, cache in zip(_OUTPUTS[1:], caches, strict=True):
            binding.bind_output(name, "cpu", 0, cache.dtype, cache.shape, cache.ctypes.data)
        session.run_with_iobinding(binding)
        return binding.get_outputs()[0].numpy(), caches[0], caches[1]

    @property
    def _names(self) -> tuple[str, ...]:
        return ATTENTION_INPUTS if self._has_codes else ATTENTION_INPUTS[:8]

    def check(self, results: Results) -> None:
        """Compare with the definition, in float64."""
        out, *caches = results
        expected, *expected_caches = self._reference()
        self._check_caches(caches, expected_caches)
        expected, *_ = self._reference(held=(caches[0], caches[1]))
        assert out.shape == expected.shape and out.dtype == np.float32
        for b, past in enumerate(self.pasts):
            rows = slice(0, past + self.num_new)  # the others hold anything
            values = self._read(caches[1][b : b + 1, :, rows], "value_scales")
            wrong = np.abs(out[b] - expected[b]).max()
            # Scores have a relative error of some 2^-22, and are below |q| |k|.
            keys = self._read(caches[0][b : b + 1, :, rows], "key_scales")
            largest = self.heads.scale * np.sqrt((keys**2).sum(-1).max() * self.heads.head_dim * 1.5**2)
            assert wrong <= (2e-6 + 1e-6 * largest) * np.abs(values).max(), (b, wrong)

    def _reference(self, held: tuple[Array, Array] | None = None) -> Results:
        scales = {name: self.inputs[name] for name in ("key_scales", "value_scales") if name in self.inputs}
        given = [self.inputs[name] for name in ATTENTION_INPUTS[:8]]
        return decode_attention(*given, kind=self.kind, held=held, **scales, **self.heads.attributes)

    def _read(self, cache: Array, scales: str) -> Array:
        return read(cache, self.kind, self.inputs.get(scales))

    def _check_caches(self, found: Sequence[Array], expected: Sequence[Array]) -> None:
        for cache, right, name, scales in zip(
            found, expected, ("past_key", "past_value"), ("key_scales", "value_scales"), strict=True
        ):
            assert cache.dtype == right.dtype and cache.shape == right.shape
            for b, past in enumerate(self.pasts):
                assert np.array_equal(cache[b, :, :past], self.inputs[name][b, :, :past]), "rows of the past"
                new = slice(past, past + self.num_new)
                got, want = (self._read(each[b : b + 1, :, new], scales) for each in (cache, right))
                if self._has_codes:
                    # A number in the middle between two codes may become either.
                    steps = np.abs(got - want) / self.inputs[scales][None, :, None]
                    assert steps.max() < 1.001 and (steps > 0.5).mean() < 0.01, "new rows"
                elif name == "past_value":
                    assert np.array_equal(got, want), "new values are stored as they are"
                else:
                    rounding = 2.0**-10 if self.kind == "float16" else 2e-6
                    assert np.allclose(got, want, rtol=rounding, atol=1e-6), "new keys"


def run_with_all(call: Call) -> dict[str, Results]:
    """Return the results of every instruction set that this processor runs; the last is in use then."""
    results = {}
    for isa in native.isas():
        native.use(isa)
        results[isa] = call.run()
    return results
