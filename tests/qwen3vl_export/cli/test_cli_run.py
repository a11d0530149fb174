"""The `qwen3vl` command: what it passes on, what it prints where, and its exit codes."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import io
import json
import logging
import os
import re
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image

from helpers import ROOT
from helpers.command_line import call
from qwen3vl_export.cli.errors import run_app, spell_options
from qwen3vl_export.cli.output import print_stats
from qwen3vl_export.cli.run import app
from runtime.answer import Generation, Stats
from runtime.calls import Call
from runtime.conversation import Conversation
from runtime.errors import CapacityError, CheckpointError, EngineError, ImageError, ParityError
from runtime.generation_config import GenerationOptions
from runtime.image_config import ImageProcessorConfig
from runtime.manifest import FileRecord, Manifest, sha256_of
from runtime.messages import normalise_messages, system_message
from runtime.model_config import ModelConfig, TextConfig, VisionConfig
from runtime.piece import Piece
from runtime.scheduling.pieces import Pieces
from runtime.serving_options import ServingOptions
from runtime.tools.call import ToolCall

STATS = Stats(0.001, 0.0, 0.25, 0.5, 0.751, 0.02, 50.0, 30, 16, 3, 3 << 20)
PIECES = [Piece("4 "), Piece("7"), Piece("é")]


@dataclass
class FakeModel:
    """Records its calls; answers `PIECES`, or raises `failure` after the first piece."""

    opened: list[tuple[Any, dict[str, Any]]] = field(default_factory=list)
    calls: list[tuple[Any, dict[str, Any]]] = field(default_factory=list)
    chats: list[dict[str, Any]] = field(default_factory=list)
    failure: BaseException | None = None
    num_closed: int = 0
    image_config: ImageProcessorConfig = field(default_factory=ImageProcessorConfig)
    max_image_pixels: int = 50_000_000

    def from_engine(self, path: Any, **options: Any) -> FakeModel:
        self.opened.append((path, options))
        return self

    def generate(self, messages: Any, **options: Any) -> Generation:
        self.calls.append((messages, options))
        return Generation("".join(PIECES), [4, 5, 6], "eos", STATS)

    def stream(self, messages: Any, **options: Any) -> FakeStream:
        return FakeStream(self, self.generate(messages, **options))

    def chat(self, system: str | None, **options: Any) -> Conversation:
        self.chats.append(options)
        start = normalise_messages(system_message(system)) if system is not None else None
        return Conversation(self.begin, GenerationOptions().replace(**options), Call(None, None, 0, None), start)

    def begin(
        self,
        messages: Any,
        options: GenerationOptions,
        call: Call,
        pieces: Pieces,
        *,
        waits: bool = False,
        on_prepared: Any = None,
    ) -> None:
        """Answer a turn of a conversation; the first finds nothing in the cache."""
        on_prepared(types.SimpleNamespace(messages=messages))
        is_first = sum(message["role"] == "user" for message in messages.turns) == 1
        stats = STATS if is_first else dataclasses.replace(STATS, cached_tokens=21, cached_images=2)
        for piece in PIECES:
            pieces.put(piece)
        pieces.finish(dataclasses.replace(self.generate(messages.filled()), stats=stats))
        watch(self, pieces)


class FakeStream(Iterator[Piece]):
    def __init__(self, model: FakeModel, generation: Generation) -> None:
        self._model, self._generation, self._pieces = model, generation, iter(PIECES)
        self.result: Generation | None = None

    def __next__(self) -> Piece:
        piece = next(self._pieces, None)
        if piece is None:
            self.result = self._generation
            raise StopIteration
        if piece != PIECES[0] and self._model.failure is not None:
            failure, self._model.failure = self._model.failure, None
            raise failure
        return piece

    def close(self) -> None:
        self._model.num_closed += 1


def watch(model: FakeModel, pieces: Pieces) -> None:
    """Let pieces raise the model's failure after the first, and count how often they are closed."""
    take, num_taken = pieces.take, 0

    def failing() -> str | None:
        nonlocal num_taken
        num_taken += 1
        failure, model.failure = (model.failure, None) if num_taken > 1 else (None, model.failure)
        if failure is not None:
            raise failure
        return take()

    def cancel() -> None:
        model.num_closed += 1

    pieces.take, pieces.cancel = failing, cancel  # type: ignore[method-assign]


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> FakeModel:
    fake = FakeModel()
    module = types.SimpleNamespace(Qwen3VLModel=fake)
    monkeypatch.setitem(sys.modules, "runtime.model", module)
    return fake


