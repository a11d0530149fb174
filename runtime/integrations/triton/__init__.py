"""NVIDIA Triton Inference Server: an engine as a model of its Python backend.

`config` has the tensors and the configuration, `inputs` reads a request, `responses` sends what is answered, `model` is
what the backend calls. The names of tensors are those of Triton's vLLM backend where the meaning is the same.
"""
