"""A row's product is the same bits with every instruction set, thread, address, and whatever rows are beside it."""

from __future__ import annotations

import signal
import subprocess
import sys

import numpy as np
import pytest

from helpers import ROOT
from helpers.native_graphs import Array, Weight, random_weight, same_bits
from helpers.native_memory import Fence, at_address
from helpers.own_kernels import needs_own_kernels
from runtime import native

pytestmark = [needs_own_kernels, pytest.mark.portable]
BITS = pytest.mark.parametrize("bits", [4, 8])
KINDS = pytest.mark.parametrize("kind", ["plain", "norm", "gated"])
NUM_COLUMNS, BLOCK, NUM_OUTPUTS = 300, 64, 83
NUM_ROWS = (1, 2, 3, 4, 5, 6, 7, 15, 16, 17, 33, 97, 200)


@pytest.fixture(scope="module")
def weights() -> dict[int, Weight]:
    return {bits: random_weight(NUM_OUTPUTS, NUM_COLUMNS, BLOCK, bits) for bits in (4, 8)}


def inputs_of(kind: str, num_rows: int) -> dict[str, Array]:
    """Activations, bias and residual; the first rows are the same for any number of rows."""
    random = np.random.default_rng(3)
    width = 2 * NUM_COLUMNS if kind == "gated" else NUM_COLUMNS
    x = random.standard_normal((200, width)) * 2.0 ** random.integers(-20, 20, (200, 1))
    given = {
        "x": x,
        "bias": random.standard_normal(NUM_OUTPUTS),
        "residual": random.standard_normal((200, NUM_OUTPUTS)),
        "norm": random.standard_normal(NUM_COLUMNS),
    }
    if kind != "norm":
        del given["norm"]
    return {name: (a[:num_rows] if len(a) == 200 else a).astype(np.float32) for name, a in given.items()}


@BITS
@KINDS
def test_instruction_sets(bits: int, kind: str, weights: dict[int, Weight], any_isa: None) -> None:
    for num_rows in NUM_ROWS:
        given = inputs_of(kind, num_rows)
        results = {}
        for isa in native.isas():
            native.use(isa)
            results[isa] = weights[bits].multiply(gated=int(kind == "gated"), **given)
        for isa, found in results.items():
            assert same_bits(found, results[native.PORTABLE]), (isa, num_rows)


@BITS
def test_instruction_sets_in_rows_that_are_looked_up(bits: int, weights: dict[int, Weight], any_isa: None) -> None:
    results = []
    for isa in native.isas():
        native.use(isa)
        results.append(weights[bits].look_up(np.arange(NUM_OUTPUTS)))
    assert all(same_bits(found, results[-1]) for found in results)


@BITS
@KINDS
def test_company(isa: str, bits: int, kind: str, weights: dict[int, Weight]) -> None:
    weight, gated = weights[bits], int(kind == "gated")
    every = weight.multiply(gated=gated, **inputs_of(kind, 200))
    for num_rows in NUM_ROWS:
        found = weight.multiply(gated=gated, **inputs_of(kind, num_rows))
        assert same_bits(found, every[:num_rows]), num_rows
    # In other places, with other neighbours.
    given = inputs_of(kind, 200)
    order = np.random.default_rng(1).permutation(200)
    given["x"], given["residual"] = given["x"][order], given["residual"][order]
    assert same_bits(weight.multiply(gated=gated, **given), every[order])


@BITS
def test_threads(isa: str, bits: int, weights: dict[int, Weight]) -> None:
    weight = weights[bits]
    # More tiles than tasks, so that tasks take several.
    wide = random_weight(16 * 70 + 3, 96, 32, bits)
    for num_rows in (1, 3, 40, 200):
        given, x = inputs_of("norm", num_rows), inputs_of("plain", num_rows)["x"][:, :96].copy()
        alone, alone_wide = weight.multiply(**given), wide.multiply(x)
        for threads in range(2, 9):
            assert same_bits(weight.multiply(threads=threads, **given), alone), threads
            assert same_bits(wide.multiply(x, threads=threads), alone_wide), threads
    ids = np.random.default_rng(0).integers(0, NUM_OUTPUTS, 50)
    rows = weight.look_up(ids)
    assert all(same_bits(weight.look_up(ids, threads=threads), rows) for threads in range(2, 9))


@BITS
@pytest.mark.parametrize("offset", [1, 2, 3, 4, 16, 33])
def test_addresses(isa: str, bits: int, offset: int, weights: dict[int, Weight]) -> None:
    """Of the weight; and of float32 numbers, by their size."""
    plain = weights[bits]
    moved = random_weight(NUM_OUTPUTS, NUM_COLUMNS, BLOCK, bits)
    moved.tiles = at_address(plain.tiles, offset)
    for kind in ("norm", "gated"):
        for num_rows in (1, 7, 40):
            given = inputs_of(kind, num_rows)
            expected = plain.multiply(gated=int(kind == "gated"), **given)
            there = {name: at_address(array, 4 * offset % 64) for name, array in given.items()}
            assert same_bits(moved.multiply(gated=int(kind == "gated"), **there), expected)
    ids = np.arange(NUM_OUTPUTS)
    assert same_bits(moved.look_up(ids), plain.look_up(ids))


@BITS
@pytest.mark.parametrize("at_end", [True, False])
def test_nothing_beside_the_inputs_is_read(isa: str, bits: int, at_end: bool) -> None:
    """What lies beside is no memory: the process would end."""
    for num_outputs, num_columns, block in ((1, 32, 32), (17, 5, 32), (33, 300, 128), (16, 256, 256)):
        plain = random_weight(num_outputs, num_columns, block, bits)
        fence = Fence()
        fenced = random_weight(num_outputs, num_columns, block, bits)
        fenced.tiles = fence.copy(plain.tiles, at_end=at_end)
        random = np.random.default_rng(0)
        for num_rows in (1, 6, 21):
            shapes = {"x": (num_rows, num_columns), "norm": (num_columns,), "bias": (num_outputs,)}
            shapes["residual"] = (num_rows, num_outputs)
            given = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
            there = {name: fence.copy(array, at_end=at_end) for name, array in given.items()}
            assert same_bits(fenced.multiply(**there), plain.multiply(**given))
            del given["norm"], there["norm"]
            assert same_bits(fenced.multiply(**there), plain.multiply(**given))
            given["x"] = random.standard_normal((num_rows, 2 * num_columns)).astype(np.float32)
            there["x"] = fence.copy(given["x"], at_end=at_end)
            assert same_bits(fenced.multiply(gated=1, **there), plain.multiply(gated=1, **given))
        ids = fence.copy(np.arange(num_outputs), at_end=at_end)
        assert same_bits(fenced.look_up(ids), plain.look_up(np.arange(num_outputs)))


@pytest.mark.parametrize(("at_end", "index"), [(True, 5), (False, -1)])
def test_what_lies_beside_is_no_memory(at_end: bool, index: int) -> None:
    """Else the test above could not fail."""
    source = (
        "import ctypes, numpy as np\nfrom helpers.native_memory import Fence\nfence = Fence()\n"
        f"array = fence.copy(np.arange(5, dtype=np.uint8), at_end={at_end})\n"
        "byte = lambda i: ctypes.c_uint8.from_address(array.ctypes.data + i).value\n"
        f"assert [byte(i) for i in range(5)] == list(range(5))\nbyte({index})"
    )
    done = subprocess.run([sys.executable, "-c", source], cwd=ROOT / "tests", stderr=subprocess.PIPE)
    assert done.returncode == -signal.SIGSEGV, done.stderr
