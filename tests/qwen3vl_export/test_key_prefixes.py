"""Weights saved from the base model, and keys that other tools have given a prefix."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from helpers import judge
from helpers.command_line import call
from helpers.damage import altered, rewrite
from helpers.moe_checkpoints import write_experts
from helpers.random_checkpoints import write_random
from qwen3vl_export.checkpoint import EMBEDDING_KEY, HEAD_KEY, Checkpoint
from qwen3vl_export.cli.run import app as run_app
from runtime.errors import CheckpointError

Rename = Callable[[str], str]


def renamed(source: Path, folder: Path, rename: Rename) -> Path:
    """Copy a checkpoint with other keys."""
    copy = altered(source, folder)

    def change(tensors: dict[str, np.ndarray]) -> None:
        values = {rename(key): tensors.pop(key) for key in list(tensors)}
        tensors.update(values)

    rewrite(copy, change)
    return copy


def base(key: str) -> str:
    return key.removeprefix("model.")


def half(key: str) -> str:
    return base(key) if "visual" in key else key


@pytest.mark.judge
@pytest.mark.parametrize("rename", [base, half])
def test_weights_of_the_base_model_are_those_of_transformers(
    tiny_checkpoint: Path, tmp_path: Path, rename: Rename
) -> None:
    from qwen3vl_export.eager import weights_of

    judge.skip_unless(
        rename is base or judge.release() >= (5, 0), "it does not load keys of which some lack the prefix"
    )
    folder = renamed(tiny_checkpoint, tmp_path / "base", rename)
    found, expected = weights_of(Checkpoint.open(str(folder))), judge.load(folder).state_dict()
    plain = weights_of(Checkpoint.open(str(tiny_checkpoint)))
    assert found.keys() == plain.keys() >= {HEAD_KEY}
    for key, value in found.items():
        assert value.equal(expected[key]) and value.equal(plain[key]), key


@pytest.mark.portable
def test_experts_of_the_base_model(tmp_path: Path) -> None:
    whole = write_experts(tmp_path / "whole")
    folder = renamed(whole, tmp_path / "base", base)
    checkpoint = Checkpoint.open(str(folder))
    assert checkpoint.used_keys
    assert checkpoint.entries.keys() == Checkpoint.open(str(whole)).entries.keys()


def test_verify_of_the_base_model(tiny_engine: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = renamed(tiny_checkpoint, tmp_path / "base", base)
    code, out, err = call(run_app, "verify", str(tiny_engine), "--checkpoint", str(folder), "--json")
    assert (code, json.loads(out)["passed"]) == (0, True), err


@pytest.mark.portable
def test_a_base_model_without_a_tied_head_lacks_it(tmp_path: Path) -> None:
    whole = write_random(tmp_path / "whole", tie_word_embeddings=False)
    folder = renamed(whole, tmp_path / "base", base)
    checkpoint = Checkpoint.open(str(folder))
    shape = checkpoint.entries[EMBEDDING_KEY].shape
    assert checkpoint.tensor(HEAD_KEY, shape).shape.dims == shape
    rewrite(folder, lambda tensors: tensors.pop(HEAD_KEY))
    with pytest.raises(CheckpointError, match=r"lm_head.weight is missing\n.*not saved with the base model"):
        Checkpoint.open(str(folder)).tensor(HEAD_KEY, shape)


@pytest.mark.portable
def test_a_tensor_with_and_without_the_prefix_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = altered(tiny_checkpoint, tmp_path / "both")
    key = "model.language_model.norm.weight"
    rewrite(folder, lambda tensors: tensors.update({base(key): tensors[key]}))
    with pytest.raises(CheckpointError, match=f"{key} is there with and without the prefix 'model.'"):
        Checkpoint.open(str(folder)).entries  # noqa: B018


@pytest.mark.portable
@pytest.mark.parametrize(
    ("prefix", "origin"),
    [
        ("module.", "DistributedDataParallel"),
        ("_orig_mod.", "torch.compile"),
        ("base_model.model.", "PEFT"),
        ("model.model.", "training framework"),
    ],
)
def test_prefixes_of_other_tools_are_named(tiny_checkpoint: Path, tmp_path: Path, prefix: str, origin: str) -> None:
    strip = base if prefix == "model.model." else str
    folder = renamed(tiny_checkpoint, tmp_path / "wrapped", lambda key: prefix + strip(key))
    with pytest.raises(CheckpointError, match=rf"begins with '{prefix}'\n.*take the prefix off.*{origin}"):
        Checkpoint.open(str(folder)).entries  # noqa: B018


@pytest.mark.portable
def test_the_layout_of_a_text_model_is_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = renamed(
        tiny_checkpoint,
        tmp_path / "text",
        lambda key: key.replace("model.language_model.", "model.").replace("model.visual.", "vision."),
    )
    with pytest.raises(CheckpointError, match=r"model\.layers.* is of a text model"):
        Checkpoint.open(str(folder)).entries  # noqa: B018
