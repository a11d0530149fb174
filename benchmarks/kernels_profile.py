"""What the products with quantised weights take of a decode step, by ONNX Runtime's own profile."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from runtime import native
from runtime.contract import DecoderInputs
from runtime.machine import default_threads
from runtime.manifest import Manifest

PRODUCTS = ("MatMulInt4", "MatMulInt8", "MatMulNBits")


def inputs(manifest: Manifest, batch: int, num_new: int, past: int) -> DecoderInputs:
    """Return inputs of text tokens, the same in each sequence."""
    text = manifest.model.text
    positions = np.arange(past, past + num_new, dtype=np.int64)
    return DecoderInputs(
        input_ids=np.tile(positions % text.vocab_size, (batch, 1)),
        position_ids=np.tile(positions, (3, batch, 1)),
        visual_rows=np.full((batch, num_new), -1, np.int64),
        visual_embeds=np.zeros((1 + len(manifest.model.vision.deepstack_layers), 1, text.hidden_size), np.float32),
        past_lengths=np.full(batch, past, np.int64),
        logits_positions=np.full((batch, 1), num_new - 1, np.int64),
    )


def products(engine: Path, context: int, rounds: int) -> dict[str, float]:
    """Return the median seconds of all products of a decode step of one sequence, and the bytes of their weights."""
    manifest = Manifest.read(engine)
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.intra_op_num_threads = default_threads()
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        if manifest.capabilities.get("custom_ops"):
            native.register(options)
        session = ort.InferenceSession(str(engine / "decoder.onnx"), options, providers=["CPUExecutionProvider"])
        binding, _kept = _bound(session, inputs(manifest, 1, 1, context), context + 1)
        for _ in range(rounds + 1):
            session.run_with_iobinding(binding)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    runs = sorted((event["ts"], event["dur"]) for event in events if event["name"] == "model_run")[1:]
    taken = [
        sum(e["dur"] for e in events if _is_product(e) and start <= e["ts"] <= start + duration)
        for start, duration in runs
    ]
    return {"median_s": median(taken) / 1e6, "bytes": float(_weight_bytes(engine / "decoder.onnx"))}


def _is_product(event: dict[str, Any]) -> bool:
    return event["name"].endswith("_kernel_time") and event.get("args", {}).get("op_name") in PRODUCTS


def _bound(session: ort.InferenceSession, given: Any, capacity: int) -> tuple[ort.IOBinding, list[Any]]:
    """Bind inputs and a cache of zeros, in place; also return what must live as long."""
    binding, kept = session.io_binding(), []
    for name, array in given.arrays().items():
        binding.bind_cpu_input(name, array)
    binding.bind_output("logits", "cpu")
    for past in session.get_inputs():
        if not past.name.startswith("past_key_values."):
            continue
        dtype = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}.get(
            past.type, np.uint8
        )
        array = np.zeros((1, past.shape[1], capacity, past.shape[3]), dtype)
        value = ort.OrtValue.ortvalue_from_numpy(array)
        binding.bind_ortvalue_input(past.name, value)
        binding.bind_ortvalue_output(past.name.replace("past", "present", 1), value)
        kept.append((array, value))
    return binding, kept


def _weight_bytes(graph: Path) -> int:
    """Return the bytes of codes, scales and zero points of all products of a graph."""
    model = onnx.load(str(graph), load_external_data=False)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    names = {
        name for node in model.graph.node if node.op_type in PRODUCTS for name in node.input[1:4] if name in stored
    }
    return sum(int(entry.value) for name in names for entry in stored[name].external_data if entry.key == "length")
