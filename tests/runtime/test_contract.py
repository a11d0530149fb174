"""The inputs of the graphs: their names, and chunks, rows and batches of a call."""

from __future__ import annotations

import numpy as np
import pytest

from runtime.contract import DECODER_DTYPES, DECODER_INPUTS, VISION_DTYPES, VISION_INPUTS, DecoderInputs, VisionInputs
from runtime.positions import VisualSpan, mrope_positions

pytestmark = pytest.mark.portable


def embeds(num_rows: int, first: int = 0) -> np.ndarray:
    """Embeddings of two levels and three elements, each row of which has its own numbers."""
    rows = np.arange(first, first + num_rows, dtype=np.float32)[:, None] + np.array([0, 0.25, 0.5], np.float32)
    return np.stack([rows, rows + 100])


def with_image(num_tokens: int = 9, start: int = 2, *, first: int = 0, all_logits: bool = False) -> DecoderInputs:
    """A prompt with an image of 2 x 2 tokens."""
    positions = mrope_positions(num_tokens, [VisualSpan(start, (1, 2, 2))])
    ids = list(range(10, 10 + num_tokens))
    return DecoderInputs.prompt(ids, positions, embeds(4, first), all_logits=all_logits)


def taken(inputs: DecoderInputs, sequence: int) -> list[list[float]]:
    """The level 1 rows that the tokens of a sequence take."""
    rows = inputs.visual_rows[sequence]
    return [inputs.visual_embeds[1, row].tolist() for row in rows if row >= 0]


def test_names_and_types_are_those_of_the_graphs() -> None:
    assert VISION_INPUTS == ("pixel_values", "pos_indices", "pos_weights", "rope_cos", "rope_sin")
    assert (
        *("input_ids", "position_ids", "visual_rows", "visual_embeds", "past_lengths", "logits_positions"),
    ) == DECODER_INPUTS
    assert [name for name, dtype in (VISION_DTYPES | DECODER_DTYPES).items() if dtype is np.float32] == [
        *("pixel_values", "pos_weights", "rope_cos", "rope_sin", "visual_embeds"),
    ]
    assert tuple(with_image().arrays()) == DECODER_INPUTS
    assert all(array.flags.c_contiguous for array in with_image().chunk(2, 4).arrays().values())


def test_a_prompt_asks_for_its_last_token_or_for_all() -> None:
    inputs = with_image()
    assert inputs.input_ids.tolist() == [list(range(10, 19))]
    assert inputs.visual_rows.tolist() == [[-1, -1, 0, 1, 2, 3, -1, -1, -1]]
    assert (inputs.past_lengths.tolist(), inputs.logits_positions.tolist()) == ([0], [[8]])
    assert with_image(all_logits=True).logits_positions.tolist() == [list(range(9))]
    assert inputs.num_cache_rows == 9


def test_text_is_numbered_behind_its_past() -> None:
    ids, past = np.array([[1, 2], [3, 4]]), np.array([5, 9])
    inputs = DecoderInputs.text(ids, past, embeds(1), delta=np.array([0, -3]))
    assert inputs.position_ids[1].tolist() == [[5, 6], [6, 7]]
    assert (inputs.position_ids == inputs.position_ids[0]).all()
    assert inputs.visual_rows.tolist() == [[-1, -1]] * 2
    assert inputs.logits_positions.tolist() == [[0, 1]] * 2
    assert inputs.num_cache_rows == 11
    assert DecoderInputs.text(ids, past, embeds(1), logits_positions=past[:, None]).logits_positions.shape == (2, 1)


def test_chunks_are_the_same_tokens_in_later_calls() -> None:
    whole = with_image(all_logits=True)
    parts = [whole.chunk(start, min(start + 4, 9)) for start in (0, 4, 8)]
    for name, axis in (("input_ids", 1), ("position_ids", 2), ("visual_rows", 1)):
        joined = np.concatenate([getattr(part, name) for part in parts], axis)
        np.testing.assert_array_equal(joined, getattr(whole, name))
    assert [part.past_lengths.tolist() for part in parts] == [[0], [4], [8]]
    assert [part.logits_positions.tolist() for part in parts] == [[[0, 1, 2, 3]], [[0, 1, 2, 3]], [[0]]]
    assert {part.num_cache_rows for part in parts} == {4, 8, 9}
    # A chunk of a chunk is one of the whole.
    assert whole.chunk(2, 9).chunk(2, 5).past_lengths.tolist() == [4]


