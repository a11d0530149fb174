"""Read a checkpoint, trace the PyTorch model, write a bundle; parity checks; the command lines."""

from runtime import __version__

__all__ = ["__version__"]
