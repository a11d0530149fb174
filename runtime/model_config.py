"""The shape of a Qwen3-VL model: the one place that reads a Hugging Face `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from runtime.errors import CheckpointError

SUPPORTED_MODEL_TYPE = "qwen3_vl"


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
class TextConfig:
    """Shape of the decoder; sizes are numbers of elements. `head_dim` is independent of hidden_size / num_heads."""

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
        rest = {key: value for key, value in values.items() if key not in ("text", "vision")}
        return cls(text=TextConfig(**values["text"]), vision=VisionConfig(**vision), **rest)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Read the contents of a checkpoint's `config.json`.

        Raises:
            CheckpointError: Another architecture, a missing key, or a form of rotary embedding that is not exported.
        """
        model_type = config.get("model_type")
        if model_type != SUPPORTED_MODEL_TYPE:
            raise CheckpointError(
                f"config.json: model_type is {model_type!r}, expected {SUPPORTED_MODEL_TYPE!r}",
                remedy="give a dense Qwen3-VL checkpoint (2B, 4B, 8B, 32B); mixture-of-experts is not supported yet",
            )
        text, vision = _section(config, "text_config"), _section(config, "vision_config")
        _check_rope(text)
        if text.get("attention_bias"):
            raise CheckpointError("config.json: text_config.attention_bias is true, expected false")
        tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
        result = cls(
            text=TextConfig(
                vocab_size=_int(text, "text_config", "vocab_size"),
                hidden_size=_int(text, "text_config", "hidden_size"),
                intermediate_size=_int(text, "text_config", "intermediate_size"),
                num_layers=_int(text, "text_config", "num_hidden_layers"),
                num_heads=_int(text, "text_config", "num_attention_heads"),
                num_kv_heads=_int(text, "text_config", "num_key_value_heads"),
                head_dim=_int(text, "text_config", "head_dim", default=128),
                max_positions=_int(text, "text_config", "max_position_embeddings"),
                rms_norm_eps=float(text.get("rms_norm_eps", 1e-6)),
                tie_word_embeddings=bool(tied),
            ),
            vision=VisionConfig(
                depth=_int(vision, "vision_config", "depth"),
                hidden_size=_int(vision, "vision_config", "hidden_size"),
                intermediate_size=_int(vision, "vision_config", "intermediate_size"),
                num_heads=_int(vision, "vision_config", "num_heads"),
                in_channels=_int(vision, "vision_config", "in_channels", default=3),
                patch_size=_int(vision, "vision_config", "patch_size", default=16),
                temporal_patch_size=_int(vision, "vision_config", "temporal_patch_size", default=2),
                spatial_merge_size=_int(vision, "vision_config", "spatial_merge_size", default=2),
                num_position_embeddings=_int(vision, "vision_config", "num_position_embeddings"),
                deepstack_layers=tuple(int(i) for i in vision.get("deepstack_visual_indexes", (8, 16, 24))),
            ),
            image_token_id=_int(config, "", "image_token_id", default=151655),
            video_token_id=_int(config, "", "video_token_id", default=151656),
            vision_start_token_id=_int(config, "", "vision_start_token_id", default=151652),
            vision_end_token_id=_int(config, "", "vision_end_token_id", default=151653),
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
        if len(vision.deepstack_layers) > text.num_layers or any(i >= vision.depth for i in vision.deepstack_layers):
            raise CheckpointError(
                f"config.json: deepstack_visual_indexes {list(vision.deepstack_layers)} do not fit a vision tower of "
                f"{vision.depth} and a decoder of {text.num_layers} layers"
            )


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = config.get(name)
    if not isinstance(section, Mapping):
        raise CheckpointError(f"config.json: {name} is missing", remedy="give the folder of a Qwen3-VL checkpoint")
    return section


def _int(section: Mapping[str, Any], where: str, key: str, *, default: int | None = None) -> int:
    value = section.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        path = f"{where}.{key}" if where else key
        raise CheckpointError(f"config.json: {path} is {value!r}, expected a non-negative integer")
    return value


def _check_rope(text: Mapping[str, Any]) -> None:
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "mrope"):
        raise CheckpointError(
            f"config.json: rope type {rope_type!r} is not exported; expected 'default'",
            remedy="remove the rope scaling from config.json, which limits the context to the trained length",
        )
    if rope.get("mrope_interleaved") is False:
        raise CheckpointError("config.json: mrope_interleaved is false; Qwen3-VL interleaves the three axes")
