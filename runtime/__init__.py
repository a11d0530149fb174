"""Open an engine and generate: numpy and the engine's own library, never torch, onnx or transformers."""

__version__ = "0.1.0"
