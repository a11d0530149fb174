"""Read a checkpoint, trace the PyTorch model, write a bundle; parity checks; the command lines."""

__version__ = "0.1.0"
