"""Exchange the bodies of custom ops by a target's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import onnx_ir as ir

from engines.onnx_text import DOMAIN, parse_function

if TYPE_CHECKING:
    from runtime.model_config import ModelConfig


class ReplaceFunctionsPass(ir.passes.InPlacePass):
    """Give each custom op that a target has a kernel for a body that calls the kernel; inlining does the rest."""

    def __init__(self, bodies: Mapping[str, Callable[[ModelConfig], str]], config: ModelConfig) -> None:
        super().__init__()
        self._bodies = bodies
        self._config = config

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Exchange the functions that the model has; no other body is made."""
        modified = False
        for name, body in self._bodies.items():
            identifier = (DOMAIN, name, "")
            old = model.functions.get(identifier)
            if old is None:
                continue
            new = parse_function(body(self._config))
            assert [v.name for v in new.inputs] == [v.name for v in old.inputs], f"{name}: the inputs differ"
            model.functions[identifier] = new
            for domain, version in new.opset_imports.items():
                model.graph.opset_imports.setdefault(domain, version)
            modified = True
        return ir.passes.PassResult(model, modified)
