"""NVIDIA Triton Inference Server: an engine as a model of its Python backend.

`config` has the tensors and the configuration, `inputs` reads a request, `answering` answers it, `responses` sends what
is answered, `model` is what the backend calls. Tensors that Triton's vLLM backend has, too, have its names.
"""
