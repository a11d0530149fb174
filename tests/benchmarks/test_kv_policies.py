"""What `kv-policies` and `kv-eviction` make of their measurements, and the low rank that they compare with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import eviction, kv_policies
from benchmarks.low_rank import Basis, Rotation
from runtime.generation import prefill
from runtime.model import Qwen3VLModel

RNG = np.random.default_rng(0)


def test_a_basis_keeps_what_lies_in_it() -> None:
    directions = np.linalg.qr(RNG.standard_normal((2, 16, 16)))[0][..., :4].transpose(0, 2, 1)
    rows = [(RNG.standard_normal((2, 30, 4)) @ directions).astype(np.float32) for _ in range(3)]
    basis = Basis.of(rows, 16)
    assert basis.directions_KHR.shape == (2, 16, 4)  # as many coordinates of 16 bits as 16 channels of 4 pay for
    np.testing.assert_allclose(basis.kept(rows[0]), rows[0], atol=2e-3)
    across = RNG.standard_normal((2, 5, 16)).astype(np.float32)
    across -= across @ directions.transpose(0, 2, 1) @ directions
    assert np.abs(basis.kept(across)).max() < 1e-3
    coarse = Basis.of(rows, 8)
    assert coarse.directions_KHR.shape == (2, 16, 8)
    error = np.abs(coarse.kept(rows[0]) - rows[0]).max()
    assert 1e-4 < error < 5 * coarse.steps_KR.max()


def test_a_token_has_one_key_before_its_rotation(demo_engine: Path) -> None:
    model = Qwen3VLModel.from_engine(demo_engine)
    prepared = model.prepare("7 7 7 7")
    ids = np.array(prepared.prompt.input_ids)
    cache = model.session.new_cache(len(ids))
    prefill(model.session, cache, prepared.decoder_inputs(model.encode_images(())))
    keys = cache.layer(0)[0][0]
    rotation = Rotation(model.config.text, prepared.positions.position_ids)
    before = rotation.undo(keys)
    np.testing.assert_allclose(rotation.apply(before), keys, atol=1e-4)
    values, counts = np.unique(ids, return_counts=True)
    same = np.flatnonzero(ids == values[counts.argmax()])
    assert len(same) > 2
    np.testing.assert_allclose(before[:, same], before[:, same[:1]].repeat(len(same), 1), atol=1e-3)
    assert np.abs(keys[:, same] - keys[:, same[:1]]).max() > 0.1


def answer(policy: str, index: int, right: bool, kept: int = 100) -> dict[str, Any]:
    where = {"task": "latest", "length": 1024, "index": index}
    return {"policy": policy, **where, "rows": 400, "kept": kept, "right": right, "kl": 0.5 * index}


def test_the_table_counts_what_is_lost_and_gained() -> None:
    answers = [answer("exact", i, i < 3, 400) for i in range(4)]
    answers += [answer("1/4 by attention", i, i != 1) for i in range(4)]
    answers += [answer("int4", i, i < 1, 400) for i in range(4)]
    result = {
        "checkpoint": "demo-long",
        "prompts": 4,
        "layer_bits": {"exact": [32, 32], "int4": [4, 4], "mixed": [8, 4]},
        "errors": {"int4 after the prompt": {"keys": [0.1, 0.2], "values": [0.3, 0.4]}},
        "answers": answers,
    }
    rows = [line.split(" | ") for line in kv_policies.table(result).splitlines() if line.startswith("| ")]
    by_name = {row[0].removeprefix("| "): row[1:] for row in rows}
    assert by_name["exact"][:2] == ["2.000", "75.0 %"]
    assert by_name["1/4 by attention"] == ["0.250", "75.0 %", "", "", "1", "1", "0.75 |"]
    assert by_name["int4"][:2] == ["0.250", "25.0 %"] and by_name["int4"][4:6] == ["2", "0"]
    assert by_name["int4 after the prompt"] == ["values", "30.0 %", "40.0 % |"]


def test_the_table_says_when_giving_up_rows_is_paid_back() -> None:
    result = {
        "model": "m",
        "target": "t",
        "kept": 4,
        "steps_s": {str(rows): [0.05 + rows * 1e-5] * 3 for rows in (64, 1064, 2064)},
        "evictions": {"2000": {"cpu_s": [0.3, 0.3, 0.9], "freed_bytes": 5_000_000}},
    }
    text = eviction.table(result)
    assert "A step takes about 50 ms, and 10 ms more for each 1000 rows." in text
    assert "| 2000 | 500 | 300 | 15.0 | 20 | 5 |" in text  # 1500 rows save 15 ms
