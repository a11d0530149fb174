"""Choose a target for a machine: the first by rank that builds, runs and fits here.

Bytes are estimated from the model's shape alone, before anything is traced or read:

- weights: every tensor as the target's passes store it, by its formats, else as a float of its dtype;
- all else: `runtime.memory_plan`, by which an engine that is opened refuses what does not fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import configs
from engines.build_options import BuildOptions
from engines.hardware import Hardware, probe
from engines.kernel_sets import with_kernels
from engines.quantize.formats import FLOAT, WeightFormat, WeightFormats
from engines.registry import all_targets, get
from engines.target import CPU, GPU, Target, version
from engines.weight_shapes import EMBEDDING_KEY, VISION_PREFIX, Shape, weight_shapes
from runtime import session
from runtime.errors import CapacityError, TargetError
from runtime.memory import CACHE, LIBRARIES, PREFILL, VISION, WEIGHTS
from runtime.memory_plan import DECODER_GRAPH, PREFILL_GRAPH, VISION_GRAPH, Facts, Planner, Work

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from engines.quantize.tensors import QuantizedWeight
    from engines.weights import StreamedTensor
    from runtime.model_config import ModelConfig

AUTO = "auto"
_PARTS = (WEIGHTS, CACHE, PREFILL, VISION, LIBRARIES)
_CHOSEN = "chosen"
_FLOAT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_TOO_LARGE, _PREFERRED = "too large", "is preferred"


@dataclass(frozen=True)
class Candidate:
    """A target that was considered.

    Attributes:
        target: Name of the target.
        device: `cpu` or `gpu`.
        parts: Estimated bytes of the device's memory, by part.
        limit_bytes: What the device has; 0 if there is no such device.
        refusal: Why it was not chosen; empty for the chosen one.
    """

    target: str
    device: str
    parts: Mapping[str, int]
    limit_bytes: int
    refusal: str

    @property
    def total_bytes(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())

    @property
    def is_of_this_machine(self) -> bool:
        """Whether the machine builds and runs it, memory and preference aside."""
        return not self.refusal or self.refusal.startswith(_TOO_LARGE) or self.refusal.endswith(_PREFERRED)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, the total among them."""
        return {**asdict(self), "total_bytes": self.total_bytes}


@dataclass(frozen=True)
class Choice:
    """The candidates in order of preference, and the one that was chosen, if any."""

    candidates: tuple[Candidate, ...]
    target: Target | None

    def render(self) -> str:
        """Return a table: bytes of each part in MB (10^6), and why a candidate was refused."""
        head = ("TARGET", "DEVICE", *(f"{part} MB" for part in (*_PARTS, "total", "limit")), "")
        rows = [head]
        for each in self.candidates:
            sizes = [*(each.parts[part] for part in _PARTS), each.total_bytes, each.limit_bytes]
            rows.append((each.target, each.device, *(f"{size / 1e6:,.1f}" for size in sizes), each.refusal or _CHOSEN))
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = []
        for row in rows:
            cells = [row[0].ljust(widths[0]), row[1].ljust(widths[1])]
            cells += [cell.rjust(width) for cell, width in zip(row[2:-1], widths[2:-1], strict=True)]
            lines.append("  ".join([*cells, row[-1]]).rstrip())
        return "\n".join(lines)


def resolve_target(
    name: str,
    config: Callable[[], ModelConfig],
    say: Callable[[str], None],
    *,
    options: BuildOptions | None = None,
    hardware: Hardware | None = None,
) -> Target:
    """Return the target of that name; for `auto`, choose one and say which, or the table if none fits.

    Args:
        name: A target, or `auto`.
        config: Reads the model's shape; called for `auto` alone, so that a wrong name is found before a download.
        say: Takes the text to show.
        options: Context and batch that have to fit; the defaults if not given.
        hardware: What the machine is; probed if not given.

    Raises:
        TargetError: The name is unknown, or no target builds and runs here.
        CapacityError: None of those that do fits.
    """
    if name != AUTO:
        return get(name)
    choice = consider(hardware or probe(), config(), options=options)
    if choice.target is None:
        say(choice.render())
        raise refusal_of(choice)
    say(f"--target {AUTO}: {choice.target.name}; `qwen3vl targets --model MODEL` shows the choice")
    return choice.target


def choose_target(
    hardware: Hardware,
    config: ModelConfig,
    *,
    options: BuildOptions | None = None,
    targets: Sequence[Target] | None = None,
) -> Choice:
    """Return the first target, in order of preference, that this machine builds, runs and has the memory for.

    Raises:
        TargetError: No target builds and runs here.
        CapacityError: Those that do build and run do not fit.
    """
    choice = consider(hardware, config, options=options, targets=targets)
    if choice.target is None:
        raise refusal_of(choice)
    return choice


