"""Open a checkpoint: a Hugging Face folder, a Hub id, or the demo that travels with this package."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from engines.disk import full_disk_in
from engines.quantize.tensors import row_chunks
from engines.weight_shapes import EMBEDDING_KEY, weight_shapes
from engines.weights import StackedTensor, StreamedTensor
from qwen3vl_export.assets import check_assets, read_assets
from qwen3vl_export.experts import find_experts
from qwen3vl_export.formats import COMPLETE, INDEX, SINGLE, check_folder, check_weights, refuse_file
from qwen3vl_export.hub import quiet_hub
from qwen3vl_export.key_prefixes import as_in_graph
from qwen3vl_export.names import shown_name
from qwen3vl_export.quantized import join_parts
from qwen3vl_export.quantized.parts import QuantizedEntry
from qwen3vl_export.safetensors_reader import FileHeader, TensorEntry, read_header
from qwen3vl_export.sources import HUB_ID, SHIPPED, local_path, shipped_folder
from qwen3vl_export.weights_digest import digest_of
from runtime.errors import CapacityError, CheckpointError
from runtime.files import MAX_INDEX_BYTES, MAX_SMALL_FILE_BYTES, MAX_TOKENIZER_BYTES, is_folder, read_json_object
from runtime.model_config import ModelConfig

HEAD_KEY = "lm_head.weight"

# Keys that some checkpoints hold and no graph needs: buffers that are recomputed from config.json.
IGNORED_KEYS = (re.compile(r".*rotary_(pos_)?emb\.(original_)?inv_freq"),)

_HUB_FILES = ("*.json", "*.jinja", "*.safetensors", "*.txt")
_MOST_BYTES = {INDEX: MAX_INDEX_BYTES, "tokenizer.json": MAX_TOKENIZER_BYTES}
_MAX_LISTED = 5
_DOWNLOAD_AGAIN = "the file is damaged: download it again"


@dataclass(frozen=True)
class Checkpoint:
    """A folder with `config.json`, safetensors and the processor's files.

    Attributes:
        folder: Where it lies.
        name: What the user called it.
        revision: The Hub commit, if it came from there.
    """

    folder: Path
    name: str
    revision: str | None = None

    @classmethod
    def open(cls, source: str, cache_dir: Path | None = None) -> Checkpoint:
        """Open `source`: a folder, `owner/name[@revision]` of the Hub, or `demo`. A folder that exists wins.

        Args:
            source: Its name.
            cache_dir: Where downloads are kept; by default in the Hub's own cache.

        Raises:
            CheckpointError: There is no such folder, this user may not look at it, it is something else than a
                checkpoint, or the Hub cannot be reached.
            CapacityError: The disk is too small for the download.
        """
        folder = local_path(source)
        if folder is not None and is_folder(folder, error=CheckpointError):
            check_folder(folder)
            return cls(folder, source)
        if source in SHIPPED:
            return cls(shipped_folder(source), source)
        if folder is not None and os.path.lexists(folder):
            refuse_file(folder)
        match = HUB_ID.fullmatch(source)
        if match is None:
            raise CheckpointError(
                f"{shown_name(source)}: no such folder",
                remedy="give a Hugging Face folder, a Hub id such as Qwen/Qwen3-VL-2B-Instruct, or 'demo'",
            )
        return cls._download(source, match["repo"], match["revision"], cache_dir)

    @classmethod
    def _download(cls, source: str, repo: str, revision: str | None, cache_dir: Path | None) -> Checkpoint:
        import huggingface_hub

        try:
            with quiet_hub():
                path = huggingface_hub.snapshot_download(
                    repo, revision=revision, allow_patterns=list(_HUB_FILES), cache_dir=cache_dir
                )
        except Exception as error:  # the Hub client raises errors of several libraries
            full = full_disk_in(error, f"{source}: the Hub's cache")
            if full is not None:
                raise CapacityError(full.message, remedy=f"{full.remedy} for the Hub's cache, with HF_HOME") from error
            reason = " ".join(str(error).split())  # some are paragraphs
            raise CheckpointError(
                f"{source}: neither a folder here nor on the Hub ({type(error).__name__}: {reason})",
                remedy="check the spelling and the connection, or download the folder and give its path",
            ) from error
        folder = Path(path)
        check_folder(folder)
        return cls(folder, source, folder.name)

    @property
    def short_name(self) -> str:
        """A name for folders: the last part of `name`."""
        return Path(self.name).name or self.folder.resolve().name

    @cached_property
    def hf_config(self) -> dict[str, Any]:
        """Contents of `config.json`."""
        return self.read_json("config.json")

    @cached_property
    def config(self) -> ModelConfig:
        """Shape of the model."""
        return ModelConfig.from_hf(self.hf_config)

    def read_json(self, name: str) -> dict[str, Any]:
        """Read a JSON object from a file of the folder.

        Raises:
            CheckpointError: It is missing, no JSON object, or larger than any checkpoint's.
        """
        path = self.folder / name
        remedy = COMPLETE if not os.path.lexists(path) else _DOWNLOAD_AGAIN
        most = _MOST_BYTES.get(name, MAX_SMALL_FILE_BYTES)
        return read_json_object(path, max_bytes=most, error=CheckpointError, remedy=remedy)

    @cached_property
    def headers(self) -> dict[str, FileHeader]:
        """Header of every weight file, by file name.

        Raises:
            CheckpointError: A file is missing, truncated or unreadable, or the index contradicts the files.
        """
        check_weights(self.folder)
        if os.path.lexists(self.folder / SINGLE):  # wins over an index, as in transformers
            return {SINGLE: read_header(self.folder / SINGLE)}
        weight_map = self.read_json(INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map or not all(type(n) is str for n in weight_map.values()):
            raise CheckpointError(f"{self.folder / INDEX}: no weight_map of file names", remedy=_DOWNLOAD_AGAIN)
        names = sorted(set(weight_map.values()))
        if any(Path(name).name != name or name in ("", "..") for name in names):
            raise CheckpointError(
                f"{self.folder / INDEX}: a shard lies outside of the folder",
                remedy="put all shards beside the index and name them without a folder",
            )
        headers = {name: read_header(self.folder / name) for name in names}
        for key, name in weight_map.items():
            if key not in headers[name].tensors:
                raise CheckpointError(
                    f"{self.folder / name}: the index promises {shown_name(key)}, which is not there",
                    remedy=_DOWNLOAD_AGAIN,
                )
        return headers

    @cached_property
    def entries(self) -> dict[str, TensorEntry | QuantizedEntry]:
        """Every tensor of the checkpoint by key; the parts of a quantised weight are one entry, under the weight's key.

        Keys have the prefix of the whole model, also where the base model was saved (qwen3vl_export/key_prefixes.py).

        Raises:
            CheckpointError: A key is in two files, keys have a prefix that transformers does not map, or weights are
                quantised in a format that is not read.
        """
        entries: dict[str, TensorEntry] = {}
        for name, header in self.headers.items():
            for key, entry in header.tensors.items():
                if key in entries:
                    raise CheckpointError(
                        f"{self.folder / name}: {shown_name(key)} is also in {entries[key].path.name}",
                        remedy="the shards are of different checkpoints: download all of them again",
                    )
                entries[key] = entry
        return join_parts(as_in_graph(entries, self.folder), self.hf_config, self.folder)

    def tensor(self, key: str, shape: Iterable[int], *, view: tuple[int, ...] | None = None) -> StreamedTensor:
        """Refer to one tensor, to be read later, and dequantised if it is quantised.

        Args:
            key: The checkpoint key.
            shape: The shape that config.json implies.
            view: The shape to show it in.

        Raises:
            CheckpointError: It is missing, or of another shape or dtype.
        """
        entry = self.entries.get(key)
        if entry is None:
            is_base = key == HEAD_KEY and not self.config.text.tie_word_embeddings
            raise CheckpointError(
                f"{self.folder}: {key} is missing",
                remedy="the head was not saved with the base model (AutoModel): save the whole one, "
                "Qwen3VLForConditionalGeneration; or set tie_word_embeddings in config.json if it is the embedding"
                if is_base
                else "the weights do not belong to this config.json, or a shard is lost",
            )
        if entry.shape != tuple(shape):
            raise CheckpointError(
                f"{entry.path}: {key} has shape {list(entry.shape)}, config.json implies {list(shape)}",
                remedy="the weights do not belong to this config.json: take both from one checkpoint",
            )
        return entry.tensor(key, view)

    def experts(self, layer: int, scope: str) -> tuple[dict[str, StackedTensor], set[str]]:
        """Refer to the experts of a layer, by their names in the layer; also the keys they are read from.

        Args:
            layer: Number of the layer.
            scope: Key of its feed-forward network.

        Raises:
            CheckpointError: An expert is missing, of another shape or dtype, or stored in a layout that is not read.
        """
        text = self.config.text
        config = text.experts_of(layer)
        assert config is not None, f"layer {layer} is dense"
        return find_experts(self.entries, scope, config, text.hidden_size)

    @property
    def weights(self) -> Mapping[str, StreamedTensor]:
        """All weights by the names that the model has for them, to be read later.

        Raises:
            CheckpointError: As `tensor` and `experts`.
        """
        return self._weights_and_keys[0]

    @cached_property
    def _weights_and_keys(self) -> tuple[dict[str, StreamedTensor], set[str]]:
        """The weights, and the keys that they are read from."""
        weights: dict[str, StreamedTensor] = {}
        used: set[str] = set()
        text = self.config.text
        for layer in range(text.num_layers):
            if text.experts_of(layer) is not None:
                scope = f"model.language_model.layers.{layer}.mlp"
                experts, keys = self.experts(layer, scope)
                weights |= {f"{scope}.{name}": tensor for name, tensor in experts.items()}
                used |= keys
        for key, shape in weight_shapes(self.config).items():
            if ".mlp.experts." not in key:  # which have several layouts
                weights[key] = self.tensor(key, shape)
                used.add(key)
        return weights, used

    @cached_property
    def used_keys(self) -> frozenset[str]:
        """Keys of all weights that the model takes; nothing about the weights is left to be refused after tracing.

        The headers tell in milliseconds what tracing would find in seconds.

        Raises:
            CheckpointError: As `weights` and `check_keys`.
        """
        _, used = self._weights_and_keys
        self.check_keys(used)
        return frozenset(used)

    def check_keys(self, used: Iterable[str]) -> None:
        """Raise unless every key is used, or on the ignore list, or the tied head's copy of the embedding.

        Raises:
            CheckpointError: Keys are left over (named), or the tied copy differs from the embedding.
        """
        left = set(self.entries).difference(used)
        if self.config.text.tie_word_embeddings and HEAD_KEY in left:
            self._check_tied_head()
            left.remove(HEAD_KEY)
        left = {key for key in left if not any(pattern.fullmatch(key) for pattern in IGNORED_KEYS)}
        if left:
            listed = ", ".join(map(shown_name, sorted(left)[:_MAX_LISTED])) + (", …" if len(left) > _MAX_LISTED else "")
            raise CheckpointError(
                f"{self.folder}: {len(left)} keys belong to no part of the model: {listed}",
                remedy="an export that drops weights would be silently wrong; check that config.json fits the weights",
            )

    def _check_tied_head(self) -> None:
        head, embedding = self.entries[HEAD_KEY], self.entries[EMBEDDING_KEY]
        # Chunks of as many rows from both, however each is stored: the blocks of a bf16 and a float32 tensor differ.
        chunks = row_chunks(head.tensor(HEAD_KEY)), row_chunks(embedding.tensor(EMBEDDING_KEY))
        if head.shape != embedding.shape or not all(map(np.array_equal, *chunks)):
            raise CheckpointError(
                f"{head.path}: {HEAD_KEY} differs from {EMBEDDING_KEY}, but config.json ties them",
                remedy="set tie_word_embeddings to false in config.json if the head was trained apart",
            )

    def assets(self) -> dict[str, bytes]:
        """Read the small files that a runtime needs, by the name they get in an engine.

        Raises:
            CheckpointError: A file is missing, or not what the runtime reads, or belongs to another model.
        """
        return dict(self._assets)

    @cached_property
    def _assets(self) -> dict[str, bytes]:
        assets = read_assets(self.folder, self.read_json)
        check_assets(assets, self.config, self.folder)
        return assets

    def describe(self) -> Mapping[str, Any]:
        """Return what an engine's manifest says of its source."""
        files = {name: {"num_bytes": h.num_bytes, "header_sha256": h.sha256} for name, h in self.headers.items()}
        tensors = {key: entry for header in self.headers.values() for key, entry in header.tensors.items()}
        digest = digest_of(tensors)
        return {"name": self.name, "revision": self.revision, "weights_sha256": digest, "weight_files": files}
