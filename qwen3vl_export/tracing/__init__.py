"""Trace the distinct pieces of `qwen3vl_export.modeling` into ONNX functions, without a single weight in memory."""
