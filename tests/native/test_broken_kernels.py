"""A mistake inside a kernel is found when an engine is opened, and by `qwen3vl verify` where nothing is proven before.

Each is put into a copy of the sources of the portable code, which is compiled in the place of the library.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from engines.bundle import Bundle
from helpers.engines import build
from helpers.native_build import build_library, needs_compiler, run_python, with_library
from helpers.own_kernels import needs_own_kernels
from helpers.targets import own
from runtime import native
from runtime.manifest import Manifest

pytestmark = [needs_own_kernels, needs_compiler]
PORTABLE = {"QWEN3VL_CPU_ISA": native.PORTABLE, "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Mistake:
    """A text of a source, what stands there instead, and the operators that are then wrong, by their beginnings."""

    source: str
    old: str
    new: str
    operators: Sequence[str]


PRODUCTS, LOOK_UPS, ATTENTION = ("MatMulInt",), ("LookUpInt",), ("DecodeAttention",)
MISTAKES = {
    "zero points of one block are off by one": Mistake(
        "products.h", "broadcast(kOffset<BITS>));", "broadcast(kOffset<BITS> + (block == 1)));", PRODUCTS
    ),
    "scales are those of the block before": Mistake(
        "finish.h", "tile.scales + block * kTileRows", "tile.scales + (block > 0 ? block - 1 : 0) * kTileRows", PRODUCTS
    ),
    "the last row of a panel is left out": Mistake(
        "finish.h",
        "i < num_rows; ++i) {\n    const int64_t offset",
        "i < num_rows - (num_rows == 40); ++i) {\n    const int64_t offset",
        PRODUCTS,
    ),
    "the bias is that of the tile before": Mistake(
        "finish.h",
        "load_n(output.bias + column, width)",
        "load_n(output.bias + (column > 0 ? column - 16 : 0), width)",
        PRODUCTS,
    ),
    "the end of a row is not normalised": Mistake(
        "activations.h",
        "if (rest > 0) store(y + k, mul(mul(load_n(x + k, rest), factor), load_n(norm + k, rest)));",
        "if (rest > 0) store(y + k, load_n(x + k, rest));",
        PRODUCTS,
    ),
    "gate and up are exchanged": Mistake(
        "activations.h", "swiglu(load(x + k), load(up + k))", "swiglu(load(up + k), load(x + k))", PRODUCTS
    ),
    "looked up halves of a block are exchanged": Mistake(
        "look_up.h", "k < half ? both & 15 : both >> 4", "k < half ? both >> 4 : both & 15", ("LookUpInt4",)
    ),
    "looked up columns are those beside": Mistake(
        "look_up.h", "(k / 4 * kTileRows + n) * 4 + k % 4", "(k / 4 * kTileRows + n) * 4 + (k + 1) % 4", ("LookUpInt8",)
    ),
    "halves are rotated the other way": Mistake(
        "attention_prepare.h", "store(head + h, sub(mul(first, c), ", "store(head + h, add(mul(first, c), ", ATTENTION
    ),
    "rotated halves are exchanged": Mistake(
        "attention_prepare.h", "second = load(head + half + h)", "second = load(head + h)", ATTENTION
    ),
    "new rows are written one too late": Mistake(
        "attention_prepare.h", "const int64_t row = position *", "const int64_t row = (position + 1) *", ATTENTION
    ),
    "a token sees the one after it": Mistake(
        "attention_prefill.h", "(new_row + row) * a.group()", "(new_row + row - 1) * a.group()", ATTENTION
    ),
    "a part of the cache counts too little": Mistake(
        "attention_decode.h",
        "weights = fma(broadcast(partial[head_dim + 1]), factor, weights)",
        "weights = fma(broadcast(i == 1 ? 0.9f * partial[head_dim + 1] : partial[head_dim + 1]), factor, weights)",
        ATTENTION,
    ),
    "scales of keys are those of the first head": Mistake(
        "attention_prepare.h",
        "load(a.key_scales + kv_head * head_dim + h)",
        "load(a.key_scales + h)",
        ("DecodeAttentionInt",),
    ),
    "odd channels of 4 bits are those before": Mistake(
        "lanes_portable.h", ">> (i % 2 * 4)) % 16 - 8", ">> 0) % 16 - 8", ("DecodeAttentionInt4",)
    ),
    "halves are cut off instead of rounded": Mistake(
        "lanes_portable.h",
        "magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23)",
        "magnitude - (112u << 23) - 0x00ffffff",
        ("DecodeAttentionFloat16",),
    ),
}
QUICK = ("zero points of one block are off by one", "new rows are written one too late")


def broken_library(name: str, folder: Path, level: str) -> Path:
    """Return a folder for `run_python` whose library makes a mistake."""
    mistake = MISTAKES[name]
    edits = {mistake.source: (mistake.old, mistake.new)}
    return with_library(folder, build_library(folder / "build", flags=(level,), only=native.PORTABLE, edits=edits))


PROVE = """
from runtime.errors import EngineError
from runtime.kernels import needs_exact_products
from runtime.native import OPERATORS

