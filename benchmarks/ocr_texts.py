"""Texts like those that a model reads from pictures, cut into tokens as Qwen's tokenizer cuts them before merging."""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass

# The pattern of the Qwen2 and Qwen3 tokenizers (tokenizer.json, pre_tokenizer), with \p{L} as [^\W\d_]. Their merges
# join most common words to one token, so the pieces stand for tokens here; rare words would be two or three.
_PIECES = re.compile(
    r"'(?:[sdmt]|ll|ve|re)|(?:[^\r\n\w]|_)?[^\W\d_]+|\d| ?(?:[^\s\w]|_)+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GOODS = ("milk", "bread", "butter", "apples", "coffee", "tea", "rice", "pasta", "cheese", "honey", "salt", "flour")
_MAKERS = ("Alpine", "Harvest", "Golden Meadow", "Sunny Valley", "Northern", "Riverside", "Cottage", "Orchard")
_PROSE = """The photograph shows a narrow street in an old town after rain. Two cyclists wait beside a bakery whose
shutters are half closed, while a woman with a red umbrella crosses towards the fountain. Wet cobblestones reflect
warm light from several windows above. In the background, scaffolding hides part of a church tower, and its clock
reads twenty past seven. A handwritten sign near the door advertises fresh rolls until evening. On the left, someone
has chained an empty cargo bike against railings covered by ivy; a grey cat sleeps on its saddle. Nothing suggests
that anybody is in a hurry, although dark clouds gather again behind distant roofs."""


@dataclass(frozen=True)
class Text:
    """A prompt and its answer, as token ids."""

    name: str
    prompt_ids: list[int]
    answer_ids: list[int]


def texts(seed: int = 0) -> list[Text]:
    """Return the texts, the same for the same seed."""
    rng = random.Random(seed)
    items = [
        {
            "name": f"{rng.choice(_MAKERS)} {rng.choice(_GOODS)}",
            "quantity": rng.randint(1, 9),
            "unit_price": round(rng.uniform(0.5, 20), 2),
            "tax": rng.choice(["A", "B"]),
        }
        for _ in range(9)
    ]
    rows = [list(map(str, item.values())) for item in items]
    page = "\n".join(f"{number}. {' '.join(row)}" for number, row in enumerate(rows, 1)) + "\n" + _PROSE
    receipt = json.dumps({"store": "Corner shop", "items": items, "total": 117.35})
    html = "<table>\n" + "".join(f"<tr><td>{'</td><td>'.join(row)}</td></tr>\n" for row in rows) + "</table>"
    ask = "Read the receipt in the picture. "
    return [
        _text("receipt as JSON", ask + "Answer as JSON with store, items and total.", receipt),
        _text("receipt as HTML table", ask + "Answer as an HTML table.", html),
        _text(
            "page read back, corrected",
            f"Correct this reading of the page:\n{page.replace('ee', 'ec').replace('ow', 'cw')}",
            page,
        ),
        _text("description in prose", "Describe the picture.", _PROSE),
    ]


def _text(name: str, prompt: str, answer: str) -> Text:
    ids: dict[str, int] = {}
    prompt_ids, answer_ids = (
        [ids.setdefault(piece, len(ids)) for piece in _PIECES.findall(text)] for text in (prompt, answer)
    )
    return Text(name, prompt_ids, answer_ids)
