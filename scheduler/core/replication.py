"""What the core does with what other schedulers say: their placements count here like our own. Pure.

Members whose life lines other schedulers have come as the same events as our own, with `peer` set: see `membership`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from scheduler.core.cluster import State
from scheduler.core.commands import Command
from scheduler.core.events import EventLogChanged, PeerEnded, PeerForgotten, PeerPlaced
from scheduler.core.placements import Placement

if TYPE_CHECKING:
    from scheduler.core.core import SchedulerCore


def peer_placed(core: SchedulerCore, event: PeerPlaced, commands: list[Command]) -> None:
    """Holds what a peer's placement holds. Of two placements of one request the one that is told later counts.

    One on an instance that is not known here, or beyond `placements_max`, is left out and counted.
    """
    owner = (event.gateway_id, event.request_id)
    known = core.book.placements.get(owner)
    if owner in core.room.entries:
        # Its gateway asked here too: what comes of that, a placement or a cancel, is news that the other hears.
        core.count("peer_placements_unknown")
        return
    if known is not None:
        same = (event.peer, event.prefill_id, event.decode_id)
        if (known.peer, known.prefill_id, known.decode_id) == same:
            return
    decode = core.cluster.instances.get(event.decode_id)
    if decode is None or event.prefill_id not in core.cluster.instances:
        core.count("peer_placements_unknown")
        return
    core.end_placement(owner, "replaced", commands)
    if len(core.book.placements) >= core.config.placements_max:
        core.count("peer_placements_unknown")
        return
    expires_us = core.now_us + min(max(event.expires_in_us, 1), core.config.placement_ttl_us_max)
    core.book.open(
        Placement(
            owner=owner,
            model=event.model,
            max_tokens=event.max_tokens,
            prefill_id=event.prefill_id,
            decode_id=event.decode_id,
            split=event.split,
            kv_tokens=min(event.kv_tokens, decode.info.kv_tokens_total),
            prefill_kv_tokens=event.prefill_kv_tokens,
            prefill_holds=event.prefill_holds,
            prefill_us=event.prefill_us,
            context_tokens=event.context_tokens,
            expected_tokens=event.expected_tokens,
            placed_us=core.now_us - event.age_us,
            decode_ends_us=core.now_us + event.decode_ends_in_us,
            expires_us=expires_us,
            peer=event.peer,
        )
    )
    core.expiries.set(("placement", *owner), expires_us)
    core.count("peer_placements")
    if event.prefill_done:
        core.book.finish_prefill(owner, core.now_us)


def peer_ended(core: SchedulerCore, event: PeerEnded, commands: list[Command]) -> None:
    owner = (event.gateway_id, event.request_id)
    placement = core.book.placements.get(owner)
    if placement is not None and event.peer in (None, placement.peer):
        core.end_placement(owner, "outcome", commands)


def peer_forgotten(core: SchedulerCore, event: PeerForgotten, commands: list[Command]) -> None:
    for owner, placement in list(core.book.placements.items()):
        if placement.peer == event.peer:
            core.end_placement(owner, "expired", commands)


def event_log_changed(core: SchedulerCore, event: EventLogChanged, commands: list[Command]) -> None:
    """While the log is down, members of peers can't be heard and are kept longer; afterwards they get time to speak."""
    cluster = core.cluster
    came_back = event.up and not cluster.log_up
    cluster.log_up = event.up
    if not came_back:
        return
    for kind, members in (("instance", cluster.instances), ("source", cluster.sources)):
        for member_id, member in members.items():
            if cluster.peer_of(kind, member_id):
                patience_us = core.config.suspect_us if member.state is State.ALIVE else core.config.gone_us
                cluster.deadlines.set((kind, member_id), core.now_us + patience_us)


HANDLERS: dict[type, Callable[[SchedulerCore, Any, list[Command]], None]] = {
    PeerPlaced: peer_placed,
    PeerEnded: peer_ended,
    PeerForgotten: peer_forgotten,
    EventLogChanged: event_log_changed,
}
