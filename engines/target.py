"""What a target is: a frozen record of capabilities that the pipeline asks, and the functions that build it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import configs
from engines import hardware
from engines.build_options import BuildOptions
from engines.quantize.formats import WeightFormats
from runtime.installation import how_to_install
from runtime.vision_inputs import GREY_LEVELS, PIXELS

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir
    from numpy.typing import NDArray

    from engines.hardware import Gpu, Hardware
    from engines.quantize.formats import WeightFormat
    from engines.quantize.tensors import QuantizedWeight
    from engines.weights import StackedTensor, StreamedTensor
    from runtime.manifest import FileRecord
    from runtime.model_config import ModelConfig

CPU, GPU = "cpu", "gpu"
# An engine is built of what torch traces, although nothing in `engines` imports it.
_EXPORT, _EXPORT_MODULES = "export", ("onnx_ir", "onnxscript", "torch")


@dataclass(frozen=True)
class Availability:
    """Whether a machine can build and run a target; `reason` says why not, and what to do."""

    can_build: bool
    can_run: bool
    reason: str = ""


@dataclass(frozen=True)
class Compiled:
    """What a compiler made of the lowered graphs.

    Attributes:
        files: What it wrote, by name.
        capabilities: What the session has to know of it.
        keeps_graphs: The lowered graphs belong to the engine, as the source of weights that the plans leave out.
    """

    files: Mapping[str, FileRecord]
    capabilities: Mapping[str, Any]
    keeps_graphs: bool = False


class Compiler(Protocol):
    """Compiles lowered graphs into files beside them."""

    def __call__(
        self, folder: Path, graphs: Mapping[str, ir.Model], config: ModelConfig, options: BuildOptions
    ) -> Compiled:
        """Compile `<name>.onnx` in `folder` for each of `graphs`, which are the same graphs in memory."""


class Storage(Protocol):
    """How a target stores weights of few bits: what its passes write, and what an estimate adds up.

    Each method raises TargetError for a format that no kernel of the target reads.
    """

    def product(self, tensor: StreamedTensor, weight_format: WeightFormat, *, is_table: bool) -> QuantizedWeight:
        """Return the weight [N, K] of a product; `is_table`: its rows are looked up too."""

    def block(self, tensor: StreamedTensor, weight_format: WeightFormat, *, is_table: bool) -> int:
        """Return the block that `product` gives a weight with a blockwise format; calibration rounds by it."""

    def table(self, tensor: StreamedTensor, weight_format: WeightFormat) -> QuantizedWeight | None:
        """Return a table [N, K] to look rows up in; None if the target reads such tables unquantised."""

    def experts(self, weights: Sequence[StackedTensor], formats: Sequence[WeightFormat]) -> Sequence[QuantizedWeight]:
        """Return gate and up [E, 2·I, D], and down [E, D, I], of the experts of a layer."""


@dataclass(frozen=True)
class Target:
    """One compilation target.

    Attributes:
        name: `<file>-<precision>` with dashes, such as `ort-cpu-fp32`.
        precision: Names the tolerances of `verify` in configs/tolerances.toml.
        description: One line for `qwen3vl targets`.
        session: Module of `runtime.sessions` that opens its engines.
        library: Python module of the engine's library, which the session needs, and the compiler if there is one.
        extra: Extra of pyproject.toml that installs it.
        cache_dtype: numpy name of the KV cache's dtype.
        native_ops: Bodies that replace the standard ones of custom ops, by op name, given the model's shape.
        passes: Makes the passes that follow once the bodies are in place, in order, for weights of some formats.
        storage: How weights of few bits are stored; None if it has formats for none.
        formats: Which weights are stored in which format.
        prefill_formats: Those of a second lowering of the decoder, for many tokens at once; None if there is none.
        prefill_min_tokens: Fewest new tokens of a call that is faster in that second graph; it takes all of a prompt.
        float_dtype: numpy name of the dtype of unquantised weights.
        device: `cpu` or `gpu`: whose memory the engine takes.
        compute_capabilities: GPUs that an engine runs on, such as "8.6"; empty for all.
        min_compute_capability: Least one whose GPUs have the precision's types; empty for all.
        builds_on_its_gpu: Only a machine with such a GPU can build.
        rank: Place in the order of `--target auto`, the first is taken; None puts it last, and by name only.
        by_name_only: Why `--target auto` leaves it to be asked for; empty if it does not.
        updates_cache_in_place: Past and present may share one buffer.
        batched_chunks: A call with several new tokens and a past may hold several sequences.
        libraries: Distributions whose versions go into the manifest.
        cache_pass: Makes the pass that stores the KV cache of each layer in 8 or 4 bits by scales [L, 2, K, H], keys
            before values; None if no kernel of the target reads such a cache.
        top_k: Candidates of the next token that the decoder gives beside the logits; 0 for none.
        normalises_pixels: Its vision graph takes grey levels of 8 bits: `engines.passes.normalise_pixels` is a pass.
        prefill_workspace: Bytes that a call of so many tokens takes beside activations; None for none.
        check_model: Raises, before any work, for a model of a shape that no kernel of the target takes.
        check_options: Raises, before any work, for options that the compiler does not take.
        compile: Makes an engine of the lowered graphs, with a cache of fixed capacity; None if they are the engine.
        check_library: Says why the installed library cannot run an engine although the machine could; empty if it can.
        kernels: Which kernels it computes with, where there are several kinds (`engines.kernel_sets`); else empty.
        other_kernels: The same target with other kernels, the best first; they come before these where they can.
        check_kernels: Says why these kernels do not run on the machine at hand; empty if they do.
        kernels_drawback: Says why they are not to be taken there unless they are asked for; empty if they are.
        custom_ops: Domain of operators whose library the session has to load; empty for none.
        supports_half_cache: `cache_pass` makes a cache of float16 too: 16 bits, without scales.
        supports_kv_scores: Its decoder can give the queries that rows of the KV cache are judged by.
        decode_plan: Decode steps may run own kernels, which a build compiles (`engines.decode_plan`).
        calibration_ops: `native_ops` of the graphs that calibration runs, which ONNX Runtime has to know; None for the
            same.
    """

    name: str
    precision: str
    description: str
    session: str
    library: str
    extra: str
    cache_dtype: str
    native_ops: Mapping[str, Callable[[ModelConfig], str]]
    passes: Callable[[WeightFormats], Sequence[ir.passes.InPlacePass]]
    storage: Storage | None = None
    formats: WeightFormats = field(default_factory=WeightFormats)
    prefill_formats: WeightFormats | None = None
    prefill_min_tokens: int = 0
    float_dtype: str = "float32"
    device: str = CPU
    compute_capabilities: tuple[str, ...] = ()
    min_compute_capability: str = ""
    builds_on_its_gpu: bool = False
    rank: int | None = None
    by_name_only: str = ""
    updates_cache_in_place: bool = True
    batched_chunks: bool = False
    libraries: tuple[str, ...] = ("onnx-ir",)
    cache_pass: Callable[[Sequence[int], NDArray[np.float32] | None], ir.passes.InPlacePass] | None = None
    top_k: int = 0
    normalises_pixels: bool = False
    compile: Compiler | None = None
    check_model: Callable[[ModelConfig], None] | None = None
    check_options: Callable[[BuildOptions], None] | None = None
    prefill_workspace: Callable[[ModelConfig, int], int] | None = None
    check_library: Callable[[], str] | None = None
    kernels: str = ""
    other_kernels: tuple[Target, ...] = ()
    check_kernels: Callable[[], str] | None = None
    kernels_drawback: Callable[[], str] | None = None
    custom_ops: str = ""
    supports_half_cache: bool = False
    supports_kv_scores: bool = False
    decode_plan: bool = False
    calibration_ops: Mapping[str, Callable[[ModelConfig], str]] | None = None

    def availability(self, machine: Hardware | None = None) -> Availability:
        """Find out whether a machine, by default this one, can build and run it with what is installed here."""
        gpu = self._gpu_problem((machine or hardware.probe()).gpu)
        lowered = f"for the lowered graphs alone: qwen3vl-export MODEL --target {self.name} --no-compile"
        if gpu and self.builds_on_its_gpu:
            return Availability(False, False, f"{gpu}; {lowered}")
        has_export, has_library = all(map(_is_installed, _EXPORT_MODULES)), _is_installed(self.library)
        extras = [extra for extra, is_here in ((_EXPORT, has_export), (self.extra, has_library)) if not is_here]
        missing = how_to_install(*extras) if extras else ""
        library = self.check_library() if self.check_library is not None and has_library and not gpu else ""
        can_run = has_library and not gpu and not library
        if not has_export or (self.compile is not None and not has_library):
            needs_lowered = self.builds_on_its_gpu and not has_library
            return Availability(False, can_run, f"{missing}; {lowered}" if needs_lowered else missing)
        return Availability(True, can_run, f"builds here; {gpu}" if gpu else library or missing)

    def _gpu_problem(self, gpu: Gpu | None) -> str:
        """Return why the GPU of a machine does not run it, empty if it does."""
        if self.device == CPU:
            return ""
        if self.builds_on_its_gpu:
            least = self.min_compute_capability
            if gpu is None:
                return "an NVIDIA GPU is needed, to build and to run"
            if version(gpu.compute_capability) < version(least):
                return f"a GPU of SM {least} or later is needed, the {gpu.name} has {gpu.compute_capability}"
        elif self.compute_capabilities:
            if gpu is None or gpu.compute_capability not in self.compute_capabilities:
                where = f"SM {', '.join(self.compute_capabilities)}" + (f", not {gpu.name}" if gpu else "")
                return f"to run, it needs an NVIDIA GPU of {where}"
        elif gpu is None:
            return "needs an NVIDIA GPU to run"
        return ""

    def capabilities(self, config: ModelConfig, options: BuildOptions) -> dict[str, Any]:
        """Return what a session may rely on, as plain values for the manifest."""
        fixed = {
            "capacity": options.max_context,
            "max_batch": options.max_batch,
            "prefill_chunk": options.prefill_chunk,
        }
        return {
            "precision": self.precision,
            "cache_dtype": self.cache_dtype,
            "updates_cache_in_place": self.updates_cache_in_place,
            "batched_chunks": self.batched_chunks,
            **({"custom_ops": self.custom_ops} if self.custom_ops else {}),
            **({"device": self.device} if self.device != CPU else {}),
            **({"prefill_min_tokens": self.prefill_min_tokens} if self.prefill_formats is not None else {}),
            **({"top_k": min(self.top_k, config.text.vocab_size)} if self.top_k else {}),
            **({PIXELS: GREY_LEVELS} if self.normalises_pixels else {}),
            **(fixed if self.compile is not None else {}),
        }


def numbers_of(family: str, precision: str) -> dict[str, Any]:
    """Return the fields of a target that a file of configs/targets holds, by name."""
    values = configs.load(f"targets/{family}").get(precision, {})
    return {name: WeightFormats.from_rules(each) if isinstance(each, list) else each for name, each in values.items()}


def version(text: str) -> tuple[int, ...]:
    """Return a compute capability as numbers, so that 10.0 is after 9.0; of an empty one none."""
    return tuple(int(part) for part in text.split(".") if part)


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
