"""Weights of our own kernels stay in the file: they are mapped, read where they lie, and written by nothing."""

from __future__ import annotations

import hashlib
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from helpers.mappings import mapping
from helpers.own_kernels import needs_own_kernels, open_graph, write_product
from runtime.huge_pages import copy_to_huge_pages
from scripts.write_own_kernel_tests import activations, packed

pytestmark = [needs_own_kernels, pytest.mark.portable]
linux = pytest.mark.skipif(sys.platform != "linux", reason="mappings are read from /proc")
# 4 MiB, so that it is more than whatever else ONNX Runtime would rather copy.
NUM_ROWS, NUM_COLUMNS, BLOCK = 2048, 2048, 128


def tiles_of(bits: int, num_rows: int = NUM_ROWS, num_columns: int = NUM_COLUMNS) -> tuple[np.ndarray, np.ndarray]:
    """A packed weight, and its values."""
    random = np.random.default_rng(bits)
    codes = random.integers(0, 2**bits, (num_rows, num_columns))
    shape = (num_rows, -(-num_columns // BLOCK))
    scales, zeros = 2.0 ** random.integers(0, 3, shape), random.integers(0, 2**bits, shape)
    of_column = np.arange(num_columns) // BLOCK
    return packed(codes, scales, zeros, BLOCK, bits), (codes - zeros[:, of_column]) * scales[:, of_column]


@linux
@pytest.mark.parametrize("bits", [4, 8])
def test_a_weight_is_read_where_it_is_mapped(bits: int, tmp_path: Path) -> None:
    tiles, values_NK = tiles_of(bits)
    path = write_product(tmp_path, tiles, num_columns=NUM_COLUMNS, num_rows=NUM_ROWS, block=BLOCK, bits=bits)
    data = path.with_name("product.onnx.data")
    data.chmod(0o444)
    before = hashlib.sha256(data.read_bytes()).digest()
    session = open_graph(path)
    x_MK = activations(NUM_COLUMNS).astype(np.float32)
    (y_MN,) = session.run(None, {"x": x_MK})
    assert np.allclose(y_MN, x_MK.astype(np.float64) @ values_NK.T, rtol=0, atol=1e-6 * np.abs(y_MN).max())
    sizes = mapping(data)
    # All of it was read, and no page became the process's own.
    assert sizes["Rss"] >= tiles.nbytes and sizes["Anonymous"] == 0
    assert hashlib.sha256(data.read_bytes()).digest() == before


@linux
def test_a_copy_on_huge_pages_gives_the_same(tmp_path: Path) -> None:
    tiles, _ = tiles_of(8, 2 * NUM_ROWS)
    path = write_product(tmp_path, tiles, num_columns=NUM_COLUMNS, num_rows=2 * NUM_ROWS, block=BLOCK, bits=8)
    x_MK = activations(NUM_COLUMNS).astype(np.float32)
    session = open_graph(path)
    (before,) = session.run(None, {"x": x_MK})
    copied = copy_to_huge_pages(tmp_path)
    (after,) = session.run(None, {"x": x_MK})
    assert np.array_equal(before, after)
    del session  # which gives back memory that is no longer the file's
    assert mapping(path.with_name("product.onnx.data")) == {}
    if copied == 0:
        pytest.skip("the kernel gives no huge pages on request")


@linux
def test_a_page_that_is_written_would_be_seen(tmp_path: Path) -> None:
    import mmap

    path = tmp_path / "data"
    path.write_bytes(bytes(8192))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        mapped[0] = 1
        assert mapping(path)["Anonymous"] > 0


@pytest.mark.parametrize("offset", [1, 2, 7, 48, 4096 + 3])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_weight_at_any_address_gives_the_same_bits(bits: int, offset: int, tmp_path: Path) -> None:
    tiles, _ = tiles_of(bits, 40, 300)
    x_MK = activations(300).astype(np.float32)
    results = []
    for start in (0, offset):
        folder = tmp_path / str(start)
        folder.mkdir()
        path = write_product(folder, tiles, num_columns=300, num_rows=40, block=BLOCK, bits=bits, offset=start)
        results.append(open_graph(path).run(None, {"x": x_MK})[0])
    assert np.array_equal(*results)


def test_a_weight_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    """By ONNX Runtime; an engine's manifest finds it before (tests/runtime/test_manifest.py)."""
    tiles, _ = tiles_of(4, 40, 300)
    path = write_product(tmp_path, tiles, num_columns=300, num_rows=40, block=BLOCK, bits=4)
    data = path.with_name("product.onnx.data")
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(Exception, match=r"weight.*out of bounds"):
        open_graph(path).run(None, {"x": np.zeros((1, 300), np.float32)})


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"num_columns": 1 << 31}, "K = 2147483648, N = 40: expected 1 to 2147483647"),
        ({"num_rows": 1 << 40}, "K = 300, N = 1099511627776: expected 1 to 2147483647"),
        ({"num_rows": 0}, "K = 300, N = 0: expected 1 to"),
        ({"num_columns": -1}, "K = -1, N = 40: expected 1 to"),
        ({"block": 48}, "block_size is 48, expected 32, 64, 128 or 256"),
        ({"num_rows": 41}, None),
        ({"num_rows": 100}, "a packed weight of N = 100, K = 300"),
        ({"block": 64}, "a packed weight of N = 40, K = 300, block_size = 64, 4 bits is"),
        ({"bits": 8}, "a packed weight of N = 40, K = 300, block_size = 128, 8 bits is"),
        ({"num_columns": 600}, "a packed weight of N = 40, K = 600"),
    ],
)
def test_sizes_that_are_not_those_of_the_weight_are_refused(
    sizes: dict[str, int], reason: str | None, tmp_path: Path
) -> None:
    tiles, _ = tiles_of(4, 40, 300)
    path = write_product(tmp_path, tiles, **{"num_columns": 300, "num_rows": 40, "block": BLOCK, "bits": 4, **sizes})

    def run() -> np.ndarray:
        return open_graph(path).run(
            None, {"x": np.zeros((1, max(0, sizes.get("num_columns", 300)) % 1000), np.float32)}
        )[0]

    if reason is None:  # rows that fill the last tile are there
        assert run().shape == (1, 41)
    else:
        with pytest.raises(Exception, match=re.escape(reason)):
            run()
