"""Inputs of a real prompt for Polygraphy's comparator.

Random ones are of no use to these graphs: token ids, rows and positions are indices, and lengths must fit the cache.

Shapes: B batch, S tokens, T cache capacity, K kv heads, H head dim.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engines.bundle import DECODER, VISION
from qwen3vl_export.integrations.polygraphy.loaders import EngineSession, checked_graph
from qwen3vl_export.parity.cases import picture
from runtime.contract import cache_dims, past_names
from runtime.errors import UsageError
from runtime.vision_inputs import vision_inputs

if TYPE_CHECKING:
    from runtime.image_processor import ProcessedImage
    from runtime.model import Qwen3VLModel
    from runtime.model_config import ModelConfig

FeedDict = dict[str, NDArray[Any]]
DEFAULT_PROMPT = "Read the digits in order."
PIXEL_LEVELS, PIXEL_SCALE = "pixel_levels", "pixel_scale"
"""What an engine that normalises pixels itself takes in place of `pixel_values`, which a bundle takes."""
_PICTURE = (170, 100)


class PromptInputs:
    """What a graph is given for one prompt: of the vision tower a call for each image, of the decoder the whole prompt.

    The decoder's `visual_embeds` are those of the engine, its cache is empty, and every token gets logits. A data
    loader of Polygraphy: `Comparator.run([...], data_loader=PromptInputs("out/demo"))`.
    """

    def __init__(
        self,
        engine: str | Path,
        graph: str = DECODER,
        *,
        prompt: str = DEFAULT_PROMPT,
        images: Sequence[str | Path] | None = None,
    ) -> None:
        """Take the prompt.

        Args:
            engine: The engine, or lowered graphs, whose tokenizer and image processor are used.
            graph: `vision` or `decoder`.
            prompt: Text after the images.
            images: Files; a drawn picture by default, none if empty.

        Raises:
            UsageError: There is no such graph, or the vision tower would have no image.
        """
        self._engine, self._graph, self._prompt = engine, checked_graph(graph), prompt
        self._images = images
        if graph == VISION and images is not None and not images:
            raise UsageError("the vision tower needs an image", remedy="give images, or leave them out for a drawn one")

    def __iter__(self) -> Iterator[FeedDict]:
        """Yield the inputs of each call."""
        yield from self._calls

    def __len__(self) -> int:
        """Return the number of calls."""
        return len(self._calls)

    @cached_property
    def _calls(self) -> list[FeedDict]:
        with EngineSession(self._engine)() as model, tempfile.TemporaryDirectory() as folder:
            prepared = model.prepare([{"role": "user", "content": [*self._parts(Path(folder)), self._text]}])
            if self._graph == VISION:
                return [_of_image(model, image) for image in prepared.images]
            inputs = prepared.decoder_inputs(model.encode_images(prepared.images), all_logits=True)
            capacity = model.session.new_cache(len(prepared.prompt.input_ids)).capacity  # more where that is fixed
            return [inputs.arrays() | empty_cache(model.config, capacity)]

    @property
    def _text(self) -> dict[str, str]:
        return {"type": "text", "text": self._prompt}

    def _parts(self, folder: Path) -> Iterator[dict[str, str]]:
        images = self._images
        if images is None:
            from PIL import Image

            images = [folder / "picture.png"]
            Image.fromarray(picture(*_PICTURE, seed=0)).save(images[0])
        for image in images:
            yield {"type": "image", "image": str(image)}


def _of_image(model: Qwen3VLModel, image: ProcessedImage) -> FeedDict:
    """Return what the vision tower takes of an image, as the bundle's and as the engine's."""
    arrays = model.preparation.vision_inputs(image).arrays()
    if PIXEL_SCALE in arrays:
        arrays[PIXEL_LEVELS] = arrays["pixel_values"]
        arrays |= vision_inputs(image.pixel_values, image.grid_thw, model.config.vision).arrays()
    return arrays


def empty_cache(config: ModelConfig, capacity: int) -> FeedDict:
    """Return the keys and values of a cache without rows, zeros [1, K, T, H]."""
    sizes = {"B": 1, "T": capacity}
    shape_BKTH = [sizes[dim] if isinstance(dim, str) else dim for dim in cache_dims(config)]
    return {name: np.zeros(shape_BKTH, np.float32) for name in past_names(config.text.num_layers)}
