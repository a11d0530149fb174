"""The shape of a Qwen3-VL model: the one place that reads a Hugging Face `config.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NoReturn, TypeGuard

from runtime.errors import CheckpointError

SUPPORTED_MODEL_TYPE = "qwen3_vl"
EXPERTS_MODEL_TYPE = "qwen3_vl_moe"


@dataclass(frozen=True)
class VisionConfig:
    """Shape of the vision tower; sizes are numbers of elements."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    num_position_embeddings: int
    deepstack_layers: tuple[int, ...]

    @property
    def head_dim(self) -> int:
        """Elements of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def patch_elements(self) -> int:
        """Pixels of one patch over channels and time: C · Tp · p · p."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def patches_per_token(self) -> int:
        """Patches that one visual token of the decoder merges."""
        return self.spatial_merge_size**2

    @property
    def num_grid_per_side(self) -> int:
        """Side of the square grid of learned position embeddings."""
        return int(self.num_position_embeddings**0.5)


@dataclass(frozen=True)
class ExpertsConfig:
    """Shape of the mixture of experts that stands in the place of a layer's feed-forward network.

    Attributes:
        num_experts: Experts of a layer.
        top_k: Experts that a token goes through.
        intermediate_size: Width of one expert.
        dense_layers: Layers that have an ordinary feed-forward network, in order.
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    dense_layers: tuple[int, ...]


@dataclass(frozen=True)
class TextConfig:
    """Shape of the decoder; sizes are numbers of elements. `head_dim` is independent of hidden_size / num_heads.

    Attributes:
        intermediate_size: Width of the feed-forward network of a dense layer.
        experts: None for a dense model.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    experts: ExpertsConfig | None = None

    def experts_of(self, layer: int) -> ExpertsConfig | None:
        """Return the experts of one layer, or None if its feed-forward network is dense."""
        return None if self.experts is None or layer in self.experts.dense_layers else self.experts


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the whole model and the ids of its vision tokens."""

    text: TextConfig
    vision: VisionConfig
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int

    @property
    def num_visual_levels(self) -> int:
        """Rows of `visual_embeds` on axis 0: the merger and the DeepStack mergers."""
        return 1 + len(self.vision.deepstack_layers)

    def to_dict(self) -> dict[str, Any]:
        """Return nested plain values that `from_dict` takes back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Rebuild a config from what `to_dict` returned."""
        vision = dict(values["vision"])
        vision["deepstack_layers"] = tuple(vision["deepstack_layers"])
        text = dict(values["text"])
        experts = text.get("experts")
        if experts is not None:
            text["experts"] = ExpertsConfig(**{**experts, "dense_layers": tuple(experts["dense_layers"])})
        rest = {key: value for key, value in values.items() if key not in ("text", "vision")}
        return cls(text=TextConfig(**text), vision=VisionConfig(**vision), **rest)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Read the contents of a checkpoint's `config.json`.

        Raises:
            CheckpointError: Another architecture, a missing or wrong value, or a rotary embedding that is not exported.
        """
        model_type = config.get("model_type")
        if model_type not in (SUPPORTED_MODEL_TYPE, EXPERTS_MODEL_TYPE):
            raise CheckpointError(
                f"config.json: model_type is {model_type!r}, "
                f"expected {SUPPORTED_MODEL_TYPE!r} or {EXPERTS_MODEL_TYPE!r}",
                remedy="give a Qwen3-VL checkpoint (2B, 4B, 8B, 32B, 30B-A3B, 235B-A22B)",
            )
        has_experts = model_type == EXPERTS_MODEL_TYPE
        text, vision = _section(config, "text_config"), _section(config, "vision_config")
        _check_rope(text)
        if text.boolean("attention_bias", default=False):
            raise CheckpointError("config.json: text_config.attention_bias is true, expected false")
        top = _Section(config, "")
        result = cls(
            text=TextConfig(
                vocab_size=text.size("vocab_size"),
                hidden_size=text.size("hidden_size"),
                intermediate_size=text.size("intermediate_size"),
                num_layers=text.size("num_hidden_layers"),
                num_heads=text.size("num_attention_heads"),
                num_kv_heads=text.size("num_key_value_heads"),
                # transformers' own defaults, which differ between the two families.
                head_dim=text.size(
                    "head_dim",
                    default=text.size("hidden_size") // text.size("num_attention_heads") if has_experts else 128,
                ),
                max_positions=text.size("max_position_embeddings"),
                rms_norm_eps=text.positive("rms_norm_eps", default=1e-6),
                tie_word_embeddings=top.boolean(
                    "tie_word_embeddings", default=text.boolean("tie_word_embeddings", default=False)
                ),
                experts=_experts(text) if has_experts else None,
            ),
            vision=VisionConfig(
                depth=vision.size("depth"),
                hidden_size=vision.size("hidden_size"),
                intermediate_size=vision.size("intermediate_size"),
                num_heads=vision.size("num_heads"),
                in_channels=vision.size("in_channels", default=3),
                patch_size=vision.size("patch_size", default=16),
                temporal_patch_size=vision.size("temporal_patch_size", default=2),
                spatial_merge_size=vision.size("spatial_merge_size", default=2),
                num_position_embeddings=vision.size("num_position_embeddings"),
                deepstack_layers=vision.indices("deepstack_visual_indexes", default=(8, 16, 24)),
            ),
            image_token_id=top.index("image_token_id", default=151655),
            video_token_id=top.index("video_token_id", default=151656),
            vision_start_token_id=top.index("vision_start_token_id", default=151652),
            vision_end_token_id=top.index("vision_end_token_id", default=151653),
        )
        result._check()
        return result

    def _check(self) -> None:
        """Raise where sizes contradict each other."""
        text, vision = self.text, self.vision
        if text.num_heads % text.num_kv_heads:
            raise CheckpointError(
                f"config.json: {text.num_heads} attention heads are no multiple of {text.num_kv_heads} key/value heads"
            )
        if vision.num_grid_per_side**2 != vision.num_position_embeddings:
            raise CheckpointError(
                f"config.json: vision_config.num_position_embeddings = {vision.num_position_embeddings} is no square"
            )
        if vision.hidden_size % vision.num_heads:
            raise CheckpointError(
                f"config.json: vision_config.hidden_size = {vision.hidden_size} is no multiple of "
                f"num_heads = {vision.num_heads}"
            )
        # Rotary embeddings turn pairs of elements; those of the vision tower, pairs for rows and for columns.
        for name, head_dim, factor in (("text_config", text.head_dim, 2), ("vision_config", vision.head_dim, 4)):
            if head_dim % factor:
                raise CheckpointError(
                    f"config.json: {name}: heads of {head_dim} elements, expected a multiple of {factor}"
                )
        if len(vision.deepstack_layers) > text.num_layers or any(i >= vision.depth for i in vision.deepstack_layers):
            raise CheckpointError(
                f"config.json: deepstack_visual_indexes {list(vision.deepstack_layers)} do not fit a vision tower of "
                f"{vision.depth} and a decoder of {text.num_layers} layers"
            )


