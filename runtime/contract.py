"""The inputs of an engine's two graphs, and the names of their outputs: the one place that lists them.

A field's name is the input's, and the order of the fields is the graph's; see docs/architecture.md.

Shapes: B batch, S new tokens, L logits positions, V visual rows, D DeepStack levels, I segments, P patches, H head dim.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, get_type_hints

import numpy as np
from numpy.typing import NDArray

from runtime.device_arrays import DeviceEmbeds
from runtime.errors import EngineError

if TYPE_CHECKING:
    from runtime.model_config import ModelConfig
    from runtime.positions import PromptPositions

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]
ByteArray = NDArray[np.uint8]
VisualEmbeds: TypeAlias = FloatArray | DeviceEmbeds
"""Visual embeddings [1+D, V, hidden], float32: on the host, or in the memory of the session that made them."""
DType: TypeAlias = type[np.float32] | type[np.int64] | type[np.uint8]
Dims = tuple[int | str, ...]
"""Dimensions of an input; a letter is dynamic."""

VISION_OUTPUTS = ("visual_embeds",)
TOKEN_SCORES = "token_scores"
"""Second output of a vision graph that has it, and the capability of the engine."""
DECODER_OUTPUTS = ("logits",)
WINDOW_QUERIES = "window_queries"
"""Optional output of a decoder built with `--kv-scores`: queries of the last tokens of a call, [B, W, layers, N, H]."""
_MOST_LISTED = 3


@dataclass(frozen=True, eq=False)
class _GraphInputs:
    """Arrays that one call of a graph takes."""

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the arrays by the names of the inputs, in the graph's order, each in one piece of memory."""
        # `vars` and not `fields`: a decode step of the demo takes 0.4 ms, and that took 5 us of it.
        return {name: np.ascontiguousarray(array) for name, array in vars(self).items()}

    def host_arrays(self) -> dict[str, NDArray[Any]]:
        """Return the same without what is in device memory."""
        return {name: np.ascontiguousarray(each) for name, each in vars(self).items() if isinstance(each, np.ndarray)}

    def _check_dtypes(self, dtypes: Mapping[str, DType]) -> None:
        for name, dtype in dtypes.items():
            assert getattr(self, name).dtype == dtype, name


@dataclass(frozen=True, eq=False)
class VisionInputs(_GraphInputs):
    """What the vision tower takes of I segments of one grid.

    Attributes:
        pixel_values: Patches in merge order, [I, P, C·Tp·p·p].
        pos_indices: Which learned positions a patch mixes, [P, 4].
        pos_weights: In what parts, [P, 4].
        rope_cos: Cosines of the rotary embedding, [P, H/2].
        rope_sin: Its sines, [P, H/2].
    """

    pixel_values: FloatArray | ByteArray
    pos_indices: IntArray
    pos_weights: FloatArray
    rope_cos: FloatArray
    rope_sin: FloatArray

    def __post_init__(self) -> None:
        """Check types, and that the shapes agree."""
        self._check_dtypes(self._expected_dtypes())
        assert self.pixel_values.ndim == 3, self.pixel_values.shape
        num_patches = self.pixel_values.shape[1]
        assert self.pos_indices.shape == self.pos_weights.shape == (num_patches, 4), self.pos_indices.shape
        assert self.rope_cos.shape == self.rope_sin.shape == (num_patches, self.rope_cos.shape[1]), self.rope_cos.shape

    def _expected_dtypes(self) -> Mapping[str, DType]:
        return VISION_DTYPES


@dataclass(frozen=True, eq=False)
class LevelInputs(VisionInputs):
    """The same for an engine that normalises pixels itself: `pixel_values` are grey levels, uint8.

    Attributes:
        pixel_scale: What is subtracted from each element of a patch, what that is divided by, and what the quotient is
            multiplied by, [3, C·Tp·p·p].
    """

    pixel_values: ByteArray
    pixel_scale: FloatArray

    def __post_init__(self) -> None:
        """Check types, and that the shapes agree."""
        super().__post_init__()
        assert self.pixel_scale.shape == (3, self.pixel_values.shape[2]), self.pixel_scale.shape

    def _expected_dtypes(self) -> Mapping[str, DType]:
        return LEVEL_DTYPES


