"""Slots under random starts, joins, steps and ends, over a cache whose rows say whose they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule, run_state_machine_as_test
from numpy.typing import NDArray

from runtime.scheduling.prompt_keys import KEY_WIDTH, common_length
from runtime.scheduling.slots import MIN_SHARED_ROWS, Slots

NUM_SLOTS, CAPACITY = 5, 96
STALE = -7


class NumberedCache:
    """A KV cache whose row is the key of its token and the number of the token in its sequence."""

    def __init__(self, capacity: int = CAPACITY, batch: int = NUM_SLOTS) -> None:
        self.capacity, self.batch = capacity, batch
        self.rows = np.full((batch, capacity, KEY_WIDTH + 1), STALE, np.int64)
        self.num_bytes = self.rows.nbytes

    def layer(self, index: int) -> tuple[NDArray[Any], NDArray[Any]]:
        return self.rows[:, None], self.rows[:, None]

    def copy_rows(self, source: int, target: int, num_rows: int) -> None:
        self.rows[target, :num_rows] = self.rows[source, :num_rows]

    def swap_rows(self, slot: int, other: int, num_rows: int) -> None:
        kept = self.rows[slot, :num_rows].copy()
        self.rows[slot, :num_rows] = self.rows[other, :num_rows]
        self.rows[other, :num_rows] = kept

    def write(self, slot: int, start: int, keys: NDArray[np.int64]) -> None:
        """Write what a call of the decoder would, from row `start` on."""
        stop = start + len(keys)
        self.rows[slot, start:stop, :KEY_WIDTH] = keys
        self.rows[slot, start:stop, KEY_WIDTH] = np.arange(start, stop)

    def holds(self, slot: int, keys: NDArray[np.int64]) -> bool:
        """Return whether the first rows of a slot are those of a sequence's tokens."""
        numbered = np.concatenate([keys, np.arange(len(keys))[:, None]], axis=1)
        return bool((self.rows[slot, : len(keys)] == numbered).all())


class ForgetfulCache(NumberedCache):
    """It exchanges the rows of a slot with nothing."""

    def swap_rows(self, slot: int, other: int, num_rows: int) -> None:
        self.rows[slot, :num_rows] = self.rows[other, :num_rows]


class ShortCache(NumberedCache):
    """It copies one row too few."""

    def copy_rows(self, source: int, target: int, num_rows: int) -> None:
        super().copy_rows(source, target, num_rows - 1)


@dataclass(eq=False)
class Owner:
    """A sequence: the keys of all its tokens, and how many of them have a row."""

    keys: NDArray[np.int64]
    num_prompt: int
    num_rows: int = 0
    is_decoding: bool = False


def random_keys(number: int, shared: int, length: int, image: int) -> NDArray[np.int64]:
    """Return keys of which the first `shared` are those of all prompts, but for an image that they begin with."""
    keys = np.zeros((length, KEY_WIDTH), np.int64)
    keys[:, 0] = np.arange(length) % 50
    keys[shared:, 0] += 1000 * (number + 1)
    keys[: min(4, length), 1:] = image
    return keys


