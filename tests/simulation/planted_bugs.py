"""Bugs on purpose, each a promise broken in the real code by a patch. The simulation must find every one of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvpool.channels import shared_index
from kvpool.core import source_base, source_reading
from kvpool.core.directory import Directory
from kvpool.core.kernels import probing
from kvpool.core.quotas import Quotas
from kvpool.core.source import SourceCore
from kvpool.core.store import BlockStore
from kvpool.service.grants import Grants, _Right
from kvpool.service.ssd_tier import SsdTier
from kvpool.service.writer_lock import WriterTable
from kvpool.tiers.ssd.writer import LogWriter

Patch = tuple[Any, str, Any]


@dataclass(frozen=True)
class Bug:
    """`patches`: what to put in place of what. `seeds_max`: within so many histories it must be found.

    ssd: whether the nodes have one; None = as the seed says.
    """

    name: str
    patches: Callable[[], list[Patch]]
    seeds_max: int = 60
    ssd: bool | None = None

    @contextlib.contextmanager
    def planted(self) -> Iterator[None]:
        patches = self.patches()
        # What a class only inherits is taken away again afterwards.
        before = [(where, name, vars(where).get(name, _INHERITED)) for where, name, _ in patches]
        for where, name, value in patches:
            setattr(where, name, value)
        try:
            yield
        finally:
            for where, name, value in before:
                if value is _INHERITED:
                    delattr(where, name)
                else:
                    setattr(where, name, value)


_INHERITED = object()


def _no_digests() -> list[Patch]:
    def copy_only(sources: Any, targets: Any, sizes: Any, *_: Any, end_s: float) -> Any:
        shared_index.copy_blocks(sources, targets, sizes, end_s=end_s if end_s != float("inf") else 1e12)
        return np.ones(len(sizes), dtype=np.bool_)

    return [(shared_index, "copy_cut_blocks_out", copy_only)]


def _no_digests_and_no_second_look() -> list[Patch]:
    return [*_no_digests(), (probing, "confirm", lambda *_: None)]


def _no_quarantine() -> list[Patch]:
    real = source_base.SourceBase._drop_reservation

    def drop(self: Any, number: Any, *, quarantine: bool) -> Any:
        return real(self, number, quarantine=False)

    return [(source_base.SourceBase, "_drop_reservation", drop)]


def _writers_taken_for_gone() -> list[Patch]:
    return [(WriterTable, "all_inherited_gone", lambda self: True)]


def _no_quarantine_at_adoption() -> list[Patch]:
    real = SourceCore.adopt.__func__  # type: ignore[attr-defined]

    def adopt(cls: Any, *arguments: Any) -> Any:
        core = real(cls, *arguments)
        core.release_inherited(0)
        return core

    return [(SourceCore, "adopt", classmethod(adopt))]


def _leases_do_not_hold() -> list[Patch]:
    real = BlockStore.drop

    def drop(self: Any, entries: Any) -> None:
        if len(entries):
            held = self._holds.held
            self._holds.held = lambda some: np.zeros(len(some), dtype=np.bool_)
            try:
                real(self, entries)
            finally:
                self._holds.held = held

    return [(BlockStore, "drop", drop)]


def _lease_not_hidden_from_eviction() -> list[Patch]:
    return [(BlockStore, "hold", lambda self, entries: None), (BlockStore, "guard", lambda self, entries: entries[:0])]


def _leases_leak() -> list[Patch]:
    from kvpool.core.held import HeldBlocks

    return [
        (HeldBlocks, "end_session", lambda self, session: None),
        (source_base.SourceBase, "_expire", _expire_but_leases),
    ]


_real_expire = source_base.SourceBase._expire


def _expire_but_leases(self: Any, kind: Any, number: Any) -> None:
    if kind.name != "LEASE":
        _real_expire(self, kind, number)


def _double_free() -> list[Patch]:
    real = BlockStore.end_quarantine

    def end_quarantine(self: Any, entries: Any) -> None:
        # Freed a second time when somebody may have it already.
        later = getattr(self, "_later", None)
        if later is not None and len(later[0]):
            self.slots.free(*later)
        self._later = self.arrays.offsets[entries].copy(), self.footprints(entries)
        real(self, entries)

    return [(BlockStore, "end_quarantine", end_quarantine)]


def _on_lower_left_set() -> list[Patch]:
    class Sticky(np.ndarray):
        def __setitem__(self, at: Any, value: Any) -> None:
            if value is not False:
                super().__setitem__(at, value)

    real_init = BlockStore.__init__

    def init(self: Any, *arguments: Any) -> None:
        real_init(self, *arguments)
        self.on_lower = self.on_lower.view(Sticky)

    return [(BlockStore, "__init__", init)]


def _tombstones_lost() -> list[Patch]:
    def remove(self: Any, keys: Any) -> Any:
        self._hide(keys)
        return np.ones(len(keys), dtype=np.bool_)

    return [(LogWriter, "remove", remove)]


def _removal_only_above() -> list[Patch]:
    async def remove(self: Any, namespace_id: Any, keys: Any, name_prefix: Any, remove_above: Any) -> Any:
        return remove_above()

    return [(SsdTier, "remove", remove)]


def _promotion_after_removal() -> list[Patch]:
    from kvpool.service import ssd_tier

    async def remove(self: Any, namespace_id: Any, keys: Any, name_prefix: Any, remove_above: Any) -> Any:
        async with self._alone():
            below = await ssd_tier.in_thread(self._remove_below, namespace_id, keys, name_prefix)
            self._marks.settle()
            return max(below, remove_above())

    return [(SsdTier, "remove", remove)]


def _removal_forgets_memory() -> list[Patch]:
    return [(SourceCore, "remove_prefix", lambda self, namespace_id, prefix, now_us: 0)]


def _names_not_compared() -> list[Patch]:
    return [(source_reading, "_names", lambda names, keys: None)]


def _lossy_for_exact() -> list[Patch]:
    from kvpool.core.ids import Fidelity

    real = SourceCore.lease

    def lease(self: Any, *arguments: Any, **options: Any) -> Any:
        return real(self, *arguments, **{**options, "fidelity_min": Fidelity.INT8})

    return [(SourceCore, "lease", lease)]


def _rights_outlive_their_reservation() -> list[Patch]:
    return [
        (Grants, "expire", lambda self, now_us: None),
        (Grants, "close_session", lambda self, session: []),
        (Grants, "revoke_write", lambda self, session, reservation: None),
        (Grants, "begin_write", _begin_anything),
        (_Right, "covers", lambda self, offsets, sizes, generations: np.ones(len(offsets), dtype=np.bool_)),
    ]


def _begin_anything(self: Any, session: int, reservation: int, offsets: Any, *rest: Any) -> Any:
    self._writing.setdefault(reservation, []).append(rest[-1])
    return np.ones(len(offsets), dtype=np.bool_)


def _quotas_forgotten() -> list[Patch]:
    return [(Quotas, "admit", lambda self, namespace, tenant, slots_bytes: len(slots_bytes))]


def _waits_never_expire() -> list[Patch]:
    from kvpool.core.waits import Waits

    return [(Waits, "expire", lambda self, wait: None)]


def _gaps_ignored() -> list[Patch]:
    real = Directory.apply

    def apply(self: Any, source_id: str, epoch: int, seq: int, events: Any, now_us: int) -> Any:
        source = self._known(source_id, epoch)
        if source is not None and source.staging is None and seq > source.acknowledged:
            source.acknowledged = source.seen = seq - 1
        return real(self, source_id, epoch, seq, events, now_us)

    return [(Directory, "apply", apply)]


def _uncommitted_adopted() -> list[Patch]:
    from kvpool.core import adoption
    from kvpool.core.arrays import EntryState

    real = adoption.take_over

    def take_over(arrays: Any, *rest: Any) -> Any:
        writing = arrays.states == EntryState.WRITING
        arrays.generations[writing] &= ~np.uint32(1)
        arrays.states[writing] = EntryState.READABLE
        return real(arrays, *rest)

    from kvpool.core import source

    return [(source, "take_over", take_over)]


def _acknowledged_before_the_disk() -> list[Patch]:
    from tests.simulation.disk import InlineWriter

    def submit(self: Any, request: Any, timeout_s: float) -> bool:
        if request.keys is not None:
            request.acknowledged[:] = True
            self._waiting.append(request)
            return True
        return _real_submit(self, request, timeout_s)

    _real_submit = InlineWriter.submit
    return [(InlineWriter, "submit", submit)]


def _names_free_while_unreadable() -> list[Patch]:
    """As if a record that can't be read were gone."""

    async def make_way(self: Any, keys: Any) -> None:
        self.check_objects()

    return [(SsdTier, "make_way", make_way), (SsdTier, "holds", SsdTier.contains)]


