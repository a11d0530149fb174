"""A target in half precision whose device is never here, as its lowered graphs, and edits of them."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from engines import registry
from engines.build import build_engine
from engines.bundle import Bundle
from engines.passes.add_top_k import AddTopKPass
from engines.passes.half_precision import HalfPrecisionPass
from engines.quantize.formats import WeightFormats
from engines.target import Target
from runtime.manifest import LOWERED_NAME, FileRecord, Manifest, sha256_of

CAPACITY = 1024
TOP_K = 16


class FixCapacityPass(ir.passes.InPlacePass):
    """Give the cache a fixed capacity."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        for value in model.graph.inputs:
            if str(value.name).startswith("past_key_values"):
                assert value.shape is not None
                value.shape = ir.Shape([CAPACITY if dim == "T" else dim for dim in value.shape])
        return ir.passes.PassResult(model, True)


def half_target(dtype: ir.DataType = ir.DataType.FLOAT16) -> Target:
    """A target of standard operators in half precision; no session of this name exists."""

    def passes(_: WeightFormats) -> Sequence[ir.passes.InPlacePass]:
        sort = common.TopologicalSortPass()
        return [common.RemoveUnusedNodesPass(), sort, AddTopKPass(TOP_K), HalfPrecisionPass(dtype), FixCapacityPass()]

    base = registry.get("ort-cpu-fp32")
    return dataclasses.replace(
        base,
        name="elsewhere-fp16",
        precision="fp16",
        session="elsewhere",
        cache_dtype="float16",
        native_ops={},
        passes=passes,
        cache_pass=None,
        top_k=TOP_K,
    )


def lower_to(bundle: Bundle, target: Target, folder: Path) -> Path:
    """Write the lowered graphs of a bundle."""
    build_engine(bundle, target, folder, runnable=False)
    return folder


def edit_graph(lowered: Path, copy: Path, name: str, change: Callable[[onnx.GraphProto], int]) -> Path:
    """Copy lowered graphs and alter one; `change` returns how many places it met."""
    shutil.copytree(lowered, copy)
    model = onnx.load(copy / name, load_external_data=False)
    assert change(model.graph) > 0
    onnx.save(model, copy / name)
    manifest = Manifest.read(copy, LOWERED_NAME)
    record = FileRecord((copy / name).stat().st_size, sha256_of(copy / name))
    dataclasses.replace(manifest, files={**manifest.files, name: record}).write(copy, LOWERED_NAME)
    return copy
