"""Every module of `qwen3_vl`: what it offers is elsewhere, told alike to Python, type checkers and readers."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from helpers import ROOT

pytestmark = pytest.mark.portable

PAGE = (ROOT / "docs" / "public_api.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `(qwen3_vl[\w.]*)` \| (.+?) \| .+ \|$", PAGE, re.MULTILINE)
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
PACKAGES = ("components/__init__.py", "integrations/__init__.py")
WITHOUT_NAMES = [ROOT / "qwen3_vl" / name for name in (*PACKAGES, "errors.py", "lazy.py", "names.py")]
FILES = [path for path in sorted((ROOT / "qwen3_vl").rglob("*.py")) if path not in WITHOUT_NAMES]
HEAVY = {"numpy", "PIL", "torch", "onnx", "onnx_ir", "onnxruntime", "transformers", "engines", "qwen3vl_export"}


# Modules whose names are classes of a library that an extra brings, by module.
INTEGRATIONS = {"optimum": "transformers", "polygraphy": "polygraphy"}


def skip_without_library(text: str) -> None:
    """Skip a test of a module, or an example, whose library is not here: none of the portable ones needs one."""
    for module, library in INTEGRATIONS.items():
        if f"integrations.{module}" in text:
            pytest.importorskip(library, reason=f"{library} is not installed")


def module_of(path: Path) -> ModuleType:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return importlib.import_module(".".join(parts).removesuffix(".__init__"))


def typed_names(path: Path) -> dict[str, str]:
    """Return the names that type checkers are told of, and the modules they are imported from."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    assert all(isinstance(node, ast.ImportFrom) for node in block.body)
    return {alias.name: node.module for node in block.body for alias in node.names}


def test_the_modules_are_all_of_the_package() -> None:
    names = {module_of(path).__name__ for path in FILES}
    parts = {f"components.{each}" for each in ("attention", "hardware", "memory", "routing")}
    parts |= {f"integrations.{each}" for each in (*INTEGRATIONS, "triton")}
    assert names == {"qwen3_vl", *(f"qwen3_vl.{each}" for each in ("config", "core", "utils", *parts))}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_names_are_those_of_other_modules(path: Path) -> None:
    module, typed = module_of(path), typed_names(path)
    skip_without_library(module.__name__)
    assert module.__doc__ and dir(module) == sorted(typed) == sorted(module.__all__)
    for name, source in typed.items():
        found: dict[str, object] = {}
        exec(f"from {source} import {name}", found)
        assert getattr(module, name) is found[name], name
        assert isinstance(found[name], (str, ModuleType)) or found[name].__doc__
    words = f"'{module.__name__}' has no attribute 'missing'; it has {module.__all__[0]}"
    with pytest.raises(AttributeError, match=words):
        module.missing  # noqa: B018


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_page_lists_them(path: Path) -> None:
    module = module_of(path)
    documented = [name for row, names in ROWS if row == module.__name__ for name in re.findall(r"`(\w+)`", names)]
    assert sorted(documented) == sorted(module.__all__)


def test_importing_every_module_loads_no_library() -> None:
    modules = ", ".join(module_of(path).__name__ for path in FILES)
    code = f"import sys, {modules}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert loaded & HEAVY == set() and {"qwen3_vl", "runtime"} <= loaded


@pytest.mark.parametrize(
    ("module", "name", "library", "extra"),
    [
        ("components.attention", "FlashAttention2", "torch", "export"),
        ("components.attention", "causal_attention", "torch", "export"),
        ("components.routing", "MixtureOfExperts", "torch", "export"),
        ("components.memory", "EagerCache", "torch", "export"),
        ("components.memory", "OrtKVCache", "onnxruntime", "cpu"),
        ("integrations.polygraphy", "EngineRunner", "polygraphy", "polygraphy"),
    ],
)
def test_a_library_that_is_missing(module: str, name: str, library: str, extra: str) -> None:
    code = f"import sys; sys.modules[{library!r}] = None\nfrom qwen3_vl.{module} import {name}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    error, remedy = done.stderr.splitlines()[-2:]
    assert error == f"ImportError: {name} needs the Python package {library!r}, which is not installed"
    assert remedy.startswith(f"  remedy: install the extra `{extra}` of qwen3vl-export, for instance: ")


def test_a_library_of_no_extra_is_missing() -> None:
    code = "import sys; sys.modules['numpy'] = None\nfrom qwen3_vl.utils import process_image"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].startswith("ModuleNotFoundError: import of numpy halted")


@pytest.mark.parametrize("index", range(len(EXAMPLES)))
def test_examples_print_what_the_page_says(
    index: int, demo_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "qwen3vl_export").symlink_to(ROOT / "qwen3vl_export")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "demo").symlink_to(demo_engine)
    monkeypatch.chdir(tmp_path)
    skip_without_library(EXAMPLES[index])
    expected = re.findall(r"^print\(.*\)  # (.+)$", EXAMPLES[index], re.MULTILINE)
    assert len(expected) == EXAMPLES[index].count("print(") > 0
    exec(EXAMPLES[index], {})
    assert capsys.readouterr().out.splitlines() == expected


def test_every_module_has_an_example() -> None:
    used = set(re.findall(r"^from (qwen3_vl[\w.]*) import", "\n".join(EXAMPLES), re.MULTILINE))
    assert used == {row for row, _ in ROWS}
