"""Sessions of an engine of the demo with a decode plan, on the host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from helpers.host_cuda import HostDevice
from helpers.host_device import device_of
from qwen3vl_export.checkpoint import Checkpoint
from runtime.contract import DecoderInputs, FloatArray, no_visual_embeds
from runtime.manifest import Manifest
from runtime.ort_cache import OrtDeviceCache
from runtime.session import SessionOptions
from runtime.sessions.ort_cuda import OrtCudaSession

CONFIG = Checkpoint.open("demo").config
# The engine without a plan has its weights packed, and rounds otherwise.
NEAR = 0.03
KERNELS = ["embed_rows", "whole_step"]
PROMPTS = [[3, 4, 5, 6], [7, 8, 9, 10], [11, 12, 13, 14], [15, 16, 17, 18], [19, 20, 21, 22]]


def opened(folder: Path, memory: HostDevice | None = None, *, copies: bool = False, **options: Any) -> OrtCudaSession:
    device = device_of(memory or HostDevice(), copies=copies)
    return OrtCudaSession(folder, Manifest.read(folder), SessionOptions(**options), device=device)


def inputs_of(ids: list[list[int]], past: list[int]) -> DecoderInputs:
    tokens, lengths = np.array(ids, np.int64), np.array(past, np.int64)
    last = np.full((len(ids), 1), tokens.shape[1] - 1)
    return DecoderInputs.text(tokens, lengths, no_visual_embeds(CONFIG), logits_positions=last)


def filled(session: OrtCudaSession, slots: int = 5) -> OrtDeviceCache:
    """Return a cache whose slots have four rows each."""
    cache = session.new_cache(32, slots)
    for slot, prompt in enumerate(PROMPTS[:slots]):
        session.prefill(inputs_of([prompt], [0]), cache, slot)
    return cache


def steps(session: OrtCudaSession, cache: OrtDeviceCache, num: int, slot: int, count: int = 3) -> list[FloatArray]:
    """Logits of steps of sequences from a slot on, [B, vocab] each."""
    return [
        session.decode(inputs_of([[30 + slot + b + 7 * i] for b in range(num)], [4 + i] * num), cache, slot)[:, 0]
        for i in range(count)
    ]