@pytest.fixture
def qwen3vl() -> Callable[..., tuple[int, str, str]]:
    return functools.partial(call, app)


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    """A folder with a manifest, a small file and a weight file; enough for `inspect`."""
    folder = tmp_path / "engine"
    folder.mkdir()
    (folder / "vision.onnx").write_bytes(b"graph")
    (folder / "weights.data").write_bytes(bytes(range(200)))
    files = {
        name: FileRecord((folder / name).stat().st_size, sha256_of(folder / name), is_weights=name.endswith(".data"))
        for name in ("vision.onnx", "weights.data")
    }
    text = TextConfig(512, 64, 128, 3, 4, 2, 32, 4096, 1e-6, True, 5e6, (6, 5, 5))
    vision = VisionConfig(5, 48, 96, 4, 3, 16, 2, 2, 64, (1, 3), 1e4)
    config = ModelConfig(text, vision, 10, 11, 12, 13)
    Manifest(
        "ort-cpu-fp32",
        "ort_cpu",
        {"cache_dtype": "float32"},
        config,
        {"onnxruntime": "1.32.0"},
        {"name": "demo"},
        files,
    ).write(folder)
    return folder


@pytest.mark.portable
def test_options_not_given_are_not_passed_on(model: FakeModel, qwen3vl: Any) -> None:
    assert qwen3vl("run", "folder", "Read.")[0] == 0
    assert model.opened == [(Path("folder"), {"check": False})]
    assert model.calls == [([{"role": "user", "content": [{"type": "text", "text": "Read."}]}], {})]


@pytest.mark.portable
def test_every_option_arrives(model: FakeModel, qwen3vl: Any) -> None:
    # A URL arrives whole, so that the runtime can refuse it by name.
    args = (
        "run folder Read. --image a.png --image https://x/b.png --max-new-tokens 7 --do-sample "
        "--temperature 0.5 --top-k 0 --top-p 0.9 --min-p 0 --repetition-penalty 1.1 --presence-penalty -1 "
        "--frequency-penalty 0.2 --seed 0 --prompt-lookup 4 --stop x --stop y --min-pixels 1024 --max-pixels 4096 "
        "--max-context 99 --max-memory 1.5 --threads 1 --huge-pages --check"
    )
    assert qwen3vl(*args.split())[0] == 0
    assert model.opened[0][1] == {
        "check": True,
        "threads": 1,
        "huge_pages": True,
        "max_context": 99,
        "max_memory": 1_500_000_000,
        "min_pixels": 1024,
        "max_pixels": 4096,
    }
    messages, options = model.calls[0]
    assert [part.get("image") for part in messages[0]["content"]] == ["a.png", "https://x/b.png", None]
    # 0 is a value, not "not given".
    assert options == {
        "max_new_tokens": 7,
        "do_sample": True,
        "temperature": 0.5,
        "top_k": 0,
        "top_p": 0.9,
        "min_p": 0.0,
        "repetition_penalty": 1.1,
        "presence_penalty": -1.0,
        "frequency_penalty": 0.2,
        "seed": 0,
        "prompt_lookup_num_tokens": 4,
        "stop": ("x", "y"),
    }
    assert qwen3vl("run", "folder", "Read.", "--greedy")[0] == 0
    assert model.calls[1][1] == {"do_sample": False}


