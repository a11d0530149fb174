"""The decode plan of an engine: own kernels for one new token a sequence, compiled ahead of time for several GPUs."""
