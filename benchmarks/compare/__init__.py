"""Our engines beside PyTorch, onnxruntime-genai and OpenVINO on one checkpoint, each in a process of its own."""