@pytest.mark.portable
@pytest.mark.parametrize("memory", ["nan", "inf", "-inf"])
def test_a_memory_that_is_no_number_is_refused(model: FakeModel, qwen3vl: Any, memory: str) -> None:
    for command in (["run", "folder", "Read."], ["chat", "folder"]):
        code, out, err = qwen3vl(*command, "--max-memory", memory)
        assert (code, out) == (2, "")
        assert err.startswith(f"error: --max-memory {memory}: expected a number of GB\n  remedy: ")
    assert model.opened == []


@pytest.mark.portable
def test_inspect_refuses_a_url(qwen3vl: Any) -> None:
    code, out, err = qwen3vl("inspect", "https://host/engine")
    assert (code, out) == (2, "")
    assert "found a URL of scheme 'https'; nothing is fetched" in err


@pytest.mark.portable
def test_answer_on_stdout_statistics_on_stderr(
    model: FakeModel, qwen3vl: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert qwen3vl("run", "folder", "Read.") == (0, "4 7é\n", "")
    code, out, err = qwen3vl("run", "folder", "Read.", "--stats")
    assert (code, out) == (0, "4 7é\n")
    table = dict(line.split("  ", 1) for line in err.splitlines())
    assert {name: value.strip() for name, value in table.items()} == {
        "prompt": "30 tokens, 16 of them visual",
        "answer": "3 tokens",
        "preprocess": "1.0 ms",
        "vision": "250.0 ms",
        "prefill": "500.0 ms",
        "time to first token": "751.0 ms",
        "time per token": "20.0 ms",
        "speed": "50.0 tokens/s",
        "peak cache": "3.0 MiB",
    }
    waited = dataclasses.replace(STATS, queue_s=0.5, cached_tokens=7, cached_images=1)
    print_stats(waited)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in lines[:4]] == ["prompt", "found in cache", "answer", "preprocess"]
    assert lines[1].endswith("  7 of 30 prompt tokens, 1 image")
    assert lines[4].split() == ["queue", "500.0", "ms"] and len(lines) == len(table) + 2
    print_stats(dataclasses.replace(STATS, pruned_tokens=4, evicted_rows=9))
    lines = capsys.readouterr().err.splitlines()[len(table) :]
    assert [line.split("  ")[0] for line in lines] == ["visual tokens", "rows of the prompt"]
    assert [line.split("  ")[-1].strip() for line in lines] == ["16 of 20 kept", "21 of 30 kept"]


@pytest.mark.portable
def test_json_is_one_object(model: FakeModel, qwen3vl: Any) -> None:
    code, out, err = qwen3vl("run", "folder", "Read.", "--json")
    assert (code, err, out.count("\n")) == (0, "", 1)
    values = json.loads(out)
    assert values["stats"].pop("peak_cache_bytes") == 3 << 20
    assert set(values["stats"]) == set(STATS.to_dict()) - {"peak_cache_bytes"}
    del values["stats"]
    nothing = {"reasoning": "", "tool_calls": [], "malformed_tool_calls": []}
    assert values == {"text": "4 7é", "token_ids": [4, 5, 6], "finish_reason": "eos", **nothing}


CALL = ToolCall("call_1", "weather", {"city": "Köln"}, '{"city": "Köln"}', "<tool_call>…</tool_call>")


