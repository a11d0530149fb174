"""One plan of the memory that an engine takes, part by part, before anything is opened.

What a CPU engine takes of ONNX Runtime's arena follows from the buffers of its operators (`runtime.workspaces`) by the
arena's rules (`runtime.arena`). On a GPU, weights and KV cache are exact; its workspaces are those of float32 on the
CPU, an upper bound that was not measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import configs
from runtime.arena import Arena
from runtime.generation import PREFILL_CHUNK
from runtime.machine import default_threads, l2_cache_bytes
from runtime.manifest import Manifest
from runtime.memory import (
    CACHE,
    EMBEDS,
    LIBRARIES,
    LOGITS,
    OF_OTHERS,
    PREFILL,
    STAGING,
    STAGING_ROW_BYTES,
    VISION,
    WEIGHTS,
    cache_bytes,
    logits_bytes,
    sink_bytes,
)
from runtime.model_config import ModelConfig
from runtime.session import DECODE
from runtime.vision_inputs import PIXELS, VISION_PATCHES
from runtime.workspaces.decoder import PrefillCall, decode_stages
from runtime.workspaces.kernels import FLOAT_BYTES, Kernels
from runtime.workspaces.vision import VisionCall

PARTS = (WEIGHTS, CACHE, STAGING, PREFILL, VISION, LOGITS, EMBEDS, LIBRARIES)
"""Parts of every plan, in the order in which they are shown."""
_MOST_CALLS = 1024
DECODER_GRAPH, PREFILL_GRAPH, VISION_GRAPH = "decoder", "prefill", "vision"
_OF_8_BITS = {DECODER_GRAPH: ("int8",), PREFILL_GRAPH: ("int8", "int4p8")}
_GRAPHS = (DECODER_GRAPH, PREFILL_GRAPH, VISION_GRAPH)


@dataclass(frozen=True)
class Work:
    """What an engine is to hold and to run at once.

    Attributes:
        context: Tokens of a sequence, prompt and answer together; of an engine with a fixed capacity, no more than it.
        sequences: How many run.
        kept: How many more slots the KV cache has.
        images: Patches of each image, or of each temporal patch of a video, of one prompt.
        prompts_with_images: How many of the prompts have such images; None for all.
        chunk: Most new tokens of a call.
        embeds_bytes: Most bytes of embeddings that are kept for images that come again.
        logits_of: Tokens of a prompt whose logits are all asked for.
        is_text_only: No prompt ever has images, so that weights of the vision tower that are mapped are never read.
        sink_tokens: Sinks of a sliding window; 0 without one.
    """

    context: int
    sequences: int = 1
    kept: int = 0
    images: tuple[int, ...] = ()
    prompts_with_images: int | None = None
    chunk: int = PREFILL_CHUNK
    embeds_bytes: int = 0
    logits_of: int = 0
    is_text_only: bool = False
    sink_tokens: int = 0


@dataclass(frozen=True)
class MemoryPlan:
    """The bytes of each part, at the peak.

    Attributes:
        parts: By the names of `PARTS`.
        mapped_bytes: How many of them are pages of files: they count in the resident memory, and the system may drop
            and read them again.
    """

    parts: Mapping[str, int]
    mapped_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """All parts: the resident memory of a process on a CPU, else memory of the GPU."""
        return sum(self.parts.values())

    @property
    def anonymous_bytes(self) -> int:
        """What cannot be dropped."""
        return self.total_bytes - self.mapped_bytes


@dataclass(frozen=True)
class Facts:
    """What is known of an engine before it is opened, or built.

    Attributes:
        model: Its shape.
        capabilities: Those of its manifest, or of its target.
        weight_bytes: Bytes of the weights of each graph.
        workspace_bytes: What a call of the decoder takes on a GPU beside activations.
    """

    model: ModelConfig
    capabilities: Mapping[str, Any]
    weight_bytes: Mapping[str, int]
    workspace_bytes: int = 0

    @classmethod
    def of(cls, manifest: Manifest) -> Facts:
        """Return those of an engine folder: a weight file has the name of its graph, or begins with it.

        Of engines that work together (`runtime.route`) the names have a folder before that: the parts that are run. A
        decoder that runs prompts alone counts as their graph.
        """
        graphs: dict[str, int] = {}
        for name, record in manifest.files.items():
            if record.is_weights:
                parts, _, file = name.rpartition("/")
                graph = file.partition(".")[0]
                if graph == DECODER_GRAPH and PREFILL_GRAPH in parts.split("+") and DECODE not in parts.split("+"):
                    graph = PREFILL_GRAPH
                graphs[graph] = graphs.get(graph, 0) + record.num_bytes
        return cls(manifest.model, manifest.capabilities, graphs)

    @property
    def is_on_gpu(self) -> bool:
        """Whether it takes the memory of a GPU."""
        return bool(self.capabilities.get("device", "cpu") == "gpu")

    def capabilities_of(self, part: str) -> Mapping[str, Any]:
        """Return the capabilities that the memory of a part depends on, which another engine may run."""
        others: Mapping[str, Mapping[str, Any]] = self.capabilities.get(OF_OTHERS, {})
        return others.get(part, self.capabilities)

    def is_beside_cache(self, part: str) -> bool:
        """Whether a part runs on the device of the KV cache, whose memory is planned."""
        return bool(self.capabilities_of(part).get("device", "cpu") == self.capabilities.get("device", "cpu"))

    @property
    def max_batch(self) -> int | None:
        """Sequences that it was built for; None for any number."""
        found = self.capabilities.get("max_batch")
        return None if found is None else int(found)

    @property
    def chunk(self) -> int:
        """Most new tokens of a call: those that it was built for, or the usual ones."""
        return int(self.capabilities.get("prefill_chunk", PREFILL_CHUNK))


class Planner:
    """Makes plans of one engine; what a call of the vision tower or of the decoder takes is computed once for a size.

    Args:
        facts: The engine.
        threads: Its threads; by default as many as it takes by itself.

    Attributes:
        facts: As given.
        kernels: What each part computes with.
    """

    def __init__(self, facts: Facts, threads: int | None = None) -> None:
        self.facts = facts
        threads, l2_bytes = threads or default_threads(), l2_cache_bytes()
        self.kernels = {part: Kernels.of(facts.capabilities_of(part), threads, l2_bytes) for part in _GRAPHS}
        self._numbers = configs.load("memory")
        # A server sees images of any number of sizes.
        self._call = lru_cache(_MOST_CALLS)(self._simulated)

    @classmethod
    def of(cls, manifest: Manifest, threads: int | None = None) -> Planner:
        """Return that of an engine folder."""
        return cls(Facts.of(manifest), threads)

    def plan(self, work: Work) -> MemoryPlan:
        """Return what the work takes at its peak."""
        facts, config = self.facts, self.facts.model
        capacity = self.capacity(work.context)
        slot_bytes = cache_bytes(config, facts.capabilities, capacity) + sink_bytes(config, work.sink_tokens)
        resident, mapped = self._weights(work)
        prefill, vision = self.workspaces(work)
        libraries, mapped_libraries = self._libraries()
        parts = {
            WEIGHTS: resident,
            CACHE: (work.sequences + work.kept) * slot_bytes,
            STAGING: capacity * int(facts.capabilities.get(STAGING_ROW_BYTES, 0)),
            PREFILL: prefill,
            VISION: vision,
            LOGITS: logits_bytes(config, work.logits_of),
            EMBEDS: work.embeds_bytes,
            LIBRARIES: libraries,
        }
        return MemoryPlan(parts, mapped + mapped_libraries)

    def capacity(self, context: int) -> int:
        """Return the rows of a slot: those asked for, or those that the engine was built with."""
        return int(self.facts.capabilities.get("capacity", context))

    def workspaces(self, work: Work) -> tuple[int, int]:
        """Return what prompts and steps take beside the vision tower, and what the tower takes: both at once.

        On a CPU, calls that follow each other share an arena. With several sequences, images of one are encoded while
        others decode, so that they share nothing.
        """
        images = tuple(sorted(work.images, reverse=True))
        prompts = work.sequences if work.prompts_with_images is None else work.prompts_with_images
        tokens = min(work.context, self.capacity(work.context))
        sees = self.facts.is_beside_cache(VISION_GRAPH)
        shares = sees and work.sequences == 1 and not self.facts.is_on_gpu
        sizes = tokens, min(work.chunk, tokens), work.sequences
        prefill, vision = self._call(images if shares else (), 1, *sizes)
        if images and sees and not shares:
            vision = self._call(images, prompts, 0, 0, 0)[1]
        if images:
            vision += self._pixel_bytes(images, prompts)
        return prefill + self.facts.workspace_bytes, vision

    def _simulated(
        self, images: tuple[int, ...], prompts: int, tokens: int, chunk: int, sequences: int
    ) -> tuple[int, int]:
        """Return what prompts take beyond images, and what images take, of the arena and beside it."""
        config, kernels = self.facts.model, self.kernels[VISION_GRAPH]
        arena, beside = Arena(), 0
        for patches in dict.fromkeys(images):
            call = VisionCall(config, _in_a_call(patches, images.count(patches), prompts), patches, kernels)
            arena.run(call.stages(), shares=not kernels.is_own, keeps=("levels",))
            beside = max(beside, call.heap_bytes())
        vision = arena.num_bytes + beside
        if tokens:
            kernels, heap = self.kernels[PREFILL_GRAPH], 0
            if self.facts.is_beside_cache(PREFILL_GRAPH):
                for size, past in _chunks(tokens, chunk):
                    arena.run(PrefillCall(config, size, past, kernels).stages(), shares=not kernels.is_own)
                heap = PrefillCall(config, chunk, 0, kernels).heap_bytes()
            arena.run(decode_stages(config, sequences))
            return arena.num_bytes + beside + heap - vision, vision
        return 0, vision

    def _pixel_bytes(self, images: tuple[int, ...], prompts: int) -> int:
        """Return what images take on their way: pictures and pixels of all prompts, and the embeddings of several."""
        config, vision = self.facts.model, self.facts.model.vision
        element = 1 if self.facts.capabilities.get(PIXELS) else FLOAT_BYTES
        picture = vision.in_channels * vision.patch_size**2
        rows = sum(images) // vision.patches_per_token * config.num_visual_levels * config.text.hidden_size
        # The embeddings of one image stay where the tower left them; of several there are copies, and the whole.
        copies = 2 * prompts if len(images) > 1 else prompts - 1
        calls = {patches: _in_a_call(patches, images.count(patches), prompts) for patches in images}
        joined = max((together for patches, together in calls.items() if together > patches), default=0)
        pixels = element * vision.patch_elements * (sum(images) * prompts + joined)
        return picture * sum(images) * prompts + pixels + FLOAT_BYTES * rows * copies

    def _weights(self, work: Work) -> tuple[int, int]:
        """Return what the weights take, and how much of it is mapped from their files."""
        sizes = self.facts.weight_bytes
        if self.facts.is_on_gpu:
            return sum(sizes.values()), 0
        found = [self._weights_of(graph, size) for graph, size in sizes.items() if graph != VISION_GRAPH]
        if VISION_GRAPH in sizes:
            is_own, vision = self.kernels[VISION_GRAPH].is_own, self.facts.model.vision
            size = 0 if work.is_text_only and is_own else sizes[VISION_GRAPH]
            places = FLOAT_BYTES * vision.num_position_embeddings * vision.hidden_size
            found.append((size, size if is_own else places))
        return sum(size for size, _ in found), sum(mapped for _, mapped in found)

    def _weights_of(self, graph: str, size: int) -> tuple[int, int]:
        """Return what the weights of a decoder take, and how much of it is mapped."""
        config, kernels = self.facts.model, self.kernels[graph]
        experts = int(size * _share_of_experts(config))  # which ONNX Runtime packs, whoever multiplies the rest
        if kernels.is_own:
            return size, size - experts
        if not kernels.is_quantised:  # packed for products; where the head is the table, that is read as well
            table = FLOAT_BYTES * config.text.vocab_size * config.text.hidden_size
            tied = table if config.text.tie_word_embeddings else 0
            return size + tied, tied + experts
        packing = self._numbers["packing"]
        code_bytes = size * packing["block"] // 2 // (packing["block"] // 2 + packing["scale_bytes"])
        if self.facts.capabilities_of(graph).get("precision") in _OF_8_BITS[graph]:
            code_bytes = size * packing["block"] // (packing["block"] + packing["scale_bytes"])
        scales = size - code_bytes
        packed = size + scales * packing["sum_bytes"] // packing["scale_bytes"]
        return packed + scales, scales

    def _libraries(self) -> tuple[int, int]:
        """Return what libraries take, and how much of it is mapped from files."""
        numbers, text = self._numbers["libraries"], self.facts.model.text
        if self.facts.is_on_gpu:
            return int(self._numbers["gpu"]["library_bytes"]), 0
        kept = 0
        if any(each.is_quantised and not each.is_own for each in self.kernels.values()):
            # While it opens, scales and sums of the largest weight are computed in memory that stays in the heap.
            kept = 2 * FLOAT_BYTES * text.vocab_size * text.hidden_size // int(self._numbers["packing"]["block"])
        anonymous, mapped = int(numbers["anonymous_bytes"]) + kept, int(numbers["mapped_bytes"])
        return anonymous + mapped, mapped


def _in_a_call(patches: int, images: int, prompts: int) -> int:
    """Return the most patches of a call of the vision tower: of segments of one size that are there together.

    Of several prompts, the first is at work when the others come.
    """
    most = images if prompts == 1 else max(images, images * prompts - 1)
    return max(patches, min(most * patches, VISION_PATCHES))


def _chunks(tokens: int, chunk: int) -> Iterable[tuple[int, int]]:
    """Return the calls of a prompt that tell, as new tokens and past: the first, and the last that is as long."""
    return [(chunk, 0), (chunk, tokens - chunk)] if tokens > chunk else [(chunk, 0)]


def _share_of_experts(config: ModelConfig) -> float:
    """Return which part of the decoder's parameters are experts."""
    text = config.text
    attention = 2 * text.hidden_size * (text.num_heads + text.num_kv_heads) * text.head_dim
    rest, mixed = text.vocab_size * text.hidden_size * (1 if text.tie_word_embeddings else 2), 0
    for layer in range(text.num_layers):
        experts = text.experts_of(layer)
        rest += attention
        if experts is None:
            rest += 3 * text.hidden_size * text.intermediate_size
        else:
            mixed += 3 * text.hidden_size * experts.intermediate_size * experts.num_experts
    return mixed / (mixed + rest)