for operator in OPERATORS:
    try:
        needs_exact_products([operator])
    except EngineError as error:
        assert f"our own kernel {operator} (portable) computes wrong products" in str(error), error
        print(operator)
"""


@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=() if each in QUICK else pytest.mark.slow) for each in MISTAKES]
)
def test_a_mistake_is_found_before_an_engine_is_opened(name: str, tmp_path: Path) -> None:
    """Only the operators that make it are refused."""
    done = run_python(broken_library(name, tmp_path, "-O0"), "-c", PROVE, environment=PORTABLE)
    assert done.returncode == 0, done.stderr
    expected = [each for each in native.OPERATORS if each.startswith(tuple(MISTAKES[name].operators))]
    assert sorted(done.stdout.split()) == sorted(expected)


@pytest.mark.slow
def test_without_a_mistake_all_kernels_are_right(tmp_path: Path) -> None:
    library = build_library(tmp_path / "build", only=native.PORTABLE)
    done = run_python(with_library(tmp_path, library), "-c", PROVE, environment=PORTABLE)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@pytest.fixture(scope="module")
def engine(demo_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo for ort-cpu-int4 by our own kernels."""
    folder = build(demo_bundle, own("ort-cpu-int4"), tmp_path_factory.mktemp("own") / "engine")
    assert Manifest.read(folder).capabilities["custom_ops"] == native.DOMAIN
    return folder


VERIFY = "from qwen3vl_export.cli.run import main; main()"


def verify(folder: Path, engine: Path) -> tuple[int, dict[str, object], str]:
    """Run `qwen3vl verify`; return the exit code, what it prints, and what it says."""
    arguments = ("verify", str(engine), "--checkpoint", "demo", "--reference", "own", "--max-new-tokens", "4", "--json")
    done = run_python(folder, "-c", VERIFY, *arguments, environment=PORTABLE)
    return done.returncode, json.loads(done.stdout or "{}"), done.stderr


# In both: a mistake that the demo's heads, blocks and prompts meet.
MET = (
    "zero points of one block are off by one",
    "rotated halves are exchanged",
    "a token sees the one after it",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", MET)
def test_verify_finds_a_mistake_that_nothing_found_before(name: str, engine: Path, tmp_path: Path) -> None:
    folder = broken_library(name, tmp_path, "-O3")
    code, _, said = verify(folder, engine)
    assert code != 0 and "computes wrong products on this processor" in said
    proofs = folder / "runtime" / "kernels.py"
    text = proofs.read_text(encoding="utf-8")
    assert text.count("\n_OWN_TOLERANCE = ") == 1
    proofs.write_text(text.replace("\n_OWN_TOLERANCE = ", "\n_OWN_TOLERANCE = 1e30 + "), encoding="utf-8")
    code, report, said = verify(folder, engine)
    assert code == 9, said
    assert report["passed"] is False


@pytest.mark.slow
def test_verify_passes_without_a_mistake(engine: Path, tmp_path: Path) -> None:
    folder = with_library(tmp_path, build_library(tmp_path / "build", only=native.PORTABLE))
    code, report, said = verify(folder, engine)
    assert code == 0 and report["passed"] is True, said
