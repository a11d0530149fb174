"""Choose a target for a machine: the first of configs/choice.toml that builds, runs and fits here.

Bytes are estimated from the model's shape alone, before anything is traced or read:

- weights: every tensor in the form that the target's own passes store it in (their weight plan, else float32 or half);
- KV cache, prefill and vision workspace: `runtime.memory`, which also refuses what does not fit at run time. Its
  workspaces are those of float32 on ONNX Runtime's CPU provider; on a GPU they stand in as an upper bound, unmeasured.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import configs
from engines.build_options import BuildOptions
from engines.hardware import Hardware, probe
from engines.quantize.formats import BLOCK_SIZES, BLOCKWISE, FLOAT, ROWWISE, WeightFormat, WeightPlan
from engines.registry import all_targets, get
from engines.target import Target
from engines.weight_shapes import EMBEDDING_KEY, VISION_PREFIX, Shape, weight_shapes
from runtime.errors import CapacityError, TargetError
from runtime.manifest import Manifest
from runtime.memory import CACHE, PREFILL, VISION, WEIGHTS, cache_bytes, prefill_bytes, vision_bytes

if TYPE_CHECKING:
    from runtime.model_config import ModelConfig

AUTO = "auto"
CPU, GPU = "cpu", "gpu"
LIBRARY = "library"
_PARTS = (WEIGHTS, CACHE, PREFILL, VISION, LIBRARY)
_CHOSEN = "chosen"
# Kinds of weight formats that are stored as floats of 8 and 4 bits; of the latter, 16 share a scale of 8 bits.
_FLOAT8, _NVFP4, _NVFP4_BLOCK = "float8", "nvfp4", 16


@dataclass(frozen=True)
class Rule:
    """One rank of configs/choice.toml.

    Attributes:
        targets: Patterns of target names, the preferred first.
        device: `cpu` or `gpu`: whose memory an engine takes.
        min_compute_capability: SM version that the precision needs, such as `8.9`; empty for any.
        by_name_only: Why `--target auto` leaves these to be asked for; empty if it does not.
    """

    targets: tuple[str, ...]
    device: str
    min_compute_capability: str = ""
    by_name_only: str = ""


@dataclass(frozen=True)
class Request:
    """What has to fit, beside the sizes of `BuildOptions`.

    Attributes:
        image_patches: Patches of the largest image.
        gpu_library_bytes: Device memory of CUDA's context and the library's kernels.
        max_memory: Limit in bytes instead of the device's own.
    """

    image_patches: int
    gpu_library_bytes: int
    max_memory: int | None = None


@dataclass(frozen=True)
class Candidate:
    """A target that was considered.

    Attributes:
        target: Its name.
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
    report: Callable[[str], None],
    *,
    options: BuildOptions | None = None,
    hardware: Hardware | None = None,
) -> Target:
    """Return the target of that name; for `auto`, choose one and report it, or the table if none fits.

    Args:
        name: A target, or `auto`.
        config: Reads the model's shape; called for `auto` alone, so that a wrong name is found before a download.
        report: Takes the text to show.
        options: Context and batch that have to fit; the defaults if not given.
        hardware: Of this machine; probed if not given.

    Raises:
        TargetError: The name is unknown, or no target builds and runs here.
        CapacityError: None of those that do fits.
    """
    if name != AUTO:
        return get(name)
    choice = consider(hardware or probe(), config(), options=options)
    if choice.target is None:
        report(choice.render())
        raise refusal_of(choice)
    report(f"--target {AUTO}: {choice.target.name}; `qwen3vl targets --model MODEL` shows the choice")
    return choice.target


def choose_target(
    hardware: Hardware,
    config: ModelConfig,
    *,
    options: BuildOptions | None = None,
    request: Request | None = None,
    targets: Sequence[Target] | None = None,
) -> Choice:
    """Return the first target, in order of preference, that this machine builds, runs and has the memory for.

    Raises:
        TargetError: No target builds and runs here.
        CapacityError: Those that do build and run do not fit.
    """
    choice = consider(hardware, config, options=options, request=request, targets=targets)
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
        remedy="use a smaller model or a larger machine, or name a target and run it with a lower --max-context",
    )


_TOO_LARGE = "too large"


