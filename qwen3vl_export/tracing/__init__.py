"""Trace the distinct pieces of transformers' Qwen3-VL into ONNX functions, without a single weight in memory."""
