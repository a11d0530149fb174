"""The pieces that an engine's graphs consist of, with the formats and bytes of their weights; like layers as one.

Weights keep the names of the checkpoint in each target's graphs, also where they are packed or joined, so the names say
which piece a weight is of. Which layers give and take DeepStack levels is in the manifest.
"""

from __future__ import annotations

import importlib.util
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.errors import UsageError
from runtime.installation import how_to_install
from runtime.manifest import Manifest

if TYPE_CHECKING:
    import onnx

VISION, DECODER = "vision.onnx", "decoder.onnx"

# Of a piece of several parts, the last group names the part.
_PATTERNS = (
    ("patch embedding", re.compile(r"^model\.visual\.(patch_embed|pos_embed)\b")),
    ("block", re.compile(r"^model\.visual\.blocks\.(?P<index>\d+)\.(\w+)")),
    ("DeepStack merger", re.compile(r"^model\.visual\.deepstack_merger_list\.(?P<index>\d+)\.(\w+)")),
    ("merger", re.compile(r"^model\.visual\.merger\.(\w+)")),
    ("token embedding", re.compile(r"^model\.language_model\.(embed_tokens)\b")),
    ("layer", re.compile(r"^model\.language_model\.layers\.(?P<index>\d+)\.((?:mlp\.(?:experts|gate)\b)|\w+)")),
    ("head", re.compile(r"^(?:model\.language_model\.)?(norm|lm_head)\b")),
)
_PARTS = {
    "patch_embed": "patches",
    "pos_embed": "position table",
    "attn": "attention",
    "self_attn": "attention",
    "mlp": "MLP",
    "mlp.experts": "experts",
    "mlp.gate": "router",
    "embed_tokens": "table",
    "lm_head": "head",
}
_PACKED_IN_FOUR = re.compile(r"\.[qt]4(\.|$)")
_FORMATS = {
    "FLOAT": "float32",
    "FLOAT16": "float16",
    "BFLOAT16": "bfloat16",
    "FLOAT8E4M3FN": "float8",
    "FLOAT4E2M1": "float4",
    "INT8": "int8",
    "UINT8": "int8",
    "INT4": "int4",
    "UINT4": "int4",
}
OTHER = "other"


@dataclass(frozen=True)
class Part:
    """A part of a piece, such as the attention of a layer.

    Attributes:
        name: What it is.
        num_bytes: Of its weights, by format; scales and zero points count with the format that they have.
    """

    name: str
    num_bytes: Mapping[str, int]

    @property
    def total(self) -> int:
        """Bytes of all formats."""
        return sum(self.num_bytes.values())

    @property
    def formats(self) -> list[str]:
        """Its formats, that of most bytes first."""
        return sorted(self.num_bytes, key=lambda name: -self.num_bytes[name])


@dataclass(frozen=True)
class Piece:
    """A piece of a graph; several like it are one.

    Attributes:
        name: What it is.
        parts: Those of one of them.
        first: Number of the first of them; None of a piece that there is once.
        count: How many they are.
    """

    name: str
    parts: tuple[Part, ...]
    first: int | None = None
    count: int = 1

    @property
    def title(self) -> str:
        """Its name with its numbers: `layers 3 to 27`."""
        if self.first is None:
            return self.name
        last = self.first + self.count - 1
        return f"{self.name} {self.first}" if self.count == 1 else f"{self.name}s {self.first} to {last}"

    @property
    def total(self) -> int:
        """Bytes of all of them together."""
        return self.count * sum(part.total for part in self.parts)


@dataclass(frozen=True)
class EngineGraph:
    """An engine by pieces, each list in the order of computation.

    Attributes:
        manifest: What the engine says of itself.
        patches: What makes patches rows of the vision tower.
        blocks: Its blocks; a run ends where a DeepStack level is taken.
        merger: What makes them visual tokens.
        deepstack: The same for the DeepStack levels; empty without.
        embedding: The table of tokens.
        layers: The decoder's layers; those that take a DeepStack level are apart.
        head: Last norm and head.
        inputs: Shape of each input, of both graphs.
        cache_bytes_per_token: Of keys and values of all layers.
        others: Further graphs of the folder, which are made of the same weights, or of others.
    """

    manifest: Manifest
    patches: Piece
    blocks: tuple[Piece, ...]
    merger: Piece
    deepstack: tuple[Piece, ...]
    embedding: Piece
    layers: tuple[Piece, ...]
    head: Piece
    inputs: Mapping[str, str]
    cache_bytes_per_token: int
    others: tuple[str, ...]

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """All of them."""
        decoder = (self.embedding, *self.layers, self.head)
        return (self.patches, *self.blocks, self.merger, *self.deepstack, *decoder)


def check_readable(manifest: Manifest) -> None:
    """Check that the graphs of an engine can be read here.

    Raises:
        UsageError: It has no ONNX graphs, or the package onnx is not installed.
    """
    if not {VISION, DECODER} <= manifest.files.keys():
        raise UsageError(
            f"an engine for {manifest.target} holds compiled plans, which do not say what they consist of",
            remedy="draw an engine of the same checkpoint for a target of ONNX Runtime: qwen3vl targets lists them",
        )
    if importlib.util.find_spec("onnx") is None:
        raise UsageError(
            "to read graphs, the Python package 'onnx' is needed, which is not installed",
            remedy=how_to_install("export"),
        )


