"""Which segment to give back next, and what of it must be written again first. Decides; changes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

import numpy as np

from kvpool.core.ssd.format import DESCRIPTOR_BYTES
from kvpool.core.ssd.log import LogCore
from kvpool.core.ssd.rows import Rows, RowState

#: What was used since it was written is kept once more, up to this part of an evicted segment.
_KEPT_MAX: Final = 0.5
#: An eviction that would write more than this part of a segment is no gain.
_WRITTEN_MAX: Final = 0.75
#: One that is for room at once may write this part.
_BURIED_MAX: Final = 0.25


@dataclass(frozen=True, slots=True, eq=False)
class Reclaim:
    """A segment to give back. First `copy`, readable records that stay, is written again; what is readable then goes;
    then each of `heads_to_bury` gets a tombstone; then the file goes. `written_bytes`: about what all that appends.
    """

    segment: int
    copy: Rows
    written_bytes: int


class Effort(Enum):
    """How a segment may be given back: what is kept of it costs room again."""

    KEEP = "keep"  # copy what is worth it
    EVICT = "evict"  # tombstones only: for when copying has gained nothing
    DROP = "drop"  # without writing anything


def plan_reclaim(log: LogCore, effort: Effort = Effort.KEEP) -> Reclaim | None:
    """The segment with the least live bytes if copying them is cheap, or else the oldest that can be evicted.

    Of an evicted segment, records read since they were written are kept (once: they must be read again to stay again).
    With less effort, the oldest that can go is evicted whole.

    Returns: None if there is no segment to give back.
    """
    sealed = [segment for segment in log.segments.values() if segment.number != log.active]
    if not sealed:
        return None
    if effort is not Effort.KEEP:
        written_max = 0 if effort is Effort.DROP else _BURIED_MAX * log.config.segment_bytes
        plans = (_plan(log, segment.number, kept_max=0) for segment in sorted(sealed, key=lambda s: s.number))
        return next((plan for plan in plans if plan.written_bytes <= written_max), None)
    emptiest = min(sealed, key=lambda segment: (segment.live_bytes, segment.number))
    if emptiest.live_bytes <= log.config.compact_live_max * log.config.segment_bytes:
        return _plan(log, emptiest.number, kept_max=None)
    written_max = _WRITTEN_MAX * log.config.segment_bytes
    for segment in sorted(sealed, key=lambda segment: segment.number):
        plan = _plan(log, segment.number, kept_max=_KEPT_MAX)
        if plan.written_bytes <= written_max:
            return plan
    return _plan(log, emptiest.number, kept_max=_KEPT_MAX)


def heads_to_bury(log: LogCore, number: int, going: Rows) -> Rows:
    """Heads of a segment, out of those that are `going` with it, that hide stale records in other segments."""
    rows = log.rows
    here = rows.in_segment(number)
    # Stale records that go together with the file need not be hidden any more.
    stale = here[rows.states[here] == RowState.STALE]
    inside = np.bincount(rows.heads(rows.key_bytes(stale)), minlength=len(rows.states))
    return going[rows.stale[going] > inside[going]]


def heads_in(log: LogCore, number: int) -> Rows:
    """All heads of a segment, by place."""
    rows = log.rows
    here = rows.in_segment(number)
    here = here[(rows.states[here] >= RowState.LIVE) & (rows.states[here] <= RowState.LOST)]
    return here[np.argsort(rows.units[here], kind="stable")]


def _plan(log: LogCore, number: int, *, kept_max: float | None) -> Reclaim:
    """`kept_max`: the part of a segment that used records may keep; None: all that live are kept."""
    rows = log.rows
    heads = heads_in(log, number)
    copy = live = heads[rows.states[heads] == RowState.LIVE]
    if kept_max is not None:
        used = live[rows.touches[live] != 0]
        copy = used[np.cumsum(rows.record_bytes(used)) <= int(kept_max * log.config.segment_bytes)]
    bury = heads_to_bury(log, number, heads[~np.isin(heads, copy)])
    written = int(rows.record_bytes(copy).sum()) + DESCRIPTOR_BYTES * len(bury)
    return Reclaim(number, copy, written)