def test_a_chunk_that_nobody_asks_for_logits_gives_those_of_its_last_token() -> None:
    prompt = with_image()
    assert [prompt.chunk(a, b).logits_positions.tolist() for a, b in ((0, 4), (4, 8), (8, 9))] == [[[3]], [[3]], [[0]]]
    assert [prompt.asked_in(a, b).tolist() for a, b in ((0, 4), (4, 8), (8, 9))] == [[], [], [8]]


def test_only_one_sequence_has_chunks() -> None:
    batch = DecoderInputs.concatenate([with_image(), with_image()])
    with pytest.raises(AssertionError, match="a chunk with a past is one sequence"):
        batch.chunk(0, 4)


def test_a_batch_takes_each_sequences_own_rows() -> None:
    text = DecoderInputs.text(np.array([[7, 8, 9]]), np.array([0]), embeds(1, first=50))
    sequences = [with_image(first=0), text, with_image(7, 1, first=20, all_logits=True)]
    batch = DecoderInputs.concatenate(sequences)
    assert batch.input_ids.shape == (3, 9) and batch.visual_embeds.shape == (2, 8, 3)
    for b, alone in enumerate(sequences):
        length = alone.input_ids.shape[1]
        assert batch.input_ids[b, :length].tolist() == alone.input_ids[0].tolist()
        np.testing.assert_array_equal(batch.position_ids[:, b, :length], alone.position_ids[:, 0])
        assert taken(batch, b) == taken(alone, 0)
        assert (batch.visual_rows[b, length:] == -1).all()
        asked = alone.logits_positions[0]
        assert batch.logits_positions[b, : len(asked)].tolist() == asked.tolist()
        # More of a sequence than it asked for are positions of its own.
        assert (batch.logits_positions[b] < length).all()
        row = batch.row(b)
        assert row.input_ids.tolist() == batch.input_ids[b : b + 1].tolist()
        assert taken(row, 0) == taken(row.with_used_rows(), 0) == taken(alone, 0)
        assert row.with_used_rows().visual_embeds.shape[1] == (1 if b == 1 else 4)


def test_a_batch_of_decode_steps_keeps_one_dummy_row() -> None:
    steps = [
        DecoderInputs.text(np.array([[token]]), np.array([past]), embeds(4), delta=delta)
        for token, past, delta in ((5, 9, -2), (6, 30, 0))
    ]
    batch = DecoderInputs.concatenate(steps)
    assert batch.visual_embeds.shape[1] == 1
    assert batch.input_ids.tolist() == [[5], [6]] and batch.past_lengths.tolist() == [9, 30]
    assert batch.position_ids[0].tolist() == [[7], [30]] and batch.logits_positions.tolist() == [[0], [0]]
    assert batch.num_cache_rows == 31


def test_chunks_of_several_sequences_are_a_batch_with_the_rows_they_take() -> None:
    chunks = [with_image(first=0).chunk(3, 5), with_image(first=20).chunk(4, 7)]
    batch = DecoderInputs.concatenate(chunks)
    assert batch.visual_embeds.shape[1] == 2 + 2
    assert [taken(batch, b) for b in range(2)] == [taken(chunk, 0) for chunk in chunks]
    assert batch.past_lengths.tolist() == [3, 4] and batch.num_cache_rows == 7


@pytest.mark.parametrize("name", DECODER_INPUTS)
def test_arrays_of_another_shape_or_type_are_bugs(name: str) -> None:
    arrays = with_image().arrays()
    longer = np.concatenate([arrays[name]] * 3)
    # How many elements and levels embeddings have, only the model knows.
    shapes = [arrays[name][:, :0]] if name == "visual_embeds" else [arrays[name][..., :0], longer]
    for wrong in (arrays[name].astype(np.float16), *shapes):
        with pytest.raises((AssertionError, ValueError)):
            DecoderInputs(**{**arrays, name: wrong})


def test_vision_tables_of_another_grid_are_bugs() -> None:
    pixels, indices, table = np.zeros((1, 4, 6), np.float32), np.zeros((4, 4), np.int64), np.zeros((4, 2), np.float32)
    VisionInputs(pixels, indices, indices.astype(np.float32), table, table)
    with pytest.raises(AssertionError):
        VisionInputs(pixels[:, :3], indices, indices.astype(np.float32), table, table)
    with pytest.raises(AssertionError):
        VisionInputs(pixels, indices, indices, table, table)  # type: ignore[arg-type]
