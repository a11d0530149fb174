"""The sections that `verify --bisect` cuts the two graphs into, and what the reference has at each cut.

A cut is a value that all later layers read their input from: the hidden states between two layers, and inside of a
layer those between attention and feed-forward network. What comes after it up to the next cut is a section. Graphs of
all targets have these values, under the names that `qwen3vl_export/assembly.py` gives to what its calls return; only
the ones inside of a layer have no name of their own (`qwen3vl_export/parity/cuts.py` finds them).

Shapes: see qwen3vl_export/modeling.py; k experts of a token.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from qwen3vl_export.modeling import MixtureOfExperts, Qwen3VL
from runtime.contract import DECODER_OUTPUTS, VISION_OUTPUTS, FloatArray, present_names
from runtime.model_config import ModelConfig

EXPERTS = "experts"
ATTENDED = "/attended"
"""Ends the name of a cut inside of a layer."""


@dataclass(frozen=True)
class Section:
    """What a graph computes between two cuts.

    Attributes:
        layer: The layer that it belongs to, as in the checkpoint's keys: `layers.3`, `blocks.0`, `merger`.
        part: Which part of the layer: `attention`, `experts`, or nothing if it is the layer as a whole.
        output: The value that it ends with: the next cut, or an output of the graph.
        index: Number of the layer, or None.
        level: Of `visual_embeds`, the level that is meant.
        input: The cut whose value it adds to; None if it adds to nothing.
    """

    layer: str
    part: str
    output: str
    index: int | None = None
    level: int | None = None
    input: str | None = None

    @property
    def is_cut(self) -> bool:
        """Whether it ends with a cut, and not with an output of the graph."""
        return "/" in self.output

    @property
    def is_of_cache(self) -> bool:
        """Whether it gives rows of the KV cache."""
        return self.output.startswith("present_")

    def joined_to(self, before: Section) -> Section:
        """Return the two as one section."""
        return replace(self, part="", input=before.input)


def vision_sections(config: ModelConfig) -> list[Section]:
    """Return the sections of `vision.onnx` in the order of computation."""
    tower, (embeds,) = "model.visual", VISION_OUTPUTS
    layers = config.vision.deepstack_layers
    last = f"{tower}/hidden_states"
    sections = [Section("patch_embed", "", last)]
    for i in range(config.vision.depth):
        scope = f"{tower}.blocks.{i}"
        sections += _halves(scope, last, i, "feed-forward")
        last = f"{scope}/hidden_states_out"
        if i in layers:
            level = 1 + sorted(layers).index(i)
            sections.append(Section(f"deepstack_merger_list.{layers.index(i)}", "", embeds, level=level))
    return [*sections, Section("merger", "", embeds, level=0)]


def decoder_sections(config: ModelConfig) -> list[Section]:
    """Return the sections of `decoder.onnx` in the order of computation."""
    text, model = config.text, "model.language_model"
    presents = present_names(text.num_layers)
    last = f"{model}.embed_tokens/hidden_states"
    sections = [Section("embed_tokens", "", last)]
    for i in range(text.num_layers):
        scope = f"{model}.layers.{i}"
        for name in presents[2 * i : 2 * i + 2]:
            sections.append(Section(f"layers.{i}", f"{name.rpartition('.')[2]}s", name, i))
        sections += _halves(scope, last, i, "feed-forward" if text.experts_of(i) is None else EXPERTS)
        last = f"{scope}/hidden_states_out"
        if i < len(config.vision.deepstack_layers):
            sections.append(Section(f"layers.{i}", "DeepStack", f"deepstack.{i}/hidden_states_out", i, input=last))
            last = f"deepstack.{i}/hidden_states_out"
    return [*sections, Section("head", "", *DECODER_OUTPUTS)]


def cuts_of(sections: list[Section]) -> list[str]:
    """Return the cuts between sections, in order."""
    return [each.output for each in sections if each.is_cut]


def _halves(scope: str, given: str, index: int, second: str) -> list[Section]:
    layer, middle = ".".join(scope.split(".")[-2:]), scope + ATTENDED
    return [
        Section(layer, "attention", middle, index, input=given),
        Section(layer, second, f"{scope}/hidden_states_out", index, input=middle),
    ]


@dataclass
class Recording:
    """What the reference had in one call.

    Attributes:
        values: The values at the cuts, float32, by their names.
        experts_Tk: Of each layer with experts, which ones each token went through.
        tied_T: Of each layer with experts, for which tokens a right engine may choose others.
    """

    values: dict[str, FloatArray] = field(default_factory=dict)
    experts_Tk: dict[int, NDArray[np.int64]] = field(default_factory=dict)
    tied_T: dict[int, NDArray[np.bool_]] = field(default_factory=dict)


@contextlib.contextmanager
def recorded(model: Qwen3VL) -> Iterator[Recording]:
    """Record the values at all cuts of a call that is made while the context is open."""
    found = Recording()
    handles = []

    def keep(name: str, value: Tensor) -> None:
        found.values[name] = value.detach().float().cpu().numpy().copy()

    def before(module: Any, name: str) -> None:
        handles.append(module.register_forward_pre_hook(lambda _, inputs: keep(name, inputs[0])))

    def after(module: Any, name: str) -> None:
        handles.append(module.register_forward_hook(lambda *call: keep(name, _first(call[-1]))))

    def routed(layer: int) -> Callable[..., None]:
        def look(_: Any, __: Any, output: tuple[Tensor, Tensor]) -> None:
            found.experts_Tk[layer] = output[1].detach().cpu().numpy().copy()
            found.tied_T[layer] = np.zeros(len(output[1]), np.bool_)

        return look

    after_layers = {}
    for i, block in enumerate(model.visual.blocks):
        scope = f"model.visual.blocks.{i}"
        before(block, f"model.visual.blocks.{i - 1}/hidden_states_out" if i else "model.visual/hidden_states")
        before(block.norm2, scope + ATTENDED)
        after(block, f"{scope}/hidden_states_out")
    language, num_levels = model.language_model, len(model.config.vision.deepstack_layers)
    before(language.layers[0], "model.language_model.embed_tokens/hidden_states")
    for i, layer in enumerate(language.layers):
        scope = f"model.language_model.layers.{i}"
        before(layer.post_attention_layernorm, scope + ATTENDED)
        after(layer, f"{scope}/hidden_states_out")
        if i < num_levels:
            after_layers[i] = f"deepstack.{i}/hidden_states_out"
            if i + 1 < len(language.layers):
                before(language.layers[i + 1], after_layers[i])
        if isinstance(layer.mlp, MixtureOfExperts):
            handles.append(layer.mlp.router.register_forward_hook(routed(i)))
    if num_levels == len(language.layers):  # the last level comes after the last layer
        handles.append(language.register_forward_hook(lambda *call: keep(after_layers[num_levels - 1], call[-1][0])))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]
