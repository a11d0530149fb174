"""The own kernels of an engine's decode plan, without ONNX Runtime: `plan_step ENGINE`.

Values: `step` by batch, the recorded step alone after 512 cached tokens, from the copy of its inputs to the largest
logits on the device, by CUDA's events around launches; `invariant_step`, the same of the batch-invariant form;
`kernels` by batch: name, launches, microseconds of one, the largest weight of the first, and the bytes of all weights
that one is given (of experts, more than it reads); `other_bits` by batch: of so many repetitions, `num_repeats`, those
whose logits, largest logits or new rows of the cache had other bits, recorded or not; `not_invariant` by batch:
sequences whose logits in the batch-invariant form had other bits than alone.

Rows of the cache are random numbers, and no two sequences have the same; where bits are compared, no two have the same
number of them. Other bits are a problem.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.gpu.events import StreamTimer, timed
from benchmarks.gpu.fill import to_dtype
from benchmarks.gpu.values import Values, parser
from runtime.cache_rows import CacheRows
from runtime.contract import DecoderInputs, no_visual_embeds
from runtime.cuda import CudaDevice
from runtime.decode_plan import FAST, INVARIANT, DecodePlan, GpuPlan, PlannedLaunch, read_code
from runtime.decode_plan_kernels import PlanKernels
from runtime.decode_plan_steps import step_addresses
from runtime.decode_step import StepBuffers
from runtime.device_buffers import Staging
from runtime.device_cache import DeviceKVCache
from runtime.device_weights import DeviceWeights
from runtime.errors import EngineError
from runtime.manifest import Manifest

_CAPACITY_STEP = 512
_NUM_RANDOM = 1_000_003  # a prime, so that no two rows of a cache are equal
_LESS_ROWS = 13  # of each sequence than of the one before, where bits are compared


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        past: Cached tokens of each sequence.
        rounds, calls: As `benchmarks.gpu.events.timed` takes them.
        repeats: Of a step whose bits are compared.
        kernel_batches: Whose kernels are timed one by one.
    """

    past: int = 512
    rounds: int = 10
    calls: int = 20
    repeats: int = 60
    kernel_batches: tuple[int, ...] = (1, 8, 32)