def consider(
    hardware: Hardware,
    config: ModelConfig,
    *,
    options: BuildOptions | None = None,
    request: Request | None = None,
    targets: Sequence[Target] | None = None,
) -> Choice:
    """Estimate every target in order of preference and say why each but the first that fits is refused."""
    request = request or default_request()
    candidates: list[Candidate] = []
    chosen: Target | None = None
    for target, rule in ranked(all_targets() if targets is None else targets):
        limit = limit_bytes(hardware, rule.device) if request.max_memory is None else request.max_memory
        parts = estimate(target, config, options=options, request=request)
        candidate = Candidate(target.name, rule.device, parts, limit, "")
        refusal = _refusal(target, rule, hardware, candidate)
        if not refusal and chosen is not None:
            refusal = f"{chosen.name} is preferred"
        if not refusal:
            chosen = target
        candidates.append(replace(candidate, refusal=refusal))
    return Choice(tuple(candidates), chosen)


def ranked(targets: Sequence[Target]) -> list[tuple[Target, Rule]]:
    """Return the targets in order of preference, each with its rule."""
    found = []
    for target in targets:
        places = (
            (rank, place, rule)
            for rank, rule in enumerate(_rules())
            for place, pattern in enumerate(rule.targets)
            if fnmatch.fnmatchcase(target.name, pattern)
        )
        rank, place, rule = next(places)  # the last pattern takes every name
        found.append(((rank, place, target.name), target, rule))
    return [(target, rule) for _, target, rule in sorted(found, key=lambda entry: entry[0])]


def device_of(target: Target) -> str:
    """Return `cpu` or `gpu`: where a target's engines run."""
    return ranked([target])[0][1].device


def limit_bytes(hardware: Hardware, device: str) -> int:
    """Return the memory that an engine may take on a device; 0 if there is no such device.

    A GPU that does not say how much it has, has the machine's.
    """
    if device == CPU:
        return hardware.memory_bytes
    gpu = hardware.gpu
    return 0 if gpu is None else gpu.free_bytes or hardware.memory_bytes


def estimate(
    target: Target, config: ModelConfig, *, options: BuildOptions | None = None, request: Request | None = None
) -> dict[str, int]:
    """Estimate the bytes of its device's memory that an engine takes while it answers, by part.

    Without options, one prompt at a time: an engine for batches allocates no cache for those that do not come.
    """
    options, request = options or BuildOptions(max_batch=1), request or default_request()
    capacity = min(options.max_context, config.text.max_positions)
    capabilities = target.capabilities(config, options)
    shape = Manifest(target.name, target.session, capabilities, config, versions={}, source={}, files={})
    chunk = min(options.prefill_chunk, capacity)
    workspace = target.prefill_workspace(config, chunk) if target.prefill_workspace is not None else 0
    return {
        WEIGHTS: weight_bytes(target, config),
        CACHE: options.max_batch * cache_bytes(shape, capacity),
        PREFILL: prefill_bytes(config, capacity) + workspace,
        VISION: vision_bytes(config, [request.image_patches]),
        LIBRARY: request.gpu_library_bytes if device_of(target) == GPU else 0,
    }


def weight_bytes(target: Target, config: ModelConfig) -> int:
    """Return the bytes of all weights in the form that the target stores them in.

    Left out: constants that are not in the checkpoint, and the bytes that align tensors in a file.
    """
    shapes = weight_shapes(config)
    forms = _forms(target.passes())
    total = sum(_stored(key, shape, *forms, config) for key, shape in shapes.items())
    if target.prefill_passes is not None:
        # A second decoder, in a file of its own.
        forms = _forms(target.prefill_passes())
        decoder = {key: shape for key, shape in shapes.items() if not key.startswith(VISION_PREFIX)}
        total += sum(_stored(key, shape, *forms, config) for key, shape in decoder.items())
    return total


def default_request() -> Request:
    """Return the request of configs/choice.toml."""
    return Request(**configs.load("choice")["request"])


def _rules() -> list[Rule]:
    rules = []
    for values in configs.load("choice")["rules"]:
        rule = Rule(**{**values, "targets": tuple(values["targets"])})
        assert rule.device in (CPU, GPU), f"configs/choice.toml: device {rule.device!r}"
        rules.append(rule)
    return rules


