"""Tell checkpoints apart by a sample of each tensor: fine-tunings of one model have one shape, so the same headers.

All bytes of 235B take minutes to hash, and training moves nearly every element. What a sample misses is a change of a
few rows alone, such as the embedding of one new token.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from qwen3vl_export.safetensors_reader import TensorEntry
from runtime.errors import CheckpointError
from runtime.files import open_regular

SAMPLE_BYTES = 4096
"""Of a tensor's first, middle and last bytes each; a tensor of no more than three times that is read whole."""


def digest_of(tensors: Mapping[str, TensorEntry]) -> str:
    """Return the SHA-256 of key, dtype, shape and sampled bytes of each tensor, by key: in whichever files they lie.

    Raises:
        CheckpointError: A file cannot be read.
    """
    digest = hashlib.sha256()
    descriptors: dict[Path, int] = {}
    try:
        for key, entry in sorted(tensors.items()):
            digest.update(json.dumps([key, entry.dtype, entry.shape]).encode())
            if entry.path not in descriptors:
                descriptors[entry.path] = open_regular(entry.path)
            for start, stop in _samples(entry.num_bytes):
                digest.update(os.pread(descriptors[entry.path], stop - start, entry.offset + start))
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or 'a weight file'}: cannot be read ({error.strerror})",
            remedy="check the file and its permissions",
        ) from error
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)
    return digest.hexdigest()


def _samples(num_bytes: int) -> list[tuple[int, int]]:
    if num_bytes <= 3 * SAMPLE_BYTES:
        return [(0, num_bytes)]
    middle = (num_bytes - SAMPLE_BYTES) // 2
    return [(start, start + SAMPLE_BYTES) for start in (0, middle, num_bytes - SAMPLE_BYTES)]
