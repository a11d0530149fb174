"""The synthetic checkpoints have the keys, shapes and files of real ones; test_benchmark_reports.py has the rest."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

import configs
from benchmarks import synthetic
from helpers import judge
from runtime.errors import UsageError


def reference_shapes(model_name: str) -> dict[str, tuple[int, ...]]:
    """Shapes of transformers' own module, built without memory."""
    import torch

    values = synthetic.hf_config(model_name)
    with torch.device("meta"):
        model = judge.new_model(values)
    shapes = {key: judge.in_graph_layout(key, tuple(value.shape)) for key, value in model.state_dict().items()}
    # The Hub's checkpoints hold experts as [experts, in, out].
    shapes |= {key: (shape[0], shape[2], shape[1]) for key, shape in shapes.items() if ".mlp.experts." in key}
    if values["tie_word_embeddings"]:
        shapes.pop("lm_head.weight")
    return shapes


@pytest.mark.judge
@pytest.mark.parametrize("model_name", configs.names("models"))
def test_keys_and_shapes_equal_transformers(model_name: str) -> None:
    assert synthetic.tensor_shapes(synthetic.hf_config(model_name)) == reference_shapes(model_name)


@pytest.mark.judge
def test_transformers_loads_the_values_that_were_written(tmp_path: Path) -> None:
    synthetic.write_checkpoint(tmp_path, "tiny")
    model = judge.load(tmp_path, "bfloat16")
    weights = model.state_dict()
    norm = weights["model.language_model.layers.0.input_layernorm.weight"].float()
    projection = weights["model.language_model.layers.0.mlp.up_proj.weight"].float()
    assert abs(float(norm.mean()) - 1) < 0.02 and 0.01 < float(norm.std()) < 0.03
    assert abs(float(projection.mean())) < 0.002 and 0.018 < float(projection.std()) < 0.022
    assert len(judge.processor(tmp_path).tokenizer) <= model.config.text_config.vocab_size


@pytest.mark.portable
def test_seed_decides_the_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        synthetic.write_checkpoint(tmp_path / name, "tiny", seed=seed)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


@pytest.mark.portable
@pytest.mark.parametrize("dtype", ["F32", "F16"])
def test_other_dtypes_are_readable(tmp_path: Path, dtype: str) -> None:
    from safetensors.numpy import load_file

    config = synthetic.write_checkpoint(tmp_path, "tiny", dtype=dtype)
    tensors = load_file(tmp_path / "model.safetensors")
    assert {key: value.shape for key, value in tensors.items()} == synthetic.tensor_shapes(config)
    assert {str(value.dtype) for value in tensors.values()} == {{"F32": "float32", "F16": "float16"}[dtype]}


def test_large_checkpoint_is_sharded_and_sparse(tmp_path: Path) -> None:
    from qwen3vl_export.checkpoint import Checkpoint

    config = synthetic.write_checkpoint(tmp_path, "qwen3-vl-8b", sparse=True)
    shards = sorted(tmp_path.glob("*.safetensors"))
    index = json.loads((tmp_path / synthetic.INDEX_NAME).read_text())
    assert set(index["weight_map"].values()) == {path.name for path in shards} and len(shards) > 1
    assert max(path.stat().st_size for path in shards) < 5.1e9
    assert sum(path.stat().st_blocks * 512 for path in shards) < 1 << 20
    shapes = synthetic.tensor_shapes(config)
    assert index["metadata"]["total_size"] == 2 * sum(math.prod(shape) for shape in shapes.values())
    assert {key: entry.shape for key, entry in Checkpoint.open(str(tmp_path)).entries.items()} == shapes


@pytest.mark.portable
def test_experts_with_holes(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    synthetic.write_checkpoint(tmp_path / "whole", "tiny-moe", dtype="F32")
    synthetic.write_checkpoint(tmp_path / "holes", "tiny-moe", dtype="F32", expert_stride=3)
    whole, holes = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "holes"))
    piece = (1 << 16) // 4
    for key, tensor in holes.items():
        assert tensor.shape == whole[key].shape
        shares = [(part != 0).mean() for part in np.split(tensor.ravel(), range(piece, tensor.size, piece))]
        expected = [".mlp.experts." not in key or index % 3 == 0 for index in range(len(shares))]
        assert [share > 0.9 for share in shares] == expected, key
    sizes = synthetic.sizes(tmp_path / "holes")
    assert sizes["checkpoint_bytes"] == (tmp_path / "whole" / "model.safetensors").stat().st_size
    with pytest.raises(UsageError, match="stride of 0"):
        synthetic.write_checkpoint(tmp_path, "tiny-moe", expert_stride=0)
    with pytest.raises(UsageError, match="tiny has no experts"):
        synthetic.write_checkpoint(tmp_path, "tiny", expert_stride=2)


@pytest.mark.portable
def test_the_first_layers_of_a_shape() -> None:
    whole, cut = (synthetic.tensor_shapes(synthetic.hf_config("tiny-moe", layers=n)) for n in (None, 3))
    left_out = ("model.language_model.layers.3.", "model.language_model.layers.4.")
    assert cut == {key: shape for key, shape in whole.items() if not key.startswith(left_out)} != whole
    for layers in (0, 6):
        with pytest.raises(UsageError, match=f"{layers} layers, expected 1 to 5"):
            synthetic.hf_config("tiny-moe", layers=layers)


@pytest.mark.portable
def test_unknown_names_are_refused() -> None:
    with pytest.raises(UsageError, match="no such shape"):
        synthetic.hf_config("qwen3-vl-3b")
    with pytest.raises(UsageError, match="no such dtype"):
        synthetic.hf_config("tiny", "Q4")