class PlanStep:
    """Steps of the plan's kernels, of the sequences from slot 0 on; `close` frees everything.

    Args:
        folder: An engine with a decode plan.
        device: The GPU.
        past: Random rows of each slot of the cache, of which there are as many as the largest batch.

    Raises:
        EngineError: The plan does not run on this GPU.
    """

    def __init__(self, folder: Path, device: CudaDevice, past: int) -> None:
        manifest = Manifest.read(folder)
        plan = DecodePlan(folder, manifest)
        problem = plan.misfit(device.compute_capability, device.driver_version, device.max_shared_bytes)
        sm = plan.sm_for(device.compute_capability)
        if problem is not None or sm is None:
            raise EngineError(str(problem), remedy="make a pack for this GPU: python -m benchmarks gpu-pack --sm …")
        self.config, self.batches, self.device = manifest.model, plan.batches, device
        self.plan, self.weights = with_groups(plan.for_sm(sm)), plan.weights
        text, most = self.config.text, max(plan.batches)
        capacity = -(-(past + 1) // _CAPACITY_STEP) * _CAPACITY_STEP
        shape = most, text.num_kv_heads, capacity, text.head_dim
        with ExitStack() as stack:
            self.stream = device.new_stream()
            stack.callback(device.free_stream, self.stream)
            self.staging = Staging(device, self.stream)
            stack.callback(self.staging.close)
            weights = DeviceWeights(folder, plan.weights, device, self.stream)
            stack.callback(weights.close)
            code = read_code(folder, self.plan, manifest)
            self._kernels = PlanKernels(
                device, self.stream, self.plan, code, plan.buffers, weights.addresses, plan.constants
            )
            stack.callback(self._kernels.close)
            dtype = str(manifest.capabilities["cache_dtype"])
            self.cache = DeviceKVCache(device, self.staging, text.num_layers, shape, dtype)
            stack.callback(self.cache.close)
            self.io = StepBuffers(device, self.staging, self.config, most, plan.top_k)
            stack.callback(self.io.close)
            self._fill_cache(dtype)
            self.close = stack.pop_all().close

    def _fill_cache(self, dtype: str) -> None:
        random = np.random.default_rng(0)
        numbers = to_dtype(random.standard_normal(_NUM_RANDOM, np.float32), dtype)
        for index, name in enumerate(self.cache.past_names):
            rows = np.resize(np.roll(numbers, 7919 * index), self.cache.shape_BKTH)
            self.staging.upload(self.cache.bindings()[name], rows)

    def inputs(self, batch: int, pasts: NDArray[np.int64]) -> DecoderInputs:
        """Return a step of the first sequences, each with a token of its own."""
        ids = 1 + np.arange(batch)[:, None] * 7 % (self.config.text.vocab_size - 1)
        return DecoderInputs.text(ids, pasts[:batch], no_visual_embeds(self.config))

    def enqueue(self, batch: int, form: str) -> None:
        """Enqueue the copy of the inputs that were written last, and the launches of a form or of a group."""
        self.io.enqueue_upload()
        self._kernels.enqueue(batch, form, step_addresses(self.cache, self.io), self.cache.capacity)

    @contextmanager
    def recorded(self, batch: int, form: str) -> Iterator[Callable[[], None]]:
        """Give what launches a recorded step."""
        self.device.begin_capture(self.stream)
        self.enqueue(batch, form)
        graph = self.device.end_capture(self.stream)
        try:
            yield lambda: self.device.launch(graph, self.stream)
        finally:
            self.device.synchronize(self.stream)
            self.device.free_graph(graph)

    def bits(self, batch: int, pasts: NDArray[np.int64]) -> list[NDArray[Any]]:
        """Return what a step has left once it is done: logits, largest logits, their ids, new rows of the cache."""
        self.io.enqueue_download()
        self.device.synchronize(self.stream)
        ids, values = self.io.tops(batch)
        rows = [
            CacheRows(self.device, self.staging, self.cache, b, int(past), int(past) + 1).read()
            for b, past in enumerate(pasts[:batch])
        ]
        return [self.io.logits(batch).view(np.uint32), values.view(np.uint32), ids, *rows]


def with_groups(gpu: GpuPlan) -> GpuPlan:
    """Return a plan that also has, as forms of their own, the launches of each kernel in the fast form of each batch.

    A kernel is timed over the layers, so that weights come from memory as they do in a step, and not from a cache.
    """
    steps = dict(gpu.steps)
    for (batch, form), launches in gpu.steps.items():
        if form == FAST:
            for name, group in groups_of(launches).items():
                steps[batch, name] = group
    return dataclasses.replace(gpu, steps=steps)


def groups_of(launches: tuple[PlannedLaunch, ...]) -> dict[str, tuple[PlannedLaunch, ...]]:
    """Return the launches of each kernel with the same grid, by a name."""
    groups: dict[str, tuple[PlannedLaunch, ...]] = {}
    for each in launches:
        name = f"kernel {each.kernel}, {each.grid}"
        groups[name] = (*groups.get(name, ()), each)
    return groups


def measure(step: PlanStep, values: Any, timer: Any, sizes: Sizes) -> None:
    """Time the steps, compare their bits, and put what is found into `values`, the most important first."""
    most = max(step.batches)
    same = np.full(most, sizes.past)
    for name, form in (("step", FAST), ("invariant_step", INVARIANT)):
        taken: dict[str, Any] = {}
        for batch in step.batches:
            step.io.write_padded(step.inputs(batch, same), 0, batch)
            with step.recorded(batch, form) as launch:
                taken[str(batch)] = timed(timer, launch, rounds=sizes.rounds, calls=sizes.calls)
            values[name] = taken
    pasts = np.maximum(1, sizes.past - _LESS_ROWS * np.arange(most))
    values["num_repeats"] = sizes.repeats
    values["other_bits"] = {str(batch): other_bits(step, batch, pasts, sizes.repeats) for batch in step.batches}
    values["not_invariant"] = not_invariant(step, pasts)
    values["problems"] = problems(values)
    values["kernels"] = {
        str(batch): kernel_times(step, batch, same, timer, sizes)
        for batch in sizes.kernel_batches
        if batch in step.batches
    }


def other_bits(step: PlanStep, batch: int, pasts: NDArray[np.int64], repeats: int) -> int:
    """Return how many repetitions of a step, recorded or not, leave other bits than the first, which is not."""
    step.io.write_padded(step.inputs(batch, pasts), 0, batch)
    step.enqueue(batch, FAST)
    first = step.bits(batch, pasts)
    num_others = 0
    with step.recorded(batch, FAST) as launch:
        for index in range(repeats):
            if index % 2:
                step.enqueue(batch, FAST)
            else:
                launch()
            num_others += not _are_equal(first, step.bits(batch, pasts))
    return num_others


def not_invariant(step: PlanStep, pasts: NDArray[np.int64]) -> dict[str, int]:
    """Return by batch how many sequences have other logits there than in a step of their own."""
    alone = []
    for slot in range(len(pasts)):
        step.io.write_padded(step.inputs(len(pasts), pasts).row(slot), slot, 1)
        step.enqueue(1, INVARIANT)
        alone.append(step.io.logits(1)[0, 0].view(np.uint32))
    found = {}
    for batch in step.batches[1:]:
        step.io.write_padded(step.inputs(batch, pasts), 0, batch)
        step.enqueue(batch, INVARIANT)
        logits = step.io.logits(batch)[:, 0].view(np.uint32)
        found[str(batch)] = sum(not np.array_equal(row, alone[b]) for b, row in enumerate(logits))
    return found


def kernel_times(
    step: PlanStep, batch: int, pasts: NDArray[np.int64], timer: Any, sizes: Sizes
) -> list[dict[str, Any]]:
    """Return what each kernel of a step takes, the longest first."""
    step.io.write_padded(step.inputs(batch, pasts), 0, batch)
    step.enqueue(batch, FAST)  # what kernels read that others wrote is there from here on
    rows = []
    for name, group in groups_of(step.plan.steps[batch, FAST]).items():
        with step.recorded(batch, name) as launch:
            taken = timed(timer, launch, rounds=sizes.rounds, calls=sizes.calls)
        us = 1e3 * taken["median_ms"] / len(group)
        num_bytes = {name: step.weights[name].num_bytes for launch in group for name in weights_of(launch)}
        first = weights_of(group[0])
        rows.append(
            {
                "name": step.plan.kernels[group[0].kernel].entry,
                "grid": list(group[0].grid),
                "num_launches": len(group),
                "us": round(us, 3),
                "weight": max(first, key=lambda each: num_bytes[each], default=""),
                "weight_bytes": sum(num_bytes.values()) // len(group),
            }
        )
    return sorted(rows, key=lambda row: -row["us"] * row["num_launches"])


def weights_of(launch: PlannedLaunch) -> list[str]:
    """Return the names of the weights that a launch is given."""
    prefix = "weight:"
    return [str(each).removeprefix(prefix) for each in launch.sources if str(each).startswith(prefix)]


def problems(values: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with the bits of steps."""
    found = [
        f"{count} of {values['num_repeats']} repetitions of a step of {batch} sequences gave other bits"
        for batch, count in values["other_bits"].items()
        if count
    ]
    found += [
        f"the batch-invariant step of {batch} sequences gave {count} of them other logits than alone"
        for batch, count in values["not_invariant"].items()
        if count
    ]
    return found


def _are_equal(first: list[NDArray[Any]], second: list[NDArray[Any]]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def main() -> int:
    """Run the section."""
    args = parser().parse_args()
    sizes = Sizes()
    step = PlanStep(args.folder, CudaDevice("cuda"), sizes.past)
    measure(step, Values(args.values), StreamTimer(step.stream), sizes)
    step.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
