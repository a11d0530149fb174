"""What a target is: a frozen record of capabilities that the pipeline asks, and the functions that build it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from engines.build_options import BuildOptions

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir
    from numpy.typing import NDArray

    from runtime.manifest import FileRecord
    from runtime.model_config import ModelConfig


@dataclass(frozen=True)
class Availability:
    """Whether this machine can build and run a target; `reason` says why not, and what to do."""

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


@dataclass(frozen=True)
class Target:
    """One compilation target.

    Attributes:
        name: `<file>-<precision>` with dashes, such as `ort-cpu-fp32`.
        precision: Names the tolerances of `verify` in configs/tolerances.toml.
        description: One line for `qwen3vl targets`.
        session: Module of `runtime.sessions` that opens its engines.
        cache_dtype: numpy name of the KV cache's dtype.
        updates_cache_in_place: Past and present may share one buffer.
        batched_chunks: A call with several new tokens and a past may hold several sequences.
        native_ops: Bodies that replace the standard ones of custom ops, by op name, given the model's shape.
        passes: Makes the passes that follow once the bodies are in place, in order.
        libraries: Distributions whose versions go into the manifest.
        prefill_passes: Makes the passes of a second lowering of the decoder for many tokens at once, on another form of
            the weights; None if one graph does both.
        prefill_min_tokens: Fewest new tokens of a call that is faster in that second graph.
        cache_pass: Makes the pass that stores the KV cache in 8 or 4 bits by scales [L, 2, K, H], keys before values;
            None if no kernel of the target reads such a cache.
        top_k: Candidates of the next token that the decoder gives beside the logits; 0 for none.
        prefill_workspace: Bytes that a call of so many tokens takes beside activations; None for none.
        device: `cpu` or `gpu`: whose memory the engine takes.
        check_model: Raises, before any work, for a model of a shape that no kernel of the target takes.
        check_options: Raises, before any work, for options that the compiler does not take.
        compile: Makes an engine of the lowered graphs, with a cache of fixed capacity; None if they are the engine.
        availability: Finds out what this machine can do.
    """

    name: str
    precision: str
    description: str
    session: str
    cache_dtype: str
    updates_cache_in_place: bool
    batched_chunks: bool
    native_ops: Mapping[str, Callable[[ModelConfig], str]]
    passes: Callable[[], Sequence[ir.passes.InPlacePass]]
    libraries: tuple[str, ...]
    availability: Callable[[], Availability]
    prefill_passes: Callable[[], Sequence[ir.passes.InPlacePass]] | None = None
    prefill_min_tokens: int = 0
    cache_pass: Callable[[int, NDArray[np.float32]], ir.passes.InPlacePass] | None = None
    top_k: int = 0
    compile: Compiler | None = None
    check_model: Callable[[ModelConfig], None] | None = None
    check_options: Callable[[BuildOptions], None] | None = None
    prefill_workspace: Callable[[ModelConfig, int], int] | None = None
    device: str = "cpu"

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
            **({"device": self.device} if self.device != "cpu" else {}),
            **({"prefill_min_tokens": self.prefill_min_tokens} if self.prefill_passes is not None else {}),
            **({"top_k": min(self.top_k, config.text.vocab_size)} if self.top_k else {}),
            **(fixed if self.compile is not None else {}),
        }
