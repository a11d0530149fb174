"""The shape of a Qwen3-VL model: the one place that reads a Hugging Face `config.json`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NoReturn, TypeGuard

from runtime.errors import CheckpointError
from runtime.shown import shown, shown_numbers

SUPPORTED_MODEL_TYPE = "qwen3_vl"
EXPERTS_MODEL_TYPE = "qwen3_vl_moe"

# Models that are often taken for this one.
_OTHER_FAMILIES: Mapping[str, str] = {
    "qwen2_vl": "which is Qwen2-VL, ",
    "qwen2_5_vl": "which is Qwen2.5-VL, ",
    "qwen2_5_omni": "which is Qwen2.5-Omni, ",
    "qwen3": "which is Qwen3, a text model, ",
    "qwen3_moe": "which is Qwen3, a text model, ",
    "qwen3_next": "which is Qwen3-Next, a text model, ",
    "qwen3_omni_moe": "which is Qwen3-Omni, ",
    "qwen3_vl_text": "which is the decoder of a Qwen3-VL alone, ",
    "qwen3_vl_moe_text": "which is the decoder of a Qwen3-VL alone, ",
    "qwen3_5": "which is Qwen3.5, ",
    "qwen3_5_moe": "which is Qwen3.5, ",
}

# Far above all models, and low enough that no product of sizes of one weight exceeds 63 bits.
_TAKE_IT_AGAIN = "config.json was altered, or is of another model: take it again from where the weights are from"
_MOST, _MOST_LAYERS, _MOST_TOKENS, _MOST_OF_PATCH = 1 << 20, 1 << 10, (1 << 31) - 1, 1 << 6


@dataclass(frozen=True)
class VisionConfig:
    """Shape of the vision tower; sizes are numbers of elements.

    Attributes:
        deepstack_layers: Blocks after which a DeepStack merger stands, in the order of the mergers in the checkpoint.
            The levels of the visual embeddings are in the order of the blocks, whatever this order is.
        rope_theta: Base of the rotary frequencies; no known checkpoint has another than this.
    """

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
    rope_theta: float

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
    """Shape of the mixture of experts that replaces a layer's feed-forward network.

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
        rope_theta: Base of the rotary frequencies.
        mrope_section: How many frequencies turn by time, height and width; see `rotary_frequencies` of
            qwen3vl_export/modeling.py.
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
    rope_theta: float
    mrope_section: tuple[int, int, int]
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
        text["mrope_section"] = tuple(text["mrope_section"])
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
        if not isinstance(model_type, str) or model_type not in (SUPPORTED_MODEL_TYPE, EXPERTS_MODEL_TYPE):
            family = _OTHER_FAMILIES.get(model_type, "") if isinstance(model_type, str) else ""
            raise CheckpointError(
                f"config.json: model_type is {shown(model_type)}, "
                f"{family}expected {SUPPORTED_MODEL_TYPE!r} or {EXPERTS_MODEL_TYPE!r}",
                remedy="give a Qwen3-VL checkpoint (2B, 4B, 8B, 32B, 30B-A3B, 235B-A22B)",
            )
        has_experts = model_type == EXPERTS_MODEL_TYPE
        text, vision = _section(config, "text_config"), _section(config, "vision_config")
        rope = _rope(text, ("default", "mrope"))
        if rope.get("mrope_interleaved", True) is not True:
            rope.refuse("mrope_interleaved", "true: Qwen3-VL interleaves the three axes")
        vision_rope = _rope(vision, ("default", "axial"))
        text.fixed("hidden_act", "silu", "swish")
        vision.fixed("hidden_act", "gelu_pytorch_tanh")
        if text.boolean("attention_bias", default=False):
            text.refuse("attention_bias", "false: biases are not exported")
        if not text.boolean("is_causal", default=True):
            text.refuse("is_causal", "true: no token sees those after it")
        top = _Section(config, "")
        result = cls(
            text=_text_config(text, rope, top, has_experts=has_experts),
            vision=_vision_config(vision, vision_rope),
            image_token_id=top.index("image_token_id", default=151655),
            video_token_id=top.index("video_token_id", default=151656),
            vision_start_token_id=top.index("vision_start_token_id", default=151652),
            vision_end_token_id=top.index("vision_end_token_id", default=151653),
        )
        result._check(vision.size("out_hidden_size"))
        return result

    def _check(self, out_hidden_size: int) -> None:
        """Raise where sizes contradict each other."""
        text, vision = self.text, self.vision
        if out_hidden_size != text.hidden_size:
            raise CheckpointError(
                f"config.json: vision_config.out_hidden_size is {out_hidden_size}, expected text_config.hidden_size, "
                f"{text.hidden_size}: the decoder takes visual embeddings as they are",
                remedy="take both sections of config.json from one checkpoint",
            )
        levels, wrong = vision.deepstack_layers, ""
        if text.num_heads % text.num_kv_heads:
            wrong = f"{text.num_heads} attention heads are no multiple of {text.num_kv_heads} key/value heads"
        elif vision.num_grid_per_side**2 != vision.num_position_embeddings:
            wrong = f"vision_config.num_position_embeddings = {vision.num_position_embeddings} is no square"
        elif vision.hidden_size % vision.num_heads:
            wrong = f"vision_config.hidden_size = {vision.hidden_size} is no multiple of num_heads = {vision.num_heads}"
        # Rotary embeddings turn pairs of elements; those of the vision tower, pairs for rows and for columns.
        elif text.head_dim % 2:
            wrong = f"text_config: heads of {text.head_dim} elements, expected a multiple of 2"
        elif vision.head_dim % 4:
            wrong = f"vision_config: heads of {vision.head_dim} elements, expected a multiple of 4"
        elif len(levels) > text.num_layers or any(i >= vision.depth for i in levels):
            wrong = (
                f"deepstack_visual_indexes {list(levels)} do not fit a vision tower of {vision.depth} and a decoder of "
                f"{text.num_layers} layers"
            )
        if wrong:
            raise CheckpointError(f"config.json: {wrong}", remedy=_TAKE_IT_AGAIN)


