"""What README.md and docs/ say is run: commands, Python, paths, JSON fields, exit codes, generated tables."""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import report as tables
from helpers import ROOT, command_line
from qwen3vl_export.cli import export, run
from runtime import errors
from runtime.manifest import Manifest

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md")] + sorted((ROOT / "docs").glob("*.md"))
TRUTHS = json.loads((ROOT / "qwen3vl_export" / "demo" / "images" / "truth.json").read_text(encoding="utf-8"))


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)


def shell_lines() -> list[list[str]]:
    return [shlex.split(line, comments=True) for block in blocks("sh") for line in block.splitlines()]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the README's relative paths lead to this checkout's pictures; nothing is built yet."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "qwen3vl_export").symlink_to(ROOT / "qwen3vl_export")
    return folder


def documented_fields(row: str) -> list[str]:
    section = COMMANDS.split("## JSON")[1].split("\n## ")[0]
    cells = dict(re.findall(r"^\| (.+?) \| (.+) \|$", section, re.MULTILINE))
    return re.findall(r"`(\w+)`", re.sub(r"\([^)]*\)", "", cells[row]))


def call(arguments: list[str], cwd: Path, stdin: str = "") -> str:
    binaries = str(Path(sys.executable).parent)
    environment = os.environ | {"PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(arguments, cwd=cwd, env=environment, input=stdin, capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(arguments)}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_quick_start_commands(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    lines = [line for line in shell_lines() if line[0] != "make"]
    assert {line[0] if line[0] == "qwen3vl-export" else line[1] for line in lines} == {
        "qwen3vl-export", "run", "chat", "inspect", "targets", "verify"
    }  # fmt: skip
    for line in lines:
        stdin = "".join(f"{text}\n" for text in (TRUTHS[1]["question"], "/quit")) if "chat" in line else ""
        # verify takes half as long with fewer tokens; the fields of the export's JSON are compared on the way.
        more = {"qwen3vl-export": ["--json"], "verify": ["--max-new-tokens", "4"]}
        line += more.get(line[0], more.get(line[1], []))
        # What imports PyTorch runs in this process, which has it; the others as a user runs them.
        app = export.app if line[0] == "qwen3vl-export" else run.app
        if line[0] == "qwen3vl-export" or line[1] == "verify":
            code, output, errors_said = command_line.call(app, *line[1:])
            assert code == 0, errors_said
        else:
            output = call(line, workplace, stdin)
        match line[1]:
            case "run":
                assert output.strip() == TRUTHS[0]["answer"]
            case "chat":
                assert output.strip() == TRUTHS[1]["answer"]
            case "inspect":
                assert "passed: SHA-256 of small files" in output
            case "targets":
                assert re.search(r"^ort-cpu-fp32 +yes +yes", output, re.MULTILINE)
            case "verify":
                assert output.strip().endswith("passed")
            case _:
                assert list(json.loads(output)) == documented_fields("`qwen3vl-export`")
                assert (workplace / "out" / "demo" / "engine.json").is_file()


def test_python_example(workplace: Path, demo_engine: Path) -> None:
    (source,) = blocks("python")
    if not (workplace / "out" / "demo").exists():  # this test runs alone
        (workplace / "out").mkdir()
        (workplace / "out" / "demo").symlink_to(demo_engine)
    source += "\nimport sys\nassert not {'torch', 'transformers', 'onnx'} & set(sys.modules)\n"
    first, *others = call([sys.executable, "-c", source], workplace).splitlines()
    answer = TRUTHS[0]["answer"]
    assert first.split()[:2] == [answer, "eos"]
    assert float(first.split()[2]) > 0
    assert others == [answer] * 4 + [str(len(answer))]


def test_examples_of_many_requests(demo_engine: Path, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "requests.md").read_text(encoding="utf-8")
    source = "".join(re.findall(r"^```python\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE))
    (tmp_path / "qwen3vl_export").symlink_to(ROOT / "qwen3vl_export")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "demo").symlink_to(demo_engine)
    expected = re.findall(r"^ *print\(.*\)  # (.+)$", source, re.MULTILINE)
    assert call([sys.executable, "-c", source], tmp_path).splitlines() == expected
    assert len(expected) == source.count("print(") >= 3


def test_the_export_from_python(tmp_path: Path) -> None:
    (source,) = re.findall(r"^```python\n(.*?)^```$", COMMANDS, flags=re.DOTALL | re.MULTILINE)
    output, target, weight_bytes, num_layers = call([sys.executable, "-c", source], tmp_path).split()
    written = Manifest.read(tmp_path / "engine")
    assert (output, target, int(num_layers)) == ("engine", "ort-cpu-fp32", written.model.text.num_layers)
    assert int(weight_bytes) == written.weight_bytes > 0


def test_demo_script_reads_the_picture_before_it_exports(tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "scripts" / "demo.py"), "--output", str(tmp_path / "engine")]
    done = subprocess.run([*script, "--image", str(tmp_path / "none.png")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == errors.ImageError.exit_code
    assert done.stderr.startswith("error: ") and "none.png" in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_demo_script_takes_the_engine_that_is_there_for_a_picture_of_ones_own(
    demo_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import demo

    exports: list[list[str]] = []

    def failing(command: list[str], check: bool) -> subprocess.CompletedProcess[str]:
        exports.append(command)
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(subprocess, "run", failing)
    picture = str(demo.IMAGES / TRUTHS[0]["file"])
    assert demo.show(demo_engine, picture) == 0
    output = capsys.readouterr()
    assert f"answer:   {TRUTHS[0]['answer']}\n" in output.out
    assert output.err.startswith(f"engine:   {demo_engine}, which was there; `make demo` without IMAGE builds it anew")
    assert exports == []
    # Where there is none, or a damaged one, or without IMAGE, it is built.
    (tmp_path / "engine.json").write_text("{}")
    for folder, image in ((tmp_path, picture), (tmp_path / "none", picture), (demo_engine, None)):
        assert demo.show(folder, image) == 3
    assert [command[-1] for command in exports] == [str(tmp_path), str(tmp_path / "none"), str(demo_engine)]


@pytest.mark.parametrize("truth", [0, 1])
def test_demo_script_compares_answer_and_truth(
    truth: int, demo_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With picture 0 and the truth of picture `truth`; the export is left out."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import demo

    entry = TRUTHS[0] | {"answer": TRUTHS[truth]["answer"]}
    (tmp_path / "truth.json").write_text(json.dumps([entry]))
    (tmp_path / entry["file"]).write_bytes((demo.IMAGES / entry["file"]).read_bytes())
    monkeypatch.setattr(demo, "IMAGES", tmp_path)
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    monkeypatch.setattr(subprocess, "run", lambda command, check: subprocess.CompletedProcess(command, 0))
    assert demo.show(demo_engine, None) == (0 if truth == 0 else 1)
    output = capsys.readouterr()
    assert f"answer:   {TRUTHS[0]['answer']}\ntruth:    {entry['answer']}\n" in output.out
    assert output.err == ("" if truth == 0 else "The answer differs from the truth.\n")


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = {name for page in PAGES for name in re.findall(r"\bmake ([a-z-]+)(?=[ `\n])", page.read_text("utf-8"))}
    expected = {"demo", "test", "lint", "setup", "bench", "lock", "test-newest", "test-oldest", "test-transformers"}
    assert named >= expected
    assert {name for name in named if not re.search(rf"^{name}:", makefile, re.MULTILINE)} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []


FOLDERS = (
    *("benchmarks", "configs", "demo_training", "docs", "engines", "qwen3_vl", "qwen3vl_export", "runtime"),
    *("scripts", "tests"),
)
ELSEWHERE = {
    "docs/contrib_ops/cuda/moe_qmoe.md",  # of ONNX Runtime
    "docs/source/getting_started/thinking_budget.md",  # of Qwen3
    *("docs/Operators.md", "docs/ContribOperators.md"),  # of ONNX and ONNX Runtime
    *("engines/targets/toy.py", "runtime/sessions/toy.py", "configs/targets/toy.toml", "runtime/deep/bad.py"),
}
"""Paths that sources name and that are not here; the latter are written by tests."""


def test_sources_and_documents_name_files_that_exist() -> None:
    sources = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    sources += [*(ROOT / "configs").rglob("*.toml"), ROOT / "Makefile", ROOT / "pyproject.toml", *PAGES]
    name = re.compile(rf"(?<![\w/.-])(?:{'|'.join(FOLDERS)})/[\w/.-]+\.(?:py|md|toml|jinja)\b")
    named = {path: set(name.findall(path.read_text(encoding="utf-8"))) for path in sources}
    gone = {
        (str(path.relative_to(ROOT)), found) for path in named for found in named[path] if not (ROOT / found).exists()
    }
    assert {found for _, found in gone} == ELSEWHERE, sorted(gone)
    assert sum(map(len, named.values())) > 200


def test_where_to_change_names_files() -> None:
    section = README.split("## Where do I change")[1].split("\n## ")[0]
    paths = [path for path in re.findall(r"`([^`]+)`", section) if "/" in path]
    assert len(paths) > 20
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("path", tables.generated(), ids=lambda path: path.name if path.suffix == ".svg" else path.stem)
def test_generated_parts_are_those_of_the_results(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == tables.generated()[path], "run: python -m benchmarks report"


def test_documented_json_of_engine_commands(demo_engine: Path, tmp_path: Path) -> None:
    image = ROOT / "qwen3vl_export" / "demo" / "images" / TRUTHS[0]["file"]
    answer = json.loads(call(["qwen3vl", "run", str(demo_engine), "Read", "--image", str(image), "--json"], ROOT))
    assert list(answer) == documented_fields("`qwen3vl run`")
    assert list(answer["stats"]) == documented_fields("its `stats`")
    loaded = ["qwen3vl", "bench", str(demo_engine), "--concurrency", "2", "--new-tokens", "2", "--image-size", "none"]
    assert list(json.loads(call([*loaded, "--json"], ROOT))) == documented_fields("`qwen3vl bench` with many requests")
    inspected = json.loads(call(["qwen3vl", "inspect", str(demo_engine), "--json"], ROOT))
    assert set(inspected) == set(documented_fields("`qwen3vl inspect`"))
    to = ["--for", "triton", "--output", str(tmp_path)]
    packaged = json.loads(call(["qwen3vl", "package", str(demo_engine), *to, "--json"], ROOT))
    assert list(packaged) == documented_fields("`qwen3vl package`")
    listed = json.loads(call(["qwen3vl", "targets", "--model", "demo", "--json"], ROOT))
    assert list(listed) == documented_fields("`qwen3vl targets`")
    for row in listed["targets"]:
        assert list(row) == documented_fields("its `targets`")


def test_documented_json_of_bench() -> None:
    from helpers.bench_results import result
    from qwen3vl_export.bench.compare import compare
    from qwen3vl_export.bench.results import Earlier
    from qwen3vl_export.bench.tables import as_json, flat_values

    assert list(flat_values(result())) == documented_fields("`qwen3vl bench --json`")
    plain = json.loads(as_json([result()], None))
    compared = json.loads(as_json([result()], compare([result()], [Earlier.parse(plain["points"][0], "file")])))
    assert list(compared) == documented_fields("`qwen3vl bench --output json`")
    (point,) = compared["points"]
    assert list(point) == documented_fields("its `points`")
    assert list(point["environment"]) == documented_fields("its `environment`")
    row = next(line for line in COMMANDS.splitlines() if line.startswith("| its `points`"))
    for name in ("ttft_s", "phases_s"):
        assert all(f"`{part}`" in row for part in point[name])
    assert all(f"`{part}`" in row for part in point["compared"]["ttft_s"])
    assert all(f"`{part}`" in COMMANDS for part in compared["comparison"])


def test_documented_options_of_a_sweep() -> None:
    table = COMMANDS.split("### qwen3vl bench")[1].split("\n\n")[2]
    documented = set(re.findall(r"^\| `(--[\w-]+)|\(`(--[\w-]+)`\)", table, re.MULTILINE))
    names = {name for pair in documented for name in pair if name}
    from dataclasses import fields

    from qwen3vl_export.cli.bench_sweep import ReportOptions, SweepOptions

    of_records = {f"--{each.name.replace('_', '-')}" for kind in (SweepOptions, ReportOptions) for each in fields(kind)}
    assert names == of_records | {"--runs"} and names <= options_of("bench")


def test_documented_json_of_verify() -> None:
    from qwen3vl_export.parity.report import Check, Report

    report = Report("target", "demo", "fp32", (Check("case", "name", 0.0),)).to_dict()
    assert list(report) == documented_fields("`qwen3vl verify`")
    assert list(report["checks"][0]) == documented_fields("its `checks`")


def test_documented_exit_codes() -> None:
    section = COMMANDS.split("## Exit codes")[1]
    documented = {name: int(code) for code, name in re.findall(r"^\| (\d+) \|.*\(`(\w+)`\)", section, re.MULTILINE)}
    assert documented == {error.__name__: error.exit_code for error in errors.Qwen3VLError.__subclasses__()}


def options_of(command: str) -> set[str]:
    from typer.main import get_command

    from qwen3vl_export.cli.run import app

    parameters = get_command(app).commands[command].params  # type: ignore[attr-defined]
    return {option for parameter in parameters for option in (*parameter.opts, *parameter.secondary_opts)}


def test_documented_options_of_the_runtime() -> None:
    from runtime.engine_options import OpeningKeywords
    from runtime.model import Qwen3VLModel
    from runtime.serving_options import ServingOptions

    rows = re.findall(r"^\| `(--[\w-]+)`.*? \| `(\w+)`", COMMANDS, re.MULTILINE)
    arguments = set(inspect.signature(Qwen3VLModel.from_engine).parameters) - {"path", "serving", "keywords"}
    arguments |= set(ServingOptions.__dataclass_fields__) | set(OpeningKeywords.__annotations__)
    section = (
        (ROOT / "docs" / "requests.md").read_text(encoding="utf-8").split("## Limits, refusals")[1].split("\n- ")[0]
    )
    serving = re.findall(r"^\| `(\w+)` \| .+ \| .+ \|$", section, re.MULTILINE)
    assert len(serving) > 5 and sorted([*(argument for _, argument in rows), *serving]) == sorted(arguments)
    assert {option for option, _ in rows} <= options_of("run") & options_of("chat")
    of_chat = COMMANDS.split("`chat` has ")[1].split(". Defaults")[0]
    assert set(re.findall(r"`(--[\w-]+)`", of_chat)) <= options_of("chat")


def test_documented_defaults_of_an_answer() -> None:
    from runtime.generation_config import OPTIONS, GenerationOptions

    rows = re.findall(r"^\| `(\w+)` \| ([\w.()]+) \| .*\|$", COMMANDS, re.MULTILINE)
    documented = {name: ast.literal_eval(default) for name, default in rows}
    defaults = {name: getattr(GenerationOptions(), name) for name in OPTIONS}
    assert documented == {name: value for name, value in defaults.items() if name != "eos_token_ids"}
    alone = set(re.findall(r"^\| `(\w+)` \| .*in Python alone.*\|$", COMMANDS, re.MULTILINE))
    assert alone == {"best_of", "logit_bias", "top_logprobs"}
    options = {f"--{name.replace('_', '-')}" for name in documented.keys() - alone}
    assert options | {"--greedy"} <= options_of("run")


def test_model_card_counts_its_wrong_answers() -> None:
    """docs/demo.md: wrong reads, those with one digit mistaken, and that the fp32 engine answers as PyTorch does."""
    summary = json.loads((ROOT / "docs" / "demo_accuracy.json").read_text(encoding="utf-8"))
    pairs = [(wrong["truth"], wrong["answer"].strip()) for wrong in summary["wrong"] if wrong["task"] == "read"]
    num_mistaken = sum(
        len(truth) == len(answer) and sum(a != b for a, b in zip(truth, answer, strict=True)) == 1
        for truth, answer in pairs
    )
    card = " ".join((ROOT / "docs" / "demo.md").read_text(encoding="utf-8").split())
    assert f"Of the {len(pairs)} wrong reads {num_mistaken} mistake exactly one digit" in card
    engine = json.loads((ROOT / "docs" / "demo_accuracy_ort-cpu-fp32.json").read_text(encoding="utf-8"))
    assert ("The engine `ort-cpu-fp32` gives the same 8000 answers" in card) == (engine == summary)
    assert 4 * summary["all"]["canvases"] == 8000