def read_graph(engine: Path, manifest: Manifest) -> EngineGraph:
    """Read the graphs of an engine; weights stay on the disk.

    Raises:
        UsageError: As `check_readable`.
    """
    check_readable(manifest)
    import onnx

    graphs = [onnx.load(engine / name, load_external_data=False).graph for name in (VISION, DECODER)]
    found = _weights_by_piece(graphs)
    vision, levels = manifest.model.vision, manifest.model.vision.deepstack_layers
    num_layers = manifest.model.text.num_layers
    return EngineGraph(
        manifest=manifest,
        patches=_single("patch embedding", found),
        blocks=_folded("block", found, vision.depth, ends={each + 1 for each in levels}),
        merger=_single("merger", found),
        deepstack=_folded("DeepStack merger", found, len(levels)),
        embedding=_single("token embedding", found),
        layers=_folded("layer", found, num_layers, ends={len(levels)}),
        head=_single("head", found, "head, on the table of tokens" if manifest.model.text.tie_word_embeddings else ""),
        inputs={each.name: _shape(each) for graph in graphs for each in graph.input},
        cache_bytes_per_token=sum(_bytes_per_token(each) for each in graphs[1].input),
        others=tuple(name for name in manifest.files if name.endswith(".onnx") and name not in (VISION, DECODER)),
    )


_Found = Mapping[tuple[str, int], Mapping[str, Mapping[str, int]]]
"""Bytes by format, by part, by piece and its number."""


def _weights_by_piece(graphs: Iterable[onnx.GraphProto]) -> _Found:
    import onnx

    found: defaultdict[tuple[str, int], dict[str, defaultdict[str, int]]] = defaultdict(dict)
    seen: set[tuple[str, str]] = set()
    for graph in graphs:
        four_bits = {name for node in graph.node if _bits(node) == 4 for name in node.input}
        for tensor in graph.initializer:
            place = next(filter(None, (_placed(name, pattern, tensor.name) for name, pattern in _PATTERNS)), None)
            external = {entry.key: entry.value for entry in tensor.external_data}
            where = (external.get("location", ""), external.get("offset", "0"))
            is_number = tensor.data_type == onnx.TensorProto.INT64  # where joined weights are split, for instance
            if (
                place is None or is_number or (external and where in seen)
            ):  # one weight in two shapes lies in the file once
                continue
            if external:
                seen.add(where)
            piece, index, part = place
            of_part = found[piece, index].setdefault(part, defaultdict(int))
            of_part[_format(tensor, tensor.name in four_bits)] += _num_bytes(tensor, external)
    return found


def _placed(piece: str, pattern: re.Pattern[str], name: str) -> tuple[str, int, str] | None:
    match = pattern.match(name)
    if match is None:
        return None
    words = match.groups()[-1]
    part = "norms" if "norm" in words else _PARTS.get(words, words)
    return piece, int(match.groupdict().get("index") or 0), part


def _bits(node: onnx.NodeProto) -> int:
    return next((each.i for each in node.attribute if each.name in ("bits", "expert_weight_bits")), 0)


def _format(tensor: onnx.TensorProto, is_of_four_bits: bool) -> str:
    import onnx

    name = _FORMATS.get(onnx.TensorProto.DataType.Name(tensor.data_type), OTHER)
    if name == "int8" and (is_of_four_bits or _PACKED_IN_FOUR.search(tensor.name)):
        return "int4"
    return name


def _num_bytes(tensor: onnx.TensorProto, external: Mapping[str, str]) -> int:
    if "length" in external:
        return int(external["length"])
    from onnx import numpy_helper

    return len(tensor.raw_data) or int(numpy_helper.to_array(tensor).nbytes)


def _single(name: str, found: _Found, title: str = "") -> Piece:
    return Piece(title or name, _parts(found.get((name, 0), {})))


def _folded(name: str, found: _Found, count: int, ends: Collection[int] = ()) -> tuple[Piece, ...]:
    """Return pieces with numbers, in runs of like ones.

    Args:
        name: Of each.
        found: Their weights.
        count: How many they are.
        ends: A run ends before these numbers.
    """
    runs: list[Piece] = []
    for index in range(count):
        parts = _parts(found.get((name, index), {}))
        if runs and index not in ends and runs[-1].parts == parts:
            last = runs.pop()
            runs.append(Piece(name, parts, last.first, last.count + 1))
        else:
            runs.append(Piece(name, parts, index))
    return tuple(runs)


def _parts(found: Mapping[str, Mapping[str, int]]) -> tuple[Part, ...]:
    return tuple(Part(name, dict(sorted(of_part.items()))) for name, of_part in sorted(found.items()))


def _dimensions(value: onnx.ValueInfoProto) -> Sequence[str]:
    return [each.dim_param or str(each.dim_value) for each in value.type.tensor_type.shape.dim]


def _shape(value: onnx.ValueInfoProto) -> str:
    return f"[{', '.join(_dimensions(value))}]"


def _bytes_per_token(value: onnx.ValueInfoProto) -> int:
    """Return the bytes that a token takes in an input of the KV cache; 0 of another input."""
    if not value.name.startswith("past_key_values."):
        return 0
    from onnx import helper

    count = 1
    for each in _dimensions(value):
        count *= int(each) if each.isdigit() else 1
    return count * helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).itemsize
