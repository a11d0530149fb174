"""The buffers of a call of the vision tower.

They follow the order of execution that ONNX Runtime's profile lists with the shapes of all outputs (1.32). Names that
begin with "~" have a meaning in `runtime.arena`, as have digits before a colon: the rank, where it tells shapes apart.

Shapes: P patches, C channels, F of the feed-forward network.
"""

from __future__ import annotations

from collections.abc import Iterator

from runtime.arena import Stage
from runtime.model_config import ModelConfig
from runtime.workspaces.kernels import FLOAT_BYTES, OWN, ROWWISE, Kernels, telling_layers


class VisionCall:
    """A call of the vision tower.

    Args:
        config: Shape of the model.
        num_patches: Of all segments, which have one grid.
        patches: Of one segment.
        kernels: What computes it.
    """

    def __init__(self, config: ModelConfig, num_patches: int, patches: int, kernels: Kernels) -> None:
        vision = config.vision
        self._config, self._vision, self._kernels = config, vision, kernels
        self._num_patches = num_patches
        self._places = FLOAT_BYTES * patches * vision.hidden_size
        self._c = FLOAT_BYTES * num_patches * vision.hidden_size
        self._f = FLOAT_BYTES * self._num_patches * vision.intermediate_size
        self._pixels = FLOAT_BYTES * self._num_patches * vision.patch_elements
        self._level = FLOAT_BYTES * self._num_patches // vision.patches_per_token * config.text.hidden_size
        self._angles = FLOAT_BYTES * patches * vision.head_dim // 2
        self._tiles = kernels.attention_bytes(patches, patches, vision.head_dim)

    def stages(self) -> Iterator[Stage]:
        """Yield the buffers of each operator; the last stage has the output alone, `levels`, and what it is made of."""
        places = self._places
        yield {"~taps": 4 * places}
        yield {"~taps": 4 * places, "~weighted": 4 * places}
        yield {"~weighted": 4 * places, "~places": places}
        yield from self._product({"~places": places}, self._pixels, "x", self._c)
        tapped: dict[str, int] = {}  # what DeepStack reads in the end
        x = "x"
        for layer in telling_layers(self._vision.depth, self._vision.deepstack_layers):
            y = f"y{layer}"
            yield from self._attend({**tapped, x: self._c}, y)
            x = f"x{layer}"
            yield from self._feed_forward({**tapped, y: self._c}, x)
            if layer in self._vision.deepstack_layers:
                tapped[x] = self._c
        yield from self._merge(x, tapped)

    def heap_bytes(self) -> int:
        """Return what our own kernels take beside the arena."""
        vision, rows = self._vision, self._num_patches
        merged = rows // vision.patches_per_token, vision.hidden_size * vision.patches_per_token
        sizes = vision.patch_elements, vision.hidden_size, vision.intermediate_size
        return self._kernels.heap_bytes([merged, *((rows, size) for size in sizes)])

    def _product(self, base: Stage, source: int, out: str, size: int, *, is_biased: bool = True) -> Iterator[Stage]:
        """Yield those of a product of rows that take `source` bytes as floats; another operator may add the bias."""
        if self._kernels.vision == OWN or (self._kernels.vision != ROWWISE and not is_biased):
            yield {**base, out: size}
            return
        raw, codes = f"{out} raw", source // FLOAT_BYTES
        if self._kernels.vision == ROWWISE:  # Div, QuantizeLinear, MatMulIntegerToFloat; then Mul
            yield {**base, "~scaled": source}
            yield {**base, "~scaled": source, "codes": codes}
            yield {**base, "codes": codes, raw: size}
        yield {**base, raw: size}
        yield {**base, raw: size, out: size}

    def _attend(self, base: Stage, out: str) -> Iterator[Stage]:
        c, turning = self._c, {"sin": self._angles, "cos": self._angles}
        yield {**base, "normed": c}
        yield from self._product({**base, "normed": c}, c, "qkv", 3 * c)
        if self._kernels.vision == OWN:  # Slice for each, when it is needed
            base_qkv = {**base, "qkv": 3 * c}
            yield {**base_qkv, "k": c}
            yield {**base_qkv, "k": c, **turning, "q": c}
            yield {**base_qkv, "k": c, **turning, "q": c, "q turned": c}
            yield {**base_qkv, "k": c, **turning, "q turned": c, "k turned": c}
            yield {**base_qkv, "q turned": c, "k turned": c, "v": c}
        else:  # Split
            yield {**base, "qkv": 3 * c, "q": c, "k": c, "v": c}
            yield {**base, "q": c, "k": c, "v": c, **turning, "q turned": c}
            yield {**base, "k": c, "v": c, **turning, "q turned": c, "k turned": c}
        # MultiHeadAttention brings the heads to the front, in copies.
        copies = {"~q heads": c, "~k heads": c, "~v heads": c, "~tiles": self._tiles}
        yield {**base, "q turned": c, "k turned": c, "v": c, "attended": c, **copies}
        yield from self._product({**base, "attended": c}, c, out, c)

    def _feed_forward(self, base: Stage, out: str) -> Iterator[Stage]:
        c, f, kernels = self._c, self._f, self._kernels
        yield {**base, "normed": c}
        yield from self._product({**base, "normed": c}, c, "inner", f, is_biased=False)
        # FastGelu adds the bias, and takes as much again on its way.
        gelu = "~gelu" if kernels.vision == ROWWISE else "gelu"
        yield {**base, "inner": f, gelu: f, **({} if kernels.vision == OWN else {"~tanh": f})}
        yield from self._product({**base, gelu: f}, f, out, c)

    def _merge(self, x: str, tapped: dict[str, int]) -> Iterator[Stage]:
        c, sources, levels = self._c, [x, *reversed([name for name in tapped if name != x])], dict[str, int]()
        for index, source in enumerate(sources):
            base = {**dict.fromkeys(sources[index:], c), **levels}
            yield {**base, "2:normed": c}
            yield from self._product({**base, "2:normed": c}, c, "2:inner", c)
            yield {**base, "2:inner": c, "2:gelu": c}
            yield from self._product({**base, "2:gelu": c}, c, f"2:level of {source}", self._level)
            levels[f"2:level of {source}"] = self._level
        yield {**levels, "levels": len(levels) * self._level}
