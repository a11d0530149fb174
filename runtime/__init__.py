"""Open an engine and generate: numpy and the engine's own library, never torch, onnx or transformers."""

__version__ = "0.1.0"

import logging

from runtime.settings import TELEMETRY_VARIABLE, disable_telemetry

# Here, since every process of this project imports this package before it imports ONNX Runtime.
if not disable_telemetry():
    logging.getLogger(__name__).warning(
        "warning: onnxruntime was imported before this package, so its telemetry may be on in this process; to turn it "
        "off, set %s=1 before Python starts, or import qwen3_vl before onnxruntime",
        TELEMETRY_VARIABLE,
    )
