"""The core with what other schedulers say: what counts, what is kept, and for how long."""

from __future__ import annotations

from typing import Any

import scheduler_events as made

from kvpool.core.ids import Role
from scheduler.core import events
from scheduler.core.cluster import State
from scheduler.core.commands import CloseStream, Placed, PlacementEnded, Refused
from scheduler.core.config import SECOND_US, SchedulerConfig
from scheduler.core.core import SchedulerCore


class Driven:
    """A core, its time in seconds, and its invariants after each event."""

    def __init__(self, **config: Any) -> None:
        self.core = SchedulerCore(SchedulerConfig(**config))
        self.now_s = 1.0

    def tell(self, event: events.Event) -> list[Any]:
        commands = self.core.handle(event, int(self.now_s * SECOND_US))
        self.core.check_invariants()
        return commands

    def at(self, now_s: float) -> None:
        while (due_us := self.core.next_deadline_us()) is not None and due_us <= now_s * SECOND_US:
            self.core.tick(max(due_us, self.core.now_us))
            self.core.check_invariants()
        self.now_s = now_s
        self.tell(events.TimePassed())


def joined_by(peer: str, stream: int, instance_id: str = "w0", **over: Any) -> events.InstanceJoined:
    return events.InstanceJoined(stream, made.joined(stream, instance_id, **over).info, peer)


def placed(request_id: str = "r1", **over: Any) -> events.PeerPlaced:
    fields: dict[str, Any] = {
        "peer": "s1#1", "gateway_id": "gw", "request_id": request_id, "model": "tiny", "max_tokens": 100,
        "prefill_id": "w0", "decode_id": "w0", "split": False, "kv_tokens": 1152, "prefill_kv_tokens": 0,
        "prefill_holds": True, "prefill_us": 5000, "prefill_done": False, "context_tokens": 1050,
        "expected_tokens": 50, "age_us": 3000, "decode_ends_in_us": 900_000, "expires_in_us": 10 * SECOND_US,
    }  # fmt: skip
    return events.PeerPlaced(**{**fields, **over})


def test_a_peers_placement_holds_what_ours_would_and_expires_by_itself() -> None:
    d = Driven()
    d.tell(made.joined(1))
    assert d.tell(placed()) == []
    holdings = d.core.book.on("w0")
    assert holdings.kv_tokens == 1152 and holdings.queue_us == 5000
    d.tell(placed())  # said again
    assert d.core.counts["peer_placements"] == 1
    d.tell(made.reported(1, finished_prefills=("r1",)))
    assert d.core.book.on("w0").queue_us == 0
    for second in range(2, 12):
        d.at(second)
        d.tell(made.reported(1))
    assert not d.core.book.placements and d.core.counts["peer_ended"] == 1
    assert "ended_expired" not in d.core.counts


def test_a_full_instance_is_full_for_us_too() -> None:
    d = Driven()
    d.tell(made.joined(1))
    for n in range(7):
        d.tell(placed(f"r{n}"))
    free = d.core.cluster.instances["w0"].kv_tokens_available(d.core.book.on("w0").kv_tokens)
    assert free == 8192 - 7 * 1152
    # Others may promise more than there is; that must not break anything.
    d.tell(placed("r8"))
    d.tell(placed("r9", kv_tokens=1 << 40))
    assert d.core.cluster.instances["w0"].kv_tokens_available(d.core.book.on("w0").kv_tokens) == 0


def test_placed_by_a_peer_while_it_waits_here() -> None:
    d = Driven()
    d.tell(made.joined(1))
    d.tell(events.GatewayOpened(2, "gw"))
    for n in range(7):
        d.tell(placed(f"r{n}"))
    assert not [c for c in d.tell(made.place("mine")) if isinstance(c, Placed | Refused)]
    assert ("gw", "mine") in d.core.room.entries
    # Its gateway lost this scheduler for a moment, and asked another one.
    d.tell(placed("mine"))
    assert d.core.counts["peer_placements_unknown"] == 1 and ("gw", "mine") not in d.core.book.placements
    answers: list[Any] = []
    for n in range(7):
        answers += [c for c in d.tell(events.PeerEnded("gw", f"r{n}", "s1#1")) if isinstance(c, Placed | Refused)]
    d.at(1.5)
    assert [a.request_id for a in answers] == ["mine"] and isinstance(answers[0], Placed)


