"""Read a checkpoint, trace the PyTorch model, write a bundle; parity checks; the command lines."""

from qwen3_vl.names import check_names
from runtime import __version__

__all__ = ["__version__"]

check_names()