def _removal_forgets_unreadable() -> list[Patch]:
    from kvpool.tiers.ssd.store import SsdStore

    return [(SsdStore, "undead", lambda self, keys: _absent(self, keys))]


def _absent(store: Any, keys: Any) -> Any:
    from kvpool.core.ssd.rows import NO_ROW

    return store._log.core.facts(np.full(len(keys), NO_ROW, dtype=np.int32))


def _prefix_forgets_unreadable() -> list[Patch]:
    from kvpool.tiers.ssd.store import SsdStore

    return [(SsdStore, "lost_objects", lambda self, namespace_id: np.zeros((0, 16), dtype=np.uint8))]


def _puts_without_the_disk() -> list[Patch]:
    from kvpool.service.block_source import BlockSourceServicer

    return [(BlockSourceServicer, "_check_objects", lambda self: None)]


def _unsure_taken_for_sure() -> list[Patch]:
    from kvpool.tiers.ssd.open_log import OpenLog

    return [(OpenLog, "give_up", lambda self, message: self.set_state("failed", message))]


def _marks_without_a_look() -> list[Patch]:
    """Blocks are taken for saved because something has their key."""
    from kvpool.core.index import NO_ENTRY
    from kvpool.service.ssd_marks import SsdMarks

    def mark(self: Any, keys: Any) -> Any:
        self.settle()
        there = self._store.contains(keys) & (self._core.index.lookup(keys) != NO_ENTRY)
        self._core.mark_lower(keys[there], True)
        return there

    return [(SsdMarks, "mark", mark)]


