"""The files of a checkpoint: the layout safetensors requires, which files win, and a download that fails."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import huggingface_hub
import judge
import numpy as np
import pytest
from damage import altered, rewrite
from safetensors.numpy import load_file, save_file

from qwen3vl_export import safetensors_reader
from qwen3vl_export.checkpoint import EMBEDDING_KEY, HEAD_KEY, Checkpoint
from qwen3vl_export.safetensors_reader import read_header
from runtime.errors import CapacityError, CheckpointError


def safetensors_file(path: Path, offsets: list[Any], num_bytes: int, shape: Any = (2,)) -> Path:
    """Write a file of one F32 tensor for each pair of offsets."""
    header = {str(i): {"dtype": "F32", "shape": shape, "data_offsets": pair} for i, pair in enumerate(offsets)}
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(num_bytes))
    return path


@pytest.mark.portable
@pytest.mark.parametrize(
    ("offsets", "num_bytes", "words"),
    [
        ([[-8, 0], [0, 8]], 8, "expected a whole number of 0 to .*, found -8"),
        ([[0, 8.0]], 8, "expected a whole number of 0 to .*, found 8.0"),
        ([[0, 8], [4, 12]], 12, "1 begins at byte .*, what lies before it ends at byte"),
        ([[0, 8], [0, 8]], 8, "1 begins at byte"),
        ([[0, 8], [12, 20]], 20, "1 begins at byte"),
        ([[4, 12]], 12, "0 begins at byte"),
        ([[0, 8]], 9, "the tensors end at byte .*, the file has"),
        ([[0, 8], [8, 16]], 15, "1 ends at byte .*, the file has"),
    ],
)
def test_offsets_that_safetensors_refuses(tmp_path: Path, offsets: list[Any], num_bytes: int, words: str) -> None:
    path = safetensors_file(tmp_path / "model.safetensors", offsets, num_bytes)
    with pytest.raises(Exception, match="while deserializing header"):
        load_file(path)
    with pytest.raises(CheckpointError, match=words):
        read_header(path)


@pytest.mark.portable
def test_a_negative_shape_is_refused(tmp_path: Path) -> None:
    path = safetensors_file(tmp_path / "model.safetensors", [[0, 8]], 8, shape=(-1, -2))
    with pytest.raises(CheckpointError, match=r"expected a whole number of 0 to .*, found -1"):
        read_header(path)


@pytest.mark.portable
def test_tensors_in_any_order_and_empty_ones_are_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"b": np.ones(3, np.float32), "a": np.ones((2, 2), np.float16), "none": np.ones((0, 4), np.int8)}, path)
    shapes = {key: entry.shape for key, entry in read_header(path).tensors.items()}
    assert shapes == {"a": (2, 2), "b": (3,), "none": (0, 4)}


@pytest.mark.judge
def test_a_single_file_wins_over_an_index(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """As in transformers, whose answer is looked at here too."""
    folder = altered(tiny_checkpoint, tmp_path / "checkpoint")
    tensors = load_file(folder / "model.safetensors")
    other = {key: values + 1 for key, values in tensors.items()}
    save_file(other, folder / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    weight_map = dict.fromkeys(other, "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    key = "model.language_model.norm.weight"
    reference = judge.load(folder).model.language_model.norm.weight
    np.testing.assert_array_equal(reference.detach().float().numpy(), tensors[key])
    assert list(Checkpoint.open(str(folder)).headers) == ["model.safetensors"]


@pytest.mark.portable
@pytest.mark.parametrize("changed", [False, True])
def test_copy_of_the_tied_head_in_another_dtype(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: bool
) -> None:
    """Blocks of half the length, several of them, hold the same elements."""
    monkeypatch.setattr(safetensors_reader, "BLOCK_BYTES", 4096)
    folder = altered(tiny_checkpoint, tmp_path / "checkpoint")

    def store(tensors: dict[str, np.ndarray]) -> None:
        tensors[EMBEDDING_KEY] = tensors[EMBEDDING_KEY].astype(np.float16)
        tensors[HEAD_KEY] = tensors[EMBEDDING_KEY].astype(np.float32)
        tensors[HEAD_KEY][-1, -1] += changed

    rewrite(folder, store)
    checkpoint = Checkpoint.open(str(folder))
    used = set(checkpoint.entries) - {HEAD_KEY}
    if changed:
        with pytest.raises(CheckpointError, match=f"{HEAD_KEY} differs from {EMBEDDING_KEY}"):
            checkpoint.check_keys(used)
    else:
        checkpoint.check_keys(used)


@pytest.mark.portable
@pytest.mark.parametrize("is_chained", [False, True])
def test_a_full_disk_while_downloading(monkeypatch: pytest.MonkeyPatch, is_chained: bool) -> None:
    def download(*_: object, **__: object) -> str:
        full = OSError(errno.ENOSPC, "No space left on device")
        if is_chained:
            raise RuntimeError("download failed") from full
        raise full

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(CapacityError, match=r"someone/model@main: the disk became full"):
        Checkpoint.open("someone/model@main")


@pytest.mark.portable
def test_a_download_that_fails_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: object, **__: object) -> str:
        raise ConnectionError("unreachable")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(CheckpointError, match=r"neither a folder here nor on the Hub \(ConnectionError: unreachable\)"):
        Checkpoint.open("someone/model")