class _Section:
    """Typed values of one object of `config.json`; without a default, a key must be there.

    Every method raises `CheckpointError` if the value is of another type or out of range.
    """

    def __init__(self, values: Mapping[str, Any], name: str) -> None:
        self._values = values
        self._name = name

    def size(self, key: str, *, default: int | None = None) -> int:
        """Return an integer of at least 1."""
        value = self.get(key, default)
        return value if _is_integer(value, 1) else self._refuse(key, "an integer of at least 1")

    def index(self, key: str, *, default: int) -> int:
        """Return an integer of at least 0."""
        value = self.get(key, default)
        return value if _is_integer(value, 0) else self._refuse(key, "a non-negative integer")

    def indices(self, key: str, *, default: tuple[int, ...]) -> tuple[int, ...]:
        """Return different integers of at least 0."""
        value = self.get(key, default)
        is_valid = isinstance(value, list | tuple) and all(_is_integer(i, 0) for i in value)
        if not is_valid or len(set(value)) < len(value):
            self._refuse(key, "a list of different non-negative integers")
        return tuple(value)

    def positive(self, key: str, *, default: float) -> float:
        """Return a finite number above 0."""
        value = self.get(key, default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return float(value) if is_number and 0 < value < math.inf else self._refuse(key, "a number above 0")

    def boolean(self, key: str, *, default: bool) -> bool:
        """Return true or false."""
        value = self.get(key, default)
        return value if isinstance(value, bool) else self._refuse(key, "true or false")

    def get(self, key: str, default: Any = None) -> Any:
        """Return any value."""
        return self._values.get(key, default)

    def _refuse(self, key: str, expected: str) -> NoReturn:
        path = f"{self._name}.{key}" if self._name else key
        found = repr(self._values[key]) if key in self._values else "missing"
        raise CheckpointError(
            f"config.json: {path} is {found}, expected {expected}", remedy="take config.json from the original model"
        )


def _is_integer(value: object, minimum: int) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def _section(config: Mapping[str, Any], name: str) -> _Section:
    values = config.get(name)
    if not isinstance(values, Mapping):
        raise CheckpointError(f"config.json: {name} is missing", remedy="give the folder of a Qwen3-VL checkpoint")
    return _Section(values, name)


def _experts(text: _Section) -> ExpertsConfig:
    """Read the experts; which layers have them follows `Qwen3VLMoeTextDecoderLayer.__init__` of transformers 5.23."""
    # transformers 5 writes num_experts under its other name.
    names = [name for name in ("num_experts", "num_local_experts") if text.get(name) is not None]
    counts = {text.size(name) for name in names or ["num_experts"]}
    if len(counts) > 1:
        raise CheckpointError(
            f"config.json: text_config.num_experts is {text.get('num_experts')}, num_local_experts "
            f"{text.get('num_local_experts')}, expected one number under both names",
            remedy="take config.json from the original model",
        )
    num_experts = counts.pop()
    num_layers, top_k = text.size("num_hidden_layers"), text.size("num_experts_per_tok")
    if top_k > num_experts:
        raise CheckpointError(
            f"config.json: text_config.num_experts_per_tok is {top_k}, expected at most num_experts = {num_experts}",
            remedy="take config.json from the original model",
        )
    if text.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"config.json: text_config.hidden_act is {text.get('hidden_act')!r}, expected 'silu'")
    if not text.boolean("norm_topk_prob", default=True):
        raise CheckpointError(
            "config.json: text_config.norm_topk_prob is false, expected true",
            remedy="transformers renormalises the routing weights whatever this says: set it to true to get the same",
        )
    dense = set(text.indices("mlp_only_layers", default=()) if text.get("mlp_only_layers") is not None else ())
    step = text.size("decoder_sparse_step", default=1)
    dense_layers = tuple(i for i in range(num_layers) if i in dense or (i + 1) % step)
    return ExpertsConfig(num_experts, top_k, text.size("moe_intermediate_size"), dense_layers)


def _check_rope(text: _Section) -> None:
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise CheckpointError(
            f"config.json: text_config.rope_parameters is {rope!r}, expected an object",
            remedy="take config.json from the original model",
        )
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "mrope"):
        raise CheckpointError(
            f"config.json: rope type {rope_type!r} is not exported; expected 'default'",
            remedy="remove the rope scaling from config.json, which limits the context to the trained length",
        )
    if rope.get("mrope_interleaved") is False:
        raise CheckpointError("config.json: mrope_interleaved is false; Qwen3-VL interleaves the three axes")