@dataclass(frozen=True, eq=False)
class DecoderInputs(_GraphInputs):
    """What the decoder takes of B sequences, the KV cache aside.

    Attributes:
        input_ids: Token ids, [B, S]; sequences are padded on the right.
        position_ids: mRoPE positions (time, height, width), [3, B, S].
        visual_rows: Row of `visual_embeds` that a token takes, -1 for text; [B, S].
        visual_embeds: What the vision tower gives, [1+D, V, hidden], V ≥ 1.
        past_lengths: Valid rows of each sequence's cache, [B].
        logits_positions: Which of the S tokens get logits, [B, L], L ≥ 1.
    """

    input_ids: IntArray
    position_ids: IntArray
    visual_rows: IntArray
    visual_embeds: VisualEmbeds
    past_lengths: IntArray
    logits_positions: IntArray

    def __post_init__(self) -> None:
        """Check types, and that the shapes agree."""
        self._check_dtypes(DECODER_DTYPES)
        batch, num_new = self.input_ids.shape
        assert batch > 0 and num_new > 0, self.input_ids.shape
        assert self.position_ids.shape == (3, batch, num_new), self.position_ids.shape
        assert self.visual_rows.shape == (batch, num_new), self.visual_rows.shape
        assert self.visual_embeds.ndim == 3 and self.visual_embeds.shape[1] > 0, self.visual_embeds.shape
        assert self.past_lengths.shape == (batch,), self.past_lengths.shape
        num_asked = self.logits_positions.shape[-1]
        assert num_asked > 0 and self.logits_positions.shape == (batch, num_asked), self.logits_positions.shape

    @classmethod
    def prompt(
        cls,
        input_ids: Sequence[int],
        positions: PromptPositions,
        visual_embeds: VisualEmbeds,
        *,
        all_logits: bool = False,
    ) -> DecoderInputs:
        """Return one whole prompt after an empty cache; only its last token gets logits, or all do."""
        num_tokens = len(input_ids)
        return cls(
            input_ids=np.array([input_ids], np.int64),
            position_ids=positions.position_ids,
            visual_rows=positions.visual_rows,
            visual_embeds=visual_embeds,
            past_lengths=np.zeros(1, np.int64),
            logits_positions=np.arange(0 if all_logits else num_tokens - 1, num_tokens)[None],
        )

    @classmethod
    def text(
        cls,
        input_ids: IntArray,
        past_lengths: IntArray,
        visual_embeds: VisualEmbeds,
        *,
        delta: IntArray | int = 0,
        logits_positions: IntArray | None = None,
    ) -> DecoderInputs:
        """Return tokens of text after what the cache holds, such as those of a decode step.

        Args:
            input_ids: [B, S].
            past_lengths: [B].
            visual_embeds: Any, of which no row is taken, such as `no_visual_embeds`.
            delta: Position of a token minus its index (`PromptPositions.delta`): of all sequences, or of each, [B].
            logits_positions: [B, L]; by default, each token gets logits.
        """
        batch, num_new = input_ids.shape
        every_BS = np.zeros((batch, 1), np.int64) + np.arange(num_new)
        position_ids = np.empty((3, batch, num_new), np.int64)
        position_ids[:] = (past_lengths + delta)[:, None] + every_BS
        return cls(
            input_ids=input_ids,
            position_ids=position_ids,
            visual_rows=np.full((batch, num_new), -1, np.int64),
            visual_embeds=visual_embeds,
            past_lengths=past_lengths,
            logits_positions=every_BS if logits_positions is None else logits_positions,
        )

    @classmethod
    def concatenate(cls, sequences: Sequence[DecoderInputs]) -> DecoderInputs:
        """Return the sequences as one batch, padded on the right.

        Of the visual embeddings, the batch holds what its sequences refer to. A sequence that asks for fewer logits
        than another gets those of its last position again, so its own are the first. The cache must have room for the
        padding, too: `num_cache_rows`.
        """
        num_new = max(each.input_ids.shape[1] for each in sequences)
        num_asked = max(each.logits_positions.shape[1] for each in sequences)
        embeds: list[VisualEmbeds] = []
        rows: list[IntArray] = []
        for each in sequences:
            used = each.with_used_rows()
            first_row = sum(part.shape[1] for part in embeds)
            rows.append(_padded(np.where(used.visual_rows < 0, -1, used.visual_rows + first_row), num_new, fill=-1))
            if (used.visual_rows >= 0).any():
                embeds.append(used.visual_embeds)
        return cls(
            input_ids=np.concatenate([_padded(each.input_ids, num_new) for each in sequences]),
            position_ids=np.concatenate([_padded(each.position_ids, num_new) for each in sequences], axis=1),
            visual_rows=np.concatenate(rows),
            visual_embeds=join_embeds(embeds or [rows_around(sequences[0].visual_embeds, 0, 1)[0]]),
            past_lengths=np.concatenate([each.past_lengths for each in sequences]),
            logits_positions=np.concatenate([_padded(each.logits_positions, num_asked) for each in sequences]),
        )

    @property
    def num_cache_rows(self) -> int:
        """Capacity that the cache must have: S new rows, those of padding too, after the longest past."""
        return int(self.past_lengths.max()) + int(self.input_ids.shape[1])

    def row(self, index: int) -> DecoderInputs:
        """Return one sequence of the batch."""
        part = slice(index, index + 1)
        return replace(
            self,
            input_ids=self.input_ids[part],
            position_ids=self.position_ids[:, part],
            visual_rows=self.visual_rows[part],
            past_lengths=self.past_lengths[part],
            logits_positions=self.logits_positions[part],
        )

    def chunk(self, start: int, stop: int) -> DecoderInputs:
        """Return the tokens start … stop - 1 of one sequence as a call after those before them.

        Those of them that get logits get them. If none does, the last one does: a graph gives logits of at least one.
        """
        assert len(self.input_ids) == 1, "a chunk with a past is one sequence"
        part = slice(start, stop)
        asked = self.asked_in(start, stop)
        if not asked.size:
            asked = np.array([stop - 1])
        return replace(
            self,
            input_ids=self.input_ids[:, part],
            position_ids=self.position_ids[:, :, part],
            visual_rows=self.visual_rows[:, part],
            past_lengths=self.past_lengths + start,
            logits_positions=asked[None] - start,
        )

    def padded(self, num_new: int) -> DecoderInputs:
        """Return the call with tokens behind its own up to so many, whose logits nobody asks for.

        They write rows behind the valid ones of the cache, which must have room for them: `num_cache_rows`.
        """
        return replace(
            self,
            input_ids=_padded(self.input_ids, num_new),
            position_ids=_padded(self.position_ids, num_new),
            visual_rows=_padded(self.visual_rows, num_new, fill=-1),
        )

    def asked_in(self, start: int, stop: int) -> IntArray:
        """Return those of one sequence's `logits_positions` that are of the tokens start … stop - 1."""
        asked_L: IntArray = self.logits_positions[0]
        inside: IntArray = asked_L[(start <= asked_L) & (asked_L < stop)]
        return inside

    def with_used_rows(self) -> DecoderInputs:
        """Return the same call with the visual embeddings cut down to what lies between the rows that it takes.

        Those in device memory keep whole segments.
        """
        used = self.visual_rows[self.visual_rows >= 0]
        if not used.size:
            return replace(self, visual_embeds=rows_around(self.visual_embeds, 0, 1)[0])
        first, last = int(used.min()), int(used.max())
        assert last < self.visual_embeds.shape[1], "a visual row that is not there"
        embeds, begin = rows_around(self.visual_embeds, first, last + 1)
        rows = np.where(self.visual_rows < 0, -1, self.visual_rows - begin)
        return replace(self, visual_rows=rows, visual_embeds=embeds)


