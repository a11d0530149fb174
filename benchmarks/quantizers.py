"""Compare quantisers on the demo checkpoint: KL to float32 over the prompts of held-out canvases.

Only the decoder is quantised, so that nothing else adds to the divergence. Calibration sees training canvases alone.
`python -m benchmarks quantizers` runs it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from engines import registry
from engines.build import build_engine
from engines.bundle import Bundle
from engines.passes.fuse_shared_input import FuseSharedInputPass
from engines.passes.quantize_weights import QuantizeWeightsPass
from engines.quantize.blockwise import QuantizedBlocks
from engines.quantize.calibration import Rounding, calibrate
from engines.quantize.calibration_data import CalibrationPrompt
from engines.quantize.formats import WeightFormats
from engines.quantize.gptq import FloatArray, InputMetric, quantize_rows
from engines.target import Target
from qwen3vl_export.checkpoint import Checkpoint
from qwen3vl_export.demo.data import canvas_at, example_of, held_out
from qwen3vl_export.export import make_bundle
from qwen3vl_export.parity.metrics import kl_divergence
from runtime.model import Qwen3VLModel

BLOCKS = (32, 64, 128)
_TRAINING_SEED = 7


def importance_alone(weights_NK: FloatArray, metric: InputMetric, bits: int) -> QuantizedBlocks:
    """Search with each column's error weighted by the mean square of its input, the diagonal of H = R Rᵀ."""
    diagonal_K = (metric.factor_KK**2).sum(1)
    return quantize_rows(weights_NK, replace(metric, factor_KK=np.diag(np.sqrt(diagonal_K))), bits)


METHODS: dict[str, Rounding | None] = {
    "round to nearest, search": None,
    "search weighted by the inputs": importance_alone,
    "GPTQ": quantize_rows,
}


def decoder_target(bits: int, block: int) -> Target:
    """Return a target whose decoder is in blocks, and whose vision tower is float32."""
    rules: list[dict[str, Any]] = [
        {"match": ["model.visual.*"], "kind": "float32"},
        {"match": ["*"], "kind": "blockwise", "bits": bits, "block": block},
    ]
    return replace(
        registry.get("ort-cpu-int4"),
        formats=WeightFormats.from_rules(rules),
        passes=lambda formats: [FuseSharedInputPass(formats.format_of), QuantizeWeightsPass(formats)],
    )


def training_prompts(num_canvases: int) -> list[CalibrationPrompt]:
    """Ask one task, in turn, of each training canvas, and answer it."""
    prompts = []
    for index in range(num_canvases):
        example = example_of(index, canvas_at(_TRAINING_SEED, index, "train"))
        question, answer = list(example.tasks.values())[index % len(example.tasks)]
        messages = [*_ask(example.image, question), {"role": "assistant", "content": answer}]
        prompts.append(CalibrationPrompt(f"training canvas {index}", messages))
    return prompts


def held_out_logits(engine: Path, num_canvases: int) -> Iterator[FloatArray]:
    """Yield the logits of every prompt, [S, vocab]."""
    model = Qwen3VLModel.from_engine(engine)
    for index in range(num_canvases):
        example = held_out(index)
        for question, _ in example.tasks.values():
            yield model.logits(_ask(example.image, question))


def copy_of(bundle: Bundle) -> Bundle:
    """Return another bundle of the same weights: building consumes the graphs, and tracing takes seconds."""
    return replace(bundle, graphs={name: model.clone() for name, model in bundle.graphs.items()})


def build(folder: Path, traced: Bundle, target: Target, rounding: Rounding | None, num_calibration: int) -> Path:
    """Build an engine of a traced bundle."""
    bundle = copy_of(traced)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        if rounding is not None:
            calibrate(bundle, target, training_prompts(num_calibration), Path(work), rounding=rounding)
        build_engine(bundle, target, folder / "engine")
    return folder / "engine"


def _ask(image: Any, question: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]


def measure(num_canvases: int, num_calibration: int, bits: int, on_cell: Callable[[str], None]) -> dict[str, Any]:
    """Return the mean KL in nats of each method and block size, over all positions of all prompts.

    Args:
        num_canvases: Held-out canvases, four prompts each.
        num_calibration: Training canvases, one prompt each.
        bits: Bits of a weight.
        on_cell: Told what has just been measured.
    """
    traced = make_bundle(Checkpoint.open("demo"))
    methods: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        engine = build(Path(name), traced, registry.get("ort-cpu-fp32"), None, 0)
        expected = list(held_out_logits(engine, num_canvases))
        for method, rounding in METHODS.items():
            methods[method] = {}
            for block in BLOCKS:
                engine = build(Path(name), traced, decoder_target(bits, block), rounding, num_calibration)
                found = held_out_logits(engine, num_canvases)
                divergences = [kl_divergence(f, e) for f, e in zip(found, expected, strict=True)]
                methods[method][str(block)] = float(np.mean(np.concatenate(divergences)))
                on_cell(f"{method}, block {block}: {methods[method][str(block)]:.5f}")
    return {"canvases": num_canvases, "calibration": num_calibration, "bits": bits, "methods": methods}
