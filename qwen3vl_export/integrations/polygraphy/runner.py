"""A runner of Polygraphy that runs one graph of an engine of any target, through the runtime's own session.

Shapes: B batch, S new tokens, T cache capacity, L logits positions, K kv heads, H head dim.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from polygraphy import util
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from polygraphy.datatype import DataType

from engines.bundle import DECODER, VISION
from qwen3vl_export.integrations.polygraphy.inputs import PIXEL_LEVELS, PIXEL_SCALE
from qwen3vl_export.integrations.polygraphy.loaders import checked_graph
from runtime import generation
from runtime.contract import (
    DECODER_DTYPES,
    DECODER_INPUTS,
    DECODER_OUTPUTS,
    VISION_DTYPES,
    VISION_OUTPUTS,
    DecoderInputs,
    LevelInputs,
    VisionInputs,
    cache_dims,
    decoder_dims,
    on_host,
    past_names,
    present_names,
    vision_dims,
)
from runtime.errors import UsageError
from runtime.vision_inputs import takes_grey_levels

if TYPE_CHECKING:
    from runtime.model import Qwen3VLModel

Arrays = Mapping[str, NDArray[Any]]


class EngineRunner(BaseRunner):
    """Run `vision` or `decoder` of an engine as a graph with the inputs and outputs of a bundle's.

    A prompt goes through the decoder as the runtime sends it: in chunks, by the graph for prompts if there is one, and
    into a cache in the engine's own format. The keys and values that come back are float32, so engines with caches of
    other types can be compared. The cache must be empty before a call: a session keeps its own.
    """

    def __init__(
        self, model: Qwen3VLModel | Callable[[], Qwen3VLModel], graph: str = DECODER, name: str | None = None
    ) -> None:
        """Take an opened engine, or what opens it when the runner is activated: `EngineSession(folder)`.

        Args:
            model: The engine; one that the runner opened it closes, too.
            graph: `vision` or `decoder`.
            name: Of the runner, in reports.

        Raises:
            UsageError: There is no such graph.
        """
        super().__init__(name=name, prefix="qwen3vl-runner")
        self._source = model
        self._graph = checked_graph(graph)

    @util.check_called_by("activate")
    def activate_impl(self) -> None:
        """Open the engine."""
        self.model, self._is_own = util.invoke_if_callable(self._source)

    @util.check_called_by("deactivate")
    def deactivate_impl(self) -> None:
        """Close the engine, if this runner opened it."""
        if self._is_own:
            self.model.close()
        del self.model, self._is_own

    @util.check_called_by("get_input_metadata")
    def get_input_metadata_impl(self) -> TensorMetadata:
        """Return names, types and shapes of a bundle's inputs; of an engine that takes grey levels, those instead."""
        config, metadata = self.model.config, TensorMetadata()
        if self._graph == VISION:
            dtypes, dims = dict(VISION_DTYPES), vision_dims(config)
            if takes_grey_levels(self.model.manifest.capabilities):
                del dtypes["pixel_values"]
                dtypes |= {PIXEL_LEVELS: np.uint8, PIXEL_SCALE: np.float32}
                dims |= {PIXEL_LEVELS: dims["pixel_values"], PIXEL_SCALE: (3, config.vision.patch_elements)}
        else:
            past = past_names(config.text.num_layers)
            dtypes = {**DECODER_DTYPES, **dict.fromkeys(past, np.float32)}
            dims = {**decoder_dims(config), **dict.fromkeys(past, cache_dims(config))}
        for name, dtype in dtypes.items():
            metadata.add(name, dtype=DataType.from_dtype(np.dtype(dtype)), shape=dims[name])
        return metadata

    @util.check_called_by("infer")
    def infer_impl(self, feed_dict: Arrays) -> OrderedDict[str, NDArray[Any]]:
        """Run the graph.

        Raises:
            UsageError: The cache is not empty.
        """
        start = time.perf_counter()
        outputs = self._run_vision(feed_dict) if self._graph == VISION else self._run_decoder(feed_dict)
        self.inference_time = time.perf_counter() - start
        return outputs

    def _run_vision(self, feed_dict: Arrays) -> OrderedDict[str, NDArray[Any]]:
        arrays = dict(feed_dict)
        inputs = (
            LevelInputs(pixel_values=arrays.pop(PIXEL_LEVELS), **arrays)
            if PIXEL_LEVELS in arrays
            else VisionInputs(**arrays)
        )
        embeds = on_host(self.model.session.vision(inputs))
        return OrderedDict(zip(VISION_OUTPUTS, [embeds], strict=True))

    def _run_decoder(self, feed_dict: Arrays) -> OrderedDict[str, NDArray[Any]]:
        inputs = DecoderInputs(**{name: feed_dict[name] for name in DECODER_INPUTS})
        if inputs.past_lengths.any():
            raise UsageError(
                "past_lengths: a runner of an engine begins with an empty cache",
                remedy="give whole prompts, as PromptInputs does; qwen3vl verify compares decode steps",
            )
        layers = range(self.model.config.text.num_layers)
        capacity = feed_dict[past_names(len(layers))[0]].shape[2]
        session, batch = self.model.session, len(inputs.input_ids)
        cache = session.new_cache(capacity, batch)
        if batch == 1:
            chunk = generation.chunk_limit(self.model.manifest.capabilities, all_logits=True)
            logits = generation.prefill(session, cache, inputs, chunk=chunk)[None]
        else:
            logits = session.decode(inputs, cache)
        caches = [each[:, :, :capacity] for i in layers for each in cache.layer(i)]
        arrays = [np.array(each, np.float32, order="C") for each in (logits, *caches)]
        for present_BKTH in arrays[1:]:
            present_BKTH[:, :, inputs.input_ids.shape[1] :] = 0  # behind its own rows a session may write any others
        return OrderedDict(zip([*DECODER_OUTPUTS, *present_names(len(layers))], arrays, strict=True))
