"""What `qwen3_vl` offers a program: names, types, a model that says what it is, errors for every value."""

from __future__ import annotations

import collections
import fractions
import inspect
import os
import re
import shutil
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest

import qwen3_vl
import qwen3_vl.core
from helpers import ROOT
from qwen3vl_export.demo import IMAGES
from runtime.engine_options import OpeningKeywords
from runtime.errors import CapacityError, ImageError, Qwen3VLError, UsageError
from runtime.generation_config import OPTIONS as OPTION_NAMES
from runtime.generation_config import GenerationOptions
from runtime.generation_keywords import GenerationKeywords
from runtime.images import load_image
from runtime.model import Qwen3VLModel
from runtime.serving_options import ServingKeywords, ServingOptions

PACKAGES = ["runtime", "engines", "configs", "qwen3_vl", "qwen3vl_export"]


@pytest.fixture(scope="module")
def model(demo_engine: Path) -> Qwen3VLModel:
    return Qwen3VLModel.from_engine(demo_engine, threads=1, max_context=256)


def run(source: str, cwd: Path, *paths: Path | str) -> subprocess.CompletedProcess[str]:
    """Run Python in a folder, which is first on sys.path; `paths` come last."""
    code = f"import sys; sys.path[1:1] = []; sys.path += {[str(path) for path in paths]}\n{source}"
    return subprocess.run([sys.executable, "-S", "-c", code], cwd=cwd, capture_output=True, text=True)


@pytest.mark.portable
@pytest.mark.parametrize(
    ("files", "name"),
    [
        (["runtime.py"], "runtime"),
        (["runtime/__init__.py"], "runtime"),
        (["engines.py"], "engines"),
        (["configs/__init__.py"], "configs"),
        (["qwen3vl_export.py"], "qwen3vl_export"),
    ],
)
def test_a_name_that_is_taken_is_one_clear_error(files: list[str], name: str, tmp_path: Path) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("x = 1\n")
    for first in ("", f"import {name}\n"):  # found on sys.path, or loaded already
        done = run(f"{first}import qwen3_vl", tmp_path, ROOT)
        message = done.stderr[done.stderr.index("ImportError: ") :]
        place = (tmp_path / files[0]).parent if files[0].endswith("__init__.py") else tmp_path / files[0]
        assert message.startswith(f"ImportError: the name {name!r} is taken by {place}, but qwen3_vl needs its own ")
        assert f"{ROOT / name}\n  remedy: rename that module" in message
        assert done.stderr.count("ImportError: ") == 1


@pytest.mark.portable
def test_a_module_without_a_file_takes_a_name_too(tmp_path: Path) -> None:
    done = run(
        "import sys, types; sys.modules['configs'] = types.ModuleType('configs')\nimport qwen3_vl", tmp_path, ROOT
    )
    assert "ImportError: the name 'configs' is taken by a module without a file (configs), but" in done.stderr


@pytest.mark.portable
def test_folders_of_these_names_without_code_do_no_harm(tmp_path: Path) -> None:
    for name in PACKAGES:
        (tmp_path / name).mkdir()
    done = run("import qwen3_vl\nprint(qwen3_vl.__version__)", tmp_path, ROOT)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.portable
def test_the_wheel_says_that_it_is_typed(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in (*PACKAGES, "native", "optimum"):
        pattern = shutil.ignore_patterns("__pycache__", "*.safetensors")
        shutil.copytree(ROOT / name, source / name, ignore=pattern)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source / name)
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    environment = os.environ | {"CC": "/no/compiler", "CXX": "/no/compiler"}
    command = [sys.executable, "-c", build, str(tmp_path)]
    subprocess.run(command, cwd=source, env=environment, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"{name}/py.typed" for name in PACKAGES} <= names
    assert {name.partition("/")[0] for name in names if name.endswith(".py")} == {*PACKAGES, "optimum"}
    assert "qwen3_vl/components/attention.py" in names