class SlotsMachine(RuleBasedStateMachine):
    """What the steps of an engine do with slots, in any order that they may come in."""

    cache_class: type[NumberedCache] = NumberedCache
    compares_pixels = True
    most_anywhere = 0
    running = Bundle("running")

    def __init__(self) -> None:
        super().__init__()
        self.cache = self.cache_class()
        self.slots = Slots(self.cache, begins_anywhere=lambda num_sequences: num_sequences <= self.most_anywhere)
        self.owners: list[Owner] = []
        self.in_order: list[Owner] = []
        self.number = 0

    def seen(self, keys: NDArray[np.int64]) -> NDArray[np.int64]:
        return keys if self.compares_pixels else keys * np.array([1, 0, 0])

    @rule(
        target=running,
        length=st.integers(2, 60),
        shared=st.integers(0, 60),
        image=st.integers(0, 2),
        shares=st.booleans(),
    )
    def start(self, length: int, shared: int, image: int, shares: bool) -> Owner:
        assume(len(self.owners) < NUM_SLOTS)
        keys = random_keys(self.number, min(shared, length), length, image)
        self.number += 1
        owner = Owner(keys, length)
        before = self.slots.total_rows
        owner.num_rows = self.slots.start(owner, self.seen(keys), shares=shares)
        assert 0 <= owner.num_rows < length and (shares or not owner.num_rows)
        assert owner.num_rows == 0 or owner.num_rows >= MIN_SHARED_ROWS
        assert self.slots.total_rows <= before + owner.num_rows
        self.owners.append(owner)
        return owner

    @rule(owner=running, num_tokens=st.integers(1, 40))
    def prefill(self, owner: Owner, num_tokens: int) -> None:
        assume(owner in self.owners and owner.num_rows < owner.num_prompt)
        new = owner.keys[owner.num_rows : min(owner.num_prompt, owner.num_rows + num_tokens)]
        self.cache.write(self.slots.place(owner), owner.num_rows, new)
        owner.num_rows += len(new)
        self.slots.write(owner, owner.num_rows)
        if owner.num_rows == owner.num_prompt:
            self.in_order.insert(self.slots.join(owner), owner)
            owner.is_decoding = True

    @rule(steps=st.integers(1, 8), padding=st.integers(0, NUM_SLOTS))
    def decode(self, steps: int, padding: int) -> None:
        """Run tokens of all that decode; a batch that is filled up writes behind the rows of the slots after them."""
        for _ in range(steps):
            decoding = [owner for owner in self.owners if owner.is_decoding and len(owner.keys) < CAPACITY]
            assume(decoding and len(decoding) == self.slots.num_decoding)
            end = self.slots.first + self.slots.num_decoding
            for slot in range(end, min(NUM_SLOTS, end + padding)):
                self.cache.rows[slot, min(CAPACITY - 1, self.slots.num_rows(slot))] = STALE
            for owner in decoding:
                key = np.array([[5000 + len(owner.keys), 0, 0]])
                self.cache.write(self.slots.place(owner), owner.num_rows, key)
                owner.keys = np.concatenate([owner.keys, key])
                owner.num_rows += 1
                self.slots.write(owner, owner.num_rows)

    @rule(owner=consumes(running), keeps=st.booleans())
    def leave(self, owner: Owner, keeps: bool) -> None:
        assume(owner in self.owners)
        self.slots.leave(owner, self.seen(owner.keys) if keeps else None)
        self.owners.remove(owner)
        if owner.is_decoding:
            place, last = self.in_order.index(owner), self.in_order.pop()
            if last is not owner:
                self.in_order[place] = last

    @rule()
    def forget(self) -> None:
        self.slots.forget()
        assert self.slots.total_rows == sum(owner.num_rows for owner in self.owners)

    @invariant()
    def those_that_decode_are_side_by_side(self) -> None:
        first, num_decoding = self.slots.first, self.slots.num_decoding
        assert [self.slots.place(owner) for owner in self.in_order] == list(range(first, first + num_decoding))
        assert first == 0 or num_decoding <= self.most_anywhere
        assert {id(owner) for owner in self.in_order} == {id(owner) for owner in self.owners if owner.is_decoding}

    @invariant()
    def each_has_a_slot_of_its_own(self) -> None:
        places = [self.slots.place(owner) for owner in self.owners]
        assert len(set(places)) == len(places) == self.slots.num_running

    @invariant()
    def rows_are_those_of_their_owner(self) -> None:
        for owner in self.owners:
            assert self.slots.num_rows(self.slots.place(owner)) == owner.num_rows
            assert self.cache.holds(self.slots.place(owner), owner.keys[: owner.num_rows])


class AnywhereMachine(SlotsMachine):
    most_anywhere = NUM_SLOTS


class ChangingMachine(SlotsMachine):
    """How many sequences decode in any slots changes, as where a session gives its own kernels up."""

    most_anywhere = NUM_SLOTS

    @rule(most=st.integers(0, NUM_SLOTS))
    def change(self, most: int) -> None:
        self.most_anywhere = most
        self.slots.settle()


class ForgetfulMachine(SlotsMachine):
    cache_class = ForgetfulCache


class ShortMachine(SlotsMachine):
    cache_class = ShortCache


class BlindMachine(SlotsMachine):
    compares_pixels = False


SABOTAGES = (ForgetfulMachine, ShortMachine, BlindMachine)


def run_machine(machine: type[SlotsMachine]) -> None:
    # Not shrunk, which takes longer than all else: a sabotage only has to be found.
    chosen = settings(
        max_examples=400 if machine in SABOTAGES else 100,  # a sabotage ends the run as soon as it is found
        stateful_step_count=30,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        report_multiple_bugs=False,
    )
    run_state_machine_as_test(machine, settings=chosen)


