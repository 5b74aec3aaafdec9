"""Links with shared bandwidth: transfers as flows. Pure.

A transfer goes through several resources (the sender's port, the receiver's, a drive) and gets the least of its equal
shares of each. That is never above any resource's bandwidth, and a start or an end changes the rates of those only that
share a resource with it. What others leave unused is not handed on, as max-min fairness would: a transfer that shares a
wide port with narrow ones is too slow by that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from scheduler.simulator.clock import EventQueue

#: A transfer that makes no progress for this long has failed.
STALLED_US = 1_000_000


@dataclass(slots=True)
class Resource:
    """One direction of a port, or a drive."""

    name: str
    bytes_us: float  # as built
    factor: float = 1.0  # what faults leave of it; 0 = down
    transfers: dict[int, Transfer] = field(default_factory=dict)
    bytes_moved: float = 0.0

    @property
    def share_bytes_us(self) -> float:
        return self.bytes_us * self.factor / len(self.transfers)


@dataclass(slots=True)
class Transfer:
    number: int
    size_bytes: int
    resources: tuple[Resource, ...]
    on_end: Callable[[Transfer, bool], None]  # (transfer, whether it failed)
    begun_us: int  # its latency counted in
    left_bytes: float
    rate_bytes_us: float = 0.0
    settled_us: int = 0
    version: int = 0  # of the rate: an end that was foreseen for another rate does not come
    ended: bool = False

    @property
    def moved_bytes(self) -> float:
        """As of the last change of its rate, or its end."""
        return self.size_bytes - self.left_bytes


class Fabric:
    """All resources and the transfers that go through them."""

    def __init__(self, queue: EventQueue) -> None:
        self._queue = queue
        self.resources: dict[str, Resource] = {}
        self._active: dict[int, Transfer] = {}
        self._started = 0
        self.transfers_done = 0
        self.transfers_failed = 0
        self.bytes_delivered = 0

    def add(self, name: str, bytes_s: float) -> None:
        assert name not in self.resources and bytes_s > 0
        self.resources[name] = Resource(name, bytes_s / 1e6)

    def start(
        self, size_bytes: int, names: Sequence[str], latency_us: float, on_end: Callable[[Transfer, bool], None]
    ) -> Transfer:
        """Starts a transfer. After its latency it takes part in the sharing."""
        assert size_bytes > 0
        self._started += 1
        resources = tuple(self.resources[name] for name in names)
        transfer = Transfer(self._started, size_bytes, resources, on_end, self._queue.now_us, float(size_bytes))
        self._queue.after(int(latency_us), self._flow, transfer)
        return transfer

    def cancel(self, transfer: Transfer) -> None:
        """Ends a transfer without a word to its owner; `moved_bytes` says how far it came."""
        if not transfer.ended:
            self._leave(transfer)

    def set_factor(self, name: str, factor: float) -> None:
        """What a fault leaves of a resource's bandwidth: 1 = all, 0 = down."""
        assert factor >= 0
        resource = self.resources[name]
        resource.factor = factor
        self._rerate([resource])

    def fail_through(self, name: str) -> None:
        """Ends all transfers through a resource: whoever was behind it is gone."""
        for transfer in list(self.resources[name].transfers.values()):
            self._stalled(transfer, transfer.version)

    def _flow(self, transfer: Transfer) -> None:
        if transfer.ended:
            return
        transfer.settled_us = self._queue.now_us
        self._active[transfer.number] = transfer
        for resource in transfer.resources:
            resource.transfers[transfer.number] = transfer
        transfer.rate_bytes_us = -1.0  # none yet: any rate is news
        self._rerate(transfer.resources)

    def _leave(self, transfer: Transfer) -> None:
        self._settle(transfer)
        transfer.ended = True
        if self._active.pop(transfer.number, None) is None:
            return
        for resource in transfer.resources:
            del resource.transfers[transfer.number]
        self._rerate(transfer.resources)

    def _settle(self, transfer: Transfer) -> None:
        now_us = self._queue.now_us
        if transfer.rate_bytes_us > 0 and now_us > transfer.settled_us:
            moved = min(transfer.rate_bytes_us * (now_us - transfer.settled_us), transfer.left_bytes)
            transfer.left_bytes -= moved
            for resource in transfer.resources:
                resource.bytes_moved += moved
        transfer.settled_us = now_us

    def _rerate(self, changed: Sequence[Resource]) -> None:
        """Gives every transfer through one of these resources its share."""
        seen: dict[int, None] = {}
        for resource in changed:
            for number, transfer in resource.transfers.items():
                if number in seen:
                    continue
                seen[number] = None
                rate = min(r.share_bytes_us for r in transfer.resources)
                if rate != transfer.rate_bytes_us:
                    self._settle(transfer)
                    self._set_rate(transfer, rate)

    def _set_rate(self, transfer: Transfer, rate: float) -> None:
        transfer.rate_bytes_us = rate
        transfer.version += 1
        if rate > 0:
            self._queue.after(-int(-transfer.left_bytes // rate), self._arrived, transfer, transfer.version)
        else:
            self._queue.after(STALLED_US, self._stalled, transfer, transfer.version)

    def _arrived(self, transfer: Transfer, version: int) -> None:
        if transfer.ended or transfer.version != version:
            return
        self._leave(transfer)
        transfer.left_bytes = 0.0
        self.transfers_done += 1
        self.bytes_delivered += transfer.size_bytes
        transfer.on_end(transfer, False)

    def _stalled(self, transfer: Transfer, version: int) -> None:
        if transfer.ended or transfer.version != version:
            return
        self._leave(transfer)
        self.transfers_failed += 1
        transfer.on_end(transfer, True)

    def check_invariants(self) -> None:
        for resource in self.resources.values():
            rate = sum(t.rate_bytes_us for t in resource.transfers.values())
            assert rate <= resource.bytes_us * resource.factor * (1 + 1e-9), f"{resource.name} above its bandwidth"
            assert all(self._active.get(number) is t for number, t in resource.transfers.items())
        for transfer in self._active.values():
            assert not transfer.ended and 0 <= transfer.left_bytes <= transfer.size_bytes
