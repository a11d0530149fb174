"""The digest of a checkpoint's weights: the same in other files, another for other numbers of the same shapes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from helpers.random_checkpoints import add_assets
from qwen3vl_export.checkpoint import Checkpoint
from qwen3vl_export.weights_digest import SAMPLE_BYTES

pytestmark = pytest.mark.portable


def written(folder: Path, like: Path, *shards: dict[str, Any]) -> Checkpoint:
    """A checkpoint whose tensors are in these files."""
    folder.mkdir()
    (folder / "config.json").write_bytes((like / "config.json").read_bytes())
    names = [f"model-{i}.safetensors" for i in range(len(shards))]
    for name, tensors in zip(names, shards, strict=True):
        save_file(tensors, folder / name, metadata={"format": "pt"})
    weight_map = {key: name for name, tensors in zip(names, shards, strict=True) for key in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return Checkpoint.open(str(add_assets(folder)))


def digest(checkpoint: Checkpoint) -> str:
    return str(checkpoint.describe()["weights_sha256"])


def test_it_does_not_depend_on_the_files(tiny_checkpoint: Path, tmp_path: Path) -> None:
    tensors = load_file(tiny_checkpoint / "model.safetensors")
    keys = sorted(tensors)
    halves = [{key: tensors[key] for key in keys[start::2]} for start in (0, 1)]
    whole = Checkpoint.open(str(tiny_checkpoint))
    assert digest(written(tmp_path / "halves", tiny_checkpoint, *halves)) == digest(whole)
    assert len(digest(whole)) == 64


@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_other_numbers_of_the_same_shapes_have_another(place: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    tensors = load_file(tiny_checkpoint / "model.safetensors")
    key = max(tensors, key=lambda name: tensors[name].nbytes)
    values = tensors[key].reshape(-1)
    assert values.nbytes > 3 * SAMPLE_BYTES
    written(tmp_path / "same", tiny_checkpoint, dict(tensors))
    values[{"first": 0, "middle": len(values) // 2, "last": -1}[place]] += np.float32(1)
    written(tmp_path / "other", tiny_checkpoint, tensors)
    same, other = (Checkpoint.open(str(tmp_path / name)) for name in ("same", "other"))
    assert same.describe()["weight_files"] == other.describe()["weight_files"], "the headers are the same"
    assert digest(same) == digest(Checkpoint.open(str(tiny_checkpoint)))
    assert digest(same) != digest(other)


def test_small_tensors_are_read_whole(tiny_checkpoint: Path, tmp_path: Path) -> None:
    tensors = load_file(tiny_checkpoint / "model.safetensors")
    key = "model.language_model.norm.weight"
    tensors[key][7] += np.float32(1)
    assert digest(written(tmp_path / "other", tiny_checkpoint, tensors)) != digest(
        Checkpoint.open(str(tiny_checkpoint))
    )
