"""Find the first layer of an engine that leaves its tolerance, each layer being given the reference's input.

An error of an early layer moves all later ones, so the errors of a whole run do not say which layer is wrong. Here the
graphs are cut between the layers and inside of them (sections.py), and one run gives each section what the reference
has there: its error is its own. The reference is this package's own definition of the model in float32.

Of a section that adds to the hidden states, the error is that of what it adds: the hidden states may be a hundred times
as large, and would hide it. What they lose when they are rounded to the graph's type is no fault of the section.

Experts are compared one by one, over the tokens that went through each: a fault of one would be lost among all tokens.
A token whose router nearly tied may take another expert in a right engine, and is left out.

Shapes: T tokens or rows, D size of a row, k experts of a token, E experts.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from engines.bundle import DECODER, PREFILL, VISION
from qwen3vl_export.checkpoint import Checkpoint
from qwen3vl_export.eager import EagerCache, EagerSession, load
from qwen3vl_export.parity.bisect_report import BisectReport, Finding
from qwen3vl_export.parity.cases import Case, make_cases
from qwen3vl_export.parity.cuts import cut, given_name
from qwen3vl_export.parity.limits import limits_of
from qwen3vl_export.parity.lowered import CPU_NOTE, is_lowered, open_graph, open_model_of
from qwen3vl_export.parity.own_reference import OWN_NOTE, OwnReference
from qwen3vl_export.parity.sections import (
    EXPERTS,
    Recording,
    Section,
    cuts_of,
    decoder_sections,
    recorded,
    vision_sections,
)
from qwen3vl_export.routing import watched_routers
from runtime.contract import (
    DECODER_OUTPUTS,
    VISION_OUTPUTS,
    DecoderInputs,
    FloatArray,
    VisionInputs,
    no_visual_embeds,
    present_names,
)
from runtime.errors import ParityError
from runtime.manifest import Manifest
from runtime.session import SessionOptions
from runtime.vision_inputs import vision_inputs

if TYPE_CHECKING:
    import onnx
    import onnxruntime as ort

    from qwen3vl_export.modeling import Qwen3VL
    from runtime.model import Qwen3VLModel
    from runtime.preparation import Prepared
    from runtime.session import KVCache

Edit: TypeAlias = "Callable[[onnx.GraphProto], object]"
OpenChanged: TypeAlias = "Callable[[str, Edit], ort.InferenceSession]"
"""Opens the graph of a name after a change."""

PROMPT, STEP = "prompt", "step"
# Text alone, and pictures of several shapes beside each other. Further prompts go through the same layers.
_CASES = ("text", "three images")


def bisect(engine: Path, checkpoint: str, *, on_case: Callable[[str], None] = lambda case: None) -> BisectReport:
    """Compare each layer of an engine, and each part of it, with the checkpoint that it was built from.

    Args:
        engine: The engine folder, or one of lowered graphs.
        checkpoint: What `Checkpoint.open` takes.
        on_case: Told of each prompt.

    Raises:
        CheckpointError: The checkpoint does not open.
        EngineError: The engine does not open.
        ParityError: The two are of different shapes, the engine is for a device, or its graphs cannot be cut.
    """
    source = Checkpoint.open(checkpoint)
    if not is_lowered(engine) and Manifest.read(engine).session != "ort_cpu":
        raise ParityError(
            f"{engine}: the graphs of an engine for a GPU are not run layer by layer",
            remedy="write its lowered graphs (qwen3vl-export --no-compile) and give these: the CPU runs them",
        )
    model = open_model_of(source, engine)
    precision, limits = limits_of(model.manifest)
    reference = load(source)
    comparison = _Bisection(engine, model, reference, limits)
    with tempfile.TemporaryDirectory() as folder:
        for case in (each for each in make_cases(Path(folder)) if each.name in _CASES):
            on_case(case.name)
            comparison.add(case)
    notes = [*([CPU_NOTE] if is_lowered(engine) else []), OWN_NOTE]
    return BisectReport(
        model.manifest.target,
        checkpoint,
        OwnReference(reference).name,
        precision,
        tuple(comparison.findings()),
        tuple(notes),
    )


class _Sums:
    """Squared norms of one section over all prompts, for each group of tokens: one, or one for each expert."""

    def __init__(self, num_groups: int) -> None:
        self._error, self._base, self._rounding = np.zeros((3, num_groups))
        self.num_tokens = np.zeros(num_groups, np.int64)

    def add(
        self, found_TD: NDArray[Any], wanted_TD: FloatArray, before_TD: FloatArray, groups_Tk: NDArray[np.int64]
    ) -> None:
        """Take the rows of one call.

        Args:
            found_TD: The engine's, in the type of its graph.
            wanted_TD: The reference's.
            before_TD: What the section adds to.
            groups_Tk: The groups of each token.
        """
        wanted = wanted_TD.astype(np.float64)
        squares = (
            np.square(found_TD.astype(np.float64) - wanted).sum(-1),
            np.square(wanted - before_TD).sum(-1),
            np.square(float(np.finfo(found_TD.dtype).eps)) * np.square(wanted).sum(-1),
        )
        for sums, square_T in zip((self._error, self._base, self._rounding), squares, strict=True):
            np.add.at(sums, groups_Tk, square_T[:, None])
        np.add.at(self.num_tokens, groups_Tk, 1)

    def errors(self) -> NDArray[np.float64]:
        """Return the error of each group that rounding does not explain, over the norm of what the reference adds."""
        excess = np.sqrt(self._error) - np.sqrt(self._rounding)
        excess = np.where(np.isfinite(excess), np.maximum(excess, 0), np.inf)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(excess == 0, 0, excess / np.sqrt(self._base))


class _CutGraph:
    """One graph of an engine, cut."""

    def __init__(self, name: str, sections: list[Section], open_cut: OpenChanged) -> None:
        self.name = name
        cuts: dict[str, str] = {}
        self._session = open_cut(name, lambda graph: cuts.update(cut(graph, cuts_of(sections))))
        self._cuts = cuts
        self.sections = list(_joined(sections, cuts))

    def run(
        self, inputs: VisionInputs | DecoderInputs, given: Mapping[str, FloatArray], cache: KVCache | None = None
    ) -> dict[str, NDArray[Any]]:
        """Return what the sections make of what is given to each, by cut, and the graph's output; write the cache."""
        own_outputs = VISION_OUTPUTS if cache is None else DECODER_OUTPUTS
        outputs = {**self._cuts, **dict(zip(own_outputs, own_outputs, strict=True))}
        binding = self._session.io_binding()
        for name, array in inputs.arrays().items():
            binding.bind_cpu_input(name, array)
        for name in self._cuts:
            binding.bind_cpu_input(given_name(name), np.ascontiguousarray(given[name]))
        for value in outputs.values():
            binding.bind_output(value, "cpu")
        if cache is not None:
            cache.bind(binding, 0, len(inputs.input_ids))
        self._session.run_with_iobinding(binding)
        values = binding.get_outputs_as_ortvaluevector()  # in the order in which they were bound
        return {name: values[i].numpy() for i, name in enumerate(outputs)}


