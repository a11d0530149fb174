"""Where an answer ends, and what of it is shown, against transformers' stop criteria."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers import judge
from qwen3vl_export.demo import CHECKPOINT
from runtime.model import Qwen3VLModel
from runtime.stop_text import AnswerText, Run
from runtime.tokenizer import Tokenizer

NUM_TOKENS = 399
LIKELY = "the digits are 1 2 3 \n\n<|box_end|><|vision_start|> é 你 ab aab"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer((CHECKPOINT / "tokenizer.json").read_bytes())


def end_of(tokenizer: Tokenizer, stops: list[str], prompt: list[int], answer: list[int]) -> tuple[int | None, str]:
    """Return after how many tokens the answer is stopped, and its text."""
    text, shown = AnswerText(tokenizer, stops, prompt), ""
    for number, token in enumerate(answer, 1):
        shown += joined(text.push(token))
        if text.is_stopped:
            return number, shown + joined(text.flush())
    return None, shown + joined(text.flush())


def joined(runs: list[Run]) -> str:
    return "".join(run.text for run in runs)


@pytest.mark.judge
def test_an_answer_ends_where_that_of_transformers_does(tokenizer: Tokenizer) -> None:
    """Random tokens, half of them of few words: stops over several tokens, in special ones, and from the prompt on."""
    import torch
    from transformers import AutoTokenizer, StopStringCriteria

    judge.skip_unless(judge.release() >= (5, 24), "older ones compare characters, which lose those cut by a token")
    theirs, rng = AutoTokenizer.from_pretrained(CHECKPOINT), random.Random(0)
    likely = tokenizer.encode(LIKELY)
    num_stopped = num_straddling = 0
    for _ in range(250):
        ids = [rng.choice(likely) if rng.random() < 0.5 else rng.randrange(NUM_TOKENS) for _ in range(40)]
        cut = rng.randrange(1, 30)
        prompt, answer, whole = ids[:cut], ids[cut:], theirs.decode(ids)
        starts = [rng.randrange(len(whole) - 1) for _ in range(rng.choice([1, 1, 2, 3]))]
        stops = [s for i in starts if "\ufffd" not in (s := whole[i : i + rng.choice([1, 2, 3, 5, 9])])]
        if not stops:
            continue
        try:
            criterion = StopStringCriteria(theirs, stops)
        except ValueError:  # no token ends as one of them does
            continue
        ends = (n for n in range(1, len(answer) + 1) if criterion(torch.tensor([prompt + answer[:n]]), None)[0])
        expected, found = next(ends, None), end_of(tokenizer, stops, prompt, answer)
        assert found[0] == expected, (stops, theirs.decode(prompt), theirs.decode(answer))
        num_stopped += expected is not None
        num_straddling += expected is not None and end_of(tokenizer, stops, [], answer)[0] != expected
        if expected is None:
            assert found[1] == tokenizer.decode(answer)
        else:
            assert tokenizer.decode(answer[:expected]).startswith(found[1].rstrip("\ufffd"))
    assert num_stopped > 100 and num_straddling > 2


@pytest.mark.portable
@given(
    ids=st.lists(st.integers(0, NUM_TOKENS - 1), max_size=30),
    stops=st.lists(st.text(min_size=1, max_size=3), max_size=2),
)
def test_without_a_match_the_text_is_that_of_the_tokenizer(ids: list[int], stops: list[str]) -> None:
    tokenizer = Tokenizer((CHECKPOINT / "tokenizer.json").read_bytes())
    end, text = end_of(tokenizer, stops, ids[::-1], ids)
    if end is None:
        assert text == tokenizer.decode(ids)
    else:
        assert tokenizer.decode(ids[:end]).startswith(text.rstrip("\ufffd"))


@pytest.mark.portable
@pytest.mark.parametrize(
    ("prompt", "answer", "stops", "shown", "is_stopped"),
    [
        ("a", "12 34", ["2 3"], "1", True),
        ("a", "12 34", ["2 4", "34"], "12 ", True),
        ("a\n", "\nb", ["\n\n"], "", True),
        ("a\n\n", "b", ["\n\n"], "b", False),  # complete before the answer begins
        ("a", "1<|box_end|>2", ["<|box_end|>"], "1", True),
        ("a", "1<|box_end|>2", ["1<|box"], "", True),
        ("a", "1<|box_end|>2", ["12"], "12", False),
        ("a", "1<|box_end|>2", [], "12", False),
        ("a", "1 2", ["2 3"], "1 2", False),  # begun and not complete
        ("a", "1 你", ["你"], "1 ", True),
        ("a", "12", ["\ud800"], "12", False),
    ],
)
def test_what_is_shown(
    tokenizer: Tokenizer, prompt: str, answer: str, stops: list[str], shown: str, is_stopped: bool
) -> None:
    ids = tokenizer.encode(answer)
    end, text = end_of(tokenizer, stops, tokenizer.encode(prompt), ids)
    assert (text, end is not None) == (shown, is_stopped)


@pytest.mark.judge
@pytest.mark.parametrize("seed", range(3))
def test_generated_ids_are_those_of_transformers(tiny_engine: Path, tiny_checkpoint: Path, seed: int) -> None:
    """Greedy, with ends, stop strings and a penalty drawn from what the model says without them."""
    import torch
    from transformers import AutoTokenizer

    judge.skip_unless(judge.release() >= (5, 24), "older ones compare characters, which lose those cut by a token")
    ours, theirs, rng = Qwen3VLModel.from_engine(tiny_engine), judge.load(tiny_checkpoint), random.Random(seed)
    names = AutoTokenizer.from_pretrained(tiny_checkpoint)
    words = "".join(rng.choice("abc 123\n") for _ in range(12))
    messages = [{"role": "user", "content": words}]
    ids = torch.tensor([ours.prepare(messages).prompt.input_ids])

    def transformers(**options: Any) -> list[int]:
        theirs.model.rope_deltas = None
        asked = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **options}
        made = theirs.generate(ids, attention_mask=torch.ones_like(ids), **asked, tokenizer=names)
        return made[0, ids.shape[1] :].tolist()

    for penalty in (1.0, 1.3):
        plain = transformers(repetition_penalty=penalty)
        text = names.decode(plain)
        place = rng.randrange(len(text) - 2)
        for options in (
            {},
            {"eos_token_id": plain[7]},
            {"eos_token_id": [plain[9], plain[4]]},
            {"max_new_tokens": 5},
            *(
                {"stop_strings": stops}
                for stops in ([text[place : place + 2]], text[-3:])
                if "\ufffd" not in str(stops)
            ),
        ):
            expected = transformers(repetition_penalty=penalty, **options)
            given = {"max_new_tokens": 16, "eos_token_id": [], **options}
            assert ours.generate(messages, repetition_penalty=penalty, **given).token_ids == expected, options
