"""A target with a runtime of its own is three files: its record, its session, its numbers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers import PICTURES, ROOT

PACKAGES = ("configs", "engines", "qwen3_vl", "qwen3vl_export", "runtime")
FILES = {
    "engines/targets/toy.py": '''
"""Graphs of standard operators alone."""

from engines.target import Target, numbers_of

TARGETS = (
    Target(
        name="toy-fp32",
        precision="fp32",
        description="the graphs as they are",
        session="toy",
        library="onnxruntime",
        extra="cpu",
        cache_dtype="float32",
        native_ops={},
        passes=lambda formats: (),
        **numbers_of("toy", "fp32"),
    ),
)
''',
    "runtime/sessions/toy.py": '''
"""Run the graphs call by call, and copy the cache each time."""

import numpy as np

from runtime.installation import from_extra

with from_extra("cpu"):
    import onnxruntime as ort


class Cache:
    def __init__(self, names, shape):
        self.batch, _, self.capacity, _ = shape
        self.arrays = {name: np.zeros(shape, np.float32) for name in names}
        self.num_bytes = sum(array.nbytes for array in self.arrays.values())

    def layer(self, index):
        return tuple(self.arrays[f"past_key_values.{index}.{kind}"].copy() for kind in ("key", "value"))

    def copy_rows(self, source, target, num_rows):
        for array in self.arrays.values():
            array[target, :, :num_rows] = array[source, :, :num_rows]

    def swap_rows(self, slot, other, num_rows):
        for array in self.arrays.values():
            array[[slot, other], :, :num_rows] = array[[other, slot], :, :num_rows]


class ToySession:
    def __init__(self, folder, manifest):
        self.text = manifest.model.text
        self.graphs = {name: ort.InferenceSession(folder / f"{name}.onnx") for name in ("vision", "decoder")}

    def vision(self, inputs):
        return self.graphs["vision"].run(["visual_embeds"], inputs.arrays())[0]

    def new_cache(self, capacity, batch=1):
        names = [each.name for each in self.graphs["decoder"].get_inputs() if each.name.startswith("past_key_values.")]
        return Cache(names, (batch, self.text.num_kv_heads, capacity, self.text.head_dim))

    def decode_batch(self, num_sequences, num_slots):
        return num_sequences

    def prefill(self, inputs, cache, slot=0):
        return self.decode(inputs, cache, slot)

    def decode(self, inputs, cache, slot=0):
        part = slice(slot, slot + len(inputs.input_ids))
        pasts = {name: array[part] for name, array in cache.arrays.items()}
        presents = [name.replace("past", "present") for name in pasts]
        logits, *written = self.graphs["decoder"].run(["logits", *presents], {**inputs.arrays(), **pasts})
        for array, rows in zip(cache.arrays.values(), written, strict=True):
            array[part] = rows
        return logits


def open_session(folder, manifest, options):
    return ToySession(folder, manifest)
''',
    "configs/targets/toy.toml": """
[fp32]
rank = 1
""",
}
USE = """
import json, sys
from pathlib import Path

from typer.testing import CliRunner

from engines.choose import resolve_target
from engines.registry import all_targets
from qwen3vl_export.cli.export import app as export
from qwen3vl_export.cli.run import app as qwen3vl
from runtime.model import Qwen3VLModel
from runtime.messages import user_message


def call(app, *arguments):
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


folder, picture = sys.argv[1:]
found = {"registry": [target.name for target in all_targets()]}
found["targets"] = call(qwen3vl, "targets", "--json", "--model", "demo")
found["export"] = call(export, "demo", "--output", folder, "--json")
model = Qwen3VLModel.from_engine(folder, check=True)
found["target"] = model.manifest.target
found["text"] = model.generate(user_message("Read the digits.", [picture])).text
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the packages, and the new files."""
    root = tmp_path_factory.mktemp("tree")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name, text in FILES.items():
        assert not (root / name).exists()
        (root / name).write_text(text.lstrip())
    return root


def test_three_files_make_a_target(tree: Path, tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", USE, str(tmp_path / "engine"), str(PICTURES / "held_out_0.png")]
    done = subprocess.run(
        arguments, cwd=tree, env={**os.environ, "PYTHONPATH": str(tree)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert "toy-fp32" in found["registry"]
    (row,) = (row for row in found["targets"]["targets"] if row["name"] == "toy-fp32")
    assert row == {
        "name": "toy-fp32",
        "description": "the graphs as they are",
        "has_fixed_sizes": False,
        "can_build": True,
        "can_run": True,
        "reason": "",
    }
    choice = found["targets"]["choice"]
    assert choice["target"] == choice["candidates"][0]["target"] == "toy-fp32"
    # Every weight takes 4 bytes, as in the reference of all targets.
    weights = {each["target"]: each["parts"]["weights"] for each in choice["candidates"]}
    assert weights["toy-fp32"] == weights["ort-cpu-fp32"]
    assert (found["export"]["target"], found["target"]) == ("toy-fp32", "toy-fp32")
    assert found["text"] == "1654"