def rows_around(embeds: VisualEmbeds, first: int, stop: int) -> tuple[VisualEmbeds, int]:
    """Return visual embeddings that hold rows first … stop - 1, not copied, and the row that they begin with."""
    return embeds.around(first, stop) if isinstance(embeds, DeviceEmbeds) else (embeds[:, first:stop], first)


def join_embeds(embeds: Sequence[VisualEmbeds]) -> VisualEmbeds:
    """Return visual embeddings one after the other: all on the host, or all of one session."""
    if len(embeds) == 1:
        return embeds[0]
    on_device = [each for each in embeds if isinstance(each, DeviceEmbeds)]
    if on_device:
        assert len(on_device) == len(embeds), "visual embeddings on the host and on a device"
        return DeviceEmbeds([part for each in on_device for part in each.parts])
    return np.concatenate([on_host(each) for each in embeds], axis=1)


def split_embeds(embeds: VisualEmbeds, num_segments: int) -> list[VisualEmbeds]:
    """Return the visual embeddings of each of several segments of one grid, in memory of their own."""
    if isinstance(embeds, DeviceEmbeds):
        assert len(embeds.parts) == num_segments, "a part is a segment"
        return [DeviceEmbeds([part]) for part in embeds.parts]
    return [np.ascontiguousarray(part) for part in np.split(embeds, num_segments, axis=1)]


