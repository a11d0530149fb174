"""Rules of the layout: imports point one way, and running an engine loads no training or export library."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from helpers import ROOT
from runtime import errors

HEAVY = {"torch", "torchvision", "onnx", "onnx_ir", "onnxscript", "transformers", "tensorrt"}
FORBIDDEN = {
    "runtime": {"engines", "qwen3vl_export", "qwen3_vl", *HEAVY - {"tensorrt"}},
    "engines": {"qwen3vl_export", "qwen3_vl", "torch", "torchvision", "transformers"},
    "configs": {"runtime", "engines", "qwen3vl_export", "qwen3_vl", "numpy", *HEAVY},
}


def imported_packages(source: str) -> set[str]:
    """Top-level packages that a source imports anywhere, inside functions too."""
    packages = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            packages |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            packages.add((node.module or "").partition(".")[0])
    return packages


def violations(package: str, root: Path) -> list[str]:
    files = sorted((root / package).rglob("*.py"))
    assert files, f"{package} holds no source"
    return [
        f"{path.relative_to(root)} imports {name}"
        for path in files
        for name in sorted(imported_packages(path.read_text(encoding="utf-8")) & FORBIDDEN[package])
    ]


@pytest.mark.parametrize("package", sorted(FORBIDDEN))
def test_imports_point_one_way(package: str) -> None:
    assert violations(package, ROOT) == []


def test_the_import_rule_sees_every_form_of_import(tmp_path: Path) -> None:
    (tmp_path / "runtime" / "deep").mkdir(parents=True)
    source = "import numpy\ndef f():\n    import torch.nn as nn\n    from engines.target import Target\n"
    (tmp_path / "runtime" / "deep" / "bad.py").write_text(source, encoding="utf-8")
    expected = ["runtime/deep/bad.py imports engines", "runtime/deep/bad.py imports torch"]
    assert violations("runtime", tmp_path) == expected


_ERRORS = {name for name, value in vars(errors).items() if isinstance(value, type)}
# Where the type of an argument is wrong, what it has to be stands in the message.
_ARGUMENTS = {"runtime/chat.py", "runtime/messages.py", "runtime/option_checks.py"}


@pytest.mark.parametrize("package", ["runtime", "engines", "qwen3vl_export", "qwen3_vl"])
def test_an_error_says_what_to_do(package: str) -> None:
    found = []
    for path in sorted((ROOT / package).rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            kind = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
            if kind in _ERRORS and not (name in _ARGUMENTS and kind == "UsageError"):
                assert isinstance(node, ast.Call)
                if "remedy" not in {keyword.arg for keyword in node.keywords}:
                    found.append(f"{name}:{node.lineno}: {kind} without a remedy")
    assert found == []


MOST_LINES = 60
"""Of a function, its signature and docstring included."""


@pytest.mark.parametrize(
    "folder", ["runtime", "engines", "qwen3vl_export", "qwen3_vl", "benchmarks", "scripts", "demo_training"]
)
def test_functions_are_short(folder: str) -> None:
    found = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            # A kernel for a GPU is one function.
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and "triton" not in path.parts:
                num_lines = (node.end_lineno or 0) - node.lineno + 1
                if num_lines > MOST_LINES:
                    found.append(f"{path.relative_to(ROOT)}: {node.name} has {num_lines} lines")
    assert found == []


def loaded_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("statement", ["import qwen3_vl", "import runtime.model", "from qwen3_vl import Qwen3VLModel"])
def test_import_loads_no_heavy_library(statement: str) -> None:
    assert loaded_after(statement) & HEAVY == set()


def test_public_import_is_lazy() -> None:
    """Of ours it loads what turns telemetry off (tests/runtime/test_settings.py)."""
    loaded = loaded_after("import qwen3_vl")
    assert loaded & {"numpy", "PIL", "tokenizers", "jinja2", "onnxruntime", "engines", "qwen3vl_export"} == set()
    assert "runtime" in loaded and "runtime.model" not in loaded


def test_loading_is_seen() -> None:
    assert "onnx" in loaded_after("import onnx")


def test_public_names_are_those_of_the_runtime() -> None:
    import qwen3_vl
    from runtime import __version__, answer, errors
    from runtime.conversation import Conversation
    from runtime.generation_config import GenerationOptions
    from runtime.grounding import Box, Point
    from runtime.model import Qwen3VLModel
    from runtime.piece import Piece
    from runtime.raw_prompt import RawPrompt
    from runtime.stream import Stream
    from runtime.tools.call import ToolCall

    found = {name: getattr(qwen3_vl, name) for name in qwen3_vl.__all__}
    assert found.pop("errors").__all__ == sorted(name for name, value in found.items() if is_error(value))
    assert found.pop("__version__") == __version__
    assert {name: value for name, value in found.items() if not is_error(value)} == {
        "Box": Box,
        "Conversation": Conversation,
        "Generation": answer.Generation,
        "GenerationOptions": GenerationOptions,
        "Piece": Piece,
        "Point": Point,
        "Qwen3VLModel": Qwen3VLModel,
        "RawPrompt": RawPrompt,
        "Stats": answer.Stats,
        "Stream": Stream,
        "ToolCall": ToolCall,
    }
    every_error = {errors.Qwen3VLError, *errors.Qwen3VLError.__subclasses__()}
    assert {value for value in found.values() if is_error(value)} == every_error
    with pytest.raises(AttributeError, match="it has Box, BundleError, CapacityError, "):
        qwen3_vl.missing  # noqa: B018
    assert dir(qwen3_vl) == qwen3_vl.__all__


def is_error(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Exception)


def test_entry_points_and_extras() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["scripts"] == {
        "qwen3vl-export": "qwen3vl_export.cli.export:main",
        "qwen3vl": "qwen3vl_export.cli.run:main",
    }
    plugin = "qwen3vl_export.integrations.polygraphy.plugin:argument_groups"
    assert project["entry-points"] == {"polygraphy.run.plugins": {"qwen3vl": plugin}}
    extras = {"export", "cpu", "cuda", "tensorrt", "tensorrt-rtx", "verify", "plot", "test", "dev"}
    extras |= {"video", "structured", "heif", "optimum", "polygraphy", "serve", "decode-plan", "ray", "test-cluster"}
    assert set(project["optional-dependencies"]) == extras
    assert HEAVY.isdisjoint(project["dependencies"])


def test_core_is_lazy_and_re_exports() -> None:
    import qwen3_vl.core
    from qwen3vl_export.eager import open_eager
    from qwen3vl_export.export import Exported, export
    from qwen3vl_export.modeling import Qwen3VL
    from qwen3vl_export.request import ExportRequest
    from runtime.model import Qwen3VLModel

    assert loaded_after("from qwen3_vl.core import Qwen3VLModel") & HEAVY == set()
    found = [getattr(qwen3_vl.core, name) for name in qwen3_vl.core.__all__]
    assert found == [ExportRequest, Exported, Qwen3VL, Qwen3VLModel, export, open_eager]
    with pytest.raises(AttributeError, match="it has ExportRequest, Exported, Qwen3VL, "):
        qwen3_vl.core.missing  # noqa: B018


def test_core_without_torch_says_what_to_install() -> None:
    code = "import sys; sys.modules['torch'] = None\nfrom qwen3_vl.core import Qwen3VLModel, open_eager"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    error, remedy = done.stderr.splitlines()[-2:]
    assert error == "ImportError: open_eager needs the Python package 'torch', which is not installed"
    assert remedy.startswith("  remedy: install the extra `export` of qwen3vl-export, for instance: ")


@pytest.mark.parametrize("package", ["runtime", "engines", "qwen3vl_export", "qwen3_vl", "configs"])
def test_environment_variables_are_touched_in_one_file(package: str) -> None:
    texts = {path.relative_to(ROOT): path.read_text(encoding="utf-8") for path in (ROOT / package).rglob("*.py")}
    found = {str(path) for path, text in texts.items() if "os.environ" in text or "getenv" in text}
    assert found == ({"runtime/settings.py"} if package == "runtime" else set())


def private_names(source: str) -> set[str]:
    """Private names of the product that a source imports, asks of what it imports, or patches in it."""
    tree, found, imported = ast.parse(source), set(), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in _PRODUCT:
            imported |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            found |= {f"{node.module}.{alias.name}" for alias in node.names if is_private(alias.name)}
        elif isinstance(node, ast.Import):
            names = (alias for alias in node.names if alias.name.partition(".")[0] in _PRODUCT)
            imported |= {alias.asname or alias.name: alias.name for alias in names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            owner = imported.get(ast.unparse(node.value))
            found |= set() if owner is None else {f"{owner}.{node.attr}"}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("setattr") and len(node.args) > 1:
            owner, name = imported.get(ast.unparse(node.args[0])), node.args[1]
            if owner and isinstance(name, ast.Constant) and is_private(str(name.value)):
                found.add(f"{owner}.{name.value}")
    return found


_PRODUCT = {"runtime", "engines", "qwen3vl_export", "qwen3_vl", "configs", "benchmarks", "scripts", "demo_training"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_tests_use_no_private_name() -> None:
    found = {
        path.relative_to(ROOT).as_posix(): private_names(path.read_text(encoding="utf-8"))
        for path in sorted((ROOT / "tests").rglob("*.py"))
    }
    assert {path: names for path, names in found.items() if names} == {}


def test_the_rule_sees_private_names() -> None:
    source = (
        "from engines.choose import _stored, consider\nfrom engines import choose as c\nimport runtime.model\n"
        "import numpy as np\nc._rules()\nruntime.model._read_json\nnp._x\nc.__name__\nself._mine\n"
        'patch.setattr(c, "_budget", 1)\npatch.setattr(np, "_x", 1)\npatch.setattr(c, "estimate", 1)\n'
    )
    expected = {"engines.choose._stored", "engines.choose._rules", "engines.choose._budget", "runtime.model._read_json"}
    assert private_names(source) == expected


def untuned_calls(source: str) -> list[str]:
    """Calls of `from_engine` that take what `qwen3vl tune` has stored on the machine."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    opened = [each for each in calls if isinstance(each.func, ast.Attribute) and each.func.attr == "from_engine"]
    return [ast.unparse(each) for each in opened if "tuned" not in ast.unparse(each)]


def test_benchmarks_do_not_depend_on_what_was_tuned_on_the_machine() -> None:
    files = sorted((ROOT / "benchmarks").rglob("*.py"))
    found = {path.name: untuned_calls(path.read_text(encoding="utf-8")) for path in files}
    assert {name: calls for name, calls in found.items() if calls} == {}
    assert untuned_calls("Model.from_engine(a, tuned=False)\nModel.from_engine(b)") == ["Model.from_engine(b)"]