@pytest.mark.portable
def test_typed_keywords_are_the_options() -> None:
    keywords = get_type_hints(GenerationKeywords)
    fields = set(OPTION_NAMES)
    assert fields <= set(keywords)
    for name in set(keywords) - fields:  # other spellings, which `replace` takes
        with pytest.raises(UsageError, match=name.removesuffix("_strings")):
            GenerationOptions().replace(**{name: object()})
    for method in (Qwen3VLModel.generate, Qwen3VLModel.stream):
        parameters = inspect.signature(method).parameters
        more = ["on_piece"] if method is Qwen3VLModel.generate else []
        names = ["messages", "options", "tools", "tool_choice", "parallel_tool_calls"]
        names += ["chat_template_kwargs", "priority", "timeout_s"]
        assert list(parameters) == ["self", *names, *more, "keywords"]
        assert str(parameters["keywords"].annotation) == "Unpack[RequestKeywords]"
    assert set(get_type_hints(ServingKeywords)) == set(ServingOptions.__dataclass_fields__)
    with pytest.raises(UsageError, match="unknown generation option 'max_new_token'"):
        GenerationOptions().replace(max_new_token=1)


@pytest.mark.portable
def test_a_model_says_what_is_open(model: Qwen3VLModel, demo_engine: Path) -> None:
    expected = f"Qwen3VLModel({str(demo_engine)!r}, target='ort-cpu-fp32', model='demo', max_context=256, threads=1)"
    assert repr(model) == expected


def question(index: int = 0) -> list[dict[str, Any]]:
    image = str(IMAGES / f"held_out_{index}.png")
    return [
        {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "Read the digits."}]}
    ]


@pytest.mark.portable
def test_options_may_be_one_object(model: Qwen3VLModel) -> None:
    whole = model.generate(question())
    assert (whole.text, whole.finish_reason) == ("1654", "eos")
    # Without ids of its own the model's end the answer.
    assert model.generate(question(), GenerationOptions()).finish_reason == "eos"
    short = model.generate(question(), GenerationOptions(max_new_tokens=2))
    assert (short.token_ids, short.finish_reason) == (whole.token_ids[:2], "length")
    both = model.generate(question(), options=GenerationOptions(max_new_tokens=2), max_new_tokens=3)
    assert both.token_ids == whole.token_ids[:3]
    endless = model.generate(question(), GenerationOptions(max_new_tokens=9), eos_token_id=[])
    assert endless.finish_reason == "length" and endless.stats.new_tokens == 9
    for wrong in ({"max_new_tokens": 2}, 5, "x"):
        with pytest.raises(UsageError, match=f"options must be GenerationOptions, got {type(wrong).__name__}"):
            model.generate(question(), wrong)  # type: ignore[arg-type]


@pytest.mark.portable
def test_a_stream_is_closed_with_its_block(model: Qwen3VLModel) -> None:
    with model.stream(question()) as stream:
        assert next(stream)
    assert list(stream) == []
    with pytest.raises(ZeroDivisionError), model.stream(question()) as stream:
        next(stream)
        raise ZeroDivisionError
    assert model.generate(question()).text == "1654"  # the turn was given back


