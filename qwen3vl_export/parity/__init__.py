"""Compare an engine with PyTorch."""
