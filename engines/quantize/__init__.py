"""Quantisation of weights: formats, the search of scales, and the streamed tensors that kernels take."""