class _Section:
    """Typed values of one object of `config.json`; without a default, a key must be there.

    Every method raises `CheckpointError` if the value is of another type or out of range.
    """

    def __init__(self, values: Mapping[str, Any], name: str) -> None:
        self._values = values
        self.name = name

    def size(self, key: str, *, default: int | None = None, most: int = _MOST) -> int:
        """Return an integer of 1 to `most`."""
        value = self.get(key, default)
        if not _is_integer(value, 1):
            self.refuse(key, "an integer of at least 1")
        return value if value <= most else self.refuse(key, f"an integer of at most {most}")

    def index(self, key: str, *, default: int) -> int:
        """Return an integer of at least 0."""
        value = self.get(key, default)
        return value if _is_integer(value, 0) else self.refuse(key, "a non-negative integer")

    def indices(self, key: str, *, default: tuple[int, ...]) -> tuple[int, ...]:
        """Return different integers of at least 0."""
        value = self.get(key, default)
        is_valid = isinstance(value, list | tuple) and all(_is_integer(i, 0) for i in value)
        if not is_valid or len(set(value)) < len(value):
            self.refuse(key, "a list of different non-negative integers")
        return tuple(value)

    def positive(self, key: str, *, default: float | None = None) -> float:
        """Return a finite number above 0."""
        value = self.get(key, default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return float(value) if is_number and 0 < value <= sys.float_info.max else self.refuse(key, "a number above 0")

    def triple(self, key: str, *, default: tuple[int, int, int]) -> tuple[int, int, int]:
        """Return three integers of at least 0."""
        value = self.get(key, default)
        if not isinstance(value, list | tuple) or len(value) != 3 or not all(_is_integer(i, 0) for i in value):
            self.refuse(key, "three non-negative integers")
        return value[0], value[1], value[2]

    def fixed(self, key: str, *names: str) -> None:
        """Raise unless the value, if there is one, is one of the names of what is exported."""
        if self.get(key, names[0]) not in names:
            self.refuse(key, f"{names[0]!r}: no other is exported")

    def boolean(self, key: str, *, default: bool) -> bool:
        """Return true or false."""
        value = self.get(key, default)
        return value if isinstance(value, bool) else self.refuse(key, "true or false")

    def get(self, key: str, default: Any = None) -> Any:
        """Return any value."""
        return self._values.get(key, default)

    def refuse(self, key: str, expected: str) -> NoReturn:
        """Raise the error that names the key, what it is and what it should be."""
        path = f"{self.name}.{key}" if self.name else key
        found = shown_numbers(self._values[key]) if key in self._values else "missing"
        raise _wrong(f"{path} is {found}, expected {expected}")


def _wrong(text: str) -> CheckpointError:
    return CheckpointError(f"config.json: {text}", remedy="take config.json from the original model")


def _is_integer(value: object, minimum: int) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def _section(config: Mapping[str, Any], name: str) -> _Section:
    values = config.get(name)
    if not isinstance(values, Mapping):
        raise CheckpointError(f"config.json: {name} is missing", remedy="give the folder of a Qwen3-VL checkpoint")
    return _Section(values, name)


def _text_config(text: _Section, rope: _Section, top: _Section, *, has_experts: bool) -> TextConfig:
    return TextConfig(
        vocab_size=text.size("vocab_size", most=_MOST_TOKENS),
        hidden_size=text.size("hidden_size"),
        intermediate_size=text.size("intermediate_size"),
        num_layers=text.size("num_hidden_layers", most=_MOST_LAYERS),
        num_heads=text.size("num_attention_heads"),
        num_kv_heads=text.size("num_key_value_heads"),
        # transformers' own defaults, which differ between the two families.
        head_dim=text.size(
            "head_dim",
            default=text.size("hidden_size") // text.size("num_attention_heads") if has_experts else 128,
        ),
        max_positions=text.size("max_position_embeddings", most=_MOST_TOKENS),
        rms_norm_eps=text.positive("rms_norm_eps", default=1e-6),
        tie_word_embeddings=_is_tied(top, text),
        experts=_experts(text) if has_experts else None,
        # Without one, releases of transformers disagree: 5e6 in 4.57, 5e5 in 5.24.
        rope_theta=rope.positive("rope_theta"),
        mrope_section=rope.triple("mrope_section", default=(24, 20, 20)),
    )


def _vision_config(vision: _Section, rope: _Section) -> VisionConfig:
    return VisionConfig(
        depth=vision.size("depth", most=_MOST_LAYERS),
        hidden_size=vision.size("hidden_size"),
        intermediate_size=vision.size("intermediate_size"),
        num_heads=vision.size("num_heads"),
        in_channels=vision.size("in_channels", default=3, most=_MOST_OF_PATCH),
        patch_size=vision.size("patch_size", default=16, most=_MOST_OF_PATCH),
        temporal_patch_size=vision.size("temporal_patch_size", default=2, most=_MOST_OF_PATCH),
        spatial_merge_size=vision.size("spatial_merge_size", default=2, most=_MOST_OF_PATCH),
        num_position_embeddings=vision.size("num_position_embeddings"),
        deepstack_layers=vision.indices("deepstack_visual_indexes", default=(8, 16, 24)),
        rope_theta=rope.positive("rope_theta", default=10000.0),
    )


def _is_tied(top: _Section, text: _Section) -> bool:
    """Return whether the head is the embedding: the top says so. transformers 5 takes silence there for false.

    Raises:
        CheckpointError: Only text_config says that it is, which transformers 4 reads and 5 does not.
    """
    is_tied = top.boolean("tie_word_embeddings", default=False)
    if top.get("tie_word_embeddings") is None and text.boolean("tie_word_embeddings", default=False):
        raise CheckpointError(
            "config.json: tie_word_embeddings is true in text_config and missing at the top: transformers 4 ties the "
            "head to the embedding, 5 does not",
            remedy="write it at the top: true if the weights hold no lm_head.weight, else as the model was trained",
        )
    return is_tied


def _experts(text: _Section) -> ExpertsConfig:
    """Read the experts; which layers have them follows `Qwen3VLMoeTextDecoderLayer.__init__` of transformers 5.23."""
    # transformers 5 writes num_experts under its other name.
    names = [name for name in ("num_experts", "num_local_experts") if text.get(name) is not None]
    counts = {text.size(name) for name in names or ["num_experts"]}
    if len(counts) > 1:
        raise _wrong(
            f"text_config.num_experts is {text.get('num_experts')}, num_local_experts {text.get('num_local_experts')}, "
            "expected one number under both names"
        )
    num_experts = counts.pop()
    num_layers, top_k = text.size("num_hidden_layers", most=_MOST_LAYERS), text.size("num_experts_per_tok")
    if top_k > num_experts:
        raise _wrong(f"text_config.num_experts_per_tok is {top_k}, expected at most num_experts = {num_experts}")
    if not text.boolean("norm_topk_prob", default=True):
        raise CheckpointError(
            "config.json: text_config.norm_topk_prob is false, expected true",
            remedy="transformers renormalises the routing weights whatever this says: set it to true to get the same",
        )
    dense = set(text.indices("mlp_only_layers", default=()) if text.get("mlp_only_layers") is not None else ())
    step = text.size("decoder_sparse_step", default=1)
    dense_layers = tuple(i for i in range(num_layers) if i in dense or (i + 1) % step)
    return ExpertsConfig(num_experts, top_k, text.size("moe_intermediate_size"), dense_layers)


def _rope(section: _Section, exported_types: tuple[str, ...]) -> _Section:
    """Read the rotary embedding in either of its forms.

    transformers 5 writes `rope_parameters`, with `rope_theta` inside; 4 wrote `rope_scaling`, with `rope_theta` beside
    it. Where both stand they may not contradict each other, or nobody could tell which the model was trained with.
    """
    merged: dict[str, Any] = {}
    names = [name for name in ("rope_parameters", "rope_scaling") if section.get(name) is not None]
    forms = {name: section.get(name) for name in names}
    if section.get("rope_theta") is not None:
        forms["rope_theta"] = {"rope_theta": section.get("rope_theta")}
    for name, form in forms.items():
        if not isinstance(form, Mapping):
            section.refuse(name, "an object")
        forms[name] = form = _with_one_type(form)
        for key, value in form.items():
            if key == "rope_type" and value in exported_types:
                continue  # names of the same
            if key == "rope_type":
                raise CheckpointError(
                    f"config.json: {section.name}.{name}: rope type {shown(value)} is not exported; expected "
                    f"{exported_types[0]!r}",
                    remedy="remove the rope scaling from config.json, which limits the context to the trained length",
                )
            if merged.setdefault(key, value) != value:
                raise _wrong(
                    f"{section.name}: {key} is {shown_numbers(merged[key])} in one place and {shown_numbers(value)} in "
                    "another of rope_parameters, rope_scaling and rope_theta"
                )
    # If both are there, transformers takes `rope_scaling` alone, and the theta beside it.
    read = forms.get("rope_scaling") or forms.get("rope_parameters") or {}
    return _Section({**forms.get("rope_theta", {}), **read}, section.name)


def _with_one_type(form: Mapping[str, Any]) -> dict[str, Any]:
    """Return one form with its type under the name `rope_type`, which wins over the older `type` as in transformers."""
    values = dict(form)
    older = values.pop("type", None)
    return values if older is None else {"rope_type": older, **values}
