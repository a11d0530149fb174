"""`from_pretrained`: engines, and checkpoints of which an engine is built once and kept."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers import ROOT
from qwen3_vl.integrations.optimum import QwenVLForImageTextToText
from qwen3vl_export import engine_cache
from qwen3vl_export.integrations.optimum import opening
from qwen3vl_export.integrations.optimum.opening import EXPORT_OPTIONS, NEAREST, OPENING_OPTIONS
from qwen3vl_export.integrations.optimum.options import OWN
from qwen3vl_export.integrations.optimum.prompts import TENSORS
from runtime.errors import CheckpointError, EngineError, TargetError, UsageError
from runtime.model import Qwen3VLModel

open_model = QwenVLForImageTextToText.from_pretrained
PROMPT = [[394, 5, 6, 7]]


def test_an_engine_is_opened_and_saved(demo_engine: Path, tmp_path: Path) -> None:
    with open_model(demo_engine, export=False, threads=1, max_context=128, max_sequences=2) as model:
        assert (model.engine.max_context, model.engine.limits.max_sequences) == (128, 2)
        assert model.folder == demo_engine
        expected = model.generate(PROMPT, max_new_tokens=4).tolist()
        model.save_pretrained(tmp_path / "kept")
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.txt").touch()
        with pytest.raises(UsageError, match="exists and is neither an engine nor empty"):
            model.save_pretrained(tmp_path / "mine")
    with pytest.raises(UsageError, match="closed"):
        model.generate(PROMPT)
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {path.name for path in demo_engine.iterdir()}
    with open_model(str(tmp_path / "kept"), threads=1, check=True) as again:
        assert again.generate(PROMPT, max_new_tokens=4).tolist() == expected


def test_a_checkpoint_is_exported_once(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {"target": "ort-cpu-fp32", "engine_cache": tmp_path / "engines", "threads": 1}
    with open_model(tiny_checkpoint, export=True, **options) as model:
        folder = model.folder
        assert model.engine.manifest.target == "ort-cpu-fp32" and folder.parent == tmp_path / "engines"
        assert model.generate(PROMPT, max_new_tokens=2).shape == (1, 6)
    assert "tracing" in capsys.readouterr().err
    with open_model(str(tiny_checkpoint), **options) as again:
        assert again.folder == folder
    assert "tracing" not in capsys.readouterr().err
    monkeypatch.undo()
    with open_model(folder, threads=1) as direct:
        assert direct.engine.manifest.target == "ort-cpu-fp32"


@pytest.fixture
def asked(demo_engine: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """What the engine cache is asked for; it gives the demo's engine."""
    found: list[tuple[str, dict[str, Any]]] = []

    def find_or_build(model: str, **options: Any) -> Path:
        options.pop("progress")
        found.append((model, options))
        return demo_engine

    monkeypatch.setattr(opening, "find_or_build", find_or_build)
    return found


def test_what_the_engine_cache_is_asked_for(asked: list[Any], tmp_path: Path) -> None:
    open_model(
        "owner/model",
        revision="v1",
        cache_dir=str(tmp_path / "hub"),
        engine_cache=tmp_path / "engines",
        target="ort-cpu-int8",
        kernels="ort",
        max_sequences=3,
        max_context=64,
        threads=1,
        trust_remote_code=False,
        token=None,
    ).close()
    given = {"kernels": "ort", "max_batch": 3, "max_context": 64}
    places = {"cache": tmp_path / "engines", "cache_dir": tmp_path / "hub"}
    assert asked == [("owner/model@v1", {"target": "ort-cpu-int8", **places, **given})]
    open_model("demo", weight_format="int4", device="cpu", threads=1).close()
    assert asked[1] == ("demo", {"target": "ort-cpu-int4", "cache": None, "cache_dir": None})
    open_model("demo", threads=1).close()
    assert asked[2][1]["target"] == "auto"


