"""The part of TensorRT's Python API that the session uses, run by ONNX Runtime's CPU on a `HostDevice`.

A plan is a small file that names the lowered graph and the profiles. Rules that TensorRT enforces are enforced; what it
leaves undefined raises.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from helpers.host_cuda import HostCudaError, HostDevice, Work, device_of_stream

__version__ = "11.2.0.33"
_MAGIC, _END = b"HOSTPLAN", b"ENDOFPLAN"
_ALIGNMENT = 256
# What an engine says of its memory; nothing is allocated for it.
STREAMABLE_BYTES, CONTEXT_BYTES, SCRATCH_BYTES = 50_000_000, 1_000_000, 300_000


class DataType(enum.Enum):
    FLOAT = 0
    HALF = 1
    INT64 = 8

    @property
    def numpy(self) -> type:
        return {"FLOAT": np.float32, "HALF": np.float16, "INT64": np.int64}[self.name]


_TYPES = {"tensor(float)": DataType.FLOAT, "tensor(float16)": DataType.HALF, "tensor(int64)": DataType.INT64}


class ExecutionContextAllocationStrategy(enum.Enum):
    STATIC = 0
    ON_PROFILE_CHANGE = 1
    USER_MANAGED = 2


class DynamicShapesKernelSpecializationStrategy(enum.Enum):
    LAZY = 0
    EAGER = 1


class ILogger:
    class Severity(enum.Enum):
        INTERNAL_ERROR = 0
        ERROR = 1
        WARNING = 2

    def __init__(self) -> None:
        self.is_made = True


def write_plan(path: Path, graph: Path, profiles: Sequence[Mapping[str, Any]], *, in_place: bool = True) -> None:
    contents = {"graph": str(graph), "profiles": [{k: p[k] for k in ("min", "max")} for p in profiles]}
    path.write_bytes(_MAGIC + json.dumps(contents | {"in_place": in_place}).encode() + _END)


class Runtime:
    def __init__(self, logger: Any) -> None:
        assert logger.is_made, "ILogger.__init__ must be called"
        self._log = partial(logger.log, ILogger.Severity.ERROR)
        self.engine_host_code_allowed = False

    def deserialize_cuda_engine(self, contents: Any) -> ICudaEngine | None:
        plan = bytes(contents)
        if not (plan.startswith(_MAGIC) and plan.endswith(_END)):
            self._log("Serialization assertion header.magicTag == kEXPECTED_MAGIC_TAG failed.")
            return None
        return ICudaEngine(json.loads(plan[len(_MAGIC) : -len(_END)]), self._log)


class ICudaEngine:
    def __init__(self, plan: Mapping[str, Any], log: Any) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 2
        options.log_severity_level = 3
        self.graph = ort.InferenceSession(plan["graph"], options, providers=["CPUExecutionProvider"])
        self.profiles = plan["profiles"]
        self.inputs = {value.name: _TYPES[value.type] for value in self.graph.get_inputs()}
        self.outputs = {value.name: _TYPES[value.type] for value in self.graph.get_outputs()}
        self.has_contexts = self.streams = False
        self.refitted_from: str | None = None
        self._budget = STREAMABLE_BYTES
        self.log = log
        self._in_place = plan["in_place"]

    @property
    def num_io_tensors(self) -> int:
        return len(self.inputs) + len(self.outputs)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self.profiles)

    def get_tensor_name(self, index: int) -> str:
        return [*self.inputs, *self.outputs][index]

    def get_tensor_dtype(self, name: str) -> DataType:
        return (self.inputs | self.outputs)[name]

    def get_aliased_input_tensor(self, name: str) -> str | None:
        is_cache = name.startswith("present_key_values.") and self._in_place
        return name.replace("present_", "past_") if is_cache else None

    @property
    def streamable_weights_size(self) -> int:
        return STREAMABLE_BYTES

    @property
    def weight_streaming_budget_v2(self) -> int:
        return self._budget

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, budget: int) -> None:
        if budget < 0 or self.has_contexts:
            self.log("The weight streaming budget cannot be modified while there are active IExecutionContexts.")
        else:
            self._budget, self.streams = budget, True

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        """Return something that differs from profile to profile, and is more while weights are streamed."""
        return CONTEXT_BYTES * (profile_index + 1) + (SCRATCH_BYTES if self._budget < STREAMABLE_BYTES else 0)

    @property
    def device_memory_size_v2(self) -> int:
        return max(map(self.get_device_memory_size_for_profile_v2, range(len(self.profiles))))

    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig()

    def create_execution_context(self, config: IRuntimeConfig) -> IExecutionContext | None:
        # TensorRT-RTX insists on it for plans with REQUIRE_USER_ALLOCATION, which excludes weight streaming.
        if config.strategy.name != ("ON_PROFILE_CHANGE" if self.streams else "USER_MANAGED"):
            self.log(f"a context of strategy {config.strategy.name}")
            return None
        self.has_contexts = True
        return IExecutionContext(self, config)


class Refitter:
    """Takes the weights of the graph that the engine was made of, and no other's."""

    def __init__(self, engine: ICudaEngine, logger: Any) -> None:
        self.engine = engine
        self.given: str | None = None

    def refit_cuda_engine(self) -> bool:
        self.engine.refitted_from = self.given
        return True