def _refusal(target: Target, rule: Rule, hardware: Hardware, candidate: Candidate) -> str:
    """Return why a target is not for this machine, empty if it is."""
    if rule.by_name_only:
        return f"only by name: {rule.by_name_only}"
    gpu = hardware.gpu
    if rule.device == GPU:
        if gpu is None:
            return "no GPU on this machine"
        if _version(gpu.compute_capability) < _version(rule.min_compute_capability):
            return f"needs SM {rule.min_compute_capability}, the {gpu.name} has {gpu.compute_capability}"
    available = target.availability()
    if not (available.can_build and available.can_run):
        lacks = "cannot be built here" if not available.can_build else "cannot be run here"
        return f"{lacks}: {available.reason}"
    if candidate.total_bytes > candidate.limit_bytes:
        return f"{_TOO_LARGE} by {(candidate.total_bytes - candidate.limit_bytes) / 1e6:,.1f} MB"
    return ""


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part)


def _forms(passes: Sequence[object]) -> tuple[WeightPlan, int, tuple[int, ...]]:
    """Return the weight plan of a target's passes, the bytes of a weight that stays a float, and blocks of experts."""
    from engines.passes.choose_experts_kernel import ChooseExpertsKernelPass
    from engines.passes.half_precision import HalfPrecisionPass

    plans = [each.plan for each in passes if isinstance(getattr(each, "plan", None), WeightPlan)]  # type: ignore[attr-defined]
    assert len(set(plans)) <= 1, "the passes store weights by different plans"
    is_half = any(isinstance(each, HalfPrecisionPass) for each in passes)
    expert_blocks = next((each.blocks for each in passes if isinstance(each, ChooseExpertsKernelPass)), ())
    return (plans[0] if plans else WeightPlan(())), 2 if is_half else 4, expert_blocks


def _stored(
    key: str, shape: Shape, plan: WeightPlan, float_bytes: int, expert_blocks: tuple[int, ...], config: ModelConfig
) -> int:
    """Return the bytes of one checkpoint tensor in an engine."""
    elements = math.prod(shape)
    if len(shape) == 1:
        return 4 * elements  # norms compute in float32; biases are too few to tell them apart
    form = plan.format_of(key)
    matrix = shape[0], elements // shape[0]
    if form.kind == FLOAT:
        return float_bytes * elements
    if form.kind == ROWWISE:
        return elements + 4 * matrix[0]
    has_lookup = form.kind == BLOCKWISE and not form.symmetric
    if key == EMBEDDING_KEY and not has_lookup:
        # What DequantizeLinear reads has no lookup: the table stays as it is, and a tied head is a quantised copy.
        return float_bytes * elements + (_few_bits(matrix, form, float_bytes) if config.text.tie_word_embeddings else 0)
    if key == EMBEDDING_KEY:
        # A table of rows to look up has no padding.
        form = replace(form, block=max(size for size in BLOCK_SIZES if size <= form.block and matrix[1] % size == 0))
    if config.text.experts is not None and len(shape) == 3 and not expert_blocks:
        # As engines/passes/pack_experts.py: each product has a block of its own.
        form = replace(form, block=max(size for size in BLOCK_SIZES if size <= form.block and shape[2] % size == 0))
        matrix = shape[0] * shape[1], shape[2]
    elif config.text.experts is not None and len(shape) == 3:
        from engines.passes.choose_experts_kernel import experts_block

        matrix = shape[0] * shape[1], shape[2]
        block = experts_block(
            expert_blocks, form.block, [config.text.hidden_size, config.text.experts.intermediate_size]
        )
        # Without such a block the build ends with an error that says so.
        form = replace(form, block=block or form.block)
    return _few_bits(matrix, form, float_bytes)


def _few_bits(matrix: tuple[int, int], form: WeightFormat, float_bytes: int) -> int:
    """Return codes, scales and zero points of a weight [N, K]."""
    rows, columns = matrix
    if form.kind == _FLOAT8:
        return rows * columns + float_bytes * rows
    if form.kind == _NVFP4:
        blocks = -(-columns // _NVFP4_BLOCK)
        return rows * blocks * (_NVFP4_BLOCK // 2 + 1) + float_bytes
    assert form.kind == BLOCKWISE, form.kind
    blocks = -(-columns // form.block)
    codes = rows * blocks * form.block * form.bits // 8
    zero_points = 0 if form.symmetric else rows * -(-blocks * form.bits // 8)
    return codes + float_bytes * rows * blocks + zero_points
