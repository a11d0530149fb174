"""What the library's inspector says of the plans of an engine folder: `python -m benchmarks.plans ENGINE` prints it."""

from __future__ import annotations

import importlib
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from runtime.errors import Qwen3VLError, TargetError
from runtime.manifest import Manifest


def inspect_plans(engine: Path) -> dict[str, Any]:
    """Open the plans of an engine folder and return what the library's inspector says of each.

    Raises:
        TargetError: The library does not open a plan.
    """
    library = str(Manifest.read(engine).capabilities["library"])
    trt = importlib.import_module(library)
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    plans: dict[str, Any] = {}
    for path in sorted(engine.glob("*.plan")):
        opened = runtime.deserialize_cuda_engine(path.read_bytes())
        if opened is None:
            raise TargetError(f"{path.name}: {library} {trt.__version__} does not open it on this machine")
        text = opened.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
        plans[path.stem] = {
            "plan_bytes": path.stat().st_size,
            "num_profiles": opened.num_optimization_profiles,
            **layer_summary(text),
        }
    return plans


def layer_summary(text: str) -> dict[str, Any]:
    """Summarise the inspector's JSON: names of the layers, their kinds, and the types of what they give.

    A plan that was built without detailed profiling verbosity holds names alone: kinds and types are then empty.
    """
    layers = json.loads(text)["Layers"]
    detailed = [each for each in layers if isinstance(each, dict)]
    types = Counter(
        str(output.get("Format/Datatype", "unknown")).split()[-1]
        for each in detailed
        for output in each.get("Outputs", [])
    )
    return {
        "num_layers": len(layers),
        "layer_types": dict(sorted(Counter(str(each.get("LayerType")) for each in detailed).items())),
        "output_types": dict(sorted(types.items())),
        "layers": [each if isinstance(each, str) else each.get("Name", "") for each in layers],
    }


if __name__ == "__main__":
    try:
        print(json.dumps(inspect_plans(Path(sys.argv[1]))))
    except Qwen3VLError as error:
        sys.exit(f"error: {error}")
