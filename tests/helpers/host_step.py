"""Kernels of the plans that tests write, in Python: an embedding, and all the rest of a decode step by ONNX Runtime."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import onnxruntime as ort

from helpers.host_kernels import array_at

_SPLITS = 16


def add_one(grid: tuple[int, int, int], address: int, count: int) -> None:
    array_at(address, (count,), np.int64)[:] += 1


def embed_rows(grid: tuple[int, int, int], input_ids: int, table: int, hidden: int, *, width: int, vocab: int) -> None:
    ids = array_at(input_ids, (grid[0],), np.int64)
    array_at(hidden, (grid[0], width), np.float16)[:] = array_at(table, (vocab, width), np.float16)[ids]


@cache
def _decoder(path: str) -> ort.InferenceSession:
    return ort.InferenceSession(path, providers=["CPUExecutionProvider"])


def whole_step(
    grid: tuple[int, int, int],
    input_ids: int,
    position_ids: int,
    past_lengths: int,
    slots: int,
    logits: int,
    top_logits: int,
    top_ids: int,
    hidden: int,
    table: int,
    capacity: int,
    *cache_addresses: int,
    decoder: str,
    config: dict[str, int],
    fault: str,
) -> None:
    """Run a step sequence by sequence, with the fault that a test asks for."""
    batch, k = grid[0], config["top_k"]
    heads, dim, width, vocab = (config[name] for name in ("heads", "dim", "width", "vocab"))
    ids = array_at(input_ids, (batch, 1), np.int64)
    positions = array_at(position_ids, (3, batch, 1), np.int64)
    pasts, places = array_at(past_lengths, (batch,), np.int64), array_at(slots, (batch,), np.int64)
    embedded = array_at(table, (vocab, width), np.float16)[ids[:, 0]]
    assert np.array_equal(array_at(hidden, (batch, width), np.float16), embedded), "the kernel before has run"
    out = array_at(logits, (batch, 1, vocab), np.float32)
    values, tokens = array_at(top_logits, (batch, 1, k), np.float32), array_at(top_ids, (batch, 1, k), np.int64)
    if fault == "nothing":
        out[:] = np.nan
        return
    if fault == "first slots":
        places = np.arange(batch)
    session = _decoder(decoder)
    names = [each.name for each in session.get_outputs()]
    for b in range(batch):
        past, slot = int(pasts[b]), int(places[b])
        slot_bytes = heads * capacity * dim * 2
        places_of_rows = [each + slot * slot_bytes for each in cache_addresses]
        rows = [array_at(each, (1, heads, capacity, dim), np.float16) for each in places_of_rows]
        read, num_read = rows, past
        if fault == "slot":
            other = (1 if slot == 0 else -1) * slot_bytes
            read = [array_at(each + other, (1, heads, capacity, dim), np.float16) for each in places_of_rows]
        if fault == "uneven":
            num_read = int(pasts[0])
        if fault == "split":
            read, num_read = _without_a_split(rows, past)
        feeds: dict[str, Any] = {
            "input_ids": ids[b : b + 1],
            "position_ids": positions[:, b : b + 1],
            "visual_rows": np.full((1, 1), -1),
            "visual_embeds": np.zeros((config["levels"], 1, width), np.float32),
            "past_lengths": np.array([num_read]),
            "logits_positions": np.zeros((1, 1), np.int64),
        }
        for i, cached in enumerate(read):
            feeds[f"past_key_values.{i // 2}.{'value' if i % 2 else 'key'}"] = cached
        found = dict(zip(names, session.run(None, feeds), strict=True))
        if fault != "no logits":
            out[b], values[b], tokens[b] = found["logits"][0], found["top_logits"][0], found["top_ids"][0]
        for i, cached in enumerate(rows):
            new = found[f"present_key_values.{i // 2}.{'value' if i % 2 else 'key'}"][0, :, num_read]
            target = past - (1 if fault == "append" and i == 3 else 0)
            factor = 2 if fault == "scale" and i == 2 else 1 + 2**-9 if fault == "rounding" else 1
            cached[0, :, target] = new * np.float16(factor)
        if fault == "logits" or (fault == "logits of several" and batch > 1):
            out[b, 0, 5] += 0.1 * float(np.ptp(out[b]))
        if fault == "candidates":
            tokens[b, 0, :2] = tokens[b, 0, 1::-1]
        if fault == "rounding":
            out[b, 0] += 0.004 * float(np.ptp(out[b])) * np.sin(np.arange(vocab))
            tokens[b, 0] = np.argsort(-out[b, 0], kind="stable")[:k]
            values[b, 0] = out[b, 0, tokens[b, 0]]


def _without_a_split(rows: list[np.ndarray], past: int) -> tuple[list[np.ndarray], int]:
    """Return the rows without those of the fourth of 16 parts that attention is split into, and their number."""
    part = -(-past // (16 * _SPLITS)) * 16
    begin, end = min(3 * part, past), min(4 * part, past)
    left = [each.copy() for each in rows]
    for each, whole in zip(left, rows, strict=True):
        each[:, :, begin : past - (end - begin)] = whole[:, :, end:past]
    return left, past - (end - begin)
