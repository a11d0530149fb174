"""Every name of TensorRT's API that the code uses, against tensorrt_rtx's bindings and the type stubs of `tensorrt`.

The code takes the library as an argument, so no type checker sees its names, and `tensorrt` itself is installed on GPU
machines alone. Uses are found by walking the source: an attribute of an expression in `OBJECTS`.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from helpers import ROOT
from helpers.tensorrt_stubs import parameters, read

STUBS = json.loads((ROOT / "tests" / "data" / "tensorrt_stubs.json").read_text(encoding="utf-8"))
DOCS = ROOT / "docs" / "targets.md"
MODULE = ""  # the library itself
FILES = (
    *sorted((ROOT / "engines" / "tensorrt").glob("*.py")),
    *sorted((ROOT / "runtime").glob("tensorrt*.py")),
    ROOT / "runtime" / "sessions" / "tensorrt.py",
    ROOT / "benchmarks" / "plans.py",
)
# Class of each expression that holds something of the library; the same words mean the same in all files.
OBJECTS = {
    "trt": MODULE,
    "self.trt": MODULE,
    "self._trt": MODULE,
    "self._library.trt": MODULE,
    "builder": "Builder",
    "self._builder": "Builder",
    "network": "INetworkDefinition",
    "self.network": "INetworkDefinition",
    "parser": "OnnxParser",
    "parser.get_error(i)": "ParserError",
    "layer": "ILayer",
    "layer.get_input(0)": "ITensor",
    "layer.get_output(0)": "ITensor",
    "layer.type": "LayerType",
    "output": "ITensor",
    "t": "ITensor",
    "t.dtype": "DataType",
    "output.dtype": "DataType",
    "config": "IBuilderConfig",
    "built": "IOptimizationProfile",
    "runtime": "Runtime",
    "self._runtime": "Runtime",
    "engine": "ICudaEngine",
    "self._engine": "ICudaEngine",
    "opened": "ICudaEngine",
    "opened.create_engine_inspector()": "EngineInspector",
    "engine.get_tensor_dtype(name)": "DataType",
    "context": "IExecutionContext",
    "refitter": "Refitter",
}
# In these places the same words mean something else.
ELSEWHERE = {
    ("runtime/tensorrt_plan.py", "config"): "IRuntimeConfig",
    ("runtime/tensorrt_plan.py", "parser"): "OnnxParserRefitter",
    ("engines/tensorrt/checks.py", "config"): None,
    ("engines/tensorrt/profiles.py", "config"): None,
    ("engines/tensorrt/lowering.py", "config"): None,
    ("engines/tensorrt/experts.py", "config"): None,
    ("benchmarks/plans.py", "output"): None,
    ("benchmarks/plans.py", "engine"): None,
    ("engines/tensorrt/compiler.py", "builder"): None,
}
# Names that the code holds as text: types of layers and tensors, and the members that getattr takes.
AS_TEXT = {
    "LayerType": ("ATTENTION_INPUT", "DEQUANTIZE", "KV_CACHE_UPDATE", "QUANTIZE"),
    "DataType": ("FLOAT", "HALF", "BF16", "INT4", "FP8", "FP4", "INT8", "INT64", "INT32", "BOOL"),
    "IExecutionContext": ("is_stream_capturable",),
    "ComputeCapability": ("SM75", "SM80", "SM86", "SM89", "SM120", "SM121"),
}
# Words of the API that are also words of ours; a name of the API on an expression not listed is refused.
OURS = re.compile(
    r"^(super\(\)|value|node|node\.\w+.*|value\.\w+|profile|each|trt\.__\w+__|options|self|file|path|source|folder|done|process"
    r"|outcome|target|ir|common|math|json|done\.\w+|model(\.\w+)*|.*\bshape|dim|facts(\.\w+)*|tensor|text|(.*\.)text)$"
)


@dataclass(frozen=True)
class Use:
    """One use of a name: class (empty for the library), name, and for a call how many arguments of which names."""

    cls: str
    name: str
    is_call: bool = False
    num_positional: int = 0
    keywords: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return f"{self.cls}.{self.name}" if self.cls else self.name


def class_of(place: str, expression: str) -> str | None:
    """The class of an expression; of `trt.X.Y`, what X is."""
    if (place, expression) in ELSEWHERE:
        return ELSEWHERE[place, expression]
    if expression in OBJECTS:
        return OBJECTS[expression]
    for library in (name for name, cls in OBJECTS.items() if cls == MODULE):
        inner = expression.removeprefix(f"{library}.")
        if inner != expression and re.fullmatch(r"[A-Z]\w*(\.[A-Z]\w*)*", inner):
            return inner
    return None


def uses_in(place: str, source: str) -> set[Use]:
    tree = ast.parse(source)
    calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or node.attr.startswith("__"):
            continue
        cls = class_of(place, ast.unparse(node.value))
        call = calls.get(id(node))
        if cls is None:
            continue
        if call is None:
            found.add(Use(cls, node.attr))
        else:
            has_star = any(isinstance(argument, ast.Starred) for argument in call.args)
            assert not has_star, f"{place}: {ast.unparse(call)}: arguments that cannot be counted"
            keywords = frozenset(str(keyword.arg) for keyword in call.keywords)
            found.add(Use(cls, node.attr, True, len(call.args), keywords))
    return found


def all_uses() -> set[Use]:
    return {Use(cls, name) for cls, names in AS_TEXT.items() for name in names} | {
        use
        for path in FILES
        for use in uses_in(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))
        if use.name not in ("name",)  # of an enumerator
    }


class Stubs:
    """The API as the stubs have it; a member maps to the parameters of its overloads."""

    def __init__(self, classes: Mapping[str, Mapping[str, list[list[str]]]]) -> None:
        self._classes = classes

    def overloads(self, use: Use) -> list[list[str]] | None:
        """Return the parameters of each overload, empty if they are not known; None if there is no such name."""
        if use.cls == MODULE:
            return self._classes[use.name].get("__init__", []) if use.name in self._classes else None
        members = self._classes.get(use.cls, {})
        return members.get(use.name)


class Bindings:
    """The API of an imported library."""

    def __init__(self, library: Any) -> None:
        self._library = library

    def overloads(self, use: Use) -> list[list[str]] | None:
        holder = self._library
        for part in filter(None, use.cls.split(".")):
            holder = getattr(holder, part, None)
        found = getattr(holder, use.name, None)
        if found is None:
            return None
        if isinstance(found, type):
            found = found.__init__
        text = getattr(found, "__doc__", None) or ""
        name = getattr(found, "__name__", "")
        return [parameters(given) for given in re.findall(rf"^(?:\d+\. )?{name}\((.*)\) -> ", text, re.MULTILINE)]


def accepts(overload: list[str], use: Use) -> bool:
    names = [name.rstrip("=") for name in overload]
    if any(name.startswith("*") for name in names):
        return True
    given = set(names[: use.num_positional]) | use.keywords
    needed = {name for name in overload if not name.endswith("=")}
    return use.num_positional <= len(names) and use.keywords <= set(names) and needed <= given


def verdict(api: Stubs | Bindings, use: Use) -> str:
    """`yes`; `no` if there is no such name; `arguments` if it is there and takes others."""
    overloads = api.overloads(use)
    if overloads is None:
        return "no"
    if use.is_call and overloads and not any(accepts(overload, use) for overload in overloads):
        return "arguments"
    return "yes"


def documented(heading: str) -> set[str]:
    """Names in code font of a paragraph of docs/targets.md that begins with these words."""
    text = DOCS.read_text(encoding="utf-8")
    paragraph = next(part for part in text.split("\n\n") if part.startswith(heading))
    return set(re.findall(r"`([\w.]+)`", paragraph.removeprefix(heading).partition(":")[2]))


def verdicts() -> Iterator[tuple[Use, str, str]]:
    stubs, bindings = Stubs(STUBS["classes"]), Bindings(pytest.importorskip("tensorrt_rtx"))
    for use in sorted(all_uses(), key=str):
        yield use, verdict(stubs, use), verdict(bindings, use)


def test_the_code_is_seen() -> None:
    uses = {str(use) for use in all_uses()}
    assert {"Builder", "Builder.create_network", "BuilderFlag.STRIP_PLAN", "ILogger.Severity.ERROR"} <= uses
    assert {"ICudaEngine.create_execution_context", "IExecutionContext.execute_async_v3"} <= uses
    assert {"EngineInspector.get_engine_information", "LayerInformationFormat.JSON"} <= uses


def test_names_held_as_text_are_those_of_the_code() -> None:
    from engines.registry import get
    from engines.tensorrt.checks import TYPES
    from runtime.sessions.tensorrt import CACHE_TYPES, DECODER_TENSORS, VISION_TENSORS

    types = {*CACHE_TYPES.values(), *DECODER_TENSORS.values(), *VISION_TENSORS.values()}
    assert set(TYPES) == set(AS_TEXT["DataType"]) >= types
    assert (
        tuple("SM" + each.replace(".", "") for each in get("trt-rtx-fp16").compute_capabilities)
        == AS_TEXT["ComputeCapability"]
    )
    source = (ROOT / "engines" / "tensorrt" / "checks.py").read_text(encoding="utf-8")
    assert set(re.findall(r'kinds\["(\w+)"\]|\("([A-Z_]+)", facts', source)) == {
        ("", name) for name in AS_TEXT["LayerType"]
    }


def test_no_use_escapes() -> None:
    """A name of the API on an expression whose class is not listed would go unchecked."""
    names = {name for members in STUBS["classes"].values() for name in members if "_" in name and name.islower()}
    escaped = []
    for path in FILES:
        place = path.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in names:
                owner = ast.unparse(node.value)
                if class_of(place, owner) is None and not OURS.fullmatch(owner):
                    escaped.append(f"{place}: {owner}.{node.attr}")
    assert escaped == []


def test_no_call_takes_other_arguments() -> None:
    wrong = [str(use) for use, *found in verdicts() if "arguments" in found]
    assert wrong == []


def test_names_in_neither_are_listed_as_unchecked() -> None:
    assert {str(use) for use, *found in verdicts() if found == ["no", "no"]} == documented("In neither")


def test_names_in_one_alone_are_listed() -> None:
    assert {str(use) for use, *found in verdicts() if found == ["no", "yes"]} == documented("In `tensorrt_rtx` alone")
    assert {str(use) for use, *found in verdicts() if found == ["yes", "no"]} == documented("In the stubs alone")


SOURCE = """
def f(trt, network, config, parser, other):
    trt.Builder(other)
    trt.BuilderFlag.ABACUS
    config.set_flag(1, 2)
    network.num_layers
    parser.parse_from_file(model=1)
    parser.parse_from_file(file=1)
    other.create_network()
