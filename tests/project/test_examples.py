"""The examples run: with a model that calls functions, and with any engine."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from helpers import ROOT
from helpers.scripted import Scripted
from helpers.tokenizer_fixture import INSTRUCT_TEMPLATE
from runtime.model import Qwen3VLModel

pytestmark = pytest.mark.portable


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tools_make_a_round_trip(tiny_engine: Path) -> None:
    tools = example("tools")
    told: list[str] = []
    with Qwen3VLModel.from_engine(tiny_engine, threads=1) as opened:
        scripted = Scripted(opened, INSTRUCT_TEMPLATE)

        def tell(line: str) -> None:
            told.append(line)
            scripted.write("The sum is 5." if len(told) == 2 else "")

        chat = scripted.model.chat(tools=tools.TOOLS)
        scripted.write(
            '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call>\n'
            '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call>'
        )
        found = tools.answer(chat, "2 + 3?", tell)
        assert found.text == "The sum is 5."
        assert told[0] == 'add({"a": 2, "b": 3}) = 5' and told[1].startswith('add({"a": 2}) = error: ')
        assert [message["role"] for message in chat.messages] == ["user", "assistant", "tool", "tool", "assistant"]
        assert chat.messages[2]["tool_call_id"] == chat.messages[1]["tool_calls"][0]["id"]
        scripted.model.close(drain=False)


def test_tools_fall_through_where_the_template_knows_none(demo_engine: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "tools.py"), str(demo_engine), "How many digits are there?"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (0, "note: answered without tools: the chat template knows no tools\n")
    assert done.stdout.strip()


def test_transformers_calls(demo_engine: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    images = ROOT / "qwen3vl_export" / "demo" / "images"
    entries = json.loads((images / "truth.json").read_text(encoding="utf-8"))
    truths = {entry["file"]: entry["answer"] for entry in entries if entry["task"] == "read"}
    assert len(truths) > 1 and len({*truths.values()}) > 1
    script = ROOT / "examples" / "transformers_calls.py"
    command = [
        sys.executable,
        str(script),
        str(demo_engine),
        "Read the digits.",
        *(str(images / each) for each in truths),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == list(truths.values())
