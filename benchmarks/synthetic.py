"""Synthetic checkpoints of any shape in `configs/models/`, written as a stream, and prompts to calibrate them with.

Speed and memory depend on shapes, not on values, so random weights measure what trained weights would. Keys and shapes
follow from the configuration by formula; a test holds them against transformers' own module.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer

import configs
from benchmarks import options
from engines.weight_shapes import Shape, weight_shapes
from runtime.errors import UsageError
from runtime.model_config import EXPERTS_MODEL_TYPE, ModelConfig

if TYPE_CHECKING:
    import numpy as np


INDEX_NAME = "model.safetensors.index.json"

_TOKENIZER_FILES = (
    "chat_template.jinja",
    "generation_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
)
_ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4}
_TORCH_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_SHARD_BYTES = 5 * 10**9
_STD = 0.02
# One random block serves all tensors, each from its own offset: drawing 2.1e9 normal values took longer than the disk.
_BLOCK_ELEMENTS = 1 << 22
_PIECE_BYTES = 1 << 16


def write(
    folder: Path,
    model: options.Model,
    layers: options.Layers = None,
    sparse: Annotated[bool, typer.Option(help="Write the headers alone; the data are holes in the files.")] = False,
    seed: int = 0,
    dtype: str = "BF16",
    expert_stride: options.ExpertStride = 1,
) -> None:
    """Write a synthetic checkpoint."""
    write_checkpoint(folder, model, sparse=sparse, seed=seed, dtype=dtype, layers=layers, expert_stride=expert_stride)


def hf_config(model_name: str, dtype: str = "BF16", layers: int | None = None) -> dict[str, Any]:
    """Return a `config.json` of a model's shape, with the special token ids of the demo's tokenizer.

    Args:
        model_name: A name of `configs.names("models")`.
        dtype: Safetensors name of the stored dtype.
        layers: Decoder layers, the first ones; all if None.

    Raises:
        UsageError: The model or the dtype is unknown, the model has fewer layers, or its vocabulary is smaller than the
            tokenizer's.
    """
    if model_name not in configs.names("models"):
        raise UsageError(f"{model_name}: no such shape", remedy=f"one of {', '.join(configs.names('models'))}")
    if dtype not in _ITEM_BYTES:
        raise UsageError(f"{dtype}: no such dtype", remedy=f"one of {', '.join(_ITEM_BYTES)}")
    shape = configs.load(f"models/{model_name}")
    config: dict[str, Any] = json.loads((_tokenizer_folder() / "config.json").read_text(encoding="utf-8"))
    tokens = config["text_config"]["vocab_size"]
    if shape["text_config"]["vocab_size"] < tokens:
        raise UsageError(
            f"{model_name}: {shape['text_config']['vocab_size']} tokens do not hold the tokenizer's {tokens}"
        )
    for part in ("text_config", "vision_config"):
        config[part] |= shape[part]
    # Both forms of the rotary embedding, as in the demo's config.json: they must say the same.
    text = config["text_config"]
    text["rope_theta"] = text["rope_parameters"]["rope_theta"]
    text["rope_scaling"] = {key: value for key, value in text["rope_parameters"].items() if key != "rope_theta"}
    if layers is not None:
        if not 1 <= layers <= config["text_config"]["num_hidden_layers"]:
            raise UsageError(
                f"{model_name}: {layers} layers, expected 1 to {config['text_config']['num_hidden_layers']}"
            )
        config["text_config"]["num_hidden_layers"] = layers
    config["model_type"] = shape.get("model_type", config["model_type"])
    if config["model_type"] == EXPERTS_MODEL_TYPE:
        config["architectures"] = ["Qwen3VLMoeForConditionalGeneration"]
        for part in ("text", "vision"):
            config[f"{part}_config"]["model_type"] = f"{EXPERTS_MODEL_TYPE}_{part}"
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = shape["tie_word_embeddings"]
    config["dtype"] = _TORCH_NAMES[dtype]
    return config


def name_of(model_name: str, layers: int | None) -> str:
    """Return what results of a shape are called, which may be cut to its first layers."""
    return model_name if layers is None else f"{model_name}-{layers}-layers"


def tensor_shapes(config: Mapping[str, Any]) -> dict[str, Shape]:
    """Return the shape of every tensor of a Hub checkpoint, by key, in the order of the network.

    Experts are stacked and transposed, as on the Hub: [experts, in, out].

    Args:
        config: Contents of `config.json`.
    """
    shapes = weight_shapes(ModelConfig.from_hf(config))
    return {key: (shape[0], shape[2], shape[1]) if ".mlp.experts." in key else shape for key, shape in shapes.items()}


def write_checkpoint(
    folder: Path,
    model_name: str,
    *,
    sparse: bool = False,
    seed: int = 0,
    dtype: str = "BF16",
    layers: int | None = None,
    expert_stride: int = 1,
) -> dict[str, Any]:
    """Write a Hugging Face folder with random weights and the demo's tokenizer.

    Norm weights are N(1, 0.02), all others N(0, 0.02). Files above 5 GB are split as the Hub does it, with an index.

    Args:
        folder: Where to; created, and files of the same names are replaced.
        model_name: A name of `configs.names("models")`.
        sparse: Write headers only and leave the data as holes (zeros): for exports without weights.
        seed: Seed of the random block.
        dtype: Safetensors name of the stored dtype.
        layers: Decoder layers, the first ones; all if None.
        expert_stride: Write every Nth piece of 64 KiB of the stacked experts, nearly all of a mixture's bytes; holes
            (zeros) are between them. All other tensors, routers among them, are written whole.

    Returns:
        The contents of `config.json`.

    Raises:
        UsageError: The model or the dtype is unknown, the stride is below 1, or there are no experts for it.
    """
    if expert_stride < 1:
        raise UsageError(f"a stride of {expert_stride} between written experts, expected at least 1")
    config = hf_config(model_name, dtype, layers)
    if expert_stride > 1 and config["model_type"] != EXPERTS_MODEL_TYPE:
        raise UsageError(f"{model_name} has no experts to leave holes in", remedy="leave out --expert-stride")
    folder.mkdir(parents=True, exist_ok=True)
    for name in _TOKENIZER_FILES:
        shutil.copyfile(_tokenizer_folder() / name, folder / name)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    shapes = tensor_shapes(config)
    shards = _split(shapes, _ITEM_BYTES[dtype])
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    blocks = None if sparse else _Blocks(seed, dtype)
    for name, keys in zip(names, shards, strict=True):
        _write_shard(folder / name, {key: shapes[key] for key in keys}, dtype, blocks, expert_stride)
    if len(shards) > 1:
        total = sum(math.prod(shape) for shape in shapes.values()) * _ITEM_BYTES[dtype]
        weight_map = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return config


def write_calibration(folder: Path) -> Path:
    """Write calibration prompts about the demo's pictures into `folder`, for targets that ask for some; return it."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted((_tokenizer_folder().parent / "images").glob("*.png")):
        shutil.copyfile(path, folder / path.name)
    (folder / "prompts.txt").write_text("Read the digits.\nHow many digits are there?\n", encoding="utf-8")
    return folder


