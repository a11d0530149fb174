"""Fixtures that build once a session: the demo engine, and a tiny random checkpoint with its engine."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

import configs


@pytest.fixture(scope="session")
def demo_engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Engine of the demo checkpoint for ort-cpu-fp32."""
    return _build("demo", tmp_path_factory.mktemp("demo") / "engine")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint of the tiny shape, written by transformers itself; head_dim differs from hidden / heads."""
    import torch
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    from qwen3vl_export.checkpoint import Checkpoint

    folder = tmp_path_factory.mktemp("tiny")
    demo = Checkpoint.open("demo")
    ids = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    values = copy.deepcopy(configs.load("models/tiny")) | {key: demo.hf_config[key] for key in ids}
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**values)).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
        else:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json"):
        (folder / name).write_bytes((demo.folder / name).read_bytes())
    return folder


@pytest.fixture(scope="session")
def tiny_engine(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Engine of the tiny checkpoint for ort-cpu-fp32."""
    return _build(str(tiny_checkpoint), tmp_path_factory.mktemp("tiny-engine") / "engine")


def _build(source: str, output: Path) -> Path:
    from engines import registry
    from engines.build import build_engine
    from qwen3vl_export.checkpoint import Checkpoint
    from qwen3vl_export.export import make_bundle

    build_engine(make_bundle(Checkpoint.open(source)), registry.get("ort-cpu-fp32"), output)
    return output
