"""Plans of TensorRT and TensorRT-RTX, which share one API: checks before a plan is opened, and its execution.

A plan is code for the GPU as well as weights, and nothing about it can be trusted but who wrote it: the checks find
mix-ups, not malice.
"""

from __future__ import annotations

import importlib
import mmap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runtime.cuda import Device
from runtime.errors import CapacityError, EngineError
from runtime.manifest import Manifest
from runtime.profiles import Profile, Shape

_REBUILD = "build the engine again: qwen3vl-export ... --target {target}"


class Library:
    """The library that an engine was built with, checked against its manifest.

    Args:
        manifest: Its capabilities name the module, its version and the GPUs that the plans run on.
        device: The GPU.

    Raises:
        EngineError: The library is missing or of another version, or the plans do not run on this GPU.
    """

    def __init__(self, manifest: Manifest, device: Device) -> None:
        capabilities = manifest.capabilities
        self._remedy = _REBUILD.format(target=manifest.target)
        name, built_with = str(capabilities["library"]), str(capabilities["library_version"])
        try:
            self.trt = importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise EngineError(
                f"this engine needs the Python package {name} {built_with}, which is not installed",
                remedy=f"install {name} {built_with}, or export for this machine's CPU: qwen3vl-export ... "
                "--target ort-cpu-int4",
            ) from error
        found = str(self.trt.__version__)
        self._is_compatible = bool(capabilities.get("version_compatible"))
        if not _can_open(found, built_with, is_compatible=self._is_compatible):
            allowed = f"{built_with} or a later {built_with.split('.')[0]}.x" if self._is_compatible else built_with
            raise EngineError(
                f"this engine was built with {name} {built_with}, and {found} is installed; expected {allowed}",
                remedy=f"install {name} {built_with}, or {self._remedy}",
            )
        built_for = [str(each) for each in capabilities["compute_capabilities"]]
        if device.compute_capability not in built_for:
            raise EngineError(
                f"this engine runs on GPUs of compute capability {', '.join(built_for)}; "
                f"{device.name} has {device.compute_capability}",
                remedy=f"{self._remedy} on this machine, or with --compute-capability {device.compute_capability}",
            )
        self._log = _logger(self.trt)
        self._runtime = self.trt.Runtime(self._log)
        self._capabilities = capabilities

    def open_plan(self, path: Path, num_bytes: int, tensors: Mapping[str, str], profiles: Sequence[Profile]) -> Plan:
        """Open a plan file.

        Args:
            path: The file.
            num_bytes: Its size, by the manifest.
            tensors: Type of every input and output, as TensorRT names it, by the tensor's name.
            profiles: What the manifest says that it was built for.

        Raises:
            EngineError: The file is cut, or not the plan that the manifest describes.
            CapacityError: The GPU has too little memory for the weights.
        """
        found_bytes = path.stat().st_size
        if found_bytes != num_bytes:
            raise EngineError(
                f"{path}: {found_bytes} bytes, expected {num_bytes}",
                remedy=f"the file was cut or exchanged: copy the folder again, or {self._remedy}",
            )
        if self._is_compatible:
            self._runtime.engine_host_code_allowed = True  # such a plan carries the runtime that it needs
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as contents:
            engine = self._runtime.deserialize_cuda_engine(contents)
        if engine is None:
            raise self.failure(f"{path}: {self.trt.__name__} {self.trt.__version__} does not open it")
        found = {
            name: engine.get_tensor_dtype(name).name
            for name in map(engine.get_tensor_name, range(engine.num_io_tensors))
        }
        if found != dict(tensors) or engine.num_optimization_profiles != len(profiles):
            wrong = sorted(set(found.items()) ^ set(tensors.items()))
            raise EngineError(
                f"{path}: not the plan that the manifest describes: {engine.num_optimization_profiles} profiles, "
                f"expected {len(profiles)}; tensors that differ: {', '.join(map(str, wrong[:4])) or 'none'}",
                remedy=f"the file was exchanged: copy the folder again, or {self._remedy}",
            )
        if self._capabilities.get("stripped"):
            self._refit(engine, path.with_suffix(".onnx"))
        if self._capabilities.get("weight_streaming"):
            engine.weight_streaming_budget_v2 = engine.get_weight_streaming_automatic_budget()
        return Plan(self, engine, path, profiles)

    def failure(self, message: str) -> EngineError | CapacityError:
        """Return the error of a call that gave no reason but in the log; the log is empty afterwards."""
        said = "; ".join(self._log.take())
        if "out of memory" in said.lower() or "outofmemory" in said.lower():
            return CapacityError(
                f"{message}: the GPU is out of memory ({said})",
                remedy="end other programs that use the GPU, or build for less: --max-context, --max-batch, "
                "--max-patches, or a target of fewer bits",
            )
        return EngineError(f"{message} ({said or 'it does not say why'})", remedy=self._remedy)

    def _refit(self, engine: Any, graph: Path) -> None:
        """Give a plan without weights those of its lowered graph."""
        refitter = self.trt.Refitter(engine, self._log)
        parser = self.trt.OnnxParserRefitter(refitter, self._log)
        if not (parser.refit_from_file(str(graph)) and refitter.refit_cuda_engine()):
            raise self.failure(f"{graph}: the plan beside it does not take its weights")


