"""Fixtures that build once a session: the demo engine, and a tiny random checkpoint with its engine."""

from __future__ import annotations

import copy
import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# Before PyTorch is imported: models this small gain nothing from a second thread, and where other processes want the
# cores, two threads that wait for each other were measured to take fifty times as long as one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import configs

if TYPE_CHECKING:
    from engines.bundle import Bundle


@pytest.fixture(scope="session")
def demo_bundle() -> Bundle:
    """Bundle of the demo checkpoint; `build` lowers a copy."""
    from qwen3vl_export.checkpoint import Checkpoint
    from qwen3vl_export.export import make_bundle

    return make_bundle(Checkpoint.open("demo"))


@pytest.fixture(scope="session")
def demo_engine(demo_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Engine of the demo checkpoint for ort-cpu-fp32."""
    return build(demo_bundle, "ort-cpu-fp32", tmp_path_factory.mktemp("demo") / "engine")


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
    values["text_config"]["eos_token_id"] = demo.hf_config["text_config"]["eos_token_id"]
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
    from qwen3vl_export.checkpoint import Checkpoint
    from qwen3vl_export.export import make_bundle

    bundle = make_bundle(Checkpoint.open(str(tiny_checkpoint)))
    return build(bundle, "ort-cpu-fp32", tmp_path_factory.mktemp("tiny-engine") / "engine")


def build(bundle: Bundle, target: str, output: Path) -> Path:
    """Build an engine and leave the bundle as it is: tracing takes seconds, building for a target a fraction of one."""
    from engines import registry
    from engines.build import build_engine

    copy = dataclasses.replace(bundle, graphs={name: model.clone() for name, model in bundle.graphs.items()})
    build_engine(copy, registry.get(target), output)
    return output
