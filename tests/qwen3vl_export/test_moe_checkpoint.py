"""Layouts of the experts' weights: decided by evidence, read one expert at a time, damage named by layer and expert."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from engines.weights import StackedTensor
from helpers.moe_checkpoints import Arrays, as_in_the_graph, as_on_the_hub, one_by_one, rewritten, write_experts
from qwen3vl_export.checkpoint import Checkpoint
from qwen3vl_export.experts import find_experts
from qwen3vl_export.safetensors_reader import read_header
from runtime.errors import CheckpointError
from runtime.model_config import ExpertsConfig

SCOPE = "model.language_model.layers.2.mlp"
GATE_UP, DOWN = f"{SCOPE}.experts.gate_up_proj", f"{SCOPE}.experts.down_proj"
LAYOUTS: dict[str, Callable[[Arrays], Arrays]] = {"graph": dict, "hub": as_on_the_hub, "one by one": one_by_one}


def experts_of(width: int, hidden: int, num_experts: int = 3) -> Arrays:
    rng = np.random.default_rng(0)
    return {
        GATE_UP: rng.standard_normal((num_experts, 2 * width, hidden), dtype=np.float32),
        DOWN: rng.standard_normal((num_experts, hidden, width), dtype=np.float32),
    }


def find(folder: Path, tensors: Arrays, width: int, hidden: int, num_experts: int = 3) -> dict[str, StackedTensor]:
    save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, folder / "model.safetensors")
    entries = read_header(folder / "model.safetensors").tensors
    found, used = find_experts(entries, SCOPE, ExpertsConfig(num_experts, 1, width, ()), hidden)
    assert used == set(tensors)
    return found


@pytest.mark.portable
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("width", "hidden"),
    [(20, 12), (96, 130), (8, 16), (12, 12)],
    ids=["plain", "wider than a band", "gate_up square", "down square"],
)
def test_every_layout_gives_the_same_weights(tmp_path: Path, layout: str, width: int, hidden: int) -> None:
    expected = experts_of(width, hidden)
    found = find(tmp_path, LAYOUTS[layout](expected), width, hidden)
    for name, want in (("experts.gate_up_proj", expected[GATE_UP]), ("experts.down_proj", expected[DOWN])):
        np.testing.assert_array_equal(found[name].numpy(), want)
        for e, part in enumerate(found[name].parts):
            np.testing.assert_array_equal(part.numpy(), want[e])
            assert f"layers.2.mlp.experts.{e}." in str(part.name)


@pytest.mark.portable
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_stored_types_are_cast(tmp_path: Path, dtype: str) -> None:
    import torch
    from safetensors.torch import save_file as save_torch

    weights = {key: torch.from_numpy(value).to(getattr(torch, dtype)) for key, value in experts_of(20, 12).items()}
    save_torch({k: v.transpose(1, 2).contiguous() for k, v in weights.items()}, tmp_path / "model.safetensors")
    entries = read_header(tmp_path / "model.safetensors").tensors
    found, _ = find_experts(entries, SCOPE, ExpertsConfig(3, 1, 20, ()), 12)
    np.testing.assert_array_equal(found["experts.down_proj"].numpy(), weights[DOWN].float().numpy())


@pytest.mark.portable
def test_one_transposed_and_the_other_not_is_refused(tmp_path: Path) -> None:
    tensors = experts_of(20, 12)
    tensors[DOWN] = tensors[DOWN].transpose(0, 2, 1)
    with pytest.raises(CheckpointError, match="one is transposed, the other is not"):
        find(tmp_path, tensors, 20, 12)


@pytest.mark.portable
def test_wrong_shapes_and_numbers_of_experts_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gate_up_proj holds 3 experts, config.json implies 4"):
        find(tmp_path, experts_of(20, 12), 20, 12, num_experts=4)
    with pytest.raises(CheckpointError, match=r"has shape \[3, 40, 12\], config.json implies \[3, 36, 12\] or"):
        find(tmp_path, experts_of(20, 12), 18, 12)
    with pytest.raises(CheckpointError, match=r"layers.2.mlp.experts.down_proj is missing"):
        find(tmp_path, {GATE_UP: experts_of(20, 12)[GATE_UP]}, 20, 12)


@pytest.mark.portable
def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    tensors = one_by_one(experts_of(20, 12))
    del tensors[f"{SCOPE}.experts.1.up_proj.weight"]
    with pytest.raises(CheckpointError, match=r"layers.2.mlp.experts.1.up_proj.weight is missing.* implies 3 experts"):
        find(tmp_path, tensors, 20, 12)


@pytest.mark.portable
def test_mixed_dtypes_between_experts_are_named(tmp_path: Path) -> None:
    tensors = one_by_one(experts_of(20, 12))
    tensors[f"{SCOPE}.experts.2.down_proj.weight"] = tensors[f"{SCOPE}.experts.2.down_proj.weight"].astype(np.float16)
    with pytest.raises(
        CheckpointError, match=r"layers.2.mlp.experts.2.down_proj.weight is F16, that of expert 0 is F32"
    ):
        find(tmp_path, tensors, 20, 12)


@pytest.mark.portable
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_weight_that_is_no_number_is_named(tmp_path: Path, layout: str, value: float) -> None:
    tensors = experts_of(20, 12)
    tensors[GATE_UP][1, 33, 5] = value
    found = find(tmp_path, LAYOUTS[layout](tensors), 20, 12)
    # Row 33 of gate and up is row 13 of up; as stored, the rows of the Hub's layout are columns here.
    place = {"graph": "row 33, column 5", "hub": "row 5, column 33", "one by one": "row 13, column 5"}[layout]
    with pytest.raises(CheckpointError, match=rf"layers.2.mlp.experts.1.*(nan|inf) at {place}"):
        found["experts.gate_up_proj"].numpy()
    found["experts.down_proj"].numpy()


@pytest.mark.portable
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_does_not_grow_with_the_experts(tmp_path: Path, layout: str) -> None:
    expert_bytes = 4 * 2 * 256 * 192
    peaks = []
    for num_experts in (2, 16):
        found = find(tmp_path, LAYOUTS[layout](experts_of(256, 192, num_experts)), 256, 192, num_experts)
        tracemalloc.start()
        for _ in found["experts.gate_up_proj"].blocks():
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + expert_bytes / 4


@pytest.mark.portable
def test_left_over_experts_are_named(tmp_path: Path) -> None:
    source = write_experts(tmp_path / "source", layout=as_in_the_graph)

    def one_more(tensors: Arrays) -> Arrays:
        split = one_by_one(tensors)
        return split | {key.replace(".experts.6.", ".experts.7."): v for key, v in split.items() if ".2.mlp" in key}

    checkpoint = Checkpoint.open(str(rewritten(source, tmp_path / "more", one_more)))
    used = set(load_file(rewritten(source, tmp_path / "same", one_by_one) / "model.safetensors"))
    with pytest.raises(CheckpointError, match=r"3 keys belong to no part.*layers.2.mlp.experts.7.down_proj.weight"):
        checkpoint.check_keys(used)
