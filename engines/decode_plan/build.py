"""Make the decode plan of an engine that is being built."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import onnx_ir as ir

from engines.decode_plan.compile import compile_all
from engines.decode_plan.graph import read_decoder
from engines.decode_plan.options import PlanOptions, names_of, plan_problem
from engines.decode_plan.steps import make_steps
from engines.decode_plan.write import check_weights, write_plan
from engines.kernels.launch import Unserved
from engines.progress import Progress, Stage
from engines.target import Target
from runtime.errors import TargetError
from runtime.manifest import FileRecord
from runtime.model_config import ModelConfig


def add_plan(
    folder: Path, model: ir.Model, target: Target, config: ModelConfig, options: PlanOptions, progress: Progress
) -> dict[str, FileRecord]:
    """Write a decode plan into an engine's folder, unless none is wanted, or none can be made and none has to be.

    Args:
        folder: The engine's, which holds the decoder.
        model: The decoder as it was written.
        target: What it was lowered for.
        config: Shape of the model.
        options: GPUs, and whether there has to be one.
        progress: Told of the kernels as they are compiled, and why there is no plan.

    Returns:
        A record for each file; empty without a plan.

    Raises:
        TargetError: There has to be one, and none can be made; or a kernel does not compile.
    """
    if not target.decode_plan or options.is_wanted is False:
        return {}
    problem = plan_problem()
    if not problem:
        gpus = options.gpus
        try:
            decoder = read_decoder(model, config)
            steps = {gpu.sm: make_steps(decoder, gpu) for gpu in gpus}
            check_weights(model, steps)
        except Unserved as error:
            problem = str(error)
        else:
            progress.report(Stage.COMPILING, f"compiling decode kernels for compute capability {names_of(gpus)}")
            compiled = partial(compile_all, advance=partial(progress.count, unit="kernels"))
            return write_plan(folder, model, decoder, steps, compiled)
    if options.is_required:
        raise TargetError(
            f"{target.name}: no decode plan can be made: {problem}",
            remedy="leave --decode-plan and --compute-capability out: ONNX Runtime then decodes",
        )
    progress.report(
        Stage.CHOOSING, f"note: {target.name} is built without a decode plan, so steps are slower: {problem}"
    )
    return {}
