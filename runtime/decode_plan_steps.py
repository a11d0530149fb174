"""Decode steps of own kernels: recorded as CUDA graphs, and compared with ONNX Runtime's before they are relied on.

A step of a batch size that the plan does not have is filled up to the next one that it has.

What is compared is what runs later: the recorded step, of each batch and cache. Attention takes other ways for a long
past than for a short one, and for sequences of unlike lengths than for equal ones, so a step is compared again when it
is longer, or less even, than those that were. `runtime.decode_plan_rehearsal` makes the hardest step on purpose.
"""

from __future__ import annotations

import logging
import weakref
from bisect import bisect_right
from collections.abc import Callable
from contextlib import suppress

from runtime.contract import DecoderInputs, IntArray
from runtime.cuda import CudaDevice
from runtime.decode_plan import INVARIANT, STEP_INPUTS, STEP_OUTPUTS
from runtime.decode_plan_kernels import PlanKernels
from runtime.decode_plan_proof import StepResult, StepWindow, wrong_candidates
from runtime.decode_step import SLOTS, StepBuffers
from runtime.device_buffers import Staging
from runtime.device_cache import DeviceKVCache
from runtime.errors import CapacityError, EngineError, Qwen3VLError

# Python shows warnings on stderr if the program sets up no logging of its own.
_LOGGER = logging.getLogger(__name__)
# A fault of a kernel is there at every step. But rounding may differ by more than a bound where a token's hidden state
# nearly cancels: with random weights that was so in 2 of 12 steps of 32 sequences on an H200, and ONNX Runtime's own
# results for 1 and 32 sequences were then 5 % apart. So other tokens are asked before the plan is given up.
_MOST_DOUBTS = 3
LONG_PAST = 2560
"""Cached rows from which on each split of attention has more than a block of them: 32 splits, blocks of 64, and the
share of a split is a multiple of 16 (engines/kernels/attention.py)."""
# A past of one of these lengths is compared even if shorter ones were. Without a past, attention is hardly asked.
_LENGTHS = (1, 16, 128, 1024, LONG_PAST)


class _Compared:
    """How hard the steps of one batch and cache were that were compared: places in `_LENGTHS`, 0 for no past."""

    def __init__(self) -> None:
        self._even = self._uneven = -1

    def covers(self, past_B: IntArray) -> bool:
        """Return whether as hard a step as of these lengths was compared."""
        if self._uneven == len(_LENGTHS):  # at each step of a rehearsed plan, so nothing is looked at
            return True
        hardest = self._uneven if _is_uneven(past_B) else max(self._even, self._uneven)
        return _hardness(past_B) <= hardest

    def add(self, past_B: IntArray) -> None:
        """Note that a step of these lengths was right."""
        if _is_uneven(past_B):
            self._uneven = max(self._uneven, _hardness(past_B))
        else:
            self._even = max(self._even, _hardness(past_B))


def _is_uneven(past_B: IntArray) -> bool:
    return bool((past_B != past_B[0]).any())


def _hardness(past_B: IntArray) -> int:
    return bisect_right(_LENGTHS, int(past_B.max()))


