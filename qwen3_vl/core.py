"""The model in two forms: `Qwen3VLModel` answers messages, `Qwen3VL` is its definition in torch.

`open_eager` opens a checkpoint as a `Qwen3VLModel` that computes with eager PyTorch, without an export:

    from qwen3_vl.core import open_eager
    logits = open_eager("demo").logits([{"role": "user", "content": "Read the digits."}])

`export` makes an engine of a checkpoint, as the command `qwen3vl-export` does. It, `Qwen3VL` and `open_eager` need the
extra [export] (torch).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwen3_vl.lazy import lazy

if TYPE_CHECKING:
    from qwen3vl_export.eager import open_eager
    from qwen3vl_export.export import Exported, export
    from qwen3vl_export.modeling import Qwen3VL
    from qwen3vl_export.request import ExportRequest
    from runtime.model import Qwen3VLModel

__all__ = ["ExportRequest", "Exported", "Qwen3VL", "Qwen3VLModel", "export", "open_eager"]

_SOURCES = {
    "qwen3vl_export.eager": ["open_eager"],
    "qwen3vl_export.export": ["Exported", "export"],
    "qwen3vl_export.modeling": ["Qwen3VL"],
    "qwen3vl_export.request": ["ExportRequest"],
    "runtime.model": ["Qwen3VLModel"],
}

__getattr__, __dir__ = lazy(__name__, __all__, _SOURCES)