def _joined(sections: list[Section], cuts: Mapping[str, str]) -> Iterator[Section]:
    """Yield the sections of a graph that has these cuts; where one is missing, those around it are one."""
    begun: Section | None = None
    for each in sections:
        if each.is_cut and each.output not in cuts:
            begun = each
        elif begun is not None and each.input == begun.output:
            yield each.joined_to(begun)
            begun = None
        else:
            yield each


class _Bisection:
    """Runs prompts through the cut graphs and the reference, and adds up the errors."""

    def __init__(self, engine: Path, model: Qwen3VLModel, reference: Qwen3VL, limits: Mapping[str, float]) -> None:
        self._model, self._reference, self._limits = model, reference, limits
        self._session = EagerSession(reference)
        config = model.config
        open_cut = _opener(engine, model.manifest)
        self._vision = _CutGraph(VISION, vision_sections(config), open_cut)
        names = [PREFILL, DECODER] if "prefill_min_tokens" in model.manifest.capabilities else [DECODER]
        self._decoders = [_CutGraph(name, decoder_sections(config), open_cut) for name in names]
        self._sums: dict[tuple[str, str, Section], _Sums] = {}

    def add(self, case: Case) -> None:
        """Run one prompt and one step after it."""
        prepared = self._model.prepare(case.messages)
        levels = [self._add_image(image) for image in prepared.images]
        embeds = np.concatenate(levels, axis=1) if levels else no_visual_embeds(self._model.config)
        self._add_text(prepared, embeds)

    def findings(self) -> Iterator[Finding]:
        """Yield the error of each section in the order of computation: vision, prompt, step."""
        graphs = [graph.name for graph in (self._vision, *self._decoders)]
        ordered = sorted(self._sums.items(), key=lambda each: graphs.index(each[0][0]))
        for (graph, call, section), sums in ordered:
            errors = sums.errors()
            worst = int(errors.argmax())
            yield Finding(
                graph=graph,
                call=call,
                layer=section.layer,
                part=section.part,
                value=float(errors[worst]),
                limit=self._limits["visual_embeds_relative" if graph == VISION else "layer_relative"],
                num_tokens=int(sums.num_tokens[worst]),
                expert=worst if len(errors) > 1 else None,
            )

    def _add_image(self, image: Any) -> FloatArray:
        """Compare the vision tower on one segment; return what the reference makes of it."""
        config = self._model.config.vision
        with recorded(self._reference) as wanted:
            embeds = self._session.vision(vision_inputs(image.pixel_values, image.grid_thw, config))
        wanted.values[VISION_OUTPUTS[0]] = embeds
        found = self._vision.run(self._model.preparation.vision_inputs(image), wanted.values)
        self._compare(self._vision, PROMPT, found, wanted)
        return embeds

    def _add_text(self, prepared: Prepared, embeds: FloatArray) -> None:
        """Compare each decoder on the prompt, and the one for steps on a step after it."""
        num_tokens = len(prepared.prompt.input_ids)
        prompt = prepared.decoder_inputs(embeds, all_logits=True)
        cache, wanted_cache = self._model.session.new_cache(num_tokens + 1), self._session.new_cache(num_tokens + 1)
        wanted = self._run_reference(prompt, wanted_cache)
        for graph in self._decoders:
            self._compare_call(graph, PROMPT, prompt, wanted, cache)
        token = wanted.values[DECODER_OUTPUTS[0]][:, -1:].argmax(-1)
        step = DecoderInputs.text(
            token, np.array([num_tokens]), no_visual_embeds(self._model.config), delta=prepared.positions.delta
        )
        self._compare_call(self._decoders[-1], STEP, step, self._run_reference(step, wanted_cache), cache)

    def _run_reference(self, inputs: DecoderInputs, cache: EagerCache) -> Recording:
        """Run the reference, and return what it has at the cuts, and what it writes into the cache."""
        num_new = inputs.input_ids.shape[1]
        with recorded(self._reference) as found, watched_routers(self._reference, num_new) as watched:
            found.values[DECODER_OUTPUTS[0]] = self._session.decode(inputs, cache)
        found.values |= _new_rows(cache, inputs, self._model.config.text.num_layers)
        for (layer, token), gap in watched.gaps.items():
            if gap <= self._limits["router_gap"]:
                found.tied_T[layer][token] = True
        return found

    def _compare_call(
        self, graph: _CutGraph, call: str, inputs: DecoderInputs, wanted: Recording, cache: KVCache
    ) -> None:
        found = graph.run(inputs, wanted.values, cache)
        found |= _new_rows(cache, inputs, self._model.config.text.num_layers)
        self._compare(graph, call, found, wanted)

    def _compare(self, graph: _CutGraph, call: str, found: Mapping[str, NDArray[Any]], wanted: Recording) -> None:
        for section in graph.sections:
            ours, theirs = (_rows(each[section.output], section) for each in (found, wanted.values))
            before = np.zeros_like(theirs) if section.input is None else _rows(wanted.values[section.input], section)
            num_groups, groups_Tk, is_compared_T = 1, np.zeros((len(theirs), 1), np.int64), np.ones(len(theirs), bool)
            experts = self._model.config.text.experts
            if section.part == EXPERTS and experts is not None and section.index is not None:
                num_groups, groups_Tk = experts.num_experts, wanted.experts_Tk[section.index]
                is_compared_T = ~wanted.tied_T[section.index]
            sums = self._sums.setdefault((graph.name, call, section), _Sums(num_groups))
            sums.add(ours[is_compared_T], theirs[is_compared_T], before[is_compared_T], groups_Tk[is_compared_T])


