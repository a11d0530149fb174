"""The model in two forms: `Qwen3VLModel` answers messages, `Qwen3VL` is its definition in torch.

`open_eager` opens a checkpoint as a `Qwen3VLModel` that computes with eager PyTorch, without an export:

    from qwen3_vl.core import open_eager
    logits = open_eager("demo").logits([{"role": "user", "content": "Read the digits."}])

`Qwen3VL` and `open_eager` need the extra [export] (torch). Names are imported when first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen3vl_export.eager import open_eager
    from qwen3vl_export.modeling import Qwen3VL
    from runtime.model import Qwen3VLModel

__all__ = ["Qwen3VL", "Qwen3VLModel", "open_eager"]

_MODULES = {
    "Qwen3VL": "qwen3vl_export.modeling",
    "Qwen3VLModel": "runtime.model",
    "open_eager": "qwen3vl_export.eager",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    try:
        module = importlib.import_module(_MODULES[name])
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        from runtime.installation import how_to_install

        raise ImportError(
            f"{name} needs the Python package 'torch', which is not installed\n  remedy: {how_to_install('export')}",
            name="torch",
        ) from error
    return getattr(module, name)


def __dir__() -> list[str]:
    return __all__
