"""What the targets of ONNX Runtime share."""
