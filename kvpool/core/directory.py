"""Who holds which block, as the sources tell it: soft state, rebuilt from them, and a hint. Pure.

Each source numbers its batches of changes. A gap makes what is known of it stale: the directory then wants a snapshot,
and passes over the source's changes until it has one. Keys are as they are stored, with group and shard folded in.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kvpool.core.changes import BlockChange, ChangeKind
from kvpool.core.errors import BadArgument, Overloaded
from kvpool.core.ids import KEY_BYTES, Fidelity, KeyArray, Tier, unpack_keys
from kvpool.core.replicas import ReplicaTable

#: How long a wish for a snapshot is not repeated.
ASK_AGAIN_US = 1_000_000


@dataclass(frozen=True, slots=True)
class SourceRecord:
    """One life of a source, as it introduced itself; see SourceHello in directory.proto."""

    source_id: str
    epoch: int
    tier: Tier
    address: str = ""
    host_id: str = ""
    instance_id: str = ""
    bytes_total: int = 0


@dataclass(frozen=True, slots=True)
class Applied:
    """`acknowledged`: the last batch whose effect is known. `want_snapshot`: the source should send one now."""

    acknowledged: int
    want_snapshot: bool


@dataclass(frozen=True, slots=True)
class Run:
    """`count` keys from key `first` on are held by `source`."""

    source: str
    tier: Tier
    first: int
    count: int
    fidelity: Fidelity


@dataclass(frozen=True, slots=True)
class Match:
    """`covered`: leading keys that some source holds. `runs`: within these, sorted by source, then first."""

    covered: int
    runs: tuple[Run, ...]


@dataclass(frozen=True, slots=True)
class DirectoryCounts:
    """`refused`: replicas that found no room since the directory began; they are not known, so never matched."""

    blocks: int
    replicas: int
    refused: int
    bytes_allocated: int


@dataclass(frozen=True, slots=True)
class DirectoryConfig:
    """Bounds; each says what happens at it."""

    #: Beyond it a source can't attach: Overloaded.
    sources_max: int = 4096
    #: Beyond it new replicas are not recorded, and counted as refused.
    replicas_max: int = 1 << 28
    #: Keys of changes that came while a snapshot was under way; beyond it that snapshot is dropped, another one wanted.
    late_keys_max: int = 1 << 20


@dataclass(slots=True)
class _Staging:
    """A snapshot under way, and the batches that came after it was taken."""

    seq: int
    parts: list[tuple[KeyArray, Fidelity]] = field(default_factory=list)
    part_next: int = 0
    key_count: int = 0
    late: list[tuple[int, list[_Step]]] = field(default_factory=list)
    late_keys: int = 0

    @property
    def late_seq(self) -> int:
        return self.late[-1][0] if self.late else self.seq


@dataclass(slots=True)
class _Source:
    record: SourceRecord
    number: int
    acknowledged: int = 0
    #: The last batch that was seen; beyond `acknowledged` only after a gap.
    seen: int = 0
    stale: bool = False
    asked_us: int | None = None
    staging: _Staging | None = None

    def drop_snapshot(self) -> None:
        """Gives up the snapshot under way; another one is wanted at once."""
        self.staging, self.stale, self.asked_us = None, True, None


_Step = tuple[ChangeKind, KeyArray, Fidelity]


def _steps(changes: Sequence[BlockChange]) -> list[_Step]:
    """Changes, checked. Raises: BadArgument, BadKeyLength."""
    try:
        return [(ChangeKind(c.kind), unpack_keys(c.keys), Fidelity(c.fidelity)) for c in changes]
    except ValueError as error:
        raise BadArgument(str(error)) from error


class Directory:
    """Sources and their replicas. Not thread-safe. All that it answers depends on the calls before, in their order."""

    def __init__(self, config: DirectoryConfig | None = None) -> None:
        self.config = config or DirectoryConfig()
        self._table = ReplicaTable(self.config.replicas_max)
        self._sources: dict[str, _Source] = {}
        self._by_number: dict[int, _Source] = {}
        self._numbers_free: list[int] = []
        self._refused = 0

    # ------------------------------------------------------------ sources

    def attach(self, record: SourceRecord, now_us: int) -> None:
        """A source begins to speak. What an earlier life of it held is forgotten.

        Its batches count from 1. It should send a snapshot if it holds anything already.

        Raises: Overloaded if there are `sources_max` already.
        """
        if record.source_id not in self._sources and len(self._sources) >= self.config.sources_max:
            raise Overloaded(f"{len(self._sources)} sources are the limit", hint="raise sources_max of the directory")
        self.detach(record.source_id)
        number = heapq.heappop(self._numbers_free) if self._numbers_free else len(self._sources)
        source = _Source(record, number)
        self._sources[record.source_id] = source
        self._by_number[number] = source

    def detach(self, source_id: str) -> None:
        """Forgets a source and its replicas at once; one that is not attached is passed over. Cost: O(its replicas)."""
        source = self._sources.pop(source_id, None)
        if source is None:
            return
        self._table.clear(source.number)
        del self._by_number[source.number]
        heapq.heappush(self._numbers_free, source.number)

    def _known(self, source_id: str, epoch: int) -> _Source | None:
        source = self._sources.get(source_id)
        return source if source is not None and source.record.epoch == epoch else None

    # ------------------------------------------------------------ changes

    def apply(self, source_id: str, epoch: int, seq: int, events: Sequence[BlockChange], now_us: int) -> Applied:
        """Takes batch `seq` of a source's changes.

        A batch that is known already changes nothing. After a gap nothing does until a snapshot is complete.

        Returns: `Applied`; for a source or an epoch that is not attached it acknowledges 0 and wants a snapshot.
        Raises: BadArgument, BadKeyLength; nothing is changed then.
        """
        source = self._known(source_id, epoch)
        if source is None:
            return Applied(0, True)
        steps = _steps(events)
        if source.staging is not None:
            self._keep_late(source, source.staging, seq, steps)
        if not source.stale:
            if seq == source.acknowledged + 1:
                self._run(source, steps)
                source.acknowledged = seq
            elif seq > source.acknowledged:
                source.stale = True
        source.seen = max(source.seen, seq)
        return self._applied(source, now_us)

    def _keep_late(self, source: _Source, staging: _Staging, seq: int, steps: list[_Step]) -> None:
        """Keeps a batch for after the snapshot, or drops the snapshot where it can't help any more."""
        if seq <= staging.late_seq:
            return
        staging.late_keys += sum(len(keys) for _, keys, _ in steps)
        if seq == staging.late_seq + 1 and staging.late_keys <= self.config.late_keys_max:
            staging.late.append((seq, steps))
        else:
            # Also where the batches themselves had no gap: the source meant to replace what is known.
            source.drop_snapshot()

    def _applied(self, source: _Source, now_us: int) -> Applied:
        """The answer; asks once for a snapshot, and again only if none has begun to come for a while."""
        want = source.stale and source.staging is None
        if want and source.asked_us is not None and now_us - source.asked_us < ASK_AGAIN_US:
            want = False
        if want:
            source.asked_us = now_us
        return Applied(source.acknowledged, want)

    def apply_snapshot_part(
        self,
        source_id: str,
        epoch: int,
        seq: int,
        part: int,
        last: bool,
        keys: KeyArray | bytes,
        fidelity: int,
        now_us: int,
    ) -> Applied:
        """Takes part `part`, from 0, of all that a source holds as of batch `seq`.

        With the last part the snapshot replaces what is known of the source, and batches after `seq` that came
        meanwhile are applied to it. A snapshot older than a batch that was seen is passed over; one with a part
        missing is dropped, and another one wanted.

        Raises: BadArgument, BadKeyLength; nothing is changed then.
        """
        source = self._known(source_id, epoch)
        if source is None:
            return Applied(0, True)
        # An array is copied: its owner may reuse the memory before the last part comes.
        held = unpack_keys(keys if isinstance(keys, bytes) else keys.tobytes())
        try:
            faithful = Fidelity(fidelity)
        except ValueError as error:
            raise BadArgument(str(error)) from error
        if part == 0:
            # A snapshot that is too old answers the last wish, so that it may be repeated.
            source.staging, source.asked_us = None, None
            if seq >= source.seen:
                source.staging = _Staging(seq)
        staging = source.staging
        if staging is None:
            return self._applied(source, now_us)
        if staging.seq != seq or staging.part_next != part:
            source.drop_snapshot()
            return self._applied(source, now_us)
        room = self.config.replicas_max - staging.key_count
        self._refused += max(len(held) - room, 0)
        staging.parts.append((held[:room], faithful))
        staging.part_next += 1
        staging.key_count += min(len(held), room)
        if last:
            self._replace(source, staging)
        return self._applied(source, now_us)

    def _replace(self, source: _Source, staging: _Staging) -> None:
        self._table.clear(source.number)
        for keys, fidelity in staging.parts:
            self._refused += self._table.insert(keys, source.number, fidelity)
        for _, steps in staging.late:
            self._run(source, steps)
        source.acknowledged = staging.late_seq
        source.seen = max(source.seen, staging.late_seq)
        source.staging, source.stale, source.asked_us = None, False, None

    def _run(self, source: _Source, steps: list[_Step]) -> None:
        for kind, keys, fidelity in steps:
            _EFFECTS[kind](self, source.number, keys, fidelity)

    def _stored(self, number: int, keys: KeyArray, fidelity: Fidelity) -> None:
        self._refused += self._table.insert(keys, number, fidelity)

    def _removed(self, number: int, keys: KeyArray, fidelity: Fidelity) -> None:
        self._table.remove(keys, number)

    def _cleared(self, number: int, keys: KeyArray, fidelity: Fidelity) -> None:
        self._table.clear(number)

    # ------------------------------------------------------------ questions

    def match(self, keys: KeyArray) -> Match:
        """The longest leading run of keys that some source holds, and who holds what of it.

        Changes no state. A hint: the source may have dropped a block meanwhile.

        Args:
            keys: chained block keys in prompt order; uint8 (blocks, 16).
        Returns: `Match` with 0 <= covered <= len(keys); a source's runs do not touch unless their fidelity differs.
        Raises: nothing; a miss is zero keys.
        Cost: O(replicas of the covered keys).
        """
        covered, rows = self.match_rows(keys)
        runs = []
        for number, first, count, fidelity in rows.tolist():
            record = self._by_number[number].record
            runs.append(Run(record.source_id, record.tier, first, count, Fidelity(fidelity)))
        runs.sort(key=lambda run: (run.source, run.first))
        return Match(covered, tuple(runs))

    def match_rows(self, keys: KeyArray) -> tuple[int, NDArray[np.int32]]:
        """As `match`, without an object for each run: for those who look at thousands of them.

        Args:
            keys: as of `match`.
        Returns: leading keys that some source holds; its runs, int32 (runs, 4): number of the source (`number_of`),
            first key, count of keys, fidelity. In no order that means anything.
        Raises: nothing; a miss is zero keys and no run.
        Cost: O(replicas of the covered keys).
        """
        return self._table.match(keys)

    def number_of(self, source_id: str) -> int | None:
        """The small number that `match_rows` calls a source by, from `attach` to `detach`; None if it is not attached.

        Another source may have it afterwards, and so may another life of this one.
        """
        source = self._sources.get(source_id)
        return None if source is None else source.number

    def held(self, source_id: str, *, in_order: bool = True) -> tuple[KeyArray, NDArray[np.uint8]]:
        """Keys that a source holds, and the fidelity of each; none if it is not attached.

        Args:
            in_order: sorted by key, which takes most of the time; else as they lie.
        """
        source = self._sources.get(source_id)
        if source is None:
            return np.empty((0, KEY_BYTES), np.uint8), np.empty(0, np.uint8)
        keys, fidelities = self._table.collect(source.number)
        if not in_order:
            return keys, fidelities
        order = np.argsort(keys.view(f"S{KEY_BYTES}").ravel(), kind="stable")
        return keys[order], fidelities[order]

    def held_by(self, source_id: str) -> KeyArray:
        """Keys that a source holds, sorted; none if it is not attached."""
        return self.held(source_id)[0]

    def held_count(self, source_id: str) -> int:
        """How many keys a source holds; 0 if it is not attached."""
        source = self._sources.get(source_id)
        return 0 if source is None else self._table.count(source.number)

    def synced(self, source_id: str) -> tuple[int, bool]:
        """A source's last batch whose effect is known, and whether that is all that was seen; (0, False) if unknown."""
        source = self._sources.get(source_id)
        return (0, False) if source is None else (source.acknowledged, not source.stale)

    def sources(self) -> tuple[SourceRecord, ...]:
        """All that are attached, sorted by id."""
        return tuple(self._sources[source_id].record for source_id in sorted(self._sources))

    def counts(self) -> DirectoryCounts:
        return DirectoryCounts(
            blocks=self._table.distinct,
            replicas=self._table.replicas,
            refused=self._refused,
            bytes_allocated=self._table.bytes_allocated,
        )

    # ------------------------------------------------------------ checks

    def check_invariants(self) -> None:
        """Raises: AssertionError at the first rule that does not hold."""
        self._table.check_invariants()
        assert len(self._sources) == len(self._by_number) <= self.config.sources_max
        numbers = sorted([*self._by_number, *self._numbers_free])
        assert numbers == list(range(len(numbers))), "source numbers were lost"
        assert sum(self._table.count(n) for n in self._by_number) == self._table.replicas, "replicas of nobody"
        for source_id, source in self._sources.items():
            assert source_id == source.record.source_id and self._by_number[source.number] is source
            assert source.acknowledged <= source.seen
            assert source.stale or source.acknowledged == source.seen
            staging = source.staging
            if staging is not None:
                assert [seq for seq, _ in staging.late] == list(range(staging.seq + 1, staging.late_seq + 1))
                assert staging.late_keys <= self.config.late_keys_max
                assert staging.part_next == len(staging.parts) >= 1
                assert staging.key_count == sum(len(keys) for keys, _ in staging.parts)


_EFFECTS: dict[ChangeKind, Callable[[Directory, int, KeyArray, Fidelity], None]] = {
    ChangeKind.STORED: Directory._stored,
    ChangeKind.REMOVED: Directory._removed,
    ChangeKind.CLEARED: Directory._cleared,
}
