"""Checkpoint to bundle."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata

from engines.bundle import DECODER, VISION, Bundle
from qwen3vl_export.assembly import build_decoder, build_vision
from qwen3vl_export.checkpoint import Checkpoint
from qwen3vl_export.tracing.pieces import trace_pieces

_TRACING_LIBRARIES = ("torch", "onnx", "onnx-ir", "onnxscript")


def make_bundle(checkpoint: Checkpoint, report: Callable[[str], None] = lambda _: None) -> Bundle:
    """Trace a checkpoint's model and refer to its weights, reading only their headers.

    Args:
        checkpoint: What to trace.
        report: Told of each stage of the work when it begins.

    Raises:
        CheckpointError: A file or a key is missing, left over, or not what config.json implies.
    """
    expected = checkpoint.used_keys
    assets = checkpoint.assets()
    pieces = trace_pieces(checkpoint.config)
    report("stitching the graphs together")
    vision, vision_keys = build_vision(pieces, checkpoint)
    decoder, decoder_keys = build_decoder(pieces, checkpoint)
    assert vision_keys | decoder_keys == expected, "the graphs take other weights than were checked"
    return Bundle(
        config=checkpoint.config,
        graphs={VISION: vision, DECODER: decoder},
        assets=assets,
        source=checkpoint.describe(),
        versions={name: metadata.version(name) for name in _TRACING_LIBRARIES},
    )
