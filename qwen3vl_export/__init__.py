"""Read a checkpoint, trace the PyTorch model, write a bundle; parity checks; the command lines."""