"""


def test_wrong_names_and_arguments_are_found() -> None:
    stubs, bindings = Stubs(STUBS["classes"]), Bindings(pytest.importorskip("tensorrt_rtx"))
    found = {
        (str(use), *sorted(use.keywords)): (verdict(stubs, use), verdict(bindings, use))
        for use in uses_in("a.py", SOURCE)
    }
    assert found == {
        ("Builder",): ("yes", "yes"),
        ("BuilderFlag",): ("yes", "yes"),
        ("BuilderFlag.ABACUS",): ("no", "no"),
        ("IBuilderConfig.set_flag",): ("arguments", "arguments"),
        ("INetworkDefinition.num_layers",): ("yes", "yes"),
        ("OnnxParser.parse_from_file", "model"): ("yes", "yes"),
        ("OnnxParser.parse_from_file", "file"): ("arguments", "arguments"),
    }


def test_stubs_are_read_line_by_line() -> None:
    text = '''
class A:
    """
    class NotThis:
    """
    class Inner:
        ONE: int
    field: list[str]
    def method(self, x: int, y: dict[str, int] = {}, *, z: int) -> None:
        """One line."""
    def method(self) -> int:
        ...
class B:
    pass
'''
    assert read(text) == {
        "A": {"Inner": [], "field": [], "method": [["x", "y=", "z"], []]},
        "A.Inner": {"ONE": []},
        "B": {},
    }