def _rows(values: NDArray[Any], section: Section) -> NDArray[Any]:
    """Return an array as rows [T, D]: of keys and values [B, K, T, H], a row of all heads."""
    if section.is_of_cache:
        values = np.moveaxis(values[0], 1, 0).reshape(values.shape[2], -1)
    if section.level is not None:
        values = values[section.level]
    return values.reshape(-1, values.shape[-1])


def _new_rows(cache: KVCache, inputs: DecoderInputs, num_layers: int) -> dict[str, NDArray[Any]]:
    """Return the rows of keys and values that a call wrote, by the names of the outputs."""
    start = int(inputs.past_lengths[0])
    rows = slice(start, start + inputs.input_ids.shape[1])
    layers = (each for i in range(num_layers) for each in cache.layer(i))
    return {name: each[:, :, rows] for name, each in zip(present_names(num_layers), layers, strict=True)}


def _opener(engine: Path, manifest: Manifest) -> OpenChanged:
    """Return what opens one graph of an engine, or of lowered graphs, after a change."""
    if is_lowered(engine):
        has_own_kernels = "custom_ops" in manifest.capabilities
        return lambda name, edit: open_graph(engine / f"{name}.onnx", has_own_kernels=has_own_kernels, edit=edit)
    return lambda name, edit: _open_changed(engine, manifest, name, edit)


def _open_changed(engine: Path, manifest: Manifest, name: str, edit: Edit) -> ort.InferenceSession:
    """Open a graph of an engine for the CPU as its session does, after a change."""
    import onnx
    import onnxruntime as ort

    from runtime.sessions.ort_cpu import session_options

    model = onnx.load(engine / f"{name}.onnx", load_external_data=False)
    edit(model.graph)
    options = session_options(engine, manifest, SessionOptions())
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(engine))
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