class Plan:
    """An opened plan. Each profile has its own execution context, made when it is first used.

    With one context for all, a prefill between two decode steps would switch its profile, and a CUDA graph captured
    before might no longer hold. A context allocates the activations of its profile alone.
    """

    def __init__(self, library: Library, engine: Any, path: Path, profiles: Sequence[Profile]) -> None:
        self._library = library
        self._engine = engine
        self._path = path
        self.profiles = profiles
        self._contexts: dict[int, Any] = {}
        self._shapes: dict[int, Mapping[str, Shape]] = {}

    def is_in_place(self, output: str, source: str) -> bool:
        """Return whether an output is written into the memory of an input."""
        return bool(self._engine.get_aliased_input_tensor(output) == source)

    def has_run(self, profile: Profile, shapes: Mapping[str, Shape]) -> bool:
        """Return whether the last run in this profile had these shapes, so that the next does no lazy set-up."""
        return self._shapes.get(profile.index) == shapes

    def can_be_captured(self, profile: Profile, stream: int) -> bool:
        """Return whether a run may be captured into a CUDA graph now; TensorRT-RTX alone ever says no."""
        is_capturable = getattr(self._contexts[profile.index], "is_stream_capturable", None)
        return is_capturable is None or bool(is_capturable(stream))

    def enqueue(self, profile: Profile, shapes: Mapping[str, Shape], addresses: Mapping[str, int], stream: int) -> None:
        """Enqueue a run.

        Args:
            profile: One that accepts the shapes.
            shapes: Shape of every input.
            addresses: Device address of every input and output, aligned to 256 bytes.
            stream: Where.

        Raises:
            CapacityError: The GPU has too little memory for the activations.
            EngineError: The library refuses; the message has its log.
        """
        context = self._context(profile, stream)
        if self._shapes.get(profile.index) != shapes:
            self._shapes.pop(profile.index, None)
            for name, shape in shapes.items():
                if not context.set_input_shape(name, shape):
                    raise self._library.failure(f"{self._path}: {name} does not take the shape {shape}")
        for name, address in addresses.items():
            if not context.set_tensor_address(name, address):
                raise self._library.failure(f"{self._path}: {name} does not take its address")
        if not context.execute_async_v3(stream):
            raise self._library.failure(f"{self._path}: the run in profile {profile.name} failed")
        self._shapes[profile.index] = dict(shapes)

    def close(self) -> None:
        """Destroy contexts and engine; nothing enqueued may use them any more."""
        self._contexts.clear()
        self._engine = None

    def _context(self, profile: Profile, stream: int) -> Any:
        if profile.index not in self._contexts:
            trt = self._library.trt
            config = self._engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE)
            is_decode = profile.max.get("input_ids", (0, 0))[1] == 1
            if is_decode and hasattr(config, "dynamic_shapes_kernel_specialization_strategy"):
                # TensorRT-RTX compiles kernels for a shape in the background while it runs others, and a CUDA graph
                # would keep those for ever. A decode step has as many shapes as batch sizes: wait for their kernels.
                config.dynamic_shapes_kernel_specialization_strategy = (
                    trt.DynamicShapesKernelSpecializationStrategy.EAGER
                )
            context = self._engine.create_execution_context(config)
            if context is None or not context.set_optimization_profile_async(profile.index, stream):
                raise self._library.failure(f"{self._path}: no execution context for profile {profile.name}")
            self._contexts[profile.index] = context
        return self._contexts[profile.index]


def _can_open(found: str, built_with: str, *, is_compatible: bool) -> bool:
    if not is_compatible:
        return found == built_with
    found_numbers, built_numbers = (tuple(map(int, version.split(".")[:3])) for version in (found, built_with))
    return found_numbers[0] == built_numbers[0] and found_numbers >= built_numbers


def _logger(trt: Any) -> Any:
    """Return a logger that keeps the errors: a call that fails gives no reason itself."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)

        def take(self) -> list[str]:
            errors, self.errors = self.errors, []
            return errors

    return Logger()