BUGS = (
    Bug("digests are not checked, nor is the entry looked at again", _no_digests_and_no_second_look),
    Bug("digests are not checked", _no_digests, seeds_max=150),
    Bug("expired slots do not go to quarantine", _no_quarantine),
    Bug("writers of the process before are taken for gone", _writers_taken_for_gone, seeds_max=150),
    Bug("adoption frees the slots of writers", _no_quarantine_at_adoption, seeds_max=150),
    Bug("adoption takes what was not committed", _uncommitted_adopted),
    Bug("a removal frees what is leased", _leases_do_not_hold),
    Bug("eviction sees what is held", _lease_not_hidden_from_eviction),
    Bug("leases never end", _leases_leak),
    Bug("a slot is freed twice", _double_free),
    Bug("a new block inherits the mark that it is on the SSD", _on_lower_left_set, ssd=True),
    Bug("removals leave no tombstone", _tombstones_lost, seeds_max=150, ssd=True),
    Bug("removals forget the SSD", _removal_only_above, ssd=True),
    Bug("removals are acknowledged before the disk has them", _acknowledged_before_the_disk, ssd=True),
    Bug("removals do not wait for promotions", _promotion_after_removal, seeds_max=400, ssd=True),
    Bug("a name is free while its record can't be read", _names_free_while_unreadable, seeds_max=400, ssd=True),
    Bug("removals forget what can't be read", _removal_forgets_unreadable, seeds_max=400, ssd=True),
    Bug("removals by prefix forget what can't be read", _prefix_forgets_unreadable, seeds_max=400, ssd=True),
    Bug("objects are changed while the disk is away", _puts_without_the_disk, seeds_max=400, ssd=True),
    Bug("a write that can't be undone is taken for undone", _unsure_taken_for_sure, seeds_max=400, ssd=True),
    Bug("blocks are taken for saved by their keys alone", _marks_without_a_look, seeds_max=400, ssd=True),
    Bug("removals by prefix forget the memory", _removal_forgets_memory),
    Bug("lossy copies for readers who want exact ones", _lossy_for_exact),
    Bug("connections write without a right", _rights_outlive_their_reservation, seeds_max=300),
    Bug("quotas are forgotten", _quotas_forgotten, seeds_max=100),
    Bug("waits never end", _waits_never_expire),
    Bug("the directory passes over gaps", _gaps_ignored),
)
