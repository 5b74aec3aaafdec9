"""Faults of a simulation, each at its time. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvpool.core.errors import BadArgument
from scheduler.simulator.clock import EventLog, EventQueue
from scheduler.simulator.faults import Fault, FaultKind
from scheduler.simulator.gateway import WARM_UP_US
from scheduler.simulator.hosts import Hosts, Seat

_OF_HOSTS = (
    FaultKind.PARTITION, FaultKind.LINK, FaultKind.CLOCK, FaultKind.LOST_EVENTS, FaultKind.LATE_EVENTS,
)  # fmt: skip


class FaultPlan:
    """Puts faults on hosts and takes them off again. Their times count from the first arrival's."""

    def __init__(self, faults: Sequence[Fault], hosts: Hosts, queue: EventQueue, log: EventLog) -> None:
        """Raises: BadArgument for a target that is not there."""
        self._faults, self._hosts, self._queue, self._log = faults, hosts, queue, log
        self.begun: dict[str, int] = {}  # kind -> how many
        for fault in faults:
            known = fault.target in hosts.hosts or (fault.kind not in _OF_HOSTS and fault.target in hosts.seats)
            if known and not (fault.kind is FaultKind.SLOW and fault.target in hosts.hosts):
                continue
            what = "host" if fault.kind in _OF_HOSTS else "instance" if fault.kind is FaultKind.SLOW else "member"
            names = [*hosts.hosts][:3] if fault.kind in _OF_HOSTS else [*hosts.seats][:3]
            raise BadArgument(f"fault {fault.kind.value}: no {what} {fault.target!r}", hint=f"as {', '.join(names)}")

    def start(self) -> None:
        for fault in self._faults:
            self._queue.at(WARM_UP_US + fault.at_us, self._begin, fault)

    def _begin(self, fault: Fault) -> None:
        self.begun[fault.kind.value] = self.begun.get(fault.kind.value, 0) + 1
        self._log.add("fault", kind=fault.kind.value, target=fault.target, factor=fault.factor)
        _BEGIN[fault.kind](self, fault)
        if fault.duration_us:
            self._queue.after(fault.duration_us, self._end, fault)

    def _end(self, fault: Fault) -> None:
        self._log.add("fault-over", kind=fault.kind.value, target=fault.target)
        _END[fault.kind](self, fault)

    # ------------------------------------------------------------ each kind

    def _seats(self, fault: Fault) -> list[Seat]:
        if fault.target in self._hosts.hosts:
            return self._hosts.hosts[fault.target]
        return [self._hosts.seats[fault.target]]

    def _crash(self, fault: Fault) -> None:
        if fault.target in self._hosts.hosts:
            self._hosts.crash_node(fault.target)
        for seat in self._seats(fault):
            self._hosts.crash_instance(seat)

    def _restart(self, fault: Fault) -> None:
        if fault.target in self._hosts.hosts:
            self._hosts.restart_node(fault.target)
        for seat in self._seats(fault):
            self._hosts.restart_instance(seat)

    def _partition(self, fault: Fault) -> None:
        self._hosts.cut_host(fault.target)

    def _heal(self, fault: Fault) -> None:
        self._hosts.heal_host(fault.target)

    def _link(self, fault: Fault) -> None:
        if fault.period_us:
            self._flap(fault, self._queue.now_us + fault.duration_us, True)
        else:
            self._hosts.set_network(fault.target, fault.factor)

    def _flap(self, fault: Fault, until_us: int, bad: bool) -> None:
        """Half of each period as the fault says, half as built."""
        if self._queue.now_us < until_us:
            self._hosts.set_network(fault.target, fault.factor if bad else 1.0)
            self._queue.after(max(fault.period_us // 2, 1000), self._flap, fault, until_us, not bad)

    def _link_over(self, fault: Fault) -> None:
        self._hosts.set_network(fault.target, 1.0)

    def _slow(self, fault: Fault) -> None:
        self._hosts.seats[fault.target].engine.slow_factor = fault.factor

    def _slow_over(self, fault: Fault) -> None:
        self._hosts.seats[fault.target].engine.slow_factor = 1.0

    def _clock(self, fault: Fault) -> None:
        for seat in self._hosts.hosts[fault.target]:
            seat.engine.clock_factor = fault.factor

    def _clock_over(self, fault: Fault) -> None:
        for seat in self._hosts.hosts[fault.target]:
            seat.engine.clock_factor = 1.0

    def _lose(self, fault: Fault) -> None:
        for line in self._hosts.source_lines(fault.target):
            line.lost_ratio = fault.factor

    def _lose_no_more(self, fault: Fault) -> None:
        for line in self._hosts.source_lines(fault.target):
            line.lost_ratio = 0.0

    def _delay(self, fault: Fault) -> None:
        for line in self._hosts.source_lines(fault.target):
            line.late_us = fault.delay_us

    def _delay_no_more(self, fault: Fault) -> None:
        for line in self._hosts.source_lines(fault.target):
            line.late_us = 0


_Act = Callable[[FaultPlan, Fault], None]
_BEGIN: dict[FaultKind, _Act] = {
    FaultKind.CRASH: FaultPlan._crash,
    FaultKind.PARTITION: FaultPlan._partition,
    FaultKind.LINK: FaultPlan._link,
    FaultKind.SLOW: FaultPlan._slow,
    FaultKind.CLOCK: FaultPlan._clock,
    FaultKind.LOST_EVENTS: FaultPlan._lose,
    FaultKind.LATE_EVENTS: FaultPlan._delay,
}
_END: dict[FaultKind, _Act] = {
    FaultKind.CRASH: FaultPlan._restart,
    FaultKind.PARTITION: FaultPlan._heal,
    FaultKind.LINK: FaultPlan._link_over,
    FaultKind.SLOW: FaultPlan._slow_over,
    FaultKind.CLOCK: FaultPlan._clock_over,
    FaultKind.LOST_EVENTS: FaultPlan._lose_no_more,
    FaultKind.LATE_EVENTS: FaultPlan._delay_no_more,
}
