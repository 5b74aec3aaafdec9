"""Where a prompt's blocks are, and what it takes an instance to pull those it lacks. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import numpy as np

from kvpool.core.directory import Run
from kvpool.core.ids import KEY_BYTES, Fidelity, Tier, unpack_keys
from scheduler.core import covering
from scheduler.core.cluster import Instance, Source
from scheduler.core.commands import PullRun
from scheduler.core.cost import CostBook, link_class
from scheduler.core.covering import Ints, Runs
from scheduler.core.events import PlaceRequested
from scheduler.core.holders import Sources
from scheduler.core.placements import PlacementBook

#: (first, end, source, run): blocks from `first` to before `end` come from a source.
Segment: TypeAlias = tuple[int, int, Source, Run]
#: Source -> latency and microseconds a byte, None while the link is down.
Links: TypeAlias = dict[str, tuple[float, float] | None]

#: By how much another source may be slower and still be read from rather than the HBM of a worker that computes.
HBM_RELUCTANCE = 1.1
#: Trials of a kind of link grow so many times twofold.
TRIALS_GROW_MAX = 6
#: Bytes of an int8 copy, scales included, as a share of an element of each dtype.
INT8_SHARES = {"float32": 0.27, "bfloat16": 0.53, "float16": 0.53}


class Pull(NamedTuple):
    """A way to get the blocks of a prompt up to `reach` (exclusive) that an instance lacks; see `Prefix.runs`."""

    reach: int
    duration_us: int
    segments: list[list[Segment]]  # of each key list; they may go beyond `reach`


@dataclass(slots=True)
class _Coverage:
    """Of one key list: who holds what, cut to the usable blocks."""

    group: int
    shard: int
    lead: Ints  # blocks that each source holds from the first on, by its number; the last is of nobody
    rows: Runs  # runs that may be pulled, of all sources
    furthest: list[tuple[Source, Run]]  # those that reach furthest
    #: Runs that reach furthest on each host, once somebody has asked: see `Sources.furthest_by_host`.
    local: tuple[Runs, list[int], list[int]] | None = None
    #: Source and first block of those in `furthest`.
    known: dict[tuple[str, int], None] = field(default_factory=dict)
    #: Number of a host -> runs worth reading from there.
    by_host: dict[int, list[tuple[Source, Run]]] = field(default_factory=dict)


class Prefix:
    """The usable part of a prompt's prefix. At least one token is left to compute."""

    def __init__(
        self,
        request: PlaceRequested,
        block_tokens: int,
        sources: Sources,
        sources_max: int,
        book: PlacementBook,
    ) -> None:
        self.block_tokens = block_tokens
        self._book, self._sources, self._sources_max = book, sources, sources_max
        self._lists: list[_Coverage] = []
        self._covered = 0
        #: Link class -> costs of links that were never measured.
        self._unmeasured: dict[str, tuple[float, float]] = {}
        self.usable = max(request.prompt_tokens - 1, 0) // block_tokens
        for batch in request.keys:
            self.usable = min(self.usable, len(batch.keys) // KEY_BYTES)
        if not request.keys:
            self.usable = 0
        if self.usable == 0:
            return
        self._covered = self.usable
        for batch in request.keys:
            keys = unpack_keys(batch.keys)[: self.usable]
            covered, lead, rows = sources.match(keys, exact=request.fidelity_min == Fidelity.EXACT)
            self._covered = min(self._covered, covered)
            furthest = sources.furthest(rows, sources_max)
            self._lists.append(_Coverage(batch.group, batch.shard, lead, rows, furthest))

    def covered(self) -> int:
        """Leading blocks that could be reused at most, wherever they are."""
        return self._covered

    def own_blocks(self, source_id: str) -> int:
        """Leading blocks that one source holds of each key list."""
        number = self._sources.numbers.get(source_id)
        if not self._lists or number is None:
            return 0
        if len(self._lists) == 1:
            return int(self._lists[0].lead[number])
        return min(int(coverage.lead[number]) for coverage in self._lists)

    @property
    def source_numbers(self) -> dict[str, int]:
        return self._sources.numbers

    @property
    def host_numbers(self) -> dict[str, int]:
        """Hosts of sources, by the numbers that `within_reach` has."""
        return self._sources.host_numbers

    def own_by_number(self) -> Ints:
        """The same for all sources, by number: int64 (sources + 1), the last of nobody."""
        if not self._lists:
            return np.zeros(len(self._sources.by_number) + 1, np.int64)
        own = self._lists[0].lead
        for coverage in self._lists[1:]:
            own = np.minimum(own, coverage.lead)
        return own

    def longest(self) -> int:
        """Leading blocks that the best single source holds."""
        return int(self.own_by_number().max(initial=0))

    def block_bytes(self, instance: Instance, exact: bool) -> float:
        """Bytes of one block of all key lists, at least."""
        size = 0.0
        for coverage in self._lists:
            size += _block_bytes(instance, coverage.group, Fidelity.EXACT if exact else Fidelity.INT8)
        return size

    def _candidates(self, coverage: _Coverage, instance: Instance, own: int) -> list[tuple[Source, Run]]:
        """Runs worth reading from for an instance: those that reach furthest, and those on its host beyond `own`."""
        host = self._sources.host_numbers.get(instance.info.host_id)
        if len(coverage.rows) <= self._sources_max or host is None:
            return coverage.furthest
        if coverage.local is None:
            coverage.local = self._sources.furthest_by_host(coverage.rows, self._sources_max)
            coverage.known = {(run.source, run.first): None for _, run in coverage.furthest}
        rows, counts, ends = coverage.local
        if ends[host] <= own:
            return coverage.furthest
        known = coverage.by_host.get(host)
        if known is None:
            begin = host * self._sources_max
            here = self._sources.runs(rows[begin : begin + counts[host]])
            more = [(source, run) for source, run in here if (run.source, run.first) not in coverage.known]
            known = coverage.by_host[host] = coverage.furthest + more
        return known

    def pulls(self, instance: Instance, own: int, costs: CostBook, now_us: int) -> list[Pull]:
        """Ways to extend an instance's own prefix, shortest first; each ends where some source's run ends.

        At each block the source with the least predicted time for a block is taken, up to the end of its run. The
        ends of runs are the only ways worth looking at: pulling costs the same for each block, computing a block costs
        more the more there are before it, so within a run pulling all or nothing is best.
        """
        if own >= self.usable:
            return []
        links: Links = {}
        segments = [self._segments(coverage, own, instance, links, costs, now_us) for coverage in self._lists]
        reach = min(of_list[-1][1] if of_list else own for of_list in segments)
        if reach <= own:
            return []
        cuts = {end: None for of_list in segments for _, end, _, _ in of_list if end < reach}
        cuts[reach] = None
        return [Pull(cut, self._duration_us(cut, segments, instance, links), segments) for cut in sorted(cuts)]

    def trials(self, pulls: Sequence[Pull], instance: Instance, own: int, costs: CostBook, now_us: int) -> list[Pull]:
        """Pulls over a link of a kind that was hardly ever measured, the longest first; none if there is no such link.

        What a kind of link can do is known from its first transfers only, and nobody would begin with one that is
        taken for slow. They grow twofold, from one block on: of transfers of one size nobody can tell latency from
        bandwidth. At most one at a time between an instance and a source.
        """
        if not pulls or pulls[0].reach <= own:
            return []
        samples, end = TRIALS_GROW_MAX, self.usable
        for of_list in pulls[0].segments:
            _, first_end, source, _ = of_list[0]
            kind = link_class(source.attached.host_id == instance.info.host_id, source.attached.tier)
            if costs.known(kind) or self._book.pulls_between(instance.id, source.id):
                return []
            samples, end = min(samples, costs.samples(kind)), min(end, first_end)
        segments = pulls[0].segments
        links: Links = {s.id: self._link(instance, s, costs, now_us) for of in segments for _, _, s, _ in of}
        reaches = dict.fromkeys(min(own + (1 << doublings), end) for doublings in range(samples, -1, -1))
        return [Pull(reach, self._duration_us(reach, segments, instance, links), segments) for reach in reaches]

    def pull_from(
        self, instance: Instance, own: int, source_ids: Sequence[str], costs: CostBook, now_us: int
    ) -> Pull | None:
        """As far as these sources reach, whatever it costs; at each block the first of them that has it."""
        if own >= self.usable:
            return None
        links: Links = {}
        segments: list[list[Segment]] = []
        for coverage in self._lists:
            at, of_list = own, []
            for source_id in source_ids:
                number = self._sources.numbers.get(source_id, -1)
                for source, run in self._sources.runs(coverage.rows[coverage.rows[:, 0] == number]):
                    end = run.first + run.count
                    if not run.first <= at < end:
                        continue
                    links[source_id] = self._link(instance, source, costs, now_us)
                    if links[source_id] is not None:
                        of_list.append((at, end, source, run))
                        at = end
            segments.append(of_list)
        reach = min((of_list[-1][1] if of_list else own for of_list in segments), default=own)
        if reach <= own:
            return None
        return Pull(reach, self._duration_us(reach, segments, instance, links), segments)

    def within_reach(self, coming: Sequence[tuple[str, int]], now_us: int) -> tuple[Ints, Ints]:
        """How far those reach that a pull may read from, on each host and anywhere, and how crowded they are at least.

        Args:
            coming: (host, leading blocks) that will be there too.
        Returns: `near` (2, hosts + 1) and `behind` (4, usable blocks) of `covering.offer`.
        """
        sources = self._sources
        near = np.zeros((2, len(sources.host_numbers) + 1), np.int64)
        behind = np.zeros((4, self.usable), np.int64)
        crowds = np.ones(len(sources.by_number), np.int64)
        busy = [source_id for source_id in self._book.pulls if source_id in sources.numbers]
        numbers = [sources.numbers[source_id] for source_id in busy]
        crowds[numbers] = [1 + self._book.pulling(source_id, now_us) for source_id in busy]
        for coverage in self._lists:
            covering.offer(coverage.rows, sources.hosts, crowds, near, behind)
        known = [(sources.host_numbers[host], blocks) for host, blocks in coming if host in sources.host_numbers]
        if known:
            rows = np.array([(number, 0, blocks, 0) for number, (_, blocks) in enumerate(known)], np.int32)
            hosts = np.array([host for host, _ in known], np.int64)
            covering.offer(rows, hosts, np.ones(len(known), np.int64), near, behind)
        covering.settle(behind)
        return near, behind

    def _duration_us(
        self,
        cut: int,
        segments: list[list[Segment]],
        instance: Instance,
        links: Links,
    ) -> int:
        """One source after another: each one's latency once, and its bytes."""
        total = 0.0
        opened: dict[str, None] = {}
        for coverage, of_list in zip(self._lists, segments, strict=True):
            for first, end, source, run in of_list:
                if first >= cut:
                    break
                block_bytes = _block_bytes(instance, coverage.group, run.fidelity)
                latency, per_byte = links[source.id] or (0.0, 0.0)
                if source.id not in opened:
                    opened[source.id] = None
                    total += latency
                total += per_byte * (block_bytes * (min(end, cut) - first))
        return int(total)

    def pull_us(self, instance: Instance, source: Source, blocks: int, costs: CostBook, now_us: int) -> int | None:
        """Time to pull so many blocks of each key list from one source; None while the link is down."""
        link = self._link(instance, source, costs, now_us)
        if link is None:
            return None
        size = 0.0
        for coverage in self._lists:
            size += _block_bytes(instance, coverage.group) * blocks
        return int(link[0] + link[1] * size)

    def runs(self, pull: Pull | None) -> tuple[PullRun, ...]:
        """What a pull takes from whom."""
        if pull is None:
            return ()
        return tuple(
            PullRun(
                source_id=source.id,
                tier=run.tier,
                first=first,
                count=min(end, pull.reach) - first,
                group=coverage.group,
                shard=coverage.shard,
                fidelity=run.fidelity,
                address=source.attached.address,
            )
            for coverage, of_list in zip(self._lists, pull.segments, strict=True)
            for first, end, source, run in of_list
            if first < pull.reach
        )

    def _link(self, instance: Instance, source: Source, costs: CostBook, now_us: int) -> tuple[float, float] | None:
        """Latency and microseconds a byte; None while the link is down."""
        kind = link_class(source.attached.host_id == instance.info.host_id, source.attached.tier)
        known: tuple[float, float] | None
        if costs.measured(instance.id, source.id):
            known = costs.link_costs(instance.id, source.id, kind, now_us)
            if costs.on_trial(instance.id, source.id) and self._book.pulls_between(instance.id, source.id):
                return None
        elif self._book.pulls_between(instance.id, source.id):
            return None
        else:
            known = self._unmeasured.get(kind)
            if known is None:
                known = self._unmeasured[kind] = costs.unmeasured_costs(kind)
        if known is None:
            return None
        # Whoever reads from a source shares what it can send.
        return known[0], known[1] * (1 + self._book.pulling(source.id, now_us))

    def _segments(
        self,
        coverage: _Coverage,
        own: int,
        instance: Instance,
        links: Links,
        costs: CostBook,
        now_us: int,
    ) -> list[Segment]:
        """Consecutive segments from block `own` on, as far as usable sources reach."""
        segments: list[Segment] = []
        candidates = self._candidates(coverage, instance, own)
        at = own
        while at < self.usable:
            best: tuple[float, str] | None = None
            chosen: tuple[Source, Run] | None = None
            for source, run in candidates:
                end = run.first + run.count
                # What an instance has in its own cache it need not pull: that is `own`, as far as it is of use.
                if not run.first <= at < end or source.attached.instance_id == instance.id:
                    continue
                source_id = source.attached.source_id
                if source_id not in links:
                    links[source_id] = self._link(instance, source, costs, now_us)
                link = links[source_id]
                if link is None:
                    continue
                block_bytes = _block_bytes(instance, coverage.group, run.fidelity)
                per_block_us = link[0] / (end - at) + link[1] * block_bytes
                rank = (per_block_us * HBM_RELUCTANCE if run.tier == Tier.HBM else per_block_us, source_id)
                if best is None or rank < best:
                    best, chosen = rank, (source, run)
            if chosen is None:
                break
            source, run = chosen
            end = run.first + run.count
            segments.append((at, end, source, run))
            at = end
        return segments


def _block_bytes(instance: Instance, group: int, fidelity: Fidelity = Fidelity.EXACT) -> float:
    namespace = instance.info.namespace
    if group >= len(namespace.groups):
        return 0.0
    share = INT8_SHARES.get(namespace.dtype, 1.0) if fidelity == Fidelity.INT8 else 1.0
    return namespace.groups[group].block_bytes * share