@pytest.mark.portable
@pytest.mark.parametrize("machine", [SlotsMachine, AnywhereMachine, ChangingMachine], ids=lambda each: each.__name__)
def test_rows_stay_with_their_sequence_whatever_happens(machine: type[SlotsMachine]) -> None:
    run_machine(machine)


@pytest.mark.portable
def test_sequences_that_decode_alone_move_no_rows_where_steps_run_in_any_slot() -> None:
    moved = {}
    for begins_anywhere in (False, True):
        slots = Slots(NumberedCache(), begins_anywhere=lambda _, anywhere=begins_anywhere: anywhere)
        for number in range(2 * NUM_SLOTS):
            owner, keys = object(), keys_of(1000 * number)
            slots.start(owner, keys)
            slots.cache.write(slots.place(owner), 0, keys)  # type: ignore[attr-defined]
            slots.write(owner, len(keys))
            assert slots.join(owner) == 0 and slots.place(owner) == slots.first
            slots.leave(owner, keys)
        moved[begins_anywhere] = slots.moved_rows
    assert moved[True] == 0 < moved[False]


@pytest.mark.portable
def test_those_that_decode_grow_to_either_side() -> None:
    slots = Slots(NumberedCache(batch=3), begins_anywhere=lambda _: True)
    owners = [object() for _ in range(3)]
    for number, owner in enumerate(owners):
        slots.start(owner, keys_of(1000 * number))
        slots.write(owner, 20)
    assert [slots.place(owner) for owner in owners] == [0, 1, 2]
    assert (slots.join(owners[2]), slots.first) == (0, 2)
    assert (slots.join(owners[1]), slots.first) == (0, 1)
    assert (slots.join(owners[0]), slots.first) == (0, 0)
    slots.leave(owners[2], None)
    assert [slots.place(owner) for owner in owners[:2]] == [0, 1] and slots.num_decoding == 2


@pytest.mark.portable
@pytest.mark.parametrize("machine", SABOTAGES, ids=lambda each: each.__name__)
def test_a_broken_cache_or_key_is_noticed(machine: type[SlotsMachine]) -> None:
    with pytest.raises(AssertionError):
        run_machine(machine)


def keys_of(start: int, length: int = 20) -> NDArray[np.int64]:
    keys = np.zeros((length, KEY_WIDTH), np.int64)
    keys[:, 0] = start + np.arange(length)
    return keys


def ended(slots: Slots, keys: NDArray[np.int64]) -> int:
    """Run a sequence to its end; return its slot."""
    owner = object()
    slots.start(owner, keys)
    place = slots.place(owner)
    slots.cache.write(place, 0, keys)  # type: ignore[attr-defined]
    slots.write(owner, len(keys))
    slots.leave(owner, keys)
    return place


@pytest.mark.portable
def test_the_slot_that_was_used_least_recently_is_given_away_first() -> None:
    slots = Slots(NumberedCache(batch=3))
    first, second, third = (ended(slots, keys_of(100 * i)) for i in range(3))
    assert sorted((first, second, third)) == [0, 1, 2]
    assert ended(slots, keys_of(0)) == first  # its own rows again, so it is now the newest
    assert ended(slots, keys_of(1000)) == second
    assert ended(slots, keys_of(2000)) == third
    assert ended(slots, keys_of(3000)) == first


@pytest.mark.portable
def test_rows_that_are_copied_count_as_used() -> None:
    slots = Slots(NumberedCache(batch=3))
    long = keys_of(0, 80)
    first, second = ended(slots, long), ended(slots, keys_of(1000))
    copied = np.concatenate([long[:20], keys_of(2000)])
    assert ended(slots, copied) not in (first, second)
    # Of the two that are left, the one whose rows were just read stays.
    assert ended(slots, keys_of(3000)) == second


@pytest.mark.portable
def test_conversations_that_began_alike_leave_each_other_their_rows() -> None:
    slots = Slots(NumberedCache(batch=3))
    branches = [np.concatenate([keys_of(0, 40), keys_of(1000 * number, 30)]) for number in (1, 2)]
    places = [ended(slots, keys) for keys in branches]
    assert len(set(places)) == 2
    for turn in range(3):  # by turns: each goes on in its own slot
        for number, place in enumerate(places):
            assert slots.shared_rows(branches[number]) == len(branches[number])
            branches[number] = np.concatenate([branches[number], keys_of(5000 + 1000 * number + 10 * turn, 6)])
            assert ended(slots, branches[number]) == place
    assert (slots.moved_rows, slots.evicted_rows) == (40, 0)


