"""What TensorRT and TensorRT-RTX share: one API, given as the `trt` module, so that both can live in one process."""
