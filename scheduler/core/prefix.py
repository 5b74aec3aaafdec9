"""Where a prompt's blocks are, and what it takes an instance to pull those it lacks. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from kvpool.core.directory import Directory, Run
from kvpool.core.ids import Fidelity, unpack_keys
from scheduler.core.cluster import Cluster, Instance, Source
from scheduler.core.commands import PullRun
from scheduler.core.cost import CostBook, link_class
from scheduler.core.events import PlaceRequested


@dataclass(frozen=True, slots=True)
class Pull:
    """A way to get blocks `own` to `reach` (exclusive) of a prompt; none if they are equal."""

    reach: int
    duration_us: int
    runs: tuple[PullRun, ...]


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
        self.usable = max(request.prompt_tokens - 1, 0) // block_tokens
        for batch in request.keys:
            keys = unpack_keys(batch.keys)
            self.usable = min(self.usable, len(keys))
        if not request.keys:
            self.usable = 0
        if self.usable == 0:
            return
        exact = request.fidelity_min == Fidelity.EXACT
        for batch in request.keys:
            match = directory.match(unpack_keys(batch.keys)[: self.usable])
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
        per_list: list[list[tuple[int, int, Source, Run]]] = []
        reach = self.usable
        for coverage in self._lists:
            segments = self._segments(coverage, own, instance, links, costs, now_us)
            per_list.append(segments)
            reach = min(reach, segments[-1][1] if segments else own)
        if reach <= own:
            return []
        cuts = {end: None for segments in per_list for _, end, _, _ in segments if own < end <= reach}
        cuts[reach] = None
        plans = []
        for cut in sorted(cuts):
            runs, total = [], 0.0
            opened: dict[str, None] = {}
            for coverage, segments in zip(self._lists, per_list, strict=True):
                block_bytes = _block_bytes(instance, coverage.group)
                for start, end, source, run in segments:
                    if start >= cut:
                        break
                    count = min(end, cut) - start
                    latency, per_byte = links[source.id] or (0.0, 0.0)
                    if source.id not in opened:
                        opened[source.id] = None
                        total += latency
                    total += per_byte * (block_bytes * count)
                    runs.append(
                        PullRun(
                            source.id, run.tier, start, count, coverage.group, coverage.shard, run.fidelity,
                            source.attached.address,
                        )
                    )  # fmt: skip
            plans.append(Pull(cut, int(total), tuple(runs)))
        return plans

    def _segments(
        self,
        coverage: _Coverage,
        own: int,
        instance: Instance,
        links: dict[str, tuple[float, float] | None],
        costs: CostBook,
        now_us: int,
    ) -> list[tuple[int, int, Source, Run]]:
        """Consecutive (start, end, source, run) from block `own` on, as far as usable sources reach."""
        block_bytes = _block_bytes(instance, coverage.group)
        segments: list[tuple[int, int, Source, Run]] = []
        at = own
        while at < self.usable:
            best: tuple[float, str] | None = None
            chosen: tuple[Source, Run] | None = None
            for source, run in coverage.readable:
                end = run.first + run.count
                if not run.first <= at < end:
                    continue
                if source.id not in links:
                    kind = link_class(source.attached.host_id == instance.info.host_id, run.tier)
                    links[source.id] = costs.link_costs(instance.id, source.id, kind, now_us)
                link = links[source.id]
                if link is None:
                    continue
                rank = (link[0] / (end - at) + link[1] * block_bytes, source.id)
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
