"""What runs on a machine with a GPU: sections of `gpu_pack.py run`, each a program of its own, and what fills
weights.

These files travel in the pack. They import numpy, the runtime and, where PyTorch is measured, torch; no command line
library.
"""
