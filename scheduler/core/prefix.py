"""Where a prompt's blocks are, and what it takes an instance to pull those it lacks. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from kvpool.core.directory import Directory, Run
from kvpool.core.ids import Fidelity, unpack_keys
from scheduler.core.cluster import Cluster, Instance, Source
from scheduler.core.commands import PullRun
from scheduler.core.cost import CostBook, link_class
from scheduler.core.events import PlaceRequested

#: (first, end, source, run): blocks from `first` to before `end` come from a source.
Segment: TypeAlias = tuple[int, int, Source, Run]


@dataclass(frozen=True, slots=True)
class Pull:
    """A way to get the blocks of a prompt up to `reach` (exclusive) that an instance lacks; see `Prefix.runs`."""

    reach: int
    duration_us: int
    segments: list[list[Segment]]  # of each key list; they may go beyond `reach`


@dataclass(slots=True)
class _Coverage:
    """Of one key list: who holds what, cut to the usable blocks."""

    group: int
    shard: int
    leading: dict[str, int]  # source -> blocks it holds from the first on
    readable: list[tuple[Source, Run]]


class Prefix:
    """The usable part of a prompt's prefix. At least one token is left to compute."""

    def __init__(
        self, request: PlaceRequested, block_tokens: int, directory: Directory, cluster: Cluster, sources_max: int
    ) -> None:
        self.block_tokens = block_tokens
        self._lists: list[_Coverage] = []
        self._covered = 0
        #: Link class -> costs of links that were never measured.
        self._unmeasured: dict[str, tuple[float, float]] = {}
        self.usable = max(request.prompt_tokens - 1, 0) // block_tokens
        for batch in request.keys:
            keys = unpack_keys(batch.keys)
            self.usable = min(self.usable, len(keys))
        if not request.keys:
            self.usable = 0
        if self.usable == 0:
            return
        exact = request.fidelity_min == Fidelity.EXACT
        self._covered = self.usable
        for batch in request.keys:
            match = directory.match(unpack_keys(batch.keys)[: self.usable])
            self._covered = min(self._covered, match.covered)
            coverage = _Coverage(batch.group, batch.shard, {}, [])
            for run in match.runs:
                if exact and run.fidelity != Fidelity.EXACT:
                    continue
                source = cluster.sources.get(run.source)
                if source is None:
                    continue
                if run.first <= coverage.leading.get(run.source, 0):
                    end = run.first + run.count
                    coverage.leading[run.source] = max(coverage.leading.get(run.source, 0), end)
                if source.readable:
                    coverage.readable.append((source, run))
            if len(coverage.readable) > sources_max:
                coverage.readable.sort(key=lambda pair: (-pair[1].first - pair[1].count, pair[0].id, pair[1].first))
                del coverage.readable[sources_max:]
            self._lists.append(coverage)

    def covered(self) -> int:
        """Leading blocks that could be reused at most, wherever they are."""
        return self._covered

    def own_blocks(self, source_id: str) -> int:
        """Leading blocks that one source holds of each key list."""
        if not self._lists or not source_id:
            return 0
        return min(coverage.leading.get(source_id, 0) for coverage in self._lists)

    def longest(self) -> int:
        """Leading blocks that the best single source holds."""
        best = 0
        for coverage in self._lists[:1]:
            for source_id in coverage.leading:
                best = max(best, self.own_blocks(source_id))
        return best

    def pulls(self, instance: Instance, own: int, costs: CostBook, now_us: int) -> list[Pull]:
        """Ways to extend an instance's own prefix, shortest first; each ends where some source's run ends.

        At each block the source with the least predicted time for a block is taken, up to the end of its run.
        """
        if own >= self.usable:
            return []
        links: dict[str, tuple[float, float] | None] = {}
        segments = [self._segments(coverage, own, instance, links, costs, now_us) for coverage in self._lists]
        reach = min(of_list[-1][1] if of_list else own for of_list in segments)
        if reach <= own:
            return []
        cuts = {end: None for of_list in segments for _, end, _, _ in of_list if end < reach}
        cuts[reach] = None
        return [Pull(cut, self._duration_us(cut, segments, instance, links), segments) for cut in sorted(cuts)]

    def _duration_us(
        self,
        cut: int,
        segments: list[list[Segment]],
        instance: Instance,
        links: dict[str, tuple[float, float] | None],
    ) -> int:
        """One source after another: each one's latency once, and its bytes."""
        total = 0.0
        opened: dict[str, None] = {}
        for coverage, of_list in zip(self._lists, segments, strict=True):
            block_bytes = _block_bytes(instance, coverage.group)
            for first, end, source, _ in of_list:
                if first >= cut:
                    break
                latency, per_byte = links[source.id] or (0.0, 0.0)
                if source.id not in opened:
                    opened[source.id] = None
                    total += latency
                total += per_byte * (block_bytes * (min(end, cut) - first))
        return int(total)

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
        if costs.measured(instance.id, source.id):
            return costs.link_costs(instance.id, source.id, kind, now_us)
        known = self._unmeasured.get(kind)
        if known is None:
            known = self._unmeasured[kind] = costs.unmeasured_costs(kind)
        return known

    def _segments(
        self,
        coverage: _Coverage,
        own: int,
        instance: Instance,
        links: dict[str, tuple[float, float] | None],
        costs: CostBook,
        now_us: int,
    ) -> list[Segment]:
        """Consecutive segments from block `own` on, as far as usable sources reach."""
        block_bytes = _block_bytes(instance, coverage.group)
        segments: list[Segment] = []
        at = own
        while at < self.usable:
            best: tuple[float, str] | None = None
            chosen: tuple[Source, Run] | None = None
            for source, run in coverage.readable:
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
                rank = (link[0] / (end - at) + link[1] * block_bytes, source_id)
                if best is None or rank < best:
                    best, chosen = rank, (source, run)
            if chosen is None:
                break
            source, run = chosen
            end = run.first + run.count
            segments.append((at, end, source, run))
            at = end
        return segments


def _block_bytes(instance: Instance, group: int) -> int:
    groups = instance.info.namespace.groups
    return groups[group].block_bytes if group < len(groups) else 0