def test_options_are_those_of_the_engine_cache_and_of_the_engine() -> None:
    parameters = {*inspect.signature(engine_cache.find_or_build).parameters} - {"options"}
    assert not parameters & {*EXPORT_OPTIONS}
    assert {"kv_cache", "calibration", "kernels", "max_context", "max_batch"} <= {*EXPORT_OPTIONS}
    assert {"threads", "max_memory", "max_sequences", "decode_plan", "huge_pages"} <= {*OPENING_OPTIONS}
    assert {*inspect.signature(Qwen3VLModel.from_engine).parameters} - {"path", "keywords"} <= {*OPENING_OPTIONS}
    named = {*inspect.signature(open_model).parameters}
    assert not named & {*EXPORT_OPTIONS, *OPENING_OPTIONS, *NEAREST}


ENGINE, CHECKPOINT = "engine", "demo"


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (ENGINE, {"export": True}, "is an engine already, so export is of no use"),
        (ENGINE, {"target": "ort-cpu-int8"}, "is an engine already, so target is of no use"),
        (ENGINE, {"kernels": "ort"}, "is an engine already, so kernels is of no use"),
        (ENGINE, {"revision": "main"}, "is an engine already, so revision is of no use"),
        (CHECKPOINT, {"export": False}, "'demo' is no engine, and export=False builds none"),
        (CHECKPOINT, {"revision": "main"}, "'demo' is no id of the Hub without a revision"),
        ("owner/model@main", {"revision": "main"}, "is no id of the Hub without a revision"),
        (CHECKPOINT, {"target": "ort-cpu-int8", "device": "cpu"}, "target and weight_format or device both say"),
        (CHECKPOINT, {"weight_format": "int3"}, "--weight-format 'int3': no target has weights in that format"),
        (CHECKPOINT, {"device": "tpu"}, "--device 'tpu' is not known"),
        (CHECKPOINT, {"torch_dtype": "auto"}, "from_pretrained takes no torch_dtype='auto'"),
        (CHECKPOINT, {"device_map": "auto"}, "from_pretrained takes no device_map='auto'"),
        (CHECKPOINT, {"trust_remote_code": True}, "from_pretrained takes no trust_remote_code=True"),
        (CHECKPOINT, {"max_contexts": 5}, "from_pretrained knows no 'max_contexts'"),
    ],
)
def test_what_is_refused(demo_engine: Path, source: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        open_model(demo_engine if source == ENGINE else source, **options)
    assert caught.value.remedy


def test_errors_of_what_it_calls(demo_engine: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        open_model(tmp_path / "missing", export=True)
    with pytest.raises(TargetError, match="no target that this machine can build and run"):
        open_model("demo", weight_format="nvfp4", export=True)
    broken = shutil.copytree(demo_engine, tmp_path / "broken")
    (broken / "decoder.onnx.data").write_bytes(b"")
    with pytest.raises(EngineError):
        open_model(broken)


@pytest.mark.parametrize("check", [lambda: QwenVLForImageTextToText.from_pretrained(5, export=True)])
def test_what_is_no_path(check: Callable[[], Any]) -> None:
    with pytest.raises(UsageError, match="model_id"):
        check()
    with pytest.raises(CheckpointError, match="/missing: no such folder"):
        QwenVLForImageTextToText.from_pretrained(b"/missing")  # type: ignore[arg-type]


def test_the_example_of_the_page(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "optimum.md").read_text(encoding="utf-8")
    (source,) = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    expected = re.findall(r"^print\(.*\)  # (.+)$", source, re.MULTILINE)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-c", source]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == expected == ["1654"]
    assert list(tmp_path.rglob("engine.json"))


def test_the_page_names_all_options() -> None:
    page = (ROOT / "docs" / "optimum.md").read_text(encoding="utf-8")
    assert {*OWN, *TENSORS, *inspect.signature(QwenVLForImageTextToText.generate).parameters} - {
        *("self", "inputs", "keywords", "generation_config", "tokenizer")
    } <= {*re.findall(r"`(\w+)`", page)}
