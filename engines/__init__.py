"""Lower a bundle to one target and compile it into an engine. Needs onnx, never torch."""
