"""Embeddings of images that were seen before, by the digest of their pixels.

Shapes: D DeepStack levels, V visual rows.
"""

from __future__ import annotations

from collections import OrderedDict

from runtime.device_arrays import DeviceEmbeds
from runtime.visual_pruning.scored import Encoded


class VisionCache:
    """The embeddings that were used last, within a number of bytes.

    Args:
        max_bytes: Most bytes of all; 0 keeps none.

    Attributes:
        num_bytes: Bytes of all.
        device_bytes: Those of them in device memory.
        hits, misses: Images that were found, and were not.
        evictions: Images that had to make room.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._embeds: OrderedDict[bytes, Encoded] = OrderedDict()
        self.num_bytes = self.device_bytes = self.hits = self.misses = self.evictions = 0

    def __len__(self) -> int:
        return len(self._embeds)

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._embeds

    def get(self, digest: bytes) -> Encoded | None:
        """Return the embeddings of an image, [1+D, V, hidden], not to be written to; None if they are not here."""
        embeds = self._embeds.get(digest)
        if embeds is None:
            self.misses += 1
            return None
        self.hits += 1
        self._embeds.move_to_end(digest)
        return embeds

    def put(self, digest: bytes, embeds: Encoded) -> None:
        """Keep the embeddings of an image, unless they alone are too large."""
        if embeds.nbytes > self._max_bytes or digest in self._embeds:
            return
        while self.num_bytes + embeds.nbytes > self._max_bytes:
            _, oldest = self._embeds.popitem(last=False)
            self._count(oldest, -oldest.nbytes)
            self.evictions += 1
        self._embeds[digest] = embeds
        self._count(embeds, embeds.nbytes)

    def _count(self, embeds: Encoded, num_bytes: int) -> None:
        self.num_bytes += num_bytes
        self.device_bytes += num_bytes if isinstance(embeds, DeviceEmbeds) else 0
