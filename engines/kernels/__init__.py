"""Our own kernels for a decode step on NVIDIA GPUs, written in Triton and compiled ahead of time.

Each file holds one kernel, its reference in numpy, and a function that says how it is launched for a shape and a GPU.
Only the processes that compile, and the tests that interpret, import Triton (`triton_language` of each file is lazy).
"""