def sizes(folder: Path) -> dict[str, int]:
    """Return the bytes of a checkpoint's weight files, and how many of them are on the disk: the rest are holes."""
    files = [path.stat() for path in folder.glob("*.safetensors")]
    return {
        "checkpoint_bytes": sum(file.st_size for file in files),
        "disk_bytes": sum(512 * file.st_blocks for file in files),
    }


def has_holes(result: Mapping[str, Any]) -> bool:
    """Tell whether the weights that a measurement used came from a sparse checkpoint."""
    is_used = not result.get("no_weights", False)
    return is_used and "disk_bytes" in result and 2 * result["disk_bytes"] < result["checkpoint_bytes"]


def holes_note(result: Mapping[str, Any]) -> str:
    """Return a sentence about the holes of a measurement's checkpoint, after a space; empty if it has none."""
    if not has_holes(result):
        return ""
    return f" Of the checkpoint's bytes {written(result)} were written; the rest are holes of sparse files (zeros)."


def written(result: Mapping[str, Any]) -> str:
    """Return the share of a sparse checkpoint's bytes that are not holes."""
    return f"{100 * result['disk_bytes'] / result['checkpoint_bytes']:.0f} %"


def _tokenizer_folder() -> Path:
    import qwen3vl_export

    return Path(qwen3vl_export.__file__).parent / "demo" / "checkpoint"


def _split(shapes: Mapping[str, Shape], item_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for key, shape in shapes.items():
        size = math.prod(shape) * item_bytes
        if shards[-1] and filled + size > _SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(key)
        filled += size
    return shards


def _write_shard(
    path: Path, shapes: Mapping[str, Shape], dtype: str, blocks: _Blocks | None, expert_stride: int
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for key, shape in shapes.items():
        end = offset + math.prod(shape) * _ITEM_BYTES[dtype]
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # the format asks for data aligned to 8 bytes
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + offset)
        if blocks is None:
            return
        for key, shape in shapes.items():
            if expert_stride > 1 and ".mlp.experts." in key:
                blocks.write_pieces(file, math.prod(shape), expert_stride)
            else:
                blocks.write(file, math.prod(shape), around_one="norm" in key and key.endswith(".weight"))


class _Blocks:
    """Random values in a stored dtype; each tensor starts at another place of one block."""

    def __init__(self, seed: int, dtype: str) -> None:
        import numpy as np

        self._random = np.random.default_rng(seed)
        self._dtype = dtype
        self._block = self._encode(self._draw(_BLOCK_ELEMENTS))

    def _draw(self, count: int) -> np.ndarray[Any, Any]:
        import numpy as np

        return self._random.standard_normal(count, dtype=np.float32) * np.float32(_STD)

    def _encode(self, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        import numpy as np

        if self._dtype == "BF16":  # the upper half of a float32, cut off: a bias of half a step is of no interest here
            return (values.view(np.uint32) >> 16).astype("<u2")
        return values.astype("<f2" if self._dtype == "F16" else "<f4")

    def write(self, file: BinaryIO, count: int, *, around_one: bool) -> None:
        """Write `count` values to `file`, with mean 1 if `around_one`, else 0."""
        if around_one:
            file.write(self._encode(self._draw(count) + 1).tobytes())
            return
        start = int(self._random.integers(_BLOCK_ELEMENTS))
        while count:
            piece = self._block[start : start + count]
            file.write(memoryview(piece).cast("B"))
            count -= piece.size
            start = 0

    def write_pieces(self, file: BinaryIO, count: int, stride: int) -> None:
        """Write one piece in `stride` of `count` values with mean 0, and move `file` past the others."""
        item_bytes = self._block.itemsize
        piece = _PIECE_BYTES // item_bytes
        begin = file.tell()
        for start in range(0, count, stride * piece):
            file.seek(begin + start * item_bytes)
            self.write(file, min(piece, count - start), around_one=False)
        file.seek(begin + count * item_bytes)