def on_host(embeds: VisualEmbeds) -> FloatArray:
    """Return visual embeddings as an array: a copy if they are in device memory, by a call of their session."""
    return embeds.numpy() if isinstance(embeds, DeviceEmbeds) else embeds


def _padded(values: IntArray, length: int, fill: int | None = None) -> IntArray:
    """Return an array with its last axis padded on the right, with the last value if no other is given."""
    if values.shape[-1] == length:
        return values
    padding = [(0, 0)] * (values.ndim - 1) + [(0, length - values.shape[-1])]
    return np.pad(values, padding, mode="edge") if fill is None else np.pad(values, padding, constant_values=fill)


def _dtypes(inputs: type[_GraphInputs]) -> dict[str, DType]:
    hints = get_type_hints(inputs)
    return {field.name: np.int64 if hints[field.name] == IntArray else np.float32 for field in fields(inputs)}


VISION_DTYPES: Mapping[str, DType] = _dtypes(VisionInputs)
DECODER_DTYPES: Mapping[str, DType] = _dtypes(DecoderInputs)
"""Element types of the inputs, by name and in the graph's order."""
LEVEL_DTYPES: Mapping[str, DType] = {**VISION_DTYPES, "pixel_values": np.uint8, "pixel_scale": np.float32}
"""Those of the vision graph of an engine that normalises pixels itself."""
VISION_INPUTS = tuple(VISION_DTYPES)
DECODER_INPUTS = tuple(DECODER_DTYPES)


def vision_dims(config: ModelConfig) -> dict[str, Dims]:
    """Return the dimensions of the vision graph's inputs, by name."""
    table = ("P", config.vision.head_dim // 2)
    dims: list[Dims] = [("I", "P", config.vision.patch_elements), ("P", 4), ("P", 4), table, table]
    return dict(zip(VISION_INPUTS, dims, strict=True))


def decoder_dims(config: ModelConfig) -> dict[str, Dims]:
    """Return the dimensions of the decoder's inputs, the KV cache aside, by name."""
    embeds = (config.num_visual_levels, "V", config.text.hidden_size)
    dims: list[Dims] = [("B", "S"), (3, "B", "S"), ("B", "S"), embeds, ("B",), ("B", "L")]
    return dict(zip(DECODER_INPUTS, dims, strict=True))


def cache_dims(config: ModelConfig) -> Dims:
    """Return the dimensions of one layer's keys, or values, T the capacity."""
    return ("B", config.text.num_kv_heads, "T", config.text.head_dim)


def no_visual_embeds(config: ModelConfig) -> FloatArray:
    """Return the visual embeddings of a call without images: one row of zeros, [1+D, 1, hidden]."""
    return np.zeros((config.num_visual_levels, 1, config.text.hidden_size), np.float32)


def past_names(num_layers: int) -> list[str]:
    """Return the decoder's inputs that hold the KV cache: keys and values of each layer."""
    return [f"past_key_values.{i}.{kind}" for i in range(num_layers) for kind in ("key", "value")]


def present_names(num_layers: int) -> list[str]:
    """Return the decoder's outputs that hold the KV cache, in the same order."""
    return [name.replace("past", "present") for name in past_names(num_layers)]


def check_names(
    path: Path,
    inputs: Iterable[str],
    outputs: Iterable[str],
    *,
    expected_inputs: Iterable[str],
    expected_outputs: Iterable[str],
) -> None:
    """Compare the inputs and outputs of an opened graph with those that a session gives and asks for.

    Raises:
        EngineError: An input is missing or unknown, or an output is missing.
    """
    found, wanted = set(inputs), set(expected_inputs)
    for problem, names in (
        ("lacks the inputs", wanted - found),
        ("has the unknown inputs", found - wanted),
        ("lacks the outputs", set(expected_outputs) - set(outputs)),
    ):
        if names:
            listed = ", ".join(sorted(names)[:_MOST_LISTED]) + (", …" if len(names) > _MOST_LISTED else "")
            raise EngineError(
                f"{path}: the graph {problem} {listed}, so it does not belong to the model that engine.json describes",
                remedy="build the engine again",
            )