class Hostile:
    """Nothing that Python does with it works."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("evil ==")

    def __repr__(self) -> str:
        raise RuntimeError("evil repr")

    def __iter__(self) -> Any:
        raise RuntimeError("evil iter")


class HostileList(list[Any]):
    def __iter__(self) -> Any:
        raise RuntimeError("evil iter")

    def __contains__(self, value: object) -> bool:
        raise RuntimeError("evil in")


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


LOOP: list[Any] = []
LOOP.append(LOOP)
VALUES: list[Any] = [
    10**400, -(10**5000), float("nan"), float("inf"), 1j, "", "\ud800", "\x00", b"x", [], {}, [[]], {1: 2}, {None: 1},
    nested(50), nested(5000), nested(100_000), LOOP, {1, 2}, object(), object, len, Hostile(),
    HostileList([1]), fractions.Fraction(10**400), np.float64("nan"), np.zeros(3), np.array("a"), slice(1), Ellipsis,
    collections.UserList(["x"]), "x" * 10**6,
]  # fmt: skip
ARGUMENTS = ["options", "tools", "tool_choice", "parallel_tool_calls", "chat_template_kwargs", "priority", "timeout_s"]
OPTIONS = [*get_type_hints(GenerationKeywords), *ARGUMENTS, "unknown", "tok_k"]


@pytest.mark.portable
@pytest.mark.parametrize("name", OPTIONS)
def test_no_value_of_an_option_ends_in_an_exception_of_python(name: str, model: Qwen3VLModel) -> None:
    refused = 0
    for value in VALUES:
        try:
            stream = model.stream("x", **({"max_new_tokens": 1} | {name: value}))
            stream.close() if name == "max_new_tokens" else list(stream)
        except Qwen3VLError as error:
            refused += 1
            assert len(str(error)) <= 500 and all(line.isprintable() for line in str(error).split("\n"))
    assert refused > len(VALUES) // 2


OPENING = {*inspect.signature(Qwen3VLModel.from_engine).parameters, *get_type_hints(OpeningKeywords)} - {"keywords"}


@pytest.mark.portable
@pytest.mark.parametrize("name", sorted(OPENING | {"max_sequence"}))
def test_no_value_of_an_argument_of_from_engine_does(name: str, demo_engine: Path) -> None:
    if name in ("check", "huge_pages", "cuda_graphs", "decode_plan", "batch_invariant", "weights_twice"):
        pytest.skip("a truth value, which any object has")
    refused = 0
    for value in VALUES:
        try:
            Qwen3VLModel.from_engine(**({"path": demo_engine, "threads": 1} | {name: value}))
        except Qwen3VLError as error:
            refused += 1
            assert len(str(error)) <= 500
    assert refused >= len(VALUES) - (name in ("max_memory", "max_pixels"))  # which may be 10**400


def fields_of(value: Any) -> list[dict[str, Any]]:
    return [{name: value} for name in OPTION_NAMES]


# Of every public name that can be called, its calls with a value in each place.
CALLS: dict[str, Callable[[Any, Qwen3VLModel], list[Callable[[], object]]]] = {
    **{
        name: lambda value, _, name=name: [
            lambda: str(getattr(qwen3_vl, name)(value)),
            lambda: str(getattr(qwen3_vl, name)("x", remedy=value)),
        ]
        for name in qwen3_vl.__all__
        if name.endswith("Error")
    },
    "Conversation": lambda value, model: [
        lambda: qwen3_vl.Conversation(value, value, value),
        lambda: model.chat().ask(value, max_new_tokens=1),
        lambda: model.chat().ask("x", images=value, max_new_tokens=1),
        lambda: model.chat().ask("x", images=[value], max_new_tokens=1),
        lambda: model.chat().ask("x", max_new_tokens=value, eos_token_ids=[], seed=value),
        lambda: model.chat().rewind(value),
    ],
    "Generation": lambda value, _: [lambda: qwen3_vl.Generation(value, value, value, value)],
    "GenerationOptions": lambda value, _: [
        *(lambda fields=fields: GenerationOptions(**fields) for fields in fields_of(value)),
        *(lambda fields=fields: GenerationOptions().replace(**fields) for fields in fields_of(value)),
        *(lambda fields=fields: GenerationOptions.from_generation_config(fields) for fields in fields_of(value)),
        lambda: GenerationOptions.from_generation_config({"num_beams": value, "bad_words_ids": value}),
        lambda: GenerationOptions.from_generation_config(value),
    ],
    "Qwen3VLModel": lambda value, model: [
        lambda: Qwen3VLModel(*[value] * 5),
        lambda: model.generate(value, max_new_tokens=1),
        lambda: model.logits(value),
        lambda: model.chat(value).ask("x", max_new_tokens=1),
        lambda: model.chat(tools=value).ask("x", max_new_tokens=1),
        lambda: model.chat(chat_template_kwargs=value).ask("x", max_new_tokens=1),
        lambda: model.prepare(value),
        lambda: model.prepare("x", tools=value),
        lambda: model.prepare("x", chat_template_kwargs=value),
        lambda: model.encode_images(value),
        lambda: model.encode_images([value]),
    ],
    "RawPrompt": lambda value, model: [
        lambda: qwen3_vl.RawPrompt(value),
        lambda: model.generate(qwen3_vl.RawPrompt([value]), max_new_tokens=1),
    ],
    "Exported": lambda value, _: [lambda: qwen3_vl.core.Exported(*[value] * 7)],
    "ExportRequest": lambda value, _: [
        lambda name=name: qwen3_vl.core.ExportRequest("demo", **{name: value})
        for name in ("max_context", "max_batch", "prefill_chunk", "max_patches")
    ],
    "export": lambda value, _: [lambda: qwen3_vl.core.export(value)],
    "Stats": lambda value, _: [lambda: qwen3_vl.Stats(*[value] * 11)],
    "Box": lambda value, _: [lambda: qwen3_vl.Box(*[value] * 5)],
    "Point": lambda value, _: [lambda: qwen3_vl.Point(*[value] * 3)],
    "Piece": lambda value, _: [lambda: qwen3_vl.Piece("text", value)],
    "ToolCall": lambda value, _: [lambda: qwen3_vl.ToolCall(*[value] * 5)],
    "Stream": lambda value, _: [lambda: qwen3_vl.Stream(value)],
    "Qwen3VL": lambda value, _: [lambda: qwen3_vl.core.Qwen3VL(value)],
    "open_eager": lambda value, _: [
        lambda: qwen3_vl.core.open_eager(value),
        *(
            lambda name=name: qwen3_vl.core.open_eager("demo", **{name: value})
            for name in ("dtype", "device", "max_context")
        ),
    ],
}
NEVER_REFUSE = {name for name in CALLS if name.endswith("Error")} | {"Exported", "Generation", "Stats", "Stream"}
NEVER_REFUSE |= {"Box", "Piece", "Point", "ToolCall"}


def test_every_public_name_that_can_be_called_is_called() -> None:
    modules = (qwen3_vl, qwen3_vl.core)
    assert set(CALLS) == {name for each in modules for name in each.__all__ if callable(getattr(each, name))}


@pytest.mark.parametrize("name", CALLS)
def test_no_value_in_a_public_call_ends_in_an_exception_of_python(name: str, model: Qwen3VLModel) -> None:
    refused = num_calls = 0
    for value in [None, 5, [1], *VALUES]:
        for call in CALLS[name](value, model):
            num_calls += 1
            try:
                call()
            except Qwen3VLError as error:
                refused += 1
                assert len(str(error)) <= 500 and all(line.isprintable() for line in str(error).split("\n"))
    assert refused == 0 if name in NEVER_REFUSE else refused > num_calls // 2


def test_max_context_of_a_checkpoint_is_a_whole_number() -> None:
    for wrong in (10**5000, "x", 1.5, 0, True):
        with pytest.raises(UsageError, match=r"max_context = .*, expected 1 to \d+, what the model was trained for"):
            qwen3_vl.core.open_eager("demo", max_context=wrong)  # type: ignore[arg-type]


@pytest.mark.portable
def test_encode_images_takes_those_of_prepare(model: Qwen3VLModel) -> None:
    images = model.prepare(question()).images
    assert model.encode_images(images).shape == model.encode_images(list(images)).shape
    for wrong in (None, [1], images[0], [*images, None]):
        with pytest.raises(UsageError, match="images must be a list of ProcessedImage"):
            model.encode_images(wrong)  # type: ignore[arg-type]


@pytest.mark.portable
@pytest.mark.parametrize("attribute", ["mode", "width", "size"])
def test_an_image_whose_own_methods_raise_is_an_error_of_ours(attribute: str) -> None:
    from PIL import Image

    kind = type("Own", (Image.Image,), {attribute: property(lambda self: 1 / 0)})
    image = Image.new("RGB", (4, 4))
    image.__class__ = kind
    with pytest.raises((UsageError, ImageError), match="division by zero"):
        load_image(image)
    view = memoryview(b"x")
    view.release()
    with pytest.raises(UsageError, match="released"):
        load_image(view)


@pytest.mark.portable
@pytest.mark.parametrize(
    ("source", "error", "words"),
    [
        (memoryview(b"abcdef")[::2], ImageError, "image of 3 bytes.*: not an image"),
        (type("P", (), {"__fspath__": lambda self: b"/none.png"})(), ImageError, "'/none.png': no such file"),
        (type("P", (), {"__fspath__": lambda self: 1 / 0})(), UsageError, "P is not a path: ZeroDivisionError"),
        (type("P", (), {"__fspath__": lambda self: 5})(), UsageError, "P is not a path: TypeError"),
        ("data:image/png;base64,\ud800", (ImageError, UsageError), "not|surrogate"),
        ("data:image/png;base64,-_-", ImageError, "not an image"),
        (10**5000, UsageError, "found int"),
        (Hostile(), UsageError, "found Hostile"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_no_image_does(source: Any, error: Any, words: str, model: Qwen3VLModel) -> None:
    content = [{"type": "image", "image": source}, {"type": "text", "text": "x"}]
    with pytest.raises(error, match=words) as raised:
        model.generate([{"role": "user", "content": content}])
    assert len(str(raised.value)) <= 500
    assert re.search(r"[^\n]", str(raised.value))


@pytest.mark.portable
def test_a_matrix_and_a_view_are_images() -> None:
    grey = np.arange(16, dtype=np.uint8).reshape(4, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PendingDeprecationWarning)
        matrix = np.asmatrix(grey)
    np.testing.assert_array_equal(load_image(matrix), np.repeat(grey[..., None], 3, axis=2))
    data = (IMAGES / "held_out_0.png").read_bytes()
    doubled = bytes(byte for byte in data for _ in range(2))
    np.testing.assert_array_equal(load_image(memoryview(doubled)[::2]), load_image(data))


@pytest.mark.portable
def test_the_text_of_an_image_in_any_base64_is_read(model: Qwen3VLModel) -> None:
    import base64

    data = (IMAGES / "held_out_0.png").read_bytes()
    lines, urls = base64.encodebytes(data).decode(), base64.urlsafe_b64encode(data).decode().rstrip("=")
    parts = [
        {"type": "image", "base64": lines},
        {"type": "image", "base64": f"data:image/png;base64,{lines}"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{urls}"}},
        {"type": "input_image", "image_url": f"data:image/png;base64,{lines}"},
        {"type": "image", "source_type": "base64", "data": urls, "mime_type": "image/png"},
    ]
    for part in parts:
        content = [part, {"type": "text", "text": "Read the digits."}]
        assert model.generate([{"role": "user", "content": content}]).text == "1654"


@pytest.mark.portable
def test_an_answer_follows_messages_of_clients(model: Qwen3VLModel) -> None:
    nulls = {"refusal": None, "audio": None, "function_call": None, "tool_calls": None, "name": None}
    for before in (
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None}],
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ok", **nulls}],
        [{"role": "system", "content": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}]}],
    ):
        assert model.generate([*before, *question()]).finish_reason in ("eos", "stop")
    with pytest.raises(CapacityError):
        model.generate("Read " * 1000)
