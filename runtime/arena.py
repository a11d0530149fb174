"""ONNX Runtime's memory arena, followed in sizes alone: how much it takes from the system for calls of known buffers.

The rules are those of onnxruntime/core/framework/bfc_arena.cc (1.32) with `arena_extend_strategy` kSameAsRequested, as
`runtime.sessions.ort_cpu` registers it: a buffer takes the smallest free piece that holds it, which is split if what
would be left is as large again; without one the arena grows by the size of the buffer. Pieces that are free merge with
their neighbours of the same growth, and nothing goes back to the system.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

_UNIT_BYTES = 256
_MAX_DEAD_BYTES = 128 << 20  # of a piece that is not split, however little of it is used
_NUM_BINS = 21

Stage = Mapping[str, int]
"""Bytes of the buffers that are there while one operator runs, by name; a name that the next stage has as well is the
same buffer."""


Shape = tuple[str, int]


@dataclass(eq=False)
class _Piece:
    start: int
    size: int
    region: int
    is_free: bool = True

    @property
    def bin(self) -> int:
        return min((self.size // _UNIT_BYTES).bit_length() - 1, _NUM_BINS - 1)


class Arena:
    """An arena that has given out nothing yet.

    Attributes:
        num_bytes: What it took from the system so far.
        extensions: The steps in which it did.
    """

    def __init__(self) -> None:
        self.num_bytes = 0
        self.extensions: list[int] = []
        self._pieces: list[_Piece] = []
        self._live: dict[str, tuple[Shape, _Piece]] = {}

    def run(self, stages: Iterable[Stage], *, shares: bool = False, keeps: Collection[str] = ()) -> int:
        """Run a call whose operators have these buffers, and free all of them; return the bytes by which it grew.

        Args:
            stages: The buffers, operator by operator.
            shares: Shapes of the graph are known by the names of their dimensions, so that ONNX Runtime plans which
                outputs take over the memory of an earlier one of the same shape (core/framework/allocation_planner.cc):
                it is held until the last of them. Names that begin with "~" are of an operator's own memory, or of
                outputs that nothing takes over; what stands before a colon tells shapes of as many bytes apart.
            keeps: Buffers of the last stage that are not freed.
        """
        before = self.num_bytes
        planned = [*stages]
        last = {_shape(name, size): index for index, stage in enumerate(planned) for name, size in stage.items()}
        dead: dict[Shape, list[_Piece]] = {}
        for index, stage in enumerate(planned):
            for name in [name for name in self._live if name not in stage]:
                shape, piece = self._live.pop(name)
                if shares and not name.startswith("~") and last[shape] >= index:
                    dead.setdefault(shape, []).append(piece)
                else:
                    self._free(piece)
            for shape in [shape for shape in dead if last[shape] < index]:
                for piece in dead.pop(shape):
                    self._free(piece)
            for name, size in stage.items():
                if name in self._live or not size:
                    continue
                shape = _shape(name, size)
                earlier = [] if name.startswith("~") else dead.get(shape, [])
                self._live[name] = shape, earlier.pop() if earlier else self._take(size)
        ended = [piece for name, (_, piece) in self._live.items() if name not in keeps]
        for piece in [*ended, *(each for found in dead.values() for each in found)]:
            self._free(piece)
        self._live.clear()
        return self.num_bytes - before

    def _take(self, size: int) -> _Piece:
        rounded = -(-size // _UNIT_BYTES) * _UNIT_BYTES
        least = min((rounded // _UNIT_BYTES).bit_length() - 1, _NUM_BINS - 1)
        free = [each for each in self._pieces if each.is_free and each.bin >= least and each.size >= rounded]
        if free:
            piece = min(free, key=lambda each: (each.bin, each.size, each.region, each.start))
        else:
            piece = _Piece(0, rounded, len(self.extensions))
            self._pieces.append(piece)
            self.extensions.append(rounded)
            self.num_bytes += rounded
        piece.is_free = False
        if piece.size >= 2 * rounded or piece.size - rounded >= _MAX_DEAD_BYTES:
            self._pieces.append(_Piece(piece.start + rounded, piece.size - rounded, piece.region))
            piece.size = rounded
        return piece

    def _free(self, piece: _Piece) -> None:
        piece.is_free = True
        for other in [each for each in self._pieces if each.region == piece.region and each.is_free]:
            if other.start + other.size == piece.start:
                piece.start, piece.size = other.start, piece.size + other.size
                self._pieces.remove(other)
            elif piece.start + piece.size == other.start:
                piece.size += other.size
                self._pieces.remove(other)


def _shape(name: str, size: int) -> Shape:
    return name.partition(":")[0] if ":" in name else "", size
