"""Products of decode kernels in the interpreter, against float64."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("triton")

from engines.kernels import product
from engines.kernels.fragments import dequantized
from engines.kernels.launch import ADD, FP8, GLU, GPUS, HALF, INT4, INT8, LOGITS, STORE
from helpers.decode_weights import HALVES, made_weight
from helpers.interpret import guarded, interpret, untouched

GPU = GPUS[90]


def run(weight, memory, batch, *, dtype="float16", mode=STORE, norm=True, invariant=False, gpu=GPU, change=None):
    """Return a product by its kernel, the reference, and the launch."""
    rng = np.random.default_rng(batch)
    half = HALVES[dtype]
    x = rng.normal(0, 3, (batch, weight.columns)).astype(half)
    gain = rng.normal(1, 0.2, weight.columns).astype(half)
    outputs = weight.rows // (2 if mode == GLU else 1)
    out, whole = guarded((batch, outputs), np.float32 if mode == LOGITS else half)
    residual = rng.normal(0, 1, out.shape).astype(half)
    if mode == ADD:
        out[:] = residual
    launch = product.launch(
        weight, "buffer:x", "buffer:out", batch, gpu, dtype=dtype, mode=mode, norm="gain" if norm else None, eps=1e-6,
        invariant=invariant,
    )  # fmt: skip
    sources = {f"weight:{name}": array for name, array in memory.items()}
    sources |= {"weight:gain": gain, "buffer:x": x, "buffer:out": out, "buffer:zeros": np.zeros(32, np.float32)}
    if change is not None:
        change(sources)
    interpret(launch, sources)
    assert untouched(whole)
    expected = product.reference(
        dequantized(weight, memory), x.astype(np.float64), mode=mode,
        gain=gain.astype(np.float64) if norm else None, eps=1e-6, residual=residual.astype(np.float64),
    )  # fmt: skip
    return out.astype(np.float64), expected, launch
