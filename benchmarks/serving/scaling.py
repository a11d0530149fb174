"""Decode steps of several sequences, straight on the session: how much more than one they take, and for what."""

from __future__ import annotations

import bisect
import json
import re
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import summarise
from benchmarks.serving.workload import Workload
from runtime.contract import DecoderInputs, no_visual_embeds
from runtime.kernels import EXACT_PRODUCTS, kernels_of, needs_exact_products
from runtime.manifest import Manifest
from runtime.session import KVCache, Session, SessionOptions, open_session

_TOKEN = 65
_PROFILED_BATCHES = (1, 8)
_PROFILED_STEPS = 5
_ATTENTION, _PRODUCTS = re.compile("GroupQueryAttention"), re.compile("MatMul|Gemm|MoE")


def measure(work: Workload) -> dict[str, Any]:
    """Time a step at each number of sequences and of rows in the cache, in turns, and profile some."""
    folder = Path(work.engine)
    manifest = Manifest.read(folder)
    session = open_session(folder, manifest, SessionOptions(work.threads))
    cache = session.new_cache(max(work.pasts) + 1, max(work.batches))
    fill(session, cache, manifest, max(work.pasts))
    taken: dict[tuple[int, int], list[float]] = defaultdict(list)
    for round_ in range(1 + work.repeats):  # the first one warms up
        for past in work.pasts:
            for batch in work.batches:
                inputs = step_inputs(manifest, batch, past)
                start = time.perf_counter()
                session.decode(inputs, cache)
                if round_:
                    taken[batch, past].append(time.perf_counter() - start)
    steps = [{"batch": batch, "past": past, **summarise(values)} for (batch, past), values in taken.items()]
    result: dict[str, Any] = {"steps": steps, "profiles": []}
    if manifest.session == "ort_cpu":
        del session
        result["profiles"] = [
            profile(work, manifest, cache, batch, past)
            for batch in _PROFILED_BATCHES
            if batch in work.batches
            for past in sorted({min(work.pasts), max(work.pasts)})
        ]
    return result


def fill(session: Session, cache: KVCache, manifest: Manifest, num_rows: int) -> None:
    """Write rows into all slots of a cache: memory that was never written would be read faster."""
    tokens_1S = np.random.default_rng(0).integers(0, min(300, manifest.model.text.vocab_size), (1, num_rows))
    for start in range(0, num_rows, 256):
        part_1S = tokens_1S[:, start : start + 256]
        asked_11 = np.array([[part_1S.shape[1] - 1]])
        embeds = no_visual_embeds(manifest.model)
        session.prefill(DecoderInputs.text(part_1S, np.array([start]), embeds, logits_positions=asked_11), cache)
    for slot in range(1, cache.batch):
        cache.copy_rows(0, slot, num_rows)


def step_inputs(manifest: Manifest, batch: int, past: int) -> DecoderInputs:
    """Return a decode step of sequences that have as many rows each."""
    return DecoderInputs.text(
        np.full((batch, 1), _TOKEN, np.int64), np.full(batch, past, np.int64), no_visual_embeds(manifest.model)
    )


def profile(work: Workload, manifest: Manifest, cache: Any, batch: int, past: int) -> dict[str, Any]:
    """Return the seconds a step that the nodes of each operator take, by ONNX Runtime's own profile."""
    import onnxruntime as ort

    with tempfile.TemporaryDirectory() as name:
        options = ort.SessionOptions()
        options.intra_op_num_threads = work.threads
        options.log_severity_level = 4
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(name) / "profile")
        if needs_exact_products(kernels_of(manifest)):
            options.add_session_config_entry(*EXACT_PRODUCTS)
        decoder = ort.InferenceSession(
            str(Path(work.engine) / "decoder.onnx"), options, providers=["CPUExecutionProvider"]
        )
        binding = decoder.io_binding()
        cache.bind(binding, 0, batch)
        for key, array in step_inputs(manifest, batch, past).arrays().items():
            binding.bind_cpu_input(key, array)
        for _ in range(1 + _PROFILED_STEPS):
            binding.bind_output("logits", "cpu")
            decoder.run_with_iobinding(binding)
        events = json.loads(Path(decoder.end_profiling()).read_text(encoding="utf-8"))
    return {"batch": batch, "past": past, "seconds": node_seconds(events, _PROFILED_STEPS)}


def node_seconds(events: list[Mapping[str, Any]], num_steps: int) -> dict[str, float]:
    """Return the seconds a step of attention, products and all other nodes: medians of the last steps of a profile."""
    runs = sorted(event["ts"] for event in events if event["name"] == "model_run")[-num_steps:]
    seconds = {kind: [0.0] * num_steps for kind in ("attention", "products", "other")}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time") and event["ts"] >= runs[0]:
            operator = event["args"].get("op_name", "")
            kind = "attention" if _ATTENTION.match(operator) else "products" if _PRODUCTS.search(operator) else "other"
            seconds[kind][bisect.bisect_right(runs, event["ts"]) - 1] += event["dur"] / 1e6
    return {kind: statistics.median(values) for kind, values in seconds.items()}
