"""The custom ops of domain `qwen3vl`, version 1: one file an op.

Each file has the op's schema, an emitter for tracing, a reference in numpy, and a body in standard ONNX ops (opset 24)
as an ONNX function. A target that has a kernel of its own exchanges the body; any other inlines it.
"""
