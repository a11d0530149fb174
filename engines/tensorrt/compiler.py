"""Build plans of lowered graphs.

`trt` is `tensorrt` or `tensorrt_rtx`, given as an argument: both have one API, and both can be loaded at once.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import onnx_ir as ir

from engines.build_options import BuildOptions
from engines.target import Compiled
from engines.tensorrt.checks import check_graph, check_network, check_plan_size, graph_facts
from engines.tensorrt.profiles import LOGITS_CHUNK, Profile, profiles_of
from runtime.errors import CapacityError, TargetError
from runtime.manifest import FileRecord
from runtime.model_config import ModelConfig
from runtime.tensorrt_log import first_errors, is_out_of_memory, make_logger


def compile_plans(
    trt: Any,
    folder: Path,
    graphs: Mapping[str, ir.Model],
    config: ModelConfig,
    options: BuildOptions,
    compute_capabilities: tuple[str, ...],
    *,
    sets_capabilities: bool = True,
) -> Compiled:
    """Build a plan of each lowered graph in `folder` and remove the graph, unless it is needed for refitting.

    Args:
        trt: The library.
        folder: Holds `<name>.onnx` and its weights.
        graphs: The same graphs in memory.
        config: Shape of the model.
        options: Sizes and switches.
        compute_capabilities: GPUs that the plans will run on, such as "8.6".
        sets_capabilities: The library is told of them; else it builds for the GPU that it finds.

    Raises:
        TargetError: The library refuses a graph, or makes something else of it.
        CapacityError: Memory runs out while building.
    """
    files: dict[str, FileRecord] = {}
    profiles, weight_bytes = {}, {}
    for name, model in graphs.items():
        print(f"compiling {name} with {trt.__name__} {trt.__version__}", file=sys.stderr)
        facts = graph_facts(model)
        check_graph(facts, config, name)
        chosen = profiles_of(name, _input_shapes(model), config, options)
        builder = _PlanBuilder(trt, folder / f"{name}.onnx")
        check_network(trt, builder.network, facts, name)
        path = folder / f"{name}.plan"
        builder.build(path, chosen, options, compute_capabilities if sets_capabilities else ())
        check_plan_size(path.stat().st_size, facts, name, stripped=options.strip_weights)
        files[path.name] = FileRecord.of(path, is_weights=True)
        weight_bytes[name] = facts.weight_bytes
        profiles[name] = [profile.to_dict() for profile in chosen]
        del builder
    if not options.strip_weights:
        for name in graphs:
            for path in (folder / f"{name}.onnx", folder / f"{name}.onnx.data"):
                path.unlink(missing_ok=True)
    capabilities = {
        "library": trt.__name__,
        "library_version": trt.__version__,
        "compute_capabilities": list(compute_capabilities),
        "logits_chunk": min(options.prefill_chunk, LOGITS_CHUNK),
        "profiles": profiles,
        "graph_weight_bytes": weight_bytes,
        "version_compatible": options.version_compatible,
        "hardware_compatible": options.hardware_compatible,
        "weight_streaming": options.weight_streaming,
        "stripped": options.strip_weights,
    }
    return Compiled(files, capabilities, keeps_graphs=options.strip_weights)


def _input_shapes(model: ir.Model) -> dict[str, list[int | str]]:
    return {
        str(value.name): [dim if isinstance(dim, int) else str(dim) for dim in value.shape or ()]
        for value in model.graph.inputs
    }


class _PlanBuilder:
    """One graph's way through the library."""

    def __init__(self, trt: Any, source: Path) -> None:
        self._trt = trt
        self._source = source
        self._log = make_logger(trt)
        self._builder = trt.Builder(self._log)
        self.network = self._builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(self.network, self._log)
        if not parser.parse_from_file(str(source)):
            errors = first_errors([parser.get_error(i).desc() for i in range(parser.num_errors)])
            raise TargetError(
                f"{source.name}: {trt.__name__} {trt.__version__} does not parse it: {errors}",
                remedy="a newer version of the library may; docs/targets.md says which one was tried",
            )

    def build(
        self, path: Path, profiles: list[Profile], options: BuildOptions, compute_capabilities: tuple[str, ...]
    ) -> None:
        """Write the plan."""
        trt, config = self._trt, self._builder.create_builder_config()
        # So that the inspector on a GPU machine shows the types of what each layer gives.
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        for flag, is_set in (
            (trt.BuilderFlag.STRIP_PLAN, options.strip_weights),
            (trt.BuilderFlag.WEIGHT_STREAMING, options.weight_streaming),
            (trt.BuilderFlag.VERSION_COMPATIBLE, options.version_compatible),
        ):
            if is_set:
                config.set_flag(flag)
        # TensorRT-RTX asks for it where a CUDA graph is recorded (notes of 1.2), and refuses it beside weight
        # streaming, so then no step is recorded. TensorRT has no such flag.
        if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION") and not options.weight_streaming:
            config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
        if options.hardware_compatible:
            config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
        if compute_capabilities:
            config.num_compute_capabilities = len(compute_capabilities)
            for index, capability in enumerate(compute_capabilities):
                member = getattr(trt.ComputeCapability, "SM" + capability.replace(".", ""))
                config.set_compute_capability(member, index)
        for profile in profiles:
            config.add_optimization_profile(self._profile(profile))
        with path.open("wb") as file:
            writer = stream_writer(trt, file)
            is_built = self._builder.build_serialized_network_to_stream(self.network, config, writer)
        # The library drops what `write` raises, and calls a plan that was cut off a success.
        if writer.error is not None:
            raise writer.error
        if not is_built:
            raise self._failure()

    def _profile(self, profile: Profile) -> Any:
        built = self._builder.create_optimization_profile()
        for name, shape in profile.min.items():
            built.set_shape(name, shape, profile.opt[name], profile.max[name])
        return built

    def _failure(self) -> TargetError | CapacityError:
        errors = self._log.errors
        library = f"{self._trt.__name__} {self._trt.__version__}"
        message = f"{self._source.name}: {library} builds no plan: {first_errors(errors)}"
        if is_out_of_memory(errors):
            remedy = "lower --max-context, --max-batch or --max-patches, or use a larger GPU"
            return CapacityError(message, remedy=remedy)
        return TargetError(message, remedy="run with --no-compile and look at the lowered graph")


def stream_writer(trt: Any, file: BinaryIO) -> Any:
    """Return what takes a plan piece by piece, so that it is never in memory as a whole beside the network."""

    class Writer(trt.IStreamWriter):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.error: OSError | None = None

        def write(self, data: bytes) -> int:
            try:
                return file.write(data)
            except OSError as error:
                self.error = self.error or error
                return 0

    return Writer()