class OnnxParserRefitter:
    def __init__(self, refitter: Refitter, logger: Any) -> None:
        self._refitter = refitter

    def refit_from_file(self, model: str) -> bool:
        if not Path(model).is_file():
            self._refitter.engine.log(f"Failed to open {model}")
            return False
        self._refitter.given = model
        return True


class IRuntimeConfig:
    def __init__(self) -> None:
        self.strategy = ExecutionContextAllocationStrategy.STATIC
        self.dynamic_shapes_kernel_specialization_strategy = DynamicShapesKernelSpecializationStrategy.LAZY

    def set_execution_context_allocation_strategy(self, strategy: ExecutionContextAllocationStrategy) -> None:
        self.strategy = strategy


class IExecutionContext:
    def __init__(self, engine: ICudaEngine, config: IRuntimeConfig) -> None:
        self._engine = engine
        self._config = config
        self._profile: int | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._set_up: dict[str, tuple[int, ...]] | None = None
        self._workspace: int | None = None

    def set_device_memory(self, memory: int, size: int) -> None:
        if memory % _ALIGNMENT or size < self._engine.device_memory_size_v2:
            raise HostCudaError(f"a workspace of {size} bytes at {memory:#x}")
        self._workspace = memory

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        if device_of_stream(stream).is_recording:
            raise HostCudaError("a profile is switched while a graph is recorded")
        self._profile, self._shapes, self._addresses = index, {}, {}
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self._profile is not None, "no profile is chosen"
        profile = self._engine.profiles[self._profile]
        low, high = profile["min"][name], profile["max"][name]
        if len(shape) != len(low) or not all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True)):
            return self._refuse(f"{name}: {shape} is outside of profile {self._profile}: {low} to {high}")
        self._shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        if name not in self._engine.inputs and name not in self._engine.outputs:
            return self._refuse(f"there is no tensor {name}")
        if address % _ALIGNMENT:
            return self._refuse(f"{name}: the address is not aligned to {_ALIGNMENT} bytes")
        self._addresses[name] = address
        return True

    def is_stream_capturable(self, stream: int) -> bool:
        device_of_stream(stream)
        return self._config.dynamic_shapes_kernel_specialization_strategy.name == "EAGER"

    def execute_async_v3(self, stream: int) -> bool:
        device = device_of_stream(stream)
        names = {*self._engine.inputs, *self._engine.outputs}
        missing = sorted(set(self._engine.inputs) - set(self._shapes)) or sorted(names - set(self._addresses))
        if missing:
            return self._refuse(f"shape or address of {missing[0]} is not set")
        for present in self._engine.outputs:
            past = self._engine.get_aliased_input_tensor(present)
            if past is not None and self._addresses[past] != self._addresses[present]:
                return self._refuse(f"{present} must have the address of {past}")
        if device.is_recording and self._set_up != self._shapes:
            raise HostCudaError("the first run of a shape is recorded: TensorRT allocates in it")
        self._set_up = dict(self._shapes)
        shapes, addresses = dict(self._shapes), dict(self._addresses)
        uses = [device.allocation_at(address) for address in addresses.values()]
        if self._config.strategy is ExecutionContextAllocationStrategy.USER_MANAGED:
            if self._workspace is None:
                return self._refuse("no device memory was given")
            device.view(self._workspace, (self._engine.device_memory_size_v2,), np.uint8)  # it is there
            uses.append(device.allocation_at(self._workspace))
        name = f"run {self._profile} {'x'.join(map(str, shapes.get('input_ids', shapes.get('pixel_values', ()))))}"
        state = self._profile, shapes
        device.enqueue(
            stream,
            Work(
                name,
                partial(self._run, device, shapes, addresses),
                uses,
                holds=lambda: state == (self._profile, self._shapes),
            ),
        )
        return True

    def _run(self, device: HostDevice, shapes: Mapping[str, tuple[int, ...]], addresses: Mapping[str, int]) -> None:
        feed = {
            name: device.view(addresses[name], shapes[name], dtype.numpy) for name, dtype in self._engine.inputs.items()
        }
        for name in ("input_ids", "visual_rows", "logits_positions", "past_lengths", "pos_indices"):
            if name in feed and (feed[name].min() < -1 or feed[name].max() > 1 << 20):
                raise HostCudaError(f"{name} was never written: {feed[name].ravel()[:4]}")
        results = self._engine.graph.run(list(self._engine.outputs), feed)
        for name, result in zip(self._engine.outputs, results, strict=True):
            device.view(addresses[name], result.shape, result.dtype)[:] = result

    def _refuse(self, message: str) -> bool:
        self._engine.log(message)
        return False