def refusal_of(choice: Choice) -> TargetError | CapacityError:
    """Return the error for a choice in which nothing was chosen."""
    too_large = [each for each in choice.candidates if each.refusal.startswith(_TOO_LARGE)]
    if not too_large:
        reasons = "; ".join(f"{each.target}: {each.refusal}" for each in choice.candidates)
        return TargetError(
            f"--target {AUTO} finds no target that this machine can build and run: {reasons}",
            remedy="install the libraries of one of them, or name a target that builds here; see `qwen3vl targets`",
        )
    nearest = min(too_large, key=lambda each: each.total_bytes - each.limit_bytes)
    return CapacityError(
        f"no target fits the memory of this machine: {nearest.target}, the nearest, takes "
        f"{nearest.total_bytes / 1e6:,.1f} MB, and the limit is {nearest.limit_bytes / 1e6:,.1f} MB",
        remedy="use a smaller model or a larger machine, or name a target and run it with a lower --max-context; "
        "`qwen3vl targets --model MODEL` says whether a GPU and the processor hold it together",
    )


def consider(
    hardware: Hardware,
    config: ModelConfig,
    *,
    options: BuildOptions | None = None,
    targets: Sequence[Target] | None = None,
) -> Choice:
    """Estimate every target in order of preference and say why each but the first that fits is refused."""
    candidates: list[Candidate] = []
    chosen: Target | None = None
    for target in sorted(
        all_targets() if targets is None else targets,
        key=lambda each: (math.inf if each.rank is None else each.rank, each.name),
    ):
        try:
            parts, unfit = estimate(with_kernels(target, None, config), config, options=options), ""
        except TargetError as error:  # rows of the model have a length that no kernel of the target reads
            unquantised = replace(target, formats=WeightFormats(), prefill_formats=None)
            parts, unfit = estimate(unquantised, config, options=options), error.message
        candidate = Candidate(target.name, target.device, parts, limit_bytes(hardware, target.device), "")
        refusal = _refusal(target, hardware, candidate) or unfit
        if not refusal and chosen is not None:
            refusal = f"{chosen.name} {_PREFERRED}"
        if not refusal:
            chosen = target
        candidates.append(replace(candidate, refusal=refusal))
    return Choice(tuple(candidates), chosen)


def limit_bytes(hardware: Hardware, device: str) -> int:
    """Return the memory that an engine may take on a device; 0 if there is no such device.

    A GPU that does not say how much it has, has the machine's.
    """
    if device == CPU:
        return hardware.memory_bytes
    gpu = hardware.gpu
    return 0 if gpu is None else gpu.free_bytes or hardware.memory_bytes


def estimate(target: Target, config: ModelConfig, *, options: BuildOptions | None = None) -> dict[str, int]:
    """Estimate the bytes of its device's memory that an engine takes while it answers, by part.

    The largest image is in configs/choice.toml. Without options, one prompt at a time: an engine for batches allocates
    no cache for those that do not come.
    """
    options = options or BuildOptions(max_batch=1)
    work = Work(
        context=min(options.max_context, config.text.max_positions),
        sequences=options.max_batch,
        images=(configs.load("choice")["image_patches"],),
        prompts_with_images=1,
        chunk=options.prefill_chunk,
    )
    parts = Planner(facts_of(target, config, options)).plan(work).parts
    return {part: parts[part] for part in _PARTS}


def facts_of(target: Target, config: ModelConfig, options: BuildOptions) -> Facts:
    """Return what a plan of memory needs to know of an engine that was not built.

    Raises:
        TargetError: The target stores no weights of such a shape.
    """
    capacity = min(options.max_context, config.text.max_positions)
    chunk = min(options.prefill_chunk, capacity)
    capabilities = target.capabilities(config, options)
    if "capacity" in capabilities:
        capabilities["capacity"] = capacity
    workspace = target.prefill_workspace(config, chunk) if target.prefill_workspace is not None else 0
    return Facts(config, capabilities, graph_weight_bytes(target, config), workspace)