class PlanSteps:
    """The decode steps of a session whose engine has a plan for this GPU.

    Args:
        device: The GPU.
        staging: Copies; everything runs on its stream.
        kernels: The plan's kernels.
        batches: Batch sizes that they can run, rising.
        form: `fast` or `invariant`.
        has_experts: The decoder is a mixture of experts.
        records: Record steps as CUDA graphs.

    Attributes:
        batches: As given.
        problem: Why the plan runs no more; None while it does.
        recorded: Whether steps run as a CUDA graph; none before there was an opportunity.
    """

    def __init__(
        self,
        device: CudaDevice,
        staging: Staging,
        kernels: PlanKernels,
        batches: tuple[int, ...],
        form: str,
        *,
        has_experts: bool,
        records: bool,
    ) -> None:
        self.problem: str | None = None
        self.recorded: bool | None = None if records else False
        self._device, self._staging, self._kernels = device, staging, kernels
        self.batches, self._form, self._has_experts = batches, form, has_experts
        self._compared: weakref.WeakKeyDictionary[DeviceKVCache, dict[int, _Compared]] = weakref.WeakKeyDictionary()
        self._doubts: dict[int, int] = {}

    def padded(self, num_sequences: int) -> int | None:
        """Return the batch that so many sequences run in; None if the plan has none that is large enough."""
        return next((batch for batch in self.batches if batch >= num_sequences), None)

    def has_batch(self, num_sequences: int) -> bool:
        """Return whether steps of so many sequences run: not if there are too many, nor after the plan's end."""
        return self.problem is None and self.padded(num_sequences) is not None

    def is_proven(self, cache: DeviceKVCache, past_B: IntArray) -> bool:
        """Return whether a step of sequences of these lengths runs without a comparison."""
        batch = self.padded(len(past_B))
        compared = self._compared.get(cache, {}).get(batch or 0)
        return compared is not None and compared.covers(past_B)

    def takes(self, inputs: DecoderInputs) -> bool:
        """Return whether a call is a step that the plan runs: of text, one token a sequence, its logits asked for.

        Raises:
            CapacityError: More sequences step together than the batch-invariant kernels can.
            EngineError: These are switched off.
        """
        (num_sequences, num_new), num_asked = inputs.input_ids.shape, inputs.logits_positions.shape[1]
        is_text = num_new == 1 == num_asked and not (inputs.visual_rows >= 0).any()
        self._check_kept()
        if not is_text:
            return False
        has_batch = self.has_batch(num_sequences)
        if not has_batch and self._form == INVARIANT:
            raise CapacityError(
                f"batch_invariant: at most {self.batches[-1]} sequences can step together, asked for {num_sequences}",
                remedy=f"open the engine with max_sequences={self.batches[-1]} or less, or without batch_invariant",
            )
        return has_batch

    def run(
        self,
        cache: DeviceKVCache,
        io: StepBuffers,
        inputs: DecoderInputs,
        slot: int,
        reference: Callable[[], None],
    ) -> None:
        """Enqueue a step of the sequences from a slot on; what it gives lies in `io` once that was waited for.

        Args:
            cache: Their cache.
            io: What steps read and write, for a batch of `padded` at least.
            inputs: What `takes` accepts.
            slot: Slot of the first sequence.
            reference: Runs the same step in ONNX Runtime, into the same memory, and returns when it is done.

        Raises:
            EngineError: CUDA failed.
            CapacityError: The GPU is out of memory.
        """
        batch = self.padded(len(inputs.input_ids))
        assert batch is not None, "a batch beyond the plan"
        if self.is_proven(cache, inputs.past_lengths):
            io.write_padded(inputs, slot, batch)
            self._enqueue(cache, io, batch)
        else:
            self._prove(cache, io, inputs, slot, batch, reference)

    def _prove(
        self,
        cache: DeviceKVCache,
        io: StepBuffers,
        inputs: DecoderInputs,
        slot: int,
        batch: int,
        reference: Callable[[], None],
    ) -> None:
        """Run a step by ONNX Runtime and by the plan; if the results differ, the former stands and the plan is off."""
        has_failed, compared = False, self._compared.setdefault(cache, {})
        reference()
        window = StepWindow(self._device, self._staging, cache, slot, inputs.past_lengths)
        expected = StepResult(io.logits(len(inputs.input_ids))[:, 0], window.read())
        try:
            window.blank(expected.rows)
            io.enqueue_blank()
            io.write_padded(inputs, slot, batch)
            self._enqueue(cache, io, batch)
            found = StepResult(io.logits(batch)[:, 0], window.read())
            difference = window.difference(expected, found, has_experts=self._has_experts)
            problem = difference or self._wrong_candidates(io, batch, found)
        except EngineError as error:
            problem, has_failed = error.message, True
        except BaseException:  # Ctrl-C too; what is blank must not stay behind a sequence
            with suppress(Qwen3VLError):
                window.write(expected.rows)
            raise
        if problem is None:
            compared.setdefault(batch, _Compared()).add(inputs.past_lengths)
            self._doubts.pop(batch, None)
            return
        window.write(expected.rows)
        self._doubts[batch] = self._doubts.get(batch, 0) + 1
        # What keeps its bits in every batch may not be answered by others, not even once.
        if has_failed or self._form == INVARIANT or self._doubts[batch] == _MOST_DOUBTS:
            self._switch_off(batch, problem)
        reference()

    def _switch_off(self, batch: int, problem: str) -> None:
        self.problem = f"at its first steps of {batch} sequences it did not do what ONNX Runtime does: {problem}"
        for cache in self._compared:
            cache.free_graphs()
        _LOGGER.warning(
            "warning: the decode plan is switched off: %s. ONNX Runtime decodes, which takes longer; report this with "
            "the GPU and its driver",
            self.problem,
        )
        self._check_kept()

    def _check_kept(self) -> None:
        """Raise if the plan is off and ONNX Runtime cannot do what was asked of it."""
        if self.problem is not None and self._form == INVARIANT:
            raise EngineError(
                f"batch_invariant: the engine's own kernels are switched off, and no others keep it: {self.problem}",
                remedy="open the engine without batch_invariant",
            )

    def _wrong_candidates(self, io: StepBuffers, batch: int, found: StepResult) -> str | None:
        io.enqueue_download()
        self._device.synchronize(self._staging.stream)
        ids, values = io.tops(batch)
        return wrong_candidates(found.logits_BV, ids[:, 0], values[:, 0])

    def _enqueue(self, cache: DeviceKVCache, io: StepBuffers, batch: int) -> None:
        if self.recorded is not False and batch not in cache.graphs:
            self._record(cache, io, batch)
        if batch in cache.graphs:
            self._device.launch(cache.graphs[batch], self._staging.stream)
        else:
            self._enqueue_kernels(cache, io, batch)

    def _record(self, cache: DeviceKVCache, io: StepBuffers, batch: int) -> None:
        try:
            cache.graphs[batch] = self._capture(cache, io, batch)
            self.recorded = True
        except CapacityError as error:
            self.recorded = False
            _LOGGER.warning(
                "warning: the GPU has no memory for the recorded decode step of %d sequences, so its kernels are "
                "launched one by one, which takes longer: %s",
                batch,
                error.message,
            )

    def _capture(self, cache: DeviceKVCache, io: StepBuffers, batch: int) -> int:
        stream = self._staging.stream
        try:
            self._device.begin_capture(stream)
            self._enqueue_kernels(cache, io, batch)
            return self._device.end_capture(stream)
        except BaseException as error:  # Ctrl-C too, which may come anywhere
            # The stream must leave its recording, whatever that says of it.
            with suppress(Qwen3VLError):
                self._device.free_graph(self._device.end_capture(stream))
            if isinstance(error, EngineError):
                raise EngineError(
                    f"{error.message}, while the decode step was recorded as a CUDA graph",
                    remedy="open the engine with cuda_graphs=False (--no-cuda-graphs), and report it",
                ) from error
            raise

    def _enqueue_kernels(self, cache: DeviceKVCache, io: StepBuffers, batch: int) -> None:
        io.enqueue_upload()
        self._kernels.enqueue(batch, self._form, step_addresses(cache, io), cache.capacity)


def step_addresses(cache: DeviceKVCache, io: StepBuffers) -> dict[str, int]:
    """Return the device addresses of what steps read and write, by the names that plans have for them."""
    bound = cache.bindings()
    of_graph = {**io.addresses, SLOTS: io.slots_address}
    addresses = {f"step:{name}": of_graph[name] for name in STEP_INPUTS + STEP_OUTPUTS}
    for i in range(len(cache.past_names) // 2):
        addresses[f"key:{i}"] = bound[cache.past_names[2 * i]]
        addresses[f"value:{i}"] = bound[cache.past_names[2 * i + 1]]
    return addresses
