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

from runtime.cuda import CudaDevice
from runtime.errors import CapacityError, EngineError
from runtime.manifest import Manifest
from runtime.profiles import Profile, Shape
from runtime.tensorrt_log import first_errors, is_out_of_memory, make_logger

_REBUILD = "build the engine again: qwen3vl-export ... --target {target}"
# With hardware compatibility a plan runs on Ampere, its first, and on all later GPUs.
_FIRST_COMPATIBLE = "8.0"


class Library:
    """The library that an engine was built with, checked against its manifest.

    Args:
        manifest: Its capabilities name the module, its version and the GPUs that the plans run on.
        device: The GPU.

    Raises:
        EngineError: The library is missing or of another version, or the plans do not run on this GPU.
    """

    def __init__(self, manifest: Manifest, device: CudaDevice) -> None:
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
        if capabilities.get("hardware_compatible"):
            runs_here = float(device.compute_capability) >= float(_FIRST_COMPATIBLE)
            built_for = f"{_FIRST_COMPATIBLE} and later"
        else:
            runs_here = device.compute_capability in capabilities["compute_capabilities"]
            built_for = ", ".join(capabilities["compute_capabilities"])
        if not runs_here:
            raise EngineError(
                f"this engine runs on GPUs of compute capability {built_for}; "
                f"{device.name} has {device.compute_capability}",
                remedy=self._other_gpu(device.compute_capability),
            )
        self._log = make_logger(self.trt)
        self._runtime = self.trt.Runtime(self._log)
        self._capabilities = capabilities

    def open_plan(self, path: Path, num_bytes: int, tensors: Mapping[str, str], profiles: Sequence[Profile]) -> Plan:
        """Open a plan file.

        Args:
            path: The file.
            num_bytes: Size of the plan, by the manifest.
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
        return Plan(self, engine, path, profiles)

    def failure(self, message: str) -> EngineError | CapacityError:
        """Return the error of a call that gave no reason but in the log; the log is empty afterwards."""
        errors = self._log.take()
        said = first_errors(errors)
        if is_out_of_memory(errors):
            return CapacityError(
                f"{message}: the GPU is out of memory ({said})",
                remedy="end other programs that use the GPU, or build for less: --max-context, --max-batch, "
                "--max-patches, or a target of fewer bits",
            )
        return EngineError(f"{message} ({said})", remedy=self._remedy)

    def _other_gpu(self, compute_capability: str) -> str:
        """Return how to get an engine for the GPU of this machine."""
        # TensorRT-RTX alone builds for GPUs that are elsewhere, and lists them.
        offered = getattr(self.trt, "ComputeCapability", None)
        if offered is None:
            return f"{self._remedy}, on this machine"
        if hasattr(offered, "SM" + compute_capability.replace(".", "")):
            return f"{self._remedy} --compute-capability {compute_capability}"
        return (
            f"{self.trt.__name__} {self.trt.__version__} builds for no such GPU: export for another target, on this "
            "machine; `qwen3vl targets` lists what it builds and runs"
        )

    def _refit(self, engine: Any, graph: Path) -> None:
        """Give a plan without weights those of its lowered graph."""
        refitter = self.trt.Refitter(engine, self._log)
        parser = self.trt.OnnxParserRefitter(refitter, self._log)
        if not (parser.refit_from_file(str(graph)) and refitter.refit_cuda_engine()):
            raise self.failure(f"{graph}: the plan beside it does not take its weights")


class Plan:
    """An opened plan, with an execution context for each profile and batch, made when it is first used.

    A CUDA graph holds only while the context that it was recorded from keeps its profile and its shapes. With one
    context for all, a prefill or a step of another batch between two steps would change them. Several contexts may have
    one profile.
    """

    def __init__(self, library: Library, engine: Any, path: Path, profiles: Sequence[Profile]) -> None:
        self._library = library
        self._engine = engine
        self._path = path
        self.profiles = profiles
        self._workspace: tuple[int, int] | None = None
        self._contexts: dict[tuple[int, int], Any] = {}
        self._shapes: dict[tuple[int, int], Mapping[str, Shape]] = {}

    def is_in_place(self, output: str, source: str) -> bool:
        """Return whether an output is written into the memory of an input."""
        return bool(self._engine.get_aliased_input_tensor(output) == source)

    @property
    def workspace_bytes(self) -> int:
        """Bytes that a run takes for activations, whatever its profile."""
        return int(self._engine.device_memory_size_v2)

    def use_workspace(self, address: int, num_bytes: int) -> None:
        """Keep the activations of all contexts there, and not in memory of each; before there is any context."""
        self._workspace = address, num_bytes

    @property
    def streamable_bytes(self) -> int:
        """Bytes of the weights that may stay in host memory."""
        return int(self._engine.streamable_weights_size)

    def context_bytes(self, max_batch: int) -> int:
        """Return the device memory of all contexts that there can be, without a workspace.

        It depends on how weights are streamed.

        Args:
            max_batch: Most sequences of a decode step, each number of which has a context of its own.
        """
        return sum(
            int(self._engine.get_device_memory_size_for_profile_v2(profile.index))
            * (max_batch if profile.is_decode else 1)
            for profile in self.profiles
        )

    def keep_weights(self, num_bytes: int) -> None:
        """Let so many bytes of weights stay in device memory and stream the others, before there is any context.

        Raises:
            CapacityError: They do not fit.
            EngineError: The library refuses.
        """
        self._engine.weight_streaming_budget_v2 = num_bytes
        if self._engine.weight_streaming_budget_v2 != num_bytes:  # a refusal is silent in Python
            raise self._library.failure(f"{self._path}: its weights are not streamed with {num_bytes} bytes")

    def has_run(self, profile: Profile, shapes: Mapping[str, Shape]) -> bool:
        """Return whether the last run in this context had these shapes, so that the next does no lazy set-up."""
        return self._shapes.get(_key(profile, shapes)) == shapes

    def can_be_captured(self, profile: Profile, shapes: Mapping[str, Shape], stream: int) -> bool:
        """Return whether a run may be captured into a CUDA graph now; TensorRT-RTX alone ever says no."""
        is_capturable = getattr(self._contexts[_key(profile, shapes)], "is_stream_capturable", None)
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
        key = _key(profile, shapes)
        if key not in self._contexts:
            self._contexts[key] = self._new_context(profile, stream)
        context = self._contexts[key]
        if self._shapes.get(key) != shapes:
            self._shapes.pop(key, None)
            for name, shape in shapes.items():
                if not context.set_input_shape(name, shape):
                    raise self._library.failure(f"{self._path}: {name} does not take the shape {shape}")
        for name, address in addresses.items():
            if not context.set_tensor_address(name, address):
                raise self._library.failure(f"{self._path}: {name} does not take its address")
        if not context.execute_async_v3(stream):
            raise self._library.failure(f"{self._path}: the run in profile {profile.name} failed")
        self._shapes[key] = dict(shapes)

    def close(self) -> None:
        """Destroy contexts and engine; nothing enqueued may use them any more."""
        self._contexts.clear()
        self._engine = None

    def _new_context(self, profile: Profile, stream: int) -> Any:
        trt = self._library.trt
        config = self._engine.create_runtime_config()
        strategies = trt.ExecutionContextAllocationStrategy
        config.set_execution_context_allocation_strategy(
            strategies.USER_MANAGED if self._workspace else strategies.ON_PROFILE_CHANGE
        )
        if profile.is_decode and hasattr(config, "dynamic_shapes_kernel_specialization_strategy"):
            # TensorRT-RTX compiles kernels for a shape in the background while it runs others, and a CUDA graph
            # would keep those for ever. A decode step has as many shapes as batch sizes: wait for their kernels.
            config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        context = self._engine.create_execution_context(config)
        if context is None or not context.set_optimization_profile_async(profile.index, stream):
            raise self._library.failure(f"{self._path}: no execution context for profile {profile.name}")
        if self._workspace:
            address, num_bytes = self._workspace
            context.set_device_memory(address, num_bytes)
        return context


def share_memory(plans: Sequence[Plan], device: CudaDevice, reserved_bytes: int, max_batch: int) -> None:
    """Give what device memory is left over to the weights of plans that stream them, before they have contexts.

    Args:
        plans: The first gets what it can use, the next what that leaves.
        device: The GPU.
        reserved_bytes: For all that will be allocated but weights and contexts.
        max_batch: Most sequences of a decode step.

    Raises:
        EngineError: The library refuses.
    """
    for plan in plans:
        plan.keep_weights(0)  # the least there is: now the free memory has no weights in it that may leave
    free, _ = device.memory_info()
    contexts = sum(plan.context_bytes(max_batch) for plan in plans)
    budgets = weight_budgets(free - reserved_bytes - contexts, [plan.streamable_bytes for plan in plans])
    for plan, budget in zip(plans, budgets, strict=True):
        plan.keep_weights(budget)


def weight_budgets(free_bytes: int, streamable_bytes: Sequence[int]) -> list[int]:
    """Return how many bytes of each plan's weights fit, the first's first; none if `free_bytes` is negative."""
    budgets = []
    for num_bytes in streamable_bytes:
        budgets.append(max(0, min(free_bytes, num_bytes)))
        free_bytes -= budgets[-1]
    return budgets


def _key(profile: Profile, shapes: Mapping[str, Shape]) -> tuple[int, int]:
    """Return which context a run takes; images and chunks run one by one, as a batch of 1."""
    return profile.index, shapes["input_ids"][0] if "input_ids" in shapes else 1


def _can_open(found: str, built_with: str, *, is_compatible: bool) -> bool:
    if not is_compatible:
        return found == built_with
    found_numbers, built_numbers = (tuple(map(int, version.split(".")[:3])) for version in (found, built_with))
    return found_numbers[0] == built_numbers[0] and found_numbers >= built_numbers