@pytest.mark.portable
def test_thoughts_go_to_stderr_and_calls_are_lines_of_json(
    model: FakeModel, qwen3vl: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pieces = [Piece("so \x1b", "reasoning"), Piece("what", "reasoning"), Piece("I ask.")]
    monkeypatch.setattr(sys.modules[__name__], "PIECES", [*pieces, Piece(CALL.text, "tool_call", CALL, 0)])
    tools = tmp_path / "tools.json"
    tools.write_text('[{"name": "weather"}]', encoding="utf-8")
    line = json.dumps(CALL.to_message(), ensure_ascii=False)
    assert qwen3vl("run", "folder", "Well?", "--tools", str(tools)) == (0, f"I ask.\n{line}\n", "so \\x1bwhat\n")
    assert model.calls[-1][1] == {"tools": [{"name": "weather"}]}
    assert qwen3vl("run", "folder", "Well?", "--hide-thinking") == (0, f"I ask.\n{line}\n", "")
    for wrong in (tmp_path / "missing.json", tmp_path):
        code, _, err = qwen3vl("run", "folder", "Well?", "--tools", str(wrong))
        assert code == 2 and "pass a file with a JSON list of functions" in err


@pytest.mark.portable
def test_ctrl_c_ends_the_line_and_closes_the_stream(model: FakeModel, qwen3vl: Any) -> None:
    model.failure = KeyboardInterrupt()
    assert qwen3vl("run", "folder", "Read.") == (130, "4 \n", "interrupted\n")
    assert model.num_closed == 1


@pytest.mark.portable
def test_an_error_in_the_middle_of_an_answer(model: FakeModel, qwen3vl: Any) -> None:
    model.failure = CapacityError("too long", remedy="shorten it")
    assert qwen3vl("run", "folder", "Read.") == (8, "4 \n", "error: too long\n  remedy: shorten it\n")


def _picture(path: Path, width: int = 6, height: int = 4) -> str:
    Image.new("RGB", (width, height)).save(path)
    return str(path)


def _chat(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


@pytest.mark.portable
def test_chat_carries_the_turns_and_takes_images(
    model: FakeModel, qwen3vl: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    picture = _picture(tmp_path / "a picture.png")
    first_picture = _picture(tmp_path / "first.png")
    _chat(monkeypatch, "One", "", f"/image {picture}", "Two", "/reset", "Three", "/quit", "Four")
    code, out, err = qwen3vl("chat", "folder", "--image", first_picture)
    assert (code, out) == (0, "4 7é\n" * 3)
    assert f"{picture}: 6 x 4 pixels" in err
    shown = [[_brief(turn) for turn in messages] for messages, _ in model.calls]
    first = [("user", [first_picture, "One"]), ("assistant", "4 7é")]
    assert shown == [first[:1], [*first, ("user", [picture, "Two"])], [("user", ["Three"])]]


def _brief(turn: dict[str, Any]) -> tuple[str, Any]:
    content = turn["content"]
    if isinstance(content, str):
        return turn["role"], content
    return turn["role"], [part.get("image", part.get("text")) for part in content]


@pytest.mark.portable
@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (CapacityError("too long", remedy="/reset"), "error: too long\n  remedy: /reset\n"),
        (KeyboardInterrupt(), "stopped"),
    ],
)
def test_a_failed_turn_leaves_no_trace(
    failure: BaseException,
    message: str,
    model: FakeModel,
    qwen3vl: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    picture, line = _picture(tmp_path / "first.png"), _picture(tmp_path / "line.png", width=201, height=1)
    model.failure = failure
    _chat(monkeypatch, "One", "/image missing.png", f"/image {line}", "/what", "Two")
    code, _, err = qwen3vl("chat", "folder", "--image", picture)
    assert code == 0
    assert message in err
    assert "'missing.png': no such file" in err
    assert "image of 201 x 1: expected sides of a ratio of at most 200" in err
    assert "unknown command /what" in err
    assert [_brief(turn) for turn in model.calls[1][0]] == [("user", [picture, "Two"])]
    assert model.num_closed == 1


FOUND = "found in the cache: 21 of 30 prompt tokens, 2 images"


@pytest.mark.portable
def test_chat_says_what_a_turn_found_in_the_cache(
    model: FakeModel, qwen3vl: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lines = ("One", "Two", f"/image {_picture(tmp_path / 'a.png')}", "/rewind", "/reset", "Three")
    _chat(monkeypatch, *lines)
    code, out, err = qwen3vl("chat", "folder", "--system", "Short.")
    assert (code, out) == (0, "4 7é\n" * 3)
    notes = [f"note: {FOUND}", f"{tmp_path / 'a.png'}: 6 x 4 pixels, shown with the next turn"]
    assert err.splitlines() == [*notes, "1 of 2 turns dropped", "conversation forgotten"]
    assert [messages[0] for messages, _ in model.calls] == 3 * [{"role": "system", "content": "Short."}]
    _chat(monkeypatch, *lines)
    assert qwen3vl("chat", "folder", "--quiet") == (0, out, "")
    _chat(monkeypatch, "One", "Two")
    _, _, err = qwen3vl("chat", "folder", "--stats", "--quiet")
    rows = [line.split("  ", 1) for line in err.splitlines()]
    assert [text.strip() for name, text in rows if name == "found in cache"] == ["21 of 30 prompt tokens, 2 images"]
    assert len([name for name, _ in rows if name == "time per token"]) == 2 and FOUND not in err


@pytest.mark.portable
def test_chat_takes_turns_back(model: FakeModel, qwen3vl: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    picture = _picture(tmp_path / "a.png")
    wrong = ("0", "4", "-1", "x", "1.5", "9" * 5000, "² ")
    _chat(
        monkeypatch, "/rewind", "One", "Two", "Three", *(f"/rewind {each}" for each in wrong), f"/image {picture}",
        "/rewind 2", "Four", "/rewind", "/rewind", "Five",
    )  # fmt: skip
    code, out, err = qwen3vl("chat", "folder", "--max-new-tokens", "7", "--temperature", "0")
    assert (code, out.count("\n")) == (0, 5)
    assert model.chats == [{"max_new_tokens": 7, "temperature": 0.0}]
    assert "/rewind 1: expected a number of turns to drop, there are 0" in err
    assert err.count("expected a number of turns to drop, there are 3") == len(wrong)
    assert "2 of 3 turns dropped" in err and "1 of 2 turns dropped" in err
    asked = [[_brief(turn) for turn in messages if turn["role"] == "user"] for messages, _ in model.calls]
    # An image that waits is shown with the next turn, whatever was dropped before; a dropped turn takes its own along.
    assert asked[3:] == [[("user", ["One"]), ("user", [picture, "Four"])], [("user", ["Five"])]]


@pytest.mark.portable
def test_a_first_image_that_is_missing_ends_the_chat(
    model: FakeModel, qwen3vl: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _chat(monkeypatch, "One")
    code, out, err = qwen3vl("chat", "folder", "--image", "nope.png")
    assert (code, out, model.calls) == (ImageError.exit_code, "", [])
    assert err.startswith("error: ") and "'nope.png': no such file" in err


@pytest.mark.portable
def test_inspect_prints_the_manifest(engine: Path, qwen3vl: Any) -> None:
    code, out, err = qwen3vl("inspect", str(engine))
    assert (code, err) == (0, "")
    for words in (
        "ort-cpu-fp32",
        "3 layers, hidden 64",
        "onnxruntime 1.32.0",
        "DeepStack after layers 1, 3",
        "200 bytes",
    ):
        assert words in out
    assert "hashes catch damage and mix-ups, not malice" in out
    code, out, _ = qwen3vl("inspect", str(engine), "--json")
    values = json.loads(out)
    assert (code, values["target"], values["weight_bytes"], values["model"]["text"]["head_dim"]) == (
        0,
        "ort-cpu-fp32",
        200,
        32,
    )
    assert values["files"]["weights.data"]["sha256"] == sha256_of(engine / "weights.data")


@pytest.mark.portable
@pytest.mark.parametrize(
    ("kernels", "own", "theirs"),
    [
        (["MatMulInt4", "QMoE.4", "DecodeAttention"], "MatMulInt4, DecodeAttention", "QMoE.4"),
        (["MatMulNBits.4"], "none", "MatMulNBits.4"),
        ([], "none", "none of quantised numbers"),
    ],
)
def test_inspect_says_whose_kernels_an_engine_uses(
    kernels: list[str], own: str, theirs: str, engine: Path, qwen3vl: Any
) -> None:
    manifest = Manifest.read(engine)
    dataclasses.replace(manifest, capabilities={**manifest.capabilities, "kernels": kernels}).write(engine)
    lines = [line.split(maxsplit=2) for line in qwen3vl("inspect", str(engine))[1].splitlines()]
    assert ["own", "kernels", own] in lines and ["ONNX", "Runtime's", theirs] in lines


@pytest.mark.portable
def test_inspect_check_finds_a_changed_weight(engine: Path, qwen3vl: Any) -> None:
    assert qwen3vl("inspect", str(engine), "--check")[0] == 0
    (engine / "weights.data").write_bytes(bytes(200))
    assert qwen3vl("inspect", str(engine))[0] == 0
    code, out, err = qwen3vl("inspect", str(engine), "--check")
    assert code == EngineError.exit_code
    assert "ort-cpu-fp32" in out
    assert "passed" not in out
    assert err.startswith(f"error: {engine / 'weights.data'}: its SHA-256")
    assert qwen3vl("inspect", str(engine), "--check", "--json")[:2] == (EngineError.exit_code, "")


@pytest.mark.portable
def test_targets_lists_the_registry(qwen3vl: Any) -> None:
    from engines.registry import all_targets

    code, out, _ = qwen3vl("targets", "--json")
    rows = json.loads(out)["targets"]
    assert code == 0
    assert [row["name"] for row in rows] == [target.name for target in all_targets()]
    assert all(isinstance(row["can_build"], bool) and isinstance(row["can_run"], bool) for row in rows)
    code, out, _ = qwen3vl("targets")
    assert code == 0
    assert all(row["name"] in out and row["description"] in out and row["reason"] in out for row in rows)
    fixed = {row["name"] for row in rows if row["has_fixed_sizes"]}
    assert fixed == {row["name"] for row in rows if row["name"].startswith("trt-")}
    assert "trt-*, trt-rtx-* take those that they were built for (--max-batch, --max-context)" in " ".join(out.split())


@pytest.mark.portable
def test_verify_passes_the_reference_on(qwen3vl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def verify(*_: Any, on_case: Any, **options: Any) -> Any:
        asked.append(options)
        return types.SimpleNamespace(passed=True, to_dict=dict, render=lambda: "")

    monkeypatch.setitem(sys.modules, "qwen3vl_export.parity", types.ModuleType("qwen3vl_export.parity"))
    monkeypatch.setitem(sys.modules, "qwen3vl_export.parity.verify", types.SimpleNamespace(verify=verify))
    for options in ([], ["--reference", "own"]):
        assert qwen3vl("verify", "folder", "--checkpoint", "demo", *options)[0] == 0
    assert asked == [{"route": {}}, {"route": {}, "reference": "own"}]


@pytest.mark.portable
@pytest.mark.parametrize("other", [["folder", "--tasks"], ["folder", "--bisect"], ["--ranges"]])
def test_a_reference_has_no_use_with_other_comparisons(other: list[str], qwen3vl: Any) -> None:
    code, _, err = qwen3vl("verify", *other, "--checkpoint", "demo", "--reference", "own")
    assert code == 2
    assert "--reference has no use with --tasks, --bisect and --ranges" in err


@pytest.mark.portable
@pytest.mark.parametrize("passed", [True, False])
def test_verify_exit_code_follows_the_report(passed: bool, qwen3vl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def verify(*args: Any, on_case: Callable[[str], None], route: dict[str, Any]) -> Any:
        assert route == {}
        on_case("three images")
        asked.append(args)
        return types.SimpleNamespace(passed=passed, to_dict=lambda: {"passed": passed}, render=lambda: "the table")

    module = types.SimpleNamespace(verify=verify)
    monkeypatch.setitem(sys.modules, "qwen3vl_export.parity", types.ModuleType("qwen3vl_export.parity"))
    monkeypatch.setitem(sys.modules, "qwen3vl_export.parity.verify", module)
    expected = 0 if passed else ParityError.exit_code
    code, out, err = qwen3vl("verify", "folder", "--checkpoint", "demo")
    progress, _, error = err.partition("\n")
    assert progress == "comparing: three images"
    assert (code, out, error.startswith("error: folder does not agree with demo")) == (
        expected,
        "the table\n",
        not passed,
    )
    code, out, _ = qwen3vl("verify", "folder", "--checkpoint", "demo", "--json")
    assert (code, json.loads(out)) == (expected, {"passed": passed})
    assert asked == [(Path("folder"), "demo")] * 2


def test_verify_without_torchvision_fails(qwen3vl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)  # as if it were not installed
    code, out, err = qwen3vl("verify", "folder", "--checkpoint", "demo")
    assert (code, out) == (2, "")
    assert "the Python package 'torchvision', which is not installed" in err


def _failing_app(error: BaseException) -> typer.Typer:
    failing = typer.Typer(pretty_exceptions_enable=False)

    @failing.command()
    def fail(word: str = "") -> None:
        print(word)
        raise error

    return failing


@pytest.mark.portable
@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (CheckpointError("bad key", remedy="drop it"), 3, "error: bad key\n  remedy: drop it\n"),
        (EngineError("gone"), 5, "error: gone\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (OSError(28, "No space left on device", "/x/y"), 8, "error: /x/y: the disk is full\n  remedy: free"),
        (MemoryError(), 8, "error: not enough memory\n"),
        (ModuleNotFoundError("no", name="torch.nn"), 2, "error: this command needs the Python package 'torch'"),
        (ZeroDivisionError("1/0"), 1, "error: internal error: ZeroDivisionError: 1/0\n  remedy: this is a bug"),
    ],
)
def test_each_error_has_one_message_and_its_code(
    error: BaseException, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for args, has_traceback in (([], False), (["--debug"], True)):
        with pytest.raises(SystemExit) as end:
            run_app(_failing_app(error), args)
        err = capsys.readouterr().err
        assert end.value.code == code
        assert ("Traceback" in err) == has_traceback
        assert err.startswith(message) if not has_traceback else message in err


@pytest.mark.portable
def test_debug_after_two_dashes_is_text(model: FakeModel, qwen3vl: Any) -> None:
    assert qwen3vl("run", "folder", "--", "--debug")[0] == 0
    assert model.calls[0][0][0]["content"][0]["text"] == "--debug"


@pytest.mark.portable
@pytest.mark.parametrize("args", [["run"], ["run", "f", "p", "--seed", "x"], ["fly"], ["verify", "f"]])
def test_wrong_usage_exits_with_2(args: list[str], qwen3vl: Any) -> None:
    code, out, err = qwen3vl(*args)
    assert (code, out) == (2, "")
    assert "Usage:" in err
    assert "Traceback" not in err


@pytest.mark.portable
@pytest.mark.parametrize("command", ["run", "chat", "inspect", "targets", "verify"])
def test_help_shows_an_example(command: str, qwen3vl: Any) -> None:
    code, out, _ = qwen3vl(command, "--help")
    assert code == 0
    assert f"\n    qwen3vl {command}" in out


@pytest.mark.portable
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("raise max_context, lower max_pixels.", "raise --max-context, lower --max-pixels."),
        ("max_context = 0, expected 1 to 9", "--max-context = 0, expected 1 to 9"),
        ("max_pixels=2048000 would limit", "--max-pixels 2048000 would limit"),
        ("top_p=1.0 keeps all tokens", "--top-p 1.0 keeps all tokens"),
        ("pass do_sample=True to sample", "pass --do-sample to sample"),
        ("pass do_sample=False", "pass --greedy"),
        ("/data/max_context/engine: missing", "/data/max_context/engine: missing"),
        ("the_max_pixels", "the_max_pixels"),
    ],
)
def test_messages_spell_options_as_the_command_line_does(text: str, expected: str) -> None:
    assert spell_options(text) == expected


@pytest.mark.portable
def test_every_option_of_the_api_is_spelled() -> None:
    from runtime.model import Qwen3VLModel

    arguments = inspect.signature(Qwen3VLModel.from_engine).parameters
    api = {*arguments, *ServingOptions.__dataclass_fields__, *GenerationOptions.__dataclass_fields__}
    spelled = set()
    for command in typer.main.get_command(app).commands.values():
        for option in command.params:
            if "_" in option.name and option.name in api:
                spelled.add(option.name)
                assert spell_options(f"lower {option.name}") == f"lower {option.opts[0]}"
    assert {"max_pixels", "max_context", "huge_pages", "top_k", "max_queue"} <= spelled


@pytest.mark.portable
def test_errors_and_notes_of_the_runtime_are_spelled(
    model: FakeModel, qwen3vl: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def generate(messages: Any, **options: Any) -> Generation:
        logging.getLogger("runtime.model").warning("max_pixels=9 is faster")
        raise CapacityError("too long", remedy="raise max_context")

    monkeypatch.setattr(model, "generate", generate)
    spelled = "--max-pixels 9 is faster\nerror: too long\n  remedy: raise --max-context\n"
    assert qwen3vl("run", "folder", "Read.") == (8, "", spelled)
    _chat(monkeypatch, "One")
    assert qwen3vl("chat", "folder") == (0, "", spelled)
    assert logging.getLogger("runtime").handlers == []


@pytest.mark.portable
def test_a_reader_that_leaves_ends_the_command_quietly(demo_engine: Path) -> None:
    root = ROOT
    # Output that is written piece by piece, and output that is written when the command ends.
    for args in (["run", str(demo_engine), "Read."], ["targets"]):
        reader, writer = os.pipe()
        os.close(reader)
        command = [sys.executable, "-m", "qwen3vl_export.cli.run", *args]
        done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=root, timeout=120)
        os.close(writer)
        assert (done.returncode, done.stderr) == (141, "")  # 128 + SIGPIPE, as a tool killed by it


def _keys(value: Any) -> set[str]:
    """Return the keys of the first levels of a JSON value that have names of their own."""
    if isinstance(value, list):
        return _keys(value[0])
    return set(value) | (_keys(value["stats"]) if "stats" in value else set())


@pytest.mark.portable
def test_help_names_every_key_of_the_json(model: FakeModel, engine: Path, qwen3vl: Any) -> None:
    for args in (["run", "folder", "Read."], ["inspect", str(engine)], ["targets"]):
        code, out, _ = qwen3vl(*args, "--json")
        assert code == 0
        documented = qwen3vl(args[0], "--help")[1]
        paragraph = documented[documented.index("--json prints") : documented.index("Examples:")]
        assert _keys(json.loads(out)) <= set(re.findall(r"\w+", paragraph))


@pytest.mark.portable
def test_a_missing_engine_says_how_to_build_one(tmp_path: Path, qwen3vl: Any) -> None:
    code, out, err = qwen3vl("run", str(tmp_path / "none"), "Read.")
    assert (code, out) == (EngineError.exit_code, "")
    assert err.startswith(f"error: {tmp_path / 'none'}: no such engine folder\n  remedy: ")


@pytest.mark.portable
def test_importing_the_command_loads_nothing_heavy() -> None:
    code = (
        "import sys, qwen3vl_export.cli.run; "
        "print(sorted({'torch', 'onnx', 'onnxruntime', 'transformers', 'numpy', 'PIL'} & set(sys.modules)))"
    )
    root = ROOT
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout == "[]\n"
