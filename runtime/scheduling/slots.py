"""The slots of a KV cache: which sequence has which, what the rows of the others can still serve, who makes room.

GroupQueryAttention and compiled graphs want the sequences of a call side by side, so those that decode have slots
first … first + n - 1. Prompts are run one at a time, in any other slot. A sequence that begins to decode moves beside
the others, and when one ends, the last one takes its place; a move exchanges rows, so what other slots hold is not
lost. Where a session decodes in any slots, who decodes first stays where it is; where steps are recorded for the first
slots, `first` is 0. Which of both it is may change with the number of sequences, and while a session is open.

A slot whose sequence has ended keeps its rows until another needs it: a later prompt that begins with the same tokens
takes the slot over, or copies the rows. Of such slots, the one that was used least recently is given away first.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import numpy as np

from runtime.contract import IntArray
from runtime.scheduling.gap import NO_GAP, Gap
from runtime.scheduling.prompt_keys import KEY_WIDTH
from runtime.session import KVCache
from runtime.sliding_window import SlidingWindow

MIN_SHARED_ROWS = 16
"""Fewer rows are not worth a move; the first tokens of a chat template are in every prompt."""
LEAST_KEPT_SHARE = 8
"""A slot is taken over if the rows that are lost with it are an eighth of those that are used again, or fewer: the end
of a template, or an answer that is tokenised otherwise. More may be another conversation that began alike, or a fork of
one. 1000 rows of the 2B shape are copied in 0.03 s on two cores, and take 9 s to run again (ort-cpu-int4)."""
_NO_KEYS = np.zeros((0, KEY_WIDTH), np.int64)


@dataclass(eq=False)
class Slot:
    """One sequence's place in the cache.

    Attributes:
        keys: What its rows behind the gap are of (`prompt_keys`), int64 [rows, 3]; of a sequence that runs, all of its
            prompt from there on.
        num_rows: Valid rows.
        gap: Tokens of its sequence that have no rows any more (`runtime.sliding_window`).
        owner: The sequence that runs in it; None if its rows wait for a prompt that begins with them.
        last_use: When its owner last ended, or its rows were last copied, on the slots' own clock.
    """

    keys: IntArray = field(default_factory=_NO_KEYS.copy)
    num_rows: int = 0
    owner: Hashable | None = None
    last_use: int = 0
    gap: Gap = NO_GAP

    @property
    def valid_keys(self) -> IntArray:
        """Keys of the rows that are valid and behind the gap."""
        return self.keys[: self.num_rows - self.gap.num_sinks]

    def forget(self) -> None:
        """Hold no rows."""
        self.keys, self.num_rows, self.gap = _NO_KEYS, 0, NO_GAP


class Slots:
    """All slots of one cache.

    Args:
        cache: The cache, whose rows are moved here and nowhere else.
        keeps_rows: Slots keep their rows for later prompts.
        begins_anywhere: Whether so many sequences may decode in any slots side by side, not only from 0 on.
        window: Where gaps in the rows come from, and which rows behind one are used again (`Gap.shared_rows`).

    Attributes:
        first: First slot of those that decode.
        num_decoding: Sequences that decode; theirs are slots first … first + num_decoding - 1.
        moved_rows: Rows that were copied or exchanged so far.
        evicted_rows: Rows that were given up to make room.
    """

    def __init__(
        self,
        cache: KVCache,
        *,
        keeps_rows: bool = True,
        begins_anywhere: Callable[[int], bool] = lambda num_sequences: False,
        window: SlidingWindow | None = None,
    ) -> None:
        self.cache = cache
        self.first = 0
        self.num_decoding = 0
        self.moved_rows = 0
        self.evicted_rows = 0
        self._keeps_rows = keeps_rows
        self._begins_anywhere = begins_anywhere
        self._window = window
        self._slots = [Slot() for _ in range(cache.batch)]
        self._place: dict[Hashable, int] = {}
        self._clock = 0

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def num_running(self) -> int:
        """Slots that a running sequence has."""
        return len(self._place)

    @property
    def total_rows(self) -> int:
        """Valid rows of all slots."""
        return sum(slot.num_rows for slot in self._slots)

    def place(self, owner: Hashable) -> int:
        """Return the slot of a sequence."""
        return self._place[owner]

    def num_rows(self, slot: int) -> int:
        """Return the valid rows of a slot."""
        return self._slots[slot].num_rows

    def gap(self, owner: Hashable) -> Gap:
        """Return the gap in the rows of a sequence."""
        return self._slots[self._place[owner]].gap

    def shared_rows(self, keys: IntArray) -> int:
        """Return how many first rows of a prompt lie in some slot already."""
        return self._best(keys)[1]

    def start(self, owner: Hashable, keys: IntArray, *, shares: bool = True, num_left: int = 1) -> int:
        """Give a sequence a slot, with the rows that it shares with another one.

        Args:
            owner: The sequence.
            keys: Those of its prompt.
            shares: Use rows of others.
            num_left: Fewest tokens that are left to run.

        Returns:
            Valid rows, 0 … S - `num_left`.
        """
        source, num_shared = self._best(keys[:-num_left]) if shares and self._keeps_rows else (0, 0)
        place = self._place_for(source, num_shared)
        slot = self._slots[place]
        assert slot.owner is None, "no slot is free"
        if place != source or not num_shared:
            self.evicted_rows += slot.num_rows
            if num_shared:
                self.cache.copy_rows(source, place, num_shared)
                self.moved_rows += num_shared
                self._clock += 1
                self._slots[source].last_use = self._clock
        slot.gap = self._slots[source].gap if num_shared else NO_GAP
        slot.owner, slot.keys, slot.num_rows = owner, keys[slot.gap.end :], num_shared
        self._place[owner] = place
        return num_shared

    def write(self, owner: Hashable, num_rows: int) -> None:
        """Note that a sequence has so many valid rows now."""
        self._slots[self._place[owner]].num_rows = num_rows

    def evict(self, owner: Hashable, num_rows: int) -> None:
        """Note that a sequence has given up rows and keeps so many, which are of no use to others."""
        slot = self._slots[self._place[owner]]
        slot.keys, slot.num_rows = _NO_KEYS, num_rows

    def widen(self, owner: Hashable, gap: Gap, keys: IntArray, num_rows: int) -> None:
        """Note that the gap in a sequence's rows has grown, and that so many rows are left, its sinks included.

        Args:
            owner: The sequence.
            gap: Its gap now.
            keys: Those of its prompt.
            num_rows: Valid rows.
        """
        slot = self._slots[self._place[owner]]
        slot.gap, slot.keys, slot.num_rows = gap, keys[gap.end :], num_rows

    def join(self, owner: Hashable) -> int:
        """Move a sequence whose prompt has run beside those that decode.

        Returns:
            Its place among them, by slot: 0 or the last.
        """
        anywhere = self._begins_anywhere(self.num_decoding + 1)
        if not anywhere:
            self._pack()
        place, end = self._place[owner], self.first + self.num_decoding
        assert not self.first <= place < end, "it decodes already"
        if anywhere and not self.num_decoding:
            self.first = end = place
        is_before = anywhere and self.first > 0 and (place == self.first - 1 or end == len(self._slots))
        if is_before:
            self.first -= 1
        self._exchange(place, self.first if is_before else end)
        self.num_decoding += 1
        return 0 if is_before else self.num_decoding - 1

    def settle(self) -> None:
        """Move those that decode to where steps of so many begin."""
        if not self._begins_anywhere(self.num_decoding):
            self._pack()

    def leave(self, owner: Hashable, keys: IntArray | None) -> None:
        """Free the slot of a sequence.

        Args:
            owner: The sequence.
            keys: Those of all its tokens; None if its rows are not to be used again.
        """
        place = self._place[owner]
        if self.first <= place < self.first + self.num_decoding:
            self.num_decoding -= 1
            last = self.first + self.num_decoding
            self._exchange(place, last)
            place = last
        slot = self._slots[place]
        del self._place[owner]
        self._clock += 1
        slot.owner, slot.last_use = None, self._clock
        if keys is None or not self._keeps_rows or slot.num_rows <= slot.gap.num_sinks:
            slot.forget()
        else:
            # A copy, which does not hold the keys of a history without end.
            slot.keys = keys[slot.gap.end :][: slot.num_rows - slot.gap.num_sinks].copy()

    def forget(self) -> None:
        """Give up the rows that no running sequence has."""
        for slot in self._slots:
            if slot.owner is None:
                slot.forget()

    def _best(self, keys: IntArray) -> tuple[int, int]:
        """Return the slot with most tokens in common, and the number of their rows; 0 if they are too few."""
        rows = [self._shared(slot, keys) if slot.num_rows else 0 for slot in self._slots]
        tokens = [slot.gap.num_tokens + shared if shared else 0 for slot, shared in zip(self._slots, rows, strict=True)]
        best = max(range(len(rows)), key=lambda i: (tokens[i], self._slots[i].owner is None))
        return (best, rows[best]) if rows[best] >= MIN_SHARED_ROWS else (best, 0)

    def _shared(self, slot: Slot, keys: IntArray) -> int:
        return slot.gap.shared_rows(slot.valid_keys, keys, self._window)

    def _place_for(self, source: int, num_shared: int) -> int:
        """Return the slot to start in: that of the shared rows if little else goes with it, or the one to give up."""
        idle = [i for i, each in enumerate(self._slots) if each.owner is None]
        others = [i for i in idle if i != source or not num_shared] or idle
        oldest = min(others, key=lambda i: (self._slots[i].num_rows > 0, self._slots[i].last_use, i))
        slot, other = self._slots[source], self._slots[oldest]
        if not num_shared or slot.owner is not None:
            return oldest
        is_little = LEAST_KEPT_SHARE * (slot.num_rows - num_shared) <= num_shared
        is_older = other.num_rows > 0 and slot.last_use < other.last_use
        return source if is_little or is_older else oldest

    def _pack(self) -> None:
        """Move those that decode to the first slots, in their order."""
        first, self.first = self.first, 0
        for index in range(self.num_decoding):
            self._exchange(first + index, index)

    def _exchange(self, place: int, other: int) -> None:
        if place == other:
            return
        slot, beside = self._slots[place], self._slots[other]
        num_rows = max(slot.num_rows, beside.num_rows)
        if not beside.num_rows:
            self.cache.copy_rows(place, other, num_rows)
        elif not slot.num_rows:
            self.cache.copy_rows(other, place, num_rows)
        else:
            self.cache.swap_rows(place, other, num_rows)
        self.moved_rows += num_rows
        self._slots[place], self._slots[other] = beside, slot
        for index in (place, other):
            owner = self._slots[index].owner
            if owner is not None:
                self._place[owner] = index
