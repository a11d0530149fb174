"""Bundle graph to the graph that one target runs."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir.passes import common

from engines.passes.replace_functions import ReplaceFunctionsPass
from engines.target import Target
from runtime.errors import Qwen3VLError
from runtime.model_config import ModelConfig


def lower(
    model: ir.Model, target: Target, config: ModelConfig, target_passes: Sequence[ir.passes.InPlacePass]
) -> ir.Model:
    """Lower one graph in place: native bodies in, functions inlined, passes of the target, then clean up.

    Returns:
        The same model, without functions; its inputs, outputs and weights are those of the bundle, but for
        what passes of the target say.

    Raises:
        TargetError: A pass of the target finds something that its kernels do not take.
    """
    passes: list[ir.passes.PassBase] = [
        ReplaceFunctionsPass(target.native_ops, config),
        common.InlinePass(),
        # Constants become initializers so that equal ones are shared and equal nodes on them are found.
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(size_limit=16),
        common.CommonSubexpressionEliminationPass(),
        *target_passes,
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
        common.TopologicalSortPass(),
        common.NameFixPass(),
    ]
    try:
        return ir.passes.Sequential(*passes)(model).model
    except ir.passes.PassError as error:
        # onnx_ir says which pass failed; a user wants to know why.
        if isinstance(error.__cause__, Qwen3VLError):
            raise error.__cause__ from None
        raise
