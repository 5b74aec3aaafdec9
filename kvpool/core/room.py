"""Who has to go so that something fits. Decides; the store drops them.

A slot comes from the class's own next victim, or from emptying a whole run of spans of other classes (a *window*): the
one whose hottest block is coldest. A window is preferred if each of its blocks is colder than the own victim, so that a
small hot class gets the spans of a large cold one. Finding windows looks at every entry, so while there are own victims
it is done once for so many evictions only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvpool.core.arrays import EntryState, SourceArrays
from kvpool.core.evictors import Evictor
from kvpool.core.index import Entries
from kvpool.core.kernels.windows import pick_apart, price_pieces, price_windows, used_entries
from kvpool.core.spans import SlotAllocator, slot_class

#: One scan for windows for each eviction of this share of the entries in use.
_SCAN_SHARE: Final = 8
#: Windows that are looked at more closely before one is taken that leaves suffixes without their prefix.
_TRIES_MAX: Final = 16

_NOBODY: Final = np.empty(0, dtype=np.int32)


@dataclass(frozen=True, slots=True, eq=False)
class _Pieces:
    """Spans and free units in order of address, and the used entries in them."""

    units: NDArray[np.int64]
    entries: Entries
    piece_of_entry: NDArray[np.int32]
    worst: NDArray[np.uint64]
    blocks: NDArray[np.int64]
    blocked: NDArray[np.bool_]


class Room:
    """Chooses victims. `evicted` is to be told how many went."""

    def __init__(self, arrays: SourceArrays, slots: SlotAllocator, evictor: Evictor) -> None:
        self._arrays, self._slots, self._evictor = arrays, slots, evictor
        self._evictions_to_scan = 0

    def evicted(self, count: int) -> None:
        self._evictions_to_scan = max(0, self._evictions_to_scan - count)

    def victims(self, size_bytes: int, missing: int) -> Entries:
        """Whom to drop for at least one and at most `missing` slots of this size; empty if not one can be had."""
        own = self._own(size_bytes, missing)
        if len(own) and (self._evictions_to_scan or self._evictor.next_class() == slot_class(size_bytes)):
            return own
        windows = self._windows(size_bytes, missing, self._evictor.rank(own[:1]) if len(own) else None)
        return windows if len(windows) else own

    def next_victims(self, count: int) -> Entries:
        """At most `count` blocks of the class whose next victim goes first of all; empty if nobody may go."""
        number = self._evictor.next_class()
        return _NOBODY if number is None else self._evictor.victims(number, count)

    def footprints(self, entries: Entries) -> NDArray[np.int64]:
        """Bytes that blocks have in their slots, names included; int64 (n)."""
        sizes = self._arrays.sizes[entries].astype(np.int64)
        return sizes + self._arrays.name_bytes[entries].astype(np.int64)

    # ---------------------------------------------------------------- parts

    def _own(self, size_bytes: int, missing: int) -> Entries:
        """Victims of the same class each of whose slots is large enough."""
        victims = self._evictor.victims(slot_class(size_bytes), missing)
        if not len(victims):
            return victims
        small = self._slots.slots_bytes(self.footprints(victims)) < self._slots.slot_bytes(size_bytes)
        return victims[: int(small.argmax())] if small.any() else victims

    def _windows(self, size_bytes: int, missing: int, colder_than: NDArray[np.uint64] | None) -> Entries:
        pieces = self._pieces()
        self._evictions_to_scan = len(pieces.entries) // _SCAN_SHARE
        units = self._slots.units_needed(size_bytes)
        per_span = max(1, units * self._slots.unit_bytes // self._slots.slot_bytes(size_bytes))
        found = self._cheapest(pieces, units, -(-missing // per_span), colder_than)
        if not len(found) and colder_than is None:
            # A shorter span serves as well where there is no room for a whole one.
            found = self._cheapest(pieces, self._slots.units_least(size_bytes), 1, None)
        return found

    def _pieces(self) -> _Pieces:
        table = self._slots.spans()
        begins = self._slots.unit_free
        begins[table.first] = True
        firsts = np.flatnonzero(begins)
        units = np.diff(np.append(firsts, self._slots.units)).astype(np.int64)
        piece_of_unit = np.cumsum(begins, dtype=np.int32) - np.int32(1)
        entries, piece_of_entry, may_go = self._used(piece_of_unit)
        may_go &= ~self._evictor.hidden(entries)
        # Ranks of those that may not go mean nothing, and are in blocked pieces.
        ranks = self._evictor.rank(entries)
        worst = np.zeros(len(units), dtype=np.uint64)
        blocks, blocked = np.zeros(len(units), dtype=np.int64), np.zeros(len(units), dtype=np.bool_)
        price_pieces(piece_of_entry, may_go, ranks, worst, blocks, blocked)
        # Slots that were allocated a moment ago have no entries yet.
        pieces = piece_of_unit[table.first]
        blocked[pieces] |= blocks[pieces] != table.used
        return _Pieces(units, entries, piece_of_entry, worst, blocks, blocked)

    def _used(self, piece_of_unit: NDArray[np.int32]) -> tuple[Entries, NDArray[np.int32], NDArray[np.bool_]]:
        """Entries in use, the piece that each lies in, and which of them are readable."""
        arrays = self._arrays
        entries, pieces = np.empty(arrays.entries, dtype=np.int32), np.empty(arrays.entries, dtype=np.int32)
        readable = np.empty(arrays.entries, dtype=np.bool_)
        count = used_entries(
            arrays.states, arrays.offsets, self._slots.unit_bytes, piece_of_unit, int(EntryState.READABLE), entries,
            pieces, readable,
        )  # fmt: skip
        return entries[:count], pieces[:count], readable[:count]

    def _cheapest(self, pieces: _Pieces, units: int, spans: int, colder_than: NDArray[np.uint64] | None) -> Entries:
        """The blocks of windows for at most so many spans of `units` units: the coldest, the fewest among equals."""
        number = len(pieces.units)
        last, total = np.empty(number, dtype=np.int64), np.zeros(number, dtype=np.int64)
        worst = np.zeros(number, dtype=np.uint64)
        price_windows(pieces.units, pieces.worst, pieces.blocks, pieces.blocked, units, last, worst, total)
        usable = last >= 0
        if colder_than is not None:
            usable &= worst < colder_than[0]
        starts = np.flatnonzero(usable)
        order = starts[np.lexsort((total[starts], worst[starts]))].astype(np.int64)
        chosen = np.empty(min(len(order), max(spans, _TRIES_MAX)), dtype=np.int64)
        chosen = chosen[: pick_apart(order, last, np.int64(len(chosen)), chosen)]
        if not len(chosen):
            return _NOBODY
        blocks = self._inside(pieces, chosen, last[chosen])
        whole = [i for i, inside in enumerate(blocks) if self._evictor.evictable_together(inside).all()]
        if not whole and colder_than is None:
            whole = list(range(len(chosen)))
        # A window may be longer than one span.
        room = [int(pieces.units[chosen[i] : last[chosen[i]] + 1].sum()) // units for i in whole]
        enough = int(np.searchsorted(np.cumsum(room), spans)) + 1
        return np.concatenate([_NOBODY, *(blocks[i] for i in whole[:enough])])

    def _inside(self, pieces: _Pieces, firsts: NDArray[np.int64], lasts: NDArray[np.int64]) -> list[Entries]:
        """The entries in each of some windows that have no piece in common."""
        window_of_piece = np.full(len(pieces.units), -1, dtype=np.int32)
        for number, (first, last) in enumerate(zip(firsts.tolist(), lasts.tolist(), strict=True)):
            window_of_piece[first : last + 1] = number
        windows = window_of_piece[pieces.piece_of_entry]
        rows = np.flatnonzero(windows >= 0)
        windows, entries = windows[rows], pieces.entries[rows]
        order = np.argsort(windows, kind="stable")
        return np.split(entries[order], np.searchsorted(windows[order], np.arange(1, len(firsts))))