def weight_bytes(target: Target, config: ModelConfig, parts: Collection[str] = session.PARTS) -> int:
    """Return the bytes of the weights of what runs, in the format in which the target stores them.

    Left out: constants that are not in the checkpoint, and the bytes that align tensors in a file.

    Args:
        target: The target.
        config: Shape of the model.
        parts: What runs, of `runtime.session.PARTS`.

    Raises:
        TargetError: The target stores no weights of such a shape.
    """
    graphs = graph_weight_bytes(target, config)
    prefill = PREFILL_GRAPH if PREFILL_GRAPH in graphs else DECODER_GRAPH
    of_parts = {session.VISION: VISION_GRAPH, session.DECODE: DECODER_GRAPH, session.PREFILL: prefill}
    return sum(graphs[graph] for graph in {of_parts[part] for part in parts})


def graph_weight_bytes(target: Target, config: ModelConfig) -> dict[str, int]:
    """Return those of each graph; see `weight_bytes`."""
    shapes, stored = weight_shapes(config), partial(_stored_bytes, is_tied=config.text.tie_word_embeddings)
    vision = {key: shape for key, shape in shapes.items() if key.startswith(VISION_PREFIX)}
    decoder = {key: shape for key, shape in shapes.items() if key not in vision}
    graphs = {
        VISION_GRAPH: stored(target, target.formats, vision),
        DECODER_GRAPH: stored(target, target.formats, decoder),
    }
    if target.prefill_formats is not None:  # a second decoder, in a file of its own
        graphs[PREFILL_GRAPH] = stored(target, target.prefill_formats, decoder)
    return graphs


def _refusal(target: Target, hardware: Hardware, candidate: Candidate) -> str:
    """Return why a target is not for this machine, empty if it is."""
    if target.by_name_only or target.rank is None:
        return f"only by name: {target.by_name_only or 'configs/targets does not rank it'}"
    gpu, least = hardware.gpu, target.min_compute_capability
    if target.device == GPU:
        if gpu is None:
            return "no GPU on this machine"
        if version(gpu.compute_capability) < version(least):
            return f"needs SM {least}, the {gpu.name} has {gpu.compute_capability}"
    available = target.availability(hardware)
    if not (available.can_build and available.can_run):
        lacks = "cannot be built here" if not available.can_build else "cannot be run here"
        return f"{lacks}: {available.reason}"
    if candidate.total_bytes > candidate.limit_bytes:
        return f"{_TOO_LARGE} by {(candidate.total_bytes - candidate.limit_bytes) / 1e6:,.1f} MB"
    return ""


def _stored_bytes(target: Target, formats: WeightFormats, shapes: Mapping[str, Shape], *, is_tied: bool) -> int:
    """Return the bytes of weights, by checkpoint key, in the order of `weight_shapes`."""
    from engines.weights import StackedTensor

    float_bytes, storage, total = _FLOAT_BYTES[target.float_dtype], target.storage, 0
    experts: list[tuple[str, Shape, WeightFormat]] = []
    expert_bytes: dict[object, int] = {}  # of layers of one kind, since each has thousands of tensors
    stored: list[QuantizedWeight] = []
    for key, shape in shapes.items():
        weight_format = formats.format_of(key)
        if len(shape) == 1:
            total += 4 * shape[0]  # norms compute in float32; biases are too few to tell them apart
            continue
        if weight_format.kind == FLOAT:
            total += float_bytes * math.prod(shape)
            continue
        assert storage is not None, f"{target.name}: formats, but no storage"
        if len(shape) == 3:
            experts.append((key, shape, weight_format))
            if len(experts) == 2:  # gate and up of a layer, then down
                kind = tuple(each[1:] for each in experts)
                if kind not in expert_bytes:
                    weights = [StackedTensor(name, [_weight(name, dims[1:])] * dims[0]) for name, dims, _ in experts]
                    made = storage.experts(weights, [each[2] for each in experts])
                    expert_bytes[kind] = sum(weight.num_bytes(float_bytes) for weight in made)
                total += expert_bytes[kind]
                experts = []
            continue
        weight = _weight(key, shape)
        table = storage.table(weight, weight_format) if key == EMBEDDING_KEY else None
        if key == EMBEDDING_KEY and table is None:
            total += float_bytes * weight.size
        if key != EMBEDDING_KEY or is_tied:
            stored.append(storage.product(weight, weight_format, is_table=key == EMBEDDING_KEY))
        elif table is not None:
            stored.append(table)
    return total + sum(weight.num_bytes(float_bytes) for weight in stored)


def _weight(key: str, shape: Shape) -> StreamedTensor:
    """Return a matrix that is never read; a convolution is a product with a matrix of its elements."""
    from onnx_ir import DataType

    from engines.quantize.tensors import ProducedTensor

    def unread() -> Iterator[NDArray[Any]]:
        raise AssertionError("an estimate reads no weight")

    return ProducedTensor(key, (shape[0], math.prod(shape[1:])), DataType.FLOAT, unread)