def test_ends_reach_those_they_are_meant_for() -> None:
    d = Driven()
    d.tell(made.joined(1))
    d.tell(events.GatewayOpened(2, "gw"))
    (mine,) = [c for c in d.tell(made.place("mine")) if isinstance(c, Placed)]
    assert mine.request_id == "mine"
    d.tell(placed("theirs"))
    d.tell(events.PeerEnded("gw", "mine", "s1#1"))
    d.tell(events.PeerEnded("gw", "theirs", ""))
    d.tell(events.PeerEnded("gw", "theirs", "s2#1"))
    assert len(d.core.book.placements) == 2
    assert PlacementEnded("mine", "gw", "outcome") in d.tell(events.PeerEnded("gw", "mine", None))
    assert d.tell(events.PeerEnded("gw", "theirs", "s1#1")) == []
    assert not d.core.book.placements
    for n in range(3):
        d.tell(placed(f"r{n}", peer="s1#1" if n else "s2#1"))
    d.tell(events.PeerForgotten("s1#1"))
    assert list(d.core.book.placements) == [("gw", "r0")]
    # The gateway's end here says nothing of what others placed for it.
    d.tell(events.GatewayClosed(2))
    assert len(d.core.book.placements) == 1
    d.tell(events.InstanceLeft(1))
    assert not d.core.book.placements


def test_placements_on_nobody_known_are_left_out() -> None:
    d = Driven(placements_max=1)
    d.tell(placed())
    d.tell(made.joined(1))
    d.tell(placed("r1"))
    d.tell(placed("r2", prefill_id="w7"))
    d.tell(placed("r3"))
    assert list(d.core.book.placements) == [("gw", "r1")] and d.core.counts["peer_placements_unknown"] == 3


def test_members_of_others_are_kept_while_they_cannot_be_heard() -> None:
    d = Driven(log_down_us_max=60 * SECOND_US)
    d.tell(joined_by("s1", 1, "theirs"))
    d.tell(made.attached(2, "node-1", peer="s1"))
    d.tell(made.joined(3, "ours"))
    d.tell(events.EventLogChanged(False))
    d.at(5)
    cluster = d.core.cluster
    assert {i.state for i in cluster.instances.values()} == {State.SUSPECT}
    d.at(30)
    assert list(cluster.instances) == ["theirs"] and list(cluster.sources) == ["node-1"]
    d.tell(events.EventLogChanged(True))
    d.at(40)
    d.tell(made.reported(1))
    assert cluster.instances["theirs"].state is State.ALIVE
    # The node was not heard of again in the time that it got.
    d.at(46)
    assert not cluster.sources
    d.tell(made.reported(1))
    d.tell(events.EventLogChanged(False))
    d.at(105)
    assert list(cluster.instances) == ["theirs"]
    d.at(107)
    assert not cluster.instances


def test_the_same_process_by_another_line_keeps_what_it_has() -> None:
    d = Driven()
    d.tell(joined_by("s1", 1))
    d.tell(placed())
    costs = d.core.costs.prefill["w0"]
    commands = d.tell(made.joined(2))
    assert [c.stream for c in commands if isinstance(c, CloseStream)] == [1]
    assert d.core.costs.prefill["w0"] is costs and len(d.core.book.placements) == 1
    assert d.core.cluster.instances["w0"].peer == ""
    d.tell(made.reported(1, running=9))  # of a line that speaks for nobody
    assert d.core.cluster.instances["w0"].running == 0
    d.tell(made.joined(3, role=Role.DECODE))  # its role may change while it runs
    assert len(d.core.book.placements) == 1 and d.core.cluster.instances["w0"].info.role is Role.DECODE
    # Another process, and one that is not what it was.
    d.tell(made.joined(4, kv_tokens_total=4096))
    assert not d.core.book.placements
    d.tell(joined_by("s1", 5, epoch=2))
    commands = d.tell(joined_by("s2", 6, epoch=1))
    assert [c.stream for c in commands if isinstance(c, CloseStream)] == [6]