@pytest.mark.portable
def test_a_slot_is_taken_over_where_few_rows_are_lost_or_all_others_were_used_later() -> None:
    slots = Slots(NumberedCache(batch=2))
    first = ended(slots, keys_of(0, 45))
    few = np.concatenate([keys_of(0, 40), keys_of(2000, 10)])  # 5 of 45 rows are lost
    assert ended(slots, few) == first
    many = np.concatenate([keys_of(0, 39), keys_of(3000, 10)])
    second = ended(slots, many)
    assert second != first
    assert ended(slots, np.concatenate([few[:42], keys_of(4000, 10)])) == first  # it was used before the other


@pytest.mark.portable
def test_one_token_is_left_to_run() -> None:
    slots = Slots(NumberedCache())
    ended(slots, keys_of(0, 30))
    assert slots.shared_rows(keys_of(0, 30)) == 30
    assert slots.start("again", keys_of(0, 30)) == 29


@pytest.mark.portable
def test_rows_of_a_sequence_that_runs_are_shared() -> None:
    cache = NumberedCache()
    slots = Slots(cache)
    slots.start("one", keys_of(0, 40))
    cache.write(slots.place("one"), 0, keys_of(0, 40)[:25])
    slots.write("one", 25)
    assert slots.start("two", keys_of(0, 40)) == 25
    assert slots.place("two") != slots.place("one")
    assert cache.holds(slots.place("two"), keys_of(0, 25))


@pytest.mark.portable
def test_nothing_is_kept_where_that_is_off() -> None:
    slots = Slots(NumberedCache(), keeps_rows=False)
    ended(slots, keys_of(0, 30))
    assert (slots.total_rows, slots.start("again", keys_of(0, 30))) == (0, 0)


@pytest.mark.portable
def test_few_rows_are_not_worth_a_move() -> None:
    slots = Slots(NumberedCache())
    ended(slots, keys_of(0, 30))
    other = keys_of(0, 30)
    other[MIN_SHARED_ROWS - 1 :, 0] += 500
    assert slots.start("few", other) == 0
    other = keys_of(0, 30)
    other[MIN_SHARED_ROWS:, 0] += 500
    assert slots.start("enough", other) == MIN_SHARED_ROWS


@pytest.mark.portable
def test_rows_beyond_the_valid_ones_are_nobodys() -> None:
    slots = Slots(NumberedCache())
    slots.start("one", keys_of(0, 40))
    slots.write("one", 20)
    slots.leave("one", keys_of(0, 40))
    assert slots.start("two", keys_of(0, 40)) == 20


@pytest.mark.portable
def test_common_length() -> None:
    keys = keys_of(0, 20)
    for at in range(20):
        for column in range(KEY_WIDTH):
            other = keys.copy()
            other[at, column] += 1
            assert common_length(keys, other) == at
    assert common_length(keys, keys) == common_length(keys, keys_of(0, 25)) == 20
    assert common_length(keys, keys[:0]) == 0


@pytest.mark.portable
def test_those_that_decode_move_to_the_first_slots_when_steps_begin_there() -> None:
    most = [3]
    cache = NumberedCache(batch=4)
    slots = Slots(cache, begins_anywhere=lambda num_sequences: num_sequences <= most[0])
    owners, keys = [object() for _ in range(4)], [keys_of(1000 * number) for number in range(4)]
    for owner, each in zip(owners, keys, strict=True):
        slots.start(owner, each)
        cache.write(slots.place(owner), 0, each)
        slots.write(owner, len(each))
    for owner in owners[1:3]:
        slots.join(owner)
    slots.settle()
    assert (slots.first, [slots.place(each) for each in owners]) == (1, [0, 1, 2, 3]), "they may stay"
    most[0] = 1
    slots.settle()
    assert (slots.first, [slots.place(each) for each in owners[1:3]]) == (0, [0, 1])
    assert slots.join(owners[3]) == 2
    for owner, each in zip(owners, keys, strict=True):
        assert cache.holds(slots.place(owner), each)
