"""Products of decode kernels in the interpreter, against float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("triton")

from engines.kernels import product
from engines.kernels.fragments import dequantized, unit_bytes
from engines.kernels.launch import ADD, FP8, GLU, GPUS, HALF, INT4, INT8, LOGITS, STORE, Unserved, Weight
from helpers.decode_weights import HALVES, made_weight
from helpers.interpret import guarded, interpret, untouched

GPU = GPUS[90]


def _run(
    weight,
    memory,
    batch,
    *,
    dtype="float16",
    mode=STORE,
    norm=True,
    invariant=False,
    gpu=GPU,
    change=None,
    of=lambda launch: launch,
):
    """Return a product by its kernel, the reference, and the launch."""
    rng = np.random.default_rng(batch)
    half = HALVES[dtype]
    x = rng.normal(0, 3, (batch, weight.columns)).astype(half)
    gain = rng.normal(1, 0.2, weight.columns).astype(half)
    outputs = weight.rows // (2 if mode == GLU else 1)
    out, whole = guarded((batch, outputs), np.float32 if mode == LOGITS else half)
    residual = rng.normal(0, 1, out.shape).astype(half)
    if mode == ADD:
        out[:] = residual
    launch = product.launch(
        weight, "buffer:x", "buffer:out", batch, gpu, dtype=dtype, mode=mode, norm="gain" if norm else None, eps=1e-6,
        invariant=invariant,
    )  # fmt: skip
    sources = {f"weight:{name}": array for name, array in memory.items()}
    sources |= {"weight:gain": gain, "buffer:x": x, "buffer:out": out, "buffer:zeros": np.zeros(32, np.float32)}
    if change is not None:
        change(sources)
    interpret(of(launch), sources)
    assert untouched(whole)
    expected = product.reference(
        dequantized(weight, memory), x.astype(np.float64), mode=mode,
        gain=gain.astype(np.float64) if norm else None, eps=1e-6, residual=residual.astype(np.float64),
    )  # fmt: skip
    return out.astype(np.float64), expected, launch


def _error(result, expected, _launch=None):
    return np.abs(result - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize(
    ("rows", "columns", "mode"),
    [(48, 192, STORE), (16, 640, GLU), (33, 200, ADD), (21, 320, LOGITS), (4, 9728, STORE)],
)
def test_vector_form(rows, columns, mode):
    result, expected, launch = _run(*made_weight(HALF, rows, columns), 1, mode=mode, norm=mode != ADD)
    assert launch.function == "product_vector"
    assert _error(result, expected) < 6e-4


@pytest.mark.parametrize("batch", [2, 3, 8])
def test_halves_on_tensor_cores(batch):
    result, expected, launch = _run(*made_weight(HALF, 32, 192), batch)
    assert launch.function == "product_fragments"
    assert _error(result, expected) < 8e-4


FORMATS = [(INT4, 32), (INT4, 64), (INT4, 128), (INT4, 256), (INT8, 32), (INT8, 64), (INT8, 128), (FP8, 128)]


@pytest.mark.parametrize(("kind", "block"), FORMATS)
def test_formats(kind, block):
    assert _error(*_run(*made_weight(kind, 16, 192, block), 2)) < 8e-4


@pytest.mark.parametrize(("kind", "block"), [each for each in FORMATS if each[0] != FP8])
def test_zero_points(kind, block):
    weight, memory = made_weight(kind, 16, 192, block, zero_points=True)
    assert _error(*_run(weight, memory, 2)) < 8e-4


def test_blocks_in_odd_number_that_the_last_round_does_not_fill():
    weight, memory = made_weight(INT4, 16, 640, 128, zero_points=True)
    assert _error(*_run(weight, memory, 1)) < 8e-4
    weight, memory = made_weight(INT4, 16, 520, 256, zero_points=True)
    assert _error(*_run(weight, memory, 1)) < 8e-4
    weight, memory = made_weight(FP8, 16, 464, 128)
    assert _error(*_run(weight, memory, 1)) < 8e-4


@pytest.mark.parametrize(("mode", "rows"), [(STORE, 21), (ADD, 21), (GLU, 32), (LOGITS, 21)])
def test_what_becomes_of_the_result(mode, rows):
    assert _error(*_run(*made_weight(HALF, rows, 64), 3, mode=mode, norm=mode != ADD)) < 8e-4


@pytest.mark.parametrize("batch", [1, 3])
def test_bfloat16(batch):
    weight, memory = made_weight(HALF, 32, 192, dtype="bfloat16")
    assert _error(*_run(weight, memory, batch, dtype="bfloat16")) < 6e-3


@pytest.mark.parametrize("batch", [16, 32])
@pytest.mark.parametrize("kind", [HALF, INT8])
def test_more_columns_than_a_tile_has(kind, batch):
    assert _error(*_run(*made_weight(kind, 16, 128, 128), batch)) < 8e-4


@pytest.mark.parametrize(("kind", "batch", "mode"), [(INT4, 9, GLU), (FP8, 1, STORE)])
def test_two_tiles_of_a_program(kind, batch, mode):
    weight, memory = made_weight(kind, 48, 128, 128)

    def doubled(launch):
        return replace(launch, constants=launch.constants | {"TILES": 2}, grid=(2, 1, 1))

    assert _error(*_run(weight, memory, batch, mode=mode, of=doubled)) < 8e-4


def test_float8_without_a_conversion():
    weight, memory = made_weight(FP8, 16, 128, 128)
    converted, expected, _ = _run(weight, memory, 2)
    expanded, _, launch = _run(weight, memory, 2, gpu=GPUS[80])
    assert launch.constants["CVT"] == 0
    assert _error(expanded, expected) < 8e-4
    assert _error(converted, expanded) < 8e-4


@pytest.mark.parametrize("kind", [HALF, INT4])
def test_invariant_form_has_the_same_bits_in_every_batch(kind):
    weight, memory = made_weight(kind, 16, 384, 128)
    rng = np.random.default_rng(1)
    row = rng.normal(0, 3, (1, 384)).astype(np.float16)

    def last_row(sources):
        sources["buffer:x"][-1:] = row
        sources["weight:gain"][:] = 1

    alone, _, launch = _run(weight, memory, 1, invariant=True, change=last_row)
    assert launch.function == "product_fragments"
    for batch in (3, 8, 16):
        among, _, _ = _run(weight, memory, batch, invariant=True, change=last_row)
        assert (among[-1] == alone[0]).all()


def test_invariant_form_splits_no_product_by_its_batch():
    for kind in (HALF, INT4, INT8, FP8):
        weight = Weight(kind, 4096, 2048, "w", 128, "s")
        made = [
            product.launch(
                weight, "buffer:x", "buffer:out", batch, GPU, dtype="float16", mode=STORE, norm=None, invariant=True
            )
            for batch in (1, 2, 4, 8, 16, 32)
        ]
        splits = [
            {name: value for name, value in launch.constants.items() if name not in ("B", "GROUPS")} for launch in made
        ]
        assert all(split == splits[0] for split in splits)
        assert {launch.num_warps for launch in made} == {made[0].num_warps}


@pytest.mark.parametrize(("kind", "mode", "batch"), [(HALF, STORE, 20), (INT4, GLU, 9)])
def test_more_tiles_a_program_change_no_bit(kind, mode, batch):
    weight, memory = made_weight(kind, 80, 384, 128)

    def in_tiles(tiles):
        def of(launch):
            return replace(launch, constants=launch.constants | {"TILES": tiles}, grid=(-(-80 // (16 * tiles)), 1, 1))

        return of

    one, _, _ = _run(weight, memory, batch, mode=mode, of=in_tiles(1))
    for tiles in (2, 4):
        more, expected, _ = _run(weight, memory, batch, mode=mode, of=in_tiles(tiles))
        assert _error(more, expected) < 8e-4
        assert (more == one).all()


@pytest.mark.parametrize(
    ("rows", "columns", "wanted"),
    [(4096, 2048, (8, 2, 1)), (12288, 2048, (4, 2, 2)), (4096, 12288, (8, 6, 2)), (24576, 4096, (4, 4, 2))],
)
def test_tiles_are_those_that_were_fastest_where_they_were_measured(rows, columns, wanted):
    tile = product.tiling(Weight(INT4, rows, columns, "w", 128, "s"), 1, GPU, invariant=False)
    assert (tile.warps, tile.depth, tile.tiles) == wanted


@pytest.mark.parametrize("batch", [16, 32])
def test_x_of_many_rows_is_read_for_two_tiles_where_programs_are_left(batch):
    def tiles(rows, columns):
        return product.tiling(Weight(HALF, rows, columns, "w"), batch, GPU, invariant=False).tiles

    assert tiles(24576, 4096) == tiles(4096, 12288) == 2
    assert tiles(2048, 6144) == 1  # 64 programs for 132 multiprocessors


@pytest.mark.parametrize("kind", [INT4, INT8])
@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("zero_points", [None, "z"])
def test_codes_on_their_way_fit_into_registers_with_their_scales(kind, block, zero_points):
    for rows, columns in ((4096, 12288), (4096, 25600), (24576, 4096)):
        weight = Weight(kind, rows, columns, "w", block, "s", zero_points)
        tile = product.tiling(weight, 1, GPU, invariant=False)
        held = tile.depth * tile.tiles * (unit_bytes(weight) + (8 if zero_points is None else 16))
        assert held <= 480


def test_a_scale_of_the_next_block_is_seen():
    weight, memory = made_weight(INT4, 16, 256, 128)

    def shift(sources):
        sources["weight:s"] = np.roll(sources["weight:s"], 1, axis=1)

    assert _error(*_run(weight, memory, 2, change=shift)) > 0.05


@pytest.mark.parametrize(
    ("weight", "batch", "message"),
    [
        (Weight(HALF, 32, 64, "w"), 33, "batch of 33"),
        (Weight(HALF, 32, 60, "w"), 2, "60 columns"),
        (Weight(INT4, 32, 64, "w", 16, "s"), 1, "blocks of 16"),
        (Weight(FP8, 32, 64, "w", 64, "s"), 1, "blocks of 64"),
        (Weight(INT4, 32, 320, "w", 160, "s"), 1, "blocks of 160"),
    ],
)
def test_what_is_not_served_is_said(weight, batch, message):
    with pytest.raises(Unserved, match=message):
        product.launch(weight, "", "", batch, GPU, dtype="float16", mode=STORE, norm=None)


def test_codes_times_bfloat16_are_not_served():
    with pytest.raises(Unserved, match="bfloat16"):
        product.launch(Weight(INT4, 32, 128, "w", 128, "s"), "", "", 1, GPU, dtype="bfloat16", mode=STORE, norm=None)
