"""What a token's row of the KV cache depends on, as numbers that can be compared.

A row depends on the token and on all before it. A text token is its id; a visual token also the pixels of its image,
since all images have one token id, and how many, or which, of its tokens stay. Positions follow from the spans, so they
need no key.

Shapes: S tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from runtime.contract import IntArray
from runtime.preparation import Prepared

KEY_WIDTH = 3
"""Numbers of one token: its id, and 128 bits of its image's digest, 0 for text."""


def prompt_keys(prepared: Prepared) -> IntArray:
    """Return the keys of a prompt, int64 [S, 3]."""
    keys_S3 = text_keys(prepared.prompt.input_ids)
    for span, image in zip(prepared.prompt.spans, prepared.images, strict=True):
        digest = image.digest if span.kept is None else hashlib.sha256(image.digest + repr(span.kept).encode()).digest()
        keys_S3[span.start : span.end, 1:] = np.frombuffer(digest[:16], np.int64)
    return keys_S3


def text_keys(token_ids: Sequence[int]) -> IntArray:
    """Return the keys of text tokens, int64 [S, 3]."""
    keys_S3 = np.zeros((len(token_ids), KEY_WIDTH), np.int64)
    keys_S3[:, 0] = token_ids
    return keys_S3


def common_length(keys: IntArray, others: IntArray) -> int:
    """Return how many tokens two sequences have in common from the start on."""
    length = min(len(keys), len(others))
    differs_S = (keys[:length] != others[:length]).any(axis=1)
    return int(differs_S.argmax()) if differs_S.any() else length
