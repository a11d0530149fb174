"""The most likely tokens of a decode step in Triton's interpreter, against a stable sort."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from engines.kernels import candidates
from engines.kernels.launch import GPUS, Launch, Unserved
from helpers.broken_kernels import with_fault
from helpers.interpret import guarded, interpret, untouched

pytest.importorskip("triton")

Array = np.ndarray[Any, Any]


def find(logits: Array, top_k: int = 64, steps: list[Launch] | None = None) -> tuple[Array, Array]:
    """Return the candidates that the kernels find."""
    batch, vocab = logits.shape
    top = min(top_k, vocab)
    values, whole_values = guarded((batch, top), np.float32)
    ids, whole_ids = guarded((batch, top), np.int64)
    memory = {"step:logits": logits, "step:top_logits": values, "step:top_ids": ids}
    for name, (num_bytes, _) in candidates.buffers(vocab, batch).items():
        memory[f"buffer:{name}"] = np.full(num_bytes // 8, 77, np.int64)
    for launch in steps or candidates.launches(vocab, batch, GPUS[90], top_k=top_k):
        interpret(launch, memory)
    assert untouched(whole_values) and untouched(whole_ids)
    return values, ids


def check(logits: Array, top_k: int = 64, steps: list[Launch] | None = None) -> None:
    """Compare with the reference."""
    values, ids = find(logits, top_k, steps)
    wanted = candidates.reference(logits, top_k)
    np.testing.assert_array_equal(ids, wanted[1])
    np.testing.assert_array_equal(values, wanted[0])


def draw(batch: int, vocab: int, levels: int = 0) -> Array:
    """Return random logits; of `levels` different values only, if that is not 0."""
    rng = np.random.default_rng(vocab + batch)
    logits = rng.standard_normal((batch, vocab)).astype(np.float32) * 5
    return np.round(logits * levels / 10).astype(np.float32) if levels else logits


@pytest.mark.parametrize("vocab", [1, 2, 63, 64, 65, 399, 2048, 2049])
def test_vocabularies(vocab: int) -> None:
    check(draw(2 if vocab < 2048 else 1, vocab))


def join(vocab: int, batch: int, change: Callable[[Launch], Launch] = lambda launch: launch) -> None:
    """Run the second launch alone, on keys that another program made, and compare: tiles take the interpreter long."""
    logits = draw(batch, vocab, levels=2000)
    first, second = candidates.launches(vocab, batch, GPUS[90])
    tiles = first.grid[0]
    size = 64 * first.constants["RUNS"] * first.constants["W"]
    padded = np.full((batch, tiles * size), -np.inf, np.float32)
    padded[:, :vocab] = logits
    in_tiles, ids = candidates.reference(padded.reshape(-1, size))
    tokens = ids.reshape(batch, tiles, 64) + size * np.arange(tiles)[:, None]
    bits = in_tiles.reshape(batch, tiles, 64).view(np.int32).astype(np.int64)
    order = np.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    memory = {
        "buffer:candidate_keys": (order << 32) + 0x7FFFFFFF - tokens,
        "step:top_logits": np.zeros((batch, 64), np.float32),
        "step:top_ids": np.zeros((batch, 64), np.int64),
    }
    assert memory["buffer:candidate_keys"].nbytes == candidates.buffers(vocab, batch)["candidate_keys"][0]
    interpret(change(second), memory)
    wanted = candidates.reference(logits)
    np.testing.assert_array_equal(memory["step:top_ids"], wanted[1])
    np.testing.assert_array_equal(memory["step:top_logits"], wanted[0])


@pytest.mark.parametrize("vocab", [151936, 2048 * 256, 1_000_003])
def test_vocabularies_of_many_tiles(vocab: int) -> None:
    join(vocab, 2)


@pytest.mark.slow
def test_the_vocabulary_of_a_released_checkpoint() -> None:
    check(draw(1, 151936, levels=2000))


@pytest.mark.parametrize("batch", [*range(1, 9), 16, 32])
def test_batches(batch: int) -> None:
    check(draw(batch, 60), 8)


@pytest.mark.parametrize("top_k", [1, 2, 5, 32, 50])
def test_fewer_candidates(top_k: int) -> None:
    check(draw(1, 2500), top_k)


@pytest.mark.parametrize("vocab", [399, 2500])
def test_the_lower_of_equal_tokens_comes_first(vocab: int) -> None:
    check(draw(2, vocab, levels=3))
    check(np.zeros((1, vocab), np.float32))


def test_the_largest_in_one_tile() -> None:
    logits = draw(1, 8192)
    logits[0, 4100:4300] += 100
    check(logits)
    logits[0, -70:] += 200
    check(logits)


def test_zeros_of_both_signs_are_equal() -> None:
    logits = np.full((1, 300), -1, np.float32)
    logits[0, 10:40:3], logits[0, 11:40:3] = -0.0, 0.0
    check(logits)


def test_nan_is_last_and_infinities_have_their_place() -> None:
    logits = draw(1, 100)
    logits[0, ::3] = np.nan
    logits[0, [4, 5]], logits[0, [7, 10]] = np.inf, -np.inf
    check(logits)
    check(np.full((2, 70), np.nan, np.float32))
    check(np.full((2, 70), -np.inf, np.float32))


def test_as_onnx_runtime_s_own() -> None:
    logits = draw(2, 3000, levels=20)
    count = helper.make_tensor("k", TensorProto.INT64, [1], [64])
    names = [("x", TensorProto.FLOAT), ("values", TensorProto.FLOAT), ("ids", TensorProto.INT64)]
    x, *outputs = (helper.make_tensor_value_info(name, kind, None) for name, kind in names)
    graph = helper.make_graph([helper.make_node("TopK", ["x", "k"], ["values", "ids"])], "g", [x], outputs, [count])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for found, wanted in zip(find(logits), session.run(None, {"x": logits}), strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(
    ("step", "old", "new"),
    [
        (0, "((tile * RUNS + run) * W + warp) * 64", "((tile * RUNS + run) * W + warp) * 32"),
        (0, "where(token < VOCAB, ", "where(token < VOCAB + 1, "),
        (0, "(places() >> bits) & 1 == 0", "places() >= 0"),
        (0, "keys = tl.max(tl.reshape", "keys = tl.min(tl.reshape"),
        (0, "1 << join, W", "1, W"),
        (1, "tl.where(falls, places(), 63 - places())", "places()"),
        (1, "tl.where(tile < tiles, ", "tl.where(tile < tiles - 1, "),
    ],
)
def test_faults_are_found(step: int, old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = draw(1, 5000)
    logits[0, -1] = 100
    steps = candidates.launches(5000, 1, GPUS[90])
    steps[step] = with_fault(steps[step], old, new, tmp_path, monkeypatch)
    with pytest.raises(AssertionError):
        check(logits, steps=steps)


@pytest.mark.parametrize(("old", "new"), [("joined = ahead", "pass"), ("first + W + warp", "first + warp")])
def test_faults_of_more_tiles_than_warps_are_found(
    old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(launch: Launch) -> Launch:
        return with_fault(launch, old, new, tmp_path, monkeypatch)

    with pytest.raises(AssertionError, match=r"(?i)not equal"):
        join(151936, 1, broken)


def test_too_many_are_refused() -> None:
    with pytest.raises(Unserved, match="65 candidates"):
        candidates.launches(100, 1, GPUS[90], top_k=65)
