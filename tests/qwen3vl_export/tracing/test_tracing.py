"""Pieces traced with fixed example sizes are those that symbolic sizes give, and a size that got into one is caught."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch

import configs
from helpers import ROOT
from qwen3vl_export import modeling
from qwen3vl_export.tracing import pieces
from qwen3vl_export.tracing.pieces import Piece, Pieces, trace_pieces
from runtime.model_config import ModelConfig

pytestmark = pytest.mark.portable
DENSE = ModelConfig.from_hf({"model_type": "qwen3_vl", **configs.load("models/tiny")})
EXPERTS = ModelConfig.from_hf(configs.load("models/tiny-moe"))


def listing(function: ir.Function) -> list[tuple[Any, ...]]:
    """Return the nodes but for constants, with the values of those in their places."""
    constants: dict[ir.Value, Any] = {}
    numbers = {value: str(value.name) for value in function.inputs}
    lines = []
    for node in function:
        if node.op_type == "Constant":
            constants[node.outputs[0]] = ("constant", node.attributes["value"].value.numpy().tolist())
            continue
        inputs = [None if value is None else constants.get(value) or numbers[value] for value in node.inputs]
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        lines.append((node.domain, node.op_type, inputs, attributes))
        for value in node.outputs:
            numbers[value] = f"%{len(numbers)}"
    return lines


def with_symbols(export: Callable[..., Any]) -> Callable[..., Any]:
    """Give each size of the example that is dynamic a symbol of its own, as `torch.export` is meant to be used."""

    def dims(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            primes = pieces.EXAMPLE_SIZES.values()
            found = {i: torch.export.Dim.AUTO for i, n in enumerate(value.shape) if any(n % p == 0 for p in primes)}
            return found or None
        if isinstance(value, dict):
            return {key: dims(each) for key, each in value.items()}
        return type(value)(dims(each) for each in value)

    return lambda module, args, **options: export(module, args, dynamic_shapes=dims(args), **options)


@pytest.fixture(scope="module")
def with_experts() -> Pieces:
    """All that a model may have: the layers with experts beside those of a dense model."""
    return trace_pieces(EXPERTS)


@pytest.mark.parametrize("config", [pytest.param(DENSE, marks=pytest.mark.slow), EXPERTS], ids=["dense", "experts"])
def test_symbolic_sizes_give_the_same_functions(
    config: ModelConfig, with_experts: Pieces, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed = with_experts if config is EXPERTS else trace_pieces(config)
    monkeypatch.setattr(torch.export, "export", with_symbols(torch.export.export))
    symbolic = trace_pieces(config)
    names = [field.name for field in dataclasses.fields(fixed)]
    traced = [name for name in names if isinstance(getattr(fixed, name), Piece)]
    assert len(traced) == 9 + (config is EXPERTS)
    for name in traced:
        ours, theirs = getattr(fixed, name), getattr(symbolic, name)
        assert ours.parameters == theirs.parameters
        assert listing(ours.function) == listing(theirs.function), name


def test_the_same_model_gives_the_same_text(with_experts: Pieces) -> None:
    first, second = with_experts, trace_pieces(EXPERTS)
    for field in dataclasses.fields(first):
        piece = getattr(first, field.name)
        if isinstance(piece, Piece):
            other = getattr(second, field.name).function
            assert ir.to_proto(piece.function).SerializeToString() == ir.to_proto(other).SerializeToString()


def reshaped(merger: Any, x: torch.Tensor) -> torch.Tensor:
    return x.reshape(len(x), -1).reshape(-1, merger.size)


def with_patches(merger: Any, x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[1], merger.size // 4).reshape(-1, merger.size)


def shifted(merger: Any, x: torch.Tensor) -> torch.Tensor:
    return (x + torch.arange(x.shape[1])[:, None]).reshape(-1, merger.size)


@pytest.mark.parametrize(
    ("change", "letters"),
    [(reshaped, "I · P"), pytest.param(with_patches, "I · P", marks=pytest.mark.slow), (shifted, "P")],
    ids=lambda value: str(value)[:20],
)
def test_a_size_that_got_into_a_function_is_caught(
    change: Callable[[Any, torch.Tensor], torch.Tensor], letters: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fixing(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.linear_fc2(self.linear_fc1(change(self, x)))[None]

    monkeypatch.setattr(modeling.PatchMerger, "forward", fixing)
    with pytest.raises(AssertionError, match=f"the trace fixed {letters}: a constant has"):
        trace_pieces(DENSE)


EXPORT = """
import sys
for name in {hidden}:
    sys.modules[name] = None
from pathlib import Path
from qwen3vl_export.export import export
from qwen3vl_export.request import ExportRequest
export(ExportRequest({model!r}, "ort-cpu-int8", Path({folder!r})))
print(sorted(name for name in ("transformers", "torchvision") if sys.modules.get(name)))
"""


@pytest.mark.parametrize("model", ["demo", pytest.param("demo-moe", marks=pytest.mark.slow)])
def test_an_engine_is_the_same_bytes_in_every_process_and_with_no_transformers(model: str, tmp_path: Path) -> None:
    files = []
    for seed, hidden in (("0", ()), ("1", ("transformers", "torchvision"))):
        folder = tmp_path / seed
        code = EXPORT.format(hidden=hidden, model=model, folder=str(folder))
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "[]"  # an export imports neither
        files.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert len(files[0]) > 8
    assert files[0] == files[1]
