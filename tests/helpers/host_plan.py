"""Give an engine of ort-cuda a decode plan whose kernels run on the host."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx.external_data_helper import ExternalDataInfo

from helpers.host_kernels import host_code
from runtime.decode_plan import PLAN_CAPABILITY, PLAN_NAME
from runtime.manifest import FileRecord, Manifest
from runtime.stored_weight import StoredWeight

BATCHES = (1, 2, 4)
SM, CAPABILITY = "89", "8.9"
CODE_NAME = f"decode_plan_sm{SM}.bin"
TABLE = "model.language_model.embed_tokens.weight"
_POINTERS = {
    **dict.fromkeys(("input_ids", "position_ids", "past_lengths", "slots"), "*i64"),
    **{"logits": "*fp32", "top_logits": "*fp32", "top_ids": "*i64"},
}


def write_host_plan(folder: Path, *, fault: str = "", capability: str = CAPABILITY) -> Path:
    """Write a plan into an engine folder and list it in the manifest.

    Args:
        folder: An engine of ort-cuda-fp16.
        fault: What `helpers.host_step.whole_step` does wrong.
        capability: Of the GPU that the code is for, whatever the plan says.
    """
    manifest = Manifest.read(folder)
    codes, kernels = b"", []
    for function, types, constants in _kernels(folder, manifest, fault):
        code = host_code("helpers.host_step", function, types, constants, capability)
        place = {"offset": len(codes), "bytes": len(code), "entry": function, "shared_bytes": 0}
        kernels.append({"types": types, "num_warps": 4, "code": {SM: place}})
        codes += code
    (folder / CODE_NAME).write_bytes(codes)
    plan: dict[str, Any] = {
        "format": 1,
        "constants": {},
        "decoder": manifest.files["decoder.onnx"].sha256,
        "dtype": "float16",
        "top_k": int(manifest.capabilities["top_k"]),
        "batches": BATCHES,
        "buffers": {"hidden": {"bytes": max(BATCHES) * manifest.model.text.hidden_size * 2, "zeroed": False}},
        "weights": _weights(folder),
        "gpus": {SM: {"file": CODE_NAME, "max_shared_bytes": 99 << 10, "dependent_launch": True, "ptxas": "12.9.86"}},
        "kernels": kernels,
        "steps": {SM: {str(batch): _forms(manifest, batch) for batch in BATCHES}},
    }
    write_plan(folder, plan)
    return folder


def read_plan(folder: Path) -> dict[str, Any]:
    plan: dict[str, Any] = json.loads((folder / PLAN_NAME).read_text())
    return plan


def write_plan(folder: Path, plan: dict[str, Any]) -> None:
    """Write the plan, and a manifest that lists it and its code."""
    (folder / PLAN_NAME).write_text(json.dumps(plan))
    manifest = Manifest.read(folder)
    files = {**manifest.files, **{name: FileRecord.of(folder / name) for name in (PLAN_NAME, CODE_NAME)}}
    capabilities = {**manifest.capabilities, PLAN_CAPABILITY: True}
    dataclasses.replace(manifest, files=files, capabilities=capabilities).write(folder)


def _kernels(folder: Path, manifest: Manifest, fault: str) -> list[tuple[str, dict[str, str], dict[str, Any]]]:
    text = manifest.model.text
    caches = {f"{kind}{i}": "*fp16" for i in range(text.num_layers) for kind in ("key", "value")}
    step = {**_POINTERS, "hidden": "*fp16", "table": "*fp16", "capacity": "i32", **caches}
    config = {
        "top_k": int(manifest.capabilities["top_k"]),
        "heads": text.num_kv_heads,
        "dim": text.head_dim,
        "width": text.hidden_size,
        "vocab": text.vocab_size,
        "levels": manifest.model.num_visual_levels,
    }
    table = {"width": text.hidden_size, "vocab": text.vocab_size}
    decoder = _with_other_experts(folder) if fault == "expert" else folder / "decoder.onnx"
    constants = {"decoder": str(decoder), "config": config, "fault": fault}
    embed = {"input_ids": "*i64", "table": "*fp16", "hidden": "*fp16"}
    return [("embed_rows", embed, table), ("whole_step", step, constants)]


def _with_other_experts(folder: Path) -> Path:
    """Write a decoder whose first router takes each expert for the next one."""
    model = onnx.load(folder / "decoder.onnx", load_external_data=False)
    router = next(each for each in model.graph.initializer if each.name.endswith("mlp.gate.weight"))
    info = ExternalDataInfo(router)
    data = (folder / info.location).read_bytes()[info.offset : info.offset + info.length]
    weights = np.frombuffer(data, np.float16).reshape(tuple(router.dims))
    router.CopyFrom(onnx.numpy_helper.from_array(np.roll(weights, 1, axis=0), router.name))
    onnx.save(model, folder / "other_experts.onnx")
    return folder / "other_experts.onnx"


def _forms(manifest: Manifest, batch: int) -> dict[str, Any]:
    caches = [f"{kind}:{i}" for i in range(manifest.model.text.num_layers) for kind in ("key", "value")]
    step = [*(f"step:{name}" for name in _POINTERS), "buffer:hidden", f"weight:{TABLE}", "capacity", *caches]
    embed = [0, [batch, 1, 1], ["step:input_ids", f"weight:{TABLE}", "buffer:hidden"]]
    launches = [embed, [1, [batch, 1, 1], step]]
    return {"fast": launches, "invariant": [embed, *launches]}


def stored_weights(folder: Path) -> dict[str, StoredWeight]:
    """Return what the plan says of the decoder's weights."""
    return {
        name: StoredWeight(each["file"], each["offset"], each["bytes"], each["onnx_type"], tuple(each["shape"]))
        for name, each in _weights(folder).items()
    }


def _weights(folder: Path) -> dict[str, Any]:
    graph = onnx.load(folder / "decoder.onnx", load_external_data=False).graph
    found = {}
    for each in graph.initializer:
        if each.data_location == onnx.TensorProto.EXTERNAL:
            info = ExternalDataInfo(each)
            found[each.name] = {
                "file": info.location,
                "offset": info.offset or 0,
                "bytes": info.length,
                "onnx_type": each.data_type,
                "shape": list(each.dims),
            }
    return found
